"""Background patches hold no cell, the regions' features are those of the right pixels, and families take their own columns."""

import cv2
import numpy as np
import pandas as pd
import pytest

from leukemia_nb.audit.baselines import background_pixels
from leukemia_nb.audit.patches import FEATURE_FAMILIES, background_patches, cross_validate_regions, region_features, region_figure
from leukemia_nb.data.files import write_table
from leukemia_nb.data.synthetic import make_smear
from leukemia_nb.processing.cells import FEATURE_NAMES, cell_crops, cell_features, find_cells
from leukemia_nb.processing.dataset import Pairs
from leukemia_nb.study.cards import render
from leukemia_nb.testing import dummy_dataset


@pytest.fixture(scope="module")
def smear():
    image = make_smear("Pro-B", 3, 224, 224).image
    return image, find_cells(image), cell_crops(make_smear("Pro-B", 8, 224, 224).image)[1]


def test_no_pixel_of_a_patch_is_near_a_cell_or_in_the_corner_of_the_scale_bar(smear):
    image, cells, masks = smear
    free, padded = np.pad(background_pixels(image, cells), 24), np.pad(image, ((24, 24), (24, 24), (0, 0)))
    crops, kept = background_patches(image, cells, masks)
    assert len(crops) == len(masks) and (kept == masks).all()
    for crop, mask in zip(crops, kept):
        distance = cv2.matchTemplate(padded.astype(np.float32), crop.astype(np.float32), cv2.TM_SQDIFF)
        row, column = np.unravel_index(distance.argmin(), distance.shape)
        assert (padded[row : row + 48, column : column + 48] == crop).all() and free[row : row + 48, column : column + 48][
            mask
        ].all()


def test_only_masks_that_fit_are_kept_and_the_seed_chooses_the_places(smear):
    image, cells, masks = smear
    wide = np.ones((1, 48, 48), bool)
    full = np.ones_like(cells)
    full[100:140, 100:140] = 0  # less than a window, more than a cell after the margin
    crops, kept = background_patches(
        image, full, np.concatenate([wide, masks[:1] & False | (cv2.getGaussianKernel(48, 2) > 0.19)])
    )
    assert len(crops) == len(kept) <= 1 and not (kept == wide).all(axis=(1, 2)).any()
    assert background_patches(image, full, masks[:0])[0].shape == (0, 48, 48, 3)
    first, again, other = (background_patches(image, cells, masks, seed)[0] for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


@pytest.mark.parametrize("corner", [(slice(0, 6), slice(0, 6)), (slice(42, 48), slice(42, 48)), (slice(0, 6), slice(42, 48))])
def test_an_outline_at_the_edge_of_its_window_is_cut_anywhere_in_the_image(corner):
    """A large cell's outline need not be in the middle of its window, so that the window reaches far beyond the image."""
    image = np.full((60, 60, 3), 200, np.uint8)
    mask = np.zeros((300, 48, 48), bool)
    mask[:, *corner] = True
    crops, kept = background_patches(image, np.zeros((60, 60), np.int32), mask)
    assert crops.shape == (300, 48, 48, 3) and (kept == mask).all()
    assert (crops[kept] == 200).all() and (crops == 0).any()  # nothing from outside in the outline, some around it


def test_features_of_cells_and_rims_by_hand(smear):
    image, cells, _ = smear
    found = region_features([image, make_smear("Normal", 4, 224, 224).image])
    crops, masks = cell_crops(image, cells)
    rims = [mask & (cv2.erode(mask.astype(np.uint8), np.ones((3, 3))) == 0) for mask in masks]
    for region, parts in {"cells": masks, "rim": rims}.items():
        features = np.stack([cell_features(crop, mask) for crop, mask in zip(crops, parts)])
        np.testing.assert_allclose(found[region][0], np.r_[features.mean(axis=0), features.std(axis=0)], rtol=1e-3, atol=1e-4)
    assert not np.allclose(found["background"][0], found["cells"][0])


def test_an_image_without_cells_has_no_features_and_lends_no_mask():
    empty = np.full((224, 224, 3), 230, np.uint8)
    found = region_features([empty, make_smear("Pre-B", 1, 224, 224).image])
    assert not found["cells"][0].any() and not found["rim"][0].any() and found["cells"][1].any()
    assert not found["background"][1].any() and found["background"][0].any()  # the only other image has no cell
    with pytest.raises(ValueError, match="at least two"):
        region_features([empty])


def test_a_cell_that_fills_its_window_has_no_rim():
    """As in images of single cells: nothing of the outline is inside of the window."""
    image = np.full((224, 224, 3), (235, 205, 215), np.uint8)
    cv2.circle(image, (112, 112), 60, (110, 60, 160), -1)
    grain = np.random.default_rng(0).normal(0, 6, (2, 224, 224, 1))
    found = region_features(list((image + grain).clip(0, 255).astype(np.uint8)))
    assert found["cells"].any(axis=1).all() and not found["rim"].any() and np.isfinite(found["background"]).all()


def test_saved_cells_of_pairs_are_used(tmp_path):
    folder = dummy_dataset(tmp_path / "dataset", per_class=4, size=224, classes=("Normal", "Pre-B"))
    pairs = Pairs(folder)
    kept = pairs.table["flip"] == "none"
    pairs = Pairs(folder, table=pairs.table[kept])
    found, same = region_features(pairs, seed=3), region_features(pairs.read(slice(None)), seed=3)
    for region, values in found.items():
        np.testing.assert_allclose(values, same[region], atol=1e-4, err_msg=region)


def regions_of(informative, n=40, seed=0):
    "Features of noise, but for some that are the class."
    rng, labels = np.random.default_rng(seed), np.repeat(["Normal", "Pre-B"], n // 2)
    features = {region: rng.normal(size=(n, 78)).astype(np.float32) for region in ("cells", "rim", "background")}
    for region, column in informative:
        features[region][:, column] += 9 * (labels == "Pre-B")
    return features, pd.Series(labels, [f"{label}/{i}" for i, label in enumerate(labels)])


def test_a_family_takes_its_means_and_deviations_and_no_others():
    place = FEATURE_NAMES.index("mean A")
    for column in (place, place + 39):
        table = cross_validate_regions(*regions_of([("background", column)]), folds=3).set_index(["family", "region"])
        assert table.loc[("Colour", "background"), "accuracy"] > 0.8
        others = table.drop([("Colour", "background"), ("All features", "background")])
        assert others["accuracy"].max() < 0.8 and others["accuracy"].mean() < 0.6
    assert table["n_features"].groupby("family").first().to_dict() == {
        name: len(family) for name, family in FEATURE_FAMILIES.items()
    }


def test_images_without_a_region_are_left_out_of_all_and_groups_stay_together():
    features, y = regions_of([("cells", 0)])
    features["background"][:4] = 0
    table = cross_validate_regions(features, y, np.arange(40) // 2, folds=3).set_index("region")
    assert set(table["n_without"]) == {4} and set(table["n_images"]) == {36} and set(table["groups"]) == {18}
    assert set(table["chance"]) == {20 / 36}
    assert (table["low"] <= table["accuracy"]).all() and (table["accuracy"] <= table["high"]).all()
    two = cross_validate_regions(features, y, np.arange(40) // 10, folds=3)  # two groups of each class, so two folds
    assert two["accuracy"].notna().all() and set(two["groups"]) == {4}


def test_that_an_image_has_no_room_for_a_patch_does_not_count_for_its_class(tmp_path):
    """Images of one class are full of cells: what is missing in them must not predict it."""
    features, y = regions_of([])
    full = (y == "Pre-B").to_numpy() & (np.arange(40) % 4 > 0)
    features["background"][full] = 0
    table = cross_validate_regions(features, y, folds=3)
    assert set(table["n_without"]) == {15} and set(table["n_images"]) == {25}
    assert set(table["chance"]) == {20 / 25}  # of the images that are left
    assert table.query("region == 'background'")["low"].max() < 20 / 25
    features["background"][y == "Pre-B"] = 0
    none = cross_validate_regions(features, y, folds=3)
    assert none["accuracy"].isna().all() and set(none["n_images"]) == {20}
    region_figure(none)
    write_table(tmp_path / "metrics" / "background_patches.csv", none)
    text = render("{% import 'statements.md.j2' as s with context %}{{ s.background_patches() }}", tmp_path)
    assert "could not be compared" in text and "20 of 40" in text


def test_the_figure_marks_every_row_and_chance():
    table = cross_validate_regions(*regions_of([("cells", 0)]), folds=3)
    axis = region_figure(table).axes[0]
    assert [text.get_text() for text in axis.get_yticklabels()] == list(FEATURE_FAMILIES)
    marks = sorted(x for line in axis.lines if len(line.get_xdata()) == len(FEATURE_FAMILIES) for x in line.get_xdata())
    np.testing.assert_allclose(marks, sorted(table["accuracy"]))
    assert any(set(line.get_xdata()) == {table["chance"].iloc[0]} for line in axis.lines)


@pytest.mark.parametrize(("column", "said"), [(FEATURE_NAMES.index("mean A"), "does not show that"), (None, "not above")])
def test_the_sentence_says_what_the_background_patches_show(tmp_path, column, said):
    informative = [] if column is None else [("background", i) for i in range(column - 3, column + 3)]
    table = cross_validate_regions(*regions_of(informative), folds=3)
    write_table(tmp_path / "metrics" / "background_patches.csv", table)
    text = render("{% import 'statements.md.j2' as s with context %}{{ s.background_patches() }}", tmp_path)
    patches = table.query("region == 'background' and family == 'All features'").iloc[0]
    assert "left out" not in text and said in text and f"{100 * patches['accuracy']:.1f} %" in text
