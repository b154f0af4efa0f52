"""The command line as a user calls it."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from leukemia_nb.data.images import read_image
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
    mask = read_image(tmp_path / "out" / "masks" / "gut.png")
    assert set(np.unique(mask)) == {0, 255} and mask.shape == read_image(source).shape
    assert (tmp_path / "out" / "overlays" / "gut.png").is_file()


def test_prepare_writes_pairs(smears, tmp_path):
    status, out, error = call("prepare", smears, "--out", tmp_path / "out", "--size", 64)
    assert status == 0, error
    assert (
        len(list((tmp_path / "out" / "prepared").rglob("ori_*.png")))
        == 12
        == len(list((tmp_path / "out" / "prepared").rglob("mask_*.png")))
    )


def test_predict_takes_files_folders_and_patterns(smears, tmp_path):
    model = dummy_model_file(tmp_path / "m.onnx")
    bad = tmp_path / "broken.jpg"
    bad.write_bytes(b"\xff\xd8\xff")
    status, out, error = call("predict", smears / "Normal", f"{smears}/Pre-B/*_00[12].png", bad, "--model", model)
    assert status == 1 and len(out.splitlines()) == 7 and f"not predicted: {bad}" in out
    assert "1 not read" in error and "Research use only" in error


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


def test_compare_writes_a_table_and_an_image_grid(smears, tmp_path):
    for kind in ("image", "pair"):
        dummy_model_file(tmp_path / f"run/exported/{kind}.onnx", kind)
    status, out, error = call("compare", smears / "Pro-B", "--study", tmp_path / "run", "--out", tmp_path / "out")
    assert status == 0 and len(out.splitlines()) == 5, error
    table = pd.read_csv(tmp_path / "out" / "comparison.csv", keep_default_na=False)
    assert set(table["true label"]) == {"Pro-B"} and {"Dummy (image)", "Dummy (pair) confidence", "Dummy (pair) abstains"} <= set(
        table
    )
    assert read_image(tmp_path / "out" / "comparison.png").shape[1] > 700


@pytest.fixture
def bytes_folder(smears, tmp_path):
    """An image whose name is no UTF-8, in a folder of its class."""
    folder = tmp_path / "in" / "Pre-B"
    folder.mkdir(parents=True)
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(next((smears / "Pre-B").glob("*.png")).read_bytes())
    return tmp_path / "in"


def test_names_that_are_no_utf8_are_predicted_and_escaped(bytes_folder, tmp_path):
    model = dummy_model_file(tmp_path / "run/exported/m.onnx")
    name = f"{bytes_folder}/Pre-B/caf\\xe9.png"
    status, out, error = call("predict", bytes_folder, "--model", model)
    assert status == 0 and name in out, error
    status, out, error = call(
        "predict",
        bytes_folder,
        "--model",
        model,
        "--out",
        tmp_path / "a.csv",
        "--json",
        tmp_path / "a.json",
        "--overlays",
        tmp_path / "ov",
    )
    assert status == 0 and len(list((tmp_path / "ov").glob("*.jpg"))) == 1, error
    assert pd.read_csv(tmp_path / "a.csv")["path"].tolist() == [name]
    assert [row["path"] for row in json.loads((tmp_path / "a.json").read_text())] == [
        os.fsdecode(b"%s/Pre-B/caf\xe9.png" % bytes(bytes_folder))
    ]
    status, out, error = call("compare", bytes_folder, "--study", tmp_path / "run", "--out", tmp_path / "compared")
    assert status == 0 and "caf\\xe9.png" in out, error
    assert pd.read_csv(tmp_path / "compared/comparison.csv")["path"].tolist() == [name]
    (bytes_folder / "Pre-B" / os.fsdecode(b"n\xef.jpg")).write_bytes(b"")
    status, out, error = call("predict", bytes_folder, "--model", model)
    assert status == 1 and "Pre-B/n\\xef.jpg: the file is empty" in out, error
    status, out, error = call("compare", bytes_folder, "--study", tmp_path / "run", "--out", tmp_path / "compared")
    assert status == 1 and "Pre-B/n\\xef.jpg: the file is empty" in error and "Traceback" not in error


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


def test_what_a_command_wrote_is_not_read_again(smears, tmp_path, monkeypatch):
    dummy_model_file(tmp_path / "run/exported/m.onnx")
    for label in ("Normal", "Pre-B", "Pro-B"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "a.png").write_bytes(next((smears / label).glob("*.png")).read_bytes())
    monkeypatch.chdir(tmp_path)
    for command, number in [
        (("segment", ".", "--out", "seg"), "3 images segmented"),
        (("prepare", ".", "--out", "prep"), "3 pairs in"),
        (("compare", ".", "--study", "run", "--out", "new"), "Pro-B/a.png   Pro-B"),
    ]:
        found = [call(*command)[1] for _ in range(2)]
        assert number in found[0] and found[0] == found[1]
        for folder in ("seg", "prep", "new"):
            shutil.rmtree(folder, ignore_errors=True)


def test_predict_looks_at_its_outputs_first(smears, tmp_path):
    model = dummy_model_file(tmp_path / "m.onnx")
    image = next((smears / "Normal").glob("*.png"))
    before = image.read_bytes(), model.read_bytes()
    for option, file, message in [
        ("--out", image, "must end in .csv"),
        ("--json", model, "must end in .json"),
        ("--out", smears, "must end in .csv"),
        ("--overlays", model, "A file stands"),
    ]:
        status, out, error = call("predict", image, "--model", model, option, file)
        assert status == 1 and message in error and out == "" and "Traceback" not in error
    assert before == (image.read_bytes(), model.read_bytes()) and os.listdir(tmp_path) == ["m.onnx"]


def test_compare_goes_on_without_a_torn_model(smears, tmp_path):
    dummy_model_file(tmp_path / "run/exported/a.onnx")
    (tmp_path / "run/exported/b.onnx").write_bytes(b"half a file")
    status, out, error = call("compare", smears / "Pro-B", "--study", tmp_path / "run", "--out", tmp_path / "out")
    assert status == 1 and len(out.splitlines()) == 5 and "b.onnx: not a model file" in error
    status, out, error = call("compare", "nowhere.png", "--study", tmp_path / "run", "--out", tmp_path / "out")
    assert status == 1 and "nowhere.png: there is no such file" in error and "No image can be read" in error


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
        (["compare", "a.png", "--study", "EMPTY"], "no exported models"),
        (["compare", "a.png", "--study", "EMPTY/none"], "there is no such folder"),
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
    status, _, error = call(*[str(tmp_path / a) if a.startswith("EMPTY") else a for a in arguments])
    assert status != 0 and message in error and "Traceback" not in error
