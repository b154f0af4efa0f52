"""Keras models: weight files, input scaling, features, frozen and trained backbones, the dual-channel head."""

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from leukemia_nb.models import transfer
from leukemia_nb.models.interface import ModelError, load_model, make_model

pytestmark = pytest.mark.filterwarnings("ignore:.*constant predictor:RuntimeWarning")
ROOT = Path(__file__).resolve().parents[1]
KERAS_MODULES = {"efficientnet_b0": "efficientnet", "mobilenet_v2": "mobilenet_v2", "nasnet_mobile": "nasnet"}
SMALL = {"image_size": 32, "batch_size": 4, "epochs": 3, "patience": 9, "learning_rate": 0.02, "weights": "local"}


def tiny(weights=None, include_top=False, input_tensor=None, input_shape=None, name=None):
    """A network with the parts that matter: convolution, BatchNorm, dropout; 8 features."""
    import keras

    maps = keras.layers.Conv2D(8, 5, strides=4)(input_tensor)
    maps = keras.layers.ReLU()(keras.layers.BatchNormalization(name="norm")(maps))
    network = keras.Model(keras.utils.get_source_inputs(input_tensor), keras.layers.SpatialDropout2D(0.2)(maps), name=name)
    if weights:
        network.load_weights(weights)
    return network


TINY = {"title": "Tiny", "application": "Tiny", "features": 8, "scale": 1 / 127.5, "offset": -1.0, "source": ""}
TINY |= {"url": "file:///nowhere/tiny.h5"}


@pytest.fixture
def tiny_backbone(monkeypatch):
    """MobileNetV2's place in the registry taken by a network that trains in milliseconds."""
    import keras

    from leukemia_nb.models.interface import BACKBONES, Backbone

    monkeypatch.setattr(keras.applications, "Tiny", tiny, raising=False)
    monkeypatch.setitem(BACKBONES, "mobilenet_v2", Backbone(**TINY))
    monkeypatch.delenv("LEUKEMIA_NB_WEIGHTS", raising=False)


@pytest.fixture
def tiny_weights(tiny_backbone, tmp_path, monkeypatch):
    """A folder with a weight file for it, its BatchNorm statistics away from their start; gives the weights."""
    import keras

    network = tiny(input_tensor=keras.Input((32, 32, 3)))
    random = np.random.default_rng(5)
    network.set_weights([random.uniform(0.5, 1.5, array.shape) for array in network.get_weights()])
    (tmp_path / "weights").mkdir()
    network.save(tmp_path / "weights" / "tiny.h5")
    monkeypatch.setenv("LEUKEMIA_NB_WEIGHTS", str(tmp_path / "weights"))
    return network.get_weights()


def backbone_weights(model):
    return model.network_.get_layer("backbone").get_weights()


def equal(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


# ---------------------------------------------------------------- weight files and input scaling
@pytest.mark.parametrize("name", KERAS_MODULES)
def test_addresses_names_checksums_and_ranges_are_those_of_the_installed_keras(name):
    from leukemia_nb.models.interface import BACKBONES
    from leukemia_nb.models.transfer import input_scaling

    backbone, module = BACKBONES[name], importlib.import_module(f"keras.src.applications.{KERAS_MODULES[name]}")
    source = inspect.getsource(module)
    folder, file = backbone.url.rsplit("/", 1)
    assert folder + "/" in source and file == backbone.files[0]
    published = {
        "efficientnet_b0": lambda: module.WEIGHTS_HASHES["b0"][1],
        "nasnet_mobile": lambda: module.NASNET_MOBILE_WEIGHT_PATH_NO_TOP and backbone.md5,
    }
    assert backbone.md5 == published.get(name, lambda: "")() and backbone.md5 in source
    pixels = np.arange(256, dtype=np.float32).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    scale, offset = input_scaling(backbone, "native")
    np.testing.assert_allclose(pixels * scale + offset, module.preprocess_input(pixels.copy()), atol=1e-5)
    assert input_scaling(backbone, "rescale") == (1 / 255, 0)


@pytest.mark.slow
@pytest.mark.parametrize("preprocessing", ["native", "rescale"])
def test_efficientnet_of_a_file_is_given_what_keras_own_imagenet_network_is(tmp_path, monkeypatch, preprocessing):
    """Keras' download is replaced by a file of random weights in the published layout; then both ways must agree."""
    import keras
    from keras.src.applications import efficientnet

    from leukemia_nb.models.interface import BACKBONES
    from leukemia_nb.models.transfer import build_backbone, input_scaling

    backbone, shape = BACKBONES["efficientnet_b0"], (32, 32, 3)
    network = keras.applications.EfficientNetB0(weights=None, include_top=False, input_shape=shape)
    layer = next(layer for layer in network.layers if isinstance(layer, keras.layers.Normalization))
    layer.set_weights([np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225]), np.int32(0)])
    file = tmp_path / backbone.files[0]
    network.save(file)
    monkeypatch.setenv("LEUKEMIA_NB_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(efficientnet.file_utils, "get_file", lambda *a, **k: str(file))
    theirs = keras.applications.EfficientNetB0(weights="imagenet", include_top=False, input_shape=shape)
    ours, source = build_backbone("efficientnet_b0", "imagenet", preprocessing, 32)
    assert source.startswith("unconfirmed (efficientnetb0_notop.h5, md5 ")

    def stem(network):  # what leaves the first convolution: all that can differ lies before it
        return keras.Model(network.inputs, next(la for la in network.layers if isinstance(la, keras.layers.Conv2D)).output)

    pixels = np.random.default_rng(0).integers(0, 256, (2, *shape)).astype(np.float32)
    scale, offset = input_scaling(backbone, preprocessing)
    expected = stem(theirs)(pixels * np.float32(scale) + np.float32(offset))
    np.testing.assert_allclose(stem(ours)(pixels), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_files_that_are_damaged_or_of_another_network_are_named(tiny_weights, tmp_path):
    import keras

    from leukemia_nb.models.transfer import build_backbone

    file = tmp_path / "weights" / "tiny.h5"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="tiny.h5: not the weights of Tiny"):
        build_backbone("mobilenet_v2", "local", image_size=32)
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]).save(file)
    with pytest.raises(ModelError, match="Layer count mismatch"):
        build_backbone("mobilenet_v2", "local", image_size=32)


def test_without_a_network_one_line_names_the_file_and_the_variable(tiny_backbone, dataset):
    with pytest.raises(
        ModelError, match=r"^ImageNet weights of Tiny [^\n]* Put tiny.h5 from file:///nowhere[^\n]*LEUKEMIA_NB_WEIGHTS[^\n]*$"
    ):
        make_model("mobilenet_v2", **SMALL | {"weights": "imagenet"}).fit(dataset)


def test_source_of_the_weights(tiny_weights, shared_weights, monkeypatch):
    from leukemia_nb.models.transfer import build_backbone

    assert build_backbone("mobilenet_v2", "imagenet", image_size=32)[1].startswith("ImageNet (tiny.h5, sha256 ")
    assert build_backbone("mobilenet_v2", "random", image_size=32)[1] == "random initialisation"
    monkeypatch.delenv("LEUKEMIA_NB_WEIGHTS")
    assert build_backbone("mobilenet_v2", "local", image_size=32)[1] == "random initialisation"


# ---------------------------------------------------------------- features
def test_features_of_the_file_are_the_models_own_and_give_the_same_model(tiny_weights, dataset, tmp_path):
    from leukemia_nb.models.transfer import read_features, write_features
    from leukemia_nb.processing.dataset import Pairs

    path = write_features(dataset, tmp_path / "features" / "mobilenet_v2.npz", "mobilenet_v2", "local", image_size=32)
    test = Pairs(dataset, "test", 32)
    arrays = read_features(path)
    found = {name: array[arrays["subset"] == "test"] for name, array in arrays.items() if array.ndim}
    assert found["pair"].tolist() == test.table["pair"].tolist() and set(found["subset"]) == {"test"}
    plain = make_model("mobilenet_v2", **SMALL).fit(dataset)
    given = make_model("mobilenet_v2", **SMALL).fit(dataset, feature_file=path)
    np.testing.assert_allclose(plain.extract_features(test), found["original"], atol=1e-5)
    np.testing.assert_array_equal(given.predict_proba(test), plain.predict_proba(test))
    dual = make_model("dual_channel", **SMALL).fit(dataset, feature_file=path)
    np.testing.assert_allclose(dual.extract_features(test), np.hstack([found["original"], found["segmented"]]), atol=1e-5)
    np.testing.assert_array_equal(dual.stored_features(test, tmp_path), np.hstack([found["original"], found["segmented"]]))
    some = Pairs(dataset, size=32, table=test.table.iloc[[3, 1]])
    np.testing.assert_array_equal(plain.stored_features(some, tmp_path), found["original"][[3, 1]])
    assert plain.stored_features(some, tmp_path / "none") is None


def test_features_of_other_settings_or_images_are_refused(tiny_weights, dataset, tmp_path):
    from leukemia_nb.models.transfer import write_features
    from leukemia_nb.testing import dummy_dataset

    path = write_features(dataset, tmp_path / "features.npz", "mobilenet_v2", "local", "rescale", image_size=32)
    with pytest.raises(
        ModelError, match="features made with mobilenet_v2, .*rescale.* needs .*native.* Compute the features again"
    ):
        make_model("mobilenet_v2", **SMALL).fit(dataset, feature_file=path)
    other = dummy_dataset(tmp_path / "other", per_class=4, size=32)
    path = write_features(other, tmp_path / "features.npz", "mobilenet_v2", "local", image_size=32)
    with pytest.raises(ModelError, match="features of another dataset"):
        make_model("mobilenet_v2", **SMALL).fit(dataset, feature_file=path)
    path.write_bytes(b"PK")
    with pytest.raises(ModelError, match="features.npz: not a file of features"):
        make_model("mobilenet_v2", **SMALL).fit(dataset, feature_file=path)


# ---------------------------------------------------------------- training
def test_a_pretrained_backbone_is_frozen_and_a_random_one_trained_unless_told(tiny_weights, dataset):
    frozen = make_model("mobilenet_v2", **SMALL).fit(dataset)
    assert equal(backbone_weights(frozen), tiny_weights)
    tuned = backbone_weights(make_model("mobilenet_v2", **SMALL, fine_tune=True).fit(dataset))
    kernel, batch_norm = 0, slice(2, 6)
    assert not np.array_equal(tuned[kernel], tiny_weights[kernel]) and equal(tuned[batch_norm], tiny_weights[batch_norm])
    random = {"weights": "random"}
    start = backbone_weights(make_model("mobilenet_v2", **SMALL | random, fine_tune=False).fit(dataset))
    trained = backbone_weights(make_model("mobilenet_v2", **SMALL | random).fit(dataset))
    assert not any(np.array_equal(a, b) for a, b in zip(start[:6], trained[:6]))


def test_batch_normalisation_from_nothing_follows_in_few_steps(tiny_backbone, tiny_weights, dataset):
    from leukemia_nb.models.transfer import build_backbone

    assert build_backbone("mobilenet_v2", "random", image_size=32)[0].get_layer("norm").momentum == 0.9
    assert build_backbone("mobilenet_v2", "local", image_size=32)[0].get_layer("norm").momentum == 0.99


@pytest.mark.parametrize("settings", [{}, {"weights": "random"}, {"fine_tune": True}], ids=str)
def test_the_same_seed_gives_the_same_model_and_another_seed_another(tiny_weights, dataset, settings):
    first, second, other = (
        make_model("mobilenet_v2", **SMALL | settings | {"epochs": 2}, seed=s).fit(dataset) for s in (3, 3, 4)
    )
    assert equal(first.network_.get_weights(), second.network_.get_weights())
    assert not equal(first.network_.get_weights(), other.network_.get_weights())


def test_patience_ends_training_and_the_best_epoch_is_kept(tiny_weights, dataset):
    from leukemia_nb.processing.dataset import Pairs

    settings = SMALL | {"epochs": 30, "patience": 2, "learning_rate": 0.3}
    model = make_model("mobilenet_v2", **settings).fit(dataset)
    history, val = model.history_, Pairs(dataset, "val", 32)
    assert len(history) == model.best_epoch_ + 2 < 30 and model.best_epoch_ == history["val_loss"].idxmin() + 1
    probabilities = model.predict_proba(val)
    true = probabilities[np.arange(len(val)), np.searchsorted(model.classes_, val.labels)]
    assert -np.log(true).mean() == pytest.approx(history["val_loss"].min(), rel=1e-4)
    assert (
        list(history) == ["epoch", "accuracy", "loss", "val_accuracy", "val_loss", "seconds"] and (history["seconds"] > 0).all()
    )


def test_it_learns_and_class_order_is_the_callers(tiny_weights, tmp_path):
    from leukemia_nb.processing.dataset import Pairs
    from leukemia_nb.testing import dummy_dataset

    folder, order = dummy_dataset(tmp_path / "dataset", per_class=20, size=32), ["Pro-B", "Normal", "Pre-B"]
    settings = SMALL | {"epochs": 40, "patience": 40, "weights": "random", "learning_rate": 0.01, "schedule": "constant"}
    model = make_model("mobilenet_v2", **settings, classes=order).fit(folder)
    train = Pairs(folder, "train", 32)
    assert model.classes_.tolist() == order and model.score(train, train.labels) > 0.6


def test_train_arguments_and_device_are_passed_on(tiny_weights, dataset):
    model = make_model("mobilenet_v2", **SMALL, device="cpu:0", train_arguments={"epochs": 1}).fit(dataset)
    assert len(model.history_) == 1
    with pytest.raises(TypeError, match="no_such"):
        make_model("mobilenet_v2", **SMALL, train_arguments={"no_such": 1}).fit(dataset)


@pytest.fixture
def compiled(monkeypatch):
    """The networks that are trained, which are copies."""
    found, compile_fused = [], transfer.compile_fused
    monkeypatch.setattr(transfer, "compile_fused", lambda *given: found.append(compile_fused(*given)) or found[-1])
    return found


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0), ("constant", 0.02)])
def test_a_network_trained_whole_ends_at_the_schedules_learning_rate(tiny_weights, dataset, compiled, schedule, last):
    settings = SMALL | {"weights": "random", "schedule": schedule, "patience": 1 if schedule == "cosine" else 9}
    model = make_model("mobilenet_v2", **settings).fit(dataset)
    assert len(model.history_) == 3 and float(compiled[0].optimizer.learning_rate) == pytest.approx(last, abs=1e-6)


def test_the_head_of_a_frozen_backbone_keeps_its_learning_rate(tiny_weights, dataset):
    model = make_model("mobilenet_v2", **SMALL).fit(dataset)
    assert float(model.network_.get_layer("head").optimizer.learning_rate) == pytest.approx(0.02)


def test_fused_operations_train_as_keras_own(tiny_weights):
    """Weights, moving averages and predictions after some steps, batch normalisation trained and frozen."""
    import keras

    random = np.random.default_rng(0)
    images, targets = random.uniform(0, 255, (6, 32, 32, 3)).astype(np.float32), np.array([0, 1, 2, 0, 1, 2])

    def trained(fused, frozen):
        keras.utils.set_random_seed(0)
        maps = tiny(input_tensor=keras.Input((32, 32, 3)))
        maps.set_weights(tiny_weights)
        maps.get_layer("norm").trainable = not frozen
        inner = keras.Model(maps.input, maps.get_layer("norm").output)
        cropped = keras.layers.Cropping2D(((1, 0), (0, 2)))(inner(maps.input))
        outputs = keras.layers.Dense(3, "softmax")(keras.layers.GlobalAveragePooling2D()(cropped))
        network = keras.Model(maps.input, outputs)
        before = network.get_weights()
        if fused:
            copy = transfer.compile_fused(network, 0.01)
            np.testing.assert_allclose(copy.predict(images, verbose=0), network.predict(images, verbose=0), atol=1e-6)
        else:
            copy = network
            copy.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", jit_compile=False)
        for _ in range(3):
            copy.train_on_batch(images, targets)
        assert not fused or all(np.array_equal(*each) for each in zip(before, network.get_weights()))
        return before, [*copy.get_weights(), copy.predict(images, verbose=0)]

    for frozen in (False, True):
        (before, found), (same, expected) = trained(True, frozen), trained(False, frozen)
        for each in zip(before, same, strict=True):
            np.testing.assert_array_equal(*each)
        for each in zip(found, expected, strict=True):
            np.testing.assert_allclose(*each, rtol=1e-3, atol=1e-4)
        kernel, _, gamma, beta, mean, variance = [not np.allclose(*each) for each in zip(before[:6], found)]
        assert kernel and [gamma, beta, mean, variance] == [not frozen] * 4


# ---------------------------------------------------------------- files and predictions
@pytest.mark.parametrize("name", ["mobilenet_v2", "dual_channel"])
def test_saved_and_loaded_without_the_weights_folder(tiny_weights, dataset, tmp_path, monkeypatch, name):
    from leukemia_nb.processing.dataset import Pairs

    model = make_model(name, **SMALL).fit(dataset)
    folder, test = model.save(tmp_path / "model"), Pairs(dataset, "test", 32)
    monkeypatch.delenv("LEUKEMIA_NB_WEIGHTS")
    again = load_model(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["history.csv", "model.json", "model.keras"]
    np.testing.assert_array_equal(again.predict_proba(test), model.predict_proba(test))
    np.testing.assert_array_equal(again.extract_features(test), model.extract_features(test))
    one_by_one = np.concatenate([model.predict_proba(test[i : i + 1]) for i in range(len(test))])
    np.testing.assert_allclose(one_by_one, model.predict_proba(test), atol=1e-6)


def test_the_dual_channel_model_is_the_original_studys(tiny_weights, dataset):
    model = make_model("dual_channel", **SMALL | {"epochs": 1}).fit(dataset)
    layers = [
        (type(la).__name__, getattr(la, "units", getattr(la, "rate", None))) for la in model.network_.get_layer("head").layers
    ]
    assert layers == [("Dense", 512), ("Dropout", 0.5), ("Dense", 256), ("Dropout", 0.5), ("Dense", 3)]
    pairs = np.random.default_rng(0).integers(0, 256, (3, 2, 32, 32, 3), dtype=np.uint8)
    both, swapped = model.extract_features(pairs), model.extract_features(pairs[:, ::-1])
    assert both.shape == (3, 16) and np.array_equal(both[:, :8], swapped[:, 8:]) and not np.array_equal(both, swapped)


def test_keras_of_other_settings_is_named_in_one_line(tiny_weights, dataset):
    import keras

    for name, value in (("floatx", "float16"), ("image_data_format", "channels_first")):
        before = getattr(keras.config, name)()
        getattr(keras.config, f"set_{name}")(value)
        try:
            with pytest.raises(ModelError, match=rf"^Keras has {name}='{value}', and the models need [^\n]*keras.json.$"):
                make_model("mobilenet_v2", **SMALL).fit(dataset)
        finally:
            getattr(keras.config, f"set_{name}")(before)


SMOKE = """
import sys, warnings; warnings.simplefilter("ignore")
import keras
from leukemia_nb.models.interface import load_model, make_model
from leukemia_nb.models.interface import BACKBONES, Backbone
from leukemia_nb.processing.dataset import Pairs
from test_transfer import TINY, tiny
keras.applications.Tiny = tiny
BACKBONES["mobilenet_v2"] = Backbone(**TINY)
test = Pairs(sys.argv[1], "test", 32)
for name, settings in (("mobilenet_v2", {}), ("dual_channel", {"fine_tune": False})):
    model = make_model(name, weights="random", image_size=32, epochs=2, batch_size=6, **settings).fit(sys.argv[1])
    again = load_model(model.save(f"{sys.argv[2]}/{name}"))
    assert abs(again.predict_proba(test) - model.predict_proba(test)).max() < 1e-6
    assert model.history_["loss"].notna().all()
print(keras.config.backend())
"""


@pytest.mark.slow
def test_trains_saves_and_loads_on_keras_torch_backend(dataset, tmp_path):
    environment = os.environ | {"KERAS_BACKEND": "torch", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", SMOKE, str(dataset), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0 and done.stdout.split() == ["torch"], done.stderr[-2000:]


TWO_DEVICES = """
import tensorflow as tf
processor = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(processor, [tf.config.LogicalDeviceConfiguration()] * 2)
import sys, warnings; warnings.simplefilter("ignore")
import keras
from leukemia_nb.models.interface import make_model
from leukemia_nb.models.interface import BACKBONES, Backbone
from test_transfer import TINY, tiny
keras.applications.Tiny = tiny
BACKBONES["mobilenet_v2"] = Backbone(**TINY)
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    for fine_tune in (True, False):
        settings = dict(weights="random", image_size=32, epochs=4, batch_size=6, learning_rate=0.01, fine_tune=fine_tune)
        loss = make_model("mobilenet_v2", **settings).fit(sys.argv[1]).history_["loss"]
        print(bool(loss.notna().all()))
"""


@pytest.mark.slow
def test_tensorflows_strategy_works_around_fit(dataset):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "KERAS_BACKEND": "tensorflow"}
    command = [sys.executable, "-c", TWO_DEVICES, str(dataset)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0 and done.stdout.split() == ["True", "True"], done.stderr[-2000:]


@pytest.mark.slow
def test_real_images_are_learned_with_imagenet_weights(shared_data, shared_weights, monkeypatch, tmp_path):
    import pandas as pd

    from leukemia_nb.data.images import read_image
    from leukemia_nb.processing.dataset import Pairs, save_pair, write_dataset

    monkeypatch.setenv("LEUKEMIA_NB_WEIGHTS", str(shared_weights))
    rows = []
    for folder, name in {"Benign": "Normal", "Pre": "Pre-B", "Pro": "Pro-B"}.items():
        for i, file in enumerate(sorted((shared_data / "taleqani" / folder).iterdir())[::20][:20]):
            save_pair(read_image(file), f"{name}/{i}", tmp_path / "prepared", 96)
            rows.append({"pair": f"{name}/{i}", "class": name, "subset": ("train", "train", "test", "val")[i % 4]})
    write_dataset(pd.DataFrame(rows), tmp_path / "prepared", tmp_path / "dataset")
    model = make_model("mobilenet_v2", image_size=96, epochs=15, batch_size=8, learning_rate=0.005).fit(tmp_path / "dataset")
    test = Pairs(tmp_path / "dataset", "test", 96)
    assert model.weights_source_.endswith("sha256 102a691e175c)") and model.score(test, test.labels) > 0.7


def test_dual_channel_network_is_normalised_by_the_variance_of_its_training_batches(tiny_backbone, dataset):
    """Original and segmented images differ; what is seen of both in training must be what inference divides by."""
    import keras

    from leukemia_nb.processing.dataset import Pairs

    network = make_model("dual_channel", **SMALL | {"weights": "random", "epochs": 1}).fit(dataset).network_
    backbone, train = network.get_layer("backbone"), Pairs(dataset, "train", 32)
    channels = [train.read(slice(None), name).astype("float32") for name in ("original", "segmented")]
    for _ in range(80):  # at a momentum of 0.9 nothing is left of the start
        network(channels, training=True)
    before = keras.Model(backbone.inputs, backbone.get_layer("norm").input)
    maps = np.concatenate([before.predict(pixels, verbose=0) for pixels in channels])
    np.testing.assert_allclose(backbone.get_layer("norm").moving_variance, maps.var(axis=(0, 1, 2)), rtol=0.02)
