"""Pairs on disk: right pixels, finished work kept, bad images named, no half-written file taken for a whole one."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leukemia_nb.processing import pairing
from leukemia_nb.data.manifest import build_manifest
from leukemia_nb.data.files import OutputError
from leukemia_nb.data.images import ImageError, read_image, write_image
from leukemia_nb.processing.pairing import (
    FLIPS,
    Pairs,
    finished_pair,
    flip,
    pair_files,
    pixel_hash,
    prepare_pairs,
    read_saved,
    rescale,
    resize_square,
)
from leukemia_nb.processing.segmentation import apply_mask, segment
from leukemia_nb.data.synthetic import smear


@pytest.fixture(scope="module")
def smears(tmp_path_factory):
    "Folder of seven small smears, one with a name outside ASCII and brackets."
    folder = tmp_path_factory.mktemp("smears")
    for label, number in [("Normal", 3), ("[Malignant] Pre-B", 2), ("Pro", 1)]:
        short = label.removeprefix("[Malignant] ").replace("Pro", "Pro-B")
        for place in range(number):
            image = smear(short, seed=place, height=288, width=384).image
            write_image(folder / label / f"Snap_{place:03d}.png", image)
    write_image(folder / "Pro" / "Prüfung (1) 细胞.png", smear("Pro-B", seed=9, height=288, width=384).image)
    return folder


def prepare(smears, folder, **settings):
    return prepare_pairs(build_manifest(smears), folder, images=smears, progress=False, **settings)


@pytest.fixture(scope="module")
def made(smears, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return prepare(smears, folder), folder


def test_pixels_are_segment_cut_resize_in_that_order(smears, made):
    table, folder = made
    assert len(table) == 7 and (table["problem"] == "").all()
    pairs = Pairs(table, folder)
    for row, (original, segmented) in zip(table.to_dict("records"), pairs):
        image = read_image(smears / row["path"])
        mask = segment(image)
        assert (original == resize_square(image)).all()
        assert (segmented == resize_square(apply_mask(image, mask))).all()
        assert row["cell_share"] == pytest.approx(mask.mean(), abs=1e-5)
        assert row["pixels"] == pixel_hash(image)
        assert (row["original"], row["segmented"]) == pair_files(row["pair"])[:2]


def test_same_table_however_it_is_run(smears, made, tmp_path):
    table, folder = made
    for backend, jobs in [("loky", 2), ("threading", 2)]:
        with joblib.parallel_config(backend=backend):
            other = prepare(smears, tmp_path / backend, n_jobs=jobs)
        pd.testing.assert_frame_equal(other, table)
        for file in folder.rglob("*.png"):
            assert (tmp_path / backend / file.relative_to(folder)).read_bytes() == file.read_bytes()


def test_dask_backend(smears, made, tmp_path):
    distributed = pytest.importorskip("distributed")
    with (
        distributed.Client(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None),
        joblib.parallel_config(backend="dask"),
    ):
        other = prepare(smears, tmp_path)
    pd.testing.assert_frame_equal(other, made[0])


def test_only_what_is_not_finished_is_done(smears, tmp_path, monkeypatch):
    table, calls = prepare(smears, tmp_path), []
    monkeypatch.setattr(pairing, "save_pair", lambda *given, real=pairing.save_pair: (calls.append(given[1]), real(*given))[1])

    def again(**settings):
        calls.clear()
        return prepare(smears, tmp_path, **settings)

    pd.testing.assert_frame_equal(again(), table)
    assert calls == []
    original, segmented, record = (tmp_path / name for name in pair_files("Normal/Snap_001"))
    whole = original.read_bytes()
    for damage in [
        lambda: original.write_bytes(whole[:-50]),
        lambda: original.write_bytes(whole[:99] + b"?" + whole[100:]),
        segmented.unlink,
        record.unlink,
        lambda: record.write_text("{"),
        lambda: record.write_text("[]"),
        lambda: record.write_bytes(b"\xff\xfe"),
        lambda: record.write_text("{}"),
    ]:
        damage()
        pd.testing.assert_frame_equal(again(), table)
        assert calls == ["Normal/Snap_001"] and original.read_bytes() == whole
    again(size=96)
    assert len(calls) == 7
    monkeypatch.setattr(pairing, "RECIPE", pairing.RECIPE + 1)
    again(size=96)
    assert len(calls) == 7


def test_changed_image_is_noticed_and_done_again(smears, tmp_path):
    folder = tmp_path / "smears"
    for name in ("a", "b"):
        write_image(folder / "Pre" / f"{name}.png", smear("Pre-B", seed=ord(name), height=96, width=128).image)
    manifest = build_manifest(folder)
    prepare_pairs(manifest, tmp_path / "pairs", images=folder, progress=False)
    write_image(folder / "Pre" / "b.png", smear("Pre-B", seed=5, height=96, width=128).image)
    (folder / "Pre" / "a.png").unlink()
    stale = prepare_pairs(manifest, tmp_path / "pairs", images=folder, progress=False)
    assert stale["problem"].str.contains("No such file").tolist() == [True, False]
    assert stale["problem"].str.contains("b.png: changed since the manifest").tolist() == [False, True]
    fresh = prepare(folder, tmp_path / "pairs")
    assert fresh["problem"].tolist() == [""]
    assert (Pairs(fresh, tmp_path / "pairs")[0][0] == resize_square(read_image(folder / "Pre/b.png"))).all()


def test_bad_images_are_rows_and_the_rest_carries_on(smears, tmp_path):
    folder = tmp_path / "smears"
    good = (smears / "Normal/Snap_000.png").read_bytes()
    for name, data in {"good": good, "empty": b"", "cut": good[:2000], "text": b"not an image"}.items():
        (folder / "Normal").mkdir(parents=True, exist_ok=True)
        (folder / "Normal" / f"{name}.png").write_bytes(data)
    table = prepare(folder, tmp_path / "pairs").set_index("pair")
    assert (table["problem"] == "").to_dict() == {f"Normal/{name}": name == "good" for name in ("cut", "empty", "good", "text")}
    for name in ("cut", "empty", "text"):
        assert f"{name}.png" in table.loc[f"Normal/{name}", "problem"]
    assert {path.name for path in (tmp_path / "pairs").rglob("*.*")} == {"ori_good.png", "mask_good.png", "pair_good.json"}
    untold = build_manifest(folder).assign(problem="")  # found out only while preparing
    assert (prepare_pairs(untold, tmp_path / "pairs", images=folder, progress=False)["problem"] == "").sum() == 1


@pytest.mark.parametrize("shape", [(1, 1), (2, 300), (16, 16), (224, 224), (900, 40)])
def test_odd_sizes(tmp_path, shape):
    write_image(tmp_path / "smears/Pre/odd.png", np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    table = prepare(tmp_path / "smears", tmp_path / "pairs")
    if table["problem"][0] == "":
        assert Pairs(table, tmp_path / "pairs")[0].shape == (2, 224, 224, 3)
    else:
        assert "odd.png" in table["problem"][0]


def test_two_rows_of_one_name():
    manifest = pd.DataFrame({"pair": ["Pre-B/a"] * 2, "class": "Pre-B", "path": ["a.png", "b.png"], "sha256": ["1", "2"]})
    with pytest.raises(ValueError, match="two rows named Pre-B/a"):
        prepare_pairs(manifest, ".")


def test_folder_that_cannot_be_written(smears, tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/pairs")):
        with pytest.raises(OutputError, match="pairs: .*0 of 7 pairs are done and kept|file.*0 of 7 pairs are done and kept"):
            prepare(smears, folder)


FULL = """
import resource, sys
from leukemia_nb.data.manifest import build_manifest
from leukemia_nb.processing.pairing import prepare_pairs
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
manifest = build_manifest(sys.argv[1]).set_index("pair").loc[sys.argv[4:]].reset_index()
try: prepare_pairs(manifest, sys.argv[2], images=sys.argv[1], progress=False)
except OSError as error: print(error)
"""


def test_full_disk_keeps_what_is_finished(smears, tmp_path, made):
    sizes = {pair: (made[1] / pair_files(pair)[0]).stat().st_size for pair in made[0]["pair"]}
    order = sorted(sizes, key=sizes.get)
    call = [sys.executable, "-c", FULL, str(smears), str(tmp_path), str(sizes[order[5]] - 1), *order]
    said = subprocess.run(call, capture_output=True, text=True, check=True, cwd=Path(pairing.__file__).parents[2]).stdout
    assert "File too large" in said and "5 of 7 pairs are done and kept: run again" in said and len(said.splitlines()) == 1
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".part")]
    assert len(list(tmp_path.rglob("*.png"))) == 10
    for path in tmp_path.rglob("*.png"):
        read_saved(path)
    pd.testing.assert_frame_equal(prepare(smears, tmp_path), made[0])


SLOW = """
import sys, time
import leukemia_nb.processing.pairing as pairing
from leukemia_nb.data.manifest import build_manifest
real = pairing.save_png
def slow(*given): time.sleep(0.15); return real(*given)
pairing.save_png = slow
print("started", flush=True)
pairing.prepare_pairs(build_manifest(sys.argv[1]), sys.argv[2], images=sys.argv[1], progress=False)
"""


def test_killed_run_resumes(smears, tmp_path, made):
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, str(smears), str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(pairing.__file__).parents[2]
    ) as run:
        run.stdout.readline()
        while run.poll() is None and len(list(tmp_path.rglob("pair_*.json"))) < 3:
            time.sleep(0.01)
        os.kill(run.pid, signal.SIGKILL)
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("pair_*.json")}
    assert 3 <= len(finished) < 7
    pd.testing.assert_frame_equal(prepare(smears, tmp_path), made[0])
    assert all(path.stat().st_mtime_ns == date for path, date in finished.items())


def test_record_says_what_a_pair_was_made_from(made):
    table, folder = made
    record = json.loads((folder / pair_files("Normal/Snap_000")[2]).read_text(encoding="utf-8"))
    assert record["made_from"] == {
        "sha256": table["sha256"][0],
        "size": 224,
        "method": "rescale",
        "preprocessing": pairing.RECIPE,
    }
    assert finished_pair(folder, "Normal/Snap_000", record["made_from"]) == record["row"]
    assert finished_pair(folder, "Normal/Snap_000", {**record["made_from"], "method": "other"}) is None


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_pairs_index_like_an_array(made, data):
    table, folder = made
    pairs = Pairs(table.assign(flip=data.draw(st.lists(st.sampled_from(FLIPS), min_size=7, max_size=7))), folder)
    index = data.draw(
        st.one_of(
            st.integers(-7, 6),
            st.slices(7),
            st.lists(st.integers(-7, 6), min_size=1, max_size=40),
            st.lists(st.booleans(), min_size=7, max_size=7).map(np.array),
        )
    )
    whole = np.stack(
        [
            [flip(read_saved(folder / name), kind) for name in pair_files(pair)[:2]]
            for pair, kind in zip(pairs.table["pair"], pairs.flips)
        ]
    )
    assert np.array_equal(pairs[index], whole[index])
    assert np.array_equal(pairs.read(index, "segmented"), whole[index][..., 1, :, :, :])
    assert np.array_equal(pairs.read(index), whole[index][..., 0, :, :, :])


def test_pairs_as_a_sequence(made):
    table, folder = made
    pairs = Pairs(table, folder)
    assert len(pairs) == 7 == len(list(pairs)) and pairs.labels.dtype.kind == "U"
    assert pairs.labels.tolist() == list(table["class"])
    copy = pickle.loads(pickle.dumps(pairs))
    assert len(pickle.dumps(pairs)) < 20_000 and np.array_equal(copy[2], pairs[2])  # names, no pixels
    with pytest.raises(IndexError):
        pairs[7]
    with pytest.raises(ValueError, match="not in tuple|not in"):
        pairs.read(0, "mask")
    subset = table[["pair", "class"]].sample(frac=1, random_state=0)  # any order, any index, the least of columns
    assert np.array_equal(Pairs(subset, folder)[:], pairs[subset.index])


def test_only_the_wanted_channel_is_read(smears, tmp_path):
    table = prepare(smears, tmp_path)
    pairs = Pairs(table, tmp_path)
    for file in tmp_path.rglob("mask_*.png"):
        file.write_bytes(b"")
    assert pairs.read(slice(None)).shape == (7, 224, 224, 3)
    with pytest.raises(ImageError, match="mask_.*: not a whole PNG"):
        pairs.read([0], "segmented")


def test_pairs_that_are_not_there_or_not_right(smears, tmp_path):
    table = prepare(smears, tmp_path)
    with pytest.raises(ValueError, match=r"table lacks \['class'\]"):
        Pairs(table[["pair"]], tmp_path)
    with pytest.raises(ValueError, match="no such flips"):
        Pairs(table.assign(flip="left"), tmp_path)
    with pytest.raises(ValueError, match="without a class"):
        Pairs(table.assign(**{"class": None}), tmp_path)
    with pytest.raises(ImageError, match="ori_Snap_000.png: 224x224 where 96x96"):
        Pairs(table, tmp_path, size=96)[0]
    pairs = Pairs(table, tmp_path)
    (tmp_path / pair_files("Normal/Snap_001")[0]).unlink()
    with pytest.raises(ImageError, match="ori_Snap_001.png: No such file.*Prepare the pairs again"):
        pairs[:]
    with pytest.raises(ImageError, match=r"ori_Snap_001.png: missing \(1 in all\)"):
        Pairs(table, tmp_path)


images = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 999), st.sampled_from([2, 256])).map(
    lambda drawn: np.random.default_rng(drawn[2]).integers(0, drawn[3], (*drawn[:2], 3), dtype=np.uint8)
)


@given(images, images)
def test_pixel_hash_is_equal_for_mirror_images_alone(one, other):
    assert len({pixel_hash(flip(one, kind)) for kind in FLIPS}) == 1
    mirrored = any(np.array_equal(flip(one, kind), other) for kind in FLIPS)
    assert (pixel_hash(one) == pixel_hash(other)) == mirrored
    if one.shape[0] > 1:
        assert pixel_hash(one) != pixel_hash(one.reshape(1, -1, 3))  # same bytes, another shape


@given(images)
def test_rescale(image):
    ready = rescale(image)
    assert ready.dtype == np.float32 and ready.min() >= 0 and ready.max() <= 1
    assert (np.rint(ready * 255) == image).all()
    with pytest.raises(TypeError, match="only once"):
        rescale(ready)


def test_segmentation_commutes_with_flips_on_real_images(shared_data):
    for path in sorted((shared_data / "taleqani/Pre").glob("*.jpg"))[:8]:
        image = read_image(path)
        for kind in FLIPS[1:]:
            assert (segment(flip(image, kind)) == flip(segment(image), kind)).all()
