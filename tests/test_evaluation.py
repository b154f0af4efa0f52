"""Predictions files, metrics, calibration, selective prediction and figures of the evaluation; golden values by hand."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from leukemia_nb.data.images import write_image
from leukemia_nb.data.classes import ClassMap
from leukemia_nb.evaluation.calibration import (
    augrc,
    _brier_score,
    calibration_pairs,
    calibration_sentence,
    calibration_table,
    _expected_calibration_error,
    fit_temperature,
    _log_loss,
    _null_calibration_errors,
    reliability_figure,
    _reliability_table,
    risk_coverage,
    risk_coverage_figure,
    _scale_temperature,
    selective_table,
    _TEMPERATURES,
)
from leukemia_nb.evaluation.metrics import (
    ORIGINAL_ACCURACY,
    ORIGINAL_TEST_IMAGES,
    accuracy_figure,
    class_table,
    compare_models,
    confusion_figure,
    confusion_table,
    curves_figure,
    grouped_accuracy,
    precision_recall_figure,
    readable_comparison,
    _by_class,
    roc_figure,
)
from leukemia_nb.evaluation.uncertainty import clopper_pearson
from leukemia_nb.evaluation.predictions import (
    PredictionsError,
    _check_predictions,
    classes_of,
    distinct_paths,
    model_titles,
    predict_new_images,
    predicted_labels,
    predictions_table,
    probabilities_of,
    read_all_predictions,
    read_predictions,
    readable_new_images,
    take_subset,
    new_images_figure,
    new_images_table,
    write_predictions,
)
from leukemia_nb.testing import dummy_predictions


def two_classes(labels: list[str], p_normal: list[float], subset: str = "test") -> pd.DataFrame:
    table = pd.DataFrame({"pair": [f"{subset}{i}" for i in range(len(labels))], "path": "", "subset": subset, "class": labels})
    return table.assign(**{"p_Normal": p_normal, "p_Pro-B": 1 - np.array(p_normal)})


@pytest.fixture
def ten() -> pd.DataFrame:
    """Eight predictions of Normal with confidence 0.9, six correct; two with 0.6, one correct."""
    return two_classes(["Normal"] * 6 + ["Pro-B"] * 2 + ["Normal", "Pro-B"], [0.9] * 8 + [0.6] * 2)


@pytest.fixture
def counted() -> pd.DataFrame:
    """Of 4 Normal images 3 are found; of 6 Pro-B images 1 is predicted Normal."""
    return two_classes(["Normal"] * 4 + ["Pro-B"] * 6, [0.9, 0.8, 0.7, 0.2, 0.6, 0.1, 0.1, 0.2, 0.3, 0.4])


# ---- predictions


@pytest.mark.parametrize(
    "name, n_correct",
    [
        ("yolov8", 111),
        ("yolo11", 111),
        ("yolo12", 111),
        ("mobilenet_v2", 110),
        ("dual_channel", 110),
        ("nasnet_mobile", 107),
        ("efficientnet_b0", 39),
    ],
)
def test_original_accuracies_are_counts_of_111(name, n_correct):
    assert ORIGINAL_TEST_IMAGES == 111 and round(n_correct / 111, 4) == pytest.approx(ORIGINAL_ACCURACY[name])


def test_dummy_predictions_are_as_accurate_as_asked():
    table = dummy_predictions(0.9, (25, 47, 39), seed=3)
    assert (predicted_labels(table) == table["class"]).sum() == 100 and table["class"].value_counts(sort=False).tolist() == [
        25,
        47,
        39,
    ]
    assert table["pair"].iloc[[0, 24, 25]].tolist() == ["Normal/test_001", "Normal/test_025", "Pre-B/test_001"]
    _check_predictions(table)


def test_predictions_survive_the_disk(tmp_path):
    table = dummy_predictions(0.9, classes=("None", "NA", "Pro-B"))
    write_predictions(table, tmp_path / "a.csv")
    back = read_predictions(tmp_path / "a.csv")
    assert list(back["class"]) == list(table["class"]) and classes_of(back) == ["None", "NA", "Pro-B"]
    np.testing.assert_allclose(probabilities_of(back), probabilities_of(table), atol=1e-8)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.csv"]


def test_a_bad_table_is_not_written(tmp_path):
    write_predictions(dummy_predictions(), tmp_path / "a.csv")
    before = (tmp_path / "a.csv").read_bytes()
    with pytest.raises(PredictionsError, match=r"a\.csv: column class missing"):
        write_predictions(dummy_predictions().drop(columns="class"), tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_bytes() == before


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda t: t.drop(columns=["pair", "path"]), "column pair, path missing"),
        (lambda t: t.drop(columns=["p_Pre-B", "p_Pro-B"]), "1 probability columns"),
        (lambda t: t.head(0), "no rows"),
        (lambda t: t.assign(**{"class": "Basophil"}), "'Basophil' has no probability column"),
        (lambda t: t.assign(**{"class": ""}), "class '' has no probability column"),
        (lambda t: t.assign(subset="new", **{"class": "Basophil"}), "'Basophil' has no probability column"),
        (lambda t: t.assign(pair="one"), "'one' has more than one row"),
        (lambda t: t.assign(**{"p_Normal": "high"}), "not a number"),
        (lambda t: t.assign(**{"p_Normal": np.nan}), r"nan.*not between 0 and 1"),
        (lambda t: t.assign(**{"p_Normal": -0.2, "p_Pre-B": 0.6, "p_Pro-B": 0.6}), r"\(111 such rows\)"),
        (lambda t: t.assign(**{"p_Normal": -1e-5, "p_Pre-B": 1e-5, "p_Pro-B": 1.0}), r"\(111 such rows\)"),
        (lambda t: t.assign(**{"p_Normal": t["p_Normal"] + 0.0011}), "sum of 1"),
        (lambda t: t.assign(**{"p_Normal": t["p_Normal"].where(t.index != 5, 0.0)}), r"'Normal/test_006' are .*\(1 such rows\)"),
    ],
)
def test_problems_of_a_table_are_named(spoil, message):
    with pytest.raises(PredictionsError, match=message):
        _check_predictions(spoil(dummy_predictions()))


def test_rounding_and_unlabelled_new_images_are_valid():
    table = dummy_predictions()
    probabilities = [name for name in table if name.startswith("p_")]
    _check_predictions(table.assign(**{name: table[name].astype(np.float16).astype(float) for name in probabilities}))
    _check_predictions(table.assign(**{"p_Normal": table["p_Normal"] + 0.0009}))
    _check_predictions(table.assign(**{"p_Normal": -5e-7, "p_Pre-B": 0.5, "p_Pro-B": 0.5}))
    _check_predictions(table.assign(**{"class": "", "subset": "new"}))
    two = two_classes(["Normal"], [0.7])
    assert _check_predictions(two) is two
    assert probabilities_of(two.assign(**{"p_Pro-B": 0.3006})).sum() == pytest.approx(1, abs=1e-12)


def test_broken_files(tmp_path):
    (tmp_path / "empty.csv").write_bytes(b"")
    with pytest.raises(PredictionsError, match=r"empty\.csv: not a table"):
        read_predictions(tmp_path / "empty.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x01,\x80")
    with pytest.raises(PredictionsError, match=r"binary\.csv: "):
        read_predictions(tmp_path / "binary.csv")
    with pytest.raises(PredictionsError, match="not there"):
        read_predictions(tmp_path / "none.csv")
    with pytest.raises(PredictionsError, match="no predictions"):
        read_all_predictions(tmp_path / "nowhere")


def test_models_come_in_the_order_of_the_registry(tmp_path):
    for name in ("yolo12", "another", "efficientnet_b0"):
        write_predictions(dummy_predictions(), tmp_path / f"{name}.csv")
    assert list(read_all_predictions(tmp_path)) == ["efficientnet_b0", "yolo12", "another"]


def test_predictions_table_joins_pairs_and_probabilities():
    table = dummy_predictions()
    with pytest.raises(PredictionsError, match=r"shape \(111, 2\)"):
        predictions_table(table, np.full((111, 2), 0.5), ["Normal", "Pre-B", "Pro-B"])
    pairs = table[["pair", "subset", "class"]].assign(original="x.png").iloc[::-1]
    joined = predictions_table(pairs, probabilities_of(table)[::-1], ["Normal", "Pre-B", "Pro-B"])
    assert list(joined.columns) == ["pair", "path", "subset", "class", "p_Normal", "p_Pre-B", "p_Pro-B"]
    assert set(joined["path"]) == {"x.png"} and joined.index.tolist() == list(range(111))
    assert joined["p_Pre-B"].tolist() == pytest.approx(table["p_Pre-B"].tolist()[::-1])
    assert (
        predictions_table(pairs.drop(columns="original"), probabilities_of(table), classes_of(table))["path"][0]
        == pairs["pair"].iloc[0]
    )


def test_order_of_columns_is_the_order_of_classes():
    table = dummy_predictions(0.9, seed=4)
    turned = table[["pair", "path", "subset", "class", "p_Pro-B", "p_Normal", "p_Pre-B"]]
    assert list(predicted_labels(turned)) == list(predicted_labels(table))
    assert _by_class(turned, roc_auc_score).to_dict() == pytest.approx(_by_class(table, roc_auc_score).to_dict())
    assert list(confusion_table(turned).index) == ["Pro-B", "Normal", "Pre-B"]
    assert _log_loss(turned) == pytest.approx(_log_loss(table))


def test_a_missing_subset_is_named():
    with pytest.raises(PredictionsError, match="no subset 'val', only test"):
        take_subset(dummy_predictions(), "val")
    both = pd.concat([dummy_predictions(subset="val"), dummy_predictions()])
    assert set(take_subset(both)["subset"]) == {"test"} and take_subset(both).index.tolist() == list(range(111))


# ---- metrics


def test_confusion_and_class_metrics_by_hand(counted):
    assert confusion_table(counted).to_numpy().tolist() == [[3, 1], [1, 5]]
    normal, pro = (row for _, row in class_table(counted).iterrows())
    assert normal[["n_images", "precision", "sensitivity", "specificity", "f1"]].tolist() == pytest.approx(
        [4, 3 / 4, 3 / 4, 5 / 6, 3 / 4]
    )
    assert pro[["n_images", "precision", "sensitivity", "specificity"]].tolist() == pytest.approx([6, 5 / 6, 5 / 6, 3 / 4])
    # exact intervals, R: binom.test(3, 4) and binom.test(5, 6)
    assert normal[["sensitivity_low", "sensitivity_high"]].tolist() == pytest.approx([0.19412, 0.99369], abs=1e-5)
    assert normal[["specificity_low", "specificity_high"]].tolist() == pytest.approx([0.35877, 0.99579], abs=1e-5)


def test_metrics_of_models_by_hand(counted):
    row = compare_models({"yolo11": counted}, weights_source={"yolo11": "ImageNet"}).iloc[0]
    assert (row["title"], row["n_correct"], row["n_images"], row["accuracy"]) == ("YOLO11", 8, 10, 0.8)
    assert np.isnan(row["original_study_accuracy"])  # that study had three classes
    assert compare_models({"yolo11": dummy_predictions(1.0)})["original_study_accuracy"].tolist() == [1.0]
    assert (row["low"], row["high"]) == pytest.approx((0.44390, 0.97479), abs=1e-5)  # R: binom.test(8, 10)
    f1_pro = 2 * (5 / 6) * (5 / 6) / (5 / 6 + 5 / 6)
    assert row["macro_f1"] == pytest.approx((3 / 4 + f1_pro) / 2) and row["balanced_accuracy"] == pytest.approx(
        (3 / 4 + 5 / 6) / 2
    )
    assert row["auc"] == pytest.approx(20.5 / 24) and row["constant_class"] == "" and row["weights"] == "ImageNet"
    text = readable_comparison(compare_models({"yolo11": counted}, weights_source={"yolo11": "ImageNet"})).iloc[0]
    assert text["Accuracy"] == "80.0 % (95 % CI 44.4–97.5; 8/10)" and "Original study" not in text
    assert text["ROC-AUC"] == "0.854" and text["Macro F1"] == "0.792" and "Note" not in text


@settings(max_examples=15, deadline=None)
@given(st.floats(0, 1), st.integers(0, 1000))
def test_metrics_are_scikit_learns(accuracy, seed):
    from sklearn import metrics

    table = dummy_predictions(accuracy, (7, 9, 6), seed=seed)
    row, truth, predicted = compare_models({"m": table}).iloc[0], table["class"], predicted_labels(table)
    assert row["n_correct"] == round(accuracy * 22) and row["accuracy"] == pytest.approx(metrics.accuracy_score(truth, predicted))
    assert row["macro_f1"] == pytest.approx(metrics.f1_score(truth, predicted, average="macro", zero_division=0))
    assert row["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(truth, predicted))
    assert row["auc"] == pytest.approx(metrics.roc_auc_score(truth, probabilities_of(table), multi_class="ovr"))
    assert np.isnan(row["original_study_accuracy"]) and row["title"] == "m"
    specificity = [metrics.recall_score(truth != c, predicted != c) for c in classes_of(table)]
    assert list(class_table(table)["specificity"]) == pytest.approx(specificity)


def test_a_single_class_in_test():
    table = dummy_predictions(1.0, (0, 12, 0))
    row = compare_models({"yolo11": table}).iloc[0]
    assert (
        np.isnan(row["auc"])
        and row["accuracy"] == row["macro_f1"] == row["balanced_accuracy"] == 1
        and row["constant_class"] == ""
    )
    by_class = class_table(table)
    assert by_class["sensitivity"].isna().tolist() == [True, False, True] == by_class["sensitivity_low"].isna().tolist()
    assert by_class["specificity"].isna().tolist() == [False, True, False]
    for refuses in (
        lambda t: _by_class(t, roc_auc_score),
        lambda t: roc_figure({"yolo11": t}),
        lambda t: precision_recall_figure({"a": t}),
    ):
        with pytest.raises(PredictionsError, match="images of Pre-B only"):
            refuses(table)
    assert readable_comparison(compare_models({"yolo11": table})).loc[0, "ROC-AUC"] == "–"
    with pytest.raises(PredictionsError, match="no predictions to compare"):
        compare_models({})


def test_a_constant_predictor_is_marked():
    table = dummy_predictions().assign(**{"p_Normal": 0.2, "p_Pre-B": 0.3, "p_Pro-B": 0.5})
    compared = compare_models({"efficientnet_b0": table})
    assert compared.loc[0, ["n_correct", "n_images", "constant_class", "weights"]].tolist() == [39, 111, "Pro-B", ""]
    assert readable_comparison(compared).loc[0, ["Note", "Weights"]].tolist() == ["predicts Pro-B for every image", "–"]
    assert compared["macro_f1"].item() == pytest.approx(2 * 39 / (111 + 39) / 3)  # F1 of the other two is 0
    assert compare_models({"a": table.head(1)})["constant_class"].item() == ""  # one image is not enough


def test_average_precision_by_hand():
    table = two_classes(["Normal", "Normal", "Pro-B", "Normal", "Pro-B"], [0.9, 0.8, 0.7, 0.6, 0.1])
    assert _by_class(table, average_precision_score)["Normal"] == pytest.approx((1 / 1 + 2 / 2 + 3 / 4) / 3)
    assert _by_class(table, roc_auc_score)["Normal"] == pytest.approx(5 / 6)


def test_grouped_accuracy_counts_groups():
    table = dummy_predictions(1.0, (40, 40, 0))
    table.loc[:11, ["p_Normal", "p_Pre-B", "p_Pro-B"]] = [0.0, 1.0, 0.0]
    fields = {pair: i // 6 for i, pair in enumerate(table["pair"])}
    row = grouped_accuracy({"a": table}, fields).iloc[0]
    assert (row["n_images"], row["groups"], row["accuracy"]) == (80, 14, 0.85)
    assert row["n_effective"] == pytest.approx(80**2 / (13 * 36 + 4)) and row["method"] == "Korn-Graubard (ICC = 1)"
    assert (row["exact_low"], row["exact_high"]) == pytest.approx((0.75263, 0.92002), abs=5e-5)  # R: binom.test(68, 80)
    assert row["grouped_low"] < row["exact_low"] < row["exact_high"] < row["grouped_high"]
    alone = grouped_accuracy({"a": table}, {table["pair"][0]: 1}).iloc[0]  # pairs without a group are alone
    assert alone["groups"] == 80 and alone["grouped_low"] == pytest.approx(alone["exact_low"], abs=1e-9)


# ---- calibration and selective prediction


def test_reliability_by_hand(ten):
    table = _reliability_table(ten, n_bins=10)
    assert table[["to", "n_images", "confidence", "accuracy"]].to_numpy().tolist() == [
        pytest.approx([0.6, 2, 0.6, 0.5]),
        pytest.approx([0.9, 8, 0.9, 0.75]),
    ]
    assert table.loc[1, ["low", "high"]].tolist() == pytest.approx([0.34914, 0.96815], abs=1e-5)  # R: binom.test(6, 8)
    assert _expected_calibration_error(ten) == pytest.approx(0.8 * 0.15 + 0.2 * 0.1)
    assert _brier_score(ten) == pytest.approx(2 * (6 * 0.01 + 2 * 0.81 + 0.16 + 0.36) / 10)
    assert _log_loss(ten) == pytest.approx(-np.log([0.9] * 6 + [0.1] * 2 + [0.6, 0.4]).mean())


def test_log_loss_of_impossible_predictions_is_finite():
    assert _log_loss(two_classes(["Normal", "Pro-B"], [0.0, 0.5])) == pytest.approx(
        (-np.log(np.finfo(float).eps) - np.log(0.5)) / 2, rel=1e-3
    )


def test_certain_predictions_fall_into_the_last_bin():
    table = dummy_predictions().assign(**{"p_Normal": 1.0, "p_Pre-B": 0.0, "p_Pro-B": 0.0})
    only = _reliability_table(table, 10).iloc[0]
    assert len(_reliability_table(table)) == 1 and only["to"] == 1.0
    assert _expected_calibration_error(table) == pytest.approx(1 - 25 / 111)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.2, 1), st.integers(0, 100))
def test_calibration_metrics_of_any_predictions(accuracy, seed):
    from sklearn.metrics import log_loss as loss

    table = dummy_predictions(accuracy, (8, 9, 10), seed=seed)
    values, classes = probabilities_of(table), classes_of(table)
    assert _log_loss(table) == pytest.approx(loss(table["class"], values, labels=classes), abs=1e-9)
    confidence, correct = values.max(axis=1), predicted_labels(table) == table["class"].to_numpy()
    bins = [(confidence > i / 15) & (confidence <= (i + 1) / 15) for i in range(15)]
    ece = sum(abs(confidence[inside].mean() - correct[inside].mean()) * inside.mean() for inside in bins if inside.any())
    assert _expected_calibration_error(table) == pytest.approx(ece, abs=1e-6)
    assert _reliability_table(table)["n_images"].sum() == 27


def test_temperature_by_hand():
    """Odds of 9 at temperature 2 are odds of 3."""
    scaled = _scale_temperature(two_classes(["Normal"], [0.9]), 2)
    assert scaled["p_Normal"].item() == pytest.approx(0.75) and scaled["p_Pro-B"].item() == pytest.approx(0.25)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.1, 10), st.integers(0, 50))
def test_temperature_changes_no_prediction_and_can_be_undone(temperature, seed):
    table = dummy_predictions(0.7, (5, 5, 5), seed=seed)
    scaled = _scale_temperature(table, temperature)
    assert (predicted_labels(scaled) == predicted_labels(table)).all()
    if temperature >= 1:
        back = _scale_temperature(scaled, 1 / temperature)
        np.testing.assert_allclose(probabilities_of(back), probabilities_of(table), atol=1e-6)


def test_temperature_is_fitted_on_the_validation_subset_alone():
    """8 of 10 correct at confidence 0.95 are calibrated at odds of 4: T = log 19 / log 4."""
    val, test = (
        two_classes(["Normal"] * 8 + ["Pro-B"] * 2, [0.95] * 10, "val"),
        dummy_predictions(0.5, classes=("Normal", "Pro-B"), per_class=(9, 9)),
    )
    assert fit_temperature(pd.concat([val, test])) == pytest.approx(np.log(19) / np.log(4), rel=1e-3)
    with pytest.raises(PredictionsError, match="no subset 'val'"):
        fit_temperature(test)
    assert _TEMPERATURES == (0.05, 20.0)


@pytest.mark.parametrize("labels", [["Normal"] * 9, ["Pro-B"] * 9, ["Normal"] * 9 + ["Pro-B"] * 8])
def test_a_subset_that_does_not_determine_a_temperature_gives_none(labels):
    """Every prediction correct; every one wrong; nearly as many wrong as correct, at confidence 0.95: T would exceed 20."""
    val = two_classes(labels, [0.95] * len(labels), "val")
    assert np.isnan(fit_temperature(val))
    row = calibration_table({"cells": pd.concat([val, val.assign(subset="test")])}).iloc[0]
    assert row["note"] and np.isnan(row["temperature"]) and "scaled_ece" not in row


def test_calibration_table_by_hand(ten):
    val = two_classes(["Normal"] * 8 + ["Pro-B"] * 2, [0.95] * 10, "val")
    row = calibration_table({"yolo11": pd.concat([val, ten], ignore_index=True)}).iloc[0]
    assert (row["model"], row["title"], row["n_images"], row["note"]) == ("yolo11", "YOLO11", 10, "")
    assert row["accuracy"] == pytest.approx(0.7) and row["confidence"] == pytest.approx(0.84)
    assert row[["ece", "brier", "log_loss"]].tolist() == pytest.approx([0.14, 0.44, _log_loss(ten)])
    scaled = _scale_temperature(ten, row["temperature"])
    assert row["temperature"] == pytest.approx(np.log(19) / np.log(4), rel=1e-3)
    assert row["scaled_ece"] == pytest.approx(_expected_calibration_error(scaled)) != pytest.approx(0.14)
    assert row[["scaled_brier", "scaled_log_loss"]].tolist() == pytest.approx([_brier_score(scaled), _log_loss(scaled)])
    assert "temperature" not in calibration_table({"yolo11": ten})
    perfect = pd.concat([dummy_predictions(1.0, subset="val"), dummy_predictions(1.0)], ignore_index=True)
    assert calibration_table({"yolo11": perfect})["note"].item() == "not determined by the validation subset"


def test_risk_and_coverage_by_hand(ten):
    curve = risk_coverage(ten)
    assert curve["threshold"].tolist() == [0.9, 0.6] and curve["coverage"].tolist() == [0.8, 1.0]
    assert curve["selective_risk"].tolist() == [0.25, 0.3] and curve["generalized_risk"].tolist() == [0.2, 0.3]
    assert augrc(ten) == pytest.approx(0.8 * 0.2 / 2 + 0.2 * (0.2 + 0.3) / 2)
    assert augrc(two_classes(["Normal"] * 4, [0.9, 0.8, 0.7, 0.6])) == 0
    always_wrong = two_classes(["Pro-B"] * 4, [0.9, 0.8, 0.7, 0.6])
    assert augrc(always_wrong) == pytest.approx(0.5) and risk_coverage(always_wrong)["coverage"].tolist() == [
        0.25,
        0.5,
        0.75,
        1.0,
    ]


def test_the_null_distribution_of_one_bin_is_that_of_a_binomial():
    """Of 50 images with confidence 0.8 all lie in one bin: the ECE is |k/50 - 0.8|, k binomial."""
    from scipy.stats import binom

    null = _null_calibration_errors(two_classes(["Normal"] * 50, [0.8] * 50), n_resamples=4000)
    k = np.arange(51)
    assert null.mean() == pytest.approx((binom.pmf(k, 50, 0.8) * np.abs(k / 50 - 0.8)).sum(), rel=0.05)
    assert np.allclose(null * 50 % 1 % 1, 0, atol=1e-6) or set(np.round(null * 50, 6)) <= set(np.round(np.abs(k - 40), 6))


def test_the_test_of_calibration_keeps_its_level_and_finds_over_confidence(ten):
    """Calibrated models are rejected in about 5 %; one of 40 images with confidence 0.95 and accuracy 0.5 always."""
    rng, rejected = np.random.default_rng(0), []
    confidence = rng.uniform(0.5, 1, 60)
    for _ in range(200):
        labels = np.where(rng.random(60) < confidence, "Normal", "Pro-B")
        rejected.append(calibration_table({"yolo11": two_classes(labels, confidence)})["ece_p"].item() <= 0.05)
    assert 0.01 < np.mean(rejected) < 0.11
    table = calibration_table({"cells": two_classes(["Normal", "Pro-B"] * 20, [0.95] * 40), "yolo11": ten})
    assert table["ece_p"][0] < 0.01 < 0.05 < table["ece_p"][1] and table["ece"][0] > table["ece_null_95"][0]
    text = calibration_sentence(table)
    assert "larger than that of a calibrated model with the same confidences: Single-cell model (0.450" in text
    assert "Not distinguishable from calibrated at this number of images: YOLO11 (0.140" in text
    assert "Consistency resampling of 10 to 40 images, one-sided" in text


def test_the_test_of_calibration_keeps_its_level_with_groups():
    """Calibrated models whose images come in groups of five with one outcome; without the groups most are rejected."""
    rng, rejected, groups = np.random.default_rng(1), {"given": 0, "not": 0}, {f"t{i}": i // 5 for i in range(200)}
    for _ in range(40):
        confidence = rng.uniform(0.5, 1, 40)
        labels = np.repeat(np.where(rng.random(40) < confidence, "Normal", "Pro-B"), 5)
        table = two_classes(labels, np.repeat(confidence, 5)).assign(pair=list(groups))
        for name, of in {"given": groups, "not": None}.items():
            found = calibration_table({"yolo11": table}, groups=of)
            rejected[name] += found["ece_p"].item() < 0.05
            assert found["groups"].item() == (40 if of else 200)
            assert ("200 images in 40 groups, each correct" in calibration_sentence(found)) == bool(of)
    assert rejected["given"] <= 6 and rejected["not"] > 25
    assert "of 200 images, one-sided" in calibration_sentence(found.drop(columns="groups"))  # of an earlier run


def test_temperature_and_thresholds_are_chosen_without_near_duplicates():
    """Of 80 validation images 20 have one in training: 60 are enough, 59 are not, and a class must not be lost."""
    split = pd.DataFrame({"pair": [f"p{i}" for i in range(100)], "subset": ["train"] * 20 + ["val"] * 80})
    split["class"], split["group"] = ["Normal", "Pro-B"] * 50, [*range(20), *range(20), *range(20, 80)]
    pairs, note = calibration_pairs(split)
    assert pairs == [f"p{i}" for i in range(40, 100)] and note == ""
    split.loc[99, "group"] = 3
    pairs, note = calibration_pairs(split)
    assert len(pairs) == 80 and note.startswith("only 59 of 80 validation images have no near-duplicate in training: too few")
    assert calibration_pairs(split, 59)[1] == ""
    one_class = split.assign(**{"class": ["Normal"] * 40 + ["Pro-B"] * 60})
    pairs, note = calibration_pairs(one_class, 10)
    assert len(pairs) == 80 and "too few" not in note and "have no near-duplicate in training: none of class" in note
    assert calibration_pairs(split.assign(group=range(100)), 500) == ([f"p{i}" for i in range(20, 100)], "")


def test_selective_prediction_by_hand(ten):
    """Three of ten are wrong; two of them have the higher confidence, which is hardly better than none."""
    row = selective_table({"yolo11": ten.assign(pair=range(10))}).iloc[0]
    assert row[["n_images", "n_errors", "risk"]].tolist() == [10, 3, 0.3]
    assert row[["augrc", "augrc_optimal", "augrc_random"]].tolist() == pytest.approx([0.13, 0.045, 0.15])
    assert row[["low", "high"]].tolist() == pytest.approx(clopper_pearson(3, 10))
    twice = pd.concat([ten.assign(images="clean"), ten.assign(images="corrupted")])  # the same images: no more certain
    rows = selective_table({"yolo11": twice}, by="images").set_index("images")
    assert rows["n_errors"].tolist() == [3, 3]
    whole = selective_table({"yolo11": twice}).iloc[0]
    assert whole["n_images"] == 20 and whole["low"] <= row["low"] and row["high"] <= whole["high"]
    axes = risk_coverage_figure({"yolo11": twice, "cells": ten.assign(images="clean")}, by="images").axes
    assert [len(axis.lines) for axis in axes[:2]] == [2, 1]
    assert axes[0].lines[0].get_xydata().tolist() == pytest.approx(np.array([[0, 0], [0.8, 0.2], [1, 0.3]]))


# ---- figures


def test_the_reliability_diagram_shows_the_bins_of_its_error(ten):
    for n_bins in (3, 15):
        axis = reliability_figure({"yolo11": ten}, n_bins=n_bins).axes[0]
        assert f"ECE {_expected_calibration_error(ten, n_bins):.3f}" in [text.get_text() for text in axis.texts]
        table = _reliability_table(ten, n_bins)
        assert axis.collections[1].get_offsets().data.tolist() == table[["confidence", "accuracy"]].to_numpy().tolist()
    assert _expected_calibration_error(ten) == _expected_calibration_error(ten, 15) != _expected_calibration_error(ten, 1)


def test_figures_of_one_and_of_many_models(tmp_path):
    many = {f"m{i} $x$": dummy_predictions(0.8, (6, 7, 8), seed=i) for i in range(5)}
    one = dict(list(many.items())[:1])
    history = pd.DataFrame({"epoch": [1, 2], "accuracy": [0.5, 0.6], "loss": [1, 0.9], "val_loss": [1.1, 1.0]})
    figures = [accuracy_figure(compare_models(many)), confusion_figure(many), reliability_figure(many), roc_figure(many)]
    figures += [precision_recall_figure(one), curves_figure(dict.fromkeys(one, history)), confusion_figure(one)]
    for figure in figures:
        figure.savefig(tmp_path / "figure.png", dpi=40)
    assert [len(figure.axes) for figure in figures] == [1, 5, 5, 5, 1, 2, 1]
    panels = [axis.get_title(loc="left") for axis in figures[3].axes]
    assert [panel.split("\n")[0] for panel in panels] == list(many)
    assert [float(panel.split()[-1]) for panel in panels] == pytest.approx(
        [_by_class(m, roc_auc_score).mean() for m in many.values()], abs=6e-4
    )


def test_figures_leave_pyplot_closed():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    accuracy_figure(compare_models({"yolo11": dummy_predictions()}))
    assert plt.get_fignums() == before


def test_curves_without_validation():
    curves_figure({"yolov8": pd.DataFrame({"epoch": [1], "loss": [0.4]})})
    with pytest.raises(ValueError, match="yolov8: its history has no epoch"):
        curves_figure({"yolov8": pd.DataFrame()})


# ---- new images


class ByBrightness:
    classes_ = np.array(["Normal", "Pro-B"])

    def predict_proba(self, images):
        assert all(image.dtype == np.uint8 and image.ndim == 3 for image in images)
        level = np.array([image.mean() / 255 for image in images])
        return np.stack([1 - level, level], axis=1)


@pytest.fixture
def folder_of_images(tmp_path):
    for i, (label, level) in enumerate([("Benign", 10), ("Pro", 200), ("Pro", 40), ("somewhere", 250), ("Pre", 90)]):
        write_image(tmp_path / label / f"Snap_{i}é.png", np.full((24, 32, 3), level, np.uint8))
    return tmp_path


@pytest.mark.parametrize("batch", [1, 2, 32])
def test_new_images(folder_of_images, batch):
    (folder_of_images / "Pro" / "zero.png").write_bytes(b"")
    (folder_of_images / "zzz.png").write_bytes(b"no image")  # the last file
    with pytest.warns(UserWarning, match=r"left out: .*(zero|zzz)\.png"):
        table = predict_new_images(ByBrightness(), folder_of_images, batch=batch)
    assert dict(zip(table["pair"], table["class"])) == {
        "Benign/Snap_0é.png": "Normal",
        "Pre/Snap_4é.png": "",
        "Pro/Snap_1é.png": "Pro-B",
        "Pro/Snap_2é.png": "Pro-B",
        "somewhere/Snap_3é.png": "",
    }
    np.testing.assert_allclose(table.set_index("pair")["p_Pro-B"]["Pro/Snap_1é.png"], 200 / 255, atol=1e-6)


def test_new_images_have_the_class_of_the_nearest_folder_that_means_one(folder_of_images):
    write_image(folder_of_images / "Pro" / "slide 1" / "a.png", np.zeros((16, 16, 3), np.uint8))
    labels = predict_new_images(ByBrightness(), folder_of_images).set_index("pair")["class"]
    assert labels["Pro/slide 1/a.png"] == "Pro-B"
    own = ClassMap(("Normal", "Pro-B"), {"Normal": ["somewhere"], "Pro-B": ["slide-1"]})
    labels = predict_new_images(ByBrightness(), folder_of_images, class_map=own).set_index("pair")["class"]
    assert labels[labels != ""].to_dict() == {"Pro/slide 1/a.png": "Pro-B", "somewhere/Snap_3é.png": "Normal"}


def test_no_image_that_can_be_read(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(PredictionsError, match="no image that can be read"):
        predict_new_images(ByBrightness(), tmp_path)


def test_test_images_as_examples_of_new_ones_keep_their_subset():
    examples = dummy_predictions(1.0, (1, 1, 1))
    assert set(examples["subset"]) == {"test"} and new_images_table({"yolo11": examples})["YOLO11"].tolist() == [
        "Normal",
        "Pre-B",
        "Pro-B",
    ]


def test_new_table_and_grid(folder_of_images):
    one = predict_new_images(ByBrightness(), folder_of_images)
    table = new_images_table({"mobilenet_v2": one, "x<y>": one.sample(frac=1, random_state=0)})
    assert (table["MobileNetV2"] == table["x<y>"]).all() and len(table) == 5 and model_titles(table) == ["MobileNetV2", "x<y>"]
    text = readable_new_images(table).set_index("Image")
    assert (
        text.loc["Pro/Snap_2é.png", "MobileNetV2"] == "✗ Normal 0.84"
        and text.loc["Pro/Snap_1é.png", "MobileNetV2"] == "Pro-B 0.78"
    )
    assert text.loc["somewhere/Snap_3é.png"].tolist() == ["–", "Pro-B 0.98", "Pro-B 0.98"]
    page = readable_new_images(table).to_html(index=False)
    assert page.count("✗") == 2 and "x&lt;y&gt;" in page and "<y>" not in page
    assert len(new_images_figure(table, folder_of_images, max_images=3).axes) == 3
    labels = [axis.get_xlabel() for axis in new_images_figure(table.assign(**{"x<y> abstains": True}), folder_of_images).axes]
    assert labels[0].split("\n") == ["Snap_0é.png", "✓ MobileNetV2: Normal 0.96", "✓ x<y>: (Normal) 0.96"] and len(labels) == 5
    with pytest.raises(PredictionsError, match="yolo11: its images are not those"):
        new_images_table({"a": one, "yolo11": one.head(2)})
    with pytest.raises(PredictionsError, match="no new images"):
        new_images_figure(table.head(0), folder_of_images)
    with pytest.raises(PredictionsError, match="no predictions of new images"):
        new_images_table({})


def test_distinct_paths():
    paths = ["in/a.png", "in/Pre-B/b.png", "in/Pro-B/b.png", "x/1/2/3/c.png", "y/1/2/3/c.png"]
    assert distinct_paths(paths) == ["a.png", "Pre-B/b.png", "Pro-B/b.png", "x/…/c.png", "y/…/c.png"]
    assert distinct_paths(["a/1/x/c.png", "a/2/x/c.png", "b/1/x/c.png"]) == ["a/…/c.png", "2/x/c.png", "b/…/c.png"]
    assert distinct_paths(["a.png", "a.png"]) == ["a.png", "a.png"]


def test_a_wrong_probability_is_quoted():
    table = dummy_predictions(1.0).head(2).assign(**{"p_Normal": 0.33336, "p_Pre-B": 0.5, "p_Pro-B": [0.16664, -0.2]})
    with pytest.raises(PredictionsError) as caught:
        _check_predictions(table, "a.csv")
    assert str(caught.value) == (
        "a.csv: probabilities of 'Normal/test_002' are [0.3334, 0.5, -0.2]: not between 0 and 1 with a sum of 1 (1 such rows)."
    )


def test_marks_of_the_accuracy_figure_by_hand(counted):
    table = compare_models({"yolo11": counted, "other": counted}).assign(chance=[0.5, 0.7], original_study_accuracy=[1.0, np.nan])
    table["interval"] = ["Clopper-Pearson", "bootstrap"]
    axis = accuracy_figure(table).axes[0]
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert np.array_equal(lines["original study"].get_xdata(), [1.0, np.nan], equal_nan=True)
    assert lines["majority-class baseline"].get_xdata() == pytest.approx([0.6, 0.6])
    assert axis.get_xlabel() == "accuracy; 95 % CI: Clopper-Pearson\nother: bootstrap"
    assert axis.get_xlim() == pytest.approx((0.44390 - 0.05, 1.005), abs=1e-4)
    without = accuracy_figure(compare_models({"other": counted})).axes[0]
    assert "original study" not in {line.get_label() for line in without.get_lines()}


def test_points_of_the_training_curves_by_hand():
    history = pd.DataFrame({"epoch": [1, 2, 3], "accuracy": [0.5, 0.6, 0.7], "loss": [1.0, 0.9, 0.8]})
    history = history.assign(val_accuracy=[0.4, 0.6, 0.5], val_loss=[1.2, 0.7, 0.9])
    accuracy, loss = curves_figure({"yolo11": history}, {"yolo11": 2}).axes
    assert [line.get_ydata().tolist() for line in accuracy.get_lines()[:2]] == [[0.5, 0.6, 0.7], [0.4, 0.6, 0.5]]
    assert [line.get_ydata().tolist() for line in loss.get_lines()[:2]] == [[1.0, 0.9, 0.8], [1.2, 0.7, 0.9]]
    assert (loss.get_lines()[-1].get_xdata(), loss.get_lines()[-1].get_ydata()) == ([2], [0.7])  # the epoch that was kept
    assert accuracy.get_lines()[-1].get_ydata() == [0.6]
    assert accuracy.get_ylim() == (0, 1.04) and loss.get_ylim()[0] == 0


def test_images_without_a_true_class_are_not_wrong():
    table = two_classes(["Normal"] * 4, [0.9] * 4, "new")
    table.loc[1:, "class"] = ""
    row = compare_models({"yolo11": table}, "new").iloc[0]
    assert (row["n_correct"], row["n_images"], row["accuracy"]) == (1, 1, 1)
    assert calibration_table({"yolo11": table}, "new")["n_images"].item() == 1
    with pytest.raises(PredictionsError, match="no image of subset 'new' has a true class"):
        compare_models({"yolo11": table[1:]}, "new")
