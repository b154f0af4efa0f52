"""Properties of the split: exact counts, duplicates and groups in one subset, refusals that name the pictures."""
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leukemia_nb.splitting import (SplitError, check_split, deal, grouped_folds, merge_groups, read_split,
                                   smallest_class, split_pairs, subset_sizes, write_split)

DECK = {"Normal": 512, "Pre-B": 955, "Pro-B": 796}


def pictures(counts: dict[str, int]) -> pd.DataFrame:
    names = [(f"{label}/{number:04d}", label) for label, count in counts.items() for number in range(count)]
    table = pd.DataFrame(names, columns=["pair", "class"])
    return table.assign(sha256=[f"sha {pair}" for pair in table["pair"]], pixels=[f"pix {pair}" for pair in table["pair"]])


@given(st.integers(0, 3000), st.integers(1, 98), st.integers(1, 98))
def test_sizes_are_exact_floors(number, train, test):
    if train + test >= 100: return
    sizes = subset_sizes(number, train / 100, test / 100)
    assert sizes["train"] == train * number // 100 and sizes["test"] == test * number // 100
    assert sum(sizes.values()) == number and min(sizes.values()) >= 0


@pytest.mark.parametrize("train, test", [(0.9, 0.1), (0, 0.1), (0.5, 0), (1.2, -0.3)])
def test_shares_that_cannot_be(train, test):
    with pytest.raises(ValueError, match="must be above 0"): subset_sizes(100, train, test)


@given(st.sampled_from([(0.85, 0.05), (0.6, 0.2), (0.7, 0.29)]))
def test_smallest_class_is_smallest(shares):
    need = smallest_class(*shares)
    assert min(subset_sizes(need, *shares).values()) >= 1
    assert all(min(subset_sizes(number, *shares).values()) < 1 for number in range(need))


@pytest.mark.parametrize("seed", range(3))
def test_deck_counts(seed):
    split = split_pairs(pictures(DECK), seed=seed)
    counts = pd.crosstab(split["class"], split["subset"])
    assert counts["test"].to_dict() == {"Normal": 25, "Pre-B": 47, "Pro-B": 39} and counts["test"].sum() == 111
    assert counts["train"].max() == 811
    assert counts["validation"].to_dict() == {"Normal": 52, "Pre-B": 97, "Pro-B": 81}


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_duplicates_stay_together_and_counts_stay_exact(data):
    counts = {label: data.draw(st.integers(20, 120)) for label in ("Normal", "Pre-B")}
    table = pictures(counts)
    for column in ("sha256", "pixels"):  # copies of some pictures, at most a third of a class, within one class
        for label in counts:
            rows = np.flatnonzero(table["class"] == label)
            size = data.draw(st.integers(2, 4))
            for start in range(0, data.draw(st.integers(0, len(rows) // 6)), size):
                offset = 0 if column == "sha256" else len(rows) // 6
                table.loc[rows[offset + start:offset + start + size], column] = f"{label} copies {start}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split = split_pairs(table, seed=data.draw(st.integers(0, 99)))
    for column in ("sha256", "pixels", "group"): assert split.groupby(column)["subset"].nunique().max() == 1
    for label, rows in split.groupby("class"): assert rows["subset"].value_counts().to_dict() == subset_sizes(counts[label])


def test_split_is_random_and_uniform():
    dealt = [deal([2, 2] + [1] * 36, subset_sizes(40), np.random.default_rng(seed)) for seed in range(400)]
    tested = np.mean(np.array(dealt) == "test", axis=0)
    assert tested.min() > 0.01 and tested.max() < 0.12  # 5 % each; no picture and no couple is favoured


def test_duplicates_too_many_for_exact_counts():
    table = pictures({"Normal": 20})
    table["sha256"] = [f"twin {number // 2}" for number in range(20)]
    with pytest.warns(UserWarning, match="Normal: .* instead of .* because duplicates stay together"): split = split_pairs(table)
    assert split.groupby("sha256")["subset"].nunique().max() == 1 and set(split["subset"]) == {"train", "test", "validation"}


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=30))
def test_merge_groups_against_closure(rows):
    table = pd.DataFrame(rows, columns=["a", "b"], dtype=object)
    groups = merge_groups(table, ["a", "b"])
    near = np.array([[x[0] == y[0] or x[1] == y[1] for y in rows] for x in rows], bool).reshape(len(rows), len(rows))
    for _ in rows: near = near @ near
    assert (near == (groups[:, None] == groups[None])).all()


def test_empty_cells_tie_nothing():
    assert merge_groups(pd.DataFrame({"a": ["", "", None, np.nan, "x"]}), ["a"]).tolist() == [0, 1, 2, 3, 4]


def test_one_picture_under_two_classes_is_left_out():
    table = pictures({"Normal": 21, "Pre-B": 21})
    table.loc[[0, 21], "pixels"] = "same"
    with pytest.warns(UserWarning, match="two classes, left out: Normal/0000, Pre-B/0000"): split = split_pairs(table)
    assert len(split) == 40


def test_too_few_and_empty_classes():
    with pytest.raises(SplitError, match="class Pro-B has 19 usable pictures, this split needs 20 of each class"):
        split_pairs(pictures({"Normal": 30, "Pro-B": 19}))
    table = pictures({"Normal": 30, "Pro-B": 1}).assign(problem=[""] * 30 + ["broken"])
    with pytest.raises(SplitError, match="no usable picture of class Pro-B"): split_pairs(table)
    assert len(split_pairs(pictures({"Normal": 5, "Pro-B": 6}), train=0.6, test=0.2)) == 11


def test_problem_pictures_are_left_out():
    table = pictures({"Normal": 25}).assign(problem=[""] * 23 + ["truncated", "empty"])
    assert list(split_pairs(table)["pair"]) == list(table["pair"][:23])


@given(st.integers(0, 50), st.integers(2, 9))
@settings(deadline=None, max_examples=6)
def test_grouped_split_parts_no_group(seed, size):
    table = pictures({"Normal": 90, "Pre-B": 140}).assign(slide=lambda table: [place // size for place in range(len(table))])
    table.loc[[0, 80], "sha256"] = "same"  # a duplicate on another slide ties the two slides together
    split = split_pairs(table, seed=seed, groups="slide")
    slide = table.set_index("pair")["slide"][split["pair"]].to_numpy()
    assert pd.Series(split["subset"].to_numpy()).groupby(slide).nunique().max() == 1
    assert split["subset"][0] == split["subset"][80]
    shares = pd.crosstab(split["class"], split["subset"], normalize="index")
    assert (shares["train"] > 0.7).all() and (shares["test"] < 0.2).all()
    pd.testing.assert_frame_equal(split, split_pairs(table.sample(frac=1, random_state=1), seed=seed, groups="slide"))


def test_groups_given_as_values_follow_their_rows():
    table = pictures({"Normal": 60}).sample(frac=1, random_state=0)
    values = table["pair"].str[-2:].astype(int) // 5
    pd.testing.assert_frame_equal(split_pairs(table, groups=list(values)), split_pairs(table.assign(v=values), groups="v"))
    with pytest.raises(SplitError, match="3 groups for 60 pairs"): split_pairs(table, groups=[1, 2, 3])
    with pytest.raises(SplitError, match="no column 'patient'"): split_pairs(table, groups="patient")
    with pytest.raises(SplitError, match="too few groups"): split_pairs(table.assign(patient="one"), groups="patient")


def test_grouped_folds_test_each_pair_once_a_repeat():
    table = pictures({"Normal": 50, "Pre-B": 70}).assign(slide=lambda table: [place // 3 for place in range(len(table))])
    table.index = table.index[::-1]  # places, not index labels
    tested, seen = np.zeros(120, int), []
    for _, _, train, test in grouped_folds(table, "slide", n_splits=4, n_repeats=2):
        assert not set(table["slide"].iloc[train]) & set(table["slide"].iloc[test])
        assert len(train) + len(test) == 120
        tested[test] += 1
        seen.append(tuple(test))
    assert (tested == 2).all() and len(set(seen)) == 8
    with pytest.raises(SplitError, match="2 groups, 4 folds"):
        next(grouped_folds(table.assign(slide=table["pair"].str[-1] > "4"), "slide", n_splits=4))


@pytest.mark.parametrize("column, message", [("sha256", "same file"), ("pixels", "same pixels"), ("group", "same group")])
def test_check_names_the_pictures(column, message):
    split = split_pairs(pictures({"Normal": 40}))
    first, second = (split.index[split["subset"] == subset][0] for subset in ("train", "test"))
    split.loc[second, column] = split.loc[first, column]
    with pytest.raises(SplitError, match=f"{message} in several subsets") as caught: check_split(split)
    for place in (first, second): assert f"{split['pair'][place]} ({split['subset'][place]})" in str(caught.value)


def test_check_refuses():
    split = split_pairs(pictures({"Normal": 40, "Pre-B": 40}))
    with pytest.raises(SplitError, match="twice in the split: Normal/0000"): check_split(pd.concat([split, split[:1]]))
    with pytest.raises(SplitError, match="no such subsets: {'val'}"): check_split(split.replace("validation", "val"))
    lacking = split[(split["class"] == "Normal") | (split["subset"] != "test")]
    with pytest.raises(SplitError, match="class Pre-B has no pictures for test"): check_split(lacking)
    with pytest.raises(SplitError, match="same group"): check_split(split, groups=["all"] * len(split))
    check_split(split, groups=[""] * len(split))


def test_round_trip_and_comparison(tmp_path):
    table = pictures({"Normal": 40, "Pre-B": 40})
    split = split_pairs(table)
    write_split(split, tmp_path / "split.csv")
    pd.testing.assert_frame_equal(read_split(tmp_path / "split.csv", table), split, check_dtype=False)
    for other, message in [(table[1:], "1 missing here: Normal/0000"),
                           (pd.concat([table, pictures({"Pro-B": 1})]), "1 not in the split: Pro-B/0000"),
                           (table.replace("sha Normal/0003", "edited"), "1 changed: Normal/0003")]:
        with pytest.raises(SplitError, match=message): read_split(tmp_path / "split.csv", other)
    text = (tmp_path / "split.csv").read_text()
    (tmp_path / "split.csv").write_text(text.replace("subset", "part"))
    with pytest.raises(SplitError, match="not a split, it lacks subset"): read_split(tmp_path / "split.csv")


def test_leaky_split_is_not_written(tmp_path):
    split = split_pairs(pictures({"Normal": 40})).assign(sha256="same")
    with pytest.raises(SplitError, match="same file"): write_split(split, tmp_path / "split.csv")
    assert not list(tmp_path.iterdir())


def test_real_pictures(shared_data):
    from leukemia_nb.data import build_manifest; from leukemia_nb.images import read_picture
    from leukemia_nb.pairing import pixel_hash
    folder = shared_data / "taleqani"
    table = build_manifest(folder)
    fields = pd.read_csv(shared_data / "taleqani_fields.csv").set_index("file")["overlap_group"]
    table["field"] = fields[[Path(path).relative_to(folder.absolute()).as_posix() for path in table["path"]]].to_numpy()
    pro = table[table["class"] == "Pro-B"]
    table["pixels"] = ""
    table.loc[pro.index, "pixels"] = [pixel_hash(read_picture(path)) for path in pro["path"]]
    deck, grouped = split_pairs(table), split_pairs(table, groups="field")
    for _, rows in deck.groupby("class"): assert rows["subset"].value_counts().to_dict() == subset_sizes(len(rows))
    assert deck.groupby("pixels")["subset"].nunique()[1:].max() == 1
    assert (deck["group"].value_counts() > 1).sum() >= 30  # the set's exact duplicates, as far as they are here
    check_split(grouped, groups=table.set_index("pair")["field"][grouped["pair"]])
    with pytest.raises(SplitError, match="same group"): check_split(deck, groups=table.set_index("pair")["field"][deck["pair"]])
    shares = pd.crosstab(grouped["class"], grouped["subset"], normalize="index")
    assert (shares["test"] - 0.05).abs().max() < 0.01 and (shares["train"] - 0.85).abs().max() < 0.03
