"""Corruptions that leave cells as they are, and the tables made of the predictions."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from leukemia_nb.audit.robustness import (
    CORRUPTIONS,
    clean_and_corrupted,
    _blur,
    _change_brightness,
    _compress,
    corrupt,
    robustness_figure,
    robustness_predictions,
    robustness_table,
    _rotate,
    _scale_stains,
    _shift_hue,
)
from leukemia_nb.data.synthetic import make_smear
from leukemia_nb.evaluation.uncertainty import clopper_pearson
from leukemia_nb.processing.segmentation import apply_mask, segment

SEVERITIES = [(name, severity) for name, corruption in CORRUPTIONS.items() for severity in corruption.severities]
pixels = arrays(np.uint8, (1, 18, 22, 3))


def test_the_registry():
    assert {name: (one.clean, one.severities) for name, one in CORRUPTIONS.items()} == {
        "hue": (0, (-20, -10, 10, 20)),
        "stain_balance": (1, (0.75, 1.33)),
        "stain_strength": (1, (0.6, 1.4)),
        "brightness": (1, (0.6, 0.8, 1.15)),
        "blur": (0, (1, 2, 3)),
        "jpeg": (100, (10, 20, 50)),
        "rotation": (0, (30, 90, 180)),
    }
    image = make_smear("Pre-B", 4, 96, 96).image
    for name, severity in SEVERITIES:
        assert np.abs(CORRUPTIONS[name].function(image, severity).astype(int) - image).mean() > 0.2, (name, severity)


@settings(max_examples=10, deadline=None)
@given(pixels)
def test_clean_severities_change_nothing(images):
    for name, corruption in CORRUPTIONS.items():
        assert np.abs(corrupt(images, name, corruption.clean).astype(int) - images).max() <= 1, name


@settings(max_examples=10, deadline=None)
@given(pixels, st.sampled_from(SEVERITIES))
def test_shape_type_and_input_stay(images, which):
    before = images.copy()
    after = corrupt(images, *which)
    assert after.shape == images.shape and after.dtype == np.uint8 and np.array_equal(images, before)


@pytest.mark.parametrize("size", [32, 96])
def test_pairs_change_together_and_stay_black_outside(size):
    image = make_smear("Pre-B", 4, size, size).image
    mask = segment(image)
    assert mask.any() and not mask.all()
    pair = np.stack([image, apply_mask(image, mask)])[None]
    for name, severity in SEVERITIES:
        after = corrupt(pair, name, severity)[0]
        assert np.array_equal(after[0], corrupt(image[None], name, severity)[0])
        if name == "rotation" and severity % 90:
            continue
        where = np.rot90(mask, int(severity // 90)) if name == "rotation" else mask
        assert after[1][~where].max() == 0 and np.array_equal(after[1][where], after[0][where]), (name, severity)


def test_soft_edges_of_a_segmented_image_stay_soft():
    pair = np.stack([np.full((4, 4, 3), 200, np.uint8), np.full((4, 4, 3), 50, np.uint8)])[None]
    assert (corrupt(pair, "brightness", 0.5)[0, 1] == 25).all()  # a quarter of the light, halved
    brighter = np.stack([np.full((4, 4, 3), 100, np.uint8), np.full((4, 4, 3), 120, np.uint8)])[None]
    assert (corrupt(brighter, "brightness", 1)[0, 1] == 100).all()  # never more than all of it


def test_rotation_makes_no_black_corner_and_comes_round():
    image = np.full((40, 60, 3), 200, np.uint8)
    for degrees in (10, 45, 90, 133):
        assert (_rotate(image, degrees) == 200).all(), degrees
    random = np.random.default_rng(0).integers(0, 256, (24, 24, 3)).astype(np.uint8)
    assert np.array_equal(_rotate(random, 90), np.rot90(random)) and np.array_equal(_rotate(random, 180), random[::-1, ::-1])
    wide = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    assert _rotate(wide, 90).shape == wide.shape and np.array_equal(_rotate(wide, 180), wide[::-1, ::-1])
    dot = np.zeros((41, 61, 3), np.uint8)
    dot[20, 40] = 255  # 10 right of the centre; anticlockwise by 90: 10 above it
    assert np.unravel_index(_rotate(dot, 90)[..., 0].argmax(), (41, 61)) == (10, 30)


def test_stains_act_on_density():
    # grey 128 has density 0.689 in every channel; doubling all stains doubles it: 255 * (128/255)**2 = 64.25
    assert _scale_stains(np.full((2, 2, 3), 128, np.uint8), 2, 2, 2) == pytest.approx(64, abs=1)
    image = make_smear("Pre-B", 1, 32, 32).image
    bluer, pinker = (CORRUPTIONS["stain_balance"].function(image, severity).mean(axis=(0, 1)) for severity in (1.33, 0.75))
    assert bluer[2] - bluer[0] > pinker[2] - pinker[0]
    assert np.array_equal(_scale_stains(image, 1.33, 1 / 1.33), CORRUPTIONS["stain_balance"].function(image, 1.33))
    assert np.array_equal(_scale_stains(np.zeros((2, 2, 3), np.uint8), 1, 1), np.ones((2, 2, 3)))
    from skimage.color import hed_from_rgb, rgb_from_hed

    stains = -np.log(np.array([120, 60, 160]) / 255) @ hed_from_rgb  # rows of the matrix: stains from densities
    expected = 255 * np.exp(-(stains * (2, 1, 1.5)) @ rgb_from_hed)
    assert _scale_stains(np.uint8([[[120, 60, 160]]]), 2, 1, 1.5)[0, 0] == pytest.approx(expected, abs=0.51)
    for factors in ((1, -1), (0, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match="must be above 0"):
            _scale_stains(image, *factors)


def test_hue_goes_round_and_keeps_brightness():
    image = make_smear("Pro-B", 1, 48, 48).image
    assert np.abs(_shift_hue(image, 360).astype(int) - image).max() <= 1
    assert np.abs(_shift_hue(image, 20).max(axis=2).astype(int) - image.max(axis=2)).max() <= 1
    assert _shift_hue(np.uint8([[[255, 0, 0]]]), 120).tolist() == [[[0, 255, 0]]]
    assert _shift_hue(np.uint8([[[255, 0, 0]]]), -120).tolist() == [[[0, 0, 255]]]
    # hue 276 of (120, 60, 160) becomes 316: blue is 60 + 100 (6 - 316 / 60)
    assert _shift_hue(np.uint8([[[120, 60, 160]]]), 40).tolist() == [[[160, 60, 133]]]


def test_brightness_blur_and_compression():
    assert _change_brightness(np.uint8([[[100, 200, 250]]]), 1.2).tolist() == [[[120, 240, 255]]]
    dot = np.zeros((224, 224, 3), np.uint8)
    dot[112, 112] = 255
    spread = _blur(np.minimum(dot.astype(int) * 255, 255).astype(np.uint8), 2)[112, :, 0].astype(float)
    assert spread[112] == pytest.approx(255 / (2 * np.pi * 4), abs=1)  # peak of a Gaussian of 2 pixels
    small = np.zeros((56, 56, 3), np.uint8)
    small[28, 28] = 255
    assert _blur(small, 4)[28, 28, 0] == pytest.approx(255 / (2 * np.pi), abs=3)  # 4 of 224 are 1 of 56
    image = make_smear("Pre-B", 1, 64, 64).image
    error = [np.abs(_compress(image, quality).astype(int) - image).mean() for quality in (100, 90, 40, 10)]
    assert (
        error[0] == 0
        and error == sorted(error)
        and _compress(image, 90)[..., 0].mean() == pytest.approx(image[..., 0].mean(), abs=2)
    )


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="no corruption is called 'smell'; there are hue, stain_balance"):
        corrupt(np.zeros((1, 8, 8, 3), np.uint8), "smell", 1)
    for images in (np.zeros((1, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), np.zeros((1, 8, 8, 4), np.uint8)):
        with pytest.raises(ValueError, match="images must be uint8"):
            corrupt(images, "hue", 1)


class Brightest:
    "Predicts by the mean brightness of the originals."

    classes_ = np.array(["dark", "light"])

    def __init__(self):
        self.seen = []

    def predict_proba(self, images):
        self.seen.append(images.shape)
        light = (images if images.ndim == 4 else images[:, 0]).mean(axis=(1, 2, 3)) > 100
        return np.where(np.stack([~light, light], axis=1), 0.75, 0.25).astype(np.float32)


@pytest.fixture
def sample():
    images = np.concatenate([np.full((6, 16, 16, 3), 90, np.uint8), np.full((4, 16, 16, 3), 110, np.uint8)])
    return images, pd.Series(["dark"] * 6 + ["light"] * 4, [f"p{i}" for i in range(10)])


def test_table_by_hand(sample):
    predictions = robustness_predictions(Brightest(), *sample, {"brightness": (0.8, 1.15)})
    found = robustness_table({"yolo11": predictions}).set_index("severity")
    assert list(found.index) == [0.8, 1.0, 1.15] and found["clean"].tolist() == [False, True, False]
    assert found["n_correct"].tolist() == [6, 10, 4] and found["n_images"].tolist() == [10] * 3  # all dark, clean, all light
    assert found["accuracy"].tolist() == found["agreement"].tolist() == [0.6, 1.0, 0.4]
    assert (
        tuple(found.loc[0.8, ["low", "high"]])
        == tuple(found.loc[0.8, ["agreement_low", "agreement_high"]])
        == clopper_pearson(6, 10)
    )
    assert (
        found["chance"].tolist() == [0.6] * 3 and found["confidence"].tolist() == [0.75] * 3 and set(found["title"]) == {"YOLO11"}
    )
    with pytest.raises(ValueError, match="no predictions"):
        robustness_table({})


def test_agreement_is_with_the_clean_prediction_not_the_truth(sample):
    images, labels = sample
    wrong = labels.map({"dark": "light", "light": "dark"})
    found = robustness_table({"a": robustness_predictions(Brightest(), images, wrong, {"brightness": (0.8,)})}).set_index(
        "severity"
    )
    assert found["n_correct"].tolist() == [4, 0] and found["agreement"].tolist() == [0.6, 1.0]


def test_clean_images_are_predicted_once(sample):
    model = Brightest()
    table = robustness_predictions(model, *sample, {"hue": (10,), "blur": (2, 1)})
    assert model.seen == [(10, 16, 16, 3)] * 4  # clean and 3 severities
    assert len(table) == 10 * 5 and list(table.columns) == ["corruption", "severity", "pair", "class", "p_dark", "p_light"]
    assert table.drop_duplicates(["corruption", "severity"])[["corruption", "severity"]].to_numpy().tolist() == [
        ["hue", 0.0], ["hue", 10.0], ["blur", 0.0], ["blur", 1.0], ["blur", 2.0],
    ]  # fmt: skip
    assert table["pair"].tolist() == sample[1].index.tolist() * 5


def test_pairs_are_corrupted_as_pairs(sample):
    model = Brightest()
    robustness_predictions(model, np.stack([sample[0]] * 2, axis=1), sample[1], {"jpeg": (20,)})
    assert model.seen == [(10, 2, 16, 16, 3)] * 2
    with pytest.raises(ValueError, match="no corruption is called 'tea'"):
        robustness_predictions(model, *sample, {"tea": (1,)})


def test_figures_have_a_panel_a_corruption(sample):
    predictions = robustness_predictions(Brightest(), *sample)
    table = robustness_table({"yolo11": predictions})
    assert table["corruption"].unique().tolist() == list(CORRUPTIONS)
    panels = [axis.get_title(loc="left") for axis in robustness_figure(table).axes]
    assert panels == [f"{one.title}\n{one.unit}" for one in CORRUPTIONS.values()]
    hue = predictions[predictions["corruption"] == "hue"]
    figure = robustness_figure(robustness_table({"a": hue, "b": hue}))
    assert [axis.get_ylabel() for axis in figure.axes if axis.get_ylabel()] == ["a\naccuracy", "b\naccuracy"]


def test_clean_images_stand_once_beside_the_corrupted(sample):
    table = robustness_predictions(Brightest(), *sample, {"hue": (10,), "blur": (2, 1), "jpeg": (20,)})
    found = clean_and_corrupted(table)
    assert found["images"].tolist() == ["clean"] * 10 + ["corrupted"] * 40
    assert (found[found["images"] == "clean"]["severity"] == 0).all() and found["pair"].nunique() == 10
    assert set(zip(found["corruption"][10:], found["severity"][10:])) == {("hue", 10), ("blur", 1), ("blur", 2), ("jpeg", 20)}


def test_the_table_says_whether_confidence_gives_the_errors_away(sample):
    found = robustness_table({"a": robustness_predictions(Brightest(), *sample, {"brightness": (0.8,)})}).set_index("severity")
    assert found["augrc"].tolist() == pytest.approx([0.2, 0])  # 4 of 10 wrong, one confidence for all: half the error rate
