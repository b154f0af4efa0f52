"""Counterfactual images: what changes, what must not, and what is counted."""

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leukemia_nb.audit.cue_conflict import (
    KINDS,
    colour_statistics,
    erase_bar,
    inpaint_background,
    find_bar,
    cue_conflict_rates,
    make_composites,
    match_colours,
    move_bar,
    paste_cells,
    removal_mask,
)
from leukemia_nb.data.manifest import CLASSES
from leukemia_nb.data.images import read_image
from leukemia_nb.processing.cells import find_cells
from leukemia_nb.data.synthetic import smear


@pytest.fixture(scope="module")
def fields():
    """Three small synthetic fields, one a class, with their cells."""
    images = np.stack([cv2.resize(smear(name, seed=8).image, (224, 224), interpolation=cv2.INTER_AREA) for name in CLASSES])
    return images, np.stack([find_cells(image) for image in images]), np.array(CLASSES)


def test_every_kind_is_made_and_seeded(fields):
    made, table = make_composites(*fields, kinds=list(KINDS), seed=4)
    again, table_again = make_composites(*fields, kinds=list(KINDS), seed=4)
    assert made.dtype == np.uint8 and len(made) == 3 * len(KINDS) == len(table)
    np.testing.assert_array_equal(made, again)
    pd.testing.assert_frame_equal(table, table_again)
    within = table[table.kind == "swap within class"]
    assert (within.cells == within.other).all() and (fields[2][within.partner] == within.cells).all()
    both = table[~table.kind.isin(["no cells", "bar erased", "swap within class"])]
    assert (both.cells != both.other).all() and (both.cells == fields[2][both.row]).all()
    assert (table[table.kind == "no cells"].cells == "").all()


def test_swap_keeps_cells_and_takes_the_partners_background(fields):
    images, cells, _ = fields
    made, table = make_composites(*fields, kinds=["swap"], seed=4)
    for image, row in zip(made, table.itertuples()):
        inside = cv2.erode((cells[row.row] > 0).astype(np.uint8), np.ones((7, 7))) > 0
        inside &= ~find_bar(images[row.partner]) & ~find_bar(images[row.row])
        assert np.abs(image[inside].astype(int) - images[row.row][inside]).max() <= 2
        outside = cv2.dilate(((cells[row.row] > 0) | removal_mask(images[row.partner])).astype(np.uint8), np.ones((15, 15))) == 0
        np.testing.assert_array_equal(image[outside], images[row.partner][outside])


def test_no_colour_of_the_old_background_is_left_on_the_rim():
    """A violet disk from a green image on a white one: nothing greenish anywhere."""
    disk = np.hypot(*np.mgrid[-50:50, -50:50]) < 20
    old = cv2.GaussianBlur(np.where(disk[..., None], (120, 60, 180), (40, 250, 40)).astype(np.uint8), (3, 3), 0)
    inner = cv2.erode(disk.astype(np.uint8), np.ones((3, 3))) > 0
    pasted = paste_cells(old, disk, np.full_like(old, 255), rim=3).astype(int)
    assert (pasted[..., 1] - pasted.min(axis=2) <= 10)[~inner].all() or (
        pasted[..., 1] <= np.maximum(pasted[..., 0], pasted[..., 2]) + 3
    ).all()
    halo = paste_cells(old, disk, np.full_like(old, 255), rim=0, softness=0.3).astype(int)
    assert (halo[..., 1] - np.maximum(halo[..., 0], halo[..., 2])).max() > (
        pasted[..., 1] - np.maximum(pasted[..., 0], pasted[..., 2])
    ).max()


def test_fill_in_copies_only_what_may_be_copied(fields):
    image = np.full((64, 64, 3), 200, np.uint8)
    image[:, 40:] = (255, 0, 255)
    hole = np.zeros((64, 64), bool)
    hole[20:30, 8:18] = True
    avoid = np.zeros((64, 64), bool)
    avoid[:, 36:] = True
    filled = inpaint_background(np.where(hole[..., None], 0, image).astype(np.uint8), hole, avoid)
    assert (filled[hole] == 200).all()
    assert find_cells(inpaint_background(fields[0][1], removal_mask(fields[0][1]))).max() <= 1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(60, 160), st.integers(60, 160))
def test_matched_colours_have_the_wanted_means(seed, light, other):
    image = np.random.default_rng(seed).integers(100, 150, (24, 24, 3)).astype(np.uint8)
    wanted = np.array([[light, 128, 128], [8, 2, 2]], float)
    found = colour_statistics(match_colours(image, wanted))
    assert np.abs(found[0] - wanted[0]).max() < 3


def test_bars(fields):
    for image in fields[0]:
        assert find_bar(image).any()
        bare = erase_bar(image)
        assert not find_bar(bare).any()
        np.testing.assert_array_equal(bare[:180, :160], image[:180, :160])
        assert find_bar(move_bar(bare, image)).any()


def test_follow_rates_are_exact():
    table = pd.DataFrame({"kind": "swap", "cells": ["A"] * 10, "other": ["B"] * 10})
    rates = cue_conflict_rates(table, ["A"] * 7 + ["B"] * 2 + ["C"]).set_index("follows")
    assert list(rates["count"]) == [7, 2, 1] and rates.n.eq(10).all()
    assert rates.loc["cells", "low"] == pytest.approx(0.3475, abs=1e-4)  # Clopper and Pearson, 7 of 10
    assert rates.loc["cells", "high"] == pytest.approx(0.9333, abs=1e-4)


def test_refusals(fields):
    with pytest.raises(ValueError, match="unknown kind 'swop'"):
        make_composites(*fields, kinds=["swop"])
    with pytest.raises(ValueError, match="need two classes"):
        make_composites(fields[0], fields[1], ["Normal"] * 3)
    with pytest.raises(ValueError, match="sizes differ"):
        paste_cells(fields[0][0], fields[1][0], fields[0][1][:50])
    with pytest.raises(ValueError, match="nothing is left"):
        inpaint_background(fields[0][0], np.ones((224, 224), bool))


def test_real_bars_are_found_and_cells_go(shared_data):
    table = pd.read_csv(shared_data / "taleqani_fields.csv")
    table = table[~table.file.str.startswith("Early")].groupby("scale_bar_type").sample(12, random_state=0)
    images = [read_image(shared_data / "taleqani" / file) for file in table.file]
    assert all(find_bar(image).any() for image in images)
    left = []
    for image in images[::4]:
        cells = find_cells(image) > 0
        core = cv2.erode(cells.astype(np.uint8), np.ones((5, 5))) > 0
        hole = removal_mask(image)
        left.append((core & ~hole & ~find_bar(image)).sum() / max(core.sum(), 1))
    assert max(left) < 0.02


def test_a_swap_within_the_class_takes_another_image_where_there_is_one(fields):
    images, cells, labels = (np.concatenate([part, part]) for part in fields)
    _, table = make_composites(images, cells, labels, kinds=["swap", "swap within class"], seed=0)
    within = table[table.kind == "swap within class"]
    assert (within.partner != within.row).all() and (labels[within.partner] == labels[within.row]).all()
    alone, same = (
        make_composites(*fields, kinds=["swap"], seed=4)[1],
        make_composites(*fields, kinds=["swap", "swap within class"], seed=4)[1],
    )
    assert alone.partner.tolist() == same[same.kind == "swap"].partner.tolist()
