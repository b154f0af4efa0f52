"""Intervals, tests between models and cross-validation; golden values by hand or from R."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import f, t

from leukemia_nb.evaluation.cross_validation import repeated_cross_val_predict, cross_validated_accuracy
from leukemia_nb.evaluation.predictions import PredictionsError, predicted_labels
from leukemia_nb.evaluation.uncertainty import (
    clopper_pearson,
    cluster_bootstrap,
    compare_model_pairs,
    difference_figure,
    _effective_sample_size,
    format_proportion,
    korn_graubard_interval,
    _holm,
    _mcnemar,
    significance_sentence,
    two_way_interval,
)
from leukemia_nb.testing import dummy_predictions


# Agresti and Coull 1998; R: binom.test(k, n)$conf.int
@pytest.mark.parametrize(
    "k, n, low, high",
    [
        (0, 10, 0.0, 0.3084971),
        (5, 10, 0.1870860, 0.8129140),
        (9, 10, 0.5549839, 0.9974714),
        (10, 10, 0.6915029, 1.0),
        (81, 263, 0.2527, 0.3676),
    ],
)
def test_exact_interval(k, n, low, high):
    assert clopper_pearson(k, n) == pytest.approx((low, high), abs=5e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_exact_interval_holds_the_estimate_and_mirrors(pair):
    k, n = pair
    low, high = clopper_pearson(k, n)
    assert 0 <= low <= k / n <= high <= 1 and low < high
    assert clopper_pearson(n - k, n) == pytest.approx((1 - high, 1 - low), abs=1e-9)


@pytest.mark.parametrize("k, n", [(1, 0), (0, 0), (-1, 5), (6, 5)])
def test_impossible_counts(k, n):
    with pytest.raises(ValueError, match="not possible"):
        clopper_pearson(k, n)


def test_format_of_proportions():
    assert format_proportion(407 / 417, 0.9563, 0.9884, 407, 417) == "97.6 % (95 % CI 95.6–98.8; 407/417)"
    assert format_proportion(0.5) == "50.0 %" and format_proportion(0.5, count=1, n=2) == "50.0 % (1/2)"
    assert format_proportion(0.25, 0.1, 0.4) == "25.0 % (95 % CI 10.0–40.0)"
    assert format_proportion(np.nan) == "–" and format_proportion(0.25, np.nan, np.nan, 1, 4) == "25.0 % (1/4)"
    assert format_proportion(0.25, 0.1) == "25.0 %" and format_proportion(0.25, count=3) == "25.0 %"


def test_independent_images_give_the_exact_interval():
    for n_correct, n in ((0, 10), (1, 7), (340, 400), (102, 103), (103, 103)):
        found = korn_graubard_interval(np.arange(n) < n_correct)
        assert (found.low, found.high) == pytest.approx(clopper_pearson(n_correct, n), abs=1e-9)
        assert (found.estimate, found.n, found.groups, found.n_effective) == (n_correct / n, n, n, n)
        assert found.method == "Korn-Graubard (ICC = 1)"
    assert korn_graubard_interval([1.0]).low == pytest.approx(0.025) and korn_graubard_interval([0.0]).high == pytest.approx(
        0.975
    )


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=30), st.floats(0, 1))
def test_interval_is_korn_and_graubards_with_the_worst_design_effect(sizes, proportion):
    """The published formula, F quantiles instead of the beta distribution's: v1 = 2x, v2 = 2(n* - x + 1), and its mirror image."""
    sizes = np.array(sizes)
    n, n_correct = sizes.sum(), round(proportion * sizes.sum())
    found = korn_graubard_interval(np.arange(n) < n_correct, np.repeat(np.arange(len(sizes)), sizes))
    effective = n**2 / (sizes**2).sum()
    trials = effective * (t.ppf(0.975, n - 1) / t.ppf(0.975, effective - 1)) ** 2 if effective > 1.001 else None
    assert found.n_effective == pytest.approx(effective) and found.low <= found.estimate <= found.high
    if trials is None or trials < 1e-3:
        assert found.low < 0.05 and found.high > 0.95
        return
    x = n_correct / n * trials
    low = 0 if not n_correct else 1 / (1 + (trials - x + 1) / (x * f.ppf(0.025, 2 * x, 2 * (trials - x + 1))))
    high = 1 if n_correct == n else 1 - 1 / (1 + (x + 1) / ((trials - x) * f.ppf(0.025, 2 * (trials - x), 2 * (x + 1))))
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-6)


def test_fewer_groups_give_wider_intervals_and_one_the_whole_range():
    correct = np.arange(103) < 101
    intervals = [korn_graubard_interval(correct, np.arange(103) // size) for size in (1, 2, 5, 20, 103)]
    widths = [one.high - one.low for one in intervals]
    assert widths == sorted(widths) and widths[-1] == pytest.approx(1, abs=1e-4)
    assert _effective_sample_size([0] * 9 + [1]) == pytest.approx(100 / 82)


@pytest.mark.parametrize("sizes", [[1] * 103, [1] * 97 + [2] * 3, [10] * 10 + [3], [30] + [1] * 73])
@pytest.mark.parametrize("rho", [0, 0.5, 1])
def test_korn_graubard_interval_covers(sizes, rho):
    """0.95 within three standard errors of 4,000 simulated test subsets; the percentile bootstrap has 0.86 to 0.9 for the first two."""
    sizes, random = np.array(sizes), np.random.default_rng(5)
    group = np.repeat(np.arange(len(sizes)), sizes)
    every = [korn_graubard_interval(np.arange(103) < k, group) for k in range(104)]
    shape = (4000, len(sizes))
    for p in (0.9, 0.97):
        beta = (p * (1 / rho - 1), (1 - p) * (1 / rho - 1)) if 0 < rho < 1 else None
        rate = random.beta(*beta, shape) if beta else random.random(shape) < p if rho else np.full(shape, p)
        counts = random.binomial(sizes, rate).sum(axis=1)
        assert np.mean([every[k].low <= p <= every[k].high for k in counts]) > 0.95 - 3 * np.sqrt(0.95 * 0.05 / 4000), p


def test_bootstrap_of_two_groups_by_hand():
    # two groups of sizes 1 and 3, means 1 and 0: resampled means 1, 1/4 (twice) and 0
    found = cluster_bootstrap([1, 0, 0, 0], ["a", "b", "b", "b"])
    assert (found.estimate, found.low, found.high, found.n, found.groups) == (0.25, 0.0, 1.0, 4, 2)
    assert found.n_effective == pytest.approx(16 / 10)


def test_bootstrap_takes_other_values_and_is_seeded():
    values, groups = np.random.default_rng(0).normal(5, 1, 60), np.repeat(np.arange(20), 3)
    one = cluster_bootstrap(values, groups, seed=1)
    assert one == cluster_bootstrap(values, groups, seed=1) != cluster_bootstrap(values, groups, seed=2)
    assert one.low < 5 < one.high and one.method == "percentile bootstrap of groups"
    means = values.reshape(20, 3).mean(axis=1)
    assert one.high - one.low == pytest.approx(2 * 1.96 * means.std() / np.sqrt(20), rel=0.1)


@pytest.mark.parametrize(
    "values, groups, message",
    [
        ([], None, "0 values"),
        ([1, 0], ["a"], "2 values and 1 groups"),
        ([1, np.nan], None, "finite"),
        ([1, 0], ["a", None], "has no group"),
    ],
)
def test_intervals_refuse(values, groups, message):
    for interval in (korn_graubard_interval, cluster_bootstrap):
        with pytest.raises(ValueError, match=message):
            interval(values, groups)


def test_intervals_refuse_what_is_not_theirs():
    for values in ([0.5, 1.2], [-0.1]):
        with pytest.raises(ValueError, match="between 0 and 1"):
            korn_graubard_interval(values)
    with pytest.raises(ValueError, match="only one group"):
        cluster_bootstrap([1, 0], ["a", "a"])


# by hand: twice the smaller tail of the binomial, at most 1; comb(22, 0..6) sums to 110,056
@pytest.mark.parametrize(
    "b, c, p", [(0, 0, 1), (1, 0, 1), (5, 0, 0.0625), (6, 0, 0.03125), (6, 16, 2 * 110_056 / 2**22), (10, 10, 1)]
)
def test_mcnemar(b, c, p):
    assert _mcnemar(b, c) == pytest.approx(p, abs=1e-7) and _mcnemar(c, b) == pytest.approx(p, abs=1e-7)


def test_holm_is_rs():  # p.adjust(..., "holm")
    assert list(_holm([0.01, 0.02, 0.03, 0.04, 0.05])) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert list(_holm([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert list(_holm([0.6, 0.9])) == pytest.approx([1.0, 1.0])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_is_monotone_and_between_the_raw_and_bonferroni(values):
    adjusted, values = _holm(values), np.array(values)
    assert (adjusted >= values - 1e-12).all() and (adjusted <= np.minimum(1, values * len(values)) + 1e-12).all()
    order = np.argsort(values, kind="stable")
    assert (np.diff(adjusted[order]) >= -1e-12).all()


def errs_on(rows: list[int], n: int = 12) -> pd.DataFrame:
    """Predictions of n Normal images, wrong on some rows."""
    table = pd.DataFrame({"pair": [f"p{i:02}" for i in range(n)], "path": "", "subset": "test", "class": "Normal"})
    p = np.where(np.isin(np.arange(n), rows), 0.2, 0.8)
    return table.assign(**{"p_Normal": p, "p_Pro-B": 1 - p})


def test_comparison_of_two_models_by_hand():
    """First wrong on 0; second wrong on 1..7: 7 against 1 discordant images, p = 2 (1 + 8) / 2^8."""
    row = compare_model_pairs({"a": errs_on([0, 11]), "b": errs_on([1, 2, 3, 4, 5, 6, 7, 11])}).iloc[0]
    assert row[["first", "second", "n_images", "only_first_correct", "only_second_correct"]].tolist() == ["a", "b", 12, 7, 1]
    assert row["difference"] == pytest.approx(6 / 12) and row["p"] == row["p_holm"] == pytest.approx(2 * 9 / 256)
    assert not row["significant"] and row["test"] == "McNemar's exact test"
    assert compare_model_pairs({"a": errs_on([0, 11]), "b": errs_on([1, 2, 3, 4, 5, 6, 7, 11])}, alpha=0.08)["significant"].item()


def test_pairs_of_models_are_adjusted_together():
    models = {"a": errs_on([]), "b": errs_on(list(range(7))), "c": errs_on(list(range(8)))}
    table = compare_model_pairs(models)
    assert table[["first", "second"]].agg("".join, axis=1).tolist() == ["ab", "ac", "bc"]
    assert table["p"].tolist() == pytest.approx([2 / 2**7, 2 / 2**8, 1.0])
    assert table["p_holm"].tolist() == pytest.approx([2 * 2 / 2**7, 3 * 2 / 2**8, 1.0])
    assert table["significant"].tolist() == [True, True, False]


def test_images_are_matched_by_name_not_by_row():
    one, two = dummy_predictions(0.9, seed=1), dummy_predictions(0.8, seed=2)
    plain, mixed = (compare_model_pairs({"a": one, "b": table}) for table in (two, two.sample(frac=1, random_state=3)))
    pd.testing.assert_frame_equal(plain, mixed)
    correct = [predicted_labels(table) == table["class"] for table in (one, two)]
    assert plain.loc[0, "only_first_correct"] == (correct[0] & ~correct[1]).sum()
    assert plain.loc[0, "difference"] == pytest.approx((100 - 89) / 111)


def test_other_images_are_refused():
    one = dummy_predictions()
    with pytest.raises(PredictionsError, match="b: its test images are not those"):
        compare_model_pairs({"a": one, "b": one.iloc[1:]})
    with pytest.raises(PredictionsError, match="at least two models"):
        compare_model_pairs({"a": one})


def test_sentences():
    best, middle, worst = (dummy_predictions(a, seed=7) for a in (1.0, 0.85, 0.3))
    text = significance_sentence(compare_model_pairs({"yolov8": best, "yolo11": best, "mobilenet_v2": worst}))
    assert text == (
        "MobileNetV2 differs from every other model (78 discordant images, adjusted p < 0.001 at most). "
        "YOLOv8 and YOLO11 are not significantly different (McNemar's exact test, Holm-adjusted over 3 comparisons, 111 images)."
    )
    for models in ({"yolov8": best, "yolo11": worst}, {"yolo11": worst, "yolov8": best}):
        start = "YOLOv8 has a higher accuracy than YOLO11 (78 against 0 discordant, adjusted p < 0.001)"
        assert significance_sentence(compare_model_pairs(models)).startswith(start)
    same = significance_sentence(compare_model_pairs({"yolov8": best, "yolo11": best, "yolo12": best}))
    assert same.startswith("YOLOv8, YOLO11 and YOLO12 are not significantly") and same.endswith(
        "No image is predicted correctly by one model and wrongly by another."
    )
    few = significance_sentence(compare_model_pairs({"a": errs_on([0]), "b": errs_on([1, 2])}))
    assert few.endswith("at most 3 discordant images in a model pair, and the smallest unadjusted p is 1.00.")
    near, close = dummy_predictions(0.94, seed=7), dummy_predictions(0.97, seed=7)
    mixed = significance_sentence(compare_model_pairs({"yolov8": best, "yolo11": close, "yolo12": near, "mobilenet_v2": middle}))
    start = "MobileNetV2 differs from every other model (10 to 17 discordant images, adjusted p = 0.008 at most). "
    start += "YOLOv8 has a higher accuracy than YOLO12 (7 against 0 discordant, adjusted p = 0.047). No other two models are"
    assert mixed.startswith(start), mixed


def test_difference_figure_marks_significant_pairs():
    table = compare_model_pairs({"a": errs_on([]), "b": errs_on(list(range(7))), "c": errs_on(list(range(8)))})
    texts = [text.get_text() for text in difference_figure(table).axes[0].texts]
    assert texts == ["−58.3*", "−66.7*", "−8.3"]


def test_groups_make_differences_weaker():
    best, worse = dummy_predictions(1.0, (40, 40, 0)), dummy_predictions(1.0, (40, 40, 0))
    worse.loc[:11, ["p_Normal", "p_Pre-B", "p_Pro-B"]] = [0.0, 1.0, 0.0]
    fields = {pair: i // 6 for i, pair in enumerate(worse["pair"])}
    assert compare_model_pairs({"a": best, "b": worse})["p"].item() == pytest.approx(2 / 2**12)
    assert compare_model_pairs({"a": best, "b": worse}, groups={})["p"].item() == pytest.approx(2 / 2**12, abs=2e-3)
    grouped = compare_model_pairs({"a": best, "b": worse}, groups=fields)
    assert grouped["p"].item() == pytest.approx(0.5) and not grouped["significant"].item()
    assert grouped["test"].item() == "sign-flip permutation test"
    assert compare_model_pairs({"a": best, "b": best}, groups=fields)["p"].item() == 1
    assert compare_model_pairs({"a": best, "b": worse}, groups=dict.fromkeys(worse["pair"], 1))["p"].item() == 1  # one group


# ---- cross-validation


def logistic():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))


def test_cross_validation():
    random = np.random.default_rng(1)
    y = pd.Series(np.repeat(["Normal", "Pre-B", "Pro-B"], 30), [f"p{i}" for i in range(90)])
    X = random.normal(size=(90, 5)) + 3 * pd.get_dummies(y).to_numpy() @ random.normal(size=(3, 5))
    groups = np.repeat(np.arange(30), 3)
    table = repeated_cross_val_predict(logistic(), X, y, groups, n_splits=3, n_repeats=2)
    pd.testing.assert_frame_equal(table, repeated_cross_val_predict(logistic(), X, y, groups, n_splits=3, n_repeats=2))
    assert len(table) == 180 and set(table.groupby("pair").size()) == {2} and set(table["subset"]) == {"fold"}
    by_repeat = table.groupby("repeat")["p_Normal"].apply(list)
    assert by_repeat.index.tolist() == [0, 1] and by_repeat[0] != by_repeat[1]
    again = repeated_cross_val_predict(logistic(), X, y, groups, n_splits=3, n_repeats=1, random_state=1)
    assert again["p_Normal"].tolist() == by_repeat[1]  # repeat 1 of seed 0 is repeat 0 of seed 1
    found = cross_validated_accuracy(table)
    assert found.estimate == pytest.approx((predicted_labels(table) == table["class"]).mean())
    assert (found.n, found.groups) == (90, 30)
    with pytest.raises(ValueError, match="Pro-B has 10 groups, 11 folds"):
        repeated_cross_val_predict(logistic(), X, y, np.where(y == "Pro-B", groups, np.arange(90) + 100), n_splits=11)
    assert (
        len(repeated_cross_val_predict(logistic(), X, y, np.where(y == "Pro-B", groups, np.arange(90) + 100), n_splits=10)) == 90
    )


def test_permuted_labels_are_fitted_and_scored_in_the_same_folds():
    random = np.random.default_rng(2)
    y = pd.Series(np.repeat(["a", "b"], 30), [f"p{i}" for i in range(60)])
    X, groups = random.normal(size=(60, 3)) + 4 * (y == "b").to_numpy()[:, None], np.arange(60) // 2
    own = y.to_numpy(str)
    swapped = np.where(own == "a", "b", "a")
    table = repeated_cross_val_predict(logistic(), X, y, groups, n_splits=3, permuted=[own, swapped, own])
    first, second, third = (part.reset_index(drop=True) for _, part in table.groupby("repeat"))
    expected = repeated_cross_val_predict(logistic(), X, y, groups, n_splits=3)
    assert first["p_a"].tolist() == third["p_a"].tolist() == expected["p_a"].tolist()
    assert second["p_b"].to_numpy() == pytest.approx(first["p_a"].to_numpy(), abs=1e-3)
    assert second["class"].tolist() == swapped.tolist() and (predicted_labels(second) == second["class"]).mean() > 0.9


def test_random_state_of_an_estimator_follows_the_repeat():
    from sklearn.dummy import DummyClassifier

    y = pd.Series(["a", "b"] * 20, [f"p{i}" for i in range(40)])
    table = repeated_cross_val_predict(
        DummyClassifier(strategy="stratified", random_state=5), np.zeros((40, 1)), y, n_splits=2, n_repeats=2, random_state=7
    )
    assert table.groupby("repeat")["p_a"].apply(tuple).nunique() == 2


def test_groups_never_cross_folds():
    # each group has constant features that name its class only within the group: known groups would be recognised
    random = np.random.default_rng(2)
    group = np.repeat(np.arange(45), 4)
    labels = np.array(["Normal", "Pre-B", "Pro-B"])[random.permutation(np.arange(45) % 3)[group]]
    y, X = pd.Series(labels, [f"p{i}" for i in range(180)]), random.normal(size=(45, 40))[group]
    assert cross_validated_accuracy(repeated_cross_val_predict(logistic(), X, y)).estimate > 0.9
    assert cross_validated_accuracy(repeated_cross_val_predict(logistic(), X, y, group)).estimate < 0.6


def test_a_pair_without_a_group_is_its_own():
    from leukemia_nb.evaluation.uncertainty import group_labels

    pairs = ["a", "b", "c", "1"]
    labels = group_labels(pairs, {"a": 1, "b": 1, "d": 2})
    assert labels[0] == labels[1] and len(set(labels)) == 3
    assert len(set(group_labels(pairs, None))) == len(set(group_labels(pairs, {}))) == 4
    assert len(set(group_labels(pairs, {"a": "", "b": "", "c": float("nan"), "1": None}))) == 4
    assert len(set(group_labels(pairs, {"a": "", "b": "", "c": 0, "1": 0}))) == 3  # 0 is the name of a group


def test_few_clusters_that_agree_do_not_narrow_the_interval():
    values, rows = np.tile(np.arange(100) < 50, 2), np.repeat([0, 1], 100)
    for wrong in ([], [50]):  # clusters that agree exactly, and but for one image
        found = two_way_interval(values ^ np.isin(np.arange(200), wrong), rows, np.arange(200))
        assert (found.low, found.high) == pytest.approx((0.09, 0.91), abs=0.01)
    one = two_way_interval(values, np.zeros(200), np.arange(200))
    assert (one.low, one.high) == pytest.approx((0, 1), abs=1e-9)


@pytest.mark.parametrize(("clusters", "images"), [(2, 100), (3, 60), (6, 30)])
def test_coverage_with_few_clusters(clusters, images):
    random, truth, covered = np.random.default_rng(0), 0.669, 0
    for _ in range(200):
        rates = 1 / (1 + np.exp(-(np.log(7 / 3) + random.normal(size=clusters))))
        values = random.random((clusters, images)) < rates[:, None]
        found = two_way_interval(values.ravel(), np.repeat(range(clusters), images), np.arange(clusters * images))
        covered += found.low <= truth <= found.high
    assert covered / 200 > 0.91  # standard error 0.015


def test_interval_of_crossed_groups_by_hand():
    values = np.array([1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1])
    rows, columns = np.repeat(range(3), 4), np.tile(range(4), 3)
    deviation = values - 0.75  # sums by row 1, -2, 1; by column -1/4 three times and 3/4
    squares = [sum(deviation[group == i].sum() ** 2 for i in set(group)) for group in (rows, columns, np.arange(12))]
    assert squares == [6, 0.75, 2.25]
    found = two_way_interval(values, rows, columns)
    assert (found.estimate, found.n, found.groups) == (0.75, 12, 3)
    assert found.n_effective == pytest.approx(0.75 * 0.25 / ((6 + 0.75 - 2.25) / 144)) == pytest.approx(6)
    assert found.method == "Clopper-Pearson (two-way clusters)" and found.low < clopper_pearson(9, 12)[0]


def test_crossed_groups_that_hold_one_image_or_agree():
    alone = two_way_interval([1] * 9 + [0], range(10), range(10))
    assert (alone.low, alone.high) == pytest.approx(clopper_pearson(9, 10))
    agree = two_way_interval(np.ones(50), np.repeat(range(10), 5), np.tile(range(25), 2))
    assert agree.n_effective == 10 and agree.high == 1 and clopper_pearson(10, 10)[0] < 1.05 * agree.low + 0.1
    almost = two_way_interval(np.arange(50) > 0, np.repeat(range(10), 5), np.tile(range(25), 2))
    assert almost.low == pytest.approx(agree.low)  # an error does not narrow it
    none = two_way_interval(np.arange(50) < 1, np.repeat(range(10), 5), np.tile(range(25), 2))
    assert (none.low, none.high) == pytest.approx((1 - almost.high, 1 - almost.low))
    same = two_way_interval([1, 1, 0, 0], list("aabb"), list("aabb"))  # a group crossed with itself is a group
    assert same.n_effective == pytest.approx(2)
    bad = ([1, 2], [0, 1], [0, 1]), ([1, 0], [0, 1], [0]), ([1, 0], ["a", ""], [0, 1]), ([1, 0], [0, 1], [0, None])
    for arguments in bad:
        with pytest.raises(ValueError):
            two_way_interval(*arguments)
