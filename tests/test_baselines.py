"""Baselines see what they may see and nothing else; on the real images they are as good as is known."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from leukemia_nb.audit.baselines import (
    _stretched_grey,
    BASELINES,
    Baseline,
    _permuted,
    background_pixels,
    baseline_features,
    baseline_table,
    _colour_features,
    cross_validate_baselines,
    permutation_table,
    permuted_sentence,
    run_baselines,
    _shape_features,
    _outline_features,
    _texture_features,
)
from leukemia_nb.data.images import read_image, scale_bar_corner
from leukemia_nb.data.classes import read_class_map
from leukemia_nb.data.synthetic import make_smear
from leukemia_nb.evaluation.cross_validation import cross_validated_accuracy
from leukemia_nb.evaluation.metrics import accuracy_figure, compare_models
from leukemia_nb.evaluation.predictions import _check_predictions, predicted_labels
from leukemia_nb.evaluation.uncertainty import clopper_pearson
from leukemia_nb.processing.cells import find_cells
from leukemia_nb.testing import dummy_predictions


@pytest.mark.parametrize("size", [(32, 32), (96, 128)])
def test_every_baseline_at_every_size(size):
    image = make_smear("Pre-B", 4, *size).image
    cells = find_cells(image)
    for name, baseline in BASELINES.items():
        features = baseline.features(image, cells)
        assert features.dtype == np.float32 and np.isfinite(features).all(), name
        assert features.shape == baseline.features(np.zeros((40, 40, 3), np.uint8), np.zeros((40, 40), np.int32)).shape, name
    background_only = tuple(name for name, baseline in BASELINES.items() if baseline.background_only)
    assert background_only == ("background_colour", "background_texture")


@pytest.fixture(scope="module")
def seen():
    image = make_smear("Pre-B", 4, 224, 224).image
    cells = find_cells(image)
    return image, cells, background_pixels(image, cells)


def test_scale_bar_corner_by_hand():
    assert scale_bar_corner((200, 100, 3)) == (slice(168, 200), slice(77, 100))
    assert scale_bar_corner((2, 1)) == (slice(1, 2), slice(0, 1))


def test_background_baseline_sees_neither_cells_nor_scale_bar(seen):
    image, cells, free = seen
    random = np.random.default_rng(0).integers(0, 256, image.shape).astype(np.uint8)
    repainted = np.where(free[..., None], image, random)
    assert 0.5 < free.mean() < 0.95 and not free[scale_bar_corner(image.shape)].any() and not free[cells > 0].any()
    assert np.array_equal(_colour_features(image, free), _colour_features(repainted, free))
    assert not np.allclose(_colour_features(image), _colour_features(repainted))


def test_margin_around_a_cell_is_three_percent_of_the_height():
    image, cells = np.full((200, 300, 3), 230, np.uint8), np.zeros((200, 300), np.int32)
    cells[80, 100] = 1
    free = background_pixels(image, cells)
    assert not free[80 - 6, 100] and free[80 - 7, 100] and not free[80, 106] and free[80, 107]
    assert free.sum() == 200 * 300 - 30 * 69 - (~free[:170]).sum()


def test_scale_bar_baseline_sees_the_corner_alone(seen):
    image, cells, _ = seen
    corner = scale_bar_corner(image.shape)
    other = np.full_like(image, 7)
    other[corner] = image[corner]
    bar, colour = BASELINES["scale_bar"].features, BASELINES["colour"].features
    assert np.array_equal(bar(image, cells), bar(other, cells)) and not np.allclose(colour(image, cells), colour(other, cells))
    assert bar(image, cells).shape == (14 * 22 * 3,)
    other[corner] = 0
    assert not np.allclose(bar(image, cells), bar(other, cells))


@pytest.mark.parametrize("name", ["background_texture", "grey_texture", "grey_shape"])
def test_grey_baselines_are_blind_to_colour(seen, name, monkeypatch):
    image, cells, free = seen
    monkeypatch.setattr("leukemia_nb.audit.baselines.background_pixels", lambda image, cells: free)
    grey = np.repeat(np.rint(image @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)[..., None], 3, 2)
    assert np.abs(BASELINES[name].features(image, cells) - BASELINES[name].features(grey, cells)).max() < 0.02


def test_outlines_are_blind_to_pixels(seen):
    image, cells, _ = seen
    features = BASELINES["cell_outlines"].features
    assert np.array_equal(features(image, cells), features(255 - image, cells)) and features(image, cells)[0] == cells.max() > 0
    assert _outline_features(np.zeros((32, 32), np.int32)).sum() == 0


def test_outline_features_by_hand():
    """Squares of 10 and of 4 pixels side in 40 x 40: areas 100 and 16 of 1600; a full box has solidity and extent 1."""
    cells = np.zeros((40, 40), np.int32)
    cells[5:15, 5:15], cells[20:24, 20:24] = 1, 2
    number, area, *features = _outline_features(cells)
    mean, deviation, low, high = np.reshape(features, (4, 7))
    assert (number, area) == (2, pytest.approx(116 / 1600))
    assert [part[0] for part in (mean, deviation, low, high)] == pytest.approx([58 / 1600, 42 / 1600, 16 / 1600, 100 / 1600])
    assert mean[[4, 6]] == pytest.approx([1, 1]) and mean[5] == pytest.approx(0, abs=1e-6)
    assert high[1] == pytest.approx(36 / 40) and low[1] == pytest.approx(12 / 40)  # perimeters
    assert (
        high[2] == high[3] == pytest.approx(4 * np.sqrt((100 - 1) / 12) / 40, rel=0.02)
    )  # axes of the ellipse with equal moments


@settings(max_examples=15, deadline=None)
@given(arrays(np.uint8, (9, 7, 3)), st.randoms(use_true_random=False))
def test_colour_features_do_not_depend_on_places(image, random):
    order = list(range(63))
    random.shuffle(order)
    assert _colour_features(image) == pytest.approx(_colour_features(image.reshape(-1, 3)[order].reshape(9, 7, 3)), abs=1e-2)


def test_colour_and_texture_features_by_hand():
    image = np.zeros((2, 2, 3), np.uint8)
    image[..., 0] = [[0, 10], [20, 30]]
    found = _colour_features(image)
    assert found[[0, 3]] == pytest.approx([15, np.sqrt(125)]) and found[[6, 9, 12, 15, 18]] == pytest.approx(
        [1.5, 7.5, 15, 22.5, 28.5]
    )
    assert found[1] == 0 and _colour_features(image, np.zeros((2, 2), bool)).tolist() == [0] * 21
    assert _colour_features(image, np.eye(2, dtype=bool))[0] == 15
    flat = _texture_features(np.full((20, 20, 3), 90, np.uint8))[:10]
    assert flat[8] == pytest.approx(1 - flat[:8].sum()) and flat[8] > 0.8  # a flat image: all neighbours are as bright
    inner = np.zeros((20, 20), bool)
    inner[5:15, 5:15] = True
    both = _texture_features(np.full((20, 20, 3), 90, np.uint8), inner)
    assert both.tolist() == [0] * 8 + [1, 0] + [0] * 8 + [1, 0]
    assert _texture_features(image, np.zeros((2, 2), bool)).sum() == 0


def test_colour_features_are_numpys_percentiles(seen):
    image, _, free = seen
    for pixels, found in ((image.reshape(-1, 3), _colour_features(image)), (image[free], _colour_features(image, free))):
        expected = [pixels.mean(axis=0), pixels.std(axis=0), np.percentile(pixels, (5, 25, 50, 75, 95), axis=0).ravel()]
        assert found == pytest.approx(np.concatenate(expected), rel=1e-5)


def test_shape_features_see_edges_and_no_contrast():
    ramp = np.repeat(np.linspace(60, 180, 64).astype(np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    histogram = _shape_features(ramp).reshape(-1, 9).sum(axis=0)
    assert histogram.argmax() == 0 and histogram[0] > 0.8 * histogram.sum()  # every gradient is horizontal
    assert _shape_features(ramp) == pytest.approx(_shape_features(ramp // 2 + 20), abs=0.05)
    assert _shape_features(np.full((32, 32, 3), 200, np.uint8)).max() == 0


# ---- training, test, cross-validation


@pytest.fixture(scope="module")
def features():
    """Features of 30 confounded smears by three baselines, and their split: every other image is for the test."""
    labels = np.repeat(["Normal", "Pre-B", "Pro-B"], 10)
    images = [make_smear(label, i, 64, 64, spurious_correlation=1).image for i, label in enumerate(labels)]
    split = pd.DataFrame({"pair": [f"{label}/{i}" for i, label in enumerate(labels)], "class": labels})
    split["subset"] = np.where(np.arange(30) % 2, "test", "train")
    return baseline_features(images, names=["background_colour", "grey_texture", "permuted"]), split


def test_an_entry_that_was_added_is_among_the_features(monkeypatch):
    mean = Baseline("Mean", "mean colour", lambda image, cells: image.mean(axis=(0, 1)))
    monkeypatch.setitem(BASELINES, "mean", mean)
    found = baseline_features([make_smear("Normal", 0, 64, 64).image])
    assert list(found) == list(BASELINES) and found["mean"].shape == (1, 3)


def test_baselines_are_trained_and_tested_as_the_models(features):
    X, split = features
    found = run_baselines(X, split)
    assert list(found) == list(X)
    expected = split[split["subset"] == "test"]["pair"].tolist()
    for name in ("background_colour", "grey_texture"):
        _check_predictions(found[name])
        assert found[name]["pair"].tolist() == expected and "repeat" not in found[name]
    permuted = found["permuted"]
    assert permuted["repeat"].nunique() == 10 and all(part["pair"].tolist() == expected for _, part in permuted.groupby("repeat"))
    assert (
        compare_models({"a": found["background_colour"]})["accuracy"].item()
        > 0.8
        > permutation_table(permuted)["accuracy"].mean()
    )
    train = (split["subset"] == "train").to_numpy()
    model = BASELINES["background_colour"].estimator(0).fit(X["background_colour"][train], split["class"][train])
    expected_p = model.predict_proba(X["background_colour"][~train])
    np.testing.assert_allclose(found["background_colour"][[f"p_{name}" for name in model.classes_]], expected_p)
    again = run_baselines({"permuted": X["permuted"]}, split, permutations=12)["permuted"]
    assert again["repeat"].nunique() == 12
    pd.testing.assert_frame_equal(again[again["repeat"] < 10], permuted)
    flipped = run_baselines({"grey_texture": X["grey_texture"]}, split.replace({"test": "val"}), subset="val")["grey_texture"]
    assert flipped["p_Normal"].tolist() == found["grey_texture"]["p_Normal"].tolist() and set(flipped["subset"]) == {"val"}


def test_labels_are_permuted_for_a_third_of_the_images_and_at_most_100_times():
    names = np.arange(5000).astype(str)
    count = [len(_permuted(names[:n], None, None, 0)) for n in (3, 15, 18, 299, 300, 5000)]
    assert count == [5, 5, 6, 99, 100, 100] and len(_permuted(names[:999], None, 2, 0)) == 2
    first, second = _permuted(names[:50], None, 2, 7)
    assert sorted(first) == sorted(names[:50])
    assert first.tolist() != second.tolist() == _permuted(names[:50], None, 1, 8)[0].tolist()


def test_permuted_labels_of_few_groups_leave_two_classes_in_every_training_part():
    """Three patients of one class: without care all of them are permuted into one fold or subset for some repeats."""
    group = np.repeat(np.arange(23), 8)
    labels, X = np.where(group < 3, "rare", "common"), {"permuted": np.random.default_rng(0).normal(size=(184, 5))}
    found = cross_validate_baselines(X, pd.Series(labels, [f"p{i}" for i in range(184)]), group, folds=3, permutations=40)
    assert permutation_table(found["permuted"])["repeat"].tolist() == list(range(40))
    split = pd.DataFrame({"pair": [f"p{i}" for i in range(184)], "class": labels, "group": group})
    split["subset"] = np.where(np.isin(group, [0, 1, *range(3, 14)]), "train", "test")
    assert run_baselines(X, split, permutations=40)["permuted"]["repeat"].nunique() == 40
    with pytest.raises(ValueError, match="labels cannot be permuted.*too few groups"):
        run_baselines(X, split.assign(subset=np.where(group == 22, "train", "test")))
    with pytest.raises(ValueError, match="no group"):
        run_baselines(X, split.assign(group=split["group"].astype(str).replace("4", "")))


def test_a_class_without_training_images_is_a_column_of_every_baseline():
    X, labels = {"permuted": np.random.default_rng(0).normal(size=(60, 5))}, np.repeat(["a", "b", "c"], 20)
    split = pd.DataFrame({"pair": [f"p{i}" for i in range(60)], "class": labels})
    split["subset"] = np.where(labels == "c", "val", np.where(np.arange(60) % 4 > 0, "train", "test"))
    _check_predictions(run_baselines(X, split)["permuted"].query("repeat == 0").drop(columns="repeat"))


def test_permuted_labels_show_near_duplicates_across_a_split_and_no_more_than_chance_without():
    """Features that name the group and nothing else: the labels of groups are recognised only where groups are divided."""
    random, group = np.random.default_rng(0), np.repeat(np.arange(60), 4)
    X = {"permuted": random.normal(size=(60, 70))[group] + 0.01 * random.normal(size=(240, 70))}
    split = pd.DataFrame({"pair": [f"p{i}" for i in range(240)], "class": np.array(["a", "b", "c"])[group % 3], "group": group})

    def accuracy(subset: np.ndarray) -> float:
        found = run_baselines(X, split.assign(subset=subset), permutations=10)["permuted"]
        assert found[found["repeat"] == 1].groupby(group[subset == "test"])["class"].nunique().eq(1).all()
        return permutation_table(found)["accuracy"].mean()

    divided, apart = (np.where(place % 4 == 0, "test", "train") for place in (np.arange(240), group))
    assert accuracy(divided) > 0.9 and 0.2 < accuracy(apart) < 0.47
    y = split.set_index("pair")["class"]
    alone, together = (cross_validate_baselines(X, y, groups, permutations=5)["permuted"] for groups in (None, group))
    assert 0.2 < permutation_table(alone)["accuracy"].mean() < 0.47  # by image, no neighbour shares the permuted label
    assert 0.2 < permutation_table(together)["accuracy"].mean() < 0.47
    assert (together["class"].to_numpy().reshape(5, 240)[1] != y.to_numpy()).mean() > 0.4  # scored on the permuted labels


def test_given_cells_are_used_and_errors_name_the_remedy():
    images = np.full((4, 32, 32, 3), 200, np.uint8)
    blank = np.zeros((4, 32, 32), np.int32)
    assert (baseline_features(images, blank, ["cell_outlines"])["cell_outlines"] == 0).all()
    blank[:, 4:9, 4:9] = 1
    assert baseline_features(images, blank, ["cell_outlines"])["cell_outlines"][:, 0].tolist() == [1] * 4
    with pytest.raises(ValueError, match="4 images but 2 masks"):
        baseline_features(images, blank[:2])
    with pytest.raises(ValueError, match="no baseline is called 'tea'; there are background_colour"):
        baseline_features(images, names=["tea"])


def test_pairs_are_read_with_their_saved_cells(tmp_path):
    from leukemia_nb.processing.dataset import Pairs
    from leukemia_nb.testing import dummy_dataset

    pairs = Pairs(dummy_dataset(tmp_path / "dataset", per_class=4, size=32), "test")
    found = baseline_features(pairs, names=["cell_outlines", "colour"], n_jobs=2)
    assert found["cell_outlines"][:, 0].tolist() == [cells.max() for cells in pairs.read(slice(None), "cells")]
    assert found["colour"][1].tolist() == _colour_features(pairs.read([1])[0]).tolist()


def test_cross_validation_keeps_groups_together():
    random = np.random.default_rng(0)
    group = np.repeat(np.arange(30), 4)
    X = {"grey_texture": (random.normal(size=(30, 21))[group] + 0.01 * random.normal(size=(120, 21))).astype(np.float32)}
    y = pd.Series(np.array(["a", "b", "c"])[group % 3], [f"p{i}" for i in range(120)])
    alone, held = (cross_validated_accuracy(cross_validate_baselines(X, y, groups)["grey_texture"]) for groups in (None, group))
    assert alone.estimate > 0.9 and held.estimate < 0.6 and held.groups == 30
    both = {**X, "permuted": X["grey_texture"][:, :3]}
    found = cross_validate_baselines(both, y, group, folds=2, repeats=2, permutations=3)
    assert found["grey_texture"].groupby("repeat")["pair"].nunique().tolist() == [120, 120]
    assert (
        found["permuted"]["repeat"].unique().tolist() == [0, 1, 2]
        and found["permuted"].groupby(["repeat", "group"])["class"].nunique().eq(1).all()
    )
    with pytest.raises(ValueError, match="a has 1 groups, 5 folds need"):
        cross_validate_baselines(X, y, y.to_numpy())


# ---- tables and figures


def test_permutations_by_hand():
    """Four images of class a; shuffles after which 1, 2, 3 and 4 of them are predicted correctly."""
    tables = [
        pd.DataFrame(
            {"pair": list("wxyz"), "path": "", "subset": "test", "class": "a", "p_a": [0.9] * k + [0.1] * (4 - k), "repeat": k}
        )
        for k in (1, 2, 3, 4)
    ]
    predictions = pd.concat([table.assign(p_b=1 - table["p_a"]) for table in tables], ignore_index=True)
    table = permutation_table(predictions)
    assert table.to_numpy().tolist() == [[1, 4, 1, 0.25], [2, 4, 2, 0.5], [3, 4, 3, 0.75], [4, 4, 4, 1.0]]
    row = baseline_table({"permuted": predictions}).iloc[0]
    assert row[["n_images", "groups", "accuracy", "low", "high", "chance"]].tolist() == [4, 4, 0.625, 0.25, 1.0, 1.0]
    assert row["interval"] == "range of 4 label permutations"
    grouped = baseline_table({"permuted": predictions.assign(group=1)}).iloc[0]
    assert (grouped["n_images"], grouped["groups"]) == (4, 1)
    many = pd.concat(
        [predictions[predictions["repeat"] == 2].assign(repeat=i) for i in range(97)]
        + [t.assign(p_b=1 - t.p_a, repeat=200 + i) for i, t in enumerate(tables[2:] + tables[:1])]
    )
    assert baseline_table({"permuted": many}).loc[0, ["low", "high"]].tolist() == [0.5, 0.5]  # 2.5 % at either end are left out


def test_table_and_figure_join_baselines_and_models(tmp_path):
    models = {"yolo11": dummy_predictions(0.99), "colour": dummy_predictions(0.9, seed=1), "permuted": dummy_predictions(0.4)}
    table = baseline_table(models)
    assert table["name"].tolist() == ["colour", "permuted", "yolo11"] and table["title"].tolist()[2] == "YOLO11"
    assert table["kind"].tolist() == ["baseline", "baseline", "model"] and table["cue"].tolist()[2] == ""
    assert table["chance"].tolist() == pytest.approx([47 / 111] * 3) and set(table["interval"]) == {"Clopper-Pearson"}
    assert table.loc[0, ["accuracy", "low", "high"]].tolist() == pytest.approx([100 / 111, *clopper_pearson(100, 111)])
    by_field = baseline_table(models, {pair: i // 4 for i, pair in enumerate(models["colour"]["pair"])})
    assert by_field["groups"].tolist() == [28] * 3 and set(by_field["interval"]) == {"Korn-Graubard (ICC = 1)"}
    axis = accuracy_figure(table).axes[0]
    assert [text.get_text() for text in axis.texts] == ["90.1 %", "39.6 %", "99.1 %"]
    assert axis.get_yticklabels()[0].get_text().startswith("Colour statistics\n21 colour")
    table.to_csv(tmp_path / "baselines.csv", index=False)
    kept = accuracy_figure(pd.read_csv(tmp_path / "baselines.csv")).axes[0]
    assert [text.get_text() for text in kept.get_yticklabels()] == [text.get_text() for text in axis.get_yticklabels()]
    with pytest.raises(ValueError, match="no predictions"):
        baseline_table({})


def test_axis_names_the_methods_of_the_intervals():
    table = baseline_table(
        {"yolo11": dummy_predictions(0.99), "yolo12": dummy_predictions(0.99), "colour": dummy_predictions(0.9)}
    )
    table.loc[0, "interval"] = "another"
    assert accuracy_figure(table).axes[0].get_xlabel() == "accuracy; 95 % CI: Clopper-Pearson\nColour statistics: another"


def test_interval_of_permuted_labels_holds_the_spread_of_shuffling():
    """Groups of five are predicted alike and share a label, so accuracies spread far more than those of independent images."""
    group = np.arange(120) // 5
    split = pd.DataFrame({"pair": [f"p{i}" for i in range(120)], "class": np.where(group % 2, "a", "b"), "group": group})
    split["subset"] = np.where(group < 12, "train", "test")
    X = {"permuted": np.random.default_rng(3).normal(size=(24, 3))[group]}
    found = run_baselines(X, split, permutations=20)["permuted"]
    row, accuracy = baseline_table({"permuted": found}).iloc[0], permutation_table(found)["accuracy"]
    fresh = permutation_table(run_baselines(X, split, seed=1000, permutations=10)["permuted"])["accuracy"]
    assert accuracy.std() > 1.5 * np.sqrt(0.25 / 60)
    assert fresh.between(row["low"], row["high"]).mean() >= 0.8  # shuffles that the interval has not seen


def test_sentence_of_permuted_labels():
    parts = [dummy_predictions(accuracy, (1, 1, 1), seed=i).assign(repeat=i) for i, accuracy in enumerate((0, 1 / 3, 2 / 3, 1))]
    few = {"colour": dummy_predictions(1.0, (1, 1, 1)), "permuted": pd.concat(parts, ignore_index=True)}
    assert permuted_sentence(baseline_table(few)) == (
        "With permuted labels the mean accuracy on 3 images is 50.0 % (range of 4 label permutations: 0.0–100.0). "
        "No baseline exceeds this permuted-label control."
    )
    permuted = pd.concat([dummy_predictions(0.4, seed=i).assign(repeat=i) for i in range(9)], ignore_index=True)
    many = {"colour": dummy_predictions(0.95), "permuted": permuted}
    assert permuted_sentence(baseline_table(many)).endswith("On these images, this baseline reaches up to 39.6 % by chance.")
    other = {"colour": dummy_predictions(0.3, (2, 2, 2)), "permuted": permuted}  # other images say nothing of this control
    assert permuted_sentence(baseline_table(other)) == permuted_sentence(baseline_table({"permuted": permuted}))
    assert permuted_sentence(baseline_table({"colour": many["colour"]})) == ""
    assert (predicted_labels(few["colour"]) == few["colour"]["class"]).all()


@pytest.mark.slow
def test_known_shortcuts_of_the_real_images(shared_data):
    "Random 5-fold, 100 images a class; all 2,087 give 99.0 % and 92.3 % (benchmarks/results/shortcuts.json)."
    table = pd.read_csv(shared_data / "taleqani_fields.csv").rename(columns={"file": "pair"})
    class_map = read_class_map()
    table["class"] = [class_map.class_of(name.split("/")[0]) for name in table["pair"]]
    table = table[table["class"] != "Early Pre-B"].groupby("class").sample(100, random_state=0).reset_index(drop=True)
    images = [read_image(shared_data / "taleqani" / name) for name in table["pair"]]
    names = ("background_colour", "background_texture", "scale_bar")
    X = baseline_features(images, names=names)
    found = cross_validate_baselines(X, table.set_index("pair")["class"])
    accuracy = {name: cross_validated_accuracy(found[name]).estimate for name in names}
    print({name: round(value, 3) for name, value in accuracy.items()})
    assert accuracy["background_colour"] > 0.93 and accuracy["background_texture"] > 0.93 and accuracy["scale_bar"] > 0.78


def test_grey_is_stretched_between_its_percentiles():
    """0 to 199: percentiles 1 and 99 are 1.99 and 197.01; a flat image is divided by 1."""
    image = np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (200, 1, 3))
    assert _stretched_grey(image, 200)[7, [0, 100, 199]] == pytest.approx([0, (100 - 1.99) / 195.02, 1])
    assert _stretched_grey(np.full((4, 4, 3), 9, np.uint8), 4).max() == 0 and _stretched_grey(image, 6).shape == (6, 6)


def test_shapes_are_scikit_images_gradients_at_64_pixels(seen):
    from skimage.feature import hog

    grey = _stretched_grey(seen[0], 64)
    found = hog(grey, orientations=9, pixels_per_cell=(16, 16), cells_per_block=(2, 2))
    assert grey.shape == (64, 64) and _shape_features(seen[0]) == pytest.approx(found)


def test_estimators():
    forest, line = BASELINES["colour"].estimator(3), BASELINES["grey_texture"].estimator(3)
    assert (forest.n_estimators, forest.random_state, forest.class_weight) == (150, 3, "balanced")
    assert (line[-1].max_iter, line[-1].class_weight) == (2000, "balanced")
