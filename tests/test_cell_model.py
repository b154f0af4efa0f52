"""The cell-centred model: it sees cells and nothing else, and it is a classifier like the others."""

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from leukemia_nb.models.cell_model import (
    COLOURS,
    FEATURE_NAMES,
    CellModel,
    cell_colours,
    cell_crops,
    describe,
    exchange_colours,
    aggregate_cells,
    recolour,
    refine_mask,
)
from leukemia_nb.audit.cue_conflict import make_composites
from leukemia_nb.data.manifest import CLASSES
from leukemia_nb.models.interface import MODELS, Images, load_model, make_model
from leukemia_nb.data.synthetic import smear


def small(label, seed, **settings):
    """A synthetic field as the models see it."""
    return cv2.resize(smear(label, seed=seed, **settings).image, (224, 224), interpolation=cv2.INTER_AREA)


@pytest.fixture(scope="module")
def sources():
    labels = np.repeat(CLASSES, 8)
    images = np.stack([small(label, seed) for label, seed in zip(labels, [*range(8)] * 3)])
    hidden = np.arange(24) % 8 >= 6
    return Images(images[~hidden], labels[~hidden]), Images(images[hidden], labels[hidden])


@pytest.fixture(scope="module")
def model(sources):
    fitted = CellModel(classes=CLASSES, epochs=6, seed=3)
    fitted.fit(*sources)
    return fitted


def test_measures_depend_on_nothing_outside_the_mask():
    crops, masks = cell_crops(small("Pre-B", 1))
    random = np.random.default_rng(0)
    for crop, mask in zip(crops, masks):
        noise = random.integers(0, 256, crop.shape).astype(np.uint8)
        np.testing.assert_array_equal(describe(crop, mask), describe(np.where(mask[..., None], crop, noise), mask))
        assert len(describe(crop, mask)) == len(FEATURE_NAMES) == 39


def test_measures_do_not_change_when_a_cell_is_mirrored():
    crops, masks = cell_crops(small("Normal", 2))
    shape = slice(0, 8)
    for crop, mask in zip(crops, masks):
        turned = describe(np.ascontiguousarray(crop[:, ::-1]), np.ascontiguousarray(mask[:, ::-1]))
        np.testing.assert_allclose(turned[shape], describe(crop, mask)[shape], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(turned[-6:], describe(crop, mask)[-6:], rtol=1e-3, atol=1e-3)


def test_grey_and_matched_cells_have_no_colour_of_their_own():
    crops, masks = cell_crops(small("Pro-B", 3))
    for crop, mask in zip(crops, masks):
        assert np.ptp(recolour(crop, mask, "grey").astype(int), axis=2).max() <= 3
        lab = cv2.cvtColor(recolour(crop, mask, "matched"), cv2.COLOR_RGB2LAB)[mask].mean(axis=0)
        assert np.abs(lab - (135, 158, 100)).max() < 8
    with pytest.raises(ValueError, match="unknown colours"):
        recolour(crops[0], masks[0], "blue")


def test_exchanged_colours_are_the_others_and_differences_between_cells_stay():
    crops, masks = cell_crops(small("Pre-B", 3))
    others = cell_colours(*cell_crops(small("Normal", 3)))
    moved = exchange_colours(crops, masks, others)
    assert moved.dtype == np.uint8 and moved.shape == crops.shape
    np.testing.assert_allclose(cell_colours(moved, masks), others, atol=3)
    lightness = [[cv2.cvtColor(c, cv2.COLOR_RGB2LAB)[m][:, 0].mean() for c, m in zip(some, masks)] for some in (crops, moved)]
    assert np.corrcoef(*lightness)[0, 1] > 0.95
    assert np.abs(exchange_colours(crops, masks, cell_colours(crops, masks)).astype(int) - crops)[masks].mean() < 2


def test_training_shows_each_class_in_the_colours_of_every_class():
    seen = [cell_crops(small(label, seed)) for label in CLASSES for seed in (4, 5)]
    model = CellModel(classes=CLASSES)
    model.classes_ = np.array(CLASSES)
    nothing = np.zeros((0, 48, 48, 3), np.uint8), np.zeros((0, 48, 48), bool)
    found = model._versions([*seen, nothing], np.array([0, 0, 1, 1, 2, 2, 2]))
    assert len(found) == 3 + 3 + 3 and all(n == 7 for _, _, n in found)
    means = [[cells[owner // 2 == k][:, -6:-3].mean(axis=0) for k in range(3)] for cells, owner, _ in found]
    apart = [np.ptp(by_class, axis=0).sum() for by_class in means]  # how far the classes' colours lie from each other
    assert max(apart[-3:]) < 0.5 * apart[0], "colour still tells the class"
    for target, moved in enumerate(means[-3:]):
        assert np.abs(np.mean(moved, axis=0) - means[0][target]).sum() < 0.5 * apart[0], "not the colours of that class"


def test_recoloured_cells_are_still_named(model, sources):
    recoloured, table = make_composites(sources[1].read(slice(None)), None, sources[1].labels, ["recolour cells"], seed=4)
    assert (model.predict(recoloured) == table.cells).mean() >= 0.6


def test_tighten_drops_a_pale_rim_and_never_everything():
    disk = np.hypot(*np.mgrid[-24:24, -24:24]) < 12
    crop = np.where(disk[..., None], (120, 60, 180), (235, 235, 225)).astype(np.uint8)
    wide = cv2.dilate(disk.astype(np.uint8), np.ones((9, 9))) > 0
    assert abs(int(refine_mask(crop, wide).sum()) - int(disk.sum())) < 0.03 * disk.sum()
    np.testing.assert_array_equal(refine_mask(np.full_like(crop, 200), wide), wide)


def test_population_is_mean_and_deviation():
    values, owner = np.random.default_rng(0).normal(size=(9, 4)), np.array([0, 0, 0, 1, 1, 1, 1, 3, 3])
    found = aggregate_cells(values, owner, 4)
    np.testing.assert_allclose(found[1], np.r_[values[3:7].mean(0), values[3:7].std(0)])
    assert (found[2] == 0).all()


def test_learns_cells_and_ignores_the_bar(model, sources):
    assert model.score(sources[1], sources[1].labels) >= 0.66
    covered = sources[1].read(slice(None)).copy()
    covered[:, -20:, -40:] = 255
    assert (model.predict(covered) == model.predict(sources[1])).mean() >= 0.8


def test_is_deterministic(model, sources):
    again = CellModel(classes=CLASSES, epochs=6, seed=3)
    again.fit(*sources)
    np.testing.assert_array_equal(again.predict_proba(sources[1]), model.predict_proba(sources[1]))


def test_saved_without_pickle_and_read_back(model, sources, tmp_path):
    loaded = load_model(model.save(tmp_path / "cells"))
    np.testing.assert_array_equal(loaded.predict_proba(sources[1]), model.predict_proba(sources[1]))
    np.load(tmp_path / "cells/cells.npz", allow_pickle=False)["shares"]


def test_a_image_without_cells_gets_the_class_shares(model):
    np.testing.assert_allclose(
        model.predict_proba(np.full((2, 64, 64, 3), 240, np.uint8)), model.shares_[None].repeat(2, 0), atol=1e-5
    )


def test_other_colours_and_batches(model, sources):
    for colours in COLOURS:
        np.testing.assert_allclose(model.predict_cells(sources[1], colours=colours).sum(axis=1), 1, atol=1e-5)
    one_by_one = np.concatenate([model.predict_proba(sources[1].read([i])) for i in range(len(sources[1]))])
    np.testing.assert_allclose(one_by_one, model.predict_proba(sources[1]), atol=1e-6)


def test_two_classes(sources):
    train, held_out = (Images(s.read(keep := np.flatnonzero(s.labels != "Pro-B")), s.labels[keep]) for s in sources)
    two = CellModel(epochs=4)
    two.fit(train, held_out)
    assert two.predict_proba(held_out).shape == (4, 2)


def test_is_registered():
    assert MODELS["cells"].title == "Cell-centred (ours)"
    assert isinstance(make_model("cells", weights="random", image_size=64), CellModel)


def test_benchmark_tests_on_no_near_duplicate_of_what_it_was_trained_or_chosen_on(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    from cell_model import chosen_on, five_folds

    random = np.random.default_rng(0)
    table = pd.DataFrame({"class": np.repeat(CLASSES, 120), "listed": np.arange(360) // 2})
    table["group"] = np.where(random.random(360) < 0.3, table["listed"] // 4, 1000 + table["listed"])  # some more are found
    table["group"] = table.groupby("listed")["group"].transform("first")
    folds = five_folds(table)
    assert sorted(np.concatenate(folds)) == list(range(360))
    fold = np.empty(360, int)
    for number, places in enumerate(folds):
        fold[places] = number
    assert pd.Series(fold).groupby(table["group"]).nunique().max() == 1
    assert set(fold[chosen_on(table)]) == {1}
