"""Synthetic smears and their truth."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from leukemia_nb.data import synthetic
from leukemia_nb.data.classes import CLASSES, FOUR_CLASSES
from leukemia_nb.data.manifest import build_manifest
from leukemia_nb.data.files import mark_output_folder
from leukemia_nb.data.images import read_image
from leukemia_nb.data.synthetic import _CELL_KINDS, _SITE_OF_CLASS, _SITES, make_smear, write_smears


def a_channel(image):
    return cv2.cvtColor(image, cv2.COLOR_RGB2LAB)[..., 1].astype(float)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(FOUR_CLASSES), st.integers(0, 10**6), st.integers(16, 120), st.integers(16, 160), st.floats(0, 1))
def test_shape_of_the_truth(label, seed, height, width, spurious_correlation):
    found = make_smear(label, seed, height, width, spurious_correlation)
    assert found.image.shape == (height, width, 3) and found.image.dtype == np.uint8
    assert found.cells.shape == found.nuclei.shape == (height, width)
    assert found.cells.dtype == np.int32 and found.nuclei.dtype == bool
    assert (np.unique(found.cells[found.cells > 0]) == np.arange(1, found.cells.max() + 1)).all()  # 1..n, none left out
    assert (found.cells[found.nuclei] > 0).all()
    assert found.label == label and found.site in _SITES


def test_same_seed_same_bytes_other_seed_other_image():
    one, two, other = (make_smear("Pre-B", seed, 192, 256) for seed in (7, 7, 8))
    assert one.image.tobytes() == two.image.tobytes() and one.cells.tobytes() == two.cells.tobytes()
    assert (one.image != other.image).mean() > 0.5


def test_same_bytes_in_another_process_and_with_one_thread():
    code = (
        "import cv2, hashlib; cv2.setNumThreads(1); from leukemia_nb.data.synthetic import make_smear\n"
        "found = make_smear('Pro-B', 3, 384, 512); print(hashlib.sha256(found.image.tobytes() + found.cells.tobytes()).hexdigest())"
    )
    root = Path(synthetic.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root), "PYTHONHASHSEED": "1"},
    )
    here = make_smear("Pro-B", 3, 384, 512)
    assert done.stdout.strip() == hashlib.sha256(here.image.tobytes() + here.cells.tobytes()).hexdigest(), done.stderr


def test_global_random_state_is_left_alone():
    np.random.seed(0)
    cv2.setRNGSeed(0)
    before = np.random.get_state()[1].copy()
    first = make_smear("Normal", 1, 64, 64).image
    assert (np.random.get_state()[1] == before).all()
    np.random.seed(5)
    cv2.setRNGSeed(5)
    assert (make_smear("Normal", 1, 64, 64).image == first).all()


@pytest.fixture(scope="module")
def measured() -> dict:
    """For each class: radius of uncut cells, share of nucleus, lightness and granularity of nuclei, over 12 fields."""
    rows = {}
    for label in FOUR_CLASSES:
        cells = []
        for seed in range(12):
            field = make_smear(label, seed, site="D")
            light = cv2.cvtColor(field.image, cv2.COLOR_RGB2LAB)[..., 0].astype(float)
            edge = set(np.concatenate([field.cells[[0, -1]].ravel(), field.cells[:, [0, -1]].ravel()]))
            for number in set(range(1, field.cells.max() + 1)) - edge:
                mask = field.cells == number
                nucleus = mask & field.nuclei
                if mask.sum() < 500:
                    continue
                cells.append([(mask.sum() / np.pi) ** 0.5, nucleus.sum() / mask.sum(), light[nucleus].mean()])
        rows[label] = np.array(cells)
    return rows


def test_classes_differ_as_the_original_study_says(measured):
    radius, share, light = (({label: np.median(cells[:, k]) for label, cells in measured.items()}) for k in range(3))
    assert radius["Pre-B"] > 1.2 * radius["Pro-B"] and radius["Pre-B"] > 1.4 * radius["Normal"]
    assert light["Normal"] < light["Pre-B"] < light["Pro-B"]  # condensed and dark; open; lighter
    assert share["Normal"] > share["Pre-B"]  # scant cytoplasm
    assert radius["Pro-B"] < radius["Early Pre-B"] < radius["Pre-B"]
    for label, kind in _CELL_KINDS.items():
        assert radius[label] == pytest.approx(kind.radius, rel=0.1)


def test_one_cell_alone_can_be_hard_to_name(measured):
    light = {label: cells[:, 2] for label, cells in measured.items()}
    assert light["Pre-B"].max() > light["Pro-B"].min()  # the classes overlap
    assert measured["Pro-B"][:, 0].min() < measured["Normal"][:, 0].max()


@pytest.mark.parametrize("label", FOUR_CLASSES)
@pytest.mark.parametrize("site", "ABCD")
def test_white_cells_stand_out_on_the_a_channel(label, site):
    """Two means on A, as the original study has it: every cell is found, and little else, in every site."""
    found = total = 0
    overlap = []
    for seed in range(3):
        field = make_smear(label, seed, 384, 512, site=site)
        a, white = a_channel(field.image), field.cells > 0
        low, high = a.min(), a.max()
        for _ in range(50):
            low, high = a[a < (low + high) / 2].mean(), a[a >= (low + high) / 2].mean()
        mask = cv2.morphologyEx((a >= (low + high) / 2).astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3))) > 0
        overlap.append((mask & white).sum() / (mask | white).sum())
        for number in range(1, field.cells.max() + 1):
            total += 1
            found += mask[field.cells == number].mean() > 0.4
    assert found >= 0.95 * total and np.mean(overlap) > 0.6, (found, total, overlap)


@pytest.mark.parametrize("height, width", [(384, 512), (192, 256)])
def test_same_field_at_another_size(height, width):
    large, small = make_smear("Pre-B", 5, site="D"), make_smear("Pre-B", 5, height, width, site="D")
    shrunk = cv2.resize(large.image, (width, height), interpolation=cv2.INTER_AREA)
    assert np.abs(shrunk.astype(float) - small.image).mean() < 12
    white = cv2.resize((large.cells > 0).astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) > 0
    assert (white & (small.cells > 0)).sum() / (white | (small.cells > 0)).sum() > 0.9
    assert large.cells.max() == small.cells.max()


def test_some_cells_touch():
    touching = 0
    for seed in range(10):
        field = make_smear("Pre-B", seed, 384, 512)
        parts = cv2.connectedComponents((field.cells > 0).astype(np.uint8))[0] - 1
        touching += parts < field.cells.max()
    assert 3 <= touching < 10


def test_site_alone_changes_no_cell():
    one, two = (make_smear("Pre-B", 11, 384, 512, site=site) for site in "BD")  # the same kind of bar
    assert (one.cells == two.cells).all() and (one.nuclei == two.nuclei).all()
    assert np.abs(one.image.astype(int) - two.image).mean() > 2


def test_class_alone_changes_nothing_but_cells():
    one, two = (make_smear(label, 11, 384, 512, site="D") for label in ("Normal", "Pre-B"))
    far = cv2.dilate(((one.cells > 0) | (two.cells > 0)).astype(np.uint8), np.ones((25, 25))) == 0
    assert far.mean() > 0.3 and (np.abs(one.image.astype(int) - two.image)[far] <= 1).all()


@pytest.mark.parametrize("spurious_correlation, low, high", [(0, 0.22, 0.28), (0.5, 0.59, 0.66), (1, 1, 1)])
def test_confounded_is_the_proportion(spurious_correlation, low, high):
    own = [
        synthetic._choose_site(CLASSES[seed % 3], seed, spurious_correlation) == _SITE_OF_CLASS[CLASSES[seed % 3]]
        for seed in range(3000)
    ]
    assert low <= np.mean(own) <= high  # spurious_correlation + (1 - spurious_correlation) / 4


def test_background_alone_gives_the_class_away_only_where_confounded():
    """Nearest site by the background's colour, as a shortcut model would do it."""

    def accuracy(spurious_correlation):
        right = []
        for seed in range(24):
            label = CLASSES[seed % 3]
            field = make_smear(label, seed, 96, 128, spurious_correlation)
            bright = np.quantile(field.image.reshape(-1, 3), 0.8, axis=0)
            names = list(CLASSES)
            guess = names[np.argmin([np.abs(bright - _SITES[_SITE_OF_CLASS[name]].background).sum() for name in names])]
            right.append(guess == label)
        return np.mean(right)

    assert accuracy(1) > 0.85 and accuracy(0) < 0.65


def test_bars_hide_what_is_below_them():
    hidden = 0
    for seed in range(12):
        free, barred = (make_smear("Pre-B", seed, 384, 512, site=site) for site in "CA")  # thin red; big white box
        assert not (barred.cells > 0)[-24:-8, -60:-8].any()
        hidden += (free.cells > 0).sum() > (barred.cells > 0).sum()
    assert hidden >= 1


def test_wrong_requests():
    with pytest.raises(ValueError, match="'Pro-A' is no class.*Normal, Early Pre-B, Pre-B, Pro-B"):
        make_smear("Pro-A")
    with pytest.raises(ValueError, match="'Mayo' is no site; choose from A, B, C, D"):
        make_smear("Pro-B", site="Mayo")
    with pytest.raises(ValueError, match="is too small: 16"):
        make_smear("Pro-B", height=15)
    with pytest.raises(ValueError, match="between 0 and 1, not 2"):
        make_smear("Pro-B", spurious_correlation=2)


def test_write_smears(tmp_path):
    table = write_smears(tmp_path, 3, classes=FOUR_CLASSES, seed=4, height=48, width=64)
    assert len(table) == 12 and table["seed"].is_unique
    for row in table.itertuples():
        drawn = make_smear(row[1], row.seed, 48, 64)
        assert (read_image(tmp_path / row.path) == drawn.image).all()
        assert (
            cv2.imread(str(tmp_path / row.truth), cv2.IMREAD_UNCHANGED) == drawn.cells
        ).all() and row.cells == drawn.cells.max()
        assert row.site == drawn.site
    manifest = build_manifest(tmp_path, classes=FOUR_CLASSES)
    assert len(manifest) == 12 and (manifest["problem"] == "").all()  # the truth is no class
    assert (tmp_path / "truth" / "smears.csv").exists()


def test_write_smears_refuses_before_it_writes(tmp_path):
    with pytest.raises(ValueError, match="'Post/B' cannot be the name of a class"):
        write_smears(tmp_path, 2, classes=("Normal", "Post/B"))
    assert not list(tmp_path.iterdir())


def test_smears_of_any_classes(tmp_path):
    """Twenty classes are twenty folders of different images; the three classes of the study are not changed by others."""
    names = [f"kind {place}" for place in range(17)]
    table = write_smears(tmp_path / "many", 1, classes=[*names, *CLASSES], height=32, width=48)
    three = write_smears(tmp_path / "three", 1, height=32, width=48)
    assert list(table["class"]) == [*names, *CLASSES] and table["seed"].is_unique
    assert len({read_image(tmp_path / "many" / path).tobytes() for path in table["path"]}) == 20
    for name in three["path"]:
        assert (tmp_path / "three" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()


def test_sets_of_two_seeds_share_no_image(tmp_path):
    tables = [write_smears(tmp_path / str(seed), 4, seed=seed, height=16, width=16) for seed in range(3)]
    seeds = [seed for table in tables for seed in table["seed"]]
    assert len(set(seeds)) == len(seeds) == 36


def test_like_the_real_ones(shared_data):
    """Brightness and the contrast of white cells on the A channel lie within what the real images show."""

    def describe(image):
        a = a_channel(image)
        high = a >= (a.min() + np.quantile(a, 0.999)) / 2
        return np.median(image), a[high].mean() - a[~high].mean(), high.mean()

    names = [name for label in ("Benign", "Pre", "Pro") for name in sorted((shared_data / "taleqani" / label).iterdir())[::40]]
    real = np.array([describe(read_image(name)) for name in names])
    drawn = np.array([describe(make_smear(label, seed, 224, 224).image) for seed in range(8) for label in CLASSES])
    for column in range(3):
        low, high = np.quantile(real[:, column], [0.01, 0.99])
        assert low <= np.median(drawn[:, column]) <= high, (column, low, np.median(drawn[:, column]), high)


def synth(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "leukemia_nb", "synth", *map(str, arguments), "--height", "64", "--width", "64"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


def test_images_of_an_earlier_call_are_named(tmp_path):
    assert "6 smears in" in synth(tmp_path / "s", "--per-class", 2)[1]
    status, said = synth(tmp_path / "s", "--per-class", 1, "--seed", 4)
    assert status == 0 and "3 smears in" in said and "3 other images lay there before" in said
    assert all(path.name.startswith(".") for path in tmp_path.iterdir() if path.name != "s")


def test_no_smears_where_no_search_would_find_them_or_nothing_can_be_written(tmp_path):
    mark_output_folder(tmp_path / "run")
    (tmp_path / "file").touch()
    for folder, message in [("run", "run: holds results"), ("file", "A file stands where a folder is needed")]:
        status, said = synth(tmp_path / folder, "--per-class", 1)
        assert status == 1 and message in said and "Traceback" not in said and "0%" not in said
