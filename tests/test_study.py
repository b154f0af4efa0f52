"""The driver's contracts, and the smoke study of all eight models."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
from PIL import Image
from typer.testing import CliRunner

from leukemia_nb.data.classes import FOUR_CLASSES
from leukemia_nb.data.files import mark_output_folder
from leukemia_nb.data.synthetic import write_smears
from leukemia_nb.models.interface import BACKBONES, MODELS, ModelError
from leukemia_nb.study import driver
from leukemia_nb.study.command_line import _explanation, app
from leukemia_nb.study.driver import (
    Step,
    _check_parameters,
    _fingerprint,
    _select_steps,
    _step_lock,
    _study_notebook,
    run_step,
    run_study,
    _steps_beside,
    study_steps,
    _with_dependencies,
)
from leukemia_nb.study.settings import Run, StudyError, StudySettings, check_study
from leukemia_nb.testing import SMOKE

ALL_MODELS = ("efficientnet_b0", "mobilenet_v2", "nasnet_mobile", "dual_channel", "yolov8", "yolo11", "yolo12", "cells")
FROZEN = ("nasnet_mobile:fine_tune=false", "dual_channel:fine_tune=false")  # building NASNet's training step takes a minute
EIGHT = replace(SMOKE, models=ALL_MODELS, model_settings=FROZEN)


def write_notebook(path, code, parameters="run = ''\nvalue = 1", tags=("parameters",)):
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": list(tags)}), nbformat.v4.new_code_cell(code)]
    spec = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=spec), path)
    return path


@pytest.fixture()
def counter(tmp_path):
    """A step whose notebook adds a line to the hidden file `.ran.txt` each time it runs."""
    code = (
        "from pathlib import Path\nwith open(Path(run) / '.ran.txt', 'a') as f: f.write('x')\n"
        "text = (Path(run) / 'in.txt').read_text()\n(Path(run) / 'out.txt').write_text(text + str(value))"
    )
    notebook = write_notebook(tmp_path / "counter.ipynb", code)
    run = Run(tmp_path / "run")
    run.path("in.txt").write_text("a")
    return Step("counter", str(notebook), {"value": 1}, ("in.txt",), ("out.txt",)), run, notebook


def runs(run):
    return len((run.folder / ".ran.txt").read_text())


def test_a_finished_unchanged_step_is_skipped(counter):
    step, run, notebook = counter
    assert not run_step(step, run)["skipped"]
    assert run_step(step, run)["skipped"]
    assert runs(run) == 1


@pytest.mark.parametrize("change", ["parameter", "input", "output", "notebook", "executed", "redo"])
def test_what_changes_makes_the_step_run_again(counter, change):
    step, run, notebook = counter
    run_step(step, run)
    if change == "parameter":
        step = replace(step, parameters={"value": 2})
    elif change == "input":
        run.path("in.txt").write_text("b")
    elif change == "output":
        run.path("out.txt").write_text("edited")
    elif change == "executed":
        run.path("notebooks", "counter.ipynb").unlink()  # the report would lack its section
    elif change == "notebook":
        write_notebook(
            notebook,
            "from pathlib import Path\nopen(Path(run) / '.ran.txt', 'a').write('x')\n(Path(run) / 'out.txt').write_text('new')",
        )
    assert not run_step(step, run, redo=change == "redo")["skipped"]
    assert runs(run) == 2


def test_an_unknown_parameter_is_refused_before_anything_runs(counter):
    step, run, notebook = counter
    with pytest.raises(StudyError, match="unknown parameter vaule; it knows run, value"):
        run_step(replace(step, parameters={"vaule": 2}), run)
    assert not (run.folder / ".ran.txt").exists()


def test_a_notebook_without_the_parameters_tag_is_refused(tmp_path):
    notebook = write_notebook(tmp_path / "plain.ipynb", "1", tags=())
    with pytest.raises(StudyError, match="no cell is tagged `parameters`"):
        _check_parameters(notebook, ["run"])


def test_a_failed_step_keeps_its_partial_notebook_and_leaves_no_record(counter):
    step, run, notebook = counter
    run_step(step, run)
    write_notebook(notebook, "print('before')\nraise ValueError('no cells in image 7')")
    with pytest.raises(StudyError, match=r"step counter failed: ValueError: no cells in image 7\n.*counter\.partial\.ipynb"):
        run_step(step, run)
    outputs = nbformat.read(run.folder / "notebooks/counter.partial.ipynb", 4).cells[-1].outputs
    assert any("no cells in image 7" in str(output) for output in outputs)
    assert not (run.folder / "steps/counter.json").exists()


def test_a_step_that_does_not_write_what_it_promised_fails(counter):
    step, run, notebook = counter
    with pytest.raises(StudyError, match="ended without writing other.csv"):
        run_step(replace(step, writes=("out.txt", "other.csv")), run)


def test_a_step_that_writes_what_it_does_not_declare_fails(counter):
    step, run, notebook = counter
    with pytest.raises(StudyError, match="step counter wrote out.txt, which it does not declare"):
        run_step(replace(step, writes=("in.txt",)), run)
    assert not run_step(replace(step, writes=("in.txt",)), run, others=("out.txt",))["skipped"]
    run.path("in.txt").write_text("b")
    assert not run_step(step, run)["skipped"]  # what lay there before is not the step's


def test_steps_follow_their_files():
    settings = StudySettings(weights="random")
    steps = study_steps(settings)
    needed = {step.name: {each.name for each in _with_dependencies(steps, [step.name])} for step in steps}
    assert needed["cue-conflict"] == {"prepare", "split", "cue-conflict"}
    assert needed["audit-yolov8"] == {"prepare", "split", "cue-conflict", "train-yolov8", "audit-yolov8"}
    assert {f"train-{model}" for model in MODELS} | {"cross-validate"} < needed["cards"] and "efficientnet" not in needed["cards"]
    assert needed["report"] == {step.name for step in steps}
    writes = [path for step in steps for path in step.writes]
    assert len(writes) == len(set(writes))
    with pytest.raises(StudyError, match="no step writes cell_features.csv"):
        _steps_beside(steps[1:])


def test_steps_that_can_run_side_by_side_do_not_need_each_other():
    steps = study_steps(StudySettings(weights="random"))
    beside = {name: {step.name for step in others} for name, others in _steps_beside(steps).items()}
    assert not beside["prepare"] and not beside["split"] and not beside["report"]
    assert {"train-cells", "cross-validate", "efficientnet"} < beside["train-yolov8"]
    assert not {"train-yolov8", "audit-yolov8", "compare", "cards"} & beside["train-yolov8"]
    assert all(name in beside[other] for name, others in beside.items() for other in others)


def run_without_notebooks(monkeypatch, folder, settings, n_jobs, failing=""):
    """Names of the steps that a study starts, in order, and what it says; no notebook is run."""
    started, said = [], []

    def run_step(step, run, **more):
        started.append(step.name)
        if step.name == failing:
            raise StudyError(f"step {step.name} has no luck.")
        return {"step": step.name, "seconds": 1.0, "skipped": False, "outdated": False}

    monkeypatch.setattr(driver, "run_step", run_step)
    monkeypatch.setattr(driver, "_check_prepared", lambda run: None)
    with pytest.raises(StudyError, match="no luck.\nFinished steps are kept") if failing else nullcontext():
        run_study(settings, folder, n_jobs=n_jobs, log=said.append)
    return started, said


def test_one_step_at_a_time_is_the_order_of_the_steps(tmp_path, monkeypatch):
    started, said = run_without_notebooks(monkeypatch, tmp_path / "run", EIGHT, 1)
    assert started == [step.name for step in study_steps(EIGHT)]
    assert said[0] == f"{len(started)} steps into {tmp_path / 'run'}; each that is finished is kept."
    assert said[1:3] == ["prepare …", f"[1/{len(started)}] prepare: 1 s"] and len(said) == 1 + 2 * len(started)


def test_a_failed_step_stops_those_that_need_it_and_no_others(tmp_path, monkeypatch):
    settings = replace(SMOKE, models=("mobilenet_v2", "yolov8"))
    started, _ = run_without_notebooks(monkeypatch, tmp_path / "run", settings, 2, "train-yolov8")
    every = {step.name for step in study_steps(settings)}
    stopped = {"audit-yolov8", "compare", "shortcut-audit", "cards", "export-mobilenet_v2", "export-yolov8", "report"}
    assert set(started) == every - stopped and len(started) == len(set(started))


def test_frozen_backbones_are_computed_once_and_read_by_their_models():
    steps = {step.name: step for step in study_steps(StudySettings(model_settings=("nasnet_mobile:weights=random",)))}
    assert {name for name in steps if name.startswith("features-")} == {"features-mobilenet_v2", "features-efficientnet_b0"}
    readers = {name for name, step in steps.items() if "features/mobilenet_v2.npz" in step.reads}
    assert readers == {f"{kind}-{model}" for kind in ("train", "export") for model in ("mobilenet_v2", "dual_channel")} | {
        "cross-validate",
        "report",
    }
    assert not any("nasnet" in path for path in steps["train-nasnet_mobile"].reads)


def test_a_step_is_selected_with_all_that_it_needs():
    steps = study_steps(StudySettings(weights="random"))
    assert [step.name for step in _with_dependencies(steps, ["cue-conflict"])] == ["prepare", "split", "cue-conflict"]
    assert _with_dependencies(steps, []) == steps
    assert _select_steps(steps, ["train"]) == {f"train-{model}" for model in MODELS}
    assert _select_steps(steps, ["train-cells"]) == {"train-cells"}
    with pytest.raises(StudyError, match="no step is called 'trian'"):
        _with_dependencies(steps, ["trian"])


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({"model": "yolov8", "settings": {"weights": "local"}}, "yolov8n-cls.pt"),
        ({"model": "dual_channel", "settings": {"weights": "imagenet"}}, BACKBONES["mobilenet_v2"].files[0]),
        ({"backbone": "mobilenet_v2", "weights": "local"}, BACKBONES["mobilenet_v2"].files[0]),
        ({"weights": "local"}, BACKBONES["efficientnet_b0"].files[0]),
    ],
)
def test_weight_files_that_come_later_make_the_step_run_again(counter, tmp_path, monkeypatch, parameters, name):
    step, run, _ = counter
    notebook = write_notebook(
        tmp_path / "trains.ipynb",
        "from pathlib import Path\n(Path(run) / 'out.txt').write_text('trained')",
        "run = ''\nmodel = ''\nbackbone = ''\nweights = ''\nsettings = {}",
    )
    step = replace(step, notebook=str(notebook), parameters=parameters)
    monkeypatch.setenv("LEUKEMIA_NB_WEIGHTS", str(tmp_path))
    assert not run_step(step, run)["skipped"]
    (tmp_path / "other.h5").write_text("weights of another network")
    assert run_step(step, run)["skipped"]
    (tmp_path / name).write_text("weights")
    assert not run_step(step, run)["skipped"] and run_step(step, run)["skipped"]


@pytest.mark.slow
def test_smears_of_other_settings_are_replaced(tmp_path):
    for per_class, seed in ((24, 0), (20, 1)):
        run_study(replace(SMOKE, per_class=per_class, seed=seed), tmp_path, until=("prepare",))
    assert len(Run(tmp_path).table("manifest.csv")) == 20 * len(Run(tmp_path).classes)


def test_the_fingerprint_of_outside_images_follows_their_change(tmp_path):
    (tmp_path / "a.png").write_bytes(b"1")
    step = Step("s", "n.ipynb", reads=(str(tmp_path),))
    notebook = write_notebook(tmp_path.parent / "n.ipynb", "1")
    before = _fingerprint(step, Run(tmp_path / "run"), notebook)
    (tmp_path / "b.png").write_bytes(b"2")
    assert _fingerprint(step, Run(tmp_path / "run"), notebook) != before


def test_two_studies_cannot_share_a_folder(tmp_path):
    code = (
        f"from leukemia_nb.study.driver import Run, _locked; from pathlib import Path; import time\nwith _locked(Run(Path({str(tmp_path)!r}))):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(StudyError, match="another study is running here"):
            run_study(SMOKE, tmp_path)
        other.kill()


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match="cannot be written"):
        run_study(SMOKE, tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"models": ("resnet",)}, "unknown model resnet"),
        ({"data": "/no/such"}, "data is not there"),
        ({"classes": 5}, "classes is 5: a list of class names is expected"),
        ({"model_settings": ("yolov8=5",)}, "model:setting=value"),
        ({"weights": "coco"}, "weights is 'coco'"),
        ({"train_size": 0.9, "test_size": 0.1}, "their sum below 1"),
        ({"per_class": 6, "test_size": 0.1}, "per_class is 6"),
        ({"cv_repeats": 0}, "cv_repeats is 0; it must be at least 1"),
        ({"spurious_correlation": 3.0}, "spurious_correlation is 3.0"),
    ],
)
def test_settings_are_checked_when_they_are_made(bad, message):
    with pytest.raises(StudyError, match=message):
        StudySettings(**bad)


def test_every_step_knows_the_parameters_it_is_given():
    for step in study_steps(StudySettings(weights="random")):
        _check_parameters(_study_notebook(step.notebook), ["run", *step.parameters])


@pytest.mark.slow
def test_a_killed_study_goes_on_where_it_stopped(tmp_path):
    run = tmp_path / "run"
    code = f"from leukemia_nb.testing import SMOKE, run_study\nrun_study(SMOKE, {str(run)!r}, until=['train'])"
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.DEVNULL) as process:
        end = time.time() + 240
        while not (run / "steps/prepare.json").exists() and time.time() < end:
            time.sleep(0.1)
        while not (run / "notebooks/train-mobilenet_v2.partial.ipynb").exists() and time.time() < end:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    assert (run / "steps/prepare.json").exists() and not (run / "steps/train-mobilenet_v2.json").exists()
    said = []
    run_study(SMOKE, run, log=said.append, until=["prepare"])
    assert any(line.endswith("] prepare: unchanged") for line in said)


@pytest.fixture(scope="module")
def smoke_study(tmp_path_factory):
    """The whole smoke study, all eight models."""
    folder = tmp_path_factory.mktemp("smoke") / "run"
    said = []
    run_study(EIGHT, folder, n_jobs=2, log=said.append)
    return Run(folder), said


@pytest.mark.slow
def test_the_smoke_study_leaves_everything_it_promises(smoke_study):
    run, _ = smoke_study
    for step in study_steps(EIGHT):
        assert (run.folder / "notebooks" / f"{step.name}.ipynb").is_file()
        for output in step.writes:
            assert (run.folder / output).exists(), output
    assert not list(run.folder.glob("notebooks/*.partial.ipynb"))
    models = run.table("metrics/models.csv")
    assert models.model.tolist() == list(ALL_MODELS)
    assert models.weights.str.contains("random|no pretrained").all()


@pytest.mark.slow
def test_the_report_is_one_file_without_requests(smoke_study):
    text = (smoke_study[0].folder / "report.html").read_text(encoding="utf-8")
    assert "data:image" in text and "EfficientNet-B0" in text and "YOLO12" in text and "For research only" in text
    assert 'src="http' not in text and "url(http" not in text and "<link" not in text


@pytest.mark.slow
def test_predictions_cover_validation_and_test(smoke_study):
    run, _ = smoke_study
    split = run.table("split.csv")
    for model in ALL_MODELS:
        table = run.table("predictions", f"{model}.csv")
        for subset in ("val", "test"):
            assert set(table.pair[table.subset == subset]) == set(split.pair[split.subset == subset])
        assert (table[["p_Normal", "p_Pre-B", "p_Pro-B"]].sum(axis=1) - 1).abs().max() < 1e-4


@pytest.mark.slow
def test_run_again_does_nothing(smoke_study):
    run, _ = smoke_study
    said = []
    run_study(EIGHT, run.folder, log=said.append)
    assert sum("unchanged" in line for line in said) == len(study_steps(EIGHT))


@pytest.mark.slow
def test_a_changed_setting_of_one_model_retrains_that_model_alone(smoke_study):
    run, _ = smoke_study
    said = []
    settings = replace(EIGHT, model_settings=(*FROZEN, "mobilenet_v2:batch_size=16"))
    run_study(settings, run.folder, log=said.append, until=["train"])
    again = [line.split("] ")[-1].split(":")[0] for line in said if line.startswith("[") and "unchanged" not in line]
    assert again == ["train-mobilenet_v2"]


@pytest.mark.slow
def test_four_classes_and_the_grouped_split_go_through_every_step(tmp_path):
    settings = replace(SMOKE, classes=FOUR_CLASSES, split="grouped", models=("mobilenet_v2", "cells"), cv_repeats=1)
    run = run_study(settings, tmp_path / "run", n_jobs=2)
    four = ["Early Pre-B", "Normal", "Pre-B", "Pro-B"]  # sorted, as ImageFolder and scikit-learn order classes
    predictions = run.table("predictions", "cells.csv")
    assert [name for name in predictions if name.startswith("p_")] == [f"p_{name}" for name in four]
    foregrounds = run.table("audit/cue_conflict.csv")["foreground"].dropna()  # background-only images have none
    assert set(run.table("metrics/classes.csv")["class"]) == set(foregrounds) == set(four)
    leakage = run.table("leakage.csv")
    assert leakage.near_duplicates.sum() == 0
    assert "Early Pre-B" in (run.folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_one_failing_model_loses_nothing(tmp_path, monkeypatch):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/yolov8n-cls.pt").write_bytes(b"cut short")
    monkeypatch.setenv("LEUKEMIA_NB_WEIGHTS", str(tmp_path / "weights"))
    settings = replace(SMOKE, models=("yolov8", "cells"), weights="local")
    with pytest.raises(StudyError, match=r"(?s)step train-yolov8 failed.*Finished steps are kept"):
        run_study(settings, tmp_path / "run", until=["train"])
    assert (tmp_path / "run/predictions/cells.csv").is_file()
    assert json.loads((tmp_path / "run/steps/prepare.json").read_text())["step"] == "prepare"
    assert len(pd.read_csv(tmp_path / "run/pairs.csv")) == 72


def test_a_folder_of_weights_below_the_home_folder(tmp_path, monkeypatch):
    settings = replace(SMOKE, models=("cells",), weights="local")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LEUKEMIA_NB_WEIGHTS", "~/weights")
    with pytest.raises(ModelError, match="LEUKEMIA_NB_WEIGHTS=.*weights is not a folder"):
        check_study(settings, Run(tmp_path / "run"))
    (tmp_path / "weights").mkdir()
    with pytest.raises(StudyError, match="weights holds no weight files"):
        check_study(settings, Run(tmp_path / "run"))
    (tmp_path / "weights/some.h5").touch()
    check_study(settings, Run(tmp_path / "run"))
    assert driver._kernel_variables(1)["LEUKEMIA_NB_WEIGHTS"] == str(tmp_path / "weights")


def test_mistakes_are_named_before_any_step(tmp_path):
    for settings, redo, message in (
        (replace(SMOKE, model_settings=("mobilenet_v2:foo=1",)), (), "unknown setting 'foo'"),
        (replace(SMOKE, model_settings=("mobilenet_v2:epochs=0",)), (), "epochs=0"),
        (replace(SMOKE, model_settings=("mobilenet_v2:batch_size=-1",)), (), "batch_size=-1 is not a whole number"),
        (SMOKE, ("train-mobilenet",), "no step is called 'train-mobilenet'"),
    ):
        with pytest.raises(StudyError, match=message):
            run_study(settings, tmp_path / "run", redo=redo)
    with pytest.raises(StudyError, match="settings for yolo12, which is not among the models"):
        replace(SMOKE, models=("mobilenet_v2",), model_settings=("yolo12:epochs=2",))
    assert not (tmp_path / "run").exists()


# --- what real use brings: own output, killed studies, broken records, other people's folders


ROOT = Path(__file__).resolve().parents[1]
TINY = ("--models", "cells", "--image-size", "32", "--weights", "random", "--model-setting", "cells:epochs=1")


def command(*arguments, cwd=ROOT, **environment):
    """`leukemia_nb study` as a user calls it; gives (exit status, what it wrote on both streams)."""
    done = subprocess.run(
        [sys.executable, "-m", "leukemia_nb", "study", *map(str, arguments)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="backslashreplace",
        timeout=1500,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with 24 small synthetic images of each class, for tests that read it only."""
    folder = tmp_path_factory.mktemp("images") / "images"
    write_smears(folder, 24, height=64, width=64)
    shutil.rmtree(folder / "truth")
    return folder


def add_bad_images(data):
    """One of each kind of what cannot be used, among good images."""
    good = sorted((data / "Normal").glob("*.png"))
    (data / "Normal/empty.jpg").write_bytes(b"")
    Image.open(good[0]).save(data / "Normal/cut.jpg")
    (data / "Normal/cut.jpg").write_bytes((data / "Normal/cut.jpg").read_bytes()[:-200])
    (data / "Pre-B/text.jpg").write_text("this is no image")
    Image.fromarray(np.full((5, 5, 3), 200, np.uint8)).save(data / "Pre-B/tiny.png")
    header = struct.pack(">IIBBBBB", 200_000, 200_000, 8, 2, 0, 0, 0)
    chunks = b"".join(
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d))
        for k, d in ((b"IHDR", header), (b"IDAT", zlib.compress(b"x")), (b"IEND", b""))
    )
    (data / "Pro-B/huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    shutil.copy(good[1], data / "Pre-B/double.png")
    (data / "Pro-B/dangling.png").symlink_to(data / "nowhere.png")
    for place, name in enumerate(
        (b"caf\xe9.png", b"a$b$c.png", b"=1+1.png", b"r\rx.png", b"{n} and space.png", b"n" * 240 + b".png")
    ):
        changed = np.array(Image.open(good[3]))
        changed[0, :, 0] = place
        Image.fromarray(changed).save(data / "Normal" / os.fsdecode(name))


@pytest.fixture(scope="module")
def hostile(images, tmp_path_factory):
    """`cd data; leukemia_nb study --data .` in every adversity at once; gives (data, run folder, exit status, output)."""
    top = tmp_path_factory.mktemp("hostile")
    data, run, new = shutil.copytree(images, top / "data"), top / "data/runs/a {run}", top / "new"
    add_bad_images(data)
    new.mkdir()
    for path in sorted((images / "Pre-B").glob("*.png"))[:2]:
        shutil.copy(path, new)
    (new / "empty.jpg").write_bytes(b"")
    (new / "dangling.png").symlink_to(new / "nowhere.png")
    shutil.copy(sorted((images / "Pro-B").glob("*.png"))[0], new / os.fsdecode(b"caf\xe9.png"))
    run.mkdir(parents=True)
    for folder in (run, data):
        for name in ("pandas", "json", "numpy", "sitecustomize", "ipython_kernel_config"):
            (folder / f"{name}.py").write_text(f"open({str(top / 'executed')!r}, 'a').write(__file__ + '\\n')")
    (top / "kernels/python3").mkdir(parents=True)
    (top / "kernels/python3/kernel.json").write_text('{"argv": ["/bin/false"], "display_name": "another", "language": "python"}')
    status, said = command(
        "--data",
        ".",
        "--run",
        "runs/a {run}",
        "--new-images",
        "../new",
        *TINY,
        "--n-jobs",
        "2",
        cwd=data,
        HOME="/proc/nowhere",
        PYTHONIOENCODING="cp1252",
        JUPYTER_PATH=str(top),
        KERAS_BACKEND="torch",
        MPLBACKEND="qtagg",
    )
    return data, run, status, said


@pytest.mark.slow
def test_a_study_with_every_bad_image_runs_to_its_report_and_lists_them(hostile):
    data, run, status, said = hostile
    assert status == 0 and "Traceback" not in said, said
    report = (run / "report.html").read_text(encoding="utf-8")
    for name in ("empty", "cut", "text", "tiny", "huge", "double", "dangling"):
        assert f"{name}." in report or f"/{name}" in report, name
    assert "new/empty.jpg" in report and "new/dangling.png" in report
    manifest = pd.read_csv(run / "manifest.csv", keep_default_na=False)
    assert (manifest.problem == "").sum() == 72 + 6 - 1 and (
        manifest.problem != ""
    ).sum() == 8  # two are one image in two classes
    new_images = pd.read_csv(run / "new_images/cells.csv", keep_default_na=False)
    assert len(new_images) == 3 and sum(map(os.path.isfile, new_images.path)) == 2  # no table holds a name that is not UTF-8


@pytest.mark.slow
def test_nothing_of_the_run_folder_the_current_folder_or_another_python_is_executed(hostile):
    assert hostile[2] == 0 and not (hostile[0].parent / "executed").exists()


@pytest.mark.slow
def test_a_study_inside_its_data_does_not_read_itself_and_litter_redoes_nothing(hostile):
    data, run, *_ = hostile
    for folder in (run / "prepared/original/Normal", run / "models/cells", data / "Normal"):
        for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
            (folder / name).write_text("x")
        (folder / ".ipynb_checkpoints").mkdir()
        (folder / ".ipynb_checkpoints/a-checkpoint.png").write_text("x")
    before = (run / "manifest.csv").read_bytes()
    status, said = command(
        "--data", ".", "--run", "runs/a {run}", "--new-images", "../new", *TINY, cwd=data, KERAS_BACKEND="tensorflow"
    )
    done = [line for line in said.splitlines() if line.startswith("[")]
    assert status == 0 and len(done) > 9 and all(": unchanged" in line for line in done), said
    assert (run / "manifest.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "images", "--run", "images"), "holds the images"),
        (("--data", "images", "--run", "."), "holds images"),
        (("--data", "run/prepared"), "written by leukemia_nb"),
        (("--new-images", "run/prepared"), "written by leukemia_nb"),
        (("--run", "images"), "holds images that no study wrote"),
        (("--new-images", "empty"), "no images in it"),
        (("--new-images", "bad"), "none of its 1 image can be read"),
        (("--new-images", "file.csv"), "is a file"),
        (("--data", "file.csv"), "is a file"),
        (("--data", "one"), "only in folder Normal, and a study needs two classes"),
        (("--data", "images", "--classes", "4"), "classes names only 4"),
        (("--data", "images", "--class-map", "file.csv"), "no valid TOML"),
        (("--data", "images", "--groups-from", "parent"), "no folders below those of the classes"),
        (("--data", "images", "--split", "folders"), "in no folder train, val or test"),
        (("--data", "empty"), "no images in it"),
        (("--groups", "file.csv"), "path"),
        (("--data", "images", "--groups", "others.csv"), "none of its 1 path"),
        (("--split-file", "file.csv"), "not a split"),
        (("--split-file", "empty"), "Is a directory"),
        (("--data", "images", "--split-file", "split.csv"), "is of other images"),
        (("--classes", "Normal,Early Pre-B,Pre-B,Pro-B", "--split-file", "split.csv"), "Early Pre-B"),
        (("--models", "yolov8", "--image-size", "50"), "not a multiple of 32"),
        (("--models", ""), "no model is named"),
        (("--models", "cells,cells"), "more than once"),
        (("--model-setting", "cells:learning_rate=abc"), "learning_rate=abc"),
        (("--model-setting", "cells:image_size=64"), "Set them with"),
        (("--model-setting", "cells:classes=3"), "Set them with"),
        (("--weights", "local"), "names no folder"),
        (("--run", "file.csv"), "cannot be written"),
    ],
)
def test_what_can_be_known_is_said_before_the_first_step(images, tmp_path, monkeypatch, arguments, message):
    (tmp_path / "images").symlink_to(images)
    for name in ("empty", "bad", "run/prepared/Normal", "one/Normal"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "bad/a.jpg").write_bytes(b"")
    shutil.copy(next((images / "Normal").glob("*.png")), tmp_path / "one/Normal")
    (tmp_path / "file.csv").write_text("a,b\n1,2\n")
    (tmp_path / "others.csv").write_text("path,group\nelsewhere/x.png,1\n")
    mark_output_folder(tmp_path / "run")
    rows = [
        f"{label}/{subset},{label},{subset},{label}{subset}"
        for label in ("Normal", "Pre-B", "Pro-B")
        for subset in ("train", "val", "test")
    ]
    (tmp_path / "split.csv").write_text("\n".join(["pair,class,subset,sha256", *rows]))
    before = sorted(tmp_path.rglob("*"))
    models = () if "--models" in arguments else ("--models", "cells")
    where = () if "--run" in arguments else ("--run", "new")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LEUKEMIA_NB_WEIGHTS", raising=False)
    error = CliRunner().invoke(app, ["study", *arguments, *models, *where]).exception
    assert message in _explanation(error) and len(str(error).splitlines()) == 1, error
    assert sorted(tmp_path.rglob("*")) == before  # nothing was begun


def test_the_room_on_the_disk_is_estimated_from_images_size_and_models(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))

    def estimate(**settings):
        with pytest.raises(StudyError, match="Free some space") as caught:
            check_study(replace(SMOKE, models=("cells",), **settings), Run(tmp_path / "run"))
        return float(re.search(r"about ([\d.]+) GB", str(caught.value))[1])

    small, many, large = estimate(per_class=1000), estimate(per_class=4000), estimate(per_class=1000, image_size=448)
    smear = 3 * 288 * 384 / 2
    assert many - small == pytest.approx(9000 * (3 * SMOKE.image_size**2 + smear) / 1e9, abs=0.02)
    assert large - small == pytest.approx(3000 * 3 * (448**2 - SMOKE.image_size**2) / 1e9, rel=0.1)


@pytest.mark.slow
def test_a_small_disk_is_found_out_before_the_first_step(tmp_path):
    (tmp_path / "disk").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", tmp_path / "disk"], capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        status, said = command("--run", tmp_path / "disk/run", *TINY)
    finally:
        subprocess.run(["umount", tmp_path / "disk"], check=True)
    assert status == 1 and "Free some space" in said and len(said.splitlines()) == 1


def test_images_of_an_unmarked_study_among_the_data_are_refused(images, tmp_path):
    data = shutil.copytree(images, tmp_path / "data")
    settings = replace(SMOKE, data=str(data), models=("cells",))
    run_study(settings, tmp_path / "old", until=("prepare",), log=lambda line: None)
    shutil.copytree(tmp_path / "old/prepared", data / "old")  # a study of a time before folders were marked
    with pytest.raises(StudyError, match="which this study wrote"):
        run_study(settings, tmp_path / "new", until=("split",), log=lambda line: None)
    assert not (tmp_path / "new/split.csv").exists()


def processes_of(run):
    """Processes that have a run folder as their working directory, zombies left out."""
    found = []
    for process in psutil.process_iter(["cwd", "status"]):
        if process.info["cwd"] == str(run) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def start_study(run):
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "leukemia_nb",
            "study",
            "--run",
            str(run),
            "--models",
            "cells,mobilenet_v2",
            "--per-class",
            "20",
            "--image-size",
            "32",
            "--n-jobs",
            "2",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def wait_for(condition):
    end = time.monotonic() + 300
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    assert found
    return found


@pytest.mark.slow
def test_a_killed_study_leaves_no_process_and_another_one_waits_for_them(tmp_path):
    run = tmp_path / "run"
    with start_study(run) as first:
        wait_for(lambda: len(list(run.glob("notebooks/*.partial.ipynb"))) > 1)
        workers = psutil.Process(first.pid).children(recursive=True)
        assert len(workers) >= 2
        first.kill()
        with start_study(run) as second:  # at once
            seen = wait_for(
                lambda: [each for each in psutil.Process(second.pid).children(recursive=True)] or second.poll() is not None
            )
            alive = [each for each in workers if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
            second.send_signal(signal.SIGINT)
            said = second.communicate(timeout=60)[0]
        assert seen and not alive and "Traceback" not in said
    assert not psutil.wait_procs(workers, timeout=20)[1]
    assert wait_for(lambda: not processes_of(run))  # a kernel that was just starting ends when it misses its parent
    kept = re.search(r"(\d+) steps finished and kept", said)  # prepare, split, and what a fast machine had ended by then
    assert second.returncode == 130 and kept and int(kept[1]) >= 2 and "run the same command to resume" in said


def test_a_worker_of_a_killed_study_keeps_others_out(counter):
    step, run, notebook = counter
    with _step_lock(run, step.name) as held:
        keeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=held)
    with pytest.raises(StudyError, match="still being run by one of its workers"), _step_lock(run, step.name, patience=0):
        pass
    keeper.communicate(b"\n")
    assert not run_step(step, run)["skipped"]


@pytest.mark.parametrize(
    "record", ["", "{", "[]", "{}", "null", '"x"', '{"fingerprint": 1, "outputs": []}', "\0" * 40, "whole but no outputs"]
)
def test_a_step_with_a_broken_record_is_unfinished(counter, record):
    step, run, notebook = counter
    whole = run_step(step, run)
    text = (
        json.dumps({"fingerprint": whole["fingerprint"], "outputs": {"out.txt": 3}, "seconds": 1})
        if "whole" in record
        else record
    )
    run.path("steps/counter.json").write_text(text)
    assert not run_step(step, run)["skipped"]
    assert run_step(step, run)["skipped"] and runs(run) == 2


def test_a_kernel_that_is_killed_is_named_with_the_remedy(counter):
    step, run, notebook = counter
    write_notebook(notebook, "import os\nos.kill(os.getpid(), 9)")
    with pytest.raises(StudyError, match=r"step counter failed: its process was killed\. Memory may have run out") as caught:
        run_step(step, run)
    assert len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise MemoryError('too much')", "Memory may have run out"),
        ("raise OSError(28, 'No space left on device')", "The disk is full: free some space"),
    ],
)
def test_an_error_of_the_machine_comes_with_its_remedy(counter, code, message):
    step, run, notebook = counter
    write_notebook(notebook, code)
    with pytest.raises(StudyError, match=message):
        run_step(step, run)


def test_a_port_that_is_taken_meanwhile_is_another_try(counter, monkeypatch):
    import papermill
    import zmq

    step, run, notebook = counter
    real, times = papermill.execute_notebook, []

    def unlucky(*arguments, **more):
        times.append(1)
        if len(times) < 3:
            raise zmq.ZMQError(zmq.EADDRINUSE)
        return real(*arguments, **more)

    monkeypatch.setattr(papermill, "execute_notebook", unlucky)
    assert not run_step(step, run)["skipped"] and len(times) == 3
    monkeypatch.setattr(papermill, "execute_notebook", lambda *_, **more: (_ for _ in ()).throw(zmq.ZMQError(zmq.EADDRINUSE)))
    with pytest.raises(StudyError, match="step counter: no Python kernel starts"):
        run_step(step, run, redo=True)


def test_a_kernel_is_this_python_in_an_environment_of_its_own(counter, monkeypatch, tmp_path):
    step, run, notebook = counter
    monkeypatch.setenv("PYTHONPATH", f"{os.pathsep}.{os.pathsep}{ROOT}")
    monkeypatch.setenv("PYTHONSTARTUP", str(tmp_path / "startup.py"))
    (tmp_path / "startup.py").write_text("raise SystemExit")
    write_notebook(
        notebook,
        "import os, sys, json\nfrom pathlib import Path\n(Path(run) / 'out.txt').write_text(json.dumps("
        "[sys.executable, sys.path, os.getcwd(), os.environ.get('X_OF_MINE')]))",
    )
    run_step(step, run, environment={"X_OF_MINE": "1"})
    executable, path, folder, mine = json.loads(run.path("out.txt").read_text())
    assert executable == sys.executable and folder == str(run.folder) and mine == "1"
    assert "" not in path and "." not in path and str(run.folder) not in path and str(ROOT) in path
