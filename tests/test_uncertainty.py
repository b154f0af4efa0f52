"""Intervals, tests between models, calibration and cross-validation."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import binomtest, f, t
from sklearn.metrics import brier_score_loss, log_loss

from leukemia_nb.evaluation.metrics import PredictionsError, predicted_labels, classes_of, dummy_predictions, probabilities_of
from leukemia_nb.evaluation.uncertainty import (
    TEMPERATURES,
    average_precisions,
    brier_score,
    cached_features,
    calibration_error,
    calibration_table,
    cluster_bootstrap,
    compare_pairs,
    cross_validate,
    cross_validated_accuracy,
    difference_figure,
    effective_groups,
    fit_temperature,
    grouped_accuracy,
    grouped_interval,
    holm,
    log_loss_of,
    mcnemar,
    precision_recall_figure,
    reliability_figure,
    reliability_table,
    scale_temperature,
    significance_sentence,
)


def test_images_alone_give_the_exact_interval():
    for correct, n in ((0, 10), (1, 7), (340, 400), (102, 103), (103, 103)):
        found, bounds = grouped_interval(np.arange(n) < correct), binomtest(correct, n).proportion_ci(method="exact")
        assert (found.low, found.high) == pytest.approx(tuple(bounds), abs=1e-9)
        assert (found.estimate, found.n, found.groups, found.effective) == (correct / n, n, n, n)
        assert found.method == "Clopper-Pearson on effective groups"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=30), st.floats(0, 1))
def test_grouped_interval_is_korn_and_graubards_with_the_worst_design_effect(sizes, share):
    """The published formula, F quantiles instead of the beta distribution's: v1 = 2x, v2 = 2(n* - x + 1), and its mirror image."""
    sizes = np.array(sizes)
    n, correct = sizes.sum(), round(share * sizes.sum())
    found = grouped_interval(np.arange(n) < correct, np.repeat(np.arange(len(sizes)), sizes))
    effective = n**2 / (sizes**2).sum()
    worth = effective * (t.ppf(0.975, n - 1) / t.ppf(0.975, effective - 1)) ** 2 if effective > 1.001 else None
    assert found.effective == pytest.approx(effective) and found.low <= found.estimate <= found.high
    if worth is None or worth < 1e-3:
        assert found.low < 0.05 and found.high > 0.95
        return
    x = correct / n * worth
    low = 0 if not correct else 1 / (1 + (worth - x + 1) / (x * f.ppf(0.025, 2 * x, 2 * (worth - x + 1))))
    high = 1 if correct == n else 1 - 1 / (1 + (x + 1) / ((worth - x) * f.ppf(0.025, 2 * (worth - x), 2 * (x + 1))))
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-6)


def test_fewer_groups_say_less_and_one_says_nothing():
    correct = np.arange(103) < 101
    wide = [np.ptp([(found := grouped_interval(correct, np.arange(103) // size)).low, found.high]) for size in (1, 2, 5, 20, 103)]
    assert wide == sorted(wide) and wide[-1] == pytest.approx(1, abs=1e-4)
    assert effective_groups([0] * 9 + [1]) == pytest.approx(100 / 82)


@pytest.mark.parametrize("sizes", [[1] * 103, [1] * 97 + [2] * 3, [3] * 34 + [1], [10] * 10 + [3], [30] + [1] * 73])
@pytest.mark.parametrize("rho", [0, 0.5, 1])
def test_grouped_interval_covers(sizes, rho):
    """0.95 within three standard errors of 4,000 simulated test sets; the percentile bootstrap has 0.86 to 0.9 for the first two."""
    sizes, random = np.array(sizes), np.random.default_rng(5)
    group = np.repeat(np.arange(len(sizes)), sizes)
    every = [grouped_interval(np.arange(103) < k, group) for k in range(104)]
    for p in (0.9, 0.97, 0.99):
        chance = (
            random.random((4000, len(sizes))) < p
            if rho == 1
            else random.beta(p * (1 / rho - 1), (1 - p) * (1 / rho - 1), (4000, len(sizes)))
            if rho
            else np.full((4000, len(sizes)), p)
        )
        counts = random.binomial(sizes, chance).sum(axis=1)
        assert np.mean([every[k].low <= p <= every[k].high for k in counts]) > 0.95 - 3 * np.sqrt(0.95 * 0.05 / 4000), p


def test_bootstrap_of_two_groups_by_hand():
    # two groups of sizes 1 and 3, right and wrong: means 1, 1/4 (twice) and 0 with probabilities 1/4, 1/2, 1/4
    found = cluster_bootstrap([1, 0, 0, 0], ["a", "b", "b", "b"])
    assert (found.estimate, found.low, found.high) == (0.25, 0.0, 1.0)


def test_bootstrap_takes_other_values_and_is_seeded():
    values, groups = np.random.default_rng(0).normal(5, 1, 60), np.repeat(np.arange(20), 3)
    one = cluster_bootstrap(values, groups, seed=1)
    assert one == cluster_bootstrap(values, groups, seed=1) != cluster_bootstrap(values, groups, seed=2)
    assert one.low < 5 < one.high and one.method == "percentile bootstrap of groups"


@pytest.mark.parametrize(
    "values, groups, message",
    [
        ([], None, "0 values"),
        ([1, 0], ["a"], "2 values and 1 groups"),
        ([1, np.nan], None, "finite"),
        ([1, 0], ["a", None], "has no group"),
        ([0.5, 1.2], None, "between 0 and 1"),
        ([-0.1], None, "between"),
    ],
)
def test_grouped_interval_refuses(values, groups, message):
    with pytest.raises(ValueError, match=message):
        grouped_interval(values, groups)


@pytest.mark.parametrize(
    "values, groups, message",
    [
        ([], None, "0 values"),
        ([1, 0], ["a"], "2 values and 1 groups"),
        ([1, np.nan], None, "finite"),
        ([1, 0], ["a", "a"], "only one group"),
        ([1, 0], ["a", None], "has no group"),
    ],
)
def test_bootstrap_refuses(values, groups, message):
    with pytest.raises(ValueError, match=message):
        cluster_bootstrap(values, groups)


# by hand: twice the smaller tail of the binomial, at most 1; comb(22, 0..6) sums to 110,056
@pytest.mark.parametrize(
    "b, c, p", [(0, 0, 1), (1, 0, 1), (5, 0, 0.0625), (6, 0, 0.03125), (6, 16, 2 * 110_056 / 2**22), (10, 10, 1)]
)
def test_mcnemar(b, c, p):
    assert mcnemar(b, c) == pytest.approx(p, abs=1e-7) and mcnemar(c, b) == pytest.approx(p, abs=1e-7)


def test_holm_is_rs():  # p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm")
    assert list(holm([0.01, 0.02, 0.03, 0.04, 0.05])) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_is_monotone_and_between_the_raw_and_bonferroni(values):
    corrected, values = holm(values), np.array(values)
    assert (corrected >= values - 1e-12).all() and (corrected <= np.minimum(1, values * len(values)) + 1e-12).all()
    order = np.argsort(values, kind="stable")
    assert (np.diff(corrected[order]) >= -1e-12).all()


def test_pairs_are_matched_by_name_not_by_row():
    one, two = dummy_predictions(0.9, seed=1), dummy_predictions(0.8, seed=2)
    plain, mixed = (compare_pairs({"a": one, "b": two}), compare_pairs({"a": one, "b": two.sample(frac=1, random_state=3)}))
    pd.testing.assert_frame_equal(plain, mixed)
    right = [predicted_labels(t) == t["class"] for t in (one, two)]
    assert plain.loc[0, "only_first_right"] == (right[0] & ~right[1]).sum()
    assert plain.loc[0, "difference"] == pytest.approx((100 - 89) / 111)


def test_other_images_are_refused():
    one = dummy_predictions()
    with pytest.raises(PredictionsError, match="b: its test images are not those"):
        compare_pairs({"a": one, "b": one.iloc[1:]})
    with pytest.raises(PredictionsError, match="at least two models"):
        compare_pairs({"a": one})


def test_sentences():
    best, middle, worst = (dummy_predictions(a, seed=7) for a in (1.0, 0.85, 0.3))
    text = significance_sentence(compare_pairs({"yolov8": best, "yolo11": best, "mobilenet_v2": worst}))
    assert text.startswith("MobileNetV2 differs from every other model. YOLOv8 and YOLO11 cannot be told apart (Holm")
    assert significance_sentence(compare_pairs({"yolov8": best, "yolo11": worst})).startswith(
        "YOLOv8 is right more often than YOLO11 ("
    )
    assert significance_sentence(compare_pairs({"yolov8": best, "yolo11": best, "yolo12": best})).startswith(
        "YOLOv8, YOLO11 and YOLO12 cannot"
    )
    near = dummy_predictions(0.94, seed=7)
    close = dummy_predictions(0.97, seed=7)
    mixed = significance_sentence(compare_pairs({"yolov8": best, "yolo11": close, "yolo12": near, "mobilenet_v2": middle}))
    assert mixed.startswith("MobileNetV2 differs from every other model. YOLOv8 is right more often than YOLO12. No other two"), (
        mixed
    )
    assert len(difference_figure(compare_pairs({"yolov8": best, "yolo11": near, "yolo12": middle})).axes[0].texts) == 3


def test_groups_make_differences_weaker():
    best, worse = dummy_predictions(1.0, (40, 40, 0)), dummy_predictions(1.0, (40, 40, 0))
    worse.loc[:11, ["p_Normal", "p_Pre-B", "p_Pro-B"]] = [0.0, 1.0, 0.0]
    fields = {pair: i // 6 for i, pair in enumerate(worse["pair"])}
    assert compare_pairs({"a": best, "b": worse})["p"].item() == pytest.approx(2 / 2**12)
    grouped = compare_pairs({"a": best, "b": worse}, groups=fields)
    assert (
        grouped["p"].item() == pytest.approx(0.5)
        and not grouped["significant"].item()
        and grouped["test"].item() == "group signs"
    )
    assert compare_pairs({"a": best, "b": best}, groups=fields)["p"].item() == 1
    table = grouped_accuracy({"a": worse}, fields).iloc[0]
    assert table["groups"] == 14 and table["grouped_low"] < table["exact_low"] and 10 < table["effective"] <= 14
    assert table["method"] == "Clopper-Pearson on effective groups"


@settings(max_examples=20, deadline=None)
@given(st.floats(0.2, 1), st.integers(0, 100))
def test_calibration_measures(accuracy, seed):
    table = dummy_predictions(accuracy, (8, 9, 10), seed=seed)
    values, classes = probabilities_of(table), classes_of(table)
    assert brier_score(table) == pytest.approx(brier_score_loss(table["class"], values, labels=classes))
    assert log_loss_of(table) == pytest.approx(log_loss(table["class"], values, labels=classes), abs=1e-9)
    confidence, right = values.max(axis=1), predicted_labels(table) == table["class"].to_numpy()
    ece = sum(
        abs(confidence[inside].mean() - right[inside].mean()) * inside.mean()
        for i in range(15)
        if (inside := (confidence > i / 15) & (confidence <= (i + 1) / 15)).any()
    )
    assert calibration_error(table) == pytest.approx(ece, abs=1e-6)
    assert reliability_table(table)["images"].sum() == 27


def test_certain_answers_fall_into_the_last_bin():
    table = dummy_predictions().assign(**{"p_Normal": 1.0, "p_Pre-B": 0.0, "p_Pro-B": 0.0})
    only = reliability_table(table).iloc[0]
    assert len(reliability_table(table)) == 1 and (only["from"], only["to"]) == (0.9, 1.0)
    assert calibration_error(table) == pytest.approx(1 - 25 / 111)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 10), st.integers(0, 50))
def test_temperature_changes_no_answer_and_can_be_undone(temperature, seed):
    table = dummy_predictions(0.7, (5, 5, 5), seed=seed)
    scaled = scale_temperature(table, temperature)
    assert (predicted_labels(scaled) == predicted_labels(table)).all()
    if temperature >= 1:
        np.testing.assert_allclose(
            probabilities_of(scale_temperature(scaled, 1 / temperature)), probabilities_of(table), atol=1e-6
        )
    one = scale_temperature(table, 1.0)
    np.testing.assert_allclose(probabilities_of(one), probabilities_of(table), atol=1e-9)


def test_temperature_looks_at_validation_only():
    validation, test = dummy_predictions(0.8, (60, 60, 60), subset="validation"), dummy_predictions(0.5, seed=1)
    both, alone = pd.concat([validation, test], ignore_index=True), validation
    assert fit_temperature(both) == fit_temperature(alone)
    with pytest.raises(PredictionsError, match="no subset 'validation'"):
        fit_temperature(test)
    grid = np.geomspace(*TEMPERATURES, 400)
    best = grid[np.argmin([log_loss_of(scale_temperature(validation, t)) for t in grid])]
    assert fit_temperature(both) == pytest.approx(best, rel=0.02)


def test_calibration_table_says_when_validation_cannot_tell():
    perfect = pd.concat([dummy_predictions(1.0, subset="validation"), dummy_predictions(1.0)], ignore_index=True)
    assert calibration_table({"yolo11": perfect})["note"].item().startswith("at the limit")
    assert "temperature" not in calibration_table({"yolo11": dummy_predictions()})
    assert len(reliability_figure({f"m{i}": perfect for i in range(5)}).axes) == 8


def test_average_precision_by_hand():
    table = pd.DataFrame(
        {
            "pair": list("abcd"),
            "path": "",
            "subset": "test",
            "class": ["Pro-B", "Normal", "Pro-B", "Normal"],
            "p_Normal": [0.1, 0.2, 0.3, 0.9],
        }
    ).assign(**{"p_Pro-B": lambda t: 1 - t["p_Normal"]})
    assert average_precisions(table)["Pro-B"] == pytest.approx((1 + 2 / 3) / 2)
    with pytest.raises(PredictionsError, match="no image of Normal"):
        precision_recall_figure({"a": table[table["class"] == "Pro-B"]})


def test_cached_features(tmp_path):
    path, calls = tmp_path / "f.npz", []
    compute = lambda: calls.append(1) or np.arange(6).reshape(3, 2)
    first = cached_features(path, list("abc"), compute)
    assert first.dtype == np.float32 and (cached_features(path, list("abc"), compute) == first).all() and len(calls) == 1
    cached_features(path, list("acb"), compute)
    assert len(calls) == 2
    path.write_bytes(path.read_bytes()[:50])
    assert (cached_features(path, list("acb"), compute) == first).all() and len(calls) == 3
    with pytest.raises(ValueError, match="for 2 images"):
        cached_features(path, list("ab"), compute)


def test_cross_validation():
    random = np.random.default_rng(1)
    pairs = pd.DataFrame({"pair": [f"p{i}" for i in range(90)], "class": np.repeat(["Normal", "Pre-B", "Pro-B"], 30)})
    features = random.normal(size=(90, 5)) + 3 * pd.get_dummies(pairs["class"]).to_numpy() @ random.normal(size=(3, 5))
    groups = np.repeat(np.arange(30), 3)
    table = cross_validate(features, pairs, groups, folds=3, repeats=2)
    pd.testing.assert_frame_equal(table, cross_validate(features, pairs, groups, folds=3, repeats=2))
    assert len(table) == 180 and set(table.groupby("pair").size()) == {2}
    by_repeat = table.groupby("repeat")["p_Normal"].apply(list)
    assert by_repeat[0] != by_repeat[1]
    found = cross_validated_accuracy(table)
    assert (
        found.estimate == pytest.approx((predicted_labels(table) == table["class"]).mean())
        and found.n == 90
        and found.groups == 30
    )
    with pytest.raises(ValueError, match="Pro-B has 10 groups, 11 folds"):
        cross_validate(features, pairs, np.where(pairs["class"] == "Pro-B", groups, np.arange(90) + 100), folds=11)


def test_groups_never_cross_folds():
    # each group has one constant feature that names its class only within the group: known groups would be recognised
    random = np.random.default_rng(2)
    group = np.repeat(np.arange(45), 4)
    pairs = pd.DataFrame(
        {
            "pair": [f"p{i}" for i in range(180)],
            "class": np.array(["Normal", "Pre-B", "Pro-B"])[random.permutation(np.arange(45) % 3)[group]],
        }
    )
    features = random.normal(size=(45, 40))[group]
    assert cross_validated_accuracy(cross_validate(features, pairs, repeats=1)).estimate > 0.9
    assert cross_validated_accuracy(cross_validate(features, pairs, group, repeats=1)).estimate < 0.6
