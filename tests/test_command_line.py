"""The command line as a user calls it."""

import json
import os
import subprocess
import sys

import pandas as pd
import pytest
from typer.testing import CliRunner

from leukemia_nb.study.command_line import _explanation, app
from leukemia_nb.testing import dummy_model_file


def call(*arguments):
    """Run the program on a terminal that takes nothing but UTF-8; gives (exit status, standard output, standard error)."""
    done = subprocess.run(
        [sys.executable, "-m", "leukemia_nb", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def smears(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "smears"
    assert call("synth", folder, "--per-class", 4, "--height", 192, "--width", 256)[0] == 0
    return folder


@pytest.mark.parametrize("command", ["study", "predict", "compare", "segment", "prepare", "synth"])
def test_every_command_explains_itself(command):
    status, out, _ = call(command, "--help")
    assert status == 0 and "Usage" in out and len(out) > 400


def test_synth_is_seeded(smears, tmp_path):
    call("synth", tmp_path / "again", "--per-class", 4, "--height", 192, "--width", 256)
    files = sorted(p.relative_to(smears) for p in smears.rglob("*.png"))
    assert len(files) >= 12
    assert all((smears / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)


def test_predict_takes_files_folders_and_patterns(smears, tmp_path):
    model = dummy_model_file(tmp_path / "m.onnx")
    bad = tmp_path / "broken.jpg"
    bad.write_bytes(b"\xff\xd8\xff")
    status, out, error = call("predict", smears / "Normal", f"{smears}/Pre-B/*_00[12].png", bad, "--model", model)
    assert status == 1 and len(out.splitlines()) == 7 and f"not predicted: {bad}" in out
    assert "white blood cell" in out and "1 not read" in error
    assert "not calibrated: a dummy model" in error and "Research use only" in error


def test_predict_says_that_a_folder_has_no_images(tmp_path):
    model = dummy_model_file(tmp_path / "m.onnx")
    (tmp_path / "EMPTY").mkdir()
    status, out, error = call("predict", tmp_path / "EMPTY", "--model", model)
    assert status == 1 and "EMPTY: cannot be opened: it is a folder" in out and "EMPTY: 0 images found" in error


def test_predict_writes_tables_and_overlays(smears, tmp_path):
    model = dummy_model_file(tmp_path / "m.onnx", kind="pair")
    status, out, error = call(
        "predict",
        smears / "Pre-B",
        "--model",
        model,
        "--out",
        tmp_path / "a.csv",
        "--json",
        tmp_path / "a.json",
        "--overlays",
        tmp_path / "seen",
        "--saliency",
    )
    assert status == 0, error
    table, rows = pd.read_csv(tmp_path / "a.csv"), json.loads((tmp_path / "a.json").read_text())
    assert len(table) == len(rows) == 4 and set(table["model"]) == {"dummy_pair"}
    assert len(list((tmp_path / "seen").glob("*-cells.jpg"))) == 4 == len(list((tmp_path / "seen").glob("*-saliency.jpg")))


@pytest.fixture
def bytes_folder(smears, tmp_path):
    """An image whose name is no UTF-8, in a folder of its class."""
    folder = tmp_path / "in" / "Pre-B"
    folder.mkdir(parents=True)
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(next((smears / "Pre-B").glob("*.png")).read_bytes())
    return tmp_path / "in"


def test_names_that_are_no_utf8_are_segmented_and_prepared(bytes_folder, smears, tmp_path):
    out = tmp_path / os.fsdecode(b"out\xe9")
    status, said, error = call("segment", bytes_folder, "--out", out)
    assert status == 0 and "1 image segmented into" in said and "out\\xe9; " in said, error
    assert pd.read_csv(out / "qc.csv")["path"].tolist() == ["Pre-B/caf\\xe9.png"]
    assert len(list((out / "masks").rglob("*.png"))) == 1
    for label in ("Normal", "Pro-B"):
        (bytes_folder / label).mkdir()
        (bytes_folder / label / "a.png").write_bytes(next((smears / label).glob("*.png")).read_bytes())
    (bytes_folder / "Pro-B" / os.fsdecode(b"n\xef.jpg")).write_bytes(b"")
    for _ in range(2):  # the second time all pairs are finished
        status, said, error = call("prepare", bytes_folder, "--out", tmp_path / "pairs", "--size", 64)
        assert status == 0 and "1 image with problems" in said, error
    table = pd.read_csv(tmp_path / "pairs/pairs.csv", keep_default_na=False).set_index("pair")
    assert (
        table.loc["Pre-B/caf\\xe9", "problem"] == "" and "n\\xef.jpg: the file is empty" in table.loc["Pro-B/n\\xef", "problem"]
    )
    assert (tmp_path / "pairs/prepared" / table.loc["Pre-B/caf\\xe9", "original"]).is_file()


def test_help_waits_for_nothing():
    code = (
        "import sys\nfrom leukemia_nb.study.command_line import app\ntry: app(['--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('numpy', 'cv2', 'pandas', 'onnxruntime', 'joblib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "a.png", "--model", "EMPTY/none.onnx"], "no such file"),
        (["predict", "a.png", "--model", "EMPTY"], "a folder, where a model file is needed"),
        (["predict", "a.png", "--model", __file__], "not a model file"),
        (["predict", "a.png", "--model", __file__, "--saliency"], "--overlays FOLDER"),
        (["compare", "a.png", "--run", "EMPTY"], "no exported models"),
        (["compare", "a.png", "--run", "EMPTY/none"], "there is no such folder"),
        (["segment", "EMPTY"], "no images in it"),
        (["segment", "EMPTY", "--segmentation", "foo"], "The methods are kmeans, nucleus"),
        (["prepare", "EMPTY", "--segmentation", "foo"], "The methods are kmeans, nucleus"),
        (["study", "--segmentation", "foo"], "The methods are kmeans, nucleus"),
        (["synth", "EMPTY", "--seed", "-1"], "Invalid value for '--seed'"),
        (["study", "--seed", "-1"], "Invalid value for '--seed'"),
        (["prepare", "EMPTY"], "EMPTY"),
        (["study", "--data", "/no/such/folder"], "/no/such/folder"),
        (["study", "--models", "resnet"], "unknown model resnet"),
        (["study", "--model-setting", "yolov8"], "model:setting=value"),
    ],
)
def test_errors_are_one_clear_line(tmp_path, arguments, message):
    (tmp_path / "EMPTY").mkdir()
    done = CliRunner().invoke(app, [str(tmp_path / part) if part.startswith("EMPTY") else part for part in arguments])
    explained = _explanation(done.exception)
    assert done.exit_code != 0 and message in (explained or done.output) and len(explained.splitlines()) < 2, done.exception


def test_an_error_of_the_program_itself_is_not_explained():
    assert _explanation(ValueError("x")) == _explanation(ImportError("x", name="leukemia_nb.data")) == ""


def test_a_ctrl_c_that_python_ignores_is_repeated():
    """An exception in `__del__` is only printed by Python; the command would go on for as long as it has work."""
    code = (
        "import time\nfrom leukemia_nb.study.command_line import _prepare_process\n_prepare_process()\n"
        "class Late:\n    def __del__(self):\n        raise KeyboardInterrupt\n"
        "late = Late()\ndel late\ntime.sleep(20)\nprint('went on')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "KeyboardInterrupt" in done.stderr and "went on" not in done.stdout


@pytest.mark.parametrize("command", [["synth", "out"], ["prepare", "."], ["study"]])
def test_a_list_of_classes_without_a_name_is_refused(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in ("", " , "):
        result = CliRunner().invoke(app, [*command, "--classes", given])
        assert result.exit_code == 2 and "it has no name. Give some" in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())
