"""What all models share: registry, settings, image intake, history, the guard against collapse, folders."""

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from leukemia_nb.models import interface as models
from leukemia_nb.models.interface import (
    MODELS,
    History,
    ModelError,
    ImageClassifier,
    Images,
    collapsed_to,
    load_model,
    make_model,
    open_images,
    read_batches,
    resize_square,
)


class Stub(ImageClassifier):
    """Answers with one fixed row per image brightness; saves one file."""

    name = "stub"

    def _fit(self, train, validation, history):
        self.weights_source_, self.row_ = "made up", np.linspace(1, 2, len(self.classes_))
        while not history.stop:
            history.add(0.5, 1.0, 0.5, 1.0, 0.0)

    def _predict(self, batch):
        return self.row_ * (1 + batch.mean(axis=(1, 2, 3))[:, None])

    def _features(self, batch):
        return batch.mean(axis=(1, 2))

    def _save(self, folder):
        np.save(folder / "row.npy", self.row_)

    def _load(self, folder):
        self.row_ = np.load(folder / "row.npy")


class Broken(Stub):
    name = "stub"

    def _save(self, folder):
        np.save(folder / "row.npy", self.row_)
        raise OSError("No space left on device")


@pytest.fixture(autouse=True)
def stub_registered(monkeypatch):
    monkeypatch.setitem(MODELS, "stub", models.ModelEntry("Stub", __name__, "Stub", "numpy"))


@pytest.fixture()
def images():
    rng = np.random.default_rng(0)
    return Images(rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8), ["Normal", "Pre-B", "Pro-B"] * 2, size=32)


@pytest.fixture()
def trained(images):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stub = Stub(image_size=32, epochs=3)
        stub.fit(images, images)
    return stub


def test_the_seven_models_in_the_order_of_the_deck():
    assert [m for m in MODELS if m != "stub"][:7] == [
        "efficientnet_b0",
        "mobilenet_v2",
        "nasnet_mobile",
        "dual_channel",
        "yolov8",
        "yolo11",
        "yolo12",
    ]
    assert MODELS["yolo12"].framework == "torch" and MODELS["dual_channel"].framework == "keras"


def test_import_brings_no_framework_and_no_scikit_learn():
    code = "import sys, leukemia_nb.models.interface; print([m for m in ('tensorflow', 'keras', 'torch', 'sklearn') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=models.__file__.rsplit("/", 2)[0]
        ).stdout.strip()
        == "[]"
    )


def test_unknown_model_and_unknown_setting_are_named():
    with pytest.raises(ModelError, match="no model is called 'resnet'.*efficientnet_b0"):
        make_model("resnet")
    with pytest.raises(ModelError, match="unknown setting 'epoch'"):
        make_model("stub", epoch=3)


@pytest.mark.parametrize(
    "setting, text",
    [
        (dict(preprocessing="dekc"), "preprocessing='dekc'"),
        (dict(weights="imagenett"), "weights='imagenett'"),
        (dict(fine_tune="yes"), "fine_tune='yes'"),
        (dict(image_size=31), "image_size=31"),
        (dict(epochs=0), "epochs=0"),
        (dict(epochs=True), "epochs=True"),
        (dict(batch_size=2.5), "batch_size=2.5"),
        (dict(learning_rate=0), "learning_rate=0"),
        (dict(classes="Normal"), "list of different names"),
        (dict(classes=["A", "A"]), "list of different names"),
    ],
)
def test_bad_settings_are_refused_with_name_and_value(setting, text):
    with pytest.raises(ModelError, match=text):
        make_model("stub", **setting)


def test_scikit_learn_knows_it(trained, images):
    from sklearn.base import clone, is_classifier

    assert is_classifier(trained)
    copy = clone(trained)
    assert copy.get_params() == trained.get_params() and not hasattr(copy, "classes_")
    assert trained.score(images, images.labels) == pytest.approx(1 / 3)


def test_subclass_settings_join_the_shared_ones():
    class More(Stub):
        def __init__(self, *, method="kmeans", **settings):
            super().__init__(**settings)
            self.method = method

    assert More(method="nucleus", epochs=2).get_params()["method"] == "nucleus"
    assert set(More().get_params()) == set(Stub().get_params()) | {"method"}


@settings(max_examples=30, deadline=None)
@given(arrays(np.uint8, st.tuples(st.integers(1, 60), st.integers(1, 60), st.just(3))), st.integers(1, 48))
def test_any_size_becomes_a_square_within_its_range(image, size):
    square = resize_square(image, size)
    assert square.shape == (size, size, 3) and square.dtype == np.uint8
    assert square.min() >= image.min() and square.max() <= image.max()


def test_squashing_keeps_the_border():
    image = np.zeros((60, 80, 3), np.uint8)
    image[:, :8] = 200
    assert resize_square(image, 40)[:, :3].min() >= 190


@pytest.mark.parametrize("image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3))])
def test_only_uint8_rgb_is_taken(image):
    with pytest.raises(ModelError, match="must be uint8 RGB"):
        resize_square(image, 8)


def test_arrays_lists_pairs_and_sources_give_the_same_answers(trained, images):
    expected = trained.predict_proba(images)
    array = images.images
    assert np.array_equal(trained.predict_proba(array), expected)
    assert np.array_equal(trained.predict_proba(list(array)), expected)
    assert np.array_equal(trained.predict_proba(np.stack([array, array * 0], axis=1)), expected)
    assert trained.predict_proba([]).shape == (0, 3)


def test_a_list_may_hold_several_sizes(trained):
    answers = trained.predict_proba([np.zeros((40, 50, 3), np.uint8), np.zeros((100, 20, 3), np.uint8)])
    assert answers.shape == (2, 3) and answers.dtype == np.float32
    np.testing.assert_allclose(answers.sum(axis=1), 1, atol=1e-6)


def test_one_image_is_not_taken_for_many():
    with pytest.raises(ModelError, match="one image as a list of one"):
        open_images(np.zeros((30, 40, 3), np.uint8))


def test_batches_hold_every_row_once_and_resize():
    source = Images(np.arange(7, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8), size=8)
    batches = list(read_batches(source, 16, 3, rows=[6, 0, 3, 1]))
    assert [b.shape for b in batches] == [(3, 16, 16, 3), (1, 16, 16, 3)]
    assert np.concatenate(batches)[:, 0, 0, 0].tolist() == [6, 0, 3, 1]


def test_history_keeps_the_best_and_stops_after_patience():
    lines = []
    history = History(epochs=10, patience=2, log=lines.append)
    kept = [history.add(0.5, 1.0, 0.5, loss, 0.1) for loss in (1.0, 0.8, 0.9, 0.8)]
    assert kept == [True, True, False, False] and history.stop and history.best == 2 and len(lines) == 4
    assert list(history.table.columns) == ["epoch", "accuracy", "loss", "val_accuracy", "val_loss", "seconds"]


def test_history_survives_a_loss_that_is_not_a_number():
    history = History(epochs=10, patience=2)
    assert history.add(0.5, np.nan, 0.5, np.nan, 0.1) and not history.add(0.5, np.nan, 0.5, np.nan, 0.1)
    history.add(0.5, np.nan, 0.5, np.nan, 0.1)
    assert history.stop


@pytest.mark.parametrize(
    "answers, truth, collapsed",
    [
        ([0] * 20, [0] * 10 + [1] * 10, True),
        ([0] * 19 + [1], [0] * 10 + [1] * 10, True),
        ([0] * 17 + [1] * 3, [0] * 10 + [1] * 10, False),
        ([0] * 20, [0] * 20, False),
        ([0] * 20, [0] * 18 + [1] * 2, False),
    ],
)
def test_collapse_is_named_unless_the_truth_is_like_that(answers, truth, collapsed):
    names = np.array(["Normal", "Pre-B"])
    message = collapsed_to(np.eye(2)[answers], names[truth], names)
    assert message.startswith("collapsed: answers 'Normal'") if collapsed else message == ""


def test_fit_warns_of_collapse_and_the_folder_remembers(images, tmp_path):
    stub = Stub(image_size=32, epochs=2)
    with pytest.warns(RuntimeWarning, match="answers 'Pro-B' to 100%"):
        stub.fit(images, images)
    facts = json.loads((stub.save(tmp_path / "stub") / "model.json").read_text())
    assert "'Pro-B'" in facts["collapsed"] and facts["classes"] == ["Normal", "Pre-B", "Pro-B"]
    assert "'Pro-B'" in load_model(tmp_path / "stub").collapsed_


def test_class_order_is_kept_as_given(images, tmp_path):
    order = ["Pro-B", "Normal", "Pre-B"]
    with pytest.warns(RuntimeWarning, match="collapsed"):
        stub = Stub(image_size=32, epochs=1, classes=order)
        stub.fit(images, images)
    assert stub.classes_.tolist() == order and stub.predict(images)[0] == "Pre-B"
    assert load_model(stub.save(tmp_path / "stub")).classes_.tolist() == order


def test_training_refuses_what_cannot_work(images):
    with pytest.raises(ModelError, match="0 training"):
        Stub(image_size=32).fit(Images([], [], 32), images)
    with pytest.raises(ModelError, match="no labels"):
        Stub(image_size=32).fit(Images(images.images), images)
    with pytest.raises(ModelError, match="no training image of class 'Early Pre-B'"):
        Stub(image_size=32, classes=["Normal", "Pre-B", "Pro-B", "Early Pre-B"]).fit(images, images)
    with pytest.raises(ModelError, match="class 'Pre-B' is not one of Normal, Pro-B"):
        Stub(image_size=32, classes=["Normal", "Pro-B"]).fit(images, images)
    with pytest.raises(ModelError, match="not trained"):
        Stub().predict_proba(images)
    with pytest.raises(ModelError, match="not trained"):
        Stub().save("nowhere")


def test_answers_that_are_not_numbers_are_an_error(trained, images):
    trained.row_ = np.array([1, np.nan, 1])
    with pytest.raises(ModelError, match="not finite"):
        trained.predict_proba(images)


def test_saved_and_loaded_give_identical_answers(trained, images, tmp_path):
    again = load_model(trained.save(tmp_path / "models" / "Zellen µ"))
    assert np.array_equal(again.predict_proba(images), trained.predict_proba(images))
    assert again.get_params() == trained.get_params() and again.history_.equals(trained.history_)


def test_a_failed_save_leaves_the_old_model_and_no_rubbish(trained, images, tmp_path):
    trained.save(tmp_path / "stub")
    trained.__class__ = Broken
    with pytest.raises(OSError, match="No space left"):
        trained.save(tmp_path / "stub")
    assert [p.name for p in tmp_path.iterdir()] == ["stub"]
    load_model(tmp_path / "stub")


def test_saving_twice_replaces_and_saving_over_other_things_is_refused(trained, tmp_path):
    for _ in range(2):
        trained.save(tmp_path / "stub")
    assert [p.name for p in tmp_path.iterdir()] == ["stub"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    with pytest.raises(ModelError, match="not a model's folder"):
        trained.save(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "file, content, text",
    [
        ("row.npy", b"cut", "row.npy is missing or not what was saved"),
        ("model.json", b"{", "model.json is damaged"),
        ("model.json", b"[]", "model.json is damaged"),
    ],
)
def test_damaged_folders_are_refused(trained, tmp_path, file, content, text):
    (trained.save(tmp_path / "stub") / file).write_bytes(content)
    with pytest.raises(ModelError, match=text):
        load_model(tmp_path / "stub")


def test_a_folder_without_model_json_is_no_model(tmp_path):
    with pytest.raises(ModelError, match="no model.json here"):
        load_model(tmp_path)


def changed(folder, **facts):
    """A saved model's facts as somebody has changed them; None takes one out."""
    known = json.loads((folder / "model.json").read_text())
    known.update(facts)
    (folder / "model.json").write_text(json.dumps({name: value for name, value in known.items() if value is not None}))


@pytest.mark.parametrize(
    "facts",
    [
        {"name": None},
        {"name": ["stub"]},
        {"name": {}},
        {"name": "os"},
        {"files": None},
        {"files": []},
        {"files": "row.npy"},
        {"files": {"row.npy": None}},
        {"files": {"../../secret": "0"}},
        {"settings": None},
        {"settings": []},
        {"settings": "x"},
        {"settings": {"epochs": "many"}},
        {"settings": {"learning_rate": "fast"}},
        {"settings": {"image_size": [1]}},
        {"settings": {"unknown": 1}},
        {"classes": None},
        {"classes": 3},
        {"weights_source": None},
        {"collapsed": None},
        {"best_epoch": None},
    ],
    ids=str,
)
def test_facts_that_somebody_has_changed_are_one_line(trained, tmp_path, facts):
    changed(trained.save(tmp_path / "stub"), **facts)
    with pytest.raises(ModelError, match=r"^[^\n]{10,400}$"):
        load_model(tmp_path / "stub")


@pytest.mark.parametrize("text", ["null", "3", '"x"', "[" * 100_000, '{"files": 1e999}', "\udcff"])
def test_a_model_json_that_is_something_else_is_one_line(trained, tmp_path, text):
    trained.save(tmp_path / "stub")
    (tmp_path / "stub" / "model.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=r"^[^\n]*model\.json is damaged[^\n]*$"):
        load_model(tmp_path / "stub")


class Runs:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return eval, (f"open({self.mark!r}, 'w')",)


def test_pickled_objects_in_the_cell_models_arrays_are_refused_and_not_run(trained, tmp_path):
    folder = trained.save(tmp_path / "cells")
    (folder / "row.npy").unlink()
    np.savez(folder / "cells.npz", shares=np.array([Runs(str(tmp_path / "ran"))], dtype=object), temperature=1.0)
    changed(folder, name="cells", settings={}, files={"cells.npz": models.file_sha256(folder / "cells.npz")})
    with pytest.raises(ModelError, match=r"^[^\n]*does not hold a whole model[^\n]*pickle[^\n]*$"):
        load_model(folder)
    assert not (tmp_path / "ran").exists()
