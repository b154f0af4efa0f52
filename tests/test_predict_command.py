"""`predict` and `compare`: nothing lost, nothing false, whatever the images, names, disks and other runs do."""

import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from leukemia_nb.data.classes import CLASSES, ClassMap, write_class_map
from leukemia_nb.data.files import OutputError, file_lock, file_sha256
from leukemia_nb.data.images import ImageError, write_image
from leukemia_nb.data.synthetic import make_smear, write_smears
from leukemia_nb.inference.batch import (
    PredictionTask,
    _compare_models,
    compare_files,
    exported_models,
    find_inputs,
    format_comparison,
    _predict_batch,
    predict_files,
    _read_unfinished,
)
from leukemia_nb.models.interface import ModelError
from leukemia_nb.testing import dummy_model_file

PROGRAM = [sys.executable, "-m", "leukemia_nb"]


def call(*arguments, **settings):
    """Run the program; gives (exit status, standard output, standard error)."""
    done = subprocess.run(
        [*PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
        **settings,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def table_of(file):
    return pd.read_csv(file, keep_default_na=False)


def list_images(*given, **settings):
    return find_inputs(list(given), **settings)[0]


def interrupt(rows):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    for kind in ("image", "cells"):
        dummy_model_file(folder / f"run/exported/{kind}.onnx", kind, size=64)
    write_smears(folder / "smears", 2, height=96, width=128)
    return folder


@pytest.fixture(scope="module")
def model(place):
    return place / "run/exported/image.onnx"


@pytest.fixture(scope="module")
def task(model):
    return PredictionTask(str(model))


@pytest.fixture(scope="module")
def paths(place):
    return list_images(place / "smears")


@pytest.fixture
def many(paths, tmp_path):
    """A folder of 60 images with the content of six."""
    (tmp_path / "in").mkdir()
    for number in range(60):
        os.link(paths[number % 6], tmp_path / "in" / f"{number:03d}.png")
    return tmp_path / "in"


# Which images


def test_files_folders_and_patterns(place, paths):
    assert len(paths) == 6 and list_images(f"{place}/smears/*/*.png") == paths
    assert list_images(place / "smears", paths[0], "no/such*.png") == [*paths, "no/such*.png"]
    assert list_images(place / "run") == [str(place / "run")]
    relative = os.path.relpath(paths[1])
    assert list_images(paths[0], relative, place / "smears") == [paths[0], relative, *paths[2:]]


def test_brackets_in_patterns_are_literal_where_they_occur(tmp_path):
    for name in ("[Malignant] Pre-B/a.png", "[Malignant] Pro-B/b.png", "M/c.png", "[x]/[y]1.png", "[x]/y1.png", "q/y1.png"):
        write_image(tmp_path / name, make_smear("Pre-B", 0, 96, 128).image)

    def found(pattern):
        return [os.path.relpath(path, tmp_path) for path in list_images(f"{tmp_path}/{pattern}")]

    assert found("[Malignant] Pre-B/*.png") == found("[Malignant] Pre*/?.png") == ["[Malignant] Pre-B/a.png"]
    assert found("[Malignant]*/*.png") == ["[Malignant] Pre-B/a.png", "[Malignant] Pro-B/b.png"]
    assert found("[Malignant]/*.png") == ["M/c.png"]  # no such folder: a set of letters
    assert found("[x]/[y]1.png") == ["[x]/[y]1.png"] and found("[pq]/[xy]1.png") == ["q/y1.png"]
    assert len(found("**/*.png")) == len(found("*")) == len(found("**")) == 6 and len(found("[Malignant] Pre-B")) == 1


def test_every_search_reports_what_it_left_out_and_could_not_reach(paths, tmp_path):
    shutil.copy(paths[0], tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "c.svs").write_bytes(b"slide")
    found, summary = find_inputs(tmp_path)
    assert [Path(path).name for path in found] == ["a.png", "b.png"]
    assert "1 image found, 1 left out (.svs files: 1), 1 could not be reached" in summary


def test_own_output_is_never_input(paths, model, place, tmp_path):
    for path in paths:
        shutil.copy(path, tmp_path)
    mine = list_images(tmp_path)
    status, _, error = call("predict", ".", "--model", model, "--overlays", "ov", "--saliency", "--out", "a.csv", cwd=tmp_path)
    assert status == 0 and len(list(tmp_path.rglob("*.jpg"))) == 12, error
    status, _, error = call("compare", ".", "--run", place / "run", cwd=tmp_path)
    assert status == 0, error
    assert list_images(tmp_path) == mine
    status, out, error = call("predict", ".", "**/*.jpg", "ov", "--model", model, cwd=tmp_path)
    assert status == 1 and len(out.splitlines()) == 8 and "6 images found" in error and "written by leukemia_nb" in error
    assert len(list_images(next((tmp_path / "ov").glob("*cells.jpg")))) == 1  # a file that is named is predicted
    (tmp_path / "ov" / ".leukemia_nb-output").unlink()
    assert len(list_images(tmp_path / "ov")) == 12


# Tables


def test_counts_are_whole_numbers_beside_an_image_that_cannot_be_read(task, paths, tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    predict_files([*paths, str(tmp_path / "empty.png")], task, tmp_path / "a.csv")
    counts = pd.read_csv(tmp_path / "a.csv", dtype=str, keep_default_na=False)["n_cells"]
    assert counts.iloc[-1] == "" and counts.iloc[:-1].str.fullmatch(r"\d+").all()


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_csv_and_json_hold_the_same(task, paths, tmp_path, n_jobs):
    rows = []
    assert predict_files(paths, task, tmp_path / "a.csv", tmp_path / "a.json", 2, n_jobs, log=rows.extend) == 0
    table, entries = table_of(tmp_path / "a.csv"), json.loads((tmp_path / "a.json").read_text())
    assert list(table["path"]) == paths == [row["path"] for row in entries] == sorted(row["path"] for row in rows)
    np.testing.assert_allclose(table["confidence"], [row["confidence"] for row in entries])
    assert set(table["model_sha256"]) == {file_sha256(task.predictor().file)} and set(table["problem"]) == {""}
    assert sorted(each.name for each in tmp_path.iterdir() if each.suffix != ".lock") == ["a.csv", "a.json"]
    assert (tmp_path / "a.csv").read_bytes().startswith(b"\xef\xbb\xbfpath,")


def test_an_interrupted_run_resumes(task, paths, tmp_path):
    with pytest.raises(
        KeyboardInterrupt, match=r"^stopped\. Predictions so far are kept in .*a\.csv\.unfinished: the same command"
    ):
        predict_files(paths, task, tmp_path / "a.csv", batch_size=3, log=lambda rows: interrupt(rows) if len(rows) > 1 else None)
    journal = tmp_path / "a.csv.unfinished"
    assert list(_read_unfinished(journal, task.predictor().info["sha256"])) == paths[:4] and not (tmp_path / "a.csv").exists()
    torn = [b"junk\n", b"\xff\xfe\x00\n", b"[]\n", b"7\n", b'{"path": "x"}\n', b"[" * 100_000 + b"\n", b"\n"]
    journal.write_bytes(b"".join([*torn, journal.read_bytes(), b'{"path": "cut of']))
    asked = []
    assert predict_files(paths, task, tmp_path / "a.csv", log=asked.extend) == 4
    assert [row["path"] for row in asked] == paths[4:] and list(table_of(tmp_path / "a.csv")["path"]) == paths
    assert not journal.exists()


@pytest.mark.parametrize("change", ["path", "sha256", "missing", "problem", "other model file", "other image"])
def test_rows_of_a_journal_that_do_not_hold_are_predicted_again(change, task, tmp_path):
    write_smears(tmp_path / "in", 1, height=96, width=128)
    mine = list_images(tmp_path / "in")
    row = _predict_batch(task, mine[:1])[0]
    if change == "missing":
        del row["p_Pre-B"]
    elif change == "other model file":
        row["model_sha256"] = "0" * 64
    elif change == "other image":
        write_image(mine[0], make_smear("Pro-B", 9, 96, 128).image)
    else:
        row[change] = "other"
    (tmp_path / "a.csv.unfinished").write_text(json.dumps(row) + "\n")
    assert predict_files(mine, task, tmp_path / "a.csv") == 0
    assert predict_files(mine, task, tmp_path / "b.csv") == 0
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_a_journal_that_is_changed_meanwhile_does_not_change_the_table(many, task, tmp_path):
    def meddle(rows):
        (tmp_path / "a.csv.unfinished").write_bytes(b"")

    assert predict_files(list_images(many), task, tmp_path / "a.csv", batch_size=30, log=meddle) == 0
    assert list(table_of(tmp_path / "a.csv")["path"]) == list_images(many)


def test_a_missing_overlay_is_made_again(paths, model, tmp_path):
    task = PredictionTask(str(model), str(tmp_path / "ov"))
    with pytest.raises(KeyboardInterrupt):
        predict_files(paths, task, tmp_path / "a.csv", log=interrupt)
    (drawn,) = (tmp_path / "ov").glob("*.jpg")
    whole = drawn.read_bytes()
    drawn.unlink()
    assert predict_files(paths, task, tmp_path / "a.csv") == 0
    assert drawn.read_bytes() == whole and len(list((tmp_path / "ov").glob("*.jpg"))) == 6


def test_an_overlay_that_fails_is_an_error_of_its_row(paths, model, tmp_path, monkeypatch):
    from leukemia_nb.inference import batch

    monkeypatch.setattr(batch, "overlay", lambda *_: 1 / 0)
    (row,) = _predict_batch(PredictionTask(str(model), str(tmp_path / "ov")), paths[:1])
    assert "ZeroDivisionError" in row["problem"] and row["predicted"]


def test_the_cells_of_a_folder(place, paths, model, tmp_path):
    """One row per counted cell, in the order of the images; resumed like the predictions; nothing of an unreadable image."""
    (tmp_path / "broken.png").write_bytes(b"")
    task, given = PredictionTask(str(model), cells=str(tmp_path / "cells")), [*paths, str(tmp_path / "broken.png")]
    with pytest.raises(KeyboardInterrupt):
        predict_files(given, task, tmp_path / "a.csv", log=interrupt)
    assert predict_files(given, task, tmp_path / "a.csv") == 1
    table, cells = table_of(tmp_path / "a.csv"), table_of(tmp_path / "cells/cells.csv")
    counted = [path for row in table.itertuples() if row.predicted for path in [row.path] * int(float(row.n_cells))]
    assert cells["path"].tolist() == counted and "p_Normal" not in cells
    assert len(list(tmp_path.glob("cells/labels/*.png"))) == len(list(tmp_path.glob("cells/geojson/*.geojson"))) == len(paths)
    whole = (tmp_path / "cells/cells.csv").read_bytes()
    command = ("predict", *given, "--model", model, "--cells", tmp_path / "cells", "--n-jobs", 2)
    assert call(*command)[0] == 1 and (tmp_path / "cells/cells.csv").read_bytes() == whole
    status, _, error = call("predict", *paths, "--model", model, "--cells", place / "smears")
    assert status == 1 and "holds the images that are read" in error


# What may be written


def test_predictions_replace_nothing_that_is_read(model, paths, tmp_path):
    before = {path: Path(path).read_bytes() for path in (*paths, str(model))}
    (tmp_path / "link.csv").symlink_to(paths[3])
    (tmp_path / "model.csv").symlink_to(model)
    task = PredictionTask(str(model))
    for out, json_file, message in [
        (tmp_path / "link.csv", None, "one of the images"),
        (tmp_path / "model.csv", None, "the model file"),
        (tmp_path, None, "must end in .csv"),
        (tmp_path / "a.xlsx", None, "written as CSV"),
        (None, tmp_path / "a.csv", "written as JSON"),
        (f"{model}/a.csv", None, "A file stands"),
    ]:
        with pytest.raises(OutputError, match=message):
            predict_files(paths, task, out, json_file)
    for overlays, message in ((paths[0], "A file stands"), (Path(paths[0]).parent, "holds the images that are read")):
        with pytest.raises(OutputError, match=message):
            predict_files(paths, PredictionTask(str(model), str(overlays)))
    assert before == {path: Path(path).read_bytes() for path in before}
    assert sorted(os.listdir(tmp_path)) == ["link.csv", "model.csv"]


@pytest.mark.parametrize("locked", ["a.csv", "a.json", "ov"])
def test_a_second_writer_is_refused(locked, paths, model, tmp_path):
    task = PredictionTask(str(model), str(tmp_path / "ov"))
    with file_lock(tmp_path / locked), pytest.raises(OutputError, match=f"{locked}: another leukemia_nb is writing it"):
        predict_files(paths, task, tmp_path / "a.csv", tmp_path / "a.json")
    assert [name for name in os.listdir(tmp_path) if not name.endswith(".lock")] == []


def test_two_runs_at_once_leave_a_whole_file(many, model, tmp_path):
    command = [*PROGRAM, "predict", str(many), "--model", str(model), "--out", str(tmp_path / "a.csv")]
    runs = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [run.communicate(timeout=300)[1] for run in runs]
    assert sorted(run.returncode for run in runs) in ([0, 1], [0, 0]), errors
    assert list(table_of(tmp_path / "a.csv")["path"]) == list_images(many)


# Kills


def children(pid):
    """Processes that a process started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [int(each) for each in found] + [other for each in found for other in children(each)]


def started(command, journal):
    """A run that has written three rows, and is held so that it does not end before anyone looks."""
    run = subprocess.Popen([*PROGRAM, *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not (journal.exists() and journal.read_text().count("\n") >= 3) and time.monotonic() < end:
        time.sleep(0.02)
    run.send_signal(signal.SIGSTOP)
    return run


@pytest.mark.skipif(not shutil.which("ps"), reason="needs ps")
def test_a_killed_run_leaves_no_workers_and_resumes(many, model, tmp_path):
    command, journal = ["predict", many, "--model", model, "--out", tmp_path / "a.csv"], tmp_path / "a.csv.unfinished"
    run = started([*command, "--n-jobs", 2, "--batch-size", 2], journal)
    workers = children(run.pid)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert workers and not (tmp_path / "a.csv").exists()
    end = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]
    kept = journal.read_bytes().count(b"\n")
    status, out, error = call(*command)
    assert status == 0 and f"({kept} of them before)" in out, error
    table = table_of(tmp_path / "a.csv")
    assert list(table["path"]) == list_images(many) and set(table["problem"]) == {""} and not journal.exists()


@pytest.mark.skipif(not shutil.which("ps"), reason="needs ps")
def test_a_killed_worker_is_one_message(many, model, tmp_path):
    for number in range(60, 400):
        os.link(many / f"{number % 6:03d}.png", many / f"{number:03d}.png")  # not finished before the kill
    journal = tmp_path / "a.csv.unfinished"
    run = started(["predict", many, "--model", model, "--out", tmp_path / "a.csv", "--n-jobs", 2, "--batch-size", 1], journal)
    for pid in children(run.pid):
        if b"LokyProcess" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
    run.send_signal(signal.SIGCONT)
    error = run.communicate(timeout=120)[1]
    assert run.returncode == 1 and len(error.splitlines()) == 1
    assert "a worker process was killed; memory may have run out" in error
    assert f"kept in {journal}" in error and len(journal.read_text().splitlines()) >= 3


# Names and disks


NAMES = [
    *(b"a\rb.png", b"a\nb.png", b"caf\xe9.png", b"=cmd|' C calc'!A0.png", b"+1.png", b"-1.png", b"@SUM(A1).png", b"\tx.png"),
    *(b"$x$ ^_.png", "Blüte.png".encode(), b"a;b,c.png", b'"q".png', b"x" * 250 + b".png", b" .png", b"[1]*.png"),
]


def test_any_name_is_one_row_and_no_formula(paths, model, place, tmp_path):
    folder = tmp_path / "in/Pre-B"
    folder.mkdir(parents=True)
    for name in NAMES:
        shutil.copy(paths[2], os.fsencode(folder) + b"/" + name)
    table, rows, overlays = tmp_path / "a.csv", tmp_path / "a.json", tmp_path / "ov"
    command = ("predict", ".", "--model", model, "--out", table, "--json", rows, "--overlays", overlays)
    status, _, error = call(*command, cwd=folder)
    assert status == 0, error
    escaped, raw = list(table_of(table)["path"]), [row["path"] for row in json.loads(rows.read_text(encoding="utf-8"))]
    assert len(escaped) == len(raw) == len(NAMES)
    assert "caf\\xe9.png" in escaped and os.fsdecode(b"caf\xe9.png") in raw
    assert "Blüte" in table.read_text(encoding="utf-8") and len(list(overlays.glob("*.jpg"))) == len(NAMES)
    with open(table, encoding="utf-8-sig", newline="") as lines:
        cells = [cell for row in csv.DictReader(lines) for cell in (row["path"], row["problem"])]
    assert len(cells) == 2 * len(NAMES) and not [cell for cell in cells if cell[:1] in tuple("=+-@\t\r\n") and cell]
    status, out, error = call("predict", ".", "--model", model, cwd=folder)
    assert status == 0 and len(out.splitlines()) == len(NAMES) == len(out.split("\n")) - 1 and "\r" not in out
    status, out, error = call("compare", folder, "--run", place / "run", "--out", tmp_path / "comparison")
    assert status == 0 and len(out.splitlines()) == len(NAMES) + 1, error
    assert len(table_of(tmp_path / "comparison/comparison.csv")) == len(NAMES)
    (tmp_path / os.fsdecode(b"n\xef.jpg")).write_bytes(b"")
    status, out, _ = call("predict", tmp_path / os.fsdecode(b"n\xef.jpg"), "--model", model)
    assert status == 1 and "n\\xef.jpg: the file is empty" in out


def limited(size):
    """Files of the started process may have so many bytes; more is an error, as on a full disk."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def test_a_disk_that_takes_no_more_is_one_message_and_loses_nothing(many, model, tmp_path):
    command = ("predict", many, "--model", model, "--out", tmp_path / "a.csv", "--batch-size", 8)
    status, _, error = call(*command, preexec_fn=limited(9_000))
    assert status == 1 and len(error.splitlines()) == 1 and "a.csv.unfinished: cannot be written" in error
    assert "Predictions so far are kept" in error and not (tmp_path / "a.csv").exists()
    kept = (tmp_path / "a.csv.unfinished").read_bytes().count(b"\n")
    assert 8 <= kept < 60
    status, out, error = call(*command)
    assert status == 0 and f"({kept} of them before)" in out
    assert list(table_of(tmp_path / "a.csv")["path"]) == list_images(many)


def test_a_disk_that_takes_no_overlay_is_one_message(paths, model, tmp_path):
    big = tmp_path / "in.png"
    write_image(big, make_smear("Pre-B", 0, 384, 512).image)
    command = ("predict", *paths, big, "--model", model, "--out", tmp_path / "a.csv", "--overlays", tmp_path / "ov")
    status, _, error = call(*command, "--batch-size", 1, preexec_fn=limited(20_000))
    assert status == 1 and len(error.splitlines()) == 1 and "-cells.jpg: cannot be written" in error and "kept in" in error
    assert not list((tmp_path / "ov").glob("in-*")) and not list((tmp_path / "ov").glob(".part*"))
    assert predict_files([*paths, str(big)], PredictionTask(str(model), str(tmp_path / "ov")), tmp_path / "a.csv") == 6
    assert len(list((tmp_path / "ov").glob("*.jpg"))) == 7


# All models of a study


def test_every_model_beside_the_others(place, paths, tmp_path):
    messages = []
    models = [tmp_path / "torn.onnx", *exported_models(place / "run")]
    models[0].write_bytes(b"half a file")
    table = _compare_models([*paths, "nowhere.png"], models, messages.append)
    assert list(table["path"]) == [*paths, "nowhere.png"] and set(table["true label"][:6]) == {"Normal", "Pre-B", "Pro-B"}
    assert len(messages) == 2 and "torn.onnx: not a model file" in messages[0] and messages[1] == table["problem"][6]
    assert not any(table["problem"][:6]) and table.loc[6, "Dummy (cells)"] == ""
    single = PredictionTask(str(place / "run/exported/cells.onnx")).predictor().report(paths).table
    np.testing.assert_allclose(table["Dummy (cells) confidence"][:6], single["confidence"], atol=1e-5)
    text = format_comparison(table.assign(**{"Dummy (cells) abstains": "low confidence"}))
    lines = text.splitlines()
    assert len(lines) == 8 and all("(" in line for line in lines[1:7]) and lines[7].split()[1:] == ["-", "-", "-"]
    with pytest.raises(ModelError, match="no exported models"):
        exported_models(tmp_path)
    with pytest.raises(ModelError, match="no such folder"):
        exported_models(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="No model file can be opened"):
        _compare_models(paths, models[:1], messages.append)
    with pytest.raises(ImageError, match="No image can be read"):
        _compare_models(["nowhere.png"], models[1:], messages.append)


def test_compared_images_have_the_class_that_the_run_means_by_their_folder(paths, place, tmp_path, monkeypatch):
    shutil.copytree(place / "run", tmp_path / "run")
    (tmp_path / "Pre-B/slide 1").mkdir(parents=True)
    shutil.copy(paths[0], tmp_path / "Pre-B/slide 1/a.png")
    monkeypatch.chdir(tmp_path / "Pre-B/slide 1")
    for named in (["a.png"], [str(tmp_path / "Pre-B/slide 1/a.png")]):
        assert compare_files(named, tmp_path / "run", tmp_path / "out")["true label"].tolist() == ["Pre-B"]
    own = ClassMap(CLASSES, {name: [f"ward {number}"] for number, name in enumerate(CLASSES)})
    write_class_map(tmp_path / "run/class_map.toml", own)
    (tmp_path / "ward 2").mkdir()
    shutil.copy(paths[0], tmp_path / "ward 2/b.png")
    found = compare_files(["a.png", str(tmp_path / "ward 2/b.png")], tmp_path / "run", tmp_path / "out")
    assert found["true label"].tolist() == ["", "Pro-B"]


def test_compare_has_a_row_for_every_image_and_a_column_for_every_model(paths, place, tmp_path):
    shutil.copytree(place / "run", tmp_path / "run")
    shutil.copy(tmp_path / "run/exported/image.onnx", tmp_path / "run/exported/copy.onnx")  # has the same title
    os.mkfifo(tmp_path / "run/exported/pipe.onnx")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    for number, name in enumerate(["Normal/a.png", "Pre-B/a.png", "x/y/z/1/b.png", "x/y/z/2/b.png"]):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(paths[number], tmp_path / "in" / name)
    command = ("compare", tmp_path / "broken.jpg", tmp_path / "in", "--run", tmp_path / "run", "--out", tmp_path / "cmp")
    status, out, error = call(*command)
    table = table_of(tmp_path / "cmp/comparison.csv")
    assert status == 1 and len(table) == 5 and len(out.splitlines()) == 6 and "pipe.onnx: a pipe or device" in error
    assert [bool(problem) for problem in table["problem"]] == [True] + [False] * 4
    assert len([name for name in table if name.endswith(" confidence")]) == 3
    shown = {line.split()[0] for line in out.splitlines()[2:]}
    assert shown == {"Normal/a.png", "Pre-B/a.png", "1/b.png", "2/b.png"}
    assert (tmp_path / "cmp/comparison.csv").read_bytes().startswith(b"\xef\xbb\xbf") and (
        tmp_path / "cmp/comparison.png"
    ).is_file()
    with file_lock(tmp_path / "cmp"):
        status, _, error = call(*command)
    assert status == 1 and "cmp: another leukemia_nb is writing it" in error
