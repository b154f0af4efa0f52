"""Model files: same answers as the framework, for every kind of model; a seal that shows damage."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from leukemia_nb.inference.export import (
    coverage,
    add_appearance,
    answers_table,
    choose_thresholds,
    distance_to,
    export_model,
    fit_distance,
    network_graph,
    run_graph,
    safe_temperature,
    seal,
    weights_version,
)
from leukemia_nb.models.interface import ModelError, Images, make_model
from leukemia_nb.inference.predictor import Predictor, unseal
from leukemia_nb.data.synthetic import smear

CLASSES = ("Normal", "Pre-B", "Pro-B")


def made_up(per_class: int, seed: int, classes: tuple[str, ...] = CLASSES) -> Images:
    labels = [name for name in classes for _ in range(per_class)]
    return Images([smear(name, seed + i, height=64, width=64).image for i, name in enumerate(labels)], labels, size=64)


@pytest.fixture(scope="module")
def images() -> tuple[Images, Images, Images]:
    return made_up(8, 0), made_up(5, 500), made_up(4, 900)


def trained(name: str, images, **settings):
    model = make_model(name, weights="random", image_size=64, epochs=1, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(*images[:2])
    return model


@pytest.fixture(scope="module")
def exported(images, tmp_path_factory) -> tuple[Path, dict, object]:
    model = trained("yolov8", images)
    file = tmp_path_factory.mktemp("exported") / "yolov8.onnx"
    return file, export_model(model, file, *images, split="made up", card="# Card"), model


@pytest.mark.parametrize(
    "name, kind", [("efficientnet_b0", "image"), ("dual_channel", "pair"), ("yolo12", "image"), ("cells", "cells")]
)
def test_answers_are_the_frameworks(name, kind, images, tmp_path):
    settings = {} if name == "cells" or name.startswith("yolo") else {"fine_tune": False}
    model = trained(name, images, **settings)
    info = export_model(model, tmp_path / "model.onnx", *images)
    assert info["difference"] < 1e-4 and info["input"] == kind
    predictor = Predictor.load(tmp_path / "model.onnx")
    plain = model.predict_proba(images[2])
    found = predictor.predict_proba(images[2].images)
    cooled = np.log(np.maximum(plain.astype(float), 1e-12)) / info["temperature"]
    cooled = np.exp(cooled - cooled.max(axis=1, keepdims=True))
    assert np.abs(found - cooled / cooled.sum(axis=1, keepdims=True)).max() < 1e-4
    assert np.abs(found.sum(axis=1) - 1).max() < 1e-5


def test_features_are_the_frameworks(exported, images):
    file, _, model = exported
    (features,) = run_graph(file.read_bytes(), model, images[2], ["features"])
    assert np.allclose(features, model.features(images[2]), atol=1e-4)


def test_cells_of_two_classes(images, tmp_path):
    two = [made_up(6, seed, ("Normal", "Pro-B")) for seed in (0, 500, 900)]
    info = export_model(trained("cells", two), tmp_path / "two.onnx", *two)
    assert info["difference"] < 1e-4 and info["classes"] == ["Normal", "Pro-B"]


def test_what_the_file_says(exported, images):
    file, info, model = exported
    found = Predictor.load(file).info
    assert found.pop("sha256") == unseal(file.read_bytes())
    assert found == json.loads(json.dumps({key: info[key] for key in found}))
    assert found["training"]["images"] == 24 and found["training"]["by_class"] == {name: 8 for name in CLASSES}
    assert found["test"]["images"] == 12 and 0 <= found["test"]["low"] <= found["test"]["right"] / 12 <= found["test"]["high"]
    assert found["accepted"]["validation"] >= 0.8 and found["card"] == "# Card" and found["licence"].startswith("AGPL")
    assert found["version"] == weights_version(network_graph(model).graph)


def test_the_version_depends_on_numbers_alone(exported):
    """Not on what tensors are called, how they are stored or in which order: but on every number, its type and shape."""
    import onnx
    from onnx import numpy_helper

    graph = network_graph(exported[2]).graph
    other, arrays = onnx.GraphProto(name="other"), [numpy_helper.to_array(tensor) for tensor in graph.initializer]
    for i, array in reversed(list(enumerate(arrays))):
        other.initializer.append(
            onnx.helper.make_tensor(f"tensor_{i}", graph.initializer[i].data_type, array.shape, array.ravel())
        )
    assert weights_version(other) == weights_version(graph)
    place = max(range(len(arrays)), key=lambda i: arrays[i].size)
    for changed in (arrays[place] + 1, arrays[place].ravel(), arrays[place].astype(np.float64)):
        other = onnx.GraphProto(initializer=graph.initializer)
        other.initializer[place].CopyFrom(numpy_helper.from_array(changed, graph.initializer[place].name))
        assert weights_version(other) != weights_version(graph)


@pytest.mark.parametrize("name", ["mobilenet_v2", "yolov8", "cells"])
def test_the_same_weights_have_the_same_version_in_any_process(name, images, tmp_path):
    model = trained(name, images, **({"fine_tune": False} if name == "mobilenet_v2" else {}))
    model.save(tmp_path / "model")
    code = (
        "import sys; from leukemia_nb.models.interface import load_model; from leukemia_nb.inference.export import network_graph, weights_version\n"
        "print(weights_version(network_graph(load_model(sys.argv[1])).graph))"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code, tmp_path / "model"],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )
        for seed in ("1", "2")
    ]
    versions = {done.stdout.split()[-1] if done.stdout else done.stderr for done in said}
    assert versions == {weights_version(network_graph(model).graph)}


def test_only_standard_operations_and_any_number_of_images(exported):
    import onnx

    file, *_ = exported
    model = onnx.load(file)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert [(entry.domain, 17 <= entry.version <= 20) for entry in model.opset_import if not entry.domain] == [("", True)]
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert not any(node.op_type == "BatchNormalization" for node in model.graph.node)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "n"
    assert [output.name for output in model.graph.output] == ["probabilities", "features", "distance"]


@pytest.mark.parametrize("place", [0, 100, -77, -76, -70, -1])
def test_a_changed_byte_is_refused(exported, tmp_path, place):
    data = bytearray(exported[0].read_bytes())
    data[place] ^= 1
    (tmp_path / "changed.onnx").write_bytes(data)
    with pytest.raises(ModelError, match="changed.onnx: .*(damaged|not a model file)"):
        Predictor.load(tmp_path / "changed.onnx")


def test_a_cut_off_file_is_refused(exported, tmp_path):
    (tmp_path / "cut.onnx").write_bytes(exported[0].read_bytes()[:-1])
    with pytest.raises(ModelError, match="cut off"):
        Predictor.load(tmp_path / "cut.onnx")


def test_seal_is_a_protobuf():
    import onnx

    closed = seal(onnx.ModelProto(producer_name="x").SerializeToString())
    read = onnx.load_model_from_string(closed)
    assert read.producer_name == "x" and read.metadata_props[0].value == unseal(closed)


def test_nothing_is_written_where_answers_differ(images, tmp_path, monkeypatch):
    model = trained("cells", images)
    monkeypatch.setattr(model, "predict_proba", lambda shown: np.full((len(shown), 3), 1 / 3, np.float32))
    with pytest.raises(ModelError, match="not written, its probabilities differ"):
        export_model(model, tmp_path / "cells.onnx", *images)
    assert not list(tmp_path.iterdir())


def test_distance_grows_away_from_the_classes():
    random = np.random.default_rng(0)
    values = random.normal(size=(120, 8)) + np.repeat([[0], [9]], 60, axis=0)
    fitted = fit_distance(values, np.repeat(["a", "b"], 60))
    between, inside = distance_to(np.full((1, 8), 4.5), fitted)[0], distance_to(np.zeros((1, 8)), fitted)[0]
    assert inside < 1 < between
    with pytest.raises(ModelError, match="not finite"):
        fit_distance(values * np.inf, np.repeat(["a", "b"], 60))


def test_distance_of_more_features_than_images():
    random = np.random.default_rng(0)
    values = random.normal(size=(30, 300))
    fitted = fit_distance(values, np.repeat(["a", "b"], 15), most=10)
    assert fitted["axes"].shape == (300, 7)  # one for four images, and not more than `most`
    far, near = distance_to(values + 20, fitted).min(), distance_to(values, fitted).max()
    assert far > 2 * near


@pytest.mark.parametrize("share", [0.9, 0.95, 0.99])
def test_thresholds_accept_the_share(share):
    random = np.random.default_rng(1)
    confidence, distance = random.random(300), random.random(300)
    found = coverage(confidence, distance, choose_thresholds(confidence, distance, share))
    assert share <= found.mean() < share + 0.02


def test_thresholds_hold_after_rounding():
    confidence, distance = np.float32([0.99999994, 0.9999999, 0.7]), np.float32([1.23456, 0.5, 0.2])
    limits = choose_thresholds(confidence, distance)
    assert all(round(float(value), 6) >= limits["confidence"] for value in confidence)
    assert all(round(float(value), 4) <= limits["distance"] for value in distance)


def test_temperature_that_cannot_be_fitted_stays_one():
    right = answers_table(["a", "b"], np.array([[0.9, 0.1], [0.1, 0.9]]), ["a", "b"])
    assert safe_temperature(right) == (1.0, "not calibrated: 2 validation images cannot tell how sure the model should be")


def test_appearance_of_plain_images(exported):
    model = exported[2]
    graph = network_graph(model)
    add_appearance(graph.graph)
    grey = [np.full((64, 64, 3), value, np.uint8) for value in (0, 51, 255)]
    (seen,) = run_graph(graph.SerializeToString(), model, Images(grey, size=64), ["appearance"])
    assert np.allclose(seen[:, :3], 4 * np.array([[0], [0.2], [1]]), atol=1e-5)
    assert np.allclose(seen[:, 3:9], np.log(1e-2), atol=1e-2) and np.allclose(seen[:, 9:], np.log(2e-3), atol=1e-2)
