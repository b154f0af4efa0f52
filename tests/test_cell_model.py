"""The single-cell model: it is given cells and nothing else, and it is a classifier like the others."""

import shutil

import cv2
import numpy as np
import pytest

from leukemia_nb.data.images import write_image
from leukemia_nb.data.manifest import CLASSES
from leukemia_nb.data.synthetic import make_smear
from leukemia_nb.models.interface import MODELS, ModelError, load_model, make_model

pytestmark = pytest.mark.filterwarnings("ignore:.*constant predictor:RuntimeWarning")


def crops_of(label, seed):
    """Crops and masks of a synthetic field."""
    from leukemia_nb.data.images import resize_square
    from leukemia_nb.processing.cells import cell_crops

    return cell_crops(resize_square(make_smear(label, seed=seed, height=336, width=448).image, 224))


@pytest.fixture(scope="module")
def cell_dataset(tmp_path_factory):
    from leukemia_nb.testing import dummy_dataset

    return dummy_dataset(tmp_path_factory.mktemp("cells") / "dataset", per_class=12, size=224)


@pytest.fixture(scope="module")
def model(cell_dataset):
    return make_model("cells", classes=CLASSES, epochs=6, seed=3).fit(cell_dataset)


def test_no_images_have_no_cells():
    from leukemia_nb.models.cell_model import describe_cells

    found = describe_cells([])
    assert found.features.shape == (0, 39) and found.image_index.shape == (0,) and found.n_images == 0


@pytest.fixture(scope="module")
def test_pairs(cell_dataset):
    from leukemia_nb.processing.dataset import Pairs

    return Pairs(cell_dataset, "test")


def test_grey_and_normalised_cells_have_no_colour_of_their_own():
    from leukemia_nb.models.cell_model import _recolour_cell

    random = np.random.default_rng(0)
    for crop, mask in zip(*crops_of("Pro-B", 3)):
        assert np.ptp(_recolour_cell(crop, mask, "grey", random).astype(int), axis=2).max() <= 3
        lab = cv2.cvtColor(_recolour_cell(crop, mask, "normalised", random), cv2.COLOR_RGB2LAB)[mask].mean(axis=0)
        assert np.abs(lab - (135, 158, 100)).max() < 8
        assert np.array_equal(_recolour_cell(crop, mask, "own", random), crop)
    with pytest.raises(ValueError, match="unknown colours 'blue'"):
        _recolour_cell(crop, mask, "blue", random)


def test_transferred_colours_are_the_others_and_differences_between_cells_stay():
    from leukemia_nb.models.cell_model import _transfer_colours
    from leukemia_nb.processing.colour import colour_statistics

    def statistics(crops, masks):
        return colour_statistics(np.concatenate(crops), np.concatenate(masks))

    (crops, masks), donor = crops_of("Pre-B", 3), crops_of("Normal", 3)
    moved = _transfer_colours(crops, masks, donor)
    assert moved.dtype == np.uint8 and moved.shape == crops.shape
    np.testing.assert_allclose(statistics(moved, masks), statistics(*donor), atol=3)
    lightness = [[cv2.cvtColor(c, cv2.COLOR_RGB2LAB)[m][:, 0].mean() for c, m in zip(some, masks)] for some in (crops, moved)]
    assert np.corrcoef(*lightness)[0, 1] > 0.95
    assert np.abs(_transfer_colours(crops, masks, (crops, masks)).astype(int) - crops)[masks].mean() < 2


def test_colour_statistics_and_transfer_of_two_pixels():
    from leukemia_nb.processing.colour import colour_statistics, reinhard_transfer

    image = np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)
    np.testing.assert_allclose(colour_statistics(image), [[127.5, 128, 128], [127.5, 0, 0]])
    np.testing.assert_allclose(colour_statistics(image, np.array([[False, True]])), [[255, 128, 128], [0, 0, 0]])
    own = colour_statistics(image)
    target = np.array([[100.0, 128, 128], [25.5, 0, 0]])
    lab = cv2.cvtColor(reinhard_transfer(image, own, target), cv2.COLOR_RGB2LAB)
    assert np.abs(lab[..., 0].astype(int) - [[68, 132]]).max() <= 1  # stretched by 0.25, the least, and not by 0.2


def test_training_gives_each_class_in_the_colours_of_every_class():
    from leukemia_nb.models.cell_model import _augment_colours

    seen = [crops_of(label, seed) for label in CLASSES for seed in (4, 5)]
    nothing = np.zeros((0, 48, 48, 3), np.uint8), np.zeros((0, 48, 48), bool)
    found = _augment_colours([*seen, nothing], np.array([0, 0, 1, 1, 2, 2, 2]))
    assert len(found) == 3 + 3 + 3 and all(cells.n_images == 7 for cells in found)
    assert np.bincount(found[3].image_index).max() <= 5
    means = [[cells.features[cells.image_index // 2 == k][:, -6:-3].mean(axis=0) for k in range(3)] for cells in found]
    apart = [np.ptp(by_class, axis=0).sum() for by_class in means]  # how far the classes' colours lie from each other
    assert max(apart[-3:]) < 0.5 * apart[0], "colour still separates the classes"
    for target, moved in enumerate(means[-3:]):
        assert np.abs(np.mean(moved, axis=0) - means[0][target]).sum() < 0.5 * apart[0], "not the colours of that class"


def test_aggregated_cells_are_mean_and_deviation():
    from leukemia_nb.models.cell_model import Cells, aggregate_cells

    values, image = np.random.default_rng(0).normal(size=(9, 4)), np.array([0, 0, 0, 1, 1, 1, 1, 3, 3])
    found = aggregate_cells(Cells(values, image, 4))
    np.testing.assert_allclose(found[1], np.r_[values[3:7].mean(0), values[3:7].std(0)])
    assert (found[2] == 0).all() and found.shape == (4, 8)


def test_it_learns_cells_and_ignores_the_scale_bar(model, test_pairs):
    images = test_pairs.read(slice(None))
    assert model.score(images, test_pairs.labels) >= 0.66
    covered = images.copy()
    covered[:, -20:, -40:] = 255
    assert (model.predict(covered) == model.predict(images)).mean() >= 0.8


def test_prepared_cells_give_the_prediction_of_cells_found_anew(model, test_pairs):
    np.testing.assert_allclose(model.predict_proba(test_pairs), model.predict_proba(test_pairs.read(slice(None))), atol=1e-6)
    one_by_one = np.concatenate([model.predict_proba(test_pairs.read([i])) for i in range(len(test_pairs))])
    np.testing.assert_allclose(one_by_one, model.predict_proba(test_pairs), atol=1e-6)
    assert model.extract_features(test_pairs).shape == (len(test_pairs), 78)


def test_history_and_temperature_are_of_the_best_epoch(model, cell_dataset):
    from scipy.special import softmax

    from leukemia_nb.processing.dataset import Pairs

    val = Pairs(cell_dataset, "val")
    scores, y = model.log_scores(model.extract_cells(val)), np.searchsorted(CLASSES, val.labels)
    loss = [-np.log(softmax(scores / t, axis=1)[np.arange(len(y)), y]).mean() for t in (1.0, model.temperature_)]
    assert loss[0] == pytest.approx(model.history_["val_loss"].min(), rel=1e-6) and loss[1] <= loss[0]
    assert model.best_epoch_ == model.history_["val_loss"].idxmin() + 1
    assert (scores.argmax(axis=1) == y).mean() == pytest.approx(model.history_["val_accuracy"][model.best_epoch_ - 1])


def test_the_same_seed_gives_the_same_model(model, cell_dataset, test_pairs):
    again = make_model("cells", classes=CLASSES, epochs=6, seed=3).fit(cell_dataset)
    np.testing.assert_array_equal(again.predict_proba(test_pairs), model.predict_proba(test_pairs))


def test_saved_without_pickle_and_read_back(model, test_pairs, tmp_path):
    loaded = load_model(model.save(tmp_path / "cells"))
    np.testing.assert_array_equal(loaded.predict_proba(test_pairs), model.predict_proba(test_pairs))
    assert "class_proportions" in np.load(tmp_path / "cells" / "cells.npz", allow_pickle=False)


def test_an_image_without_cells_is_given_the_class_proportions(model):
    expected = np.tile(model.class_proportions_, (2, 1))
    np.testing.assert_allclose(model.predict_proba(np.full((2, 64, 64, 3), 240, np.uint8)), expected, atol=1e-5)


def test_other_colours_change_the_features(model, test_pairs):
    own, grey = model.extract_cells(test_pairs), model.extract_cells(test_pairs, "grey")
    assert np.array_equal(own.image_index, grey.image_index) and not np.allclose(own.features, grey.features)


def test_a_class_whose_training_images_have_no_cell_is_named(cell_dataset, tmp_path):
    shutil.copytree(cell_dataset.parent, tmp_path, dirs_exist_ok=True)
    files = list((tmp_path / "dataset" / "cells" / "train" / "Pre-B").glob("*.png"))
    for file in files:
        write_image(file, np.zeros((224, 224), np.uint16))
    assert files
    with pytest.raises(ModelError, match="no white blood cell is found in any training image of class Pre-B"):
        make_model("cells", classes=CLASSES, epochs=1).fit(tmp_path / "dataset")


def test_two_classes(tmp_path):
    from leukemia_nb.processing.dataset import Pairs
    from leukemia_nb.testing import dummy_dataset

    folder = dummy_dataset(tmp_path / "dataset", per_class=8, size=224, classes=("Normal", "Pre-B"))
    model, test = make_model("cells", epochs=4).fit(folder), Pairs(folder, "test")
    assert model.predict_proba(test).shape == (4, 2) and np.allclose(model.predict_proba(test).sum(axis=1), 1)
    assert MODELS["cells"].title == "Single-cell model"
