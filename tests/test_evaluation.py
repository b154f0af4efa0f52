"""Predictions files, metrics and figures of the evaluation."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from sklearn import metrics

from leukemia_nb.data.images import write_image
from leukemia_nb.evaluation.metrics import (
    ORIGINAL_ACCURACY,
    PredictionsError,
    accuracy_figure,
    predicted_labels,
    check_predictions,
    class_table,
    classes_of,
    compare_models,
    confusion_figure,
    confusion_table,
    curves_figure,
    clopper_pearson,
    dummy_predictions,
    predict_unseen,
    predictions_table,
    probabilities_of,
    read_all_predictions,
    read_predictions,
    readable_comparison,
    roc_auc,
    roc_figure,
    take_subset,
    unseen_figure,
    unseen_html,
    unseen_table,
    write_predictions,
)


@pytest.mark.parametrize(
    "name, right",
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
def test_the_decks_figures_are_whole_images(name, right):
    assert round(right / 111, 4) == pytest.approx(ORIGINAL_ACCURACY[name])


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
        (lambda t: t.assign(pair="one"), "'one' has more than one row"),
        (lambda t: t.assign(**{"p_Normal": "high"}), "not a number"),
        (lambda t: t.assign(**{"p_Normal": np.nan}), r"nan.*not between 0 and 1"),
        (lambda t: t.assign(**{"p_Normal": -0.2, "p_Pre-B": 0.6, "p_Pro-B": 0.6}), r"\(111 such rows\)"),
        (lambda t: t.assign(**{"p_Normal": t["p_Normal"] + 0.01}), "sum of 1"),
    ],
)
def test_what_is_wrong_is_said(spoil, message):
    with pytest.raises(PredictionsError, match=message):
        check_predictions(spoil(dummy_predictions()))


def test_half_precision_rounding_and_unlabelled_new_images_are_fine():
    table = dummy_predictions()
    check_predictions(
        table.assign(**{name: table[name].astype(np.float16).astype(float) for name in table if name.startswith("p_")})
    )
    check_predictions(table.assign(**{"class": "", "subset": "unseen"}))


def test_broken_files(tmp_path):
    (tmp_path / "empty.csv").write_bytes(b"")
    with pytest.raises(PredictionsError, match=r"empty\.csv: not a CSV"):
        read_predictions(tmp_path / "empty.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x01,\x80")
    with pytest.raises(PredictionsError, match=r"binary\.csv: "):
        read_predictions(tmp_path / "binary.csv")
    with pytest.raises(PredictionsError, match="not there"):
        read_predictions(tmp_path / "none.csv")
    with pytest.raises(PredictionsError, match="no predictions"):
        read_all_predictions(tmp_path / "nowhere")


def test_models_come_in_the_studys_order(tmp_path):
    for name in ("yolo12", "another", "efficientnet_b0"):
        write_predictions(dummy_predictions(), tmp_path / f"{name}.csv")
    assert list(read_all_predictions(tmp_path)) == ["efficientnet_b0", "yolo12", "another"]


def test_shape_of_probabilities_is_checked():
    table = dummy_predictions()
    with pytest.raises(PredictionsError, match=r"shape \(111, 2\)"):
        predictions_table(table, np.full((111, 2), 0.5), ["Normal", "Pre-B", "Pro-B"])


def test_order_of_columns_is_the_order_of_classes():
    table = dummy_predictions(0.9, seed=4)
    turned = table[["pair", "path", "subset", "class", "p_Pro-B", "p_Normal", "p_Pre-B"]]
    assert list(predicted_labels(turned)) == list(predicted_labels(table)) and roc_auc(turned) == pytest.approx(roc_auc(table))
    assert list(confusion_table(turned).index) == ["Pro-B", "Normal", "Pre-B"]


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


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_exact_interval_holds_the_estimate_and_mirrors(pair):
    k, n = pair
    low, high = clopper_pearson(k, n)
    assert 0 <= low <= k / n <= high <= 1 and low < high
    assert clopper_pearson(n - k, n) == pytest.approx((1 - high, 1 - low), abs=1e-9)


@pytest.mark.parametrize("k, n", [(1, 0), (-1, 5), (6, 5)])
def test_impossible_counts(k, n):
    with pytest.raises(ValueError, match="not possible"):
        clopper_pearson(k, n)


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 1), st.integers(0, 1000))
def test_metrics_are_scikit_learns(accuracy, seed):
    table = dummy_predictions(accuracy, (7, 9, 6), seed=seed)
    row, truth, answer = compare_models({"m": table}).iloc[0], table["class"], predicted_labels(table)
    assert row["right"] == round(accuracy * 22) and row["accuracy"] == pytest.approx(metrics.accuracy_score(truth, answer))
    assert row["macro_f1"] == pytest.approx(metrics.f1_score(truth, answer, average="macro", zero_division=0))
    assert row["macro_recall"] == pytest.approx(metrics.balanced_accuracy_score(truth, answer))
    assert row["auc"] == pytest.approx(metrics.roc_auc_score(truth, probabilities_of(table), multi_class="ovr"))
    assert np.isnan(row["original"])
    specificity = [metrics.recall_score(truth != c, answer != c) for c in classes_of(table)]
    assert list(class_table(table)["specificity"]) == pytest.approx(specificity)


def test_a_single_class_in_test():
    table = dummy_predictions(1.0, (0, 12, 0))
    row = compare_models({"yolo11": table}).iloc[0]
    assert np.isnan(row["auc"]) and row["accuracy"] == 1 and row["collapsed"] == ""
    assert class_table(table)["sensitivity"].isna().tolist() == [True, False, True]
    with pytest.raises(PredictionsError, match="no image of Normal, Pro-B"):
        roc_auc(table)
    with pytest.raises(PredictionsError, match="no image of Normal, Pro-B"):
        roc_figure({"yolo11": table})
    assert readable_comparison(compare_models({"yolo11": table})).loc[0, "ROC-AUC"] == "–"


def test_subset_that_is_absent():
    with pytest.raises(PredictionsError, match="no subset 'validation', only test"):
        take_subset(dummy_predictions(), "validation")
    with pytest.raises(PredictionsError, match="no predictions to compare"):
        compare_models({})


def test_collapse_is_named():
    table = dummy_predictions().assign(**{"p_Normal": 0.2, "p_Pre-B": 0.3, "p_Pro-B": 0.5})
    compared = compare_models({"efficientnet_b0": table}, weights={"efficientnet_b0": "ImageNet"})
    assert compared.loc[0, ["right", "images", "collapsed", "weights"]].tolist() == [39, 111, "Pro-B", "ImageNet"]
    assert readable_comparison(compared).loc[0, "Note"] == "answers Pro-B every time"


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8])
def test_figures_for_any_number_of_models(count, tmp_path):
    models = {f"m{i}": dummy_predictions(0.8, seed=i) for i in range(count)}
    history = pd.DataFrame(
        {"epoch": [1, 2], "accuracy": [0.5, 0.6], "loss": [1, 0.9], "val_accuracy": [0.4, np.nan], "val_loss": [1.1, 1.0]}
    )
    for figure in (
        accuracy_figure(compare_models(models)),
        confusion_figure(models),
        roc_figure(models),
        curves_figure(dict.fromkeys(models, history)),
    ):
        figure.savefig(tmp_path / "figure.png")
        assert figure._repr_png_().startswith(b"\x89PNG")
    shown = [axis.get_title(loc="left") for axis in curves_figure(dict.fromkeys(models, history)).axes]
    assert [title for title in shown if title] == list(models)


def test_curves_without_validation():
    curves_figure({"yolov8": pd.DataFrame({"epoch": [1], "loss": [0.4]})})
    with pytest.raises(ValueError, match="yolov8: its history has no epoch"):
        curves_figure({"yolov8": pd.DataFrame()})


class Darkness:
    classes_ = np.array(["Normal", "Pro-B"])

    def predict_proba(self, images):
        assert all(image.dtype == np.uint8 and image.ndim == 3 for image in images)
        level = np.array([image.mean() / 255 for image in images])
        return np.stack([1 - level, level], axis=1)


def folder_of_images(folder):
    for i, (label, level) in enumerate([("Benign", 10), ("Pro", 200), ("Pro", 40), ("somewhere", 250), ("Pre", 90)]):
        write_image(folder / label / f"Snap_{i}é.png", np.full((24, 32, 3), level, np.uint8))
    return folder


@pytest.mark.parametrize("batch", [1, 2, 32])
def test_unseen_images(tmp_path, batch):
    (folder_of_images(tmp_path) / "Pro" / "zero.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"left out: .*zero\.png"):
        table = predict_unseen(Darkness(), tmp_path, batch=batch)
    assert dict(zip(table["pair"], table["class"])) == {
        "Benign/Snap_0é.png": "Normal",
        "Pre/Snap_4é.png": "",
        "Pro/Snap_1é.png": "Pro-B",
        "Pro/Snap_2é.png": "Pro-B",
        "somewhere/Snap_3é.png": "",
    }
    np.testing.assert_allclose(table.set_index("pair")["p_Pro-B"]["Pro/Snap_1é.png"], 200 / 255, atol=1e-6)


def test_the_last_file_may_be_the_broken_one(tmp_path):
    (folder_of_images(tmp_path) / "zzz").mkdir()
    (tmp_path / "zzz" / "last.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"last\.png"):
        assert len(predict_unseen(Darkness(), tmp_path, batch=2)) == 5


def test_no_image_that_can_be_read(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(PredictionsError, match="no image that can be read"):
        predict_unseen(Darkness(), tmp_path)


def test_unseen_table_html_and_grid(tmp_path):
    one = predict_unseen(Darkness(), folder_of_images(tmp_path))
    table = unseen_table({"mobilenet_v2": one, "x<y>": one.sample(frac=1, random_state=0)})
    assert (table["MobileNetV2"] == table["x<y>"]).all() and len(table) == 5
    page = unseen_html(table)
    assert page.count("✗") == 2 and "x&lt;y&gt;" in page and "<y>" not in page
    assert len(unseen_figure(table, tmp_path, most=3).axes) == 3
    with pytest.raises(PredictionsError, match="yolo11: its images are not those"):
        unseen_table({"a": one, "yolo11": one.head(2)})
    with pytest.raises(PredictionsError, match="no new images"):
        unseen_figure(table.head(0), tmp_path)
