"""Whole files or none, tables, names."""
import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from leukemia_nb import files
from leukemia_nb.data import find_pictures
from leukemia_nb.files import OutputError, atomic_path, check_output, set_sha256, shown
from leukemia_nb.images import write_picture


@pytest.fixture
def photo() -> np.ndarray:
    y, x = np.mgrid[:48, :64]
    found = np.dstack([200 - y, 120 + x, 220 - x]).astype(np.uint8)
    found[:12, :16] = (200, 30, 60)  # tells every rotation from every other
    return found


def noise(seed: int, height: int = 30, width: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_readable_by_others(tmp_path):
    old = os.umask(0o022)
    try:
        with atomic_path(tmp_path / "x") as temporary: temporary.write_text("a")
    finally: os.umask(old)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


def test_error_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "x.csv").write_text("old")
    with pytest.raises(KeyError), atomic_path(tmp_path / "x.csv") as temporary:
        temporary.write_text("half")
        raise KeyError("stop")
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"] and (tmp_path / "x.csv").read_text() == "old"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_full_disk_for_real(tmp_path):
    with pytest.raises(OutputError, match=r"x\.csv: cannot be written: No space left on device\. Free some space") as caught, \
         atomic_path(tmp_path / "x.csv") as temporary:
        temporary.symlink_to("/dev/full")
        pd.DataFrame({"a": range(100_000)}).to_csv(temporary)
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_disk_fills_up_during_a_picture(tmp_path, photo, monkeypatch):
    write_picture(tmp_path / "x.png", photo)
    before = (tmp_path / "x.png").read_bytes()

    def fill(source, target): raise OSError(errno.ENOSPC, "No space left on device", str(source))
    monkeypatch.setattr(files.os, "replace", fill)
    with pytest.raises(OutputError, match=r"x\.png: cannot be written: No space left"): write_picture(tmp_path / "x.png", photo // 2)
    assert (tmp_path / "x.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_file_where_a_folder_should_be(tmp_path, photo):
    (tmp_path / "runs").touch()
    with pytest.raises(OutputError, match=r"runs/a/x\.png: cannot be written: .*choose another folder"):
        write_picture(tmp_path / "runs" / "a" / "x.png", photo)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(tmp_path, photo):
    tmp_path.chmod(0o555)
    with pytest.raises(OutputError, match="Choose a folder you may write to"): write_picture(tmp_path / "x.png", photo)


def test_unwritable_folder_as_the_system_says_it(tmp_path, photo, monkeypatch):
    def refuse(self, *arguments, **settings): raise PermissionError(errno.EACCES, "Permission denied", str(self))
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match=r"x\.png: cannot be written: Permission denied\. Choose a folder you may write to"):
        write_picture(tmp_path / "new" / "x.png", photo)


def test_errors_about_other_files_pass_unchanged(tmp_path):
    with pytest.raises(PermissionError, match="elsewhere"), atomic_path(tmp_path / "x"):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere")


def test_killed_while_writing(tmp_path):
    code = ("import os, signal, sys; from leukemia_nb.files import atomic_path\n"
            "with atomic_path(sys.argv[1]) as t: t.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)")
    root = Path(files.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "Pre" / "x.png"], env=os.environ | {"PYTHONPATH": str(root)})
    assert done.returncode == -9 and not (tmp_path / "Pre" / "x.png").exists()
    assert list((tmp_path / "Pre").iterdir()) and not find_pictures(tmp_path)  # the leftover is no picture


@given(st.binary(max_size=20).filter(lambda name: b"\0" not in name))
def test_shown_text_can_be_saved_and_other_text_is_as_it_was(name):
    shown(os.fsdecode(name)).encode("utf-8", "strict")
    try: assert shown(os.fsdecode(name)) == name.decode()
    except UnicodeDecodeError: assert "\\x" in shown(os.fsdecode(name))


def test_outputs_are_looked_at_without_leaving_anything(tmp_path):
    (tmp_path / "file").touch()
    for path, folder in [("new.csv", False), ("file", False), ("a/b/c", False), ("a/b", True), (".", True)]:
        check_output(tmp_path / path, folder)
    for path, folder, message in [(".", False, "choose another name"), ("file", True, "A file stands"), ("file/a.csv", False, "A file stands")]:
        with pytest.raises(OutputError, match=message): check_output(tmp_path / path, folder)
    check_output("new.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]



@given(st.lists(st.text("0123456789abcdef", min_size=4, max_size=8), min_size=1, unique=True), st.randoms())
def test_the_digest_of_a_set_does_not_know_an_order(digests, random):
    shuffled = random.sample(digests, len(digests))
    assert set_sha256(shuffled) == set_sha256(digests) != set_sha256(digests[1:])


# --- markers, locks, names

def test_a_marked_folder_is_known_and_others_are_not(tmp_path):
    assert not files.is_output_folder(tmp_path)
    files.mark_output_folder(tmp_path / "a" / "b")
    assert files.is_output_folder(tmp_path / "a" / "b") and not files.is_output_folder(tmp_path / "a")


def test_the_second_writer_is_refused_and_the_lock_ends_with_its_process(tmp_path):
    code = ("import os, signal, sys; from leukemia_nb.files import exclusive\n"
            "with exclusive(sys.argv[1]):\n if len(sys.argv) > 2: os.kill(os.getpid(), signal.SIGKILL)")
    run = lambda *more: subprocess.run([sys.executable, "-c", code, tmp_path / "x.csv", *more], capture_output=True, text=True)
    with files.exclusive(tmp_path / "x.csv"): assert "another leukemia_nb is writing it" in run().stderr
    assert run("die").returncode == -9 and run().returncode == 0


@settings(max_examples=60)
@given(st.lists(st.one_of(st.sampled_from(["a", "A", "a-2", "é", "e\u0301", "x" * 250, "X" * 250, "ß", "ss"]),
                          st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1)), max_size=15))
def test_output_names_are_unique_on_any_disk_and_fit(names):
    found = files.unique_names(names)
    assert len({name.casefold() for name in found}) == len(names)
    assert all(len(os.fsencode(name)) <= 200 for name in found)
