"""Segmenting a folder: nothing lost, no mask attributed to the wrong image, own output never read."""

import resource
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from contextlib import chdir, contextmanager
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from leukemia_nb.processing import quality_control
from leukemia_nb.data.files import file_lock, pluralise
from leukemia_nb.errors import LeukemiaError
from leukemia_nb.data.images import read_image, write_image
from leukemia_nb.processing.quality_control import _mask_names, segment_folder
from leukemia_nb.processing.segmentation import segment
from leukemia_nb.data.synthetic import make_smear

CODE = """
import sys
from leukemia_nb.data.files import pluralise
from leukemia_nb.errors import LeukemiaError
from leukemia_nb.processing.quality_control import segment_folder
images, _, out, *jobs = sys.argv[1:]
try:
    table = segment_folder(images, out, n_jobs=int(jobs[1]) if jobs else None, log=lambda line: print(line, file=sys.stderr))
except (LeukemiaError, OSError) as error:
    sys.exit(str(error))
except KeyboardInterrupt as error:
    print(error, file=sys.stderr)
    sys.exit(130)
bad = int((table["problem"] != "").sum())
print(f"{pluralise(len(table) - bad, 'image')} segmented, {bad} unreadable")
sys.exit(bad > 0)
"""
PROGRAM = [sys.executable, "-c", CODE]


def call(images, _, out, *jobs, cwd=None, **more):
    """Segment a folder, in this process unless it needs limits of its own; gives (status, standard output, standard error)."""
    if more:
        command = [*PROGRAM, *map(str, (images, _, out, *jobs))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd, **more)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout, done.stderr
    lines: list[str] = []
    with chdir(cwd or "."):
        try:
            table = segment_folder(images, out, n_jobs=jobs[1] if jobs else None, log=lines.append)
        except (LeukemiaError, OSError) as error:
            return 1, "", "\n".join([*lines, str(error)])
    bad = int((table["problem"] != "").sum())
    return int(bad > 0), f"{pluralise(len(table) - bad, 'image')} segmented, {bad} unreadable", "\n".join(lines)


@contextmanager
def begun(out, *arguments):
    """A running `segment` that has finished an image and not all of them."""
    with subprocess.Popen([*PROGRAM, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        while run.poll() is None and not list(Path(out).glob("records/*.json")):
            time.sleep(0.01)
        assert run.poll() is None, run.stderr.read()
        yield run


def table_of(out) -> pd.DataFrame:
    return pd.read_csv(Path(out) / "qc.csv", keep_default_na=False, dtype={"problem": str})


def check_masks(images, out):
    """Every row without a problem has a mask of its own image and an overlay of its size, and no two the same file."""
    table = table_of(out)
    good = table[table.problem == ""]
    for column in ("mask", "overlay"):
        names = [unicodedata.normalize("NFC", name).casefold() for name in good[column]]
        assert len(set(names)) == len(good) == sum(path.is_file() for path in (Path(out) / f"{column}s").rglob("*"))
    for row in good.itertuples():
        image = read_image(Path(images, row.path))
        assert ((read_image(Path(out, row.mask))[..., 0] > 0) == segment(image)).all(), row.path
        assert read_image(Path(out, row.overlay)).shape == image.shape
    return table


@pytest.fixture(scope="module")
def drawn():
    """Five different smears, 128 x 160."""
    return [make_smear("Pre-B", seed, 128, 160).image for seed in range(5)]


@pytest.fixture(scope="module")
def many(tmp_path_factory, drawn):
    """A folder of sixteen larger images: work for some seconds."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(16):
        write_image(folder / f"{number:02d}.png", np.tile(np.roll(drawn[number % 5], number, 0), (6, 6, 1)))
    return folder


def test_inputs_of_one_stem_have_a_mask_each(tmp_path, drawn):
    folder, long = tmp_path / "in", "é" * 121  # 246 bytes with its suffix
    for name, image in zip(("a.jpg", "a.png", "b.png", "A.png", f"{long}.png"), drawn):
        write_image(folder / name, image)
    (folder / "b.png").rename(folder / "a.jpg.png")
    write_image(folder / "a.jpg.d" / "a.png", drawn[0])
    write_image(folder / "x.png" / "y.jpg", drawn[1])  # a folder of the name that the mask of X.png would have
    write_image(folder / "X.png", drawn[2])
    status, said, error = call(folder, "--out", tmp_path / "out")
    assert status == 0 and "8 images segmented" in said, error
    assert len(check_masks(folder, tmp_path / "out")) == 8


def test_a_mask_without_white_cells_is_flagged(tmp_path, drawn):
    """K-means has to take something: without a white cell, red ones. The second method finds none."""
    red = np.full((128, 160, 3), 235, np.uint8)
    for at in ((30, 30), (100, 50), (60, 90)):
        cv2.circle(red, at, 14, (205, 140, 150), -1)
    write_image(tmp_path / "in/red.png", red)
    write_image(tmp_path / "in/smear.png", drawn[0])
    status, said, error = call(tmp_path / "in", "--out", tmp_path / "out")
    table = table_of(tmp_path / "out").set_index("path")
    assert status == 0 and table.cell_fraction["red.png"] > 0.05, error
    assert table.flag["red.png"] == "IoU with the other method 0.00" and table.flag["smear.png"] == ""


def test_a_name_stays_when_other_images_come_to_it():
    names = ["a.bmp", "a.jpg", "a.jpg.png", "a.png", "a.png.png", "b/a.png", "b/a.tif", "ü" * 124 + ".jpg"]
    alone = [_mask_names([name])[0] for name in names]
    assert _mask_names(names) == alone and len(set(alone)) == len(names)
    assert all(len(name.encode()) <= 255 for name in alone) and alone[3] == "a.png"
    both = _mask_names(["A.jpg", "a.jpg", "É.png", "É.png"])  # one letter, or a letter and its accent
    assert len({unicodedata.normalize("NFC", name).casefold() for name in both}) == 4


def test_an_old_mask_is_never_taken_for_that_of_another_image(tmp_path, drawn):
    for name, image in zip("ab", drawn):
        write_image(tmp_path / "in" / f"{name}.png", image)
    call(tmp_path / "in", "--out", tmp_path / "out")
    write_image(tmp_path / "in/a.png", drawn[3])  # another image under the name
    write_image(tmp_path / "in/a.jpg", drawn[4])
    (tmp_path / "in/b.png").write_bytes(b"")
    status, said, error = call(tmp_path / "in", "--out", tmp_path / "out")
    assert "2 images segmented" in said and "1 unreadable" in said
    table = check_masks(tmp_path / "in", tmp_path / "out")
    assert (
        status == 1
        and table["path"].tolist() == ["a.jpg", "a.png", "b.png"]
        and (table.problem != "").tolist() == [False, False, True]
    )
    assert table["mask"].tolist() == ["masks/a.jpg.png", "masks/a.png", ""] and not (tmp_path / "out/masks/b.png").exists()


def test_a_torn_file_counts_as_not_done(tmp_path, drawn):
    for name, image in zip("abc", drawn):
        write_image(tmp_path / "in" / f"{name}.png", image)
    segment_folder(tmp_path / "in", tmp_path / "out")
    files = [tmp_path / "out" / name for name in ("overlays/a.png", "masks/b.png", "records/c.png.json", "qc.csv")]
    before = [file.read_bytes() for file in files]
    files[0].write_bytes(before[0][:300])
    files[1].write_bytes(b"")
    files[2].write_bytes(b"[]")
    segment_folder(tmp_path / "in", tmp_path / "out")
    assert [file.read_bytes() for file in files] == before
    (tmp_path / "out/records/c.png.json").write_bytes(b"junk")
    (tmp_path / "out/masks/.part-1-abc.png").write_bytes(b"what a killed run left")
    segment_folder(tmp_path / "in", tmp_path / "out")
    assert [file.read_bytes() for file in files] == before and not list(tmp_path.rglob(".part-*"))


def test_own_output_is_not_read_again(tmp_path, drawn):
    for name, image in zip("ab", drawn):
        write_image(tmp_path / f"Pre/{name}.png", image)
    for out in ("one", "two", "one"):
        status, said, error = call(".", "--out", out, cwd=tmp_path)
        assert status == 0 and "2 images segmented" in said and ".: 2 images found" in error
    assert "written by leukemia_nb: 2" in error and table_of(tmp_path / "one")["path"].tolist() == ["Pre/a.png", "Pre/b.png"]


@pytest.mark.parametrize(
    ("images", "out"),
    [("data", "data"), ("data", "."), ("data", "data/Pre"), (".", "data/Pre"), ("data/Pre/a.png", "data"), ("data", "link")],
)
def test_output_into_the_folder_of_the_images_is_refused(tmp_path, drawn, images, out):
    write_image(tmp_path / "data/Pre/a.png", drawn[0])
    write_image(tmp_path / "data/Pro/b.png", drawn[1])
    (tmp_path / "link").symlink_to("data")
    before = sorted(tmp_path.rglob("*"))
    status, said, error = call(images, "--out", out, cwd=tmp_path)
    assert status == 1 and said == "" and "holds the images that are read" in error
    assert sorted(tmp_path.rglob("*")) == before


def test_what_was_left_out_or_not_reached_is_said(tmp_path, drawn):
    write_image(tmp_path / "in/a.png", drawn[0])
    (tmp_path / "in/notes.txt").touch()
    (tmp_path / "in/gone.png").symlink_to("nowhere")
    status, said, error = call(tmp_path / "in", "--out", tmp_path / "out")
    assert status == 1 and "1 image segmented" in said and "1 unreadable" in said
    assert "1 image found, 1 left out (.txt files: 1), 1 could not be reached" in error
    table = table_of(tmp_path / "out").set_index("path")
    assert table.problem["a.png"] == "" and "leads nowhere" in table.problem["gone.png"]
    write_image(tmp_path / "other/b.png", drawn[1])
    status, said, error = call(tmp_path / "other", "--out", tmp_path / "out")
    assert status == 0 and "also holds the files of 1 image of earlier calls, such as a.png" in error
    assert (tmp_path / "out/masks/a.png").is_file() and len(table_of(tmp_path / "out")) == 1


def test_images_too_wide_are_rows(tmp_path, drawn):
    write_image(tmp_path / "in/good.png", drawn[0])
    write_image(tmp_path / "in/wide.png", np.tile(drawn[0][:100], (1, 439, 1)))
    write_image(tmp_path / "in/widest.tif", np.full((16, 40_000), 230, np.uint8))
    status, said, error = call(tmp_path / "in", "--out", tmp_path / "out")
    table = check_masks(tmp_path / "in", tmp_path / "out").set_index("path")
    assert status == 1 and "1 image segmented" in said and len(error.splitlines()) == 1, error
    assert table.problem["good.png"] == "" and all(
        "pixels a side at most" in table.problem[name] for name in ("wide.png", "widest.tif")
    )


@pytest.mark.parametrize("trouble", [cv2.error("bad\nlines"), MemoryError(), ValueError("no such thing"), RuntimeError("x")])
def test_any_error_on_one_image_is_its_row(tmp_path, drawn, monkeypatch, trouble):
    for name, image in zip("abc", drawn):
        write_image(tmp_path / "in" / f"{name}.png", image)
    real = quality_control.segment

    def failing(image, *more):
        if (image == drawn[1]).all():
            raise trouble
        return real(image, *more)

    monkeypatch.setattr(quality_control, "segment", failing)
    segment_folder(tmp_path / "in", tmp_path / "out")
    table = table_of(tmp_path / "out").set_index("path")
    assert (table.problem != "").tolist() == [False, True, False] and "in/b.png: " in table.problem["b.png"]
    assert "\n" not in table.problem["b.png"] and len(list((tmp_path / "out").rglob("*.png"))) == 6


def test_a_full_disk_keeps_what_is_done_and_the_same_command_goes_on(tmp_path, drawn):
    write_image(tmp_path / "in/a.png", drawn[0])
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8)
    write_image(tmp_path / "in/b.png", noise)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    status, said, error = call(tmp_path / "in", "--out", tmp_path / "out", preexec_fn=limit)
    assert (
        status == 1
        and said == ""
        and "b.png: cannot be written: File too large" in error
        and "1 of 2 images are done and kept: run again" in error.splitlines()[-1]
    )
    assert {path.name for path in (tmp_path / "out/overlays").iterdir()} == {"a.png"} and not list(tmp_path.rglob(".part-*"))
    done = (tmp_path / "out/masks/a.png").stat().st_mtime_ns
    assert call(tmp_path / "in", "--out", tmp_path / "out")[0] == 0
    assert len(check_masks(tmp_path / "in", tmp_path / "out")) == 2 and (tmp_path / "out/masks/a.png").stat().st_mtime_ns == done


def test_a_folder_into_which_another_command_writes_is_refused(tmp_path, many):
    with file_lock(tmp_path / "out"):  # as `prepare` and `segment` take it, whose half-written files are no leftovers
        status, said, error = call(many, "--out", tmp_path / "out")
    assert status == 1 and said == "" and "out: another leukemia_nb is writing it" in error


@pytest.mark.slow
def test_a_second_writer_is_refused_and_the_first_one_loses_nothing(tmp_path, many):
    with begun(tmp_path / "out", many, "--out", tmp_path / "out") as first:
        first.send_signal(signal.SIGSTOP)
        status, said, error = call(many, "--out", tmp_path / "out")
        assert status == 1 and said == "" and "another leukemia_nb is writing it" in error
        first.send_signal(signal.SIGCONT)
        assert first.wait(300) == 0
    assert table_of(tmp_path / "out")["path"].tolist() == sorted(path.name for path in many.iterdir())


@pytest.mark.slow
def test_a_killed_run_leaves_no_workers_and_is_gone_on_with(tmp_path, many):
    psutil = pytest.importorskip("psutil")
    segment_folder(many, tmp_path / "whole")
    with begun(tmp_path / "out", many, "--out", tmp_path / "out", "--n-jobs", 2) as run:
        workers = psutil.Process(run.pid).children(recursive=True)
        assert len(workers) >= 2
        run.kill()
    assert not psutil.wait_procs(workers, timeout=60)[1]
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/records").iterdir()}
    assert 1 <= len(done) < 16 and not (tmp_path / "out/qc.csv").exists()
    status, _, error = call(many, "--out", tmp_path / "out")
    assert status == 0 and all(path.stat().st_mtime_ns == date for path, date in done.items())
    pd.testing.assert_frame_equal(table_of(tmp_path / "out"), table_of(tmp_path / "whole"))


@pytest.mark.slow
def test_ctrl_c_says_what_is_done(tmp_path, many):
    with begun(tmp_path / "out", many, "--out", tmp_path / "out", "--n-jobs", 2) as run:
        run.send_signal(signal.SIGINT)
        error = run.communicate(timeout=300)[1]
    assert run.returncode == 130 and "of 16 images are done and kept: run again to resume" in error and "Traceback" not in error


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, drawn):
    write_image(tmp_path / "in/a.png", drawn[0])
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file/below", "/proc/out"):
        status, said, error = call(tmp_path / "in", "--out", out)
        assert status == 1 and said == "" and len(error.splitlines()) == 2 and str(out) in error


def test_real_images_of_three_laboratories(tmp_path, shared_data):
    for path in [
        *sorted((shared_data / "wbc_masks").glob("00[1-4].bmp")),
        *sorted((shared_data / "bccd/images").glob("*"))[:4],
        *sorted((shared_data / "kaggle_fullres").rglob("*.jpg"))[:3],
    ]:
        shutil.copy(path, tmp_path)
    (tmp_path / "out").mkdir()
    assert call(tmp_path, "--out", tmp_path / "out", "--n-jobs", 2)[0] == 0
    assert len(check_masks(tmp_path, tmp_path / "out")) >= 10
