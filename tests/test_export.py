"""Exported files predict as the framework does, for every kind of model; thresholds, temperature, version."""

import json
import subprocess
import sys
import warnings
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
from conftest import ROOT

from leukemia_nb.inference.export import (
    _choose_thresholds,
    _accepts,
    export_model,
    export_network,
    _fit_safe_temperature,
    _run_exported,
    _weights_version,
)
from leukemia_nb.data.images import resize_square
from leukemia_nb.data.synthetic import make_smear
from leukemia_nb.inference.model_file import _start_session
from leukemia_nb.inference.predictor import Predictor, predict_cells
from leukemia_nb.models.cell_model import _log_probabilities
from leukemia_nb.models.interface import MODELS, ModelError, make_model
from leukemia_nb.processing.cells import FEATURE_NAMES, cell_table, find_cells
from leukemia_nb.processing.dataset import Pairs
from leukemia_nb.testing import dummy_dataset

SIZE = 64


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return dummy_dataset(tmp_path_factory.mktemp("export") / "dataset", per_class=12, size=SIZE)


def subsets(dataset, size=SIZE):
    """Originals of the training images, validation and test images."""
    train = Pairs(dataset, "train", size)
    return (
        Pairs(dataset, size=size, table=train.table.drop_duplicates("pair")),
        Pairs(dataset, "val", size),
        Pairs(dataset, "test", size),
    )


def trained(name, dataset, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make_model(name, weights="random", image_size=SIZE, epochs=1, **settings).fit(dataset)


def check_file(model, dataset, file):
    """Export a model; its file predicts the test images as the model does. Returns the description."""
    info = export_model(model, file, *subsets(dataset), split="synthetic", card="# Card")
    predictor, test = Predictor(file), subsets(dataset)[2]
    images = test[:] if info["input"] == "pair" else test.read(slice(None))
    expected = np.log(np.maximum(model.predict_proba(test).astype(float), 1e-12)) / info["temperature"]
    expected = np.exp(expected - expected.max(axis=1, keepdims=True))
    expected /= expected.sum(axis=1, keepdims=True)
    assert info["difference"] < 1e-4 and np.abs(predictor.predict_proba(images) - expected).max() < 1e-4
    assert np.allclose(predictor.extract_features(images), model.extract_features(test), atol=1e-4, rtol=1e-4)
    found = {key: value for key, value in predictor.info.items() if key not in ("format", "sha256")}
    assert found == json.loads(json.dumps({key: info[key] for key in found}))
    return info


@pytest.fixture(scope="module")
def cells(dataset):
    return trained("cells", dataset)


def test_the_single_cell_model(cells, dataset, tmp_path):
    info = check_file(cells, dataset, tmp_path / "cells.onnx")
    assert info["training"]["images"] == 18 and info["training"]["by_class"] == {"Normal": 6, "Pre-B": 6, "Pro-B": 6}
    assert info["test"]["images"] == 9 and 0 <= info["test"]["low"] <= info["test"]["n_correct"] / 9 <= info["test"]["high"]
    assert info["coverage"]["val"] >= 0.95 and info["card"] == "# Card" and info["licence"].startswith("Apache-2.0")
    assert info["version"] == _weights_version(export_network(cells))


def test_the_recorded_coverage_is_that_of_the_predictor(cells, dataset, tmp_path, monkeypatch):
    """Images without cells are taken off: one validation and two test images, which the thresholds alone accept."""
    from leukemia_nb.inference import predictor

    train, val, test = subsets(dataset)
    without = [val.read([0])[0], *test.read([0, 4])]
    find, measure = predictor.find_cells, predictor._cell_features

    def find_none(square):
        return find(square) * (not any(np.array_equal(square, image) for image in without))

    monkeypatch.setattr(predictor, "find_cells", find_none)
    monkeypatch.setattr(predictor, "_cell_features", lambda square, _, seed: measure(square, find(square), seed))
    file = tmp_path / "cells.onnx"
    info = export_model(cells, file, train, val, test, note="all are used")
    reports = {name: Predictor(file).report(pairs.read(slice(None))).table for name, pairs in (("val", val), ("test", test))}
    assert info["coverage"] == {name: pytest.approx(1 - table["abstains"].mean()) for name, table in reports.items()}
    assert reports["val"].loc[0, "abstain_reasons"] == "no cells found" and info["coverage"]["val"] == pytest.approx(8 / 9)
    assert Predictor(file).info["calibration_images"] == {"n": 9, "note": "all are used"}


def test_an_image_without_cells_gets_the_class_proportions(cells):
    import onnxruntime

    session = onnxruntime.InferenceSession(export_network(cells).SerializeToString())
    probabilities, features, by_cell = session.run(None, {"cells": np.zeros((0, 39), np.float32)})
    assert (
        by_cell.shape == (0, 3)
        and np.allclose(probabilities, cells.class_proportions_)
        and not features.any()
        and features.shape == (1, 78)
    )


def test_each_cell_has_the_probabilities_of_the_cell_classifier(cells, dataset, tmp_path):
    export_model(cells, tmp_path / "cells.onnx", *subsets(dataset))
    predictor, image = Predictor(tmp_path / "cells.onnx"), make_smear("Pre-B", seed=4).image
    square = resize_square(image, SIZE)
    features = cell_table(square, find_cells(square))
    expected = np.exp(_log_probabilities(cells.cell_layers_, features[list(FEATURE_NAMES)].to_numpy())) - 1e-4
    table = predict_cells(predictor, image)[0].set_index("label")
    assert len(features) > 0 and len(table) == predictor.report(image).rows[0]["n_cells"]
    names = [f"p_{name}" for name in cells.classes_]
    assert np.allclose(table.loc[features["cell"], names], expected, atol=1e-5)
    assert table.loc[features["cell"], "predicted"].tolist() == cells.classes_[expected.argmax(axis=1)].tolist()
    others = table.drop(index=features["cell"])
    assert (others["predicted"] == "").all() and others[names].isna().all(axis=None)


def test_two_classes(tmp_path):
    two = dummy_dataset(tmp_path / "dataset", per_class=12, size=SIZE, classes=("Normal", "Pro-B"))
    assert check_file(trained("cells", two), two, tmp_path / "two.onnx")["classes"] == ["Normal", "Pro-B"]


@pytest.mark.slow
def test_yolo_by_pytorchs_exporter(dataset, tmp_path):
    import onnx

    info = check_file(trained("yolo12", dataset), dataset, tmp_path / "yolo.onnx")
    network = onnx.load(tmp_path / "yolo.onnx")
    assert info["licence"].startswith("AGPL") and info["input"] == "image"
    assert {node.domain for node in network.graph.node} <= {"", "ai.onnx"}
    assert not any(tensor.external_data for tensor in network.graph.initializer)
    assert network.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "n"
    assert [output.name for output in network.graph.output] == ["probabilities", "features"]


KERAS = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
from test_export import check_file, trained
dataset = Path(sys.argv[1])
for name in ("efficientnet_b0", "dual_channel"):
    print(check_file(trained(name, dataset, fine_tune=False), dataset, Path(sys.argv[2]) / "keras.onnx")["input"])
"""


@pytest.mark.slow
def test_keras_by_its_own_exporter(dataset, tmp_path):
    """In a process of its own, as torch and TensorFlow do not share one."""
    command = [sys.executable, "-c", KERAS, str(dataset), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.stdout.split()[-2:] == ["image", "pair"], done.stdout + done.stderr


def test_the_version_depends_on_the_numbers_alone(cells):
    """Not on the names of tensors or their order, but on every number, its type and shape."""
    import onnx
    from onnx import numpy_helper

    graph = export_network(cells).graph
    arrays = [numpy_helper.to_array(tensor) for tensor in graph.initializer]
    assert len(arrays) >= 5

    def version(changed):
        tensors = [numpy_helper.from_array(array, f"t{i}") for i, array in enumerate(changed)]
        return _weights_version(onnx.ModelProto(graph=onnx.GraphProto(initializer=tensors)))

    assert version(arrays[::-1]) == _weights_version(export_network(cells))
    place = max(range(len(arrays)), key=lambda i: arrays[i].size)
    for changed in (arrays[place] + 1, arrays[place].ravel(), arrays[place].astype(np.float32)):
        assert version([*arrays[:place], changed, *arrays[place + 1 :]]) != version(arrays)


def test_nothing_is_written_where_predictions_differ(cells, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "predict_proba", lambda shown: np.full((len(shown), 3), 1 / 3, np.float32))
    with pytest.raises(ModelError, match="not written, probabilities differ"):
        export_model(cells, tmp_path / "cells.onnx", *subsets(dataset))
    assert not list(tmp_path.iterdir())


def test_features_of_an_earlier_step_give_the_same_file(cells, dataset, tmp_path):
    """The OOD distance of stored features, as those of prepared cells are, is that of computed ones."""
    from leukemia_nb.data.files import write_table
    from leukemia_nb.inference.ood import image_statistics
    from leukemia_nb.processing.cells import cell_table

    train, val, test = subsets(dataset)
    originals = Pairs(train.folder, size=SIZE, table=train.table[train.table["flip"] == "none"])
    images, labels = originals.read(slice(None)), originals.read(slice(None), "cells")
    tables = [cell_table(*both) for both in zip(images, labels.astype(np.int32))]
    assert cells.stored_features(originals, tmp_path) is None
    write_table(tmp_path / "cell_features.csv", (each.assign(pair=name) for each, name in zip(tables, originals.table["pair"])))
    stored, train = cells.stored_features(originals, tmp_path), originals
    assert np.allclose(stored, cells.extract_features(train), atol=1e-4, rtol=1e-4)
    of_train = {"features": stored, "statistics": image_statistics(images)}
    read = export_model(cells, tmp_path / "read.onnx", train, val, test, of_train=of_train)
    computed = export_model(cells, tmp_path / "computed.onnx", train, val, test)
    assert read["thresholds"] == pytest.approx(computed["thresholds"], abs=2e-4) and read["coverage"] == computed["coverage"]


def test_a_model_without_exporter_is_named(cells, monkeypatch):
    monkeypatch.setitem(MODELS, "cells", replace(MODELS["cells"], exporter=""))
    with pytest.raises(ModelError, match="cells is not exported: its entry in MODELS names no exporter"):
        export_network(cells)


def test_a_model_without_exporter_has_no_export_step(monkeypatch):
    from leukemia_nb.study.driver import study_steps
    from leukemia_nb.study.settings import StudySettings

    monkeypatch.setitem(MODELS, "yolo11", replace(MODELS["yolo11"], exporter=""))
    names = [step.name for step in study_steps(StudySettings(weights="random", models=("yolo11", "cells")))]
    assert "export-cells" in names and "train-yolo11" in names and "export-yolo11" not in names


def test_the_exporter_is_the_entrys(cells, monkeypatch):
    module = ModuleType("own_exporter")
    module.export = lambda model: f"network of {model.name}"
    monkeypatch.setitem(sys.modules, "own_exporter", module)
    monkeypatch.setitem(MODELS, "cells", replace(MODELS["cells"], exporter="own_exporter:export"))
    assert export_network(cells) == "network of cells"


def test_outputs_in_batches_are_those_of_single_images(cells, dataset):
    test, network = subsets(dataset)[2], export_network(cells)
    session = _start_session(network.SerializeToString(), "cells.onnx", None)
    whole = _run_exported(session, cells, test)
    one = _run_exported(session, cells, Pairs(dataset, size=SIZE, table=test.table.iloc[4:5]))
    assert {name: values.shape for name, values in whole.items()} == {
        "probabilities": (9, 3),
        "features": (9, 78),
        "statistics": (9, 15),
    }
    assert all(np.allclose(one[name][0], whole[name][4], atol=1e-5) for name in one)


@pytest.mark.parametrize("coverage", [0.9, 0.95, 0.99])
def test_thresholds_reach_the_coverage(coverage):
    rng = np.random.default_rng(1)
    confidence, distance = rng.random(300), rng.random(300)
    found = _accepts(confidence, distance, _choose_thresholds(confidence, distance, coverage))
    assert coverage <= found.mean() < coverage + 0.02


def test_thresholds_by_hand():
    """Of 20 images the least confident and the farthest are the same: one may be given up at 95 %, none at 96 %."""
    confidence, distance = np.linspace(0.5, 0.9, 20), np.linspace(2, 1, 20)
    assert _choose_thresholds(confidence, distance, 0.95) == {"confidence": 0.521052, "distance": 1.9474}
    assert _choose_thresholds(confidence, distance, 0.96) == {"confidence": 0.5, "distance": 2.0}


def test_thresholds_hold_after_rounding():
    confidence, distance = np.float32([0.99999994, 0.9999999, 0.7]), np.float32([1.23456, 0.5, 0.2])
    limits = _choose_thresholds(confidence, distance)
    assert all(round(float(value), 6) >= limits["confidence"] for value in confidence)
    assert all(round(float(value), 4) <= limits["distance"] for value in distance)


def test_a_temperature_that_cannot_be_fitted_stays_one():
    reason = "not calibrated: 2 validation images cannot determine the temperature"
    assert _fit_safe_temperature(["a", "b"], np.array([[0.9, 0.1], [0.1, 0.9]]), ["a", "b"]) == (1.0, reason)
    temperature, reason = _fit_safe_temperature(["a", "b", "b"], np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]), ["a", "b"])
    assert 1 < temperature < 20 and not reason
