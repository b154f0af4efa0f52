"""Heatmaps of the models, their energy on the cells, and the check by randomised weights."""

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
from leukemia_nb.audit.saliency import (
    energy_pointing_game,
    grad_cam,
    occlusion_map,
    saliency_figure,
    saliency_method,
    saliency_summary,
    saliency_table,
    _widen_cells,
)
from leukemia_nb.models.interface import ModelError

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
    import json, sys, tempfile, warnings
    from pathlib import Path
    import numpy as np
    from leukemia_nb.audit import saliency
    from leukemia_nb.models.interface import make_model
    from leukemia_nb.processing.dataset import Pairs
    from leukemia_nb.testing import dummy_dataset
    warnings.simplefilter("ignore")
    folder = dummy_dataset(Path(tempfile.mkdtemp()) / "dataset", per_class=4, size=64)
    pairs = Pairs(folder)

    def check(name):
        model = make_model(name, weights="random", fine_tune=False, image_size=64, epochs=1, batch_size=6).fit(folder)
        images = pairs[:6] if len(model.channels) == 2 else pairs.read(slice(0, 6))
        before, targets = model.predict_proba(images), np.array([0, 1, 2, 0, 1, 2])
        maps, weights = saliency._feature_maps(model, images, targets)
        logits = np.log(before.astype(np.float64))
        logits -= logits.mean(axis=1, keepdims=True)
        shift = (maps.mean(axis=(2, 3)) * weights).sum(axis=(1, 2)) - logits[np.arange(6), targets]
        found, named = saliency.grad_cam(model, images), saliency.grad_cam(model, images, "Pro-B")
        changed = {}
        for part in ("head", "all"):
            with saliency._randomised_weights(model, part):
                changed[part] = float(np.abs(saliency._feature_maps(model, images, targets)[1] - weights).max())
        same = np.array_equal(saliency._feature_maps(model, images, targets)[1], weights) and np.array_equal(model.predict_proba(images), before)
        occluded = saliency.occlusion_map(model, images[:2], grid=2)
        is_third = model.predict(images) == "Pro-B"
        table = saliency.saliency_table(model, images, np.ones((6, 64, 64), bool), found)
        return dict(maps=maps.shape, weights=weights.shape, shape=found.shape, dtype=str(found.dtype), low=float(found.min()),
                    high=float(found.max()), named=bool(all(np.array_equal(a, b) for a, b in zip(found[is_third], named[is_third]))),
                    changed=changed, same=bool(same), shares=saliency._channel_gradients(model, images).sum(axis=1).tolist(),
                    original=table["original_channel"].tolist(), shift=float(np.ptp(shift)), method=saliency.saliency_method(model),
                    occluded=[float(occluded.min()), float(occluded.max())],
                    check=float(saliency.randomisation_check(model, images[:2], repeats=1).abs().max().max()))

    print("FOUND" + json.dumps({name: check(name) for name in sys.argv[1:]}))
"""


def in_a_process(*names: str) -> dict:
    """torch and TensorFlow stay apart, whatever other test modules have loaded here."""
    clean = {key: value for key, value in os.environ.items() if key not in ("LEUKEMIA_NB_WEIGHTS", "YOLO_CONFIG_DIR")}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), *names]
    done = subprocess.run(
        command, capture_output=True, text=True, env=clean | {"PYTHONPATH": str(ROOT)}, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("FOUND")[1])


@pytest.mark.slow
@pytest.mark.parametrize("names", [("mobilenet_v2", "dual_channel"), ("yolov8", "yolo12")], ids=["keras", "torch"])
def test_every_kind_of_network_has_heatmaps(names):
    pytest.importorskip("ultralytics" if "yolov8" in names else "keras")
    for name, found in in_a_process(*names).items():
        channels = 2 if name == "dual_channel" else 1
        assert found["maps"][:4] == [6, channels, 2, 2] and found["weights"] == [6, channels, found["maps"][4]], name
        assert found["shape"] == [6, 64, 64] and found["dtype"] == "float32" and found["method"] == "grad_cam", name
        assert 0 <= found["low"] <= found["high"] <= 1 and found["named"], name
        assert found["same"] and min(found["changed"].values()) > 1e-6, name  # randomised, and put back to the bit
        assert np.allclose(found["shares"], 1) and (np.array(found["original"]) < 1).all() == (channels == 2), name
        assert 0 <= found["occluded"][0] <= found["occluded"][1] <= 1 and not found["check"] > 1, name
        if name != "dual_channel":  # one dense layer: weighted averages of the maps are the logit, but for the bias
            assert found["shift"] < 0.5, name


# ---- heatmaps


def test_heatmap_by_hand():
    found = saliency._heatmaps(np.array([[[-3.0, 0], [0, 2]], [[-1, -1], [-1, -1]]]), 4)
    assert found.dtype == np.float32 and found[0, 3, 3] == 1 and found[0, 0].tolist() == [0] * 4 and found[1].max() == 0
    assert found[0, 2, 3] == pytest.approx(0.75) and found[0, 2, 2] == pytest.approx(0.75**2)  # bilinear


@given(hnp.arrays(np.float64, (3, 7, 7), elements=st.floats(-1e6, 1e6)), st.sampled_from([7, 32]))
def test_heatmaps_are_between_0_and_1_and_reach_1_or_are_empty(scores, size):
    found = saliency._heatmaps(scores, size)
    assert found.shape == (3, size, size) and found.min() >= 0
    for score, heatmap in zip(scores, found):
        assert heatmap.max() == (1 if score.max() > 0 else 0)


def test_not_finite_is_empty():
    assert saliency._heatmaps(np.array([[[1.0, np.nan], [np.inf, 2]]]), 8).max() == 0


# ---- pointing game


@given(st.integers(0, 31), st.integers(0, 31))
def test_all_energy_inside_or_outside(row, column):
    mask, heat = np.zeros((32, 32), bool), np.zeros((32, 32), np.float32)
    mask[row, column] = heat[row, column] = 1
    assert energy_pointing_game(heat, mask, margin=0) == pytest.approx((1, 1 / 1024, 1024))
    assert energy_pointing_game(heat, ~mask, margin=0)[0] == 0


def test_pointing_game_by_hand():
    """Energy 3 of 4 on a quarter of the area."""
    heat, mask = np.zeros((4, 4)), np.zeros((4, 4), int)
    mask[:2, :2], heat[0, 0], heat[3, 3] = 7, 3, 1
    assert energy_pointing_game(heat, mask, margin=0) == pytest.approx((0.75, 0.25, 3))


def test_flat_map_is_chance_and_the_rim_belongs_to_the_cell():
    mask = np.zeros((100, 120), bool)
    mask[40:60, 40:60] = True
    energy, area, ratio = energy_pointing_game(np.full((100, 120), 0.3), mask)
    assert energy == pytest.approx(area) and ratio == pytest.approx(1) and area > mask.mean()
    wide = _widen_cells(mask)  # 2 % of the shorter side: 2 pixels
    assert wide[38, 50] and not wide[37, 50] and wide[50, 61] and not wide[50, 62]
    assert np.array_equal(_widen_cells(mask, 0), mask) and np.array_equal(_widen_cells(mask * 7), wide)


def test_undefined_is_not_zero():
    assert np.isnan(energy_pointing_game(np.zeros((8, 8)), np.ones((8, 8), bool))[0])
    energy, area, ratio = energy_pointing_game(np.ones((8, 8)), np.zeros((8, 8), bool))
    assert np.isnan(energy) and area == 0 and np.isnan(ratio)
    with pytest.raises(ValueError, match=r"heatmap \(8, 8\) and mask \(9, 8\) differ in size"):
        energy_pointing_game(np.ones((8, 8)), np.ones((9, 8), bool))


# ---- occlusion


class Corner:
    """Uses the red of the top-left quarter and nothing else."""

    image_size, classes_ = 32, np.array(["no", "yes"])
    seen = 0

    def predict_proba(self, images):
        self.seen += len(images)
        images = np.asarray(images)
        images = images if images.ndim == 4 else images[:, 0]
        p = 1 / (1 + np.exp(-(images[:, :16, :16, 0].mean(axis=(1, 2)) - 128) / 20))
        return np.stack([1 - p, p], axis=1).astype(np.float32)


@pytest.fixture()
def red_corner():
    images = np.full((2, 32, 32, 3), 60, np.uint8)
    images[0, :16, :16, 0] = 180
    return images


def test_occlusion_finds_the_cue_and_only_for_the_class_it_supports(red_corner):
    maps = occlusion_map(Corner(), red_corner, "yes", grid=2)
    assert maps[0, 4, 4] == 1 and maps[0, 20:, 20:].max() < 0.3 and maps[1].max() == 0
    assert occlusion_map(Corner(), red_corner, "no", grid=2)[0].max() == 0
    model = Corner()
    occlusion_map(model, red_corner, ["yes", "no"], grid=4)
    assert model.seen == 2 * 17
    pairs = np.stack([red_corner, red_corner * 0], axis=1)
    for images in (list(red_corner), pairs, list(pairs), [np.repeat(np.repeat(image, 2, 0), 2, 1) for image in red_corner]):
        np.testing.assert_allclose(occlusion_map(Corner(), images, "yes", grid=2), maps, atol=0.02)


def test_an_image_full_of_cells_is_covered_in_its_own_colour(monkeypatch):
    monkeypatch.setattr(saliency, "find_cells", lambda image: np.ones(image.shape[:2], np.int32))
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, 3:] = 10, 20, 30  # more than half
    copies = saliency._occluded(image, 2)
    assert (copies[0][:4, :4] == (10, 20, 30)).all() and (copies[0][4:] == image[4:]).all()


def test_every_pixel_is_occluded_once_whatever_the_grid():
    pair = np.random.default_rng(0).integers(1, 200, (2, 30, 30, 3), dtype=np.uint8)
    copies = saliency._occluded(pair, grid=7)
    changed = (copies != pair).any(axis=-1)
    assert copies.shape == (49, 2, 30, 30, 3) and (changed[:, 1].sum(axis=0) == 1).all() and changed[:, 0].sum(axis=0).max() == 1
    assert (copies[:, 1][changed[:, 1]] == 0).all() and len(np.unique(copies[:, 0][changed[:, 0]], axis=0)) == 1
    assert saliency._occluded(pair[0], 3).shape == (9, 30, 30, 3)
    assert changed[0, 1, :4, :4].all() and changed[8, 1, 4:9, 4:9].all()  # row by row


def test_squares_have_the_colour_of_the_background(monkeypatch):
    image, cells = np.full((40, 40, 3), 220, np.uint8), np.zeros((40, 40), np.int32)
    cells[:30] = 1
    image[:30] = 90
    monkeypatch.setattr(saliency, "find_cells", lambda image: cells)
    assert (saliency._occluded(image, 2)[0, :20, :20] == 220).all()
    cells[:] = 1
    assert (saliency._occluded(image, 2)[3, 20:, 20:] == 90).all()


# ---- errors, table, figure


def test_errors_name_the_remedy(red_corner):
    assert saliency_method(Corner()) == "occlusion"
    with pytest.raises(ModelError, match="Corner has no feature maps of the whole image. Use occlusion_map"):
        grad_cam(Corner(), red_corner)
    with pytest.raises(ModelError, match="'perhaps' is not a class of this model: no, yes"):
        occlusion_map(Corner(), red_corner, "perhaps")
    with pytest.raises(ModelError, match="1 classes to explain for 2 images"):
        occlusion_map(Corner(), red_corner, ["yes"])


@given(st.permutations(range(36)))
def test_rank_correlation_sees_order_only(order):
    heat = np.reshape(order, (6, 6)) / 10
    assert saliency._rank_correlation(heat, np.exp(heat / 5)) == pytest.approx(1)
    assert saliency._rank_correlation(heat, -heat) == pytest.approx(-1)
    assert np.isnan(saliency._rank_correlation(heat, np.zeros((6, 6)))) and np.isnan(saliency._rank_correlation(heat * 0, heat))


def test_table_and_summary_by_hand(red_corner):
    masks = np.zeros((2, 32, 32), bool)
    masks[:, :16, :16] = True
    heat = np.zeros((2, 32, 32), np.float32)
    heat[0, :8, :8], heat[1, 20:, 20:] = 1, 1
    table = saliency_table(Corner(), red_corner, masks, heat)
    assert table["predicted"].tolist() == ["yes", "no"] and table["energy_inside"].tolist() == [1, 0]
    assert table["centre_bias"].tolist() == [0, 1]  # what the other image's map has inside these cells
    area = 17**2 - 1  # a rim of one pixel, without its corner
    assert table["area_inside"].tolist() == pytest.approx([area / 1024] * 2) and table["original_channel"].tolist() == [1, 1]
    empty = pd.concat([table, table.assign(energy_inside=np.nan, ratio=np.nan)], ignore_index=True)
    row = saliency_summary({"yolo11": empty}).iloc[0]
    assert (row["title"], row["n_images"], row["empty_maps"], row["energy_inside"]) == ("YOLO11", 4, 2, 0.5)
    assert row["ratio"] == pytest.approx(1 / (2 * area / 1024)) and row["centre_bias"] == 0.5 and row["original_channel"] == 1
    assert (row["low"], row["high"]) == (0, 1) and np.isnan(row["head_randomised"])
    assert row["interval"] == "percentile bootstrap of groups"
    checked = saliency_summary(
        {"a": table}, {"a": pd.DataFrame({"head_randomised": [0.2, 0.4], "all_randomised": [0.0, -0.2]})}
    ).iloc[0]
    assert checked[["head_randomised", "all_randomised"]].tolist() == pytest.approx([0.3, -0.1])
    alike = saliency_summary({"a": table.assign(pair=["x", "y"])}, groups={"x": 1, "y": 1}).iloc[0]
    assert alike["energy_inside"] == 0.5 and np.isnan(alike["low"]) and np.isnan(alike["high"])  # one group: no interval
    bare = table.assign(energy_inside=[np.nan, 0.0], area_inside=0.0)  # no cells; 0 in tables of earlier runs
    row, seen = (saliency_summary({"a": part}).iloc[0] for part in (pd.concat([table, bare], ignore_index=True), table))
    assert (row["n_images"], row["without_cells"], row["empty_maps"]) == (4, 2, 0)
    assert (
        row[["energy_inside", "area_inside", "ratio", "low"]].tolist()
        == seen[["energy_inside", "area_inside", "ratio", "low"]].tolist()
    )
    none = saliency_summary({"a": table.assign(energy_inside=np.nan)}).iloc[0]
    assert none["empty_maps"] == 2 and np.isnan(none["energy_inside"]) and np.isnan(none["ratio"])


def test_figure_has_a_panel_for_each(red_corner):
    heatmaps = {"a": np.zeros((2, 32, 32)), "b": np.ones((2, 32, 32))}
    figure = saliency_figure(red_corner, heatmaps, np.eye(32, dtype=bool)[None].repeat(2, 0), np.array(["one", "two"]))
    assert len(figure.axes) == 6 and figure.axes[3].get_ylabel() == "two" and figure.axes[1].get_title(loc="left") == "a"
