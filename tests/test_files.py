"""Whole files or none, tables, names."""

import csv
import errno
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from leukemia_nb.data import files
from leukemia_nb.data.manifest import search_images
from leukemia_nb.data.files import OutputError, atomic_path, check_output, read_table, set_sha256, escape_text, write_table
from leukemia_nb.data.images import write_image


def noise(seed: int, height: int = 30, width: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_readable_by_others(tmp_path):
    old = os.umask(0o022)
    try:
        with atomic_path(tmp_path / "x") as temporary:
            temporary.write_text("a")
    finally:
        os.umask(old)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


def test_error_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "x.csv").write_text("old")
    with pytest.raises(KeyError), atomic_path(tmp_path / "x.csv") as temporary:
        temporary.write_text("half")
        raise KeyError("stop")
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"] and (tmp_path / "x.csv").read_text() == "old"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_full_disk_for_real(tmp_path):
    with (
        pytest.raises(OutputError, match=r"x\.csv: cannot be written: No space left on device\. Free some space") as caught,
        atomic_path(tmp_path / "x.csv") as temporary,
    ):
        temporary.symlink_to("/dev/full")
        pd.DataFrame({"a": range(100_000)}).to_csv(temporary)
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_disk_fills_up_during_a_image(tmp_path, photo, monkeypatch):
    write_image(tmp_path / "x.png", photo)
    before = (tmp_path / "x.png").read_bytes()

    def fill(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(source))

    monkeypatch.setattr(files.os, "replace", fill)
    with pytest.raises(OutputError, match=r"x\.png: cannot be written: No space left"):
        write_image(tmp_path / "x.png", photo // 2)
    assert (tmp_path / "x.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_file_where_a_folder_should_be(tmp_path, photo):
    (tmp_path / "runs").touch()
    with pytest.raises(OutputError, match=r"runs/a/x\.png: cannot be written: .*choose another folder"):
        write_image(tmp_path / "runs" / "a" / "x.png", photo)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(tmp_path, photo):
    tmp_path.chmod(0o555)
    with pytest.raises(OutputError, match="Choose a folder you may write to"):
        write_image(tmp_path / "x.png", photo)


def test_unwritable_folder_as_the_system_says_it(tmp_path, photo, monkeypatch):
    def refuse(self, *arguments, **settings):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match=r"x\.png: cannot be written: Permission denied\. Choose a folder you may write to"):
        write_image(tmp_path / "new" / "x.png", photo)


def test_errors_about_other_files_pass_unchanged(tmp_path):
    with pytest.raises(PermissionError, match="elsewhere"), atomic_path(tmp_path / "x"):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere")


def test_killed_while_writing(tmp_path):
    code = (
        "import os, signal, sys; from leukemia_nb.data.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as t: t.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(files.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "Pre" / "x.png"], env=os.environ | {"PYTHONPATH": str(root)})
    assert done.returncode == -9 and not (tmp_path / "Pre" / "x.png").exists()
    assert list((tmp_path / "Pre").iterdir()) and not search_images(tmp_path).paths  # the leftover is no image


@given(st.binary(max_size=20).filter(lambda name: b"\0" not in name))
def test_shown_text_can_be_saved_and_other_text_is_as_it_was(name):
    found = escape_text(os.fsdecode(name))
    found.encode("utf-8", "strict")
    try:
        text = name.decode()
    except UnicodeDecodeError:
        assert "\\x" in found
    else:
        assert found == text if text.isprintable() else len(found) >= len(text)


@given(st.text())
def test_shown_text_breaks_no_terminal_table_or_page(text):
    found = escape_text(text)
    assert not [
        c
        for c in found
        if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(c) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    ]
    assert len(found.splitlines()) <= 1


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("a\rb", "a\\rb"),
        ("a\nb", "a\\nb"),
        ("\x9b31m", "\\x9b31m"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        ("\ud800", "\\ud800"),
        ("Größe 细胞", "Größe 细胞"),
    ],
)
def test_control_characters_are_escaped(name, wanted):
    assert escape_text(name) == wanted == str(OutputError(name))


def test_outputs_are_looked_at_without_leaving_anything(tmp_path):
    (tmp_path / "file").touch()
    for path, folder in [("new.csv", False), ("file", False), ("a/b/c", False), ("a/b", True), (".", True)]:
        check_output(tmp_path / path, folder)
    for path, folder, message in [
        (".", False, "choose another name"),
        ("file", True, "A file stands"),
        ("file/a.csv", False, "A file stands"),
    ]:
        with pytest.raises(OutputError, match=message):
            check_output(tmp_path / path, folder)
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
    code = (
        "import os, signal, sys; from leukemia_nb.data.files import file_lock\n"
        "with file_lock(sys.argv[1]):\n if len(sys.argv) > 2: os.kill(os.getpid(), signal.SIGKILL)"
    )

    def run(*more):
        return subprocess.run([sys.executable, "-c", code, tmp_path / "x.csv", *more], capture_output=True, text=True)

    with files.file_lock(tmp_path / "x.csv"):
        assert "another leukemia_nb is writing it" in run().stderr
    assert run("die").returncode == -9 and run().returncode == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(["a", "A", "a-2", "é", "e\u0301", "x" * 250, "X" * 250, "ß", "ss"]),
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1),
        ),
        max_size=15,
    )
)
def test_output_names_are_unique_on_any_disk_and_fit(names):
    found = files.unique_names(names)
    assert len({name.casefold() for name in found}) == len(names)
    assert all(len(os.fsencode(name)) <= 200 for name in found)


# --- full disks, limits, devices


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize(
    "write",
    [
        lambda file: np.zeros(1 << 18).tofile(file),
        lambda file: file.write_text("x"),
        lambda file: (_ for _ in ()).throw(RuntimeError("unexpected pos 64 vs 0")),
    ],
)
def test_a_full_disk_is_named_even_where_the_error_does_not(tmp_path, write):
    with (
        pytest.raises(OutputError, match=r"x\.npy: cannot be written: No space left on device\. Free some space") as caught,
        atomic_path(tmp_path / "x.npy") as temporary,
    ):
        temporary.symlink_to("/dev/full")
        write(temporary)
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (RuntimeError("x"), OSError("no number"), MemoryError()):
        with pytest.raises(type(error)) as caught, atomic_path(tmp_path / "x") as temporary:
            temporary.write_text("half")
            raise error
        assert caught.value is error and not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENXIO, errno.EROFS, errno.ESTALE])
def test_errors_of_the_last_flush_are_explained(tmp_path, monkeypatch, number):
    (tmp_path / "x.csv").write_text("old")

    def fail(file):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(
        OutputError, match=f"x.csv: cannot be written: {os.strerror(number)}.*choose another|Choose a folder"
    ) as caught:
        write_table(tmp_path / "x.csv", pd.DataFrame({"path": ["a"]}))
    assert caught.value.errno == number and (tmp_path / "x.csv").read_text() == "old" and os.listdir(tmp_path) == ["x.csv"]


def test_a_limit_of_the_account_for_real(tmp_path):
    code = (
        "import resource, sys, numpy as np; from leukemia_nb.data.files import OutputError, atomic_path\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n"
        "for write in (lambda t: t.write_bytes(bytes(1 << 20)), lambda t: np.zeros(1 << 17).tofile(t)):\n"
        "    try:\n"
        "        with atomic_path(sys.argv[1]) as temporary: write(temporary)\n"
        "    except OutputError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "x.bin"], capture_output=True, text=True)
    assert done.stdout.count("x.bin: cannot be written: File too large. ") == 2 and not list(tmp_path.iterdir()), done.stderr


def test_what_is_written_reaches_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(files.os, "fsync", lambda file: done.append(os.readlink(f"/proc/self/fd/{file}")))
    replace = os.replace
    monkeypatch.setattr(files.os, "replace", lambda *names: (done.append("replace"), replace(*names)))
    write_table(tmp_path / "x.csv", pd.DataFrame({"path": ["a"]}))
    assert len(done) == 2 and Path(done[0]).name.startswith(".part-") and done[1] == "replace"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_file_written_in_place_names_the_full_disk_as_well(tmp_path):
    (tmp_path / "rows").symlink_to("/dev/full")
    with (
        pytest.raises(OutputError, match="rows: cannot be written: No space left.*The rows so far are kept"),
        files.report_write_errors(tmp_path / "rows", left="The rows so far are kept."),
        open(tmp_path / "rows", "a") as file,
    ):
        file.write("row\n")
    assert os.listdir(tmp_path) == ["rows"]


def test_devices_and_too_long_names_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for refuse in (check_output, lambda path: write_table(path, pd.DataFrame({"a": [1]}))):
        with pytest.raises(OutputError, match="pipe: is a device, pipe or socket"):
            refuse(tmp_path / "pipe")
        with pytest.raises(OutputError, match="Choose a shorter name"):
            refuse(tmp_path / ("x" * 256))
    assert os.listdir(tmp_path) == ["pipe"]


# --- tables

NAMES = [
    "a\rb",
    "a\nb",
    "a\r\nb",
    "=1+1",
    "+1",
    "-1",
    "@x",
    "\t=1",
    "\r",
    "\n",
    "'=1",
    "''@",
    "'",
    "'x",
    "a;=1",
    "a,b",
    'a"b',
    "NA",
    "nan",
    " x ",
    "007",
    "1e5",
    "True",
    "\ufeffx",
    "\x1b[31m",
    "細胞",
    "-",
    "＝1",
    "",
]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(NAMES),
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
            st.text("'=+-@\t\r\n;,\" a", max_size=6),
        ),
        min_size=1,
        max_size=6,
    ),
    st.booleans(),
)
def test_tables_give_back_every_name_and_hold_no_formula(tmp_path_factory, names, excel):
    path = tmp_path_factory.getbasetemp() / "names.csv"
    table = pd.DataFrame({"path": names, "width": range(len(names)), "problem": names[::-1]})
    write_table(path, table, excel=excel)
    found = read_table(path)
    assert (
        found["path"].tolist() == names
        and found["problem"].tolist() == names[::-1]
        and found["width"].tolist() == list(range(len(names)))
    )
    assert not [
        cell
        for cell in pd.read_csv(path, dtype=str, keep_default_na=False)["path"]
        if cell[:1] and cell[0] in "=+-@\t\r\n＝＋－＠"
    ]
    with open(path, encoding="utf-8-sig", newline="") as file:
        assert len(list(csv.reader(file))) == len(names) + 1
    assert path.read_bytes().startswith(b"\xef\xbb\xbf") == excel


def test_rows_written_with_csv_hold_no_formula_either():
    assert [files.restore_cell(files._safe_cell(name)) for name in NAMES] == NAMES
    assert (
        files._safe_cell("=cmd|'/c calc'!A1") == "'=cmd|'/c calc'!A1"
        and files._safe_cell(-1.5) == -1.5
        and files._safe_cell(None) is None
    )
    assert files._safe_cell("x;=cmd.png") == "x;'=cmd.png"  # where Excel splits at semicolons


def test_a_damaged_table_is_one_line_and_short_memory_is_no_damage(tmp_path, monkeypatch):
    for content in (b"", b'"a,b\n1', b"\xff\xfe\x00", b"a,b\n1,2\n1,2,3\n"):
        (tmp_path / "t.csv").write_bytes(content)
        with pytest.raises(files.TableError, match=r"t\.csv: not a table, or damaged") as caught:
            read_table(tmp_path / "t.csv")
        assert "\n" not in str(caught.value)
    for error in (MemoryError(), pd.errors.ParserError("Error tokenizing data. C error: out of memory")):

        def short(*given, error=error, **named):
            raise error

        monkeypatch.setattr(pd, "read_csv", short)
        with pytest.raises(MemoryError):
            read_table(tmp_path / "t.csv")


@given(
    st.recursive(
        st.none() | st.integers() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    )
)
def test_json_comes_back_as_it_was_with_names_in_bytes(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "x.json"
    files.write_json(path, {"content": content, "path": os.fsdecode(b"caf\xe9.png")})
    assert files.read_json(path) == {"content": content, "path": os.fsdecode(b"caf\xe9.png")}


# --- the lock


def test_a_lock_makes_the_folders_it_needs_and_is_no_data(tmp_path):
    with files.file_lock(tmp_path / "new" / "x.png"):
        (tmp_path / "new" / "x.png").write_bytes(b"1")
    assert [path.name for path in search_images(tmp_path).paths] == ["x.png"]
    assert all(name.startswith(".") for name in os.listdir(tmp_path / "new") if name != "x.png")


def unprivileged(code: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run Python as a user whom permissions bind, also where the tests are root's."""
    exclude = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    if exclude and not shutil.which("setpriv"):
        pytest.skip("root may read anything, and there is no setpriv")
    return subprocess.run(
        [*exclude, sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def test_a_lock_in_a_folder_that_may_not_be_written(tmp_path):
    (tmp_path / "closed" / "open").mkdir(parents=True)
    (tmp_path / "closed").chmod(0o555)
    code = "import sys; from leukemia_nb.data.files import file_lock\nwith file_lock(sys.argv[1]): print('mine')"
    try:
        refused = unprivileged(code, tmp_path / "closed" / "x.csv")
        inside = unprivileged(code, tmp_path / "closed" / "open")  # as a mounted folder is
    finally:
        (tmp_path / "closed").chmod(0o755)
    assert refused.stderr.splitlines()[-1].endswith("Choose a folder you may write to.") and "x.csv: cannot be" in refused.stderr
    assert inside.stdout == "mine\n", inside.stderr


def test_tables_in_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o555)
    code = (
        "import sys; from leukemia_nb.data.files import OutputError, atomic_path\n"
        "try:\n with atomic_path(sys.argv[1]) as t: t.write_text('x')\nexcept OutputError as error: print(error)"
    )
    try:
        done = unprivileged(code, tmp_path / "x.csv")
    finally:
        tmp_path.chmod(0o755)
    assert "x.csv: cannot be written: Permission denied. Choose a folder you may write to" in done.stdout, done.stderr


def test_a_table_is_written_in_blocks_and_in_parts_as_it_is_whole(tmp_path, monkeypatch):
    table = pd.DataFrame({"pair": [f"=a{i}\n" for i in range(7)], "x": np.arange(7) / 3, "n": [1, 2, None, 4, 5, 6, 7]})
    write_table(tmp_path / "whole.csv", table, excel=True)
    monkeypatch.setattr(files, "_ROWS_AT_ONCE", 3)
    write_table(tmp_path / "blocks.csv", table, excel=True)
    write_table(tmp_path / "parts.csv", (table[at : at + 2] for at in range(0, 7, 2)), excel=True)
    whole = (tmp_path / "whole.csv").read_bytes()
    assert whole == (tmp_path / "blocks.csv").read_bytes() == (tmp_path / "parts.csv").read_bytes()
    pd.testing.assert_frame_equal(read_table(tmp_path / "blocks.csv"), table)


def test_a_part_that_fails_leaves_no_table(tmp_path):
    def parts():
        yield pd.DataFrame({"x": [1]})
        raise KeyError("stop")

    with pytest.raises(KeyError):
        write_table(tmp_path / "x.csv", parts())
    assert not list(tmp_path.iterdir())


def test_many_equal_names_are_numbered_in_turn():
    assert files.unique_names(["a", "A", "a-2", "a", "A", "a"]) == ["a", "A-2", "a-2-2", "a-3", "A-4", "a-5"]
    long = files.unique_names(["x" * 300] * 3000)
    assert len(set(long)) == 3000 and max(map(len, long)) <= 200
