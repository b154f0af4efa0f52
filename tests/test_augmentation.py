"""Properties of the balanced training table and of flipped pairs."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leukemia_nb.processing.augmentation import oversample_with_flips, draw_copies
from leukemia_nb.processing.pairing import FLIPS, flip

counts = st.dictionaries(st.sampled_from(["Normal", "Early Pre-B", "Pre-B", "Pro-B"]), st.integers(1, 40), min_size=1)


def table_of(counts: dict[str, int]) -> pd.DataFrame:
    rows = [
        {"pair": f"{label}/{number}", "class": label, "subset": "train", "sha256": f"{label}{number}"}
        for label, count in counts.items()
        for number in range(count)
    ]
    return pd.DataFrame(rows)


@given(counts, st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_balanced_without_early_repeats(counts, seed):
    table = table_of(counts)
    training = oversample_with_flips(table, seed)
    largest = max(counts.values())
    assert training["class"].value_counts().to_dict() == dict.fromkeys(counts, largest)
    assert set(training["pair"]) == set(table["pair"])
    assert (training["flip"] == "none").groupby(training["pair"]).any().all()
    assert (training["pair"].str.split("/").str[0] == training["class"]).all()
    assert (training["sha256"] == training["pair"].str.replace("/", "")).all()
    for label, rows in training.groupby("class"):
        times = rows.value_counts(["pair", "flip"])
        variants = 4 * counts[label]
        assert len(times) == min(largest, variants)  # nothing twice before every variant is there once
        assert times.max() <= -(-largest // variants)
        assert (rows["repeat"] > 0).sum() == max(0, largest - variants)
        if largest <= 3 * counts[label]:
            assert "both" not in set(rows["flip"])


@given(counts, st.integers(0, 1000))
@settings(deadline=None, max_examples=20)
def test_seed_alone_decides(counts, seed):
    table = table_of(counts)

    def copies(training):
        return {tuple(row) for row in training[["pair", "flip", "repeat"]].to_numpy()}

    assert copies(oversample_with_flips(table, seed)) == copies(
        oversample_with_flips(table.sample(frac=1, random_state=seed), seed)
    )
    grown = pd.concat([table, table_of({"Other": 1})])
    assert copies(oversample_with_flips(table, seed)) == {
        row for row in copies(oversample_with_flips(grown, seed)) if not row[0].startswith("Other")
    }


def test_other_seed_other_copies():
    table = table_of({"Normal": 20, "Pre-B": 35})
    assert not oversample_with_flips(table, 1).equals(oversample_with_flips(table, 2))


def test_only_training_pairs_are_copied():
    table = table_of({"Normal": 8, "Pre-B": 20})
    table.loc[[0, 1, 9, 10, 11], "subset"] = ["test", "validation", "test", "validation", "validation"]
    training = oversample_with_flips(table)
    assert set(training["subset"]) == {"train"}
    assert training["class"].value_counts().to_dict() == {"Normal": 17, "Pre-B": 17}


def test_refused_tables():
    with pytest.raises(ValueError, match="no training pairs"):
        oversample_with_flips(table_of({"Normal": 2}).assign(subset="test"))
    with pytest.raises(ValueError, match="copies already"):
        oversample_with_flips(oversample_with_flips(table_of({"Normal": 2, "Pre-B": 3})))
    with pytest.raises(ValueError, match="no pairs to copy"):
        draw_copies([], 1, np.random.default_rng(0))


@given(st.sampled_from(FLIPS), st.integers(1, 7), st.integers(1, 7), st.integers(0, 99))
def test_flip_twice_is_no_flip(kind, height, width, seed):
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert (flip(flip(image, kind), kind) == image).all()
    assert (flip(flip(image, "horizontal"), "vertical") == flip(image, "both")).all()
    mask = image[..., 0] > 128
    assert (flip(image * mask[..., None], kind) == flip(image, kind) * flip(mask, kind)[..., None]).all()
