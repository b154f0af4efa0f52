"""Heatmaps of the models, their energy on the cells, and the check by shuffled weights."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from leukemia_nb.audit import saliency
from leukemia_nb.models.interface import ModelError, Images
from leukemia_nb.audit.saliency import (
    around_cells,
    background_colour,
    energy_inside,
    heatmap_of,
    occluded,
    occlusion_map,
    rank_correlation,
    saliency_figure,
    saliency_maps,
    saliency_summary,
    saliency_table,
)

ROOT = Path(__file__).resolve().parents[1]
SHARED_PART = """
    import json, sys
    import numpy as np
    from leukemia_nb.audit import saliency
    from leukemia_nb.models.interface import Images, make_model
    import warnings; warnings.simplefilter("ignore")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    source = Images(images, ["Normal", "Pre-B", "Pro-B"] * 2, size=64)

    def check_shuffled(model):
        return float(saliency.randomisation_check(model, source, repeats=1).abs().max().max())

    def check(name):
        model = make_model(name, weights="random", fine_tune=False, image_size=64, epochs=1, batch_size=6)
        model.fit(source, source)
        gradients_of = saliency._gradients_of(model)
        batch = images if len(model.channels) == 1 else source[:]
        before = model.predict_proba(source)
        targets = np.array([0, 1, 2, 0, 1, 2])
        maps, gradients = gradients_of(model, batch, targets)
        found = saliency.grad_cam(model, source)
        named = saliency.grad_cam(model, source, "Pro-B")
        shuffled = {}
        for part in ("head", "whole"):
            with saliency.shuffled_weights(model, part): shuffled[part] = float(np.abs(model.predict_proba(source) - before).max())
        logit = np.log(before.astype(np.float64))
        logit -= logit.mean(axis=1, keepdims=True)
        shift = (maps * gradients).sum(axis=(1, 2, 3, 4)) - logit[np.arange(6), targets]
        occluded = saliency.occlusion_map(model, source, grid=2)
        return dict(maps=maps.shape, shape=found.shape, dtype=str(found.dtype), low=float(found.min()), high=float(found.max()),
                    named=bool(np.array_equal(named[2], found[2]) == (model.predict(source)[2] == "Pro-B")),
                    finite=bool(np.isfinite(found).all()), shuffled=shuffled, same=bool(np.array_equal(model.predict_proba(source), before)),
                    shares=saliency.channel_shares(model, source).sum(axis=1).tolist(), shift=float(np.ptp(shift)),
                    occluded=[float(occluded.min()), float(occluded.max())], check=check_shuffled(model) if name in ("mobilenet_v2", "yolov8") else 0.0)

    print("FOUND" + json.dumps({name: check(name) for name in sys.argv[1:]}))
"""


def in_a_process(*names: str) -> dict:
    """torch and TensorFlow stay apart, whatever other test modules have loaded here."""
    clean = {key: value for key, value in os.environ.items() if key not in ("LEUKEMIA_NB_WEIGHTS", "YOLO_CONFIG_DIR")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SHARED_PART), *names],
        capture_output=True,
        text=True,
        env=clean | {"PYTHONPATH": str(ROOT)},
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("FOUND")[1])


@pytest.mark.parametrize(
    "names",
    [("efficientnet_b0", "mobilenet_v2", "nasnet_mobile", "dual_channel"), ("yolov8", "yolo11", "yolo12")],
    ids=["keras", "torch"],
)
def test_every_model_has_heatmaps(names):
    pytest.importorskip("ultralytics" if "yolov8" in names else "keras")
    for name, found in in_a_process(*names).items():
        channels = 2 if name == "dual_channel" else 1
        assert found["maps"][:4] == [6, channels, 2, 2], name
        assert found["shape"] == [6, 64, 64] and found["dtype"] == "float32" and found["finite"], name
        assert found["low"] == 0 and found["high"] == 1, name
        assert found["named"], name
        assert found["same"] and min(found["shuffled"].values()) > 1e-6, name  # shuffled, and put back to the bit
        assert np.allclose(found["shares"], 1), name
        assert found["occluded"][0] >= 0 and found["occluded"][1] <= 1, name
        assert found["check"] <= 1, name
        if name.startswith("yolo"):
            assert found["shift"] < 10, name
        elif name != "dual_channel":
            assert found["shift"] < 1e-2, name  # maps times gradients are the logit (the bias is 0 or tiny)


# ---- heatmaps


@given(hnp.arrays(np.float64, (3, 7, 7), elements=st.floats(-1e6, 1e6)), st.sampled_from([7, 32, 224]))
def test_heatmaps_are_between_0_and_1_and_reach_1_or_are_empty(weights, size):
    found = heatmap_of(weights, size)
    assert found.shape == (3, size, size) and found.dtype == np.float32 and found.min() >= 0
    for one, maps in zip(weights, found):
        assert maps.max() == (1 if one.max() > 0 else 0)


@given(
    hnp.arrays(np.float64, (1, 4, 4), elements=st.floats(-100, 100).map(lambda x: round(x, 3))), st.sampled_from([1e-6, 0.5, 1e6])
)
def test_scale_of_the_weights_does_not_count(weights, factor):
    np.testing.assert_allclose(heatmap_of(weights, 16), heatmap_of(weights * factor, 16), atol=1e-5)


def test_not_finite_is_empty():
    assert heatmap_of(np.array([[[1.0, np.nan], [np.inf, 2]]]), 8).max() == 0


# ---- energy


@given(st.integers(0, 31), st.integers(0, 31))
def test_all_energy_inside_or_outside(row, column):
    mask, heat = np.zeros((32, 32), bool), np.zeros((32, 32), np.float32)
    mask[row, column] = heat[row, column] = 1
    assert energy_inside(heat, mask, margin=0)[0] == 1 and energy_inside(heat, ~mask, margin=0)[0] == 0
    assert energy_inside(heat, mask, margin=0)[2] == pytest.approx(1024)


def test_flat_map_is_chance_and_the_rim_belongs_to_the_cell():
    mask = np.zeros((100, 100), bool)
    mask[40:60, 40:60] = True
    energy, area, ratio = energy_inside(np.full((100, 100), 0.3), mask)
    assert energy == pytest.approx(area) and ratio == pytest.approx(1) and area > mask.mean()
    assert around_cells(mask)[38, 50] and not around_cells(mask)[36, 50]
    assert np.array_equal(around_cells(mask, 0), mask) and np.array_equal(around_cells(mask * 7), around_cells(mask))


def test_nothing_to_measure_is_not_zero():
    assert np.isnan(energy_inside(np.zeros((8, 8)), np.ones((8, 8), bool))[0])
    energy, area, ratio = energy_inside(np.ones((8, 8)), np.zeros((8, 8), bool))
    assert (energy, area) == (0, 0) and np.isnan(ratio)
    with pytest.raises(ValueError, match=r"heatmap \(8, 8\) and mask \(9, 8\) differ in size"):
        energy_inside(np.ones((8, 8)), np.ones((9, 8), bool))


# ---- occlusion


class Corner:
    """Reads the red of the top-left quarter and nothing else."""

    image_size, classes_ = 32, np.array(["no", "yes"])
    seen = 0

    def predict_proba(self, images):
        self.seen += len(images)
        p = 1 / (1 + np.exp(-(images[:, :16, :16, 0].mean(axis=(1, 2)) - 128) / 20))
        return np.stack([1 - p, p], axis=1).astype(np.float32)

    def predict(self, images):
        return self.classes_[self.predict_proba(images).argmax(axis=1)]


@pytest.fixture()
def red_corner():
    images = np.full((2, 32, 32, 3), 60, np.uint8)
    images[0, :16, :16, 0] = 180
    return images


def test_occlusion_finds_what_is_read_and_only_for_the_class_it_speaks_for(red_corner):
    maps = occlusion_map(Corner(), red_corner, "yes", grid=2)
    assert maps[0, 4, 4] == 1 and maps[0, 20:, 20:].max() < 0.3 and maps[1].max() == 0
    assert occlusion_map(Corner(), red_corner, "no", grid=2)[0].max() == 0
    model = Corner()
    occlusion_map(model, red_corner, ["yes", "no"], grid=4)
    assert model.seen == 2 * 17


def test_occluded_covers_every_pixel_once_whatever_the_grid():
    pair = np.random.default_rng(0).integers(1, 200, (2, 30, 30, 3), dtype=np.uint8)
    copies = occluded(pair, np.array([255, 255, 255], np.uint8), grid=7)
    changed = (copies != pair).any(axis=-1)
    assert copies.shape == (49, 2, 30, 30, 3) and (changed.sum(axis=0) == 1).all()
    assert (copies[:, 1][changed[:, 1]] == 0).all() and (copies[:, 0][changed[:, 0]] == 255).all()


def test_background_colour_leaves_the_cells_out():
    image, cells = np.full((40, 40, 3), 220, np.uint8), np.zeros((40, 40), bool)
    cells[:30] = True
    image[cells] = 90
    assert list(background_colour(image, cells)) == [220] * 3
    assert list(background_colour(image, np.ones((40, 40), bool))) == [90] * 3


# ---- errors, table, figure


def test_what_cannot_be_is_said_in_words(red_corner):
    with pytest.raises(ModelError, match="has no feature maps of the whole image"):
        saliency_maps(Corner(), red_corner)
    with pytest.raises(ModelError, match="method 'lime' is not one of grad_cam, occlusion"):
        saliency_maps(Corner(), red_corner, method="lime")
    with pytest.raises(ModelError, match="'perhaps' is not a class of this model: no, yes"):
        occlusion_map(Corner(), red_corner, "perhaps")
    with pytest.raises(ModelError, match="1 classes to explain for 2 images"):
        occlusion_map(Corner(), red_corner, ["yes"])
    with pytest.raises(ModelError, match="part 'tail' is not one of head, whole"), saliency.shuffled_weights(Corner(), "tail"):
        pass


@given(st.permutations(range(36)))
def test_rank_correlation_sees_order_only(order):
    heat = np.reshape(order, (6, 6)) / 10
    assert rank_correlation(heat, np.exp(heat / 5)) == pytest.approx(1) and rank_correlation(heat, -heat) == pytest.approx(-1)
    assert np.isnan(rank_correlation(heat, np.zeros((6, 6))))


def test_table_and_summary(red_corner):
    masks = np.zeros((2, 32, 32), bool)
    masks[:, :16, :16] = True
    heat = np.zeros((2, 32, 32), np.float32)
    heat[0, :8, :8], heat[1, 20:, 20:] = 1, 1
    table = saliency_table(Corner(), red_corner, masks, heatmaps=heat)
    assert list(table.answer) == ["yes", "no"] and list(table.energy_inside) == [1, 0]
    assert list(table.other_maps) == [0, 1]  # what the other image's map has inside these cells
    empty = pd.concat([table, table.assign(energy_inside=np.nan, ratio=np.nan)], ignore_index=True)
    row = saliency_summary({"yolo11": empty}).iloc[0]
    assert (row.title, row.images, row.empty_maps, row.energy_inside) == ("YOLO11", 4, 2, 0.5)
    assert row.low <= row.energy_inside <= row.high and np.isnan(row.head_shuffled)
    assert row.interval == "percentile bootstrap of groups"
    alike = saliency_summary({"a": table.assign(pair=["x", "y"])}, groups={"x": 1, "y": 1}).iloc[0]
    assert alike.energy_inside == 0.5 and np.isnan(alike.low) and np.isnan(alike.high)  # one group: no interval
    none = saliency_summary({"a": table.assign(energy_inside=np.nan)}).iloc[0]
    assert none.empty_maps == 2 and np.isnan(none.energy_inside)


def test_figure_has_a_panel_for_each(red_corner):
    figure = saliency_figure(
        red_corner,
        {"a": np.zeros((2, 32, 32)), "b": np.ones((2, 32, 32))},
        np.eye(32, dtype=bool)[None].repeat(2, 0),
        np.array(["one", "two"]),
    )
    assert len(figure.axes) == 6 and figure.axes[3].get_ylabel() == "two" and figure.axes[1].get_title(loc="left") == "a"


def test_sources_and_lists_give_the_same_maps(red_corner):
    model = Corner()
    assert np.array_equal(
        occlusion_map(model, Images(red_corner, size=32), "yes", 2), occlusion_map(model, list(red_corner), "yes", 2)
    )
