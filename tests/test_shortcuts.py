"""Controls see what they may see and nothing else; on the real images they are as good as is known."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from leukemia_nb.data.manifest import build_manifest, class_of
from leukemia_nb.data.images import read_image, write_image
from leukemia_nb.evaluation.metrics import (
    check_predictions,
    compare_models,
    dummy_predictions,
    read_predictions,
    write_predictions,
)
from leukemia_nb.processing.pairing import Pairs, prepare_pairs
from leukemia_nb.processing.cells import find_cells
from leukemia_nb.audit.baselines import (
    BASELINES,
    background_pixels,
    bar_corner,
    colour_features,
    baseline_features,
    baseline_table,
    baselines_figure,
    cross_validate_baselines,
    permutation_table,
    permuted_accuracy,
    permuted_sentence,
    run_baselines,
    silhouette_features,
    texture_features,
    views_figure,
)
from leukemia_nb.data.synthetic import smear
from leukemia_nb.evaluation.uncertainty import cross_validated_accuracy


@pytest.mark.parametrize("size", [(32, 32), (96, 128), (224, 224)])
def test_every_control_at_every_size(size):
    image = smear("Pre-B", 4, *size).image
    cells = find_cells(image)
    for name, control in BASELINES.items():
        numbers = control.features(image, cells)
        assert numbers.dtype == np.float32 and np.isfinite(numbers).all(), name
        assert control.view(image, cells).shape == image.shape, name
        assert numbers.shape == control.features(np.zeros((40, 40, 3), np.uint8), np.zeros((40, 40), np.int32)).shape, name


@pytest.fixture(scope="module")
def seen():
    image = smear("Pre-B", 4, 224, 224).image
    cells = find_cells(image)
    return image, cells, background_pixels(image, cells)


def test_background_control_is_blind_to_cells_and_bar(seen):
    image, cells, free = seen
    random = np.random.default_rng(0).integers(0, 256, image.shape).astype(np.uint8)
    repainted = np.where(free[..., None], image, random)
    assert 0.5 < free.mean() < 0.95 and not free[bar_corner(image.shape)].any() and not free[cells > 0].any()
    assert np.array_equal(colour_features(image, free), colour_features(repainted, free))
    assert not np.allclose(colour_features(image), colour_features(repainted))


def test_scale_bar_control_sees_the_corner_alone(seen):
    image, cells, _ = seen
    other, corner = image.copy(), bar_corner(image.shape)
    kept = other[corner].copy()
    other[:] = 7
    other[corner] = kept
    bar, colour = BASELINES["scale_bar"].features, BASELINES["colour"].features
    assert np.array_equal(bar(image, cells), bar(other, cells)) and not np.allclose(colour(image, cells), colour(other, cells))
    other[corner] = 0
    assert not np.allclose(bar(image, cells), bar(other, cells))


@pytest.mark.parametrize("name", ["background_texture", "grey_texture", "grey_shape"])
def test_grey_controls_are_blind_to_colour(seen, name, monkeypatch):
    image, cells, free = seen
    monkeypatch.setattr("leukemia_nb.audit.baselines.background_pixels", lambda image, cells: free)
    grey = image @ np.array([0.299, 0.587, 0.114])
    gap = np.abs(
        BASELINES[name].features(image, cells)
        - BASELINES[name].features(np.repeat(np.rint(grey).astype(np.uint8)[..., None], 3, 2), cells)
    )
    assert gap.max() < 0.02


def test_silhouettes_are_blind_to_pixels(seen):
    image, cells, _ = seen
    see = BASELINES["silhouettes"].features
    assert np.array_equal(see(image, cells), see(255 - image, cells)) and see(image, cells)[0] == cells.max() > 0
    assert silhouette_features(np.zeros((32, 32), np.int32)).sum() == 0


@settings(max_examples=25, deadline=None)
@given(arrays(np.uint8, (9, 7, 3)), st.randoms(use_true_random=False))
def test_colour_numbers_do_not_depend_on_places(image, random):
    order = list(range(63))
    random.shuffle(order)
    assert colour_features(image) == pytest.approx(colour_features(image.reshape(-1, 3)[order].reshape(9, 7, 3)), abs=1e-2)


def test_colour_and_texture_numbers_by_hand():
    image = np.zeros((2, 2, 3), np.uint8)
    image[..., 0] = [[0, 10], [20, 30]]
    found = colour_features(image)
    assert found[0] == 15 and found[3] == pytest.approx(np.sqrt(125)) and found[12] == 15 and found[1] == 0
    flat = texture_features(np.full((20, 20, 3), 90, np.uint8), radii=(1,))
    assert flat[8] == pytest.approx(1 - flat[:8].sum()) and flat[8] > 0.8  # a flat image: all neighbours are as bright


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shortcuts")
    for label in ("Normal", "Pre-B", "Pro-B"):
        for i in range(10):
            write_image(folder / "in" / label / f"{i}.png", smear(label, i, 64, 64, confounded=1).image)
    table = prepare_pairs(build_manifest(folder / "in"), folder / "pairs", size=32, progress=False)
    return table, folder / "pairs"


def test_run_controls_writes_what_the_study_reads(pairs, tmp_path):
    table, folder = pairs
    odd = np.arange(len(table)) % 2 == 1
    train, test = Pairs(table[~odd], folder, size=32), Pairs(table[odd].assign(subset="validation"), folder, size=32)
    found = run_baselines(train, test)
    assert list(found) == list(BASELINES)
    for name, predictions in found.items():
        if name == "permuted":
            assert (
                predictions["repeat"].nunique() == 5
                and predictions.groupby("repeat")["pair"]
                .apply(list)
                .map(lambda pairs: pairs == test.table["pair"].tolist())
                .all()
            )
            continue
        check_predictions(predictions)
        assert predictions["pair"].tolist() == test.table["pair"].tolist() and set(predictions["subset"]) == {"validation"}
        write_predictions(predictions, tmp_path / "controls" / f"{name}.csv")
        pd.testing.assert_frame_equal(read_predictions(tmp_path / "controls" / f"{name}.csv"), predictions, rtol=1e-6)
    accuracy = compare_models(found, "validation").set_index("model")["accuracy"]
    assert accuracy["background_colour"] > 0.8 and permuted_accuracy(found["permuted"]).estimate < accuracy["colour"]
    again = run_baselines(train, test, controls=["permuted"])
    pd.testing.assert_frame_equal(again["permuted"], found["permuted"])


def test_mirrored_copies_do_not_count(pairs):
    table, folder = pairs
    plain = table.assign(flip="none")
    more = Pairs(pd.concat([plain, plain.assign(flip="both")]), folder, size=32)
    test = Pairs(table[::3], folder, size=32)
    one, two = (
        run_baselines(train, test, controls=["scale_bar"])["scale_bar"] for train in (Pairs(plain, folder, size=32), more)
    )
    pd.testing.assert_frame_equal(one, two)


def test_given_cells_are_used_and_errors_name_the_remedy(pairs):
    table, folder = pairs
    source = Pairs(table[:4], folder, size=32)
    blank = np.zeros((4, 32, 32), np.int32)
    assert (baseline_features(source, blank, ["silhouettes"])["silhouettes"] == 0).all()
    with pytest.raises(ValueError, match="4 images but 2 masks"):
        baseline_features(source, blank[:2])
    with pytest.raises(ValueError, match="no control is called 'tea'; there are background_colour"):
        baseline_features(source, controls=["tea"])


def test_cross_validation_keeps_groups_together():
    random = np.random.default_rng(0)
    group = np.repeat(np.arange(30), 4)
    numbers = {"grey_texture": (random.normal(size=(30, 21))[group] + 0.01 * random.normal(size=(120, 21))).astype(np.float32)}
    table = pd.DataFrame({"pair": [f"p{i}" for i in range(120)], "class": np.array(["a", "b", "c"])[group % 3]})
    alone, held = (
        cross_validated_accuracy(cross_validate_baselines(numbers, table, groups)["grey_texture"]) for groups in (None, group)
    )
    assert alone.estimate > 0.9 and held.estimate < 0.6 and held.groups == 30
    found = cross_validate_baselines(
        {**numbers, "permuted": numbers["grey_texture"][:, :3]}, table, group, folds=2, repeats=2, shuffles=7
    )
    assert found["grey_texture"].groupby("repeat")["pair"].nunique().tolist() == [120, 120]
    assert found["permuted"]["repeat"].nunique() == 7
    with pytest.raises(ValueError, match="a has 1 groups, 5 folds need"):
        cross_validate_baselines(numbers, table, table["class"])


def test_table_and_figure_join_controls_and_models():
    models = {"yolo11": dummy_predictions(0.99), "colour": dummy_predictions(0.9, seed=1), "permuted": dummy_predictions(0.4)}
    table = baseline_table(models)
    assert table["name"].tolist() == ["colour", "permuted", "yolo11"] and table["title"].tolist()[2] == "YOLO11"
    assert table["chance"].tolist() == pytest.approx([47 / 111] * 3) and set(table["interval"]) == {"Clopper-Pearson"}
    by_field = baseline_table(models, {pair: i // 4 for i, pair in enumerate(models["colour"]["pair"])})
    assert (by_field["groups"] < by_field["images"]).all() and set(by_field["interval"]) == {
        "Clopper-Pearson on effective groups"
    }
    words = [text.get_text() for text in baselines_figure(table).axes[0].texts]
    assert "Colour statistics" in words and "99.1%" in words and "commonest class" in words
    with pytest.raises(ValueError, match="no predictions"):
        baseline_table({})


def test_the_interval_of_permuted_labels_holds_the_spread_of_shuffling():
    """Two colours a class, so images of a colour are called alike: accuracies after a shuffle spread far more than coin tosses."""
    random = np.random.default_rng(3)
    table = pd.DataFrame({"pair": [f"p{i}" for i in range(60)], "class": np.repeat(["a", "b"], 30)})
    numbers = {"permuted": (np.arange(60) // 15)[:, None] + 1e-6 * random.normal(size=(60, 3))}
    found = cross_validate_baselines(numbers, table, folds=3, shuffles=40)["permuted"]
    by_shuffle, interval = permutation_table(found), permuted_accuracy(found)
    fresh = permutation_table(cross_validate_baselines(numbers, table, folds=3, shuffles=20, seed=1000)["permuted"])["accuracy"]
    assert by_shuffle["accuracy"].std() > 1.2 * np.sqrt(0.25 / 60)
    assert fresh.between(interval.low, interval.high).mean() >= 0.8  # shuffles that the interval has not seen
    row = baseline_table({"permuted": found}).iloc[0]
    assert (row["low"], row["high"], row["interval"]) == (interval.low, interval.high, "central 95 % of 40 label permutations")


def test_few_images_are_said_to_be_too_few():
    few = {
        "colour": dummy_predictions(1.0, (1, 1, 1)),
        "permuted": pd.concat(
            [dummy_predictions(share, (1, 1, 1), seed=i).assign(repeat=i) for i, share in enumerate((0, 1 / 3, 2 / 3, 1))]
        ),
    }
    text = permuted_sentence(baseline_table(few))
    assert "of 3 images" in text and "the controls here show nothing" in text
    many = {
        "colour": dummy_predictions(0.95),
        "permuted": pd.concat([dummy_predictions(0.4, seed=i).assign(repeat=i) for i in range(9)]),
    }
    assert (
        "show nothing" not in permuted_sentence(baseline_table(many))
        and permuted_sentence(baseline_table({"colour": many["colour"]})) == ""
    )


def test_views_have_a_column_a_control():
    images = [smear(label, 1, 64, 64).image for label in ("Normal", "Pro-B")]
    figure = views_figure(images, ["Normal", "Pro-B"])
    assert len(figure.axes) == 2 * (1 + len(BASELINES))


def test_known_shortcuts_of_the_real_images(shared_data):
    "Random 5-fold, 100 images a class; all 2,087 give 99.0 % and 92.3 % (benchmarks/results/shortcuts.json)."
    table = pd.read_csv(shared_data / "taleqani_fields.csv").rename(columns={"file": "pair"})
    table["class"] = [class_of(name.split("/")[0]) for name in table["pair"]]
    table = table[table["class"] != "Early Pre-B"].groupby("class").sample(100, random_state=0).reset_index(drop=True)
    images = np.stack([read_image(shared_data / "taleqani" / name) for name in table["pair"]])
    names = ["background_colour", "background_texture", "scale_bar"]
    found = cross_validate_baselines(baseline_features(images, controls=names), table)
    accuracy = {name: cross_validated_accuracy(found[name]).estimate for name in names}
    print({name: round(value, 3) for name, value in accuracy.items()})
    assert accuracy["background_colour"] > 0.93 and accuracy["background_texture"] > 0.93 and accuracy["scale_bar"] > 0.78
