"""Folders, classes and the manifest."""

import os
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from leukemia_nb.data import manifest as data
from leukemia_nb.data.classes import CLASSES, read_class_map
from leukemia_nb.data.manifest import build_manifest, check_not_inside, check_manifest, fetch_kaggle, search_images
from leukemia_nb.data.files import (
    _OUTPUT_MARKER,
    OutputError,
    file_sha256,
    mark_output_folder,
    read_table,
    escape_table,
    write_table,
)
from leukemia_nb.data.images import ImageError, read_image, write_image
from leukemia_nb.data.synthetic import write_smears


def noise(seed: int, height: int = 30, width: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("Benign", "Normal"),
        ("benign ", "Normal"),
        ("Normal", "Normal"),
        ("[Malignant] Pre-B", "Pre-B"),
        ("Pre", "Pre-B"),
        ("Malignant Pre-B", "Pre-B"),
        ("[Malignant]Pro-B", "Pro-B"),
        ("pro_b", "Pro-B"),
        ("[Malignant] early Pre-B", "Early Pre-B"),
        ("Early", "Early Pre-B"),
        ("Early Pre-B", "Early Pre-B"),
        ("Ｐｒｅ－Ｂ", "Pre-B"),
        ("Segmented", None),
        ("truth", None),
        ("ALL", None),
        ("Malignant", None),
        ("Prep", None),
        ("", None),
    ],
)
def test_class_of(name, wanted):
    assert read_class_map().class_of(name) == wanted


def test_layouts_as_they_are_published(tmp_path):
    places = {
        "Blood cell Cancer [ALL]/Benign/Snap_001.jpg": "Normal",
        "Blood cell Cancer [ALL]/[Malignant] Pre-B/Snap_001.jpg": "Pre-B",
        "Blood cell Cancer [ALL]/[Malignant] early Pre-B/Snap_001.jpg": "Early Pre-B",
        "Original/Pro/WBC-Malignant-Pro-001.jpg": "Pro-B",
        "Segmented/Pro/WBC-Malignant-Pro-001.jpg": None,
        "truth/Pro-B/Snap_001.png": None,
        "Pre/.part-1.jpg": None,
        "Pre/day 2/[copy] (1).JPG": "Pre-B",
    }
    for seed, place in enumerate(places):
        write_image(tmp_path / Path(place).with_suffix(".jpg"), noise(seed))
        if Path(place).suffix != ".jpg":
            os.rename(tmp_path / Path(place).with_suffix(".jpg"), tmp_path / place)
    manifest = build_manifest(tmp_path, classes=data.FOUR_CLASSES)
    found = {Path(row.path).relative_to(tmp_path).as_posix(): row["class"] for _, row in manifest.iterrows()}
    assert found == {place: label for place, label in places.items() if label}
    assert manifest["pair"].is_unique and (manifest["problem"] == "").all()
    assert set(build_manifest(tmp_path)["class"]) == set(CLASSES)


@pytest.fixture
def hospital(tmp_path) -> Path:
    for seed, place in enumerate(
        ["Benign/Snap_001.png", "Pre/Snap_001.png", "Pre/Snap_001.jpg", "Pro/Snap_001.png", "Pro/snap_001.png"]
    ):
        write_image(tmp_path / place, noise(seed))
    return tmp_path


def test_rows(hospital):
    manifest = build_manifest(hospital)
    assert list(manifest.columns) == list(data._COLUMNS)
    assert (
        len(manifest) == 5
        and (manifest["problem"] == "").all()
        and set(manifest["width"]) == {40}
        and set(manifest["height"]) == {30}
    )
    assert {name.casefold() for name in manifest["pair"]} >= {
        "pre-b/snap_001",
        "pre-b/snap_001-2",
        "pro-b/snap_001",
        "pro-b/snap_001-2",
    }
    assert manifest["pair"].str.casefold().is_unique  # also on disks that do not know case
    for row in manifest.itertuples():
        assert file_sha256(row.path) == row.sha256


def test_bad_images_keep_a_row_and_the_rest_carries_on(hospital):
    (hospital / "Benign" / "empty.png").touch()
    (hospital / "Pre" / "cut.jpg").write_bytes((hospital / "Pre" / "Snap_001.jpg").read_bytes()[:400])
    (hospital / "Pro" / "letter.png").write_text("Dear colleague")
    manifest = build_manifest(hospital).set_index("pair")
    for pair, word in {"Normal/empty": "empty", "Pre-B/cut": "cut off", "Pro-B/letter": "not an image"}.items():
        assert word in manifest.loc[pair, "problem"] and pair.split("/")[1] in manifest.loc[pair, "problem"]
        assert len(manifest.loc[pair, "sha256"]) == 64 and manifest.loc[pair, "width"] == 0
    assert (manifest["problem"] == "").sum() == 5


def test_same_image_under_two_classes(hospital):
    (hospital / "Pro" / "other.png").write_bytes((hospital / "Benign" / "Snap_001.png").read_bytes())
    (hospital / "Benign" / "again.png").write_bytes((hospital / "Benign" / "Snap_001.png").read_bytes())
    manifest = build_manifest(hospital).set_index("pair")
    flagged = manifest[manifest["problem"] != ""]
    assert set(flagged.index) == {"Pro-B/other", "Normal/Snap_001", "Normal/again"}
    assert (
        "Pro/other.png" in flagged.loc["Normal/Snap_001", "problem"] and "again" not in flagged.loc["Normal/Snap_001", "problem"]
    )
    assert "Benign/Snap_001.png" in flagged.loc["Pro-B/other", "problem"]


def test_copies_within_a_class_are_no_problem_here(hospital):
    (hospital / "Pro" / "again.png").write_bytes((hospital / "Pro" / "Snap_001.png").read_bytes())
    assert (build_manifest(hospital)["problem"] == "").all()


def test_a_name_that_is_no_utf8_is_opened_and_escaped(tmp_path):
    path = tmp_path / "Pre" / os.fsdecode(b"caf\xe9.png")
    write_image(path, noise(0))
    row = build_manifest(tmp_path, classes=("Pre-B",)).iloc[0]
    assert row["pair"] == "Pre-B/caf\\xe9" and read_image(row["path"]).shape == noise(0).shape and row["problem"] == ""
    write_table(tmp_path / "t.csv", build_manifest(tmp_path))
    assert read_table(tmp_path / "t.csv")["path"].tolist() == [f"{tmp_path}/Pre/caf\\xe9.png"]
    path.write_bytes(b"")
    with pytest.raises(ImageError) as error:
        read_image(path)
    assert "caf\\xe9.png: the file is empty" in str(error.value) and str(pickle.loads(pickle.dumps(error.value))) == str(
        error.value
    )


def test_nothing_to_describe(tmp_path):
    with pytest.raises(ImageError, match="no such folder"):
        build_manifest(tmp_path / "nowhere")
    with pytest.raises(ImageError, match=r"no images in it"):
        build_manifest(tmp_path)
    write_image(tmp_path / "holiday" / "x.jpg", noise(0))
    with pytest.raises(ImageError, match=r"1 image, but in no folder.*holiday.*Benign, Pre, Pro"):
        build_manifest(tmp_path)


def test_unknown_folders_are_named(hospital):
    write_image(hospital / "holiday" / "x.jpg", noise(9))
    with pytest.warns(UserWarning, match="holiday left out"):
        assert len(build_manifest(hospital)) == 5


def test_class_empty_or_small(hospital):
    manifest = build_manifest(hospital)
    assert len(check_manifest(manifest, minimum=1)) == 5
    with pytest.raises(ImageError, match="class Normal has 1 usable image, fewer than the 2"):
        check_manifest(manifest, minimum=2)
    (hospital / "Benign" / "Snap_001.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"class Normal is empty \(1 more cannot be used"):
        check_manifest(build_manifest(hospital), minimum=1)
    assert len(check_manifest(build_manifest(hospital), minimum=1, classes=("Pre-B", "Pro-B"))) == 4


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(CLASSES), st.sampled_from(["a", "A", "a-2", "é", "e\u0301", "b"])), max_size=20))
def test_pair_names_are_unique_and_kept(files):
    names = data._name_pairs([label for label, _ in files], [Path(f"{stem}.png") for _, stem in files])
    assert len({name.casefold() for name in names}) == len(files)
    for (label, _), name in zip(files, names):
        assert name.startswith(label + "/")


def test_kaggle_without_network(monkeypatch):
    import kagglehub

    def refuse(name):
        raise ConnectionRefusedError("no network")

    monkeypatch.setattr(kagglehub, "dataset_download", refuse)
    with pytest.raises(
        ConnectionError, match=r"blood-cell-cancer-all-4class: cannot be fetched.*Download https://www\.kaggle\.com.*DATA=folder"
    ):
        fetch_kaggle()


def test_kaggle_gives_a_folder(monkeypatch, hospital):
    import kagglehub

    monkeypatch.setattr(kagglehub, "dataset_download", lambda name: str(hospital))
    assert len(build_manifest(fetch_kaggle())) == 5


def test_import_is_light():
    code = "import leukemia_nb.data.manifest, sys; print({'tensorflow', 'torch', 'kagglehub', 'keras'} & set(sys.modules))"
    root = Path(data.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)}
    )
    assert done.stdout.strip() == "set()", done.stderr


def test_real_full_size_images(shared_data):
    manifest = build_manifest(shared_data / "kaggle_fullres", classes=data.FOUR_CLASSES)
    assert len(manifest) == 16 and (manifest["problem"] == "").all() and manifest["pair"].is_unique
    assert {"Pre-B/Snap_001", "Pro-B/Snap_001"} <= set(manifest["pair"]) and set(manifest["width"]) == {1024, 2560}


def test_real_set(shared_data):
    manifest = build_manifest(shared_data / "taleqani")
    assert manifest["class"].value_counts().to_dict() == {"Normal": 463, "Pre-B": 885, "Pro-B": 739}
    assert (manifest["problem"] == "").all() and manifest["pair"].is_unique and set(manifest["width"]) == {224}


def test_tables_come_back_as_they_were(tmp_path, hospital):
    manifest = build_manifest(hospital).assign(flag="", loss=[0.5, None, 0.1, 0.2, None])
    manifest.loc[0, "pair"] = "Normal/NA"
    write_table(tmp_path / "t.csv", manifest)
    found = read_table(tmp_path / "t.csv")
    assert found["pair"][0] == "Normal/NA" and (found["problem"] == "").all() and (found["flag"] == "").all()
    assert found["loss"].isna().sum() == 2 and found["width"].dtype.kind == "i"
    pd.testing.assert_frame_equal(found, manifest, check_dtype=False)


# --- searches: nothing taken that is not data, nothing passed over in silence


def names(folder: Path, **settings: object) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in search_images(folder, **settings).paths}


PREPARE = """
import sys
from leukemia_nb.errors import LeukemiaError
from leukemia_nb.processing.dataset import prepare_folder
try:
    prepare_folder(sys.argv[1], sys.argv[2], size=32)
except (LeukemiaError, OSError) as error:
    sys.exit(str(error))
"""


def prepare_unprivileged(data: Path, out: Path) -> tuple[int, str]:
    """Prepare a folder as a user whom permissions bind, also where the tests are root's; its status and all it prints."""
    limits = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    if limits and not shutil.which("setpriv"):
        pytest.skip("root may read anything, and there is no setpriv")
    command = [*limits, sys.executable, "-c", PREPARE, str(data), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def test_what_leukemia_nb_wrote_is_no_data_at_any_depth(hospital):
    before = names(hospital)
    for seed, place in enumerate(["seg/masks/a.png", "Pro/deep/run/pairs/Pro/b.png", "Pro/run2/Pre/c.png"]):
        write_image(hospital / place, noise(seed))
    for place in ("seg", "Pro/deep/run", "Pro/run2"):
        mark_output_folder(hospital / place)
    assert names(hospital) == before and len(build_manifest(hospital)) == 5
    assert "written by leukemia_nb: 3" in search_images(hospital).summary()
    (hospital / "Pre" / "link").symlink_to(hospital / "Pro/deep/run/pairs")  # a way round the marker
    assert names(hospital) == before
    (hospital / "Pro/run2" / _OUTPUT_MARKER).unlink()
    assert names(hospital) == before | {"Pro/run2/Pre/c.png"}


@pytest.mark.parametrize("inner", ["", "masks", "masks/Pre"])
def test_a_folder_that_leukemia_nb_wrote_is_refused_with_the_remedy(tmp_path, inner):
    write_image(tmp_path / "seg/masks/Pre/a.png", noise(0))
    mark_output_folder(tmp_path / "seg")
    for search in (search_images, build_manifest):
        with pytest.raises(ImageError, match=r"was written by leukemia_nb.*delete .*/seg/\.leukemia_nb-output\.$"):
            search(tmp_path / "seg" / inner)
    (tmp_path / "seg" / _OUTPUT_MARKER).unlink()
    assert len(search_images(tmp_path / "seg").paths) == 0 and len(search_images(tmp_path / "seg/masks").paths) == 1


def test_the_folder_of_the_results_is_left_out_by_whatever_way(hospital, monkeypatch):
    write_image(hospital / "out/overlays/Pre/a.png", noise(7))
    (hospital / "Pro" / "shortcut").symlink_to(hospital / "out/overlays")
    before = names(hospital, exclude=hospital / "out")
    assert len(before) == 5 and len(names(hospital)) == 6
    monkeypatch.chdir(hospital)
    assert {str(path) for path in search_images(".", "out").paths} == before
    assert {str(path) for path in search_images(".", "./Pro/../out/").paths} == before
    for out in (".", "..", hospital):
        with pytest.raises(OutputError, match="holds the images that are read"):
            check_not_inside(".", out)
    check_not_inside(".", "out")


def test_synthetic_smears_in_a_run_folder_are_data(tmp_path):
    write_smears(tmp_path / "run/images", 1, height=64, width=64)
    mark_output_folder(tmp_path / "run")
    assert len(build_manifest(tmp_path / "run/images")) == 3 == len(search_images(tmp_path / "run/images/Pre-B").paths) * 3
    assert not search_images(tmp_path).paths  # from above they are part of the run


def test_links_are_followed_once_and_loops_end(hospital, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write_image(elsewhere / "x.png", noise(8))
    before = names(hospital)
    (hospital / "Pre" / "more").symlink_to(elsewhere)
    (hospital / "Pro" / "more").symlink_to(elsewhere)  # the same again
    (hospital / "Pro" / "other").symlink_to("../Benign")  # found anyway
    (hospital / "Pro" / "loop").symlink_to("..")
    (hospital / "up").symlink_to(hospital.parent)
    (elsewhere / "back").symlink_to(hospital)
    (elsewhere / "self").symlink_to(".")
    search = search_images(hospital)
    assert names(hospital) == before | {"Pre/more/x.png"}
    assert {reason for _, reason in search.left_out} == {"folder found by another way", "link to a folder around it"}
    assert len(search.left_out) == 6 and not search.unreachable
    assert build_manifest(hospital).set_index("pair").loc["Pre-B/x", "class"] == "Pre-B"


def test_a_linked_image_counts_once_in_its_class_and_is_a_problem_in_another(hospital):
    (hospital / "Pro" / "a link.png").symlink_to("Snap_001.png")
    said: list[str] = []
    assert len(build_manifest(hospital, log=said.append)) == 5 and "linked twice: 1" in said[0]
    (hospital / "Pre" / "link.png").symlink_to("../Pro/Snap_001.png")
    assert sorted(build_manifest(hospital).query("problem != ''")["pair"]) == ["Pre-B/link", "Pro-B/Snap_001"]


def test_whatever_is_left_out_is_counted_in_one_line(hospital):
    for place in (
        "scan.svs",
        "Pre/a.avif",
        "Pre/b.AVIF",
        "Pre/c.jp2",
        "Pre/d.heic",
        "Pre/._Snap_001.jpg",
        "Pre/README",
        "old.zip",
        "old.tar.gz",
        ".git/x.png",
        "truth/Pre/a.png",
        "Segmented/a.png",
    ):
        (hospital / place).parent.mkdir(parents=True, exist_ok=True)
        (hospital / place).touch()
    os.mkfifo(hospital / "Pre" / "pipe.png")
    search = search_images(hospital)
    said = search.summary()
    assert said.startswith(f"{hospital}: 5 images found, 13 left out (") and "\n" not in said
    reasons = {
        ".avif files": 2,
        ".jp2 files": 1,
        ".heic files": 1,
        ".svs files": 1,
        "hidden": 2,
        "files without a suffix": 1,
        ".zip archives, to be unpacked": 1,
        ".gz archives, to be unpacked": 1,
        "named truth, segmented, masks": 2,
        "devices or pipes": 1,
    }
    assert Counter(reason for _, reason in search.left_out) == reasons and "other reasons: 2" in said
    assert sum(f"{reason}: {number}" in said for reason, number in reasons.items()) == 8
    write_image(hospital / "holiday" / "x.png", noise(9))
    write_image(hospital / "Early" / "x.png", noise(10))
    lines: list[str] = []
    assert len(build_manifest(hospital, log=lines.append)) == 5
    assert len(lines) == 2 and "5 images found, 15 left out" in lines[0] and "in folders of no class: 1" in search_line(hospital)


def search_line(folder: Path) -> str:
    lines: list[str] = []
    build_manifest(folder, classes=data.FOUR_CLASSES, log=lines.append)
    return lines[0]


def test_what_cannot_be_reached_has_a_row_and_stops_nothing(hospital):
    for place in ("Pre/closed/a.png", "Pro/listed/b.png", "Pro/listed/deep/c.png"):
        write_image(hospital / place, noise(len(place)))
    (hospital / "Benign" / "gone.png").symlink_to("nowhere.png")
    (hospital / "Benign" / "round").symlink_to("round")
    (hospital / "Pre" / "closed").chmod(0o000)
    (hospital / "Pro" / "listed").chmod(0o444)
    (hospital / "Pro" / "Snap_001.png").chmod(0o000)
    try:
        status, said = prepare_unprivileged(hospital, hospital.parent / "out of the way")
    finally:
        for place in ("Pre/closed", "Pro/listed"):
            (hospital / place).chmod(0o755)
    assert status == 0, said
    table = read_table(hospital.parent / "out of the way" / "manifest.csv")
    problems = {Path(row.path).relative_to(hospital).as_posix(): row.problem for row in table.itertuples() if row.problem}
    assert set(problems) == {"Benign/gone.png", "Benign/round", "Pre/closed", "Pro/Snap_001.png", "Pro/listed"}
    assert all(place in problem and "\n" not in problem for place, problem in problems.items()), said
    assert "leads nowhere" in problems["Benign/gone.png"] and "Permission denied" in problems["Pre/closed"]
    assert "Permission denied" in problems["Pro/listed"] and (table["problem"] == "").sum() == 4
    assert set(table["class"]) == {"Normal", "Pre-B", "Pro-B"} and "Traceback" not in said
    assert len(read_table(hospital.parent / "out of the way" / "pairs.csv").query("problem == ''")) == 4


def test_what_cannot_be_reached_outside_a_class_has_a_row_as_well(hospital):
    (hospital / "unsorted").symlink_to("nowhere")
    (hospital / "Early").symlink_to("nowhere")  # a class that is not asked for
    table = build_manifest(hospital)
    assert table.loc[table["problem"] != "", ["pair", "class"]].to_numpy().tolist() == [["unsorted", ""]]
    assert len(check_manifest(table, minimum=1)) == 5


def test_a_folder_that_cannot_be_read_at_all_says_why(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o000)
    status, said = prepare_unprivileged(tmp_path / "closed", tmp_path / "out")
    assert status != 0 and "Traceback" not in said and said.count("closed") >= 1


@pytest.mark.parametrize("name", ["set.zip", "set.tar", "set.tar.gz", "set.TGZ", "set.7z", "set.rar"])
def test_an_archive_is_to_be_unpacked(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(ImageError, match="is an archive. Unpack it and give the unpacked folder"):
        build_manifest(tmp_path / name)
    with pytest.raises(ImageError, match="is a file. Give the folder"):
        build_manifest(__file__)


ODD = [
    os.fsdecode(b"caf\xe9"),
    "a\rb",
    "a\nb",
    "=1+1",
    "-1",
    "@x",
    "\tx",
    "'=x",
    "\x1b[31m",
    "\u202egpj",
    "a,b;c",
    "{}",
    "$x$",
    "%s",
    "x" * 240,
    "007",
    "NA",
]


def test_odd_names_make_a_row_each_and_can_be_looked_at(tmp_path):
    for seed, name in enumerate(ODD):
        write_image(tmp_path / "in/Pre/x.png", noise(seed))
        (tmp_path / "in/Pre/x.png").rename(tmp_path / "in/Pre" / f"{name}.png")
        (tmp_path / "in/Pro").mkdir(exist_ok=True)
        (tmp_path / "in/Pro" / f"{name}.png").touch()  # bad ones, with the name in the message
    manifest = build_manifest(tmp_path / "in")
    assert {Path(path).stem for path in manifest["path"]} == set(ODD) and manifest["pair"].is_unique
    assert (manifest["problem"] == "").sum() == len(ODD) and all(
        len(problem.splitlines()) <= 1 for problem in manifest["problem"]
    )
    write_table(tmp_path / "m.csv", manifest)
    again = read_table(tmp_path / "m.csv")
    assert len(again) == 2 * len(ODD) == len(pd.read_csv(tmp_path / "m.csv"))
    wanted = manifest.assign(
        path=[path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for path in manifest["path"]]
    )
    pd.testing.assert_frame_equal(again, wanted, check_dtype=False)
    escape_table(manifest).to_html().encode()


def test_rows_with_problems_are_not_counted_as_usable(hospital):
    (hospital / "Pro" / "other.png").write_bytes((hospital / "Benign" / "Snap_001.png").read_bytes())
    manifest = build_manifest(hospital)
    with pytest.raises(ImageError, match=r"class Normal is empty \(1 more cannot be used"):
        check_manifest(manifest, minimum=1)
    assert (check_manifest(manifest, minimum=1, classes=("Pre-B", "Pro-B"))["problem"] == "").all()
