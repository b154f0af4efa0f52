"""Leakage: copies and overlapping fields are found, look-alikes are not; against the listed groups on real images."""

import json
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from leukemia_nb.data import near_duplicates as leakage
from leukemia_nb.data.files import OutputError
from leukemia_nb.data.images import ImageError, write_image
from leukemia_nb.data.synthetic import make_smear

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def field():
    return make_smear("Pre-B", seed=3, height=768, width=1024, site="C").image


@pytest.fixture(scope="module")
def others():
    return [make_smear("Pre-B", seed=40 + seed, site="C").image[:480, :640] for seed in range(5)]


def save(folder, **images):
    for name, image in images.items():
        write_image(folder / f"{name}.png", image)
    return sorted(folder.glob("*.*"))


def names(pairs):
    return {tuple(sorted((a.split("/")[-1], b.split("/")[-1]))) for a, b in zip(pairs["a"], pairs["b"])}


@given(st.sampled_from(leakage._ORIENTATIONS), st.integers(1, 6), st.integers(1, 6))
def test_orientations_move_pixels_and_can_be_undone(orientation, height, width):
    image = np.arange(height * width).reshape(height, width)
    turned = leakage._orient(image, orientation)
    assert sorted(turned.ravel()) == sorted(image.ravel())
    back = {"turned left": "turned right", "turned right": "turned left"}.get(orientation, orientation)
    np.testing.assert_array_equal(leakage._orient(turned, back), image)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.3, 3), st.floats(-50, 50), st.integers(-40, 40), st.integers(-40, 40))
def test_correlation_ignores_brightness_and_has_a_mirror(gain, offset, dx, dy):
    image = np.random.default_rng(0).normal(0, 20, (100, 100)).astype(np.float32)
    other = np.random.default_rng(1).normal(0, 20, (100, 100)).astype(np.float32)
    mask = leakage._comparable(100)
    score, share = leakage._cross_correlation(image, other, dx, dy, mask)
    again, same = leakage._cross_correlation(other * np.float32(gain) + np.float32(offset), image, -dx, -dy, mask)
    assert -1 <= score <= 1 and share == same and again == pytest.approx(score, abs=1e-4)


def test_too_little_to_compare_is_no_agreement():
    image = np.random.default_rng(0).normal(0, 20, (100, 100)).astype(np.float32)
    for dx, dy in ((99, 99), (100, 0), (-300, 5)):
        assert leakage._cross_correlation(image, image, dx, dy, leakage._comparable(100))[0] == -1
    assert leakage._cross_correlation(np.zeros_like(image), np.zeros_like(image), 0, 0, leakage._comparable(100))[0] == -1


@pytest.mark.parametrize("left, top", [(0, 190), (250, 0), (200, 150), (330, 180)])
def test_shift_is_found(field, others, tmp_path, left, top):
    paths = save(tmp_path, a=field[:480, :640], b=field[top : top + 480, left : left + 640], c=others[0], d=others[1])
    pairs = leakage.find_near_duplicates(paths).query("kind == 'overlap'")
    assert names(pairs) == {("a.png", "b.png")}
    assert pairs["dx"][0] == pytest.approx(left / 640, abs=0.01) and pairs["dy"][0] == pytest.approx(top / 480, abs=0.01)


def test_unrelated_smears_with_the_same_scale_bar_do_not_match(others, tmp_path):
    barred = []
    for image in others:
        image = image.copy()
        image[-40:, -100:] = 255
        cv2.putText(image, "200 px", (548, 470), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 2)
        barred.append(image)
    assert leakage.find_near_duplicates(save(tmp_path, **{f"p{i}": image for i, image in enumerate(barred)})).empty


@pytest.mark.parametrize("orientation", leakage._ORIENTATIONS[1:])
def test_flipped_resized_and_saved_again(field, others, tmp_path, orientation):
    image = field[:480, :640]
    changed = cv2.resize(np.ascontiguousarray(leakage._orient(image, orientation)), (300, 300), interpolation=cv2.INTER_AREA)
    save(tmp_path, a=image, c=others[0])
    write_image(tmp_path / "b.jpg", changed, quality=60)
    pairs = leakage.find_duplicates(sorted(tmp_path.glob("*.*")))
    assert names(pairs) == {("a.png", "b.jpg")} and pairs["kind"][0] == "flipped copy"
    back = {"turned left": "turned right", "turned right": "turned left"}.get(orientation, orientation)
    assert pairs["orientation"][0] == back  # what has to be done to b to lie on a


def test_same_file_under_a_name_outside_ascii(field, tmp_path):
    (first,) = save(tmp_path, a=field[:240, :320])
    (tmp_path / "Präparat 血.png").write_bytes(first.read_bytes())
    pairs = leakage.find_near_duplicates(sorted(tmp_path.glob("*.*")))
    assert pairs["kind"].tolist() == ["same file"]


def test_empty_images_are_similar_to_nothing(tmp_path):
    paths = save(tmp_path, a=np.full((60, 80, 3), 240, np.uint8), b=np.full((60, 80, 3), 250, np.uint8))
    assert len(leakage.find_near_duplicates(paths)) == 0
    assert list(leakage.find_near_duplicates([]).columns) == list(leakage._COLUMNS)


def test_torn_image_is_named(tmp_path):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    with pytest.raises(ImageError, match="torn.png"):
        leakage.find_near_duplicates([tmp_path / "torn.png"])


def test_same_pairs_again_and_with_more_threads(field, others, tmp_path):
    paths = save(tmp_path, a=field[:480, :640], b=field[100:580, 200:840], c=others[2])
    first = leakage.find_near_duplicates(paths, n_jobs=1)
    pd.testing.assert_frame_equal(first, leakage.find_near_duplicates(paths, n_jobs=2))


def test_points_in_parts_lead_to_the_same_pairs(field, others, tmp_path, monkeypatch):
    """More points than one index holds are divided into parts, and images into blocks."""
    views = {f"v{i}": field[:480, left : left + 640] for i, left in enumerate((0, 150, 300))}
    paths = save(tmp_path, **views, **{f"o{i}": image for i, image in enumerate(others)})
    whole = leakage.find_near_duplicates(paths, n_jobs=1)
    monkeypatch.setattr(leakage, "_POINTS_AT_ONCE", 400)
    monkeypatch.setattr(leakage, "_IMAGES_AT_ONCE", 3)
    centres = leakage._part_centres(paths, seed=0)
    parts = leakage.find_near_duplicates(paths, n_jobs=1)
    assert centres.shape == (6, 128) and len(whole) == 3 and names(parts) == names(whole)
    np.testing.assert_allclose(parts[["dx", "dy", "ncc"]], whole[["dx", "dy", "ncc"]])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0, 0.5), st.integers(1, 7))
def test_block_means_leave_out_no_similar_thumbnails(seed, noise, block):
    random = np.random.default_rng(seed)
    smooth = cv2.GaussianBlur(random.normal(128, 60, (32, 32)), (0, 0), random.uniform(0.5, 4))
    copies = [leakage._orient(smooth, turn) + random.normal(0, noise * smooth.std(), (32, 32)) for turn in leakage._ORIENTATIONS]
    flat = np.full((32, 32), 90.0)
    small = [leakage._thumbnail(np.clip(image, 0, 255).astype(np.uint8)) for image in (*copies, flat, flat + 1)]
    found = leakage._similar_means(np.array([leakage._block_means(image) for image in small]), 0.9, block)
    found = set(found.itertuples(index=False, name=None))
    for a, b in np.transpose(np.triu_indices(len(small), 1)).tolist():
        for turn in leakage._ORIENTATIONS:
            if np.vdot(small[a], leakage._orient(small[b], turn)) >= 0.9:
                assert (a, b, turn) in found
    assert all(a < b < 8 for a, b, _ in found)


def test_a_full_disk_is_named(field, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", str(tmp_path / "points" / "0"))

    monkeypatch.setattr("builtins.open", lambda *arguments, **options: full())
    bins = leakage._Bins(tmp_path / "points", np.dtype("u4"))
    with pytest.raises(OutputError, match="Free some space"):
        bins.add(np.zeros(3, "u4"), np.zeros(3, int))


def linked(number):
    place = st.integers(0, number - 1)
    return st.tuples(st.just(number), st.lists(st.tuples(place, place)))


@settings(deadline=None)
@given(st.integers(1, 12).flatmap(linked))
def test_groups_are_what_is_connected(case):
    number, links = case
    groups = leakage.group_images(
        list("abcdefghijkl"[:number]),
        pd.DataFrame({"a": ["abcdefghijkl"[a] for a, _ in links], "b": ["abcdefghijkl"[b] for _, b in links]}, dtype=object),
    )
    expected = list(range(number))
    for _ in range(number):
        for a, b in links:
            expected[a] = expected[b] = min(expected[a], expected[b])
    np.testing.assert_array_equal(groups, pd.factorize(np.array(expected))[0])


def test_a_path_named_twice_is_in_one_group():
    pairs = pd.DataFrame({"a": ["x"], "b": ["y"]})
    assert leakage.group_images(["z", "x", "y", "x", "z"], pairs).tolist() == [0, 1, 1, 1, 0]


def test_report_counts_near_duplicates_in_train_only():
    split = pd.DataFrame({"pair": list("abcdef"), "subset": ["train", "train", "test", "test", "val", "test"]})
    split["group"] = [0, 1, 0, 2, 2, 3]  # c has its near-duplicate in train; d in val alone
    report = leakage.leakage_report(split).set_index("subset")
    assert report.loc["test", ["n_images", "near_duplicates"]].tolist() == [3, 1] and report.loc["val", "near_duplicates"] == 0
    assert report.loc["test", "proportion"] == pytest.approx(1 / 3)
    assert leakage.pairs_without_near_duplicates(split) == {"d", "f"}
    assert leakage.pairs_without_near_duplicates(split, "val") == {"e"}


@pytest.mark.parametrize("missing", ["", None, float("nan")])
def test_an_empty_group_is_none(missing):
    split = pd.DataFrame({"pair": list("abcd"), "subset": ["train", "train", "test", "test"]})
    split["group"] = pd.Series([missing, "x", missing, "x"], dtype=object)
    assert leakage.leakage_report(split)["near_duplicates"].tolist() == [1]
    assert leakage.pairs_without_near_duplicates(split) == {"c"}


def test_report_separates_direct_pairs_from_those_by_way_of_a_third_image():
    split = pd.DataFrame({"pair": list("abcde"), "subset": ["train", "test", "test", "val", "test"]})
    pairs = pd.DataFrame({"a": ["b", "b", "d"], "b": ["a", "c", "e"]})  # c is tied to a through b alone
    split["group"] = leakage.group_images(split["pair"], pairs)
    report = leakage.leakage_report(split, pairs).set_index("subset")
    assert (report.loc["test", "near_duplicates"], report.loc["test", "directly"]) == (2, 1)
    assert report.loc["val", "near_duplicates"] == report.loc["val", "directly"] == 0


@pytest.fixture
def benchmarks(monkeypatch, tmp_path):
    "The modules of benchmarks/ for dummy data: five images, of which the finder pairs a and b, and the list b and c."
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    files = ["Benign/a.jpg", "Benign/b.jpg", "Pre/c.jpg", "Pro/d.jpg", "Early/e.jpg"]
    for file in files:
        (tmp_path / "taleqani" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "taleqani" / file).write_text(file)
    pd.DataFrame({"file": files, "overlap_group": [0, 1, 1, 2, 2]}).to_csv(tmp_path / "taleqani_fields.csv", index=False)
    found = pd.DataFrame(
        [{name: None for name in leakage._COLUMNS} | {side: str(tmp_path / "taleqani" / file) for side, file in zip("ab", files)}]
    )
    monkeypatch.setattr(leakage, "find_near_duplicates", lambda paths, **settings: found)
    import taleqani

    return taleqani, tmp_path


def test_benchmarks_group_by_what_is_found_joined_with_what_is_listed(benchmarks):
    taleqani, data = benchmarks
    images, pairs = taleqani.known_images(data)
    assert images["file"].tolist() == ["Benign/a.jpg", "Benign/b.jpg", "Pre/c.jpg", "Pro/d.jpg"]
    assert images["group"].nunique() == 2 and images["group"][:3].nunique() == 1
    assert pairs[["a", "b"]].to_numpy().tolist() == [["Benign/a.jpg", "Benign/b.jpg"]]
    taleqani.check_apart(images, pairs, [np.array([0, 1, 2]), np.array([3])])
    for parts in ([[0], [1, 2, 3]], [[0, 1], [2, 3]]):
        with pytest.raises(AssertionError, match="in two parts"):
            taleqani.check_apart(images, pairs, map(np.array, parts))


def test_benchmarks_on_the_real_images_use_these_groups_and_say_so():
    for name in ("cell_model", "shortcuts"):
        text = (ROOT / f"benchmarks/{name}.py").read_text(encoding="utf-8")
        assert "known_images(" in text and "check_apart(" in text and "overlap_group" not in text, name
        result = ROOT / f"benchmarks/results/{name}.json"
        if result.is_file():
            assert "find_near_duplicates, joined with" in json.loads(result.read_text())["grouped_by"], name
    kept = json.loads((ROOT / "benchmarks/results/cell_model.json").read_text())
    assert kept["pairs_across_folds"] == 0 and kept["near_duplicate_pairs"] > 800 and "Korn-Graubard" in kept["interval"]
    assert kept["accuracy_test"]["Single-cell model"]["n"] == kept["test"]


@pytest.mark.parametrize("name", ["leakage", "predict_speed"])
def test_benchmark_results_have_the_keys_that_their_script_writes(name):
    def keys(part):
        parts = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        return set(part if isinstance(part, dict) else ()).union(*map(keys, parts))

    script = (ROOT / f"benchmarks/{name}.py").read_text(encoding="utf-8")
    found = keys(json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8")))
    data = {"same file", "copy", "segment_ms", "count_ms", "PBC lymphocytes", "wbc_masks, all but the cell black"} | {
        key for key in found if ": ours against " in key
    }
    assert not {key for key in found - data if f'"{key}"' not in script}


def test_colours_in_the_single_cell_models_results_are_those_of_the_code():
    from leukemia_nb.models.cell_model import COLOURS

    kept = json.loads((ROOT / "benchmarks/results/cell_model.json").read_text(encoding="utf-8"))
    words = {word for row in kept["tried_on_validation"] for word in row["training_cells"].split(" (")[0].split(", ")}
    plain = {word.split(" ×")[0] for word in words if not word.startswith(("with", "perceptron", "mean of"))}
    assert plain == {*COLOURS, "transferred"}
    assert {row["predicted_from"].split(", ")[0] for row in kept["tried_on_validation"]} <= {*COLOURS, "own and normalised"}


@pytest.mark.slow
def test_listed_groups_of_real_images(shared_data):
    fields = pd.read_csv(shared_data / "taleqani_fields.csv")
    sizes = fields["overlap_group"].value_counts()
    listed = np.random.default_rng(1).choice(sizes.index[sizes > 1].sort_values(), 40, replace=False)
    alone = np.random.default_rng(2).choice(sizes.index[sizes == 1].sort_values(), 60, replace=False)
    fields = fields[fields["overlap_group"].isin([*listed, *alone])].reset_index(drop=True)
    paths = [str(shared_data / "taleqani" / file) for file in fields["file"]]
    pairs = leakage.find_near_duplicates(paths)
    groups, truth = leakage.group_images(paths, pairs), fields["overlap_group"].to_numpy()
    i, j = np.triu_indices(len(paths), 1)
    wanted = truth[i] == truth[j]
    assert (groups[i] == groups[j])[wanted].mean() >= 0.95
    across = [a.split("/")[-2] != b.split("/")[-2] for a, b in zip(pairs["a"], pairs["b"])]
    assert not any(across)


def test_originals_find_their_small_copies(shared_data):
    matches = pd.read_csv(shared_data / "kaggle_fullres/matches.csv")
    full = [str(shared_data / "kaggle_fullres" / file) for file in matches["file"]]
    small = [str(shared_data / "taleqani" / file) for file in matches["taleqani_match"]]
    pairs = leakage.find_duplicates(full + small)
    assert set(zip(full, small)) <= set(zip(pairs["a"], pairs["b"]))


def test_overlaps_of_sparse_images_are_found():
    """Few points agree where there are few, but the images correlate."""
    votes, ncc, overlap = np.array([9, 9, 9, 19]), np.array([0.99, 0.5, 0.85, 0.99]), np.array([0.83, 0.83, 0.83, 0.78])
    assert leakage._is_overlap(votes, ncc, overlap).tolist() == [True, False, False, True]


def test_crops_of_different_cells_are_no_near_duplicates(shared_data):
    crops = sorted((shared_data / "pbc_lymphocyte").glob("*.jpg"))
    assert len(crops) > 50 and len(leakage.find_near_duplicates(crops)) <= 1
