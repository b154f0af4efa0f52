"""Changes of images that leave cells as they are, and the tables made of the answers."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from leukemia_nb.evaluation.metrics import clopper_pearson
from leukemia_nb.models.interface import Images
from leukemia_nb.audit.robustness import (
    CHANGES,
    changed,
    changes_figure,
    robustness_figure,
    robustness_predictions,
    robustness_table,
    rotate,
    scale_stains,
    shift_hue,
    stratified_sample,
)
from leukemia_nb.processing.segmentation import apply_mask, segment
from leukemia_nb.data.synthetic import smear

LEVELS = [(name, level) for name, change in CHANGES.items() for level in change.levels]
pixels = arrays(np.uint8, (1, 18, 22, 3))


@settings(max_examples=15, deadline=None)
@given(pixels)
def test_unchanged_levels_change_nothing(images):
    for name, change in CHANGES.items():
        assert np.abs(changed(images, name, change.unchanged).astype(int) - images).max() <= 1, name


@settings(max_examples=10, deadline=None)
@given(pixels, st.sampled_from(LEVELS))
def test_shape_type_and_input_stay(images, which):
    before = images.copy()
    after = changed(images, *which)
    assert after.shape == images.shape and after.dtype == np.uint8 and np.array_equal(images, before)


@pytest.mark.parametrize("size", [32, 96])
def test_pairs_change_together_and_stay_black_outside(size):
    image = smear("Pre-B", 4, size, size).image
    mask = segment(image)
    assert mask.any() and not mask.all()
    pair = np.stack([image, apply_mask(image, mask)])[None]
    for name, level in LEVELS:
        after = changed(pair, name, level)[0]
        assert np.array_equal(after[0], changed(image[None], name, level)[0])
        where = np.rot90(mask, int(level // 90)) if name == "rotation" and level % 90 == 0 else mask
        if name == "rotation" and level % 90:
            continue
        assert after[1][~where].max() == 0 and np.array_equal(after[1][where], after[0][where]), (name, level)


def test_rotation_makes_no_black_corner_and_comes_round():
    image = np.full((40, 60, 3), 200, np.uint8)
    for degrees in (10, 45, 90, 133):
        assert (rotate(image, degrees) == 200).all(), degrees
    random = np.random.default_rng(0).integers(0, 256, (24, 24, 3)).astype(np.uint8)
    turned = random
    for _ in range(4):
        turned = rotate(turned, 90)
    assert np.array_equal(turned, random) and not np.array_equal(rotate(random, 90), random)


def test_stains_act_on_density():
    # grey 128 has density 0.689 in every channel; doubling all stains doubles it: 255 * (128/255)**2 = 64.25
    assert scale_stains(np.full((2, 2, 3), 128, np.uint8), 2, 2, 2) == pytest.approx(64, abs=1)
    with pytest.raises(ValueError, match="must be above 0"):
        scale_stains(np.zeros((2, 2, 3), np.uint8), 1, -1)


def test_hue_goes_round_and_keeps_brightness():
    image = smear("Pro-B", 1, 48, 48).image
    assert np.abs(shift_hue(image, 360).astype(int) - image).max() <= 1
    assert np.abs(shift_hue(image, 20).max(axis=2).astype(int) - image.max(axis=2)).max() <= 1


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="no change is called 'smell'"):
        changed(np.zeros((1, 8, 8, 3), np.uint8), "smell", 1)
    with pytest.raises(ValueError, match=r"not float64 \(1, 8, 8, 3\)"):
        changed(np.zeros((1, 8, 8, 3)), "hue", 1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=4), st.integers(4, 80))
def test_sample_is_stratified(counts, n):
    labels = np.repeat([f"class {i}" for i in range(len(counts))], counts)
    rows = stratified_sample(labels, n)
    assert len(rows) == len(set(rows)) == min(n, len(labels)) and set(labels[rows]) == set(labels)
    share = {name: (labels[rows] == name).mean() for name in set(labels)}
    assert all(abs(share[name] - (labels == name).mean()) <= len(counts) / len(rows) for name in share)


class Brightest:
    "Answers by the mean brightness of the originals, or of the segmented twins."

    classes_ = np.array(["dark", "light"])

    def __init__(self, channels=("original",)):
        self.channels, self.seen = channels, []

    def predict_proba(self, images):
        self.seen.append(images.shape)
        light = (images if images.ndim == 4 else images[:, 0]).mean(axis=(1, 2, 3)) > 100
        return np.stack([~light, light], axis=1).astype(np.float32)


@pytest.fixture
def source():
    images = np.concatenate([np.full((6, 16, 16, 3), 90, np.uint8), np.full((4, 16, 16, 3), 110, np.uint8)])
    return Images(images, ["dark"] * 6 + ["light"] * 4, size=16)


def test_table_by_hand(source):
    table = robustness_table({"brightest": robustness_predictions(Brightest(), source, {"brightness": (0.8, 1.15)})})
    found = table.set_index("level")
    assert list(found.index) == [0.8, 1.0, 1.15] and (found["images"] == 10).all()
    assert found["right"].tolist() == [6, 10, 4]  # all dark, as they are, all light
    assert found["stay"].tolist() == [0.6, 1.0, 0.4]
    assert tuple(found.loc[0.8, ["low", "high"]]) == clopper_pearson(6, 10)
    assert found["chance"].tolist() == [0.6] * 3


def test_untouched_images_are_asked_once_in_batches(source):
    model = Brightest()
    table = robustness_predictions(model, source, {"hue": (10,), "blur": (1, 2)}, n=10, batch=4)
    assert model.seen == [(4, 16, 16, 3)] * 8 + [(2, 16, 16, 3)] * 4  # 3 batches x (untouched + 3 levels)
    assert len(table) == 10 * 5 and list(table.columns) == ["change", "level", "pair", "class", "p_dark", "p_light"]
    assert list(dict.fromkeys(table["change"])) == ["hue", "blur"]


def test_two_channel_models_get_pairs(source):
    model = Brightest(("original", "segmented"))
    robustness_predictions(model, source, {"jpeg": (20,)}, n=4)
    assert model.seen == [(4, 2, 16, 16, 3)] * 2
    with pytest.raises(ValueError, match="no change is called 'tea'"):
        robustness_predictions(model, source, {"tea": (1,)})


def test_figures_have_a_panel_a_change(source):
    table = robustness_table({"yolo11": robustness_predictions(Brightest(), source)})
    assert isinstance(table, pd.DataFrame) and table["change"].nunique() == len(CHANGES)
    shown = [axis.get_title(loc="left") for axis in robustness_figure(table).axes if axis.get_title(loc="left")]
    assert shown == [change.title for change in CHANGES.values()]
    assert len(changes_figure(smear("Normal", 1, 32, 32).image, {"hue": (10,)}).axes) == 2
