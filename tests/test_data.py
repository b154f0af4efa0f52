"""Pictures good and bad, whole files, and the manifest."""
import errno
import os
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from leukemia_nb import data
from leukemia_nb.data import (CLASSES, OutputError, PictureError, atomic_path, build_manifest, check_manifest, check_output, class_of,
                              fetch_kaggle, find_pictures, read_grey, read_picture, read_table, set_sha256, shown, write_picture,
                              write_table)


@pytest.fixture
def photo() -> np.ndarray:
    y, x = np.mgrid[:48, :64]
    found = np.dstack([200 - y, 120 + x, 220 - x]).astype(np.uint8)
    found[:12, :16] = (200, 30, 60)  # tells every rotation from every other
    return found


def noise(seed: int, height: int = 30, width: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# --- folders and classes

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


# --- reading: kinds of pictures

@pytest.mark.parametrize("mode, tolerance", [("RGB", 0), ("RGBA", 0), ("L", 60), ("LA", 60), ("P", 40), ("CMYK", 3), ("1", 255)])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_modes(tmp_path, photo, mode, tolerance, suffix):
    picture = Image.fromarray(photo).convert(mode)
    if (mode, suffix) in [("CMYK", ".png"), ("RGBA", ".jpg"), ("LA", ".jpg"), ("P", ".jpg")]: pytest.skip("no such files")
    picture.save(tmp_path / f"x{suffix}", **({"quality": 95} if suffix == ".jpg" else {}))
    found = read_picture(tmp_path / f"x{suffix}")
    assert found.dtype == np.uint8 and found.shape == photo.shape
    wanted = np.array(picture.convert("RGB")).astype(int)
    assert np.abs(found - wanted).mean() <= (2 if suffix == ".jpg" else 0)
    assert np.abs(wanted - photo).mean() <= tolerance


def test_transparent_is_white(tmp_path, photo):
    alpha = np.full(photo.shape[:2], 255, np.uint8)
    alpha[20:] = 0
    Image.fromarray(np.dstack([photo, alpha])).save(tmp_path / "x.png")
    found = read_picture(tmp_path / "x.png")
    assert (found[20:] == 255).all() and (found[:20] == photo[:20]).all()


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("grey", [False, True])
def test_sixteen_bits(tmp_path, photo, suffix, grey):
    stored = photo[..., ::-1].astype(np.uint16) * 256 + 77
    cv2.imwrite(str(tmp_path / f"x{suffix}"), stored[..., 1] if grey else stored)
    found = read_picture(tmp_path / f"x{suffix}")
    assert found.dtype == np.uint8
    assert (found == (photo[..., 1:2] if grey else photo)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, photo, orientation):
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}.get(orientation)
    stored, exif = Image.fromarray(photo), Image.Exif()
    exif[0x0112] = orientation
    if undo is not None: stored = stored.transpose(undo)
    stored.save(tmp_path / "x.png", exif=exif)
    assert (read_picture(tmp_path / "x.png") == photo).all()


def test_same_values_as_opencv(tmp_path, photo):
    write_picture(tmp_path / "x.jpg", photo)
    assert (read_picture(tmp_path / "x.jpg") == cv2.imread(str(tmp_path / "x.jpg"))[..., ::-1]).all()


@pytest.mark.parametrize("name", ["血液.png", "Größe №7.jpg", "[Malignant] Pre-B (1).png", "a b\tc.png", "кровь.tif"])
def test_names_outside_ascii(tmp_path, photo, name):
    write_picture(tmp_path / "Бласт" / name, photo)
    assert np.abs(read_picture(tmp_path / "Бласт" / name).astype(int) - photo).mean() < 3


# --- reading: bad pictures

def test_empty_file(tmp_path):
    (tmp_path / "x.jpg").touch()
    with pytest.raises(PictureError, match=r"x\.jpg: the file is empty.*remove it"): read_picture(tmp_path / "x.jpg")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(PictureError, match=r"x\.jpg: there is no such file"): read_picture(tmp_path / "x.jpg")
    with pytest.raises(PictureError, match="cannot be opened"): read_picture(tmp_path)


@pytest.mark.parametrize("content", [b"Dear colleague", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"II*\0", b"BM", b"\0" * 500])
def test_not_a_picture(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(PictureError, match=r"x\.png: .*(not a picture|damaged)"): read_picture(tmp_path / "x.png")


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1, exclude_max=True), st.sampled_from([".jpg", ".png", ".bmp", ".webp"]))
def test_cut_off_is_never_half_a_picture(tmp_path_factory, share, suffix):
    folder = tmp_path_factory.mktemp("cut")
    write_picture(folder / f"x{suffix}", noise(1))
    whole, content = read_picture(folder / f"x{suffix}"), (folder / f"x{suffix}").read_bytes()
    (folder / f"x{suffix}").write_bytes(content[:int(share * len(content))])
    try: found = read_picture(folder / f"x{suffix}")
    except PictureError as error: assert f"x{suffix}: " in str(error) and "remove it" in str(error)
    else: assert (found == whole).all()  # only the marks after the last pixel were lost


def test_jpeg_without_its_lower_half(tmp_path):
    write_picture(tmp_path / "x.jpg", noise(1, 200, 200))
    content = (tmp_path / "x.jpg").read_bytes()
    (tmp_path / "x.jpg").write_bytes(content[:len(content) // 2])
    with pytest.raises(PictureError, match=r"x\.jpg: the picture is damaged or cut off.*Copy it again"): read_picture(tmp_path / "x.jpg")


@pytest.mark.parametrize("side", [8_000, 100_000])
def test_enormous_by_its_header(tmp_path, side):
    """The header alone claims the size: nothing is there to be decoded, so the refusal came before."""
    def chunk(kind, content): return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    (tmp_path / "wall.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    with pytest.raises(PictureError, match=r"wall\.png: too large.*50,000,000 pixels\. Scale it down"): read_picture(tmp_path / "wall.png")


def test_tiny(tmp_path):
    write_picture(tmp_path / "x.png", noise(0, 15, 40))
    with pytest.raises(PictureError, match=r"x\.png: too small, 40 x 15"): read_picture(tmp_path / "x.png")
    write_picture(tmp_path / "x.png", noise(0, 16, 16))
    assert read_picture(tmp_path / "x.png").shape == (16, 16, 3)


def test_numbers_that_are_no_colours(tmp_path):
    Image.fromarray(np.random.default_rng(0).normal(size=(20, 20)).astype(np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(PictureError, match="32-bit"): read_picture(tmp_path / "x.tif")


# --- writing

@settings(max_examples=30, deadline=None)
@given(st.integers(16, 50), st.integers(16, 50), st.integers(0, 99), st.sampled_from([".png", ".bmp", ".tif"]))
def test_round_trip(tmp_path_factory, height, width, seed, suffix):
    path = tmp_path_factory.mktemp("trip") / f"x{suffix}"
    write_picture(path, noise(seed, height, width))
    assert (read_picture(path) == noise(seed, height, width)).all()


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_masks_keep_their_numbers(tmp_path, kind):
    mask = np.random.default_rng(0).integers(0, np.iinfo(kind).max, (20, 30)).astype(kind)
    write_picture(tmp_path / "m.png", mask)
    found = read_grey(tmp_path / "m.png")
    assert found.dtype == kind and (found == mask).all()


def test_grey_reader_refuses_photographs(tmp_path, photo):
    write_picture(tmp_path / "x.png", photo)
    with pytest.raises(PictureError, match="3 channels"): read_grey(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(PictureError, match="not a picture"): read_grey(tmp_path / "x.png")
    with pytest.raises(PictureError, match="No such file"): read_grey(tmp_path / "y.png")


@pytest.mark.parametrize("wrong", [np.zeros((20, 20, 3)), np.zeros((20, 20, 4), np.uint8), np.zeros(20, np.uint8), np.zeros((20, 20), bool)])
def test_wrong_arrays_are_not_written(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"x\.png: a picture is uint8"): write_picture(tmp_path / "x.png", wrong)
    assert not list(tmp_path.iterdir())


def test_unknown_format(tmp_path, photo):
    with pytest.raises(ValueError, match=r"x\.docx: cannot write"): write_picture(tmp_path / "x.docx", photo)


# --- whole files or none

def test_readable_by_others(tmp_path):
    old = os.umask(0o022)
    try:
        with atomic_path(tmp_path / "x") as temporary: temporary.write_text("a")
    finally: os.umask(old)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


def test_error_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "x.csv").write_text("old")
    with pytest.raises(KeyError), atomic_path(tmp_path / "x.csv") as temporary:
        temporary.write_text("half")
        raise KeyError("stop")
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"] and (tmp_path / "x.csv").read_text() == "old"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_full_disk_for_real(tmp_path):
    with pytest.raises(OutputError, match=r"x\.csv: cannot be written: No space left on device\. Free some space") as caught, \
         atomic_path(tmp_path / "x.csv") as temporary:
        temporary.symlink_to("/dev/full")
        pd.DataFrame({"a": range(100_000)}).to_csv(temporary)
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_disk_fills_up_during_a_picture(tmp_path, photo, monkeypatch):
    write_picture(tmp_path / "x.png", photo)
    before = (tmp_path / "x.png").read_bytes()

    def fill(source, target): raise OSError(errno.ENOSPC, "No space left on device", str(source))
    monkeypatch.setattr(data.os, "replace", fill)
    with pytest.raises(OutputError, match=r"x\.png: cannot be written: No space left"): write_picture(tmp_path / "x.png", photo // 2)
    assert (tmp_path / "x.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_file_where_a_folder_should_be(tmp_path, photo):
    (tmp_path / "runs").touch()
    with pytest.raises(OutputError, match=r"runs/a/x\.png: cannot be written: .*choose another folder"):
        write_picture(tmp_path / "runs" / "a" / "x.png", photo)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(tmp_path, photo):
    tmp_path.chmod(0o555)
    with pytest.raises(OutputError, match="Choose a folder you may write to"): write_picture(tmp_path / "x.png", photo)


def test_unwritable_folder_as_the_system_says_it(tmp_path, photo, monkeypatch):
    def refuse(self, *arguments, **settings): raise PermissionError(errno.EACCES, "Permission denied", str(self))
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match=r"x\.png: cannot be written: Permission denied\. Choose a folder you may write to"):
        write_picture(tmp_path / "new" / "x.png", photo)


def test_errors_about_other_files_pass_unchanged(tmp_path):
    with pytest.raises(PermissionError, match="elsewhere"), atomic_path(tmp_path / "x"):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere")


def test_killed_while_writing(tmp_path):
    code = ("import os, signal, sys; from leukemia_nb.data import atomic_path\n"
            "with atomic_path(sys.argv[1]) as t: t.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)")
    root = Path(data.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "Pre" / "x.png"], env=os.environ | {"PYTHONPATH": str(root)})
    assert done.returncode == -9 and not (tmp_path / "Pre" / "x.png").exists()
    assert list((tmp_path / "Pre").iterdir()) and not find_pictures(tmp_path)  # the leftover is no picture


# --- manifest

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
    for row in manifest.itertuples(): assert data.file_sha256(row.path) == row.sha256


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


@given(st.binary(max_size=20).filter(lambda name: b"\0" not in name))
def test_shown_text_can_be_saved_and_other_text_is_as_it_was(name):
    shown(os.fsdecode(name)).encode("utf-8", "strict")
    try: assert shown(os.fsdecode(name)) == name.decode()
    except UnicodeDecodeError: assert "\\x" in shown(os.fsdecode(name))


def test_outputs_are_looked_at_without_leaving_anything(tmp_path):
    (tmp_path / "file").touch()
    for path, folder in [("new.csv", False), ("file", False), ("a/b/c", False), ("a/b", True), (".", True)]:
        check_output(tmp_path / path, folder)
    for path, folder, message in [(".", False, "choose another name"), ("file", True, "A file stands"), ("file/a.csv", False, "A file stands")]:
        with pytest.raises(OutputError, match=message): check_output(tmp_path / path, folder)
    check_output("new.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


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


def test_tables_come_back_as_they_were(tmp_path, hospital):
    manifest = build_manifest(hospital).assign(flag="", loss=[.5, None, .1, .2, None])
    manifest.loc[0, "pair"] = "Normal/NA"
    write_table(tmp_path / "t.csv", manifest)
    found = read_table(tmp_path / "t.csv")
    assert found["pair"][0] == "Normal/NA" and (found["problem"] == "").all() and (found["flag"] == "").all()
    assert found["loss"].isna().sum() == 2 and found["width"].dtype.kind == "i"
    pd.testing.assert_frame_equal(found, manifest, check_dtype=False)


# --- Kaggle

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


# --- the real pictures

def test_real_full_size_pictures(shared_data):
    manifest = build_manifest(shared_data / "kaggle_fullres", classes=data.FOUR_CLASSES)
    assert len(manifest) == 16 and (manifest["problem"] == "").all() and manifest["pair"].is_unique
    assert {"Pre-B/Snap_001", "Pro-B/Snap_001"} <= set(manifest["pair"]) and set(manifest["width"]) == {1024, 2560}


def test_real_set(shared_data):
    manifest = build_manifest(shared_data / "taleqani", n_jobs=2)
    assert manifest["class"].value_counts().to_dict() == {"Normal": 463, "Pre-B": 885, "Pro-B": 739}
    assert (manifest["problem"] == "").all() and manifest["pair"].is_unique and set(manifest["width"]) == {224}


@given(st.lists(st.text("0123456789abcdef", min_size=4, max_size=8), min_size=1, unique=True), st.randoms())
def test_the_digest_of_a_set_does_not_know_an_order(digests, random):
    shuffled = random.sample(digests, len(digests))
    assert set_sha256(shuffled) == set_sha256(digests) != set_sha256(digests[1:])
