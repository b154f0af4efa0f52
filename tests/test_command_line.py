"""The command line as a user calls it."""
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from leukemia_nb.data import read_picture
from leukemia_nb.predictor import made_up_model_file


def call(*arguments, module=True):
    """Run the program; gives (exit status, standard output, standard error)."""
    done = subprocess.run([sys.executable, "-m", "leukemia_nb", *map(str, arguments)], capture_output=True, text=True, timeout=300)
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


def test_segment_writes_masks_overlays_and_a_table(smears, tmp_path):
    (tmp_path / "in").mkdir()
    source = next((smears / "Normal").glob("*.png"))
    (tmp_path / "in" / "gut.png").write_bytes(source.read_bytes())
    (tmp_path / "in" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    status, out, _ = call("segment", tmp_path / "in", "--out", tmp_path / "out")
    assert status == 1 and "1 unreadable" in out
    table = pd.read_csv(tmp_path / "out" / "qc.csv", keep_default_na=False)
    assert set(table.path) == {"gut.png", "broken.jpg"}
    assert table.set_index("path").problem["broken.jpg"] != ""
    mask = read_picture(tmp_path / "out" / "masks" / "gut.png")
    assert set(np.unique(mask)) == {0, 255} and mask.shape == read_picture(source).shape
    assert (tmp_path / "out" / "overlays" / "gut.png").is_file()


def test_prepare_writes_pairs(smears, tmp_path):
    status, out, error = call("prepare", smears, "--out", tmp_path / "out", "--size", 64)
    assert status == 0, error
    assert len(list((tmp_path / "out" / "pairs").rglob("ori_*.png"))) == 12 == len(list((tmp_path / "out" / "pairs").rglob("mask_*.png")))


def test_predict_answers_files_folders_and_patterns(smears, tmp_path):
    model = made_up_model_file(tmp_path / "m.onnx")
    bad = tmp_path / "broken.jpg"
    bad.write_bytes(b"\xff\xd8\xff")
    status, out, error = call("predict", smears / "Normal", f"{smears}/Pre-B/*_00[12].png", bad, "--model", model)
    assert status == 1 and len(out.splitlines()) == 7 and f"not answered: {bad}" in out
    assert "1 not read" in error and "Research use only" in error


def test_predict_writes_tables_and_overlays(smears, tmp_path):
    model = made_up_model_file(tmp_path / "m.onnx", kind="pair")
    status, out, error = call("predict", smears / "Pre-B", "--model", model, "--out", tmp_path / "a.csv", "--json", tmp_path / "a.json",
                              "--overlays", tmp_path / "seen", "--saliency")
    assert status == 0, error
    table, rows = pd.read_csv(tmp_path / "a.csv"), json.loads((tmp_path / "a.json").read_text())
    assert len(table) == len(rows) == 4 and set(table["model"]) == {"made_up_pair"}
    assert len(list((tmp_path / "seen").glob("*-cells.jpg"))) == 4 == len(list((tmp_path / "seen").glob("*-saliency.jpg")))


def test_compare_writes_a_table_and_a_picture_grid(smears, tmp_path):
    for kind in ("picture", "pair"): made_up_model_file(tmp_path / f"run/exported/{kind}.onnx", kind)
    status, out, error = call("compare", smears / "Pro-B", "--study", tmp_path / "run", "--out", tmp_path / "out")
    assert status == 0 and len(out.splitlines()) == 5, error
    table = pd.read_csv(tmp_path / "out" / "comparison.csv", keep_default_na=False)
    assert set(table["true label"]) == {"Pro-B"} and {"made_up_picture", "made_up_pair confidence", "made_up_pair doubt"} <= set(table)
    assert read_picture(tmp_path / "out" / "comparison.png").shape[1] > 700


def test_help_waits_for_nothing():
    code = ("import sys\nfrom leukemia_nb.command_line import app\ntry: app(['--help'])\nexcept SystemExit: pass\n"
            "print([name for name in ('numpy', 'cv2', 'pandas', 'onnxruntime', 'joblib') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(("arguments", "message"), [
    (["predict", "a.png", "--model", "EMPTY/none.onnx"], "No such file"),
    (["predict", "a.png", "--model", "EMPTY"], "Is a directory"),
    (["predict", "a.png", "--model", __file__], "not a model file"),
    (["predict", "a.png", "--model", __file__, "--saliency"], "--overlays FOLDER"),
    (["compare", "a.png", "--study", "EMPTY"], "no exported models"),
    (["prepare", "EMPTY"], "EMPTY"),
    (["study", "--data", "/no/such/folder"], "/no/such/folder"),
    (["study", "--models", "resnet"], "unknown model resnet"),
    (["study", "--train", "yolov8"], "model:setting=value"),
])
def test_errors_are_one_clear_line(tmp_path, arguments, message):
    (tmp_path / "EMPTY").mkdir()
    status, _, error = call(*[str(tmp_path / a) if a.startswith("EMPTY") else a for a in arguments])
    assert status != 0 and message in error and "Traceback" not in error
