"""Pairs and the dataset folder: right pixels, resumed after anything, read by row; flips in train alone."""

import errno
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from leukemia_nb.data.files import OutputError, TableError, read_table
from leukemia_nb.data.images import ImageError, read_image, resize_square, write_image
from leukemia_nb.data.manifest import build_manifest
from leukemia_nb.data.synthetic import make_smear, write_smears
from leukemia_nb.processing import dataset
from leukemia_nb.inference.predictor import Predictor
from leukemia_nb.processing.cells import FEATURE_NAMES, cell_table, find_cells
from leukemia_nb.processing.dataset import (
    _FLIPS,
    _PAIR_COLUMNS,
    Pairs,
    flip,
    oversample_with_flips,
    _pair_files,
    _pixel_hash,
    prepare_folder,
    prepare_pairs,
    save_pair,
    write_dataset,
)
from leukemia_nb.processing.segmentation import SEGMENTATION_METHODS, apply_mask, segment
from leukemia_nb.testing import dummy_model_file

SIZE = 64


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Six smears a class of 96 x 128, two fewer of Pro-B, and a broken file."""
    folder = tmp_path_factory.mktemp("smears")
    write_smears(folder, 6, seed=1, height=96, width=128)
    for name in ("005", "006"):
        (folder / f"Pro-B/Pro-B_{name}.png").unlink()
    (folder / "Normal/broken.png").write_bytes(b"\x89PNG")
    return build_manifest(folder)


@pytest.fixture(scope="module")
def prepared(manifest, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    return prepare_pairs(manifest, folder, SIZE), folder


@pytest.fixture(scope="module")
def split(prepared):
    table = prepared[0][prepared[0]["problem"] == ""]
    order = table.groupby("class").cumcount()
    return table.assign(subset=np.select([order < 2, order == 2], ["val", "test"], "train"))


@pytest.fixture(scope="module")
def written(prepared, split, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "dataset"
    return write_dataset(split, prepared[1], folder, seed=3), folder


def test_masks_of_kmeans_are_compared_with_the_second_method(tmp_path):
    smear = make_smear("Pre-B", 0, 192, 256).image
    red = np.full_like(smear, (215, 170, 190))  # a field without white blood cells: k-means makes two clusters of nothing
    red[40:120, 60:150] = (225, 150, 175)
    flags = {
        (name, method): save_pair(image, name, tmp_path, 96, method)["mask_flag"]
        for name, image in {"Pre-B/smear": smear, "Pre-B/red": red}.items()
        for method in SEGMENTATION_METHODS
    }
    assert flags["Pre-B/smear", "kmeans"] == ""
    assert "IoU with the other method" in flags["Pre-B/red", "kmeans"] and "IoU" not in flags["Pre-B/red", "nucleus"]


def test_pixels_are_segment_mask_resize_in_that_order(prepared):
    table, folder = prepared
    assert tuple(table.columns) == _PAIR_COLUMNS and (table["problem"] != "").sum() == 1
    for row in table[table["problem"] == ""].iloc[::5].itertuples():
        image = read_image(row.path)
        mask, square = segment(image), resize_square(image, SIZE)
        assert (read_image(folder / row.original) == square).all()
        assert (read_image(folder / row.segmented) == resize_square(apply_mask(image, mask), SIZE)).all()
        cells = cv2.imread(str(folder / row.cells), cv2.IMREAD_UNCHANGED)
        assert cells.dtype == np.uint16 and (cells == find_cells(square)).all() and row.n_cells == cells.max()
        assert row.mask_fraction == round(mask.mean(), 5) and row.pixels == _pixel_hash(image)


def test_same_table_and_files_with_two_workers(manifest, prepared, tmp_path):
    table, folder = prepared
    again = prepare_pairs(manifest, tmp_path, SIZE, n_jobs=2)
    pd.testing.assert_frame_equal(again, table)
    for name in table["segmented"][table["problem"] == ""]:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_only_what_is_not_finished_is_done(manifest, tmp_path):
    first = prepare_pairs(manifest, tmp_path, SIZE)
    good = first[first["problem"] == ""].reset_index(drop=True)
    dates = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    damaged = [tmp_path / good["original"][0], tmp_path / good["segmented"][1], tmp_path / good["cells"][2]]
    damaged[0].write_bytes(damaged[0].read_bytes()[:300])
    damaged[1].unlink()
    damaged[2].write_bytes(b"")
    (tmp_path / "records" / f"{good['pair'][3]}.json").write_text("{")
    pd.testing.assert_frame_equal(prepare_pairs(manifest, tmp_path, SIZE), first)
    changed = {path for path, date in dates.items() if path.stat().st_mtime_ns != date}
    assert changed == {tmp_path / name for pair in good["pair"][:4] for name in _pair_files(pair).values()}
    prepare_pairs(manifest, tmp_path, 32)  # other settings
    assert all(path.stat().st_mtime_ns != date for path, date in dates.items())


def test_image_that_changed_or_went_bad_is_a_row_and_keeps_no_files(manifest, tmp_path):
    work = manifest[manifest["class"] == "Pro-B"].reset_index(drop=True)
    copy = work.assign(path=[str(tmp_path / Path(path).name) for path in work["path"]])
    for source, target in zip(work["path"], copy["path"]):
        Path(target).write_bytes(Path(source).read_bytes())
    prepare_pairs(copy, tmp_path / "out", SIZE)
    Path(copy["path"][0]).write_bytes(Path(copy["path"][1]).read_bytes())
    Path(copy["path"][1]).unlink()
    table = prepare_pairs(copy, tmp_path / "out", SIZE)
    assert "changed since the manifest was made" in table["problem"][0] and "No such file" in table["problem"][1]
    assert (table["problem"][2:] == "").all() and (table.loc[:1, ["original", "mask_flag"]] == "").all(axis=None)
    for pair in copy["pair"][:2]:
        assert not any((tmp_path / "out" / name).exists() for name in _pair_files(pair).values())


def test_any_error_on_one_image_is_its_row(manifest, tmp_path, monkeypatch):
    def fail(image, method):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(dataset, "segment", fail)
    table = prepare_pairs(manifest[:3], tmp_path, SIZE)
    assert (
        table["problem"].str.contains(r"cannot be processed \(RuntimeError: two lines\)").sum()
        == 3 - (manifest["problem"][:3] != "").sum()
    )


def test_errors_of_the_output_end_the_run_and_say_what_is_done(manifest, tmp_path, monkeypatch):
    save, calls = dataset._save_png, []

    def full(path, image):
        calls.append(path)
        if len(calls) > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(path, image)

    monkeypatch.setattr(dataset, "_save_png", full)
    good = manifest[manifest["problem"] == ""]
    with pytest.raises(OutputError, match="No space left on device. 2 of 16 pairs are done and kept"):
        prepare_pairs(good, tmp_path / "out", SIZE)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="0 of 16 pairs are done and kept"):
        prepare_pairs(good, tmp_path / "file", SIZE)


@pytest.mark.filterwarnings("error")
def test_no_pair_is_usable_and_pandas_says_nothing(manifest, tmp_path):
    table = prepare_pairs(manifest[:2].assign(problem="not today"), tmp_path, SIZE)
    assert (table["problem"] == "not today").all() and (table[["original", "cells", "mask_flag", "pixels"]] == "").all(axis=None)
    assert table["mask_fraction"].isna().all() and table["n_cells"].isna().all()


def test_two_rows_of_one_name(manifest, tmp_path):
    with pytest.raises(ValueError, match="two rows named Normal/Normal_001"):
        prepare_pairs(pd.concat([manifest, manifest]), tmp_path, SIZE)


def test_record_holds_what_a_pair_was_made_from(prepared):
    table, folder = prepared
    row = table[table["problem"] == ""].iloc[0]
    record = json.loads((folder / "records" / f"{row['pair']}.json").read_text())
    assert record["provenance"] == {"sha256": row["sha256"], "size": SIZE, "segmentation": "kmeans", "version": 4}
    assert set(record["files"]) == set(_pair_files(row["pair"]).values())


def test_folder_is_prepared_for_later_steps(manifest, tmp_path):
    lines = []
    data = Path(manifest["path"][0]).parents[1]
    pairs = prepare_folder(data, tmp_path / "out", size=224, log=lines.append)
    assert "17 images found" in lines[0]
    cells = pd.read_csv(tmp_path / "out/cell_features.csv")
    assert list(cells.columns) == ["pair", "cell", *FEATURE_NAMES] and len(cells) > 16
    assert not cells.duplicated(["pair", "cell"]).any() and set(cells["pair"]) <= set(pairs["pair"])
    kept = read_table(tmp_path / "out/pairs.csv")
    assert kept["pair"].tolist() == pairs["pair"].tolist() == read_table(tmp_path / "out/manifest.csv")["pair"].tolist()
    with pytest.raises(ImageError, match="was written by leukemia_nb"):
        prepare_folder(tmp_path / "out", tmp_path / "other")


def test_a_cell_without_a_pixel_in_its_window_and_a_fault_in_one_image_do_not_end_the_run(tmp_path, monkeypatch):
    """A large crescent has nothing at the centre of its bounding box; another fault costs the image, not the run."""
    write_smears(tmp_path / "data", 1, height=224, width=224)
    arc, random = np.full((224, 224, 3), (249, 249, 252), np.uint8), np.random.default_rng(0)
    for centre in random.integers(224, size=(12, 2)):
        cv2.circle(arc, centre.tolist(), 8, (217, 210, 229), -1)
    cv2.ellipse(arc, (112, 112), (60, 60), 30, 0, 220, (112, 46, 186), 20)
    write_image(tmp_path / "data/Pro-B/arc.png", cv2.GaussianBlur(arc, (0, 0), 0.8))
    pairs = prepare_folder(tmp_path / "data", tmp_path / "out")
    assert pairs.set_index("pair")["n_cells"]["Pro-B/arc"] and (pairs["problem"] == "").all()
    predictor = Predictor(dummy_model_file(tmp_path / "m.onnx", kind="cells"))
    assert predictor.report([tmp_path / "data/Pro-B/arc.png"]).rows[0]["problem"] == ""

    faults = [FloatingPointError("of one image")]

    def fail(image, cells):
        if faults:
            raise faults.pop()
        return cell_table(image, cells)

    monkeypatch.setattr(dataset, "cell_table", fail)
    pairs = prepare_folder(tmp_path / "data", tmp_path / "again")
    cells, bad = pd.read_csv(tmp_path / "again/cell_features.csv"), pairs[pairs["problem"] != ""]
    assert len(bad) == 1 and "FloatingPointError: of one image" in bad["problem"].iloc[0]
    assert set(cells["pair"]) <= set(pairs["pair"]) - set(bad["pair"]) and len(cells)
    assert list(read_table(tmp_path / "again/pairs.csv")["problem"]) == list(pairs["problem"])


@given(arrays(np.uint8, (3, 4, 3)), st.sampled_from(list(_FLIPS)))
def test_pixel_hash_is_equal_for_mirror_images(image, kind):
    assert _pixel_hash(flip(image, kind)) == _pixel_hash(image)
    other = image.copy()
    other[0, 0, 0] ^= 1
    assert _pixel_hash(other) != _pixel_hash(image) or any((flip(other, each) == image).all() for each in _FLIPS)
    assert _pixel_hash(image.reshape(4, 3, 3)) != _pixel_hash(image)


def test_flips_by_hand():
    image = np.array([[1, 2], [3, 4]])
    flips = {kind: flip(image, kind).tolist() for kind in _FLIPS}
    assert flips == {
        "none": [[1, 2], [3, 4]],
        "horizontal": [[2, 1], [4, 3]],
        "vertical": [[3, 4], [1, 2]],
        "both": [[4, 3], [2, 1]],
    }
    with pytest.raises(ValueError, match="'diagonal' is none of none, horizontal"):
        flip(image, "diagonal")


def table_of(counts: dict[str, int]) -> pd.DataFrame:
    rows = [(f"{label}/{number}", label) for label, count in counts.items() for number in range(count)]
    return pd.DataFrame(rows, columns=["pair", "class"]).assign(subset="train")


@given(st.lists(st.integers(1, 30), min_size=2, max_size=4), st.integers(0, 9))
@settings(deadline=None, max_examples=25)
def test_every_class_gets_as_many_as_the_largest(counts, seed):
    split = table_of(dict(zip("abcd", counts)))
    table = oversample_with_flips(split, seed)
    assert (table["class"].value_counts() == max(counts)).all()
    assert table["pair"][: len(split)].tolist() == split["pair"].tolist() and (table["flip"][: len(split)] == "none").all()
    assert not table.duplicated(["pair", "flip", "repeat"]).any()
    assert (table["repeat"] <= max(0, -(-max(counts) // min(counts)) // 4 + 1)).all()
    pd.testing.assert_frame_equal(table, oversample_with_flips(split, seed))


def test_order_of_the_variants():
    table = oversample_with_flips(table_of({"a": 2, "b": 11}))
    copies = table[table["class"] == "a"]
    copies = copies.reset_index(drop=True)
    assert copies["repeat"].tolist() == [0] * 8 + [1] * 3
    assert set(copies["flip"][2:6]) == {"horizontal", "vertical"} and set(copies["flip"][6:8]) == {"both"}
    alone = oversample_with_flips(table_of({"a": 2, "b": 11, "c": 3}))
    assert alone[alone["class"] == "a"]["flip"].tolist() == copies["flip"].tolist()  # a stream of its own for each class


def test_what_cannot_be_oversampled():
    table = table_of({"a": 2, "b": 5})
    with pytest.raises(ValueError, match="copies already"):
        oversample_with_flips(oversample_with_flips(table))
    with pytest.raises(ValueError, match="no training pairs"):
        oversample_with_flips(table.assign(subset="test"))


def test_dataset_folder_holds_what_its_table_lists(written, split):
    table, folder = written
    pd.testing.assert_frame_equal(read_table(f"{folder}.csv"), table, check_dtype=False)
    assert list(table.columns) == ["pair", "class", "subset", "flip", "original", "segmented", "cells"]
    for channel, prefix in (("original", "ori"), ("segmented", "mask"), ("cells", "cells")):
        files = {path.relative_to(folder).as_posix() for path in (folder / channel).rglob("*") if path.is_file()}
        assert files == set(table[channel]) and len(files) == len(table)
        assert all(Path(name).name.startswith(f"{prefix}_") for name in files)
    assert (table["flip"][table["subset"] != "train"] == "none").all()
    assert table["subset"].tolist() == sorted(table["subset"], key=["train", "val", "test"].index)
    counts = table[table["subset"] == "train"]["class"].value_counts()
    assert set(counts) == {3} and (table["flip"] != "none").sum() == 2
    assert dict(zip(table["pair"], table["subset"])) == dict(zip(split["pair"], split["subset"]))
    row = table[table["flip"] != "none"].iloc[0]
    stem = row["pair"].split("/")[1]
    assert row["original"] == f"original/train/{row['class']}/ori_{stem}_{row['flip']}.png"


def test_unflipped_files_are_links_and_flipped_ones_are_flipped(written, prepared, tmp_path, monkeypatch, split):
    table, folder = written
    for row in table.to_dict("records"):
        source = prepared[1] / _pair_files(row["pair"])["segmented"]
        if row["flip"] == "none":
            assert (folder / row["segmented"]).samefile(source)
        assert (read_image(folder / row["segmented"]) == flip(read_image(source), row["flip"])).all()

    def no_links(*names):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(dataset.os, "link", no_links)
    write_dataset(split, prepared[1], tmp_path / "copied", seed=3)
    assert not (tmp_path / "copied" / table["original"][0]).samefile(folder / table["original"][0])
    assert (tmp_path / "copied" / table["original"][0]).read_bytes() == (folder / table["original"][0]).read_bytes()


def test_an_older_dataset_is_replaced(split, prepared, tmp_path):
    write_dataset(split, prepared[1], tmp_path / "dataset", seed=1)
    fewer = split.assign(subset=split["subset"].replace({"val": "test"}))
    write_dataset(fewer, prepared[1], tmp_path / "dataset", seed=2)
    assert not list((tmp_path / "dataset/original/val").glob("*")) and len(Pairs(tmp_path / "dataset", "test")) == 9
    (prepared[1] / "nothing").mkdir()
    with pytest.raises((ImageError, OSError)):
        write_dataset(split, prepared[1] / "nothing", tmp_path / "dataset")
    with pytest.raises(TableError):  # its table is written last
        Pairs(tmp_path / "dataset")


def test_copies_beyond_all_variants_have_names_of_their_own(prepared, tmp_path):
    table = prepared[0][prepared[0]["problem"] == ""]
    one = table[table["class"] == "Pro-B"][:1]
    many = pd.concat([one, table[table["class"] == "Normal"]]).assign(subset="train")
    names = write_dataset(many, prepared[1], tmp_path / "dataset")["original"]
    assert names.is_unique and names.str.casefold().is_unique and names.str.contains("Pro-B").sum() == 6


def test_pairs_index_like_an_array(written):
    pairs = Pairs(written[1])
    everything = pairs[:]
    assert everything.shape == (len(pairs), 2, SIZE, SIZE, 3) and everything.dtype == np.uint8
    assert (pairs[3] == everything[3]).all() and (pairs[[5, 1]] == everything[[5, 1]]).all()
    assert (pairs.read(pairs.labels == "Pro-B", "segmented") == everything[pairs.labels == "Pro-B", 1]).all()
    assert (pairs.read([2]) == everything[2:3, 0]).all() and pairs.read([], "original").shape[0] == 0
    assert pairs.labels.tolist() == pairs.table["class"].tolist()
    with pytest.raises(IndexError):
        pairs[len(pairs)]


def test_pairs_of_a_subset_another_size_and_cells(written):
    table, folder = written
    test = Pairs(folder, "test", size=32)
    assert len(test) == 3 and set(test.table["subset"]) == {"test"} and test[0].shape == (2, 32, 32, 3)
    assert (test[0][0] == resize_square(Pairs(folder, "test")[0][0], 32)).all()
    cells, train = Pairs(folder).read([0], "cells"), Pairs(folder, "train")
    assert (
        cells.shape == (1, SIZE, SIZE)
        and cells.dtype == np.uint16
        and Pairs(folder, size=32).read([0], "cells").shape == (1, 32, 32)
    )
    row = train.table.index[train.table["flip"] != "none"][0]
    source = train.table.index[(train.table["pair"] == train.table["pair"][row]) & (train.table["flip"] == "none")][0]
    assert (train.read([row], "cells")[0] == flip(train.read([source], "cells")[0], train.table["flip"][row])).all()


def test_prepared_pairs_are_read_by_their_table(prepared):
    table, folder = prepared
    pairs = Pairs(folder, table=table)  # rows with a problem are left out
    assert len(pairs) == 16 == len(pairs[:])


def test_pairs_that_are_missing_or_damaged(written, tmp_path):
    table, folder = written
    with pytest.raises(TableError):
        Pairs(tmp_path / "none")
    with pytest.raises(ValueError, match="no subset 'validation'"):
        Pairs(folder, "validation")
    with pytest.raises(ImageError, match=r"lost.png: missing \(1 in all\)"):
        Pairs(folder, table=table[:2].assign(original=["lost.png", table["original"][1]]))
    write_image(tmp_path / "small.png", np.zeros((32, 32, 3), np.uint8))
    (tmp_path / "cut.png").write_bytes((folder / table["original"][0]).read_bytes()[:-20])
    write_image(tmp_path / "large.png", np.zeros((64, 64, 3), np.uint8))
    odd = pd.DataFrame({"class": "a", "original": ["small.png", "large.png", "cut.png"], "segmented": "small.png"})
    with pytest.raises(ImageError, match="images of different sizes"):
        Pairs(tmp_path, table=odd).read([0, 1])
    with pytest.raises(ImageError, match="cut.png: not a whole PNG"):
        Pairs(tmp_path, table=odd)[2]


def test_segmentation_commutes_with_flips_on_real_images(shared_data):
    for path in sorted((shared_data / "taleqani").glob("*/*.jpg"))[::400]:
        image = read_image(path)
        mask = segment(image)
        for kind in list(_FLIPS)[1:]:
            assert (segment(flip(image, kind)) != flip(mask, kind)).mean() < 0.002
