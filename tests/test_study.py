"""The driver's contracts, and the smoke study of all eight models."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import nbformat
import pandas as pd
import pytest

from leukemia_nb.models import MODELS, ModelEntry
from leukemia_nb.study import (SMOKE, Run, Step, StudyError, StudySettings, check_parameters, fingerprint, generations, run_step,
                               run_study, study_notebook, study_steps)

ALL_MODELS = ("efficientnet_b0", "mobilenet_v2", "nasnet_mobile", "dual_channel", "yolov8", "yolo11", "yolo12", "cells")


def write_notebook(path, code, parameters="run = ''\nvalue = 1", tags=("parameters",)):
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": list(tags)}), nbformat.v4.new_code_cell(code)]
    spec = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=spec), path)
    return path


@pytest.fixture()
def counter(tmp_path):
    """A step whose notebook adds a line to `ran.txt` outside the outputs each time it runs."""
    code = ("from pathlib import Path\nwith open(Path(run) / 'ran.txt', 'a') as f: f.write('x')\n"
            "text = (Path(run) / 'in.txt').read_text()\n(Path(run) / 'out.txt').write_text(text + str(value))")
    notebook = write_notebook(tmp_path / "counter.ipynb", code)
    run = Run(tmp_path / "run")
    run.path("in.txt").write_text("a")
    return Step("counter", "counter.ipynb", {"value": 1}, ("in.txt",), ("out.txt",)), run, notebook


def runs(run):
    return len((run.folder / "ran.txt").read_text())


def test_a_finished_unchanged_step_is_skipped(counter):
    step, run, notebook = counter
    assert not run_step(step, run, notebook)["skipped"]
    assert run_step(step, run, notebook)["skipped"]
    assert runs(run) == 1


@pytest.mark.parametrize("change", ["parameter", "input", "output", "notebook", "redo"])
def test_what_changes_makes_the_step_run_again(counter, change):
    step, run, notebook = counter
    run_step(step, run, notebook)
    if change == "parameter":
        step = replace(step, parameters={"value": 2})
    elif change == "input":
        run.path("in.txt").write_text("b")
    elif change == "output":
        run.path("out.txt").write_text("edited")
    elif change == "notebook":
        write_notebook(notebook, "from pathlib import Path\nopen(Path(run) / 'ran.txt', 'a').write('x')\n"
                                 "(Path(run) / 'out.txt').write_text('new')")
    assert not run_step(step, run, notebook, redo=change == "redo")["skipped"]
    assert runs(run) == 2


def test_an_unknown_parameter_is_refused_before_anything_runs(counter):
    step, run, notebook = counter
    with pytest.raises(StudyError, match="unknown parameter vaule; it knows run, value"):
        run_step(replace(step, parameters={"vaule": 2}), run, notebook)
    assert not (run.folder / "ran.txt").exists()


def test_a_notebook_without_the_parameters_tag_is_refused(tmp_path):
    notebook = write_notebook(tmp_path / "plain.ipynb", "1", tags=())
    with pytest.raises(StudyError, match="no cell is tagged `parameters`"):
        check_parameters(notebook, ["run"])


def test_a_failed_step_keeps_its_partial_notebook_and_leaves_no_record(counter):
    step, run, notebook = counter
    run_step(step, run, notebook)
    write_notebook(notebook, "print('before')\nraise ValueError('no cells in picture 7')")
    with pytest.raises(StudyError, match=r"step counter failed: ValueError: no cells in picture 7\n.*counter\.partial\.ipynb"):
        run_step(step, run, notebook)
    outputs = nbformat.read(run.folder / "notebooks/counter.partial.ipynb", 4).cells[-1].outputs
    assert any("no cells in picture 7" in str(output) for output in outputs)
    assert not (run.folder / "steps/counter.json").exists()


def test_a_step_that_does_not_write_what_it_promised_fails(counter):
    step, run, notebook = counter
    with pytest.raises(StudyError, match="ended without writing other.csv"):
        run_step(replace(step, outputs=("out.txt", "other.csv")), run, notebook)


def test_steps_follow_their_inputs():
    groups = generations(study_steps(StudySettings(weights="random")))
    kinds = [{step.name.split("-")[0] for step in group} for group in groups]
    assert kinds == [{"prepare"}, {"split"}, {"train", "counterfactuals", "cross", "efficientnet"}, {"audit", "compare"}, {"worth"},
                     {"cards"}, {"export"}, {"report"}]
    assert sum(step.name.startswith("train-") for step in groups[2]) == len(MODELS)
    with pytest.raises(StudyError, match="no step writes manifest.csv"):
        generations(study_steps(StudySettings(weights="random"))[1:])


def test_the_fingerprint_of_outside_pictures_follows_their_change(tmp_path):
    (tmp_path / "a.png").write_bytes(b"1")
    step = Step("s", "n.ipynb", outside=(str(tmp_path),))
    notebook = write_notebook(tmp_path.parent / "n.ipynb", "1")
    before = fingerprint(step, Run(tmp_path / "run"), notebook)
    (tmp_path / "b.png").write_bytes(b"2")
    assert fingerprint(step, Run(tmp_path / "run"), notebook) != before


def test_two_studies_cannot_share_a_folder(tmp_path):
    code = (f"from leukemia_nb.study import _locked, Run; import time\nwith _locked(Run({str(tmp_path)!r})):\n"
            "    print('held', flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(StudyError, match="another study is running here"):
            run_study(SMOKE, tmp_path)
        other.kill()


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match="cannot be written"):
        run_study(SMOKE, tmp_path / "file" / "run")


@pytest.mark.parametrize(("bad", "message"), [
    ({"models": ("resnet",)}, "unknown model resnet"), ({"data": "/no/such"}, "data is not there"), ({"classes": 5}, "classes is 5"),
    ({"train": ("yolov8=5",)}, "model:setting=value"), ({"weights": "coco"}, "weights is 'coco'")])
def test_settings_are_checked_when_they_are_made(bad, message):
    with pytest.raises(StudyError, match=message):
        StudySettings(**bad)


def test_every_step_knows_the_parameters_it_is_given():
    for step in study_steps(StudySettings(weights="random")):
        check_parameters(study_notebook(step.notebook), ["run", *step.parameters])


def test_a_killed_study_goes_on_where_it_stopped(tmp_path):
    run = tmp_path / "run"
    code = ("from leukemia_nb.study import SMOKE, run_study\n"
            f"run_study(SMOKE, {str(run)!r}, until=['train'])")
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.DEVNULL) as process:
        end = time.time() + 240
        while not (run / "steps/prepare.json").exists() and time.time() < end:
            time.sleep(0.1)
        while not (run / "notebooks/train-mobilenet_v2.partial.ipynb").exists() and time.time() < end:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    assert (run / "steps/prepare.json").exists() and not (run / "steps/train-mobilenet_v2.json").exists()
    said = []
    run_study(SMOKE, run, say=said.append, until=["prepare"])
    assert "  prepare: unchanged" in said


@pytest.fixture(scope="module")
def smoke_study(tmp_path_factory):
    """The whole smoke study, all eight models."""
    folder = tmp_path_factory.mktemp("smoke") / "run"
    said = []
    run_study(replace(SMOKE, models=ALL_MODELS), folder, n_jobs=2, say=said.append)
    return Run(folder), said


def test_the_smoke_study_leaves_everything_it_promises(smoke_study):
    run, _ = smoke_study
    for step in study_steps(replace(SMOKE, models=ALL_MODELS)):
        assert (run.folder / "notebooks" / f"{step.name}.ipynb").is_file()
        for output in step.outputs:
            assert (run.folder / output).exists(), output
    assert not list(run.folder.glob("notebooks/*.partial.ipynb"))
    models = run.table("metrics/models.csv")
    assert models.model.tolist() == list(ALL_MODELS)
    assert models.weights.str.contains("random|no pretrained").all()


def test_the_report_is_one_file_without_requests(smoke_study):
    text = (smoke_study[0].folder / "report.html").read_text(encoding="utf-8")
    assert "data:image" in text and "EfficientNet-B0" in text and "YOLO12" in text and "For research only" in text
    assert 'src="http' not in text and "url(http" not in text and "<link" not in text


def test_predictions_cover_validation_and_test(smoke_study):
    run, _ = smoke_study
    split = run.table("split.csv")
    for model in ALL_MODELS:
        table = run.table("predictions", f"{model}.csv")
        for subset in ("validation", "test"):
            assert set(table.pair[table.subset == subset]) == set(split.pair[split.subset == subset])
        assert (table[["p_Normal", "p_Pre-B", "p_Pro-B"]].sum(axis=1) - 1).abs().max() < 1e-4


def test_run_again_does_nothing(smoke_study):
    run, _ = smoke_study
    said = []
    run_study(replace(SMOKE, models=ALL_MODELS), run.folder, say=said.append)
    assert sum("unchanged" in line for line in said) == len(study_steps(replace(SMOKE, models=ALL_MODELS)))


def test_a_changed_setting_of_one_model_retrains_that_model_alone(smoke_study):
    run, _ = smoke_study
    said = []
    settings = replace(SMOKE, models=ALL_MODELS, train=("mobilenet_v2:batch_size=16",))
    run_study(settings, run.folder, say=said.append, until=["train"])
    again = [line.split(":")[0].strip() for line in said if " s" in line and "unchanged" not in line and "…" not in line]
    assert again == ["train-mobilenet_v2"]


def test_four_classes_and_the_grouped_split_go_through_every_step(tmp_path):
    settings = replace(SMOKE, classes=4, split="grouped", models=("mobilenet_v2", "cells"), repeats=1)
    run = run_study(settings, tmp_path / "run", n_jobs=2)
    four = ["Normal", "Early Pre-B", "Pre-B", "Pro-B"]
    predictions = run.table("predictions", "cells.csv")
    assert [name for name in predictions if name.startswith("p_")] == [f"p_{name}" for name in four]
    assert set(run.table("metrics/classes.csv")["class"]) == set(run.table("audit/counterfactuals.csv")["cells"].dropna()) == set(four)
    leakage = run.table("leakage.csv")
    assert leakage.with_partner.sum() == 0
    assert "Early Pre-B" in (run.folder / "report.html").read_text(encoding="utf-8")


def test_one_failing_model_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("LEUKEMIA_NB_WEIGHTS", str(tmp_path / "nowhere"))
    settings = replace(SMOKE, train=("mobilenet_v2:weights=local",))
    with pytest.raises(StudyError, match=r"(?s)step train-mobilenet_v2 failed.*nowhere is not a folder.*goes on from here"):
        run_study(settings, tmp_path / "run", until=["train"])
    assert json.loads((tmp_path / "run/steps/prepare.json").read_text())["step"] == "prepare"
    assert len(pd.read_csv(tmp_path / "run/pairs.csv")) == 72


def test_mistakes_are_named_before_any_step(tmp_path):
    for settings, redo, message in ((replace(SMOKE, train=("mobilenet_v2:foo=1",)), (), "unknown setting 'foo'"),
                                    (replace(SMOKE, train=("mobilenet_v2:epochs=0",)), (), "epochs=0"),
                                    (SMOKE, ("train-mobilenet",), "no step is called 'train-mobilenet'")):
        with pytest.raises(StudyError, match=message): run_study(settings, tmp_path / "run", redo=redo)
    with pytest.raises(StudyError, match="settings for yolo12, which is not among the models"):
        replace(SMOKE, models=("mobilenet_v2",), train=("yolo12:epochs=2",))
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_graph_is_not_exported(monkeypatch):
    monkeypatch.setitem(MODELS, "stub", ModelEntry("Stub", __name__, "Stub", "numpy"))
    steps = study_steps(replace(SMOKE, models=("stub", "cells")))
    assert {step.name for step in steps if "stub" in step.name} == {"train-stub", "audit-stub"}
    assert any(step.name == "export-cells" for step in steps) and len(generations(steps)) > 3
