"""Model files and the predictor: what is refused, rows, abstaining, the display."""

import base64
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leukemia_nb.data.files import file_sha256
from leukemia_nb.data.images import ImageError, read_image, resize_square, write_image
from leukemia_nb.data.synthetic import write_smears
from leukemia_nb.inference.model_file import _FORMAT, _add_checksum, _check_checksum, open_model_file
from leukemia_nb.inference.ood import _fit_mahalanobis, fit_ood, image_statistics, _mahalanobis_distance, ood_distance
from leukemia_nb.inference.predictor import (
    Predictor,
    _abstain_reasons,
    data_uri,
    describe_calibration,
    find_image_cells,
    format_confidence,
    format_row,
    overlay,
    _prediction_columns,
    saliency,
)
from leukemia_nb.models.interface import ModelError
from leukemia_nb.processing.segmentation import apply_mask, check_mask, draw_outlines, segment
from leukemia_nb.testing import dummy_model_file

CLASSES = ["Normal", "Pre-B", "Pro-B"]
KINDS = ("image", "pair", "cells")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predictor")
    for kind in KINDS:
        dummy_model_file(folder / f"{kind}.onnx", kind)
    write_smears(folder / "smears", 2, height=192, width=256)
    return folder


@pytest.fixture(scope="module")
def file(place):
    return place / "image.onnx"


@pytest.fixture(scope="module")
def model(file):
    return Predictor(file)


@pytest.fixture(scope="module")
def paths(place):
    return sorted(map(str, (place / "smears").glob("*/*.png")))


# Model files


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 10_000), st.integers(1, 255))
def test_any_changed_byte_breaks_the_checksum(body, where, change):
    data = bytearray(_add_checksum(body + b"0" * 64))
    assert _check_checksum(bytes(data)) == hashlib.sha256(data).hexdigest()
    data[where % len(data)] ^= change
    with pytest.raises(ModelError, match="damaged|cut off"):
        _check_checksum(bytes(data))


def test_the_checksum_is_metadata_that_others_can_read(file):
    import onnx

    network = onnx.load(file)
    onnx.checker.check_model(network)
    entries = {entry.key: entry.value for entry in network.metadata_props}
    assert entries["sha256"] == hashlib.sha256(file.read_bytes()[:-64]).hexdigest()
    assert file_sha256(file) == _check_checksum(file.read_bytes()) == open_model_file(file)[1]["sha256"]
    assert json.loads(entries["leukemia_nb"])["classes"] == CLASSES


def test_a_network_has_as_many_threads_as_the_environment_says(file, monkeypatch):
    for variable, threads, expected in (("1", None, 1), ("1", 2, 2), ("", None, 0)):
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
        assert open_model_file(file, threads)[0].get_session_options().intra_op_num_threads == expected


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "cut off"),
        (lambda data: data[: len(data) // 2], "cut off"),
        (lambda data: b"", "cut off"),
        (lambda data: data.replace(b"Softmax", b"Hardmax"), "damaged"),
        (lambda data: b"\xff\xd8\xff" * 100, "not a model file"),
        (lambda data: _add_checksum(b"not a protobuf" + b"0" * 64), "cannot be started"),
    ],
)
def test_a_damaged_model_file_is_one_line(file, tmp_path, damage, message):
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ModelError, match=message) as error:
        Predictor(bad)
    assert str(bad) in str(error.value) and "\n" not in str(error.value)


def rewritten(file, out, change=None, text=None, edit=None):
    """A copy of a model file with another description, or another graph, and a checksum that fits."""
    import onnx

    network = onnx.load_model_from_string(file.read_bytes())
    (entry,) = (each for each in network.metadata_props if each.key == "leukemia_nb")
    entry.value = json.dumps(change(json.loads(entry.value))) if change else entry.value if text is None else text
    if edit:
        edit(network)
        network.metadata_props.append(onnx.StringStringEntryProto(key="sha256", value="0" * 64))
    out.write_bytes(_add_checksum(network.SerializeToString()))
    return out


MALFORMED = {
    "older": (lambda info: info | {"format": _FORMAT - 1}, rf"older leukemia_nb .format {_FORMAT - 1}; this one reads {_FORMAT}"),
    "newer": (lambda info: info | {"format": _FORMAT + 1}, rf"newer leukemia_nb .format {_FORMAT + 1}.*Update"),
    "no format": (lambda info: {name: info[name] for name in info if name != "format"}, "older"),
    "a list": (lambda info: [info], "older"),
    "no classes": (lambda info: {name: info[name] for name in info if name != "classes"}, "no valid entry 'classes'"),
    "size as text": (lambda info: info | {"image_size": "224"}, "no valid entry 'image_size'"),
    "unknown input": (lambda info: info | {"input": "slide"}, "no valid entry 'input'"),
    "half the thresholds": (lambda info: info | {"thresholds": {"confidence": 0.5}}, "no valid entry 'thresholds'"),
    "two classes": (lambda info: info | {"classes": CLASSES[:2]}, "not probabilities of 2 classes and features"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_description_is_one_line(case, file, tmp_path):
    change, message = MALFORMED[case]
    bad = rewritten(file, tmp_path / "odd.onnx", change)
    with pytest.raises(ModelError, match=f"odd.onnx: .*{message}") as error:
        Predictor(bad)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 400


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\0"])
def test_a_description_that_is_no_json_is_one_line(text, file, tmp_path):
    with pytest.raises(ModelError, match="odd.onnx: has no description") as error:
        Predictor(rewritten(file, tmp_path / "odd.onnx", text=text))
    assert len(str(error.value).splitlines()) == 1


def test_a_network_without_description_or_with_weights_elsewhere_is_one_line(file, tmp_path):
    bad = rewritten(file, tmp_path / "odd.onnx", edit=lambda network: network.ClearField("metadata_props"))
    with pytest.raises(ModelError, match="odd.onnx: has no description"):
        Predictor(bad)

    def refer(network):
        os.mkfifo(tmp_path / "pipe")  # whoever opens it waits for ever
        tensor = next(each for each in network.graph.initializer if each.name == "means")
        tensor.ClearField("float_data"), tensor.ClearField("raw_data")
        tensor.data_location = 1
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", str(tmp_path / "pipe")

    with pytest.raises(ModelError, match="other.onnx: cannot be started"):
        Predictor(rewritten(file, tmp_path / "other.onnx", edit=refer))


@pytest.mark.parametrize("what", ["pipe", "/dev/zero", "folder", "huge", "link to a pipe", "nowhere"])
def test_what_is_no_file_of_a_models_size_is_refused_at_once(what, tmp_path):
    given = Path(what) if what.startswith("/dev") else tmp_path / "given.onnx"
    if what == "folder":
        given.mkdir()
    if "pipe" in what:
        os.mkfifo(given if what == "pipe" else tmp_path / "pipe")
    if what == "link to a pipe":
        given.symlink_to(tmp_path / "pipe")
    if what == "huge":
        with open(given, "wb") as empty:
            empty.truncate(50_000_000_000)
    with pytest.raises(ModelError, match=f"^{given}: .*Check the path") as error:
        Predictor(given)
    assert "\n" not in str(error.value)


# Out-of-distribution distance


def test_image_statistics_of_plain_images():
    grey = np.stack([np.full((64, 64, 3), value, np.uint8) for value in (0, 51, 255)])
    seen = image_statistics(grey)
    assert seen.shape == (3, 15) and np.allclose(seen[:, :3], 4 * np.array([[0], [0.2], [1]]), atol=1e-5)
    assert np.allclose(seen[:, 3:9], np.log(1e-2), atol=1e-4) and np.allclose(seen[:, 9:], np.log(2e-3), atol=1e-3)


def test_image_statistics_by_hand():
    """Left half black, right half red 255: 16 columns at 1/4, one edge; 8 at 1/8."""
    image = np.zeros((1, 64, 64, 3), np.uint8)
    image[:, :, 32:, 0] = 255
    (seen,) = image_statistics(image)
    assert np.allclose(seen[:3], [2, 0, 0])  # 4 times the mean
    assert np.allclose(seen[3:9], np.log(np.array([0.5, 0, 0, 0.5, 0, 0.5]) + 1e-2), atol=1e-5)  # R, G, B, R-G, G-B, B-R
    assert np.allclose(seen[9:12], np.log(np.array([1 / 15, 0, 0]) + 2e-3), atol=1e-5)
    assert np.allclose(seen[12:], np.log(np.array([1 / 7, 0, 0]) + 2e-3), atol=1e-5)


def test_distance_by_hand():
    """Two classes on a line with variance 1 around -10 and 10."""
    values = np.array([[-11.0], [-9], [-11], [-9], [9], [11], [9], [11]])
    fitted = _fit_mahalanobis(values, np.repeat(["a", "b"], 4))
    assert fitted["axes"].shape == (1, 1) and abs(float(fitted["residual"]) - 101 / 1000) < 1e-4  # the floor: total / 1000
    whitening = float(fitted["whitening"][0, 0])
    assert np.allclose(sorted(fitted["centroids"].ravel() / whitening), [-10, 10], atol=1e-4)
    distance = _mahalanobis_distance(np.array([[10.0], [12], [0]]), fitted)
    assert np.allclose(distance, np.abs([0, 2, 10]) * abs(whitening) / np.sqrt(2), atol=1e-4)
    with pytest.raises(ModelError, match="not finite"):
        _fit_mahalanobis(values * np.inf, np.repeat(["a", "b"], 4))


@pytest.mark.parametrize("by_class", [False, True])
def test_constant_features_are_an_error_and_those_of_one_class_are_not(by_class):
    random, labels = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32), np.repeat(["a", "b"], 30)
    for constant in (np.full_like(random, 0.1), np.where(labels == "a", 0.1, 0.7)[:, None] + 0 * random):
        with pytest.raises(ModelError, match="of one class are all the same.*Train the model again"):
            _fit_mahalanobis(constant, labels, by_class=by_class)
    half = np.where(labels[:, None] == "a", np.float32(0.3), random)
    assert np.isfinite(_mahalanobis_distance(half, _fit_mahalanobis(half, labels, by_class=by_class))).all()


def test_distance_to_the_predicted_class_by_hand():
    """Class a varies along x, class b along y; a small class has the covariance of all."""
    a, b = np.array([[-2.0, 0], [2, 0], [0, 1], [0, -1]] * 4), np.array([[0.0, -2], [0, 2], [1, 0], [-1, 0]] * 4) + [10, 0]
    fitted = _fit_mahalanobis(np.r_[a, b], [0] * 16 + [1] * 16, by_class=True)
    assert fitted["whitening"].shape == (2, 2, 2) and fitted["centroids"].shape == (2, 2)
    point = np.array([[4.0, 0]])
    of_a, of_b = (_mahalanobis_distance(point, fitted, np.array([place]))[0] for place in (0, 1))
    assert of_a < of_b and _mahalanobis_distance(point, fitted)[0] == of_a
    along, across = (_mahalanobis_distance(np.array([shift]), fitted, np.array([0]))[0] for shift in ([4.0, 0], [0, 4.0]))
    assert across > 1.5 * along  # class a hardly varies along y
    small = _fit_mahalanobis(np.r_[a, b[:3]], [0] * 16 + [1] * 3, by_class=True)
    shared = _fit_mahalanobis(np.r_[a, b[:3]], [0] * 16 + [1] * 3)
    assert np.allclose(small["whitening"][1], shared["whitening"]) and not np.allclose(small["whitening"][0], shared["whitening"])


def test_a_class_that_is_constant_but_for_rounding_shares_the_covariance_of_all():
    random = np.random.default_rng(2)
    values = np.r_[random.normal(size=(20, 3)) * 1e-9, random.normal(size=(20, 3)) + 5]
    labels = np.repeat(["a", "b"], 20)
    of_class, shared = (_fit_mahalanobis(values, labels, by_class=by_class)["whitening"] for by_class in (True, False))
    assert np.allclose(of_class[0], shared) and not np.allclose(of_class[1], shared)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_distance_does_not_depend_on_the_unit_of_the_features(scale):
    values, labels = np.random.default_rng(1).normal(size=(40, 5)) * [5, 4, 3, 2, 1], np.repeat(["a", "b"], 20)
    expected = _mahalanobis_distance(values, _fit_mahalanobis(values, labels))
    assert np.allclose(_mahalanobis_distance(values * scale, _fit_mahalanobis(values * scale, labels)), expected, rtol=1e-3)


def test_distance_of_more_features_than_images():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(30, 300))
    fitted = _fit_mahalanobis(values, np.repeat(["a", "b"], 15), max_components=10)
    assert fitted["axes"].shape == (300, 7)  # one for four images, and not more than max_components
    far, near = _mahalanobis_distance(values + 20, fitted).min(), _mahalanobis_distance(values, fitted).max()
    assert far > 2 * near


def test_the_larger_distance_counts_relative_to_its_percentile():
    rng = np.random.default_rng(0)
    train = {"features": rng.normal(size=(80, 4)), "statistics": rng.normal(size=(80, 15)), "probabilities": rng.random((80, 2))}
    labels, predicted = np.repeat(["b", "a"], 40), train["probabilities"].argmax(axis=1)  # columns: b, a
    constants = fit_ood(train, labels, train, ["b", "a"])
    features = _mahalanobis_distance(train["features"], _fit_mahalanobis(train["features"], labels))
    fitted = _fit_mahalanobis(train["statistics"], labels, by_class=True)
    statistics = _mahalanobis_distance(train["statistics"], fitted, 1 - predicted)  # rows of the centroids: a, b
    relative = [distance / np.quantile(distance, 0.975) for distance in (features, statistics)]
    assert np.allclose(ood_distance(train, constants), np.maximum(*relative), atol=1e-4)


# Predictions


@pytest.mark.parametrize(
    ("confidence", "distance", "n_cells", "reasons"),
    [
        (0.8, 1.5, 1, ""),
        (0.7999, 1.5, None, "low confidence"),
        (0.8, 1.5001, 1, "out of distribution"),
        (0.9, 0.1, 0, "no cells found"),
        (0.1, 9.0, 0, "out of distribution; low confidence; no cells found"),
        (np.nan, np.nan, 3, "out of distribution; low confidence"),
    ],
)
def test_abstain_reasons(confidence, distance, n_cells, reasons):
    assert _abstain_reasons(confidence, distance, n_cells, {"confidence": 0.8, "distance": 1.5}) == reasons


def test_rows_have_all_columns_and_describe_the_image(model, paths):
    table = model.report(paths).table
    assert list(table) == _prediction_columns(CLASSES) and list(table["path"]) == paths and not any(table["problem"])
    cells, row = find_image_cells(read_image(paths[2])), table.iloc[2]
    assert row["n_cells"] == cells.max() > 0 and abs(row["cell_fraction"] - (cells > 0).mean()) < 0.01
    assert row["sha256"] == hashlib.sha256(Path(paths[2]).read_bytes()).hexdigest()
    assert row["model_sha256"] == _check_checksum(Path(model.file).read_bytes())
    columns = [f"p_{name}" for name in CLASSES]
    np.testing.assert_allclose(table[columns].sum(axis=1), 1, atol=1e-5)
    assert (table["confidence"] == table[columns].max(axis=1)).all()
    assert (table["predicted"] == np.array(CLASSES)[table[columns].to_numpy().argmax(axis=1)]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_batches_arrays_and_paths_agree(place, paths, kind):
    model = Predictor(place / f"{kind}.onnx")
    whole = model.predict_proba(paths)
    assert whole.shape == (6, 3) and model.extract_features(paths).shape == (6, {"image": 4, "pair": 8, "cells": 39}[kind])
    np.testing.assert_allclose(model.predict_proba([read_image(path) for path in paths]), whole, atol=1e-6)
    np.testing.assert_allclose([row["p_Pre-B"] for row in model.report(paths).rows], whole[:, 1], atol=2e-6)
    blank = model.report(np.full((96, 128, 3), 235, np.uint8)).rows[0]
    assert blank["abstains"] and "no cells found" in blank["abstain_reasons"] and blank["n_cells"] == 0


def test_reports_of_many_images_share_their_threads_and_read_only_a_little_ahead(model, paths, monkeypatch):
    from leukemia_nb.inference import predictor as module

    prepared, pools = [], []
    prepare, pool = module.prepare_image, module.ThreadPoolExecutor
    monkeypatch.setattr(module, "prepare_image", lambda image, info: prepared.append(image) or prepare(image, info))
    monkeypatch.setattr(module, "ThreadPoolExecutor", lambda *arguments: pools.append(arguments) or pool(*arguments))
    assert [row["path"] for row in model.report(paths * 20).rows] == paths * 20 and len(prepared) == 120
    assert len(pools) == 1
    prepared.clear()
    parts = model._in_threads(lambda part: [module.prepare_image(each, model.info) for each in part], paths * 20)
    first = [next(parts), next(parts)]
    assert [len(part) for part in first] == [1, 4] and len(prepared) < 60
    assert [each.row["path"] for part in (*first, *parts) for each in part] == paths * 20 and len(prepared) == 120


def test_temperature_divides_log_probabilities(file, paths, tmp_path):
    plain = Predictor(file).predict_proba(paths)
    cooled = Predictor(rewritten(file, tmp_path / "t.onnx", lambda info: info | {"temperature": 2.0})).predict_proba(paths)
    expected = np.sqrt(plain.astype(float))
    np.testing.assert_allclose(cooled, expected / expected.sum(axis=1, keepdims=True), atol=1e-5)


def test_a_segmented_image_that_is_given_is_not_made_again(place, paths):
    model, image = Predictor(place / "pair.onnx"), read_image(paths[3])
    segmented = resize_square(apply_mask(image, segment(image)), 224)
    pair = np.stack([resize_square(image, 224), segmented])
    np.testing.assert_allclose(model.predict_proba(pair[None]), model.predict_proba([image]), atol=1e-6)
    assert not np.allclose(model.extract_features(pair[[0, 0]][None]), model.extract_features(pair[None]), atol=1e-3)


def test_a_flagged_mask_is_reported_and_does_not_make_the_model_abstain(model, paths):
    stained = np.full((192, 256, 3), 235, np.uint8)
    stained[:, 60:] = (120, 60, 160)
    row, plain = model.report([stained, read_image(paths[4])]).rows
    assert row["flag"] == check_mask(find_image_cells(resize_square(stained, 224)) > 0) and plain["flag"] == ""
    limits = model.info["thresholds"]
    assert row["abstain_reasons"] == _abstain_reasons(row["confidence"], row["ood_distance"], row["n_cells"], limits)
    assert format_row(plain).startswith(plain["predicted"])  # an image in memory has no path
    assert "flagged mask" not in format_row(plain) and (not row["flag"] or row["flag"] in format_row(row) or not row["n_cells"])


def test_unreadable_images_are_rows_and_the_rest_goes_on(model, paths, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "empty.png").write_bytes(b"")
    write_image(tmp_path / "wide.png", np.full((100, 70144, 3), 230, np.uint8))
    bad = [str(tmp_path / name) for name in ("broken.jpg", "empty.png", "nowhere.png", "wide.png", ".")]
    table = model.report([bad[0], paths[0], *bad[1:]]).table
    assert list(table["problem"] == "") == [False, True, False, False, False, False]
    failed = table[table["problem"] != ""]
    assert failed["abstains"].all() and (failed["predicted"] == "").all() and failed["confidence"].isna().all()
    assert all(path in error for path, error in zip(failed["path"], failed["problem"]))
    with pytest.raises(ImageError, match="nowhere.png"):
        model.predict_proba([paths[0], "nowhere.png"])
    with pytest.raises(ImageError, match="no images"):
        model.predict_proba([])


@pytest.mark.parametrize(
    "array", [np.zeros((20, 30)), np.zeros((20, 30, 3)), np.zeros((20, 30, 5), np.uint8), np.zeros(3, np.uint8)]
)
def test_other_arrays_are_refused(model, array):
    (row,) = model.report([array]).rows
    assert row["problem"] and row["predicted"] == "" and "\n" not in row["problem"]


def test_what_fails_in_any_other_way_stays_with_its_image(model, paths, monkeypatch):
    from leukemia_nb.inference import predictor

    real, bad = predictor.find_cells, resize_square(read_image(paths[1]), 224)

    def failing(image):
        if (image == bad).all():
            raise RuntimeError("one\ntwo")
        return real(image)

    monkeypatch.setattr(predictor, "find_cells", failing)
    rows = model.report(paths).rows
    assert [bool(row["problem"]) for row in rows] == [False, True] + [False] * 4
    assert "(RuntimeError: one two)" in rows[1]["problem"] and paths[1] in rows[1]["problem"]


@pytest.mark.parametrize("values", [np.nan, "failure"])
def test_a_network_that_fails_gives_errors_and_no_prediction(file, paths, values):
    model = Predictor(file)
    real = model.session

    class Session:
        get_inputs = real.get_inputs

        def run(self, names, feed):
            if values == "failure":
                raise MemoryError
            probabilities, features = real.run(names, feed)
            return [probabilities * values, features]

    model.session = Session()
    rows = model.report(paths[:2]).rows
    message = "not enough memory" if values == "failure" else "not finite"
    assert all(row["predicted"] == "" and row["abstains"] and message in row["problem"] for row in rows)
    json.dumps(rows, allow_nan=False)


def test_a_predictor_can_be_pickled(model, paths):
    other = pickle.loads(pickle.dumps(model))
    np.testing.assert_allclose(other.predict_proba(paths[:2]), model.predict_proba(paths[:2]), atol=1e-6)
    assert model.predict(paths).tolist() == model.report(paths).table["predicted"].tolist()
    assert model.score(paths[:1], model.predict(paths[:1])) == 1 and model.score(paths[:1], ["none"]) == 0


# Texts, display, overlays


ROW = {"path": "a.png", "predicted": "Pre-B", "p_Normal": 0.02, "p_Pre-B": 0.95, "p_Pro-B": 0.03, "confidence": 0.95}
ROW |= {"abstains": False, "abstain_reasons": "", "n_cells": 1, "cell_fraction": 0.071, "flag": "", "problem": ""}


def test_texts_of_a_row():
    assert format_confidence(ROW) == "Confidence 95.0%; next is Pro-B, 3.0%."
    assert format_row(ROW) == "a.png: Pre-B 95.0%; 1 white blood cell on 7.1% of the image"
    low = ROW | {"abstains": True, "abstain_reasons": "low confidence", "flag": "covers 64% of the image"}
    assert format_confidence(low) == "Abstains: low confidence."
    assert "abstains: low confidence (most probable: Pre-B 95.0%)" in format_row(low) and "covers 64%" in format_row(low)
    assert format_row(ROW | {"predicted": "", "problem": "a.png: gone\n"}) == "not predicted: a.png: gone\\n"


def test_calibration_is_described():
    known = {"calibration": "", "temperature": 1.78, "calibration_images": {"n": 124, "note": ""}}
    text = "temperature 1.78, fitted on 124 validation images"
    assert describe_calibration(known).startswith("Probabilities are calibrated with temperature 1.78")
    assert describe_calibration(known).endswith(f"{text} without a near-duplicate in training.")
    assert describe_calibration(known | {"calibration_images": {"n": 124, "note": "few"}}).endswith(f"{text}.")
    assert describe_calibration({"calibration": "", "temperature": 1}).endswith("not calibrated: the temperature is 1.")
    assert (
        describe_calibration({"calibration": "not calibrated: few", "temperature": 1.0})
        == "Probabilities are not calibrated: few."
    )


def test_the_display_escapes_names_and_survives_a_file_that_is_gone(model, paths, tmp_path):
    odd, gone = tmp_path / "<b>&.png", tmp_path / "gone.png"
    for path in (odd, gone):
        path.write_bytes(Path(paths[4]).read_bytes())
    predictions = model.report([odd, gone, "nowhere.png", *paths])
    gone.unlink()
    text = predictions._repr_html_()
    assert "<b>&" not in text and "&lt;b&gt;&amp;" in text and "Research use only" in text
    assert text.count('class="lnb-card"') == 6 and text.count("<img") == 4 and "3 more in .table" in text
    assert text.count('class="lnb-bar"') == 15 and "nowhere.png" in text and "not calibrated: a dummy model" in text
    assert re.search(r"<b>\d+</b> white blood cells? found, on <b>[\d.]+%</b> of the image", text)


def test_overlays_and_saliency(place, paths):
    image = read_image(paths[4])
    drawn, heat = overlay(image), saliency(Predictor(place / "pair.onnx"), image)
    assert drawn.shape == image.shape and (drawn == (0, 205, 90)).all(axis=2).any()
    assert heat.shape == (1, 224, 224) and heat.min() >= 0 and heat.max() <= 1
    assert overlay(image, heat[0]).shape == image.shape
    small = draw_outlines(image, find_image_cells(image, 64), (0, 205, 90), max(1, round(max(image.shape) / 220)))
    with_cells = overlay(image, cells=find_image_cells(image, 64))
    assert (with_cells == small).all() and (with_cells != drawn).any()


@pytest.mark.parametrize(
    "predict",
    [
        "from leukemia_nb.inference.predictor import Predictor\nPredictor(model).report([image])",
        "from leukemia_nb.study.command_line import app\n"
        "with contextlib.redirect_stdout(None): app(['predict', image, '--model', model], standalone_mode=False)",
    ],
)
def test_the_predict_path_loads_nothing_heavy(file, paths, predict):
    code = (
        f"import contextlib, sys\nmodel, image = {str(file)!r}, {paths[0]!r}\n{predict}\n"
        "heavy = ('tensorflow', 'torch', 'keras', 'onnx', 'sklearn', 'matplotlib', 'seaborn', 'jinja2', 'pandas')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["[]"], done.stdout + done.stderr


@pytest.mark.parametrize(
    ("height", "width", "most", "size"), [(30, 40, 40, (30, 40)), (300, 400, 100, (75, 100)), (3, 400, 20, (1, 20))]
)
def test_an_image_in_a_page_keeps_its_proportions(height, width, most, size):
    kind, _, data = data_uri(np.full((height, width, 3), (250, 120, 10), np.uint8), most).partition(";base64,")
    image = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR_RGB)
    assert kind == "data:image/jpeg" and image.shape == (*size, 3)
    assert np.abs(image.astype(int) - (250, 120, 10)).max() <= 4
