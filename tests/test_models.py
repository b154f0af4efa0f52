"""What all models share: registry, settings, images in, the check for a constant predictor, folders."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from leukemia_nb.models.interface import (
    BACKBONES,
    MODELS,
    ModelEntry,
    ModelError,
    load_model,
    local_weights,
    make_model,
    package_versions,
)

STUB = ModelEntry(title="Stub", module="stub_model", class_name="Stub", framework="numpy", description="no network")
pytestmark = pytest.mark.filterwarnings("ignore:.*constant predictor:RuntimeWarning")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(MODELS, "stub", STUB)


@pytest.fixture
def trained(dataset):
    return make_model("stub", image_size=32).fit(dataset)


def test_the_models_of_the_original_study_and_the_fields_of_their_entries():
    assert [name for name in MODELS if MODELS[name].in_original_study and name != "stub"] == [
        *("efficientnet_b0", "mobilenet_v2", "nasnet_mobile", "dual_channel", "yolov8", "yolo11", "yolo12")
    ]
    assert MODELS["dual_channel"].input == "pair" and MODELS["cells"].input == "cells" and MODELS["yolo11"].input == "image"
    assert {MODELS[name].licence for name in MODELS if MODELS[name].framework == "torch"} == {"AGPL-3.0"}


def test_interface_imports_no_framework_and_no_scikit_learn():
    code = "import sys, leukemia_nb.models.interface; print(*{'tensorflow', 'keras', 'torch', 'sklearn'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_unknown_model_and_setting_are_named():
    with pytest.raises(ModelError, match="no model is called 'resnet'.*efficientnet_b0"):
        make_model("resnet")
    with pytest.raises(ModelError, match="stub: unknown setting 'epoch'. It has: .*epochs"):
        make_model("stub", epoch=3)


def test_a_backbone_that_is_added_is_a_model(monkeypatch):
    monkeypatch.setitem(BACKBONES, "other", replace(BACKBONES["mobilenet_v2"], title="Other", in_original_study=False))
    try:
        entry = make_model("other").entry
    finally:
        MODELS.pop("other", None)
    assert (entry.title, entry.backbone, entry.framework) == ("Other", "other", "keras") and not entry.in_original_study


@pytest.mark.parametrize(
    "setting, text",
    [
        ({"preprocessing": "deck"}, "preprocessing='deck' is not one of 'native', 'rescale'"),
        ({"weights": "imagenett"}, "weights='imagenett'"),
        ({"augmentation": "crops"}, "augmentation='crops' is not one of 'flips', 'default'"),
        ({"fine_tune": "yes"}, "fine_tune='yes'"),
        ({"image_size": 31}, "image_size=31 is not a whole number of at least 32"),
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": True}, "epochs=True"),
        ({"batch_size": 2.5}, "batch_size=2.5"),
        ({"seed": -1}, "seed=-1"),
        ({"learning_rate": 0}, "learning_rate=0"),
        ({"learning_rate": 1.5}, "learning_rate=1.5 is not above 0 and at most 1"),
        ({"classes": "Normal"}, "list of different names"),
        ({"classes": ["A", "A"]}, "list of different names"),
    ],
)
def test_settings_that_cannot_be_are_named_with_their_value(setting, text):
    with pytest.raises(ModelError, match=text):
        make_model("stub", **setting)


def test_least_settings_are_allowed():
    make_model("stub", image_size=32, epochs=1, batch_size=1, patience=1, seed=0, learning_rate=1)


def test_scikit_learn_clones_it(trained):
    from sklearn.base import clone, is_classifier

    copy = clone(trained)
    assert is_classifier(trained) and copy.get_params() == trained.get_params() and not hasattr(copy, "classes_")


def test_not_trained_is_an_error(tmp_path):
    from sklearn.exceptions import NotFittedError

    for use in (lambda model: model.predict_proba([]), lambda model: model.save(tmp_path / "no")):
        with pytest.raises(NotFittedError):
            use(make_model("stub"))


def test_arrays_lists_and_pairs_give_the_same_prediction(trained, dataset):
    from leukemia_nb.processing.dataset import Pairs

    pairs = Pairs(dataset, "test", 32)
    array = pairs.read(slice(None))
    for images in (array, list(array), pairs[:], pairs):
        np.testing.assert_array_equal(trained.extract_features(images), array.mean(axis=(1, 2), dtype=float).astype(np.float32))
    np.testing.assert_allclose(trained.predict_proba(array), np.tile([1 / 6, 2 / 6, 3 / 6], (6, 1)), rtol=1e-6)
    assert trained.predict(array).tolist() == ["Pro-B"] * 6 and trained.score(array, pairs.labels) == pytest.approx(1 / 3)
    assert trained.predict_proba([]).shape == (0, 3)


def test_batches_keep_order_sizes_and_channels():
    from leukemia_nb.models.classifier import read_batches

    images = [np.full((40, 30 + i, 3), i, np.uint8) for i in range(5)]
    batches = list(read_batches(images, 32, batch_size=2))
    assert [batch.shape for batch in batches] == [(2, 32, 32, 3), (2, 32, 32, 3), (1, 32, 32, 3)]
    assert np.concatenate(batches)[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    pairs = np.stack([np.zeros((3, 8, 8, 3), np.uint8), np.full((3, 8, 8, 3), 9, np.uint8)], axis=1)
    both = next(read_batches(pairs, 8, ("original", "segmented")))
    assert both.shape == (3, 2, 8, 8, 3) and both[:, 0].max() == 0 and both[:, 1].min() == 9


def test_segmented_images_are_made_by_the_method_of_the_setting():
    from leukemia_nb.data.images import resize_square
    from leukemia_nb.data.synthetic import make_smear
    from leukemia_nb.models.classifier import read_batches
    from leukemia_nb.processing.segmentation import apply_mask, segment

    image = make_smear("Pre-B", 900, height=96, width=128).image
    for method in ("kmeans", "nucleus"):
        expected = resize_square(apply_mask(image, segment(image, method)), 48)
        np.testing.assert_array_equal(next(read_batches([image], 48, ("segmented",), segmentation=method))[0], expected)


@pytest.mark.parametrize("image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3))])
def test_only_uint8_rgb_is_taken(trained, image):
    with pytest.raises(ModelError, match="must be uint8 RGB"):
        trained.predict([image])


def test_one_image_is_not_taken_for_many(trained):
    with pytest.raises(ModelError, match="one image as a list of one"):
        trained.predict(np.zeros((30, 40, 3), np.uint8))


@pytest.mark.parametrize(
    "predicted, true, described",
    [
        ([0] * 20, [0] * 10 + [1] * 10, "predicts 'Normal' for 100% of 20 validation images, of which 50% are"),
        ([0] * 19 + [1], [0] * 10 + [1] * 10, "predicts 'Normal' for 95% of 20"),
        ([0] * 18 + [1] * 2, [0] * 10 + [1] * 10, ""),
        ([0] * 20, [0] * 20, ""),
        ([0] * 20, [0] * 18 + [1] * 2, ""),
        ([0] * 20, [0] * 17 + [1] * 3, "of which 85% are"),
        ([], [], ""),
    ],
)
def test_a_constant_predictor_is_named_unless_the_images_are_like_that(predicted, true, described):
    from leukemia_nb.models.classifier import _describe_constant_predictor

    names = np.array(["Normal", "Pre-B"])
    found = _describe_constant_predictor(np.eye(2)[np.array(predicted, int)], names[np.array(true, int)], names)
    assert described in found and bool(found) == bool(described)


def test_fit_warns_of_a_constant_predictor_and_the_folder_keeps_it(dataset, tmp_path):
    with pytest.warns(RuntimeWarning, match="stub: constant predictor: predicts 'Pro-B' for 100%"):
        model = make_model("stub", image_size=32).fit(dataset)
    assert "'Pro-B'" in load_model(model.save(tmp_path / "stub")).constant_predictor_


def test_class_order_is_the_callers(dataset, tmp_path):
    order = ["Pro-B", "Normal", "Pre-B"]
    model = make_model("stub", image_size=32, classes=order).fit(dataset)
    assert model.predict([np.zeros((8, 8, 3), np.uint8)])[0] == "Pre-B"
    assert load_model(model.save(tmp_path / "stub")).classes_.tolist() == order


def test_classes_that_do_not_fit_the_dataset_are_named(dataset):
    with pytest.raises(ModelError, match="no training image of class 'Early Pre-B'"):
        make_model("stub", classes=["Normal", "Pre-B", "Pro-B", "Early Pre-B"]).fit(dataset)
    with pytest.raises(ModelError, match="class 'Pre-B' is not one of Normal, Pro-B"):
        make_model("stub", classes=["Normal", "Pro-B"]).fit(dataset)


def test_predictions_that_are_not_finite_are_an_error(trained):
    trained.row_ = np.array([1, np.nan, 1])
    with pytest.raises(ModelError, match="not finite"):
        trained.predict_proba([np.zeros((8, 8, 3), np.uint8)])


def test_saved_and_loaded_are_equal(trained, tmp_path):
    folder = trained.save(tmp_path / "models" / "Zellen µ")
    again = load_model(folder)
    image = [np.zeros((8, 8, 3), np.uint8)]
    np.testing.assert_array_equal(again.predict_proba(image), trained.predict_proba(image))
    assert again.get_params() == trained.get_params() and again.history_.equals(trained.history_) and again.best_epoch_ == 1
    assert sorted(path.name for path in folder.iterdir()) == ["history.csv", "model.json", "row.npy"]


def test_a_save_that_fails_leaves_the_old_model_and_nothing_else(trained, tmp_path, monkeypatch):
    trained.save(tmp_path / "stub")

    def full(self, folder):
        (folder / "row.npy").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(type(trained), "_save", full)
    with pytest.raises(OSError, match="No space left"):
        trained.save(tmp_path / "stub")
    assert [path.name for path in tmp_path.iterdir()] == ["stub"]
    load_model(tmp_path / "stub")


def test_saving_replaces_a_model_and_nothing_else(trained, tmp_path):
    for _ in range(2):
        trained.save(tmp_path / "stub")
    assert [path.name for path in tmp_path.iterdir()] == ["stub"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    with pytest.raises(ModelError, match="not the folder of a model"):
        trained.save(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "file, text", [("row.npy", "row.npy is missing or was changed"), ("model.json", "model.json is damaged")]
)
def test_files_that_were_changed_are_refused(trained, tmp_path, file, text):
    (trained.save(tmp_path / "stub") / file).write_bytes(b"{")
    with pytest.raises(ModelError, match=text):
        load_model(tmp_path / "stub")


def test_a_folder_without_model_json_is_no_model(tmp_path):
    with pytest.raises(ModelError, match="no model.json here"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "facts",
    [
        *(
            {"name": None},
            {"name": ["stub"]},
            {"name": "os"},
            {"files": None},
            {"files": "row.npy"},
            {"files": {"row.npy": None}},
        ),
        *({"files": {"../../secret": "0"}}, {"settings": None}, {"settings": []}, {"settings": {"epochs": "many"}}),
        *(
            {"settings": {"unknown": 1}},
            {"classes": None},
            {"classes": 3},
            {"weights_source": None},
            {"constant_predictor": None},
        ),
    ],
    ids=str,
)
def test_facts_that_somebody_has_changed_are_one_line(trained, tmp_path, facts):
    path = trained.save(tmp_path / "stub") / "model.json"
    changed = json.loads(path.read_text()) | facts
    path.write_text(json.dumps({name: value for name, value in changed.items() if value is not None}))
    with pytest.raises(ModelError, match=r"^[^\n]{10,400}$"):
        load_model(tmp_path / "stub")


@pytest.mark.parametrize("text", ["null", "3", '"x"', "[" * 100_000, '{"files": 1e999}', "\udcff"])
def test_a_model_json_that_is_something_else_is_one_line(trained, tmp_path, text):
    (trained.save(tmp_path / "stub") / "model.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=r"^[^\n]*model\.json is damaged[^\n]*$"):
        load_model(tmp_path / "stub")


def test_local_weights_takes_the_first_name_that_is_there(tmp_path, monkeypatch):
    monkeypatch.delenv("LEUKEMIA_NB_WEIGHTS", raising=False)
    assert local_weights("a.h5") is None
    monkeypatch.setenv("LEUKEMIA_NB_WEIGHTS", str(tmp_path))
    (tmp_path / "b.h5").touch()
    assert local_weights("", "a.h5", "b.h5") == tmp_path / "b.h5" and local_weights("a.h5") is None
    monkeypatch.setenv("LEUKEMIA_NB_WEIGHTS", str(tmp_path / "no"))
    with pytest.raises(ModelError, match="LEUKEMIA_NB_WEIGHTS=.*no is not a folder"):
        local_weights("a.h5")


def test_package_versions_are_of_installed_packages():
    assert list(package_versions("numpy", "no-such-package")) == ["numpy"]
