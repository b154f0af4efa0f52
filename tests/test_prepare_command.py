"""Preparing a folder: pairs of every good image, one writer, own output never read, the bad ones a row."""

import os
import signal
import subprocess
import sys
import time
from contextlib import chdir, contextmanager
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

from leukemia_nb.data.files import pluralise
from leukemia_nb.data.manifest import build_manifest
from leukemia_nb.data.images import read_image, resize_square, write_image
from leukemia_nb.errors import LeukemiaError
from leukemia_nb.processing.dataset import Pairs, oversample_with_flips, prepare_folder, prepare_pairs
from leukemia_nb.data.synthetic import make_smear

CODE = """
import sys
from leukemia_nb.errors import LeukemiaError
from leukemia_nb.processing.dataset import prepare_folder
data, out, *jobs = sys.argv[1:]
try:
    prepare_folder(data, out, size=32, n_jobs=int(jobs[0]) if jobs else None)
except (LeukemiaError, OSError) as error:
    sys.exit(str(error))
except KeyboardInterrupt as error:
    print(error, file=sys.stderr)
    sys.exit(130)
"""
PROGRAM = [sys.executable, "-c", CODE]
FOLDERS = {"Benign": "Normal", "[Malignant] Pre-B": "Pre-B", "Pro": "Pro-B"}


def call(data, out, cwd=None):
    """Prepare a folder; gives (status, a line about the pairs, the log or the error)."""
    lines: list[str] = []
    with chdir(cwd or "."):
        try:
            table = prepare_folder(data, out, size=32, log=lines.append)
        except (LeukemiaError, OSError) as error:
            return 1, "", str(error)
    bad = int((table["problem"] != "").sum())
    return 0, f"{len(table) - bad} pairs, {pluralise(bad, 'image')} with problems", "\n".join(lines)


@contextmanager
def begun(data, out, *arguments):
    """A running `prepare` that has finished a pair and not all of them."""
    command = [*PROGRAM, data, out, *arguments]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        while run.poll() is None and not list(Path(out).rglob("records/*/*.json")):
            time.sleep(0.01)
        assert run.poll() is None, run.stderr.read()
        yield run


def table_of(out, name="pairs.csv") -> pd.DataFrame:
    return pd.read_csv(Path(out) / name, keep_default_na=False, dtype={"problem": str})


def check_pairs(out):
    """Each good row has the two files of its own image, each other row none."""
    table = table_of(out)
    good = table[table.problem == ""]
    files = good[["original", "segmented", "cells"]].stack()
    assert len(list((Path(out) / "prepared").rglob("*.png"))) == 3 * len(good) == files.nunique()
    for row in good.itertuples():
        assert (read_image(Path(out, "prepared", row.original)) == resize_square(read_image(row.path), 32)).all(), row.path
    assert (table.loc[table.problem != "", ["original", "segmented"]] == "").all(axis=None)
    return table


def fill(folder, number=2, height=96, width=128, times=1):
    for folder_name, label in FOLDERS.items():
        for seed in range(number):
            image = np.tile(make_smear(label, seed, height, width).image, (times, times, 1))
            write_image(Path(folder) / folder_name / f"s{seed}.png", image)
    return Path(folder)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A folder of fifteen larger images: work for some seconds."""
    return fill(tmp_path_factory.mktemp("many"), 5, 128, 160, 6)


def test_own_output_is_not_read_again(tmp_path):
    fill(tmp_path)
    for out in ("one", "two", "one"):
        status, said, error = call(".", out, cwd=tmp_path)
        assert status == 0 and "6 pairs" in said and "6 images found" in error, error
    assert "written by leukemia_nb: 1" in error and len(check_pairs(tmp_path / "one")) == 6 == len(check_pairs(tmp_path / "two"))


@pytest.mark.parametrize(
    ("data", "out"), [("data", "data"), ("data", "."), ("data", "data/Pro"), (".", "data"), ("data/Pro", "data")]
)
def test_output_into_the_folder_of_the_images_is_refused(tmp_path, data, out):
    fill(tmp_path / "data", 1)
    before = sorted(tmp_path.rglob("*"))
    status, said, error = call(data, out, cwd=tmp_path)
    assert status == 1 and said == "" and "holds the images that are read" in error and len(error.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_names_that_fall_together_or_are_too_long(tmp_path):
    fill(tmp_path / "in", 1)
    names = ["a.jpg", "A.jpg", "a.png", "a.jpg.png", "é" * 121 + ".png", "é" * 121 + ".jpg"]
    for seed, name in enumerate(names):
        write_image(tmp_path / "some.png", make_smear("Pro-B", seed + 5, 96, 128).image)
        (tmp_path / "in/Pro" / name).write_bytes((tmp_path / "some.png").read_bytes())
    status, said, error = call(tmp_path / "in", tmp_path / "out")
    assert status == 0 and "9 pairs" in said and "0 images with problems" in said, error
    assert check_pairs(tmp_path / "out")["pair"].str.casefold().nunique() == 9


def spoil(folder):
    """Bad files of every kind among good ones; gives their number."""
    good = (folder / "Pro/s0.png").read_bytes()
    for name, content in {"empty.png": b"", "cut.png": good[:900], "text.jpg": b"no image", "same.png": None}.items():
        (folder / "Pro" / name).write_bytes((folder / "Benign/s0.png").read_bytes() if content is None else content)
    (folder / "Pro/gone.png").symlink_to("nowhere")
    return 6  # the image under two classes is two rows


def test_bad_images_are_rows_and_stop_nothing(tmp_path):
    bad = spoil(fill(tmp_path / "in"))
    status, said, error = call(tmp_path / "in", tmp_path / "out")
    assert status == 0 and "5 pairs" in said and "6 images with problems" in said, error
    table = check_pairs(tmp_path / "out")
    assert (table.problem != "").sum() == bad and "1 could not be reached" in error
    pairs = Pairs(tmp_path / "out/prepared", table=table)  # with the bad rows, as read from the file
    assert len(pairs) == 5 == len(pairs[:]) and set(pairs.table["pair"]) == set(table["pair"][table.problem == ""])
    training = oversample_with_flips(pairs.table.assign(subset="train"))
    assert training["class"].value_counts().to_dict() == {"Normal": 2, "Pre-B": 2, "Pro-B": 2}


def test_an_image_that_went_bad_loses_its_old_pair_and_no_other(tmp_path):
    data = fill(tmp_path / "in")
    assert call(data, tmp_path / "out")[0] == 0
    (data / "Pro/s1.png").write_bytes(b"")
    status, said, _ = call(data, tmp_path / "out")
    assert status == 0 and "5 pairs" in said and "1 image with problems" in said
    assert len(check_pairs(tmp_path / "out")) == 6 and not list((tmp_path / "out").rglob("s1.json"))[2:]


def test_files_of_images_that_are_gone_are_said_and_kept(tmp_path):
    data = fill(tmp_path / "in")
    assert "earlier calls" not in call(data, tmp_path / "out")[2]
    (data / "Pro/s1.png").unlink()
    status, said, error = call(data, tmp_path / "out")
    assert status == 0 and "5 pairs" in said and "also holds the files of 1 image of earlier calls, such as Pro-B/s1" in error
    assert len(list((tmp_path / "out/prepared/original").rglob("*.png"))) == 6


def test_an_image_that_changed_since_the_manifest_is_a_row(tmp_path):
    data = fill(tmp_path / "in")
    manifest = build_manifest(data)
    (data / "Pro/s0.png").write_bytes((data / "Benign/s0.png").read_bytes())
    (data / "Pro/s1.png").unlink()
    (data / "Pro/s1.png").mkdir()
    table = prepare_pairs(manifest, tmp_path / "prepared", size=32)
    assert table["class"][table["problem"] != ""].tolist() == ["Pro-B"] * 2
    assert len(Pairs(tmp_path / "prepared", table=table)) == 4


@pytest.mark.slow
def test_a_second_writer_is_refused_and_the_first_one_loses_nothing(tmp_path, many):
    with begun(many, tmp_path / "out") as first:
        first.send_signal(signal.SIGSTOP)
        status, said, error = call(many, tmp_path / "out")
        assert status == 1 and said == "" and "another leukemia_nb is writing it" in error
        first.send_signal(signal.SIGCONT)
        assert first.wait(300) == 0
    assert len(check_pairs(tmp_path / "out")) == 15 == len(table_of(tmp_path / "out", "manifest.csv"))


@pytest.mark.slow
def test_a_killed_run_leaves_no_workers_and_is_gone_on_with(tmp_path, many):
    psutil = pytest.importorskip("psutil")
    with begun(many, tmp_path / "out", 2) as run:
        workers = psutil.Process(run.pid).children(recursive=True)
        assert len(workers) >= 2
        run.kill()
    assert not psutil.wait_procs(workers, timeout=60)[1]
    (tmp_path / "out/prepared/Pro-B/.part-1-abc.png").parent.mkdir(exist_ok=True)
    (tmp_path / "out/prepared/Pro-B/.part-1-abc.png").write_bytes(b"what a killed run left")
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("records/*/*.json")}
    assert 1 <= len(done) < 15 and not (tmp_path / "out/pairs.csv").exists()
    status, said, error = call(many, tmp_path / "out")
    assert status == 0 and "15 pairs" in said and all(path.stat().st_mtime_ns == date for path, date in done.items()), error
    assert len(check_pairs(tmp_path / "out")) == 15 and not list(tmp_path.rglob(".part-*"))


@pytest.mark.slow
def test_ctrl_c_says_what_is_done(tmp_path, many):
    with begun(many, tmp_path / "out") as run:
        run.send_signal(signal.SIGINT)
        error = run.communicate(timeout=300)[1]
    assert run.returncode == 130 and "of 15 pairs are done and kept: run again to resume" in error and "Traceback" not in error


@pytest.mark.slow
def test_the_prepare_notebook_goes_on_past_bad_images(tmp_path):
    """The step of the study, with bad files of every kind and all good masks of a class flagged or not."""
    papermill = pytest.importorskip("papermill")
    bad = spoil(fill(tmp_path / "in", 21, 64, 80))
    notebook = Path(__file__).parents[1] / "nbs/study/10_prepare.ipynb"
    parameters = {"run": str(tmp_path / "run"), "data": str(tmp_path / "in"), "image_size": 32}
    os.mkdir(tmp_path / "run")
    papermill.execute_notebook(
        str(notebook), str(tmp_path / "done.ipynb"), parameters, progress_bar=False, cwd=str(tmp_path / "run")
    )
    table = check_pairs(tmp_path / "run")
    assert (table.problem != "").sum() == bad and len(table) == 63 + bad - 1
    shown = "".join(str(output) for cell in nbformat.read(tmp_path / "done.ipynb", 4).cells for output in cell.get("outputs", []))
    assert "cut.png" in shown and "could not be reached" in shown


def test_data_that_is_none_leaves_nothing_behind(tmp_path):
    write_image(tmp_path / "in/fields/a.png", make_smear("Pro-B", 0, 96, 128).image)
    status, said, error = call(tmp_path / "in", tmp_path / "out")
    assert status == 1 and said == "" and "Sort them into folders" in error and not (tmp_path / "out").exists()


def test_an_archive_or_an_image_given_as_folder_is_one_line(tmp_path):
    for name, word in (("set.zip", "is an archive. Unpack it"), ("a.png", "is a file. Give the folder")):
        (tmp_path / name).write_bytes(b"PK\3\4")
        status, said, error = call(tmp_path / name, tmp_path / "out")
        assert status == 1 and word in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
