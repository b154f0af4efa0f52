"""ImageNet backbones: weight files, input ranges, cached features, BatchNorm, fine-tuning, folders."""

import inspect
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st

from leukemia_nb.models import transfer
from leukemia_nb.models.interface import ModelError, Images, load_model, make_model
from leukemia_nb.models.transfer import (
    BACKBONES,
    WEIGHTS_FOLDER,
    Backbone,
    MobileNetV2,
    build_backbone,
    choose_weights,
    epoch_batches,
    input_scaling,
    variant_rows,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:mobilenet_v2 collapsed:RuntimeWarning", "ignore:dual_channel collapsed:RuntimeWarning"
)
MODULES = {"efficientnet_b0": "efficientnet", "mobilenet_v2": "mobilenet_v2", "nasnet_mobile": "nasnet"}


def tiny(weights=None, include_top=False, input_shape=(32, 32, 3)):
    """A network with the parts that matter: convolution, BatchNorm, dropout; 8 features."""
    import keras

    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input(input_shape),
            layers.Conv2D(8, 5, strides=4),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.SpatialDropout2D(0.2),
        ],
        name="tiny",
    )


@pytest.fixture()
def tiny_backbone(monkeypatch):
    """MobileNetV2's place in the registry taken by a network that trains in milliseconds."""
    import keras

    monkeypatch.setattr(keras.applications, "Tiny", tiny, raising=False)
    monkeypatch.setitem(BACKBONES, "mobilenet_v2", Backbone("Tiny", 8, -1, 1, "file:///nowhere/tiny.h5", ("tiny.h5",)))
    monkeypatch.delenv(WEIGHTS_FOLDER, raising=False)


@pytest.fixture()
def tiny_weights(tiny_backbone, tmp_path, monkeypatch):
    """A folder with a file of weights for it, its BatchNorm statistics away from their start."""
    network = tiny()
    rng = np.random.default_rng(5)
    network.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in network.get_weights()])
    (tmp_path / "weights").mkdir()
    write_like_keras(network, tmp_path / "weights" / "tiny.h5")
    monkeypatch.setenv(WEIGHTS_FOLDER, str(tmp_path / "weights"))
    return network


def write_like_keras(network, file):
    """The layout of the published files: layers' groups at the top of an HDF5 file."""
    import h5py
    from keras.src.legacy.saving.legacy_h5_format import save_weights_to_hdf5_group

    with h5py.File(file, "w") as opened:
        save_weights_to_hdf5_group(opened, network)


class Balanced(Images):
    """Like `Pairs` of a balanced training table: rows of the same pair and flip are the same image."""

    reads = 0

    def __init__(self, images, labels, size, copies):
        rows = [i for i in range(len(images)) for _ in range(copies[i])]
        super().__init__([images[i] for i in rows], [labels[i] for i in rows], size)
        self.table = pd.DataFrame(dict(pair=[f"p{i}" for i in rows], flip="none"))

    def read(self, index, channel="original"):
        self.reads += np.size(np.arange(len(self))[index])
        return super().read(index, channel)


def made_up(n, seed, size=32):
    rng = np.random.default_rng(seed)
    labels = np.array(["Normal", "Pre-B", "Pro-B"])[np.arange(n) % 3]
    tint = {"Normal": (230, 180, 190), "Pre-B": (150, 110, 170), "Pro-B": (190, 190, 120)}
    noise = rng.normal(0, 25, (n, size, size, 3))
    return (np.array([tint[label] for label in labels])[:, None, None] + noise).clip(0, 255).astype(np.uint8), labels


@pytest.fixture()
def sources():
    images, labels = made_up(14, 0)
    return Balanced(list(images), labels, 32, [1, 2, 1, 3] + [1] * 10), Images(*made_up(9, 1), 32)


def trained(sources, cache=True, model=MobileNetV2, **settings):
    made = model(**dict(image_size=32, batch_size=4, epochs=4, patience=9, learning_rate=0.02, weights="local") | settings)
    made.cache_features = cache
    made.fit(*sources)
    return made


def same_weights(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a.get_weights(), b.get_weights(), strict=True))


# ---- weight files


@pytest.mark.parametrize("name", BACKBONES)
def test_names_addresses_and_checksums_are_those_of_the_installed_keras(name):
    import importlib

    backbone, module = BACKBONES[name], importlib.import_module(f"keras.src.applications.{MODULES[name]}")
    source = inspect.getsource(module)
    folder, file = backbone.url.rsplit("/", 1)
    assert folder + "/" in source and file == backbone.files[0]
    if name == "efficientnet_b0":
        assert module.WEIGHTS_HASHES["b0"][1] == backbone.md5
    if name == "nasnet_mobile":
        assert all(f'"{text}"' in source for text in (backbone.files[-1], backbone.md5))
    if name == "mobilenet_v2":
        assert "file_hash" not in source and backbone.values


@pytest.mark.parametrize("name", BACKBONES)
def test_the_folder_path_gives_what_keras_own_imagenet_path_gives(name, tmp_path, monkeypatch):
    """Keras' download is replaced by a file of random numbers in the published layout; then both ways must agree."""
    import importlib
    import keras

    backbone, module = BACKBONES[name], importlib.import_module(f"keras.src.applications.{MODULES[name]}")
    network = getattr(keras.applications, backbone.application)(weights=None, include_top=False, input_shape=(32, 32, 3))
    rng = np.random.default_rng(0)
    for layer in network.layers:
        if type(layer).__name__ == "BatchNormalization":
            layer.set_weights([rng.uniform(0.8, 1.2, w.shape) for w in layer.get_weights()])
        if type(layer).__name__ == "Normalization":  # as in the published file: the deviation stands where a variance belongs
            layer.set_weights([np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225]), np.int32(0)])
    file = tmp_path / backbone.files[0]
    write_like_keras(network, file)
    monkeypatch.setenv(WEIGHTS_FOLDER, str(tmp_path))
    asked = []
    monkeypatch.setattr(module.file_utils, "get_file", lambda *a, **k: asked.append(a) or str(file))
    theirs = getattr(keras.applications, backbone.application)(weights="imagenet", include_top=False, input_shape=(32, 32, 3))
    assert asked and asked[0][1] == backbone.url
    assert choose_weights(backbone, "imagenet") == file
    ours, source = build_backbone(backbone, 32, "native", file)
    assert source.startswith("unconfirmed") and len(ours.get_weights()) == len(network.get_weights())
    pixels = rng.integers(0, 256, (2, 32, 32, 3)).astype(np.float32)
    scale, offset = input_scaling(backbone, "native")

    def first(network):  # what leaves the first convolution: all that can differ between the two ways lies before it
        return keras.Model(network.inputs, next(la for la in network.layers if isinstance(la, keras.layers.Conv2D)).output)

    rescale, network = ours.layers[1:]
    expected = first(theirs)(pixels * np.float32(scale) + np.float32(offset)).numpy()
    np.testing.assert_allclose(first(network)(rescale(pixels)).numpy(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    rest = [(a.name, x) for a in theirs.layers for x in a.get_weights() if "normalization" not in a.name[:13]]
    mine = [(a.name, x) for a in network.layers for x in a.get_weights() if "normalization" not in a.name[:13]]
    assert len(rest) > 100 and all(np.array_equal(x, y) for (_, x), (_, y) in zip(rest, mine, strict=True))


@pytest.mark.parametrize("name", BACKBONES)
def test_the_fixed_range_is_what_keras_preprocessing_gives(name):
    import importlib

    module = importlib.import_module(f"keras.applications.{MODULES[name]}")
    pixels = np.arange(256, dtype=np.float32).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    scale, offset = input_scaling(BACKBONES[name], "native")
    np.testing.assert_allclose(pixels * scale + offset, module.preprocess_input(pixels.copy()), atol=1e-5)
    assert input_scaling(BACKBONES[name], "rescale") == (1 / 255, 0)


def test_damaged_and_foreign_files_are_refused_by_name(tiny_weights, tmp_path):
    import keras

    file = tmp_path / "weights" / "tiny.h5"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="tiny.h5: not the weights of Tiny"):
        build_backbone(BACKBONES["mobilenet_v2"], 32, "native", file)
    write_like_keras(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]), file)
    with pytest.raises(ModelError, match="Layer count mismatch"):
        build_backbone(BACKBONES["mobilenet_v2"], 32, "native", file)


def test_without_network_one_line_says_what_to_put_where(tiny_backbone, sources):
    line = r"^ImageNet weights of Tiny .* Put tiny.h5 from file:///nowhere.*LEUKEMIA_NB_WEIGHTS"
    with pytest.raises(ModelError, match=line) as told:
        trained(sources, weights="imagenet")
    assert "\n" not in str(told.value)


def test_local_and_random_never_download(tiny_backbone, sources, monkeypatch):
    monkeypatch.setattr(transfer, "download_weights", lambda backbone: pytest.fail("downloaded"))
    assert trained(sources, weights="local", epochs=1).weights_source_ == "random initialisation"
    assert trained(sources, weights="random", epochs=1).weights_source_ == "random initialisation"


def test_random_is_random_even_where_a_file_is(tiny_weights, sources):
    assert trained(sources, weights="random", epochs=1).weights_source_ == "random initialisation"
    assert trained(sources, weights="imagenet", epochs=1).weights_source_.startswith("unconfirmed (tiny.h5")


def test_a_weights_folder_that_is_not_there(monkeypatch):
    monkeypatch.setenv(WEIGHTS_FOLDER, "/no/such/folder")
    with pytest.raises(ModelError, match="LEUKEMIA_NB_WEIGHTS=/no/such/folder is not a folder"):
        choose_weights(BACKBONES["mobilenet_v2"], "local")


# ---- order and variants


@given(st.integers(1, 60), st.integers(1, 40), st.integers(0, 5), st.integers(0, 3))
def test_every_image_is_seen_each_epoch_in_batches_of_one_size(n, batch_size, seed, epoch):
    batches = epoch_batches(n, batch_size, seed, epoch)
    assert batches.shape[1] == min(n, batch_size)
    counts = np.bincount(batches.ravel(), minlength=n)
    assert counts.min() == 1 and counts.max() <= 2


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["none", "vertical"])), min_size=1, max_size=20))
def test_variants_are_read_once_and_find_their_rows(rows):
    class Source:
        table = pd.DataFrame(rows, columns=["pair", "flip"])

    chosen, place = variant_rows(Source())
    assert len(chosen) == len(set(rows)) and [rows[chosen[p]] for p in place] == rows


# ---- training


def test_cached_and_long_way_end_in_the_same_weights(tiny_weights, sources):
    cached, long = trained(sources), trained(sources, cache=False)
    assert cached.trained_ == long.trained_ == "head"
    assert same_weights(cached.head_, long.head_) and same_weights(cached.maps_, long.maps_)
    assert cached.history_.drop(columns="seconds").equals(long.history_.drop(columns="seconds"))
    assert np.array_equal(cached.predict_proba(sources[1]), long.predict_proba(sources[1]))


def test_a_variant_is_read_once_whatever_the_epochs(tiny_weights, sources):
    trained(sources, epochs=4)
    assert sources[0].reads == 14 < len(sources[0])


def test_frozen_means_frozen(tiny_weights, sources):
    assert same_weights(trained(sources).maps_, tiny_weights)


@pytest.mark.parametrize("settings", [dict(), dict(weights="random"), dict(fine_tune=True)])
def test_the_same_seed_gives_the_same_model_and_another_seed_another(tiny_weights, sources, settings):
    first, second, other = (trained(sources, seed=seed, epochs=2, **settings) for seed in (3, 3, 4))
    assert same_weights(first.head_, second.head_) and same_weights(first.maps_, second.maps_)
    assert not same_weights(first.head_, other.head_)


def test_fine_tuning_leaves_pretrained_statistics_alone(tiny_weights, sources):
    before = tiny_weights.layers[1].get_weights()
    after = trained(sources, fine_tune=True).maps_.layers[-1].layers[1].get_weights()
    assert not np.array_equal(before[0], after[0])  # gamma is trained
    assert np.array_equal(before[2], after[2]) and np.array_equal(before[3], after[3])  # mean and variance are not


def test_statistics_of_a_network_trained_from_nothing_are_those_of_its_training_images(tiny_backbone, sources):
    model = trained(sources, weights="random", epochs=1, batch_size=18)
    convolution, batch_norm = model.maps_.layers[-1].layers[:2]
    pixels = sources[0].read(slice(None)).astype(np.float32) / 127.5 - 1
    assert len(sources[0]) == 18 - 1  # one batch holds all
    seen = convolution(pixels).numpy().reshape(-1, 8)
    np.testing.assert_allclose(batch_norm.moving_mean.numpy(), seen.mean(axis=0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(batch_norm.moving_variance.numpy(), seen.var(axis=0), rtol=1e-2, atol=1e-4)


def test_a_frozen_random_backbone_is_measured_once_and_not_trained(tiny_backbone, sources):
    cached, long = (trained(sources, cache=cache, weights="random", fine_tune=False, batch_size=18) for cache in (True, False))
    assert cached.trained_ == "head" and same_weights(cached.head_, long.head_) and same_weights(cached.maps_, long.maps_)
    convolution, batch_norm = cached.maps_.layers[-1].layers[:2]
    seen = convolution(sources[0].read(slice(None)).astype(np.float32) / 127.5 - 1).numpy().reshape(-1, 8)
    np.testing.assert_allclose(batch_norm.moving_mean.numpy(), seen.mean(axis=0), rtol=1e-3, atol=1e-4)


def test_fine_tune_decides_by_the_weights_unless_told(tiny_weights, sources):
    told = {
        (w, f): trained(sources, epochs=1, weights=w, fine_tune=f).trained_
        for w in ("local", "random")
        for f in (None, True, False)
    }
    assert [k for k, v in told.items() if v == "whole network"] == [("local", True), ("random", None), ("random", True)]


def test_best_epoch_is_kept_and_patience_ends_training(tiny_weights, sources, monkeypatch):
    losses = iter([0.9, 0.5, 0.7, 0.8, 0.9])

    def scripted(logits, targets):
        return 0.5, next(losses)

    monkeypatch.setattr(transfer, "score_logits", scripted)
    longer = trained(sources, epochs=9, patience=2)
    assert longer.best_epoch_ == 2 and len(longer.history_) == 4
    losses = iter([0.9, 0.5])
    kept = trained(sources, epochs=2, patience=2)
    assert same_weights(longer.head_, kept.head_)


def test_fewer_images_than_a_batch_and_one_class_only(tiny_weights):
    images, labels = made_up(3, 0)
    model = trained((Images(images, labels, 32), Images(images[:1], labels[:1], 32)), batch_size=32)
    assert model.predict_proba(images).shape == (3, 3)


def test_progress_lines(tiny_weights, sources):
    lines = []
    MobileNetV2(image_size=32, epochs=2, weights="local").fit(*sources, progress=lines.append)
    assert len(lines) == 4 and "features of 14 images" in lines[0] and "epoch 2/2" in lines[-1]


def test_users_random_numbers_are_left_alone(tiny_weights, sources):
    np.random.seed(7)
    expected = np.random.rand(3)
    np.random.seed(7)
    trained(sources, epochs=1)
    assert np.array_equal(np.random.rand(3), expected)


def test_saved_and_loaded_answers_are_identical_without_the_weights_folder(tiny_weights, sources, tmp_path, monkeypatch):
    model = trained(sources)
    folder = model.save(tmp_path / "model")
    monkeypatch.delenv(WEIGHTS_FOLDER)
    again = load_model(folder)
    assert np.array_equal(again.predict_proba(sources[1]), model.predict_proba(sources[1]))
    assert np.array_equal(again.features(sources[1]), model.features(sources[1]))
    assert again.weights_source_ == model.weights_source_


def test_answers_do_not_depend_on_how_many_are_asked(tiny_weights, sources):
    model = trained(sources)
    together = model.predict_proba(sources[1])
    assert np.allclose(np.concatenate([model.predict_proba(sources[1].read([i])) for i in range(9)]), together, atol=1e-6)


# ---- the real thing


@pytest.fixture()
def real_weights(shared_weights, monkeypatch):
    monkeypatch.setenv(WEIGHTS_FOLDER, str(shared_weights))


def test_the_known_mobilenet_file_is_recognised(real_weights):
    file = choose_weights(BACKBONES["mobilenet_v2"], "imagenet")
    assert build_backbone(BACKBONES["mobilenet_v2"], 32, "native", file)[1] == f"ImageNet ({file.name}, values as known)"


def test_real_images_are_learned_and_cached_equals_long(real_weights, shared_data):
    from leukemia_nb.data.images import read_image

    names = {"Benign": "Normal", "Pre": "Pre-B", "Pro": "Pro-B"}
    files = [
        (file, name)
        for folder, name in names.items()
        for file in sorted((shared_data / "taleqani" / folder).iterdir())[::20][:22]
    ]
    images, labels = [read_image(file) for file, _ in files], np.array([name for _, name in files])
    parts = [
        Images([images[i] for i in rows], labels[rows], 96) for rows in (np.arange(66)[np.arange(66) % 3 > 0], np.arange(66)[::3])
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cached = make_model("mobilenet_v2", image_size=96, epochs=15, batch_size=16, learning_rate=0.005)
        cached.fit(*parts)
    assert cached.score(parts[1], parts[1].labels) > 0.8
    long = trained(parts, cache=False, image_size=96, epochs=15, patience=5, batch_size=16, learning_rate=0.005)
    assert same_weights(cached.head_, long.head_)


# ---------------------------------------------------------------- several GPUs
TOGETHER = """
    import keras, numpy as np, tensorflow as tf
    processor = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(processor, [tf.config.LogicalDeviceConfiguration()] * 2)
    from leukemia_nb.models import transfer
    from leukemia_nb.models.interface import Images
    from tests.test_transfer import made_up, tiny
    keras.applications.Tiny = tiny
    transfer.BACKBONES["mobilenet_v2"] = transfer.Backbone("Tiny", 8, -1, 1, "file:///nowhere/tiny.h5", ("tiny.h5",))
    class Model(transfer.MobileNetV2):
        def head_layers(self, keras): return [self.dense(keras, len(self.classes_), 0)]  # no dropout: it draws for each device
    train, validation = (Images(*made_up(n, seed), 32) for n, seed in ((38, 0), (12, 1)))
    whole, found = {whole}, []
    for devices in (["CPU:0"], ["CPU:0", "CPU:1"]):
        transfer.sharing_strategy = lambda gpus: tf.distribute.MirroredStrategy(devices)
        model = Model(weights="random", image_size=32, epochs=4, batch_size=10, learning_rate=3e-2, fine_tune=whole, seed=1)
        found.append((model.fit(train, validation), model.predict_proba(validation)))
    (alone, p), (shared, q) = found
    print(alone.loss.tolist(), shared.loss.tolist(), np.abs(p - q).max())
    assert shared.loss.iloc[-1] < shared.loss[0] and np.isfinite(q).all()
    if not whole:
        assert np.allclose(alone.drop(columns="seconds"), shared.drop(columns="seconds"), atol=1e-4)
        assert np.abs(p - q).max() < 1e-4
    """


@pytest.mark.parametrize("whole", [False, True])
def test_two_devices_learn_what_one_learns(whole):
    "Two logical devices of the processor in the place of two GPUs; the head alone, and with BatchNorm, which sees a share."
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TOGETHER.replace("{whole}", str(whole)))],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"PYTHONPATH": str(root), "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout


def test_gpus_that_are_not_there(tiny_backbone, sources):
    with pytest.raises(ModelError, match=r"gpus=9, but TensorFlow sees \d GPUs here. Use gpus=1"):
        make_model("mobilenet_v2", weights="random", gpus=9).fit(*sources)


TRAINED = """
import sys
import numpy as np
from leukemia_nb.models.interface import Images, load_model, make_model
from leukemia_nb.models.transfer import BACKBONES, Backbone, start_quietly
start_quietly()
import keras
from test_transfer import tiny
keras.applications.Tiny, BACKBONES["mobilenet_v2"] = tiny, Backbone("Tiny", 8, -1, 1, "file:///nowhere", ("tiny.h5",))
rng = np.random.default_rng(0)
images = Images(rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8), ["a", "b"] * 3, size=32)
model = make_model("mobilenet_v2", weights="random", fine_tune=False, image_size=32, epochs=2, batch_size=3)
model.fit(images, images)
again = load_model(model.save(sys.argv[1] + "/model"))
from leukemia_nb.inference.export import keras_graph, run_graph
graph = keras_graph(again)
print(len(graph.graph.node) > 3)
np.save(sys.argv[1] + "/answers.npy", again.predict_proba(images))
import os
print(keras.config.backend(), keras.config.floatx(), keras.config.image_data_format(), os.environ.get("KERAS_BACKEND"))
"""


def train_elsewhere(folder, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("KERAS_")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRAINED, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **clean,
            "PYTHONPATH": f"{Path(__file__).parents[1]}{os.pathsep}{Path(__file__).parent}",
            "OMP_NUM_THREADS": "1",
            **environment,
        },
    )
    assert done.returncode == 0, done.stderr
    return np.load(folder / "answers.npy"), done.stdout.split()


def test_keras_settings_of_other_projects_change_nothing(tmp_path):
    """Another backend by environment and by keras.json, half precision, channels first, a home that cannot be written to."""
    answers = []
    for name, settings, environment in [
        ("plain", None, {}),
        (
            "torch",
            '{"backend": "jax", "floatx": "float16", "image_data_format": "channels_first", "epsilon": 0.1}',
            {"KERAS_BACKEND": "torch", "KERAS_MAX_EPOCHS": "1"},
        ),
        ("homeless", None, {"KERAS_BACKEND": "jax", "HOME": "/proc/nowhere", "KERAS_HOME": "/proc/nowhere/keras"}),
    ]:
        home = tmp_path / name
        (home / ".keras").mkdir(parents=True)
        if settings:
            (home / ".keras" / "keras.json").write_text(settings)
        found, said = train_elsewhere(home, **{"HOME": str(home), **environment})
        assert said == ["True", "tensorflow", "float32", "channels_last", environment.get("KERAS_BACKEND", "None")]
        assert settings is None or (home / ".keras" / "keras.json").read_text() == settings
        answers.append(found)
    assert all(np.allclose(answers[0], found, atol=1e-6) for found in answers[1:])


@pytest.mark.parametrize(
    "setting, value",
    [("floatx", "float16"), ("image_data_format", "channels_first"), ("epsilon", 1e-3), ("dtype_policy", "mixed_float16")],
)
def test_keras_that_runs_otherwise_already_is_named_in_one_line(tiny_weights, sources, setting, value):
    import keras

    before = getattr(keras.config, setting)()
    getattr(keras.config, f"set_{setting}")(value)
    try:
        with pytest.raises(
            ModelError, match=rf"^Keras is loaded in this process with {setting}=.*need .*Start Python anew[^\n]*$"
        ):
            make_model("mobilenet_v2", image_size=32, epochs=1).fit(*sources)
    finally:
        getattr(keras.config, f"set_{setting}")(before)
