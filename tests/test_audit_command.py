"""`leukemia_nb audit` and the classifiers of any origin, as their users call them."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from typer.testing import CliRunner

from leukemia_nb.data.classes import FOUR_CLASSES, named_classes
from leukemia_nb.data.synthetic import write_smears
from leukemia_nb.errors import LeukemiaError
from leukemia_nb.inference.classifier import ModelSettings, open_classifier, read_model_settings
from leukemia_nb.inference.predictor import Predictor
from leukemia_nb.models.interface import ModelError
from leukemia_nb.study.audit import audit_settings, select_all_classes, _match_classes, run_audit
from leukemia_nb.study.cards import render
from leukemia_nb.study.command_line import app
from leukemia_nb.testing import dummy_classifier_file, dummy_model_file

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 20, 30, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("audit")
    write_smears(path / "images", 5, height=224, width=224)
    dummy_classifier_file(path / "colours.onnx")
    return path


def network(path: Path, shape: str = "n, 3, 8, 8", body: str = "", k: int = 2, last: str = "Identity(values)") -> Path:
    "Mean of each channel, the first k of them as outputs."
    axes = "2, 3" if shape.split(", ")[1] in ("1", "3") else "1, 2"
    weights = ", ".join(str(float(i == j)) for i in range(3) for j in range(k))
    text = f"""<ir_version: 8, opset_import: ["" : 18]>
    net (float[{shape}] images) => (float[{shape.split(", ")[0]}, {k}] outputs)
    <int64[2] axes = {{{axes}}}, float[3, {k}] weights = {{{weights}}}, float c = {{255}}> {{
        x = {body or "Identity(images)"}
        means = ReduceMean<keepdims=0>(x, axes)
        values = MatMul(means, weights)
        outputs = {last} }}"""
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def test_an_audit_writes_its_report_and_resumes(folder, tmp_path):
    words = ["audit", str(folder / "images"), "--model", str(folder / "colours.onnx"), "--model-setting", "range=0-1"]
    words += ["--out", str(tmp_path / "out"), "--images", "12"]
    first, again = (CliRunner().invoke(app, words) for _ in range(2))
    assert first.exit_code == again.exit_code == 0, first.output
    assert again.output.count("unchanged") == 4
    report = (tmp_path / "out/report.html").read_text()
    audit = json.loads((tmp_path / "out/audit.json").read_text())
    assert (
        audit["images"]["n_images"] == 12 and "Shortcut audit of colours" in report and "http://" not in report.split("<main>")[0]
    )
    rates = {(row["kind"], row["cue"]): row for row in audit["rates"]}
    assert rates["only_bg", "other_cue"]["proportion"] > 0.5  # it uses the colour of the whole image
    assert {row["name"] for row in audit["differences"]} >= {"bg_gap", "editing", "colour_gap", "scale_bar_gap"}
    for row in audit["rates"]:
        assert row["low"] <= row["proportion"] <= row["high"]
    assert "leukemia_nb" not in {path.name for path in (tmp_path / "out").rglob("*.partial.ipynb")}
    CliRunner().invoke(app, [*words, "--model-setting", "channel_order=RGB"])
    known = json.loads((tmp_path / "out/audit.json").read_text())["model"]  # the settings of the last call
    assert known["settings"]["channel_order"] == "RGB" and not any("channel_order" in note for note in known["notes"])
    for missing in ({"scale_bar_gap"}, {row["name"] for row in audit["differences"]}):  # no image has both kinds
        kept = [row for row in audit["differences"] if row["name"] not in missing]
        (tmp_path / "out/audit.json").write_text(json.dumps(audit | {"differences": kept}))
        assert "| Does the scale bar mislead it? | no image with a scale bar" in render("audit_summary.md.j2", tmp_path / "out")


def test_an_own_model_file_is_audited_as_the_predictor_predicts(folder, tmp_path):
    file = dummy_model_file(tmp_path / "own.onnx", size=64)
    images = np.stack([np.full((64, 64, 3), grey, np.uint8) for grey in (90, 200)])
    model = open_classifier(file)
    assert np.allclose(model.predict_proba(images), Predictor(file).predict_proba(images))
    assert audit_settings(folder / "images", file).notes == ()
    with pytest.raises(ModelError, match="prepares its images itself. Leave out --model-setting"):
        open_classifier(file, {"range": "0-1"})


def test_layouts_ranges_and_orders_give_the_same_pixels(tmp_path):
    first = open_classifier(network(tmp_path / "a.onnx"), {"range": "0-1", "output": "logits", "crop_mode": "squash"})
    last = open_classifier(network(tmp_path / "b.onnx", "n, 8, 8, 3"), {"range": "0-1", "output": "logits"})
    inside = open_classifier(network(tmp_path / "c.onnx", body="Div(images, c)"), {"output": "logits"})
    assert inside.settings.range == "0-255" and last.settings.layout == "NHWC"
    reverse = open_classifier(network(tmp_path / "d.onnx"), {"range": "0-1", "output": "logits", "channel_order": "BGR"})
    expected = first.predict_proba(IMAGES)
    for other in (last, inside):
        assert np.allclose(other.predict_proba(IMAGES), expected, atol=1e-5)
    assert np.allclose(reverse.predict_proba(IMAGES[..., ::-1]), expected, atol=1e-5)
    scaled = open_classifier(network(tmp_path / "e.onnx"), {"mean": "0.5,0.5,0.5", "std": "0.5,0.5,0.5", "output": "logits"})
    minus = open_classifier(network(tmp_path / "f.onnx"), {"range": "-1-1", "output": "logits"})
    assert np.allclose(scaled.predict_proba(IMAGES), minus.predict_proba(IMAGES), atol=1e-5)
    assert inside.assumptions[0] == "pixel range 0-255, concluded from its layers"
    assert scaled.assumptions[0] == "pixel range 0-1, by the mean that is given"  # its layers tell nothing


def test_a_fixed_batch_and_a_single_output(tmp_path):
    fixed = open_classifier(network(tmp_path / "a.onnx", "2, 3, 8, 8"), {"range": "0-1", "output": "logits"})
    free = open_classifier(network(tmp_path / "b.onnx"), {"range": "0-1", "output": "logits"})
    assert np.allclose(fixed.predict_proba(IMAGES), free.predict_proba(IMAGES), atol=1e-6)
    one = open_classifier(network(tmp_path / "c.onnx", k=1, last="Sigmoid(values)"), {"range": "0-1"})
    assert one.settings.output == "sigmoid" and one.predict_proba(IMAGES).shape == (5, 2)
    same = open_classifier(tmp_path / "c.onnx", {"range": "0-1", "output": "probabilities"})
    assert np.array_equal(one.predict_proba(IMAGES), same.predict_proba(IMAGES))
    with pytest.raises(ModelError, match="a probability, or a logit near 0.5.*output=sigmoid or output=logits"):
        open_classifier(network(tmp_path / "d.onnx", k=1), {"range": "0-1"})
    with pytest.raises(ModelError, match=r"d.onnx: gives outputs from .* no probabilities: output=logits\?"):
        open_classifier(tmp_path / "d.onnx", {"range": "0-255", "output": "probabilities"}).predict_proba(IMAGES)


def test_a_network_of_whole_numbers_takes_no_other_range(tmp_path):
    model = onnx.load(network(tmp_path / "a.onnx", "n, 8, 8, 3", "Cast<to=1>(images)"))
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
    onnx.save(model, tmp_path / "b.onnx")
    assert open_classifier(tmp_path / "b.onnx", {"output": "logits"}).settings.range == "0-255"
    for wrong in ({"range": "0-1"}, {"mean": 0.5}, {"std": 0.2}):
        with pytest.raises(ModelError, match="b.onnx: takes whole numbers from 0 to 255"):
            open_classifier(tmp_path / "b.onnx", {"output": "logits", **wrong})


def test_a_central_square_is_what_a_centre_crop_sees(tmp_path):
    model = open_classifier(network(tmp_path / "a.onnx"), {"range": "0-1", "output": "logits", "crop_mode": "center"})
    wide = IMAGES.copy()
    wide[:, :, :5] = wide[:, :, -5:] = 255
    assert np.allclose(model.predict_proba(wide), model.predict_proba(wide[:, :, 5:25]))
    assert open_classifier(tmp_path / "a.onnx", {"range": "0-1", "output": "logits", "crop_pct": 0.5}).image_size == 16


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ("n, 3, 8, 8", {}, "range=0-255"),
        ("n, 3, 8, 3", {"range": "0-1"}, "layout=NCHW"),
        ('n, 3, "h", "w"'.replace('"', ""), {"range": "0-1"}, "image_size=224"),
        ("n, 3, 8, 8", {"range": "0-1"}, "output=sigmoid"),
        ("n, 3, 8, 8", {"range": "0-1", "output": "logits", "classes": "a,b,c"}, "has 2 classes, and 3 class names"),
        ("n, 3, 8, 8", {"range": "0-1", "image_size": 9, "output": "logits"}, "takes images of 8x8 pixels"),
        ("n, 3, 8, 8", {"range": "0-3"}, "range is '0-3'"),
        ("n, 3, 8, 8", {"range": "0-1", "layout": "NHWC"}, "8 channels in NHWC"),
        ("n, 3, h, w", {"range": "0-1", "layout": "NHWC", "image_size": 8}, "a.onnx: does not take images as they are given"),
        ("n, 3, 8, 8", {"range": "0-1", "mean": "0.5,0.5"}, "mean is .*one number, or three"),
        ("n, 3, 8, 8", {"range": "0-1", "image_size": "224,224,3"}, "image_size is .*a side in pixels, or height and width"),
        ("n, 3, 8, 8", {"range": "0-1", "image_size": 0}, "image_size is"),
        ("n, 3, 8, 8", {"mean": "a"}, "mean is 'a'"),
        ("n, 3, 8, 8", {"crop_pct": 2}, "crop_pct is 2"),
    ],
)
def test_what_is_missing_or_wrong_is_named(tmp_path, shape, settings, message):
    with pytest.raises(ModelError, match=message):
        open_classifier(network(tmp_path / "a.onnx", shape), settings)


def test_a_network_of_grey_images_is_refused(tmp_path):
    grey = network(tmp_path / "a.onnx", "n, 1, 8, 8", "Concat<axis=1>(images, images, images)")
    with pytest.raises(ModelError, match="a.onnx: takes .*1 channels in NCHW, and images have R, G and B"):
        open_classifier(grey, {"range": "0-1", "output": "logits"})


def test_files_that_are_not_opened(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"pickle")
    (tmp_path / "a.pkl").write_bytes(b"pickle")
    for name, message in (("a.pt", "can execute code"), ("a.pkl", "ends in"), ("none.onnx", "no such file")):
        with pytest.raises(ModelError, match=message):
            open_classifier(tmp_path / name)
    (tmp_path / "a.toml").write_text("rnge = 1\n")
    with pytest.raises(ModelError, match="no setting 'rnge'"):
        read_model_settings(tmp_path / "a.onnx")


def test_a_toml_beside_the_model_and_what_overrides_it(tmp_path):
    (tmp_path / "a.toml").write_text('range = "0-1"\nclasses = ["Benign", "Pro"]\ncrop_pct = 0.875\n')
    settings = read_model_settings(tmp_path / "a.onnx", ["range=-1-1", "mean=1, 2, 3"])
    assert settings == ModelSettings(("Benign", "Pro"), range="-1-1", mean=(1.0, 2.0, 3.0), crop_pct=0.875)


def test_classes_of_model_and_folders(folder, tmp_path):
    images = tmp_path / "images"
    for name in ("Benign", "Pre"):
        shutil.copytree(folder / "images" / {"Benign": "Normal", "Pre": "Pre-B"}[name], images / name)
    model = open_classifier(folder / "colours.onnx", {"range": "0-1", "classes": ("Normal", "Early", "Pre")})
    outputs, known, notes = _match_classes(
        model, {"Normal": "Benign", "Pre-B": "Pre", "Pro-B": "Pro"}, named_classes(FOUR_CLASSES)
    )
    assert outputs == ("Normal", "Early Pre-B", "Pre-B") and known == ("Normal", "Pre-B")
    assert any("Pro are left out" in note for note in notes) and any("no images of Early" in note for note in notes)
    assert len(select_all_classes(images)[0].rows) == 10
    with pytest.raises(ModelError, match="has 3 classes and names none, and the folders are Benign, Pre"):
        audit_settings(images, folder / "colours.onnx", ModelSettings(range="0-1"))


def test_outputs_that_mean_one_class_are_added(tmp_path):
    names = {"classes": "Normal,Leukaemia,Leukaemia", "range": "0-1", "output": "logits"}
    merged = open_classifier(network(tmp_path / "a.onnx", k=3), names)
    each = open_classifier(tmp_path / "a.onnx", {"range": "0-1", "output": "logits"}).predict_proba(IMAGES)
    assert merged.classes_.tolist() == ["Normal", "Leukaemia"]
    assert np.allclose(merged.predict_proba(IMAGES), np.c_[each[:, 0], each[:, 1:].sum(axis=1)])
    outputs, known, _ = _match_classes(merged, {"Normal": "a", "Leukaemia": "b, c"}, named_classes(["Normal", "Leukaemia"]))
    assert outputs == ("Normal", "Leukaemia", "Leukaemia") and known == ("Normal", "Leukaemia")


def test_outputs_that_are_no_probabilities_at_all_are_refused(tmp_path):
    dark = open_classifier(network(tmp_path / "a.onnx", k=3, body="Sub(images, c)", last="Sigmoid(values)"), {"range": "0-1"})
    assert dark.settings.output == "sigmoid"
    with pytest.raises(ModelError, match="gives 0 for every class of an image. Check its settings"):
        dark.predict_proba(IMAGES)


def test_an_audit_refuses_a_folder_that_it_must_not_write(folder, tmp_path):
    settings = audit_settings(folder / "images", folder / "colours.onnx", ModelSettings(range="0-1"))
    (tmp_path / "study").mkdir()
    (tmp_path / "study/study.json").write_text("{}")
    for where, message in ((tmp_path / "study", "run folder of a study"), (folder / "images", "holds the images")):
        with pytest.raises(LeukemiaError, match=message):
            run_audit(settings, where)


def test_a_keras_file_is_opened_in_safe_mode(tmp_path):
    keras = pytest.importorskip("keras")
    layers = [keras.Input((8, 8, 3)), keras.layers.Rescaling(1 / 255), keras.layers.GlobalAveragePooling2D()]
    keras.Sequential([*layers, keras.layers.Dense(3, "softmax")]).save(tmp_path / "a.keras")
    model = open_classifier(tmp_path / "a.keras")
    assert (model.settings.range, model.settings.output, model.settings.layout) == ("0-255", "probabilities", "NHWC")
    keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Lambda(lambda x: x[:, 0, 0])]).save(tmp_path / "b.keras")
    with pytest.raises(ModelError, match="safe mode"):
        open_classifier(tmp_path / "b.keras")
