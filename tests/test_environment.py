"""The command line where it is not welcome: terminals, signals, homes, folders and installations of other people."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def start(*arguments, **more):
    """Start the program as a user does; both streams are pipes where nothing else is said."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | more.pop("env", {})
    command = [sys.executable, "-m", "leukemia_nb", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more)


def call(*arguments, **more):
    """Run the program to its end; gives (exit status, standard output, standard error)."""
    with start(*arguments, **more) as process:
        out, error = process.communicate(timeout=300)
    return process.returncode, *((text or b"").decode("utf-8", "backslashreplace") for text in (out, error))


@pytest.fixture(scope="module")
def smears(tmp_path_factory):
    folder = tmp_path_factory.mktemp("environment") / "smears"
    assert call("synth", folder, "--per-class", 2, "--height", 64, "--width", 64)[0] == 0
    return folder


@pytest.fixture()
def traps(tmp_path):
    """A folder with modules that tell when they are executed, under the names of what everybody imports."""
    for name in ("json", "numpy", "pandas", "typer", "socket", "joblib", "cv2", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'a').write({name!r})")
    return tmp_path


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_of_any_encoding_is_written_to(smears, tmp_path, encoding):
    folder = tmp_path / "Жar…"
    folder.mkdir()
    (folder / "ä.png").write_bytes(next((smears / "Normal").glob("*.png")).read_bytes())
    status, out, error = call("segment", folder, "--out", folder / "out…", env={"PYTHONIOENCODING": encoding})
    assert status == 0 and "segmented into" in out and "Traceback" not in error, error
    status, out, error = call("study", "--data", folder / "…", env={"PYTHONIOENCODING": encoding})
    assert status == 1 and "data is not there" in error and len(error.splitlines()) == 1


def test_closed_streams_and_full_disks_behind_them_are_no_crash(smears, tmp_path):
    program = f"{sys.executable} -m leukemia_nb"
    for line, status in (
        (f"{program} segment {smears} --out {tmp_path}/a >&- 2>&-", 0),
        (f"{program} --help | true", 0),
        (f"{program} segment {smears} --out {tmp_path}/a > /dev/full", 1),
    ):
        done = subprocess.run(line, shell=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert done.returncode == status and "Traceback" not in done.stderr and "Exception" not in done.stderr, (
            line,
            done.stderr,
        )
    assert "No space left on device" in done.stderr


def test_a_reader_who_leaves_ends_the_work_without_a_traceback(smears, tmp_path):
    from leukemia_nb.testing import dummy_model_file

    model = dummy_model_file(tmp_path / "m.onnx")
    with start("predict", smears, "--model", model, "--batch-size", 1) as process:
        process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read().decode()
    assert process.returncode != 0 and "Traceback" not in error and "BrokenPipe" not in error


@pytest.mark.parametrize("home", ["/proc/nowhere", "/dev/null", ""])
def test_a_home_that_cannot_be_written_is_not_needed(smears, tmp_path, home):
    status, out, error = call("segment", smears, "--out", tmp_path / "out", env={"HOME": home})
    assert status == 0 and "6" in out and "Traceback" not in error, error


def test_modules_in_the_current_folder_are_not_executed(smears, traps):
    for command in (
        ("synth", "drawn", "--per-class", 1, "--height", 64, "--width", 64),
        ("segment", smears, "--n-jobs", 2),
        ("--help",),
    ):
        status, _, error = call(*command, cwd=traps)
        assert status == 0, error
    assert not (traps / "executed").exists()


BLOCKER = """import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"tensorflow", "keras", "torch", "torchvision", "ultralytics", "papermill", "nbformat", "ipykernel",
                                      "dask", "distributed", "kagglehub", "sklearn", "seaborn", "jinja2", "markdown_it", "onnx", "tf2onnx"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def test_the_base_installation_says_what_a_study_needs(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    base = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    status, _, error = call("study", "--run", tmp_path / "run", env=base)
    assert status == 1 and "papermill" in error and "pip install 'leukemia_nb[train]'" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()
    status, _, error = call("study", "--help", env=base)
    assert status == 0


def test_a_broken_package_is_one_line(tmp_path):
    (tmp_path / "papermill.py").write_text("raise ImportError('libbroken.so: cannot open shared object file', name='papermill')")
    base = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    status, _, error = call("study", "--run", tmp_path / "run", "--models", "cells", env=base)
    assert status == 1 and "papermill" in error and "libbroken.so" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_says_so_and_how_to_go_on(tmp_path, number):
    with start("synth", tmp_path / "many", "--per-class", 2000) as process:
        while not list(tmp_path.rglob("*.png")) and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        error = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130 and "stopped" in error and "the same command" in error and "Traceback" not in error


def test_a_command_stopped_while_it_starts_says_so(tmp_path):
    """The first import of the command line is held until the program is stopped."""
    (tmp_path / "typer.py").write_text(f"import time\nopen({str(tmp_path / 'held')!r}, 'w').close()\ntime.sleep(100)")
    with start("--help", env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}) as process:
        while not (tmp_path / "held").exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130 and error.strip() == "leukemia_nb: stopped before anything was done."


@pytest.mark.parametrize("option", ["--data", "--new-images", "--groups", "--split-file"])
def test_an_empty_path_is_refused(option):
    status, _, error = call("study", option, "")
    assert status == 2 and option in error and "is empty" in error
