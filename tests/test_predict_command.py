"""`predict` and `compare` as a user runs them: nothing lost, nothing false, whatever the images, names, disks and other runs do."""

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

from leukemia_nb.data.files import exclusive
from leukemia_nb.data.images import read_image, write_image
from leukemia_nb.inference.predictor import Task, list_images, dummy_model_file, predict_files
from leukemia_nb.data.synthetic import smear, write_smears

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


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    for kind in ("image", "pair"):
        dummy_model_file(folder / f"run/exported/{kind}.onnx", kind)
    write_smears(folder / "smears", 2, height=96, width=128)
    return folder


@pytest.fixture(scope="module")
def model(place):
    return place / "run/exported/image.onnx"


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


def test_own_output_is_never_input(paths, model, place, tmp_path):
    for path in paths:
        shutil.copy(path, tmp_path)
    for command in (
        ("segment", ".", "--out", "seg"),
        ("predict", ".", "--model", model, "--overlays", "ov", "--saliency"),
        ("compare", ".", "--study", place / "run"),
    ):
        assert call(*command, cwd=tmp_path)[0] == 0
    status, out, error = call("predict", ".", "--model", model, cwd=tmp_path)
    assert status == 0 and len(out.splitlines()) == 6 and "6 images found" in error and "written by leukemia_nb" in error
    status, out, error = call("compare", ".", "**/*.jpg", "--study", place / "run", cwd=tmp_path)
    assert len(out.splitlines()) == 8 and "**/*.jpg: nothing but what leukemia_nb wrote" in error and "12 left out" not in out
    assert status == 1 and "6 images found" in error


@pytest.mark.parametrize("command", [("predict", "--overlays"), ("compare", "--out")])
def test_results_never_go_into_the_folder_of_the_images(command, paths, model, place, tmp_path):
    shutil.copy(paths[0], tmp_path / "a.png")
    more = ("--model", model) if command[0] == "predict" else ("--study", place / "run")
    for given, folder in ((tmp_path, tmp_path), (tmp_path / "a.png", "."), (f"{tmp_path}/*.png", tmp_path.parent)):
        status, _, error = call(command[0], given, *more, command[1], folder, cwd=tmp_path)
        assert status == 1 and "holds the images that are read" in error and len(error.splitlines()) == 1
    assert os.listdir(tmp_path) == ["a.png"]


def test_every_search_says_what_it_left_out_and_could_not_reach(paths, model, tmp_path):
    shutil.copy(paths[0], tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "c.svs").write_bytes(b"slide")
    status, _, error = call("predict", tmp_path, "--model", model, "--out", tmp_path / "a.csv")
    assert status == 1 and "1 image found, 1 left out (.svs files: 1), 1 could not be reached" in error
    assert [Path(path).name for path in table_of(tmp_path / "a.csv")["path"]] == ["a.png", "b.png"]


@pytest.mark.parametrize("locked", ["a.csv", "a.json", "ov", "comparison"])
def test_a_second_writer_is_refused(locked, paths, model, place, tmp_path):
    with exclusive(tmp_path / locked):
        if locked == "comparison":
            status, _, error = call("compare", paths[0], "--study", place / "run", cwd=tmp_path)
        else:
            status, _, error = call(
                "predict", paths[0], "--model", model, "--out", "a.csv", "--json", "a.json", "--overlays", "ov", cwd=tmp_path
            )
    assert status == 1 and f"{locked}: another leukemia_nb is writing it" in error and len(error.splitlines()) == 1
    assert [name for name in os.listdir(tmp_path) if not name.endswith(".lock")] == []


def test_two_runs_at_once_leave_a_whole_file(many, model, tmp_path):
    command = [*PROGRAM, "predict", str(many), "--model", str(model), "--out", str(tmp_path / "a.csv")]
    runs = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [run.communicate(timeout=300)[1] for run in runs]
    assert sorted(run.returncode for run in runs) in ([0, 1], [0, 0]), errors
    assert list(table_of(tmp_path / "a.csv")["path"]) == list_images(many)


def children(pid):
    """Processes that a process started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [int(each) for each in found] + [other for each in found for other in children(each)]


@pytest.mark.skipif(not shutil.which("ps"), reason="needs ps")
def test_a_killed_run_leaves_no_workers_and_goes_on_in_order(many, model, tmp_path):
    command = ["predict", many, "--model", model, "--out", tmp_path / "a.csv", "--n-jobs", 2, "--batch-size", 2]
    run = subprocess.Popen([*PROGRAM, *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal, end = tmp_path / "a.csv.unfinished", time.monotonic() + 120
    while not (journal.exists() and journal.read_text().count("\n") >= 3) and time.monotonic() < end:
        time.sleep(0.02)
    run.send_signal(signal.SIGSTOP)  # or it is done before the workers are looked up
    workers = children(run.pid)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert workers and not (tmp_path / "a.csv").exists()
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]

    rows = journal.read_bytes().splitlines(keepends=True)
    foreign = rows[0].replace(b"/000.png", b"/elsewhere.png")
    torn = [b"junk\n", b"\xff\xfe\x00\n", b"[]\n", b"7\n", b'{"path": "x"}\n', b"[" * 100_000 + b"\n", b"\n", foreign, rows[0]]
    journal.write_bytes(b"".join([*rows[::-1], *torn, rows[1][:40]]))
    status, out, error = call(*command[:-4])
    assert status == 0 and f"({len(rows)} of them before)" in out and "9 lines of a stopped run passed over" in error
    table = table_of(tmp_path / "a.csv")
    assert list(table["path"]) == list_images(many) and set(table["error"]) == {""} and not journal.exists()


@pytest.mark.skipif(not shutil.which("ps"), reason="needs ps")
def test_a_killed_worker_is_one_message(many, model, tmp_path):
    for number in range(60, 400):
        os.link(many / f"{number % 6:03d}.png", many / f"{number:03d}.png")  # not finished before the kill
    command = ["predict", many, "--model", model, "--out", tmp_path / "a.csv", "--n-jobs", 2, "--batch-size", 1]
    run = subprocess.Popen([*PROGRAM, *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    journal, end = tmp_path / "a.csv.unfinished", time.monotonic() + 120
    while not (journal.exists() and journal.read_text().count("\n") >= 3) and time.monotonic() < end:
        time.sleep(0.02)
    run.send_signal(signal.SIGSTOP)
    for pid in children(run.pid):
        if b"LokyProcess" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
    run.send_signal(signal.SIGCONT)
    error = run.communicate(timeout=120)[1]
    assert (
        run.returncode == 1 and len(error.splitlines()) == 1 and "a worker process was killed; memory may have run out" in error
    )
    assert f"kept in {journal}" in error and len(journal.read_text().splitlines()) >= 3


@pytest.mark.parametrize(
    "change", ["path", "sha256", "class", "confidence", "model", "missing", "text for a number", "other model file"]
)
def test_rows_of_a_journal_are_checked(change, many, model, tmp_path):
    """A row that does not hold is predicted again, whatever is wrong with it."""
    other = dummy_model_file(tmp_path / "other.onnx", smears=2)  # same name, same version, other numbers

    def stop(rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_files(
            list_images(many), Task(str(other if change == "other model file" else model)), tmp_path / "a.csv", log=stop
        )
    journal = tmp_path / "a.csv.unfinished"
    row = json.loads(journal.read_text())
    if change == "missing":
        del row["p_Pre-B"]
    elif change == "text for a number":
        row["p_Pre-B"] = "0.5"
    elif change in row:
        row[change] = {"confidence": None, "class": 7}.get(change, "other")
    if change != "confidence":
        journal.write_text(json.dumps(row) + "\n")
    else:
        journal.write_text(json.dumps(row | {"confidence": ["0.5"]}) + "\n")
    assert predict_files(list_images(many), Task(str(model)), tmp_path / "a.csv") == 0
    assert predict_files(list_images(many), Task(str(model)), tmp_path / "b.csv") == 0
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_rows_that_are_not_those_of_the_files_end_the_run_before_the_table(many, model, tmp_path):
    def meddle(rows):
        (tmp_path / "a.csv.unfinished").write_bytes(b"")

    from leukemia_nb.data.files import OutputError

    with pytest.raises(OutputError, match=r"a\.csv\.unfinished: .*for 60 files"):
        predict_files(list_images(many), Task(str(model)), tmp_path / "a.csv", batch_size=30, log=meddle)
    assert not (tmp_path / "a.csv").exists()
    assert (
        call("predict", many, "--model", model, "--out", tmp_path / "a.csv")[0] == 0 and len(table_of(tmp_path / "a.csv")) == 60
    )


def test_a_truncated_overlay_is_made_again(paths, model, tmp_path):
    def stop(rows):
        raise KeyboardInterrupt

    task = Task(str(model), str(tmp_path / "ov"))
    with pytest.raises(KeyboardInterrupt):
        predict_files(paths, task, tmp_path / "a.csv", log=stop)
    (drawn,) = (tmp_path / "ov").glob("*.jpg")
    whole = drawn.read_bytes()
    drawn.write_bytes(whole[: len(whole) // 2])
    assert predict_files(paths, task, tmp_path / "a.csv") == 0
    assert drawn.read_bytes() == whole and len(list((tmp_path / "ov").glob("*.jpg"))) == 6


NAMES = [
    b"a\rb.png",
    b"a\nb.png",
    b"caf\xe9.png",
    b"=cmd|' C calc'!A0.png",
    b"+1.png",
    b"-1.png",
    b"@SUM(A1).png",
    b"\tx.png",
    b"$x$ ^_.png",
    "Blüte.png".encode(),
    b"a;b,c.png",
    b'"q".png',
    b"x" * 250 + b".png",
    b" .png",
    b"[1]*.png",
]


def test_any_name_is_one_row_and_no_formula(paths, model, place, tmp_path):
    (tmp_path / "in/Pre-B").mkdir(parents=True)
    for name in NAMES:
        shutil.copy(paths[2], os.fsencode(tmp_path / "in/Pre-B") + b"/" + name)
    folder = tmp_path / "in/Pre-B"
    status, out, error = call(
        "predict",
        ".",
        "--model",
        model,
        "--out",
        tmp_path / "a.csv",
        "--json",
        tmp_path / "a.json",
        "--overlays",
        tmp_path / "ov",
        cwd=folder,
    )
    assert status == 0, error
    assert len(table_of(tmp_path / "a.csv")) == len(json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))) == len(NAMES)
    assert (tmp_path / "a.csv").read_bytes().startswith(b"\xef\xbb\xbfpath,") and "Blüte" in (tmp_path / "a.csv").read_text(
        encoding="utf-8"
    )
    with open(tmp_path / "a.csv", encoding="utf-8-sig", newline="") as lines:
        cells = [cell for row in csv.DictReader(lines) for cell in (row["path"], row["error"])]
    assert len(cells) == 2 * len(NAMES) and not [cell for cell in cells if cell[:1] in tuple("=+-@\t\r\n") and cell]
    assert len(list((tmp_path / "ov").glob("*.jpg"))) == len(NAMES)
    status, out, error = call("predict", ".", "--model", model, cwd=folder)
    assert status == 0 and len(out.splitlines()) == len(NAMES) == len(out.split("\n")) - 1 and "\r" not in out
    status, out, error = call("compare", folder, "--study", place / "run", "--out", tmp_path / "comparison")
    assert status == 0 and len(out.splitlines()) == len(NAMES) + 1, error
    assert len(table_of(tmp_path / "comparison/comparison.csv")) == len(NAMES)


def test_an_over_wide_image_is_a_row_with_its_error_and_the_rest_goes_on(paths, model, place, tmp_path):
    write_image(tmp_path / "wide.png", np.full((100, 70144, 3), 230, np.uint8))
    status, out, error = call(
        "predict",
        paths[0],
        tmp_path / "wide.png",
        *paths[1:],
        "--model",
        model,
        "--out",
        tmp_path / "a.csv",
        "--overlays",
        tmp_path / "ov",
        "--saliency",
    )
    table = table_of(tmp_path / "a.csv")
    assert status == 1 and len(table) == 7 and "1 not read" in error
    assert [bool(problem) for problem in table["error"]] == [False, True] + [False] * 5 and "70144 x 100" in table["error"][1]
    assert len(list((tmp_path / "ov").glob("*-saliency.jpg"))) == 6
    status, out, error = call("compare", tmp_path / "wide.png", paths[0], "--study", place / "run", "--out", tmp_path / "cmp")
    assert status == 1 and "70144 x 100" in error and len(table_of(tmp_path / "cmp/comparison.csv")) == 2


def test_what_fails_in_any_other_way_stays_with_its_image(paths, model, tmp_path, monkeypatch):
    """Segmentation, the network and the overlay, each failing on one image with an error nobody foresaw."""
    from leukemia_nb.inference import predictor

    fails = {"segment": RuntimeError("one"), "overlay": ValueError("two\nlines"), "resize_square": MemoryError()}
    wanted = {name: read_image(path) for name, path in zip(fails, paths)}
    for name, error in fails.items():
        real = getattr(predictor, name)

        def failing(image, *more, real=real, error=error, bad=wanted[name], **settings):
            if image.shape == bad.shape and (image == bad).all():
                raise error
            return real(image, *more, **settings)

        monkeypatch.setattr(predictor, name, failing)
    predict_files(paths, Task(str(model), str(tmp_path / "ov")), tmp_path / "a.csv")
    table = table_of(tmp_path / "a.csv")
    assert [bool(error) for error in table["error"]] == [True] * 3 + [False] * 3
    assert "RuntimeError: one" in table["error"][0] and "ValueError: two)" in table["error"][1]
    assert "memory ran out" in table["error"][2] and "damaged" not in table["error"][2]
    assert all(str(path) in error for path, error in zip(paths, table["error"][:3]))
    assert len(list((tmp_path / "ov").glob("*.jpg"))) == 3


def test_a_network_that_fails_on_one_image_answers_the_others(paths, model):
    from leukemia_nb.inference.predictor import Predictor

    predictor = Predictor.load(model)
    real, bad = predictor.session, read_image(paths[2])

    class Session:
        def run(self, names, given):
            from leukemia_nb.models.interface import resize_square

            if any((one == resize_square(bad, 224)).all() for one in given["images"]):
                raise RuntimeError("no such kernel")
            return real.run(names, given)

    predictor.session = Session()
    rows = predictor.predict(paths).rows
    assert [bool(row["error"]) for row in rows] == [False, False, True, False, False, False] and "no such kernel" in rows[2][
        "error"
    ]


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
    kept = (tmp_path / "a.csv.unfinished").read_bytes()
    assert 8 <= kept.count(b"\n") < 60 and kept.endswith(b"\n")
    status, out, error = call(*command)
    assert status == 0 and f"({kept.count(bytes([10]))} of them before)" in out and "passed over" not in error
    assert list(table_of(tmp_path / "a.csv")["path"]) == list_images(many)


def test_a_disk_that_takes_no_overlay_is_one_message(paths, model, tmp_path):
    big = tmp_path / "in.png"
    write_image(big, smear("Pre-B", 0, 384, 512).image)
    command = (
        "predict",
        *paths,
        big,
        "--model",
        model,
        "--out",
        tmp_path / "a.csv",
        "--overlays",
        tmp_path / "ov",
        "--batch-size",
        1,
    )
    status, _, error = call(*command, preexec_fn=limited(20_000))
    assert status == 1 and len(error.splitlines()) == 1 and "-cells.jpg: cannot be written" in error and "kept in" in error
    assert not list((tmp_path / "ov").glob("in-*")) and not list((tmp_path / "ov").glob(".part*"))
    status, out, error = call(*command)
    assert status == 0 and "(6 of them before)" in out and len(list((tmp_path / "ov").glob("*.jpg"))) == 7


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 160 kilobytes; the test skips where none can be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("cannot mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named_with_its_remedy(many, model, small_disk):
    fill = small_disk / "fill"
    fill.write_bytes(bytes(140_000))
    status, _, error = call("predict", many, "--model", model, "--out", small_disk / "a.csv")
    assert status == 1 and "No space left on device. Free some space" in error and len(error.splitlines()) == 1
    assert "[Errno" not in error and not (small_disk / "a.csv").exists()
    fill.unlink()
    status, out, error = call("predict", many, "--model", model, "--out", small_disk / "a.csv")
    assert status == 0 and "of them before" in out, error
    assert len(table_of(small_disk / "a.csv")) == 60


def test_only_what_is_written_may_be_the_name(paths, model, tmp_path):
    for option, name, kind in [
        ("--out", "a.xlsx", "CSV"),
        ("--out", "a.tsv", "CSV"),
        ("--out", "a.parquet", "CSV"),
        ("--out", "a", "CSV"),
        ("--json", "a.csv", "JSON"),
    ]:
        status, out, error = call("predict", paths[0], "--model", model, option, tmp_path / name)
        assert status == 1 and len(error.splitlines()) == 1 and f"{name}: is to be written as {kind}" in error
    assert os.listdir(tmp_path) == []
    assert call("predict", paths[0], "--model", model, "--out", tmp_path / "A.CSV")[0] == 0
    status, out, error = call("predict", paths[0], "--model", model, "--out", "/dev/full")
    assert status == 1 and len(error.splitlines()) == 1 and Path("/dev/full").is_char_device()


def test_compare_tells_files_of_one_name_apart(paths, place, tmp_path):
    for number, name in enumerate(["Normal/a.png", "Pre-B/a.png", "x/y/z/1/b.png", "x/y/z/2/b.png", "c.png"]):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(paths[number], tmp_path / "in" / name)
    status, out, error = call("compare", tmp_path / "in", "--study", place / "run", "--out", tmp_path / "cmp")
    assert status == 0, error
    shown = [line.split()[0] for line in out.splitlines()[1:]]
    assert sorted(shown) == ["1/b.png", "2/b.png", "Normal/a.png", "Pre-B/a.png", "c.png"]
    assert table_of(tmp_path / "cmp/comparison.csv")["path"].nunique() == 5
    from leukemia_nb.evaluation.metrics import unseen_figure

    figure = unseen_figure(table_of(tmp_path / "cmp/comparison.csv"))
    texts = {text.get_text() for axis in figure.axes for text in axis.texts}
    assert set(shown) <= texts


def test_compare_has_a_row_for_every_image_and_a_column_for_every_model(paths, place, tmp_path):
    shutil.copytree(place / "run", tmp_path / "run")
    shutil.copy(tmp_path / "run/exported/pair.onnx", tmp_path / "run/exported/copy.onnx")  # says the same of itself
    os.mkfifo(tmp_path / "run/exported/pipe.onnx")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    status, out, error = call(
        "compare", paths[0], tmp_path / "broken.jpg", paths[5], "--study", tmp_path / "run", "--out", tmp_path / "cmp"
    )
    table = table_of(tmp_path / "cmp/comparison.csv")
    assert (
        status == 1 and list(table["path"]) == [paths[0], str(tmp_path / "broken.jpg"), paths[5]] and len(out.splitlines()) == 4
    )
    assert [bool(problem) for problem in table["error"]] == [False, True, False] and "pipe.onnx: a pipe or a device" in error
    assert len([name for name in table if name.endswith(" confidence")]) == 3
    assert (tmp_path / "cmp/comparison.csv").read_bytes().startswith(b"\xef\xbb\xbf")


def test_brackets_of_the_kaggle_folders(paths, model, tmp_path):
    for name in ("[Malignant] Pre-B", "[Malignant] Pro-B", "Benign"):
        (tmp_path / name).mkdir()
        shutil.copy(paths[0], tmp_path / name / "a.jpg")
    for pattern, number in (("[Malignant] Pre-B/*.jpg", 1), ("[Malignant]*/*.jpg", 2), ("*/*.jpg", 3), ("[B]enign/?.jpg", 1)):
        status, out, error = call("predict", pattern, "--model", model, cwd=tmp_path)
        assert status == 0 and len(out.splitlines()) == number, (pattern, out, error)


def test_what_the_file_says_of_its_calibration_is_said(paths, model):
    status, out, error = call("predict", paths[0], "--model", model)
    assert status == 0 and "not calibrated: made up" in error and "are calibrated" not in error
    assert "blast" not in out + error and "cells on" in out
