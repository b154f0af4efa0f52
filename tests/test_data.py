"""Folders, classes and the manifest."""
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from leukemia_nb import data
from leukemia_nb.data import CLASSES, build_manifest, check_manifest, class_of, fetch_kaggle
from leukemia_nb.files import file_sha256, read_table, write_table
from leukemia_nb.images import PictureError, read_picture, write_picture


@pytest.fixture
def photo() -> np.ndarray:
    y, x = np.mgrid[:48, :64]
    found = np.dstack([200 - y, 120 + x, 220 - x]).astype(np.uint8)
    found[:12, :16] = (200, 30, 60)  # tells every rotation from every other
    return found


def noise(seed: int, height: int = 30, width: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("name, wanted", [
    ("Benign", "Normal"), ("benign ", "Normal"), ("Normal", "Normal"), ("[Malignant] Pre-B", "Pre-B"), ("Pre", "Pre-B"),
    ("Malignant Pre-B", "Pre-B"), ("[Malignant]Pro-B", "Pro-B"), ("pro_b", "Pro-B"), ("[Malignant] early Pre-B", "Early Pre-B"),
    ("Early", "Early Pre-B"), ("Early Pre-B", "Early Pre-B"), ("Ｐｒｅ－Ｂ", "Pre-B"), ("Segmented", None), ("truth", None),
    ("ALL", None), ("Malignant", None), ("Prep", None), ("", None)])
def test_class_of(name, wanted):
    assert class_of(name) == wanted


def test_layouts_as_they_are_published(tmp_path):
    places = {"Blood cell Cancer [ALL]/Benign/Snap_001.jpg": "Normal", "Blood cell Cancer [ALL]/[Malignant] Pre-B/Snap_001.jpg": "Pre-B",
              "Blood cell Cancer [ALL]/[Malignant] early Pre-B/Snap_001.jpg": "Early Pre-B", "Original/Pro/WBC-Malignant-Pro-001.jpg": "Pro-B",
              "Segmented/Pro/WBC-Malignant-Pro-001.jpg": None, "truth/Pro-B/Snap_001.png": None, "Pre/.part-1.jpg": None,
              "Pre/day 2/[copy] (1).JPG": "Pre-B"}
    for seed, place in enumerate(places):
        write_picture(tmp_path / Path(place).with_suffix(".jpg"), noise(seed))
        if Path(place).suffix != ".jpg": os.rename(tmp_path / Path(place).with_suffix(".jpg"), tmp_path / place)
    manifest = build_manifest(tmp_path, classes=data.FOUR_CLASSES)
    found = {Path(row.path).relative_to(tmp_path).as_posix(): row["class"] for _, row in manifest.iterrows()}
    assert found == {place: label for place, label in places.items() if label}
    assert manifest["pair"].is_unique and (manifest["problem"] == "").all()
    assert set(build_manifest(tmp_path)["class"]) == set(CLASSES)


@pytest.fixture
def hospital(tmp_path) -> Path:
    for seed, place in enumerate(["Benign/Snap_001.png", "Pre/Snap_001.png", "Pre/Snap_001.jpg", "Pro/Snap_001.png", "Pro/snap_001.png"]):
        write_picture(tmp_path / place, noise(seed))
    return tmp_path


def test_rows(hospital):
    manifest = build_manifest(hospital)
    assert list(manifest.columns) == list(data.COLUMNS)
    assert len(manifest) == 5 and (manifest["problem"] == "").all() and set(manifest["width"]) == {40} and set(manifest["height"]) == {30}
    assert {name.casefold() for name in manifest["pair"]} >= {"pre-b/snap_001", "pre-b/snap_001-2", "pro-b/snap_001", "pro-b/snap_001-2"}
    assert manifest["pair"].str.casefold().is_unique  # also on disks that do not know case
    for row in manifest.itertuples(): assert file_sha256(row.path) == row.sha256


def test_bad_pictures_keep_a_row_and_the_rest_carries_on(hospital):
    (hospital / "Benign" / "empty.png").touch()
    (hospital / "Pre" / "cut.jpg").write_bytes((hospital / "Pre" / "Snap_001.jpg").read_bytes()[:400])
    (hospital / "Pro" / "letter.png").write_text("Dear colleague")
    manifest = build_manifest(hospital).set_index("pair")
    for pair, word in {"Normal/empty": "empty", "Pre-B/cut": "cut off", "Pro-B/letter": "not a picture"}.items():
        assert word in manifest.loc[pair, "problem"] and pair.split("/")[1] in manifest.loc[pair, "problem"]
        assert len(manifest.loc[pair, "sha256"]) == 64 and manifest.loc[pair, "width"] == 0
    assert (manifest["problem"] == "").sum() == 5


def test_same_picture_under_two_classes(hospital):
    (hospital / "Pro" / "other.png").write_bytes((hospital / "Benign" / "Snap_001.png").read_bytes())
    (hospital / "Benign" / "again.png").write_bytes((hospital / "Benign" / "Snap_001.png").read_bytes())
    manifest = build_manifest(hospital).set_index("pair")
    flagged = manifest[manifest["problem"] != ""]
    assert set(flagged.index) == {"Pro-B/other", "Normal/Snap_001", "Normal/again"}
    assert "Pro/other.png" in flagged.loc["Normal/Snap_001", "problem"] and "again" not in flagged.loc["Normal/Snap_001", "problem"]
    assert "Benign/Snap_001.png" in flagged.loc["Pro-B/other", "problem"]


def test_copies_within_a_class_are_no_problem_here(hospital):
    (hospital / "Pro" / "again.png").write_bytes((hospital / "Pro" / "Snap_001.png").read_bytes())
    assert (build_manifest(hospital)["problem"] == "").all()


def test_threads_change_nothing(hospital):
    pd.testing.assert_frame_equal(build_manifest(hospital), build_manifest(hospital, n_jobs=3))


def test_a_name_that_is_no_utf8_is_opened_and_escaped(tmp_path):
    path = tmp_path / "Pre" / os.fsdecode(b"caf\xe9.png")
    write_picture(path, noise(0))
    row = build_manifest(tmp_path, classes=("Pre-B",)).iloc[0]
    assert row["pair"] == "Pre-B/caf\\xe9" and read_picture(row["path"]).shape == noise(0).shape and row["problem"] == ""
    write_table(tmp_path / "t.csv", build_manifest(tmp_path))
    assert read_table(tmp_path / "t.csv")["path"].tolist() == [f"{tmp_path}/Pre/caf\\xe9.png"]
    path.write_bytes(b"")
    with pytest.raises(PictureError) as error: read_picture(path)
    assert "caf\\xe9.png: the file is empty" in str(error.value) and str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_nothing_to_describe(tmp_path):
    with pytest.raises(PictureError, match="no such folder"): build_manifest(tmp_path / "nowhere")
    with pytest.raises(PictureError, match=r"no pictures in it"): build_manifest(tmp_path)
    write_picture(tmp_path / "holiday" / "x.jpg", noise(0))
    with pytest.raises(PictureError, match=r"1 picture, but in no folder.*holiday.*Benign, Pre, Pro"): build_manifest(tmp_path)


def test_unknown_folders_are_named(hospital):
    write_picture(hospital / "holiday" / "x.jpg", noise(9))
    with pytest.warns(UserWarning, match="holiday left out"): assert len(build_manifest(hospital)) == 5


def test_class_empty_or_small(hospital):
    manifest = build_manifest(hospital)
    assert len(check_manifest(manifest, minimum=1)) == 5
    with pytest.raises(PictureError, match="class Normal has 1 usable picture, fewer than the 2"): check_manifest(manifest, minimum=2)
    (hospital / "Benign" / "Snap_001.png").write_bytes(b"")
    with pytest.raises(PictureError, match=r"class Normal is empty \(1 more cannot be used"):
        check_manifest(build_manifest(hospital), minimum=1)
    assert len(check_manifest(build_manifest(hospital), minimum=1, classes=("Pre-B", "Pro-B"))) == 4


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(CLASSES), st.sampled_from(["a", "A", "a-2", "é", "e\u0301", "b"])), max_size=20))
def test_pair_names_are_unique_and_kept(files):
    names = data._name_pairs([label for label, _ in files], [Path(f"{stem}.png") for _, stem in files])
    assert len({name.casefold() for name in names}) == len(files)
    for (label, _), name in zip(files, names): assert name.startswith(label + "/")


def test_kaggle_without_network(monkeypatch):
    import kagglehub
    def refuse(name): raise ConnectionRefusedError("no network")
    monkeypatch.setattr(kagglehub, "dataset_download", refuse)
    with pytest.raises(ConnectionError, match=r"blood-cell-cancer-all-4class: cannot be fetched.*Download https://www\.kaggle\.com.*DATA=folder"):
        fetch_kaggle()


def test_kaggle_gives_a_folder(monkeypatch, hospital):
    import kagglehub
    monkeypatch.setattr(kagglehub, "dataset_download", lambda name: str(hospital))
    assert len(build_manifest(fetch_kaggle())) == 5


def test_import_is_light():
    code = "import leukemia_nb.data, sys; print({'tensorflow', 'torch', 'kagglehub', 'keras'} & set(sys.modules))"
    root = Path(data.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)})
    assert done.stdout.strip() == "set()", done.stderr


def test_real_full_size_pictures(shared_data):
    manifest = build_manifest(shared_data / "kaggle_fullres", classes=data.FOUR_CLASSES)
    assert len(manifest) == 16 and (manifest["problem"] == "").all() and manifest["pair"].is_unique
    assert {"Pre-B/Snap_001", "Pro-B/Snap_001"} <= set(manifest["pair"]) and set(manifest["width"]) == {1024, 2560}


def test_real_set(shared_data):
    manifest = build_manifest(shared_data / "taleqani", n_jobs=2)
    assert manifest["class"].value_counts().to_dict() == {"Normal": 463, "Pre-B": 885, "Pro-B": 739}
    assert (manifest["problem"] == "").all() and manifest["pair"].is_unique and set(manifest["width"]) == {224}


def test_tables_come_back_as_they_were(tmp_path, hospital):
    manifest = build_manifest(hospital).assign(flag="", loss=[.5, None, .1, .2, None])
    manifest.loc[0, "pair"] = "Normal/NA"
    write_table(tmp_path / "t.csv", manifest)
    found = read_table(tmp_path / "t.csv")
    assert found["pair"][0] == "Normal/NA" and (found["problem"] == "").all() and (found["flag"] == "").all()
    assert found["loss"].isna().sum() == 2 and found["width"].dtype.kind == "i"
    pd.testing.assert_frame_equal(found, manifest, check_dtype=False)
