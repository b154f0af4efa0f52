"""Cue-conflict composites: what changes, what must not, and what is counted."""

import cv2
import numpy as np
import pandas as pd
import pytest

from leukemia_nb.audit.cue_conflict import (
    KINDS,
    _copy_scale_bar,
    cue_conflict_figure,
    cue_conflict_rates,
    _erase_scale_bar,
    _find_scale_bar,
    _inpaint_background,
    make_composites,
    _paste_cells,
    rate_differences,
    _removal_mask,
)
from leukemia_nb.data.images import read_image, resize_square
from leukemia_nb.data.manifest import CLASSES
from leukemia_nb.data.synthetic import make_smear
from leukemia_nb.processing.cells import find_cells


@pytest.fixture(scope="module")
def fields():
    """Three synthetic fields, one a class, with their cells."""
    images = np.stack([resize_square(make_smear(name, seed=8).image, 224) for name in CLASSES])
    return images, np.stack([find_cells(image) for image in images]), np.array(CLASSES)


@pytest.fixture(scope="module")
def composites(fields):
    """Every kind of every field."""
    made, table = make_composites(*fields, kinds=list(KINDS), seed=4)
    return made, table


def test_every_kind_is_made_and_seeded(fields, composites):
    made, table = composites
    again, table_again = make_composites(*fields, kinds=list(KINDS)[:2], seed=4)
    assert made.dtype == np.uint8 and len(made) == 3 * len(KINDS) == len(table)
    np.testing.assert_array_equal(made[:6], again)
    pd.testing.assert_frame_equal(table[:6], table_again)
    assert table["kind"].tolist() == [kind for kind in KINDS for _ in range(3)] and table["row"].tolist() == [0, 1, 2] * len(
        KINDS
    )
    same = table[table["kind"].isin(["mixed_same", "colour_same", "cell_colour_same"])]
    assert (same["foreground"] == same["other_cue"]).all() and (fields[2][same["donor"]] == same["foreground"]).all()
    alone = ["original", "only_fg", "only_bg", "no_scale_bar"]
    conflict = table[~table["kind"].isin([*alone, *same["kind"]])]
    assert (conflict["foreground"] != conflict["other_cue"]).all() and (
        conflict["foreground"] == fields[2][conflict["row"]]
    ).all()
    assert (conflict["other_cue"] == fields[2][conflict["donor"]]).all()
    own = table[table["kind"].isin(set(alone) - {"only_fg"})]
    assert (own["other_cue"] == fields[2][own["row"]]).all() and (table[table["kind"] == "only_fg"]["other_cue"] == "").all()
    assert (table[table["kind"] == "only_bg"]["foreground"] == "").all()


def test_every_kind_changes_what_it_says(fields, composites):
    (images, cells, _), (made, table) = fields, composites
    changed = {kind: made[(table["kind"] == kind).to_numpy()].astype(int) != images for kind in KINDS}
    for i in range(3):
        deep = cv2.erode((cells[i] > 0).astype(np.uint8), np.ones((7, 7))) > 0
        far = cv2.dilate((cells[i] > 0).astype(np.uint8), np.ones((9, 9))) == 0
        assert changed["only_bg"][i][deep].any(axis=1).mean() > 0.95
        assert changed["colour_transfer"][i].any(axis=2).mean() > 0.7
        assert not changed["background_colour"][i][deep].any() and changed["background_colour"][i][far].any(axis=1).mean() > 0.7
        assert not changed["cell_colour"][i][far].any() and changed["cell_colour"][i][deep].any(axis=1).mean() > 0.7
        for kind in ("no_scale_bar", "other_scale_bar"):
            assert changed[kind][i].any() and not changed[kind][i][:180, :160].any()
    empty = made[(table["kind"] == "only_bg").to_numpy()]
    assert [find_cells(image).max() <= 1 for image in empty] == [True] * 3
    bars = [_find_scale_bar(image).any() for image in made[table["kind"].isin(["no_scale_bar", "other_scale_bar"]).to_numpy()]]
    assert bars == [False] * 3 + [True] * 3


def test_mixed_next_keeps_cells_and_takes_the_donors_background(fields, composites):
    (images, cells, _), (made, table) = fields, composites
    rows = table[table["kind"] == "mixed_next"]
    for image, row in zip(made[rows.index], rows.itertuples()):
        inside = cv2.erode((cells[row.row] > 0).astype(np.uint8), np.ones((7, 7))) > 0
        inside &= ~_find_scale_bar(images[row.donor]) & ~_find_scale_bar(images[row.row])
        assert np.abs(image[inside].astype(int) - images[row.row][inside]).max() <= 2
        kept = (
            cv2.dilate(
                ((cells[row.row] > 0) | _removal_mask(images[row.donor], cells[row.donor])).astype(np.uint8), np.ones((15, 15))
            )
            == 0
        )
        np.testing.assert_array_equal(image[kept], images[row.donor][kept])


def test_mixed_same_takes_another_image_of_the_class_where_there_is_one(fields):
    images, cells, labels = (np.concatenate([part, part]) for part in fields)
    _, table = make_composites(images, cells, labels, kinds=["no_scale_bar", "mixed_same"], seed=0)
    same = table[table["kind"] == "mixed_same"]
    assert (same["donor"] != same["row"]).all() and (labels[same["donor"]] == labels[same["row"]]).all()
    one, two = (
        make_composites(*fields, kinds=kinds, seed=4)[1] for kinds in (["colour_transfer"], ["cell_colour", "colour_transfer"])
    )
    assert one["donor"].tolist() == two[two["kind"] == "colour_transfer"]["donor"].tolist()


def test_no_colour_of_the_old_background_is_left_on_the_rim():
    """A violet disk from a green image on a white one: nothing greenish anywhere."""
    disk = np.hypot(*np.mgrid[-50:50, -50:50]) < 20
    old = cv2.GaussianBlur(np.where(disk[..., None], (120, 60, 180), (40, 250, 40)).astype(np.uint8), (3, 3), 0)
    rim, halo = (
        _paste_cells(old, disk, np.full_like(old, 255), **x).astype(int) for x in ({"rim": 3}, {"rim": 0, "softness": 0.3})
    )
    greenish = [(pasted[..., 1] - np.maximum(pasted[..., 0], pasted[..., 2])).max() for pasted in (rim, halo)]
    assert greenish[0] <= 0 < greenish[1]


def test_pasting_by_hand():
    """A square of 100 on 200: inside 100, outside 200, half way at the edge; no cell leaves the background as it is."""
    image, background = np.full((40, 40, 3), 100, np.uint8), np.full((40, 40, 3), 200, np.uint8)
    cells = np.zeros((40, 40), np.int32)
    cells[10:30, 10:30] = 5
    pasted = _paste_cells(image, cells, background)[..., 0].astype(int)
    assert (pasted[13:27, 13:27] == 100).all() and (pasted[:7] == 200).all() and (pasted[:, 33:] == 200).all()
    assert pasted[20, 9] + pasted[20, 10] == pytest.approx(300, abs=1) and pasted[20, 10] < pasted[20, 9]
    assert (_paste_cells(image, cells * 0, background) == 200).all()
    thin = np.zeros((40, 40), bool)
    thin[20, 20] = True  # a cell that erosion removes is pasted all the same
    assert _paste_cells(image, thin, background)[20, 20, 0] < 200


def test_inpainting_copies_only_what_may_be_copied():
    image = np.full((64, 64, 3), 200, np.uint8)
    image[:, 40:] = (255, 0, 255)
    hole, avoid = np.zeros((64, 64), bool), np.zeros((64, 64), bool)
    hole[20:30, 8:18] = True
    avoid[:, 36:] = True
    filled = _inpaint_background(np.where(hole[..., None], 0, image).astype(np.uint8), hole, avoid)
    assert (filled[hole] == 200).all() and (filled[:, 40:] == image[:, 40:]).all()
    assert (_inpaint_background(image, np.zeros((64, 64), bool)) == image).all()


def test_inpainting_continues_a_pattern():
    """Stripes of 8 pixels: the hole is filled with stripes of the same phase."""
    stripes = np.repeat(np.where(np.arange(96) % 8 < 4, 60, 200).astype(np.uint8)[None, :, None], 96, 0).repeat(3, 2)
    hole = np.zeros((96, 96), bool)
    hole[40:56, 40:56] = True
    filled = _inpaint_background(np.where(hole[..., None], 130, stripes).astype(np.uint8), hole)
    assert np.abs(filled.astype(int) - stripes)[hole].mean() < 10
    assert (filled[:30] == stripes[:30]).all()


def test_removal_mask_by_hand():
    """A purple disk with a pale rim on white: both go with a margin, the far side stays."""
    distance = np.hypot(*np.mgrid[-112:112, -112:112])
    image = np.full((224, 224, 3), 240, np.uint8)
    image[distance < 26] = (215, 185, 225)
    image[distance < 20] = (120, 60, 160)
    image[5:30, 5:30] = (215, 185, 225)  # pale, and far from any cell
    removed = _removal_mask(image, distance < 20)
    assert not removed[:40, :40].any()
    assert removed[distance < 26].all() and not removed[distance > 40].any()
    assert not _removal_mask(image, np.zeros((224, 224), bool)).any() and _removal_mask(image, np.ones((224, 224), bool)).all()
    wide = _removal_mask(image, distance < 20, margin=0.1)
    assert wide.sum() > 1.5 * removed.sum()


def scale_bar(ink: tuple[int, int, int], paper: tuple[int, int, int] | None) -> tuple[np.ndarray, tuple[slice, slice]]:
    """An image of 224 x 224 with a bar of 20 pixels, on paper or not; the box of the paper."""
    image, box = np.full((224, 224, 3), (210, 190, 215), np.uint8), (slice(203, 217), slice(188, 218))
    if paper:
        image[box] = paper
    image[209:212, 193:213] = ink
    image[205:208, 200:206:2] = ink
    return image, box


def test_scale_bars_by_hand():
    image, box = scale_bar((10, 10, 10), (255, 255, 255))
    found, label = _find_scale_bar(image), np.zeros((224, 224), bool)
    label[box] = True
    assert (found == label).all()
    red, _ = scale_bar((215, 25, 35), None)
    found = _find_scale_bar(red)
    assert found[209:212, 193:213].all() and found.sum() < 300 and not found[:200].any()
    for nothing in (
        scale_bar((210, 190, 215), None)[0],
        np.full((224, 224, 3), 20, np.uint8),
        np.full((224, 224, 3), (215, 25, 35), np.uint8),
    ):
        assert not _find_scale_bar(nothing).any()
    short, _ = scale_bar((10, 10, 10), (255, 255, 255))
    short[203:217, 188:218] = 255
    short[209, 200:204] = 10  # fewer than 6 dark pixels
    assert not _find_scale_bar(short).any()


def red_letters(colour: tuple[int, int, int], size: int = 224) -> np.ndarray:
    image = np.full((size, size, 3), (210, 190, 215), np.uint8)
    image[-16:-12, -30:-10] = colour
    return image


@pytest.mark.parametrize(
    "image, pixels",
    [
        (red_letters((200, 149, 149)), 128),  # red - green 51: letters, dilated by one pixel
        (red_letters((200, 150, 150)), 0),
        (red_letters((200, 140, 174)), 128),  # red - blue 26
        (red_letters((200, 140, 175)), 0),
        (red_letters((215, 25, 35), 262), 128),  # 262 / 75 = 3.49: an ellipse of 3
        (red_letters((215, 25, 35), 263), 184),  # 3.51: an ellipse of 5
        (scale_bar((129,) * 3, (255,) * 3)[0], 14 * 30),  # dark enough to be ink
        (scale_bar((189,) * 3, (255,) * 3)[0], 14 * 30),  # grey, as thin lines of a reduced image are
        (scale_bar((190,) * 3, (255,) * 3)[0], 0),
        (scale_bar((130, 130, 142), (255,) * 3)[0], 0),  # too pale for ink, and not grey
        (scale_bar((10,) * 3, (239,) * 3)[0], 14 * 30),  # white enough to grow to the edge of the label
        (scale_bar((10,) * 3, (238,) * 3)[0], 7 * 20),  # the box of the ink alone
        (scale_bar((10,) * 3, (226,) * 3)[0], 7 * 20),
        (scale_bar((10,) * 3, (225,) * 3)[0], 0),  # no white around the ink
    ],
)
def test_limits_of_scale_bars(image, pixels):
    assert _find_scale_bar(image).sum() == pixels


def test_coloured_ink_and_short_bars():
    for blue, rows in ((124, 10), (125, 7)):  # 44 levels between the channels are ink, 45 are not
        image, _ = scale_bar((10, 10, 10), (230, 230, 230))
        image[214, 195] = (80, 80, blue)
        assert _find_scale_bar(image).sum() == rows * 20
    for width, pixels in ((8, 0), (9, 16 * 30)):  # more than 4 % of the width of 224
        image = np.full((224, 224, 3), (210, 190, 215), np.uint8)
        image[200:220, 188:218] = 255
        image[[205, 209], 193 : 193 + width] = 10
        assert (_find_scale_bar(image).sum() > 0) == (pixels > 0)


def test_scale_bars_are_erased_and_copied():
    black, box = scale_bar((10, 10, 10), (255, 255, 255))
    red, _ = scale_bar((215, 25, 35), None)
    plain = np.full((224, 224, 3), (200, 215, 220), np.uint8)
    assert (_erase_scale_bar(plain) == plain).all() and (_copy_scale_bar(plain, plain) == plain).all()
    bare = _erase_scale_bar(black)
    assert np.abs(bare.astype(int) - (210, 190, 215)).max() <= 1
    copied = _copy_scale_bar(plain, black)
    assert (copied[box] == black[box]).all() and (copied[:200] == plain[:200]).all()
    letters = _copy_scale_bar(plain, red)
    assert np.abs(letters[210, 200].astype(int) - (215, 25, 35)).max() <= 2 and (letters[215, 190] == plain[215, 190]).all()


def test_rates_by_hand():
    table = pd.DataFrame(
        {"kind": ["mixed_next"] * 10 + ["mixed_same"] * 2, "foreground": ["A"] * 12, "other_cue": ["B"] * 10 + ["A"] * 2}
    ).assign(row=[*range(10), 0, 1], donor=[*range(1, 11), 2, 3], usable=True)
    rates = cue_conflict_rates(table, ["A"] * 7 + ["B"] * 2 + ["C", "A", "B"])
    assert (
        rates["kind"].tolist() == ["mixed_next"] * 3 + ["mixed_same"] * 3
        and rates["cue"].tolist() == ["foreground", "other_cue", "neither"] * 2
    )
    assert rates["count"].tolist() == [7, 2, 1, 1, 0, 1] and rates["n_images"].tolist() == [10] * 3 + [2] * 3
    assert rates["proportion"].tolist() == [0.7, 0.2, 0.1, 0.5, 0.0, 0.5]
    assert rates.loc[0, ["low", "high"]].tolist() == pytest.approx([0.34755, 0.93326], abs=1e-5)  # R: binom.test(7, 10)
    with pytest.raises(ValueError, match="12 images but 1 predictions"):
        cue_conflict_rates(table, ["A"])
    titled = pd.concat([rates.assign(title="one"), rates.assign(title="$two$")])
    figure = cue_conflict_figure(titled, {"mixed_next": "Mixed-Next", "mixed_same": "Mixed-Same"})
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["Mixed-Next", "Mixed-Same"]


def test_worst_background_counts_images_followed_on_all_their_backgrounds():
    table = pd.DataFrame(
        {"kind": "mixed_next", "row": np.repeat(range(4), 3), "donor": [4, 5, 6] * 4, "foreground": "A", "other_cue": "B"}
    ).assign(usable=True)
    rates = cue_conflict_rates(table, list("AAAAABCAAAAA")).set_index(["kind", "cue"])
    assert rates.loc[("mixed_next", "foreground"), ["n_images", "count"]].tolist() == [12, 10]
    worst = rates.loc[("worst_background", "foreground")]
    assert worst[["n_images", "count", "proportion", "interval"]].tolist() == [4, 2, 0.5, "Korn-Graubard (ICC = 1)"]
    pairs = cue_conflict_rates(table, list("AAAAABCAAAAA"), groups=[0, 0, 1, 1, 2, 3, 4]).set_index(["kind", "cue"])
    assert pairs.loc[("worst_background", "foreground"), "low"] < worst["low"]  # two groups of two images
    single = cue_conflict_rates(table.drop_duplicates("row"), list("AAAA"))
    assert "worst_background" not in set(single["kind"])  # no image has two backgrounds


def test_backgrounds_are_of_other_classes_in_turn_and_controls_of_the_same():
    random = np.random.default_rng(0)
    images = random.integers(150, 220, (9, 32, 32, 3), np.uint8)
    cells, labels = np.zeros((9, 32, 32), int), np.repeat(["A", "B", "C"], 3)
    cells[:, 10:20, 10:20] = 1
    made, table = make_composites(
        images, cells, labels, ["mixed_next", "colour_same", "cell_colour_same", "original", "only_fg"], n_backgrounds=4
    )
    mixed, same = table[table["kind"] == "mixed_next"], table[table["kind"].isin(["colour_same", "cell_colour_same"])]
    assert mixed.groupby("row")["donor"].nunique().tolist() == [4] * 9 and (mixed["foreground"] != mixed["other_cue"]).all()
    assert mixed.groupby("row")["other_cue"].value_counts().eq(2).all()  # two of each other class
    assert (same["foreground"] == same["other_cue"]).all() and (same["row"] != same["donor"]).all()
    original, only_fg = (made[(table["kind"] == kind).to_numpy()] for kind in ("original", "only_fg"))
    assert (original == images).all() and (only_fg[cells > 0] == images[cells > 0]).all() and not only_fg[cells == 0].any()
    assert len(make_composites(images, cells, labels, n_backgrounds=99)[1]) == 9 * 6  # there are six of other classes


def test_refusals(fields):
    with pytest.raises(ValueError, match="unknown kind 'swop': choose among original, only_fg, only_bg"):
        make_composites(*fields, kinds=["swop"])
    with pytest.raises(ValueError, match="needs two classes, these images have only 'Normal'"):
        make_composites(fields[0], fields[1], ["Normal"] * 3)
    with pytest.raises(ValueError, match="3 images but 2 labels"):
        make_composites(fields[0], fields[1], ["Normal", "Pre-B"])
    with pytest.raises(ValueError, match="sizes differ"):
        _paste_cells(fields[0][0], fields[1][0], fields[0][1][:50])
    with pytest.raises(ValueError, match="nothing is left"):
        _inpaint_background(fields[0][0], np.ones((224, 224), bool))


def test_real_scale_bars_are_found_and_cells_go(shared_data):
    table = pd.read_csv(shared_data / "taleqani_fields.csv")
    table = table[~table.file.str.startswith("Early")].groupby("scale_bar_type").sample(8, random_state=0)
    images = [read_image(shared_data / "taleqani" / file) for file in table.file]
    assert all(_find_scale_bar(image).any() for image in images)
    left = []
    for image in images[::4]:
        cells = find_cells(image) > 0
        core = cv2.erode(cells.astype(np.uint8), np.ones((5, 5))) > 0
        left.append((core & ~_removal_mask(image, find_cells(image)) & ~_find_scale_bar(image)).sum() / max(core.sum(), 1))
    assert max(left) < 0.02


def test_removal_reaches_as_far_in_an_image_of_twice_the_size(fields):
    """Pale stain up to a twelfth of a height from a cell belongs to it, at any size."""
    for side in (112, 448):
        image, cells = np.full((side, side, 3), (200, 215, 220), np.uint8), np.zeros((side, side), int)
        unit = side // 112
        cells[40 * unit : 52 * unit, 40 * unit : 52 * unit] = 1
        image[cells > 0] = (120, 40, 140)
        pale = np.zeros((side, side), bool)
        pale[40 * unit : 52 * unit, 52 * unit : 70 * unit] = True  # from the cell to a sixth of the height away
        image[pale] = (166, 140, 186)
        removed = _removal_mask(image, cells)[46 * unit, 52 * unit :]
        assert 0.03 < removed.argmin() / side < 0.12, (side, removed.argmin() / side)


def test_images_without_what_is_moved_are_no_evidence(fields):
    """Every other image has no cells: a model of the cells, wrong where there are none, follows them throughout."""
    images, cells, labels = (np.concatenate([part, part]) for part in fields)
    cells = np.where((np.arange(6) % 2 == 0)[:, None, None], 0, cells)
    made, table = make_composites(images, cells, labels, kinds=list(KINDS), seed=4)
    without = table["row"] % 2 == 0
    bars = table["kind"].isin(["no_scale_bar", "other_scale_bar"])
    assert not table.loc[without & ~bars & (table["kind"] != "original"), "usable"].any()
    assert table.loc[bars | (table["kind"] == "original") | (table["kind"] == "mixed_next") & ~without, "usable"].all()
    colours = table[table["kind"].isin(["cell_colour", "cell_colour_same"]) & ~without]
    assert (colours["usable"] == (colours["donor"] % 2 == 1)).all()  # a donor without cells has no colours of cells
    for row in table[~table["usable"]].itertuples():
        np.testing.assert_array_equal(made[row.Index], images[row.row])
    predicted = np.where(without, table["other_cue"], table["foreground"])
    rates = cue_conflict_rates(table, predicted).set_index(["kind", "cue"])
    assert rates.loc[("mixed_next", "foreground"), ["n_images", "count", "proportion"]].tolist() == [3, 3, 1]
    every = cue_conflict_rates(table.assign(usable=True), predicted).set_index(["kind", "cue"])
    assert every.loc[("mixed_next", "foreground"), ["n_images", "count"]].tolist() == [6, 3]


def test_a_kind_without_usable_composites_has_no_rate(fields):
    images, cells, labels = fields
    kinds = ["original", "only_fg", "mixed_next", "mixed_same", "no_scale_bar", "other_scale_bar"]
    full = np.ones_like(cells)  # images that are all cells have no background
    _, table = make_composites(images // 2, full, labels, kinds=kinds, n_backgrounds=2)  # darkened: no scale bar is found
    assert table.groupby("kind")["usable"].sum().drop("original").eq(0).all()
    rates = cue_conflict_rates(table, table["foreground"]).set_index(["kind", "cue"])
    others = rates.query("kind != 'original'")
    assert rates.query("kind == 'original'")["n_images"].eq(3).all() and others["n_images"].eq(0).all()
    assert others["proportion"].isna().all() and ("worst_background", "foreground") in others.index
    assert rate_differences(table, table["foreground"]).empty


def test_a_difference_is_of_the_images_that_have_both_kinds():
    """Scale bars in one class alone: a model that uses none is right on those of that class, without any effect of a bar."""
    smears = [make_smear(name, seed, 96, 96, site="A").image for seed, name in enumerate(["Normal", "Pre-B"] * 4)]
    cells, labels = np.stack([find_cells(image) for image in smears]), np.array(["Normal", "Pre-B"] * 4)
    images = np.stack(smears)
    without, at = make_composites(images, cells, labels, ["no_scale_bar"])
    assert at["usable"].all()
    images[labels == "Pre-B"] = without[labels == "Pre-B"]
    _, table = make_composites(images, cells, labels, ["original", "no_scale_bar", "other_scale_bar"])
    always = np.full(len(table), "Normal")
    assert cue_conflict_rates(table, always).query("kind != 'original' and cue == 'foreground'")["proportion"].tolist() == [1, 0]
    assert rate_differences(table, always).empty  # no image has a bar and was given that of another class


def test_the_only_image_of_a_class_has_no_other_background(fields):
    images, cells, labels = fields
    made, table = make_composites(images, cells, labels, ["mixed_same", "colour_same", "only_bg", "mixed_next"])
    assert table.groupby("kind")["usable"].sum().to_dict() == {"mixed_same": 0, "colour_same": 0, "only_bg": 3, "mixed_next": 3}


@pytest.mark.parametrize("size", [96, 160, 224])
@pytest.mark.parametrize("site", "ABCD")
def test_scale_bars_of_synthetic_smears_are_found_at_any_size(size, site):
    images = [resize_square(make_smear("Normal", seed, 288, 384, site=site).image, size) for seed in range(3)]
    made, table = make_composites(images, np.zeros((3, size, size), int), ["Normal", "Pre-B", "Pro-B"], ["no_scale_bar"])
    assert table["usable"].all()
    assert not make_composites(made, np.zeros((3, size, size), int), ["Normal", "Pre-B", "Pro-B"], ["no_scale_bar"])[1][
        "usable"
    ].any()
