"""Asking model files: the seal, bad files, rows, stopping and going on, the display."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from leukemia_nb.data.files import OutputError
from leukemia_nb.data.images import ImageError, read_image, write_image
from leukemia_nb.models.interface import ModelError, resize_square
from leukemia_nb.inference.predictor import (
    FORMAT,
    SEAL,
    Predictor,
    Task,
    answer_files,
    check_outputs,
    compare_models_on,
    comparison_text,
    confidence_text,
    calibration_text,
    exported_models,
    find_inputs,
    list_images,
    dummy_model_file,
    open_model_file,
    overlay_file,
    predict_files,
    predictions_html,
    read_unfinished,
    abstain_reasons,
    row_columns,
    row_text,
    saliency,
    seal,
    unseal,
)
from leukemia_nb.processing.cells import count_cells
from leukemia_nb.processing.segmentation import check_mask, apply_mask, segment
from leukemia_nb.data.synthetic import smear, write_smears

CLASSES = ["Normal", "Pre-B", "Pro-B"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predictor")
    for kind in ("image", "pair", "cells"):
        dummy_model_file(folder / f"run/exported/{kind}.onnx", kind)
    write_smears(folder / "smears", 3, height=192, width=256)
    return folder


@pytest.fixture(scope="module")
def file(place):
    return place / "run/exported/image.onnx"


@pytest.fixture(scope="module")
def paths(place):
    return list_images(place / "smears")


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 10_000), st.integers(1, 255))
def test_any_changed_byte_breaks_the_seal(body, where, change):
    import hashlib

    data = bytearray(body + SEAL + hashlib.sha256(body).hexdigest().encode())
    assert unseal(bytes(data)) == hashlib.sha256(body).hexdigest()
    data[where % len(data)] ^= change
    with pytest.raises(ModelError, match="damaged|cut off"):
        unseal(bytes(data))


def test_the_seal_is_protobuf_that_others_can_read(file):
    import onnx

    model = onnx.load(file)
    onnx.checker.check_model(model)
    entries = {entry.key: entry.value for entry in model.metadata_props}
    assert entries["sha256"] == unseal(file.read_bytes()) and json.loads(entries["leukemia_nb"])["classes"] == CLASSES


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "cut off"),
        (lambda data: data[: len(data) // 2], "cut off"),
        (lambda data: b"", "cut off"),
        (lambda data: data.replace(b"Softmax", b"Hardmax"), "damaged"),
        (lambda data: b"\xff\xd8\xff" * 100, "not a model file"),
    ],
)
def test_a_damaged_model_file_is_one_line(file, tmp_path, damage, message):
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ModelError, match=message) as error:
        Predictor.load(bad)
    assert str(bad) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("number", "message"),
    [(FORMAT - 1, r"older version .*--redo export-made_up_image"), (FORMAT + 1, "newer version .*Update leukemia_nb")],
)
def test_a_file_of_another_format_is_told_from_a_damaged_one(file, tmp_path, number, message):
    body = file.read_bytes()[: -len(seal(b""))]
    assert seal(body) == file.read_bytes()
    (tmp_path / "odd.onnx").write_bytes(seal(body.replace(f'"format": {FORMAT},'.encode(), f'"format": {number},'.encode())))
    with pytest.raises(ModelError, match=message) as error:
        Predictor.load(tmp_path / "odd.onnx")
    assert f"format {number}, this one reads {FORMAT}" in str(error.value)


def test_a_sealed_file_that_is_no_network_is_one_line(tmp_path):
    import hashlib

    body = b"not a protobuf"
    (tmp_path / "odd.onnx").write_bytes(body + SEAL + hashlib.sha256(body).hexdigest().encode())
    with pytest.raises(ModelError, match="cannot be started") as error:
        open_model_file(tmp_path / "odd.onnx")
    assert "\n" not in str(error.value)


def rewritten(file, out, change=None, text=None, edit=None):
    """A sealed copy of a model file with another description, or another graph."""
    import onnx

    model = onnx.load_model_from_string(file.read_bytes()[: -len(seal(b""))])
    (entry,) = (each for each in model.metadata_props if each.key == "leukemia_nb")
    info = json.loads(entry.value)
    entry.value = json.dumps(change(info)) if change else entry.value if text is None else text
    if edit:
        edit(model)
    out.write_bytes(seal(model.SerializeToString()))
    return out


NEEDED = [
    "name",
    "title",
    "version",
    "classes",
    "input",
    "image_size",
    "segmentation",
    "temperature",
    "thresholds",
    "training",
    "test",
    "weights_source",
    "licence",
    "research_use",
    "card",
    "format",
]
MALFORMED = {
    **{f"without {key}": lambda info, key=key: {name: info[name] for name in info if name != key} for key in NEEDED},
    **{
        f"{key} is {value!r}": lambda info, key=key, value=value: info | {key: value}
        for key in NEEDED
        for value in (None, [[1]], {"a": 1}, float("nan"))
    },
    **{
        name: lambda info, more=more: info | more
        for name, more in {
            "two classes": {"classes": ["Normal", "Pre-B"]},
            "one class twice": {"classes": ["Normal", "Pre-B", "Pre-B"]},
            "a number for a class": {"classes": ["Normal", "Pre-B", 3]},
            "a class of control characters": {"classes": ["A", "B", "C\x1b[2J"]},
            "size as text": {"image_size": "224"},
            "size as fraction": {"image_size": 224.5},
            "other size": {"image_size": 64},
            "huge size": {"image_size": 10**9},
            "no size": {"image_size": 0},
            "unknown input": {"input": "slide"},
            "input pair": {"input": "pair"},
            "input cells": {"input": "cells"},
            "unknown segmentation": {"segmentation": "otsu"},
            "negative temperature": {"temperature": -1.0},
            "endless temperature": {"temperature": float("inf")},
            "huge number": {"temperature": 10**400},
            "NaN thresholds": {"thresholds": {"confidence": float("nan"), "distance": 1.0}},
            "half the thresholds": {"thresholds": {"confidence": 0.5}},
            "thresholds as text": {"thresholds": {"confidence": "0.5", "distance": "1"}},
            "half a surrogate": {"title": "\ud800"},
            "more right than tested": {"test": {"right": 5, "images": 3, "low": 0.1, "high": 0.9}},
            "half a test": {"test": {"right": 5}},
            "seed as text": {"seed": "0"},
            "calibration as number": {"calibration": 1.5},
            "format as text": {"format": "2"},
        }.items()
    },
    "a list": lambda info: [info],
    "null": lambda info: None,
    "a number": lambda info: 7,
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_description_is_one_line(case, file, tmp_path):
    bad = rewritten(file, tmp_path / "odd.onnx", MALFORMED[case])
    with pytest.raises(ModelError, match="odd.onnx: ") as error:
        Predictor.load(bad)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 400 and str(error.value).isprintable()


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "1" * 5_000, '{"a":' * 900 + "1" + "}" * 900, "\0"])
def test_a_description_that_is_no_json_is_one_line(text, file, tmp_path):
    bad = rewritten(file, tmp_path / "odd.onnx", text=text)
    with pytest.raises(ModelError, match="odd.onnx: its description") as error:
        Predictor.load(bad)
    assert len(str(error.value).splitlines()) == 1


def test_a_network_without_description_is_one_line(file, tmp_path):
    bad = rewritten(file, tmp_path / "odd.onnx", edit=lambda model: model.ClearField("metadata_props"))
    with pytest.raises(ModelError, match="odd.onnx: has no description"):
        Predictor.load(bad)


def test_what_the_rules_do_not_ask_for_may_be_missing_or_more(file, paths, tmp_path):
    def change(info):
        return {key: info[key] for key in info if key != "calibration"} | {"temperature": 1.5, "of later": [1, 2]}

    model = Predictor.load(rewritten(file, tmp_path / "good.onnx", change))
    assert len(model.predict(paths[:1])) == 1 and "calibrated with temperature 1.5" in calibration_text(model.info)


def refer(tensor, location):
    """Say of a tensor that its numbers lie in another file."""
    for field in ("raw_data", "float_data", "int64_data"):
        tensor.ClearField(field)
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", str(location)
    tensor.data_location = 1


def hide(model, where):
    """A tensor somewhere in a network, where nothing uses it."""
    import onnx

    tensor = onnx.helper.make_tensor("far", 1, [1], [0.0])
    if where == "initializer":
        return model.graph.initializer.append(tensor) or model.graph.initializer[-1]
    if where == "sparse":
        return model.graph.sparse_initializer.add(dims=[1]).values
    node = (
        model.graph.node.add(op_type="Constant", output=["unused"])
        if where != "function"
        else model.functions.add(name="f").node.add()
    )
    attribute = node.attribute.add(name="value")
    if where == "inner graph":
        attribute.g.CopyFrom(onnx.GraphProto(name="inner"))
    if where == "inner graph":
        return attribute.g.initializer.add(name="far", data_type=1, dims=[1])
    return attribute.tensors.add() if where == "tensors" else attribute.t


@pytest.mark.parametrize("where", ["weights", "initializer", "sparse", "node", "tensors", "inner graph", "function"])
def test_a_network_that_refers_to_other_files_is_refused_unopened(where, file, tmp_path):
    os.mkfifo(tmp_path / "pipe")  # whoever opens it waits for ever

    def edit(model):
        refer(model.graph.initializer[0] if where == "weights" else hide(model, where), tmp_path / "pipe")

    bad = rewritten(file, tmp_path / "odd.onnx", edit=edit)
    with pytest.raises(ModelError, match="odd.onnx: refers to other files"):
        Predictor.load(bad)


@pytest.mark.parametrize("what", ["pipe", "/dev/zero", "folder", "huge", "link to a pipe", "socket"])
def test_what_is_no_file_of_a_models_size_is_refused_at_once(what, tmp_path):
    import socket

    given = Path(what) if what.startswith("/dev") else tmp_path / "given.onnx"
    if what == "folder":
        given.mkdir()
    if "pipe" in what:
        os.mkfifo(given if what == "pipe" else tmp_path / "pipe")
    if what == "link to a pipe":
        given.symlink_to(tmp_path / "pipe")
    if what == "huge":
        with open(given, "wb") as empty:
            empty.truncate(50_000_000_000)
    with socket.socket(socket.AF_UNIX) as listener:
        if what == "socket":
            listener.bind(str(given))
        with pytest.raises(ModelError, match=f"^{given}: .*Check the path") as error:
            Predictor.load(given)
    assert "\n" not in str(error.value)


def test_a_model_file_that_does_not_fit_does_not_stop_the_others(place, file, paths, tmp_path):
    rewritten(file, tmp_path / "odd.onnx", lambda info: info | {"thresholds": []})
    problems = []
    table = compare_models_on(paths[:2], [tmp_path / "odd.onnx", file], problems.append)
    assert len(table) == 2 and len(problems) == 1 and "odd.onnx: its description says thresholds" in problems[0]


def test_numbers_that_are_none_are_an_error_and_no_answer(file, paths):
    model = Predictor.load(file)
    real = model.session

    class Session:
        def run(self, names, given):
            probabilities, *others = real.run(names, given)
            return [probabilities * np.nan, *others]

    model.session = Session()
    (row,) = model.predict(paths[:1]).rows
    assert row["class"] == "" and row["abstain"] and "no finite numbers" in row["error"]
    json.dumps(row, allow_nan=False)


def test_files_folders_and_patterns(place, paths):
    assert len(paths) == 9 and list_images(str(place / "smears/*/*.png")) == paths
    assert list_images([place / "smears", paths[0], "no/such*.png"]) == [*paths, "no/such*.png"]
    assert list_images(place / "run") == [str(place / "run")]


def test_a_folder_with_magic_letters_is_a_folder(tmp_path):
    write_image(tmp_path / "[Malignant] Pre-B" / "a.png", smear("Pre-B", 0, 96, 128).image)
    assert [Path(each).name for each in list_images(tmp_path / "[Malignant] Pre-B")] == ["a.png"]


def test_overlays_are_no_images(file, tmp_path, monkeypatch):
    """A folder that an earlier run wrote is left out of every search, unless its marker is deleted."""
    write_smears(tmp_path, 1, height=96, width=128)
    mine = list_images(tmp_path)
    predict_files(mine, Task(str(file), str(tmp_path / "ov"), saliency=True), tmp_path / "a.csv")
    assert len(list(tmp_path.rglob("*.jpg"))) == 6
    assert list_images(tmp_path) == list_images(tmp_path, tmp_path / "ov") == mine
    found, summary = find_inputs([*mine, f"{tmp_path}/*/*.[jp][pn]g", f"{tmp_path}/ov/*", f"{tmp_path}/**/*.jpg"])
    assert [path for path in found if "*" not in path] == mine and "written by leukemia_nb: 6" in summary
    rows = Predictor.load(file).predict([tmp_path / "ov", f"{tmp_path}/ov/*"]).rows
    assert ["leukemia_nb" in row["error"] for row in rows] == [True, True]
    assert len(list_images(next((tmp_path / "ov").glob("Pre*cells.jpg")))) == 1  # a file that is named is asked about
    (tmp_path / "ov" / ".leukemia_nb-output").unlink()
    assert len(list_images(tmp_path / "ov")) == 6
    monkeypatch.chdir(tmp_path)
    assert len(list_images(".")) == 9 and list_images(".", "ov") == [os.path.relpath(path, tmp_path) for path in mine]


def test_brackets_in_patterns_are_brackets_where_they_are_there(tmp_path):
    for name in ("[Malignant] Pre-B/a.png", "[Malignant] Pro-B/b.png", "M/c.png", "[x]/[y]1.png", "[x]/y1.png", "q/y1.png"):
        write_image(tmp_path / name, smear("Pre-B", 0, 96, 128).image)

    def found(pattern):
        return [os.path.relpath(path, tmp_path) for path in list_images(f"{tmp_path}/{pattern}")]

    assert found("[Malignant] Pre-B/*.png") == found("[Malignant] Pre*/?.png") == ["[Malignant] Pre-B/a.png"]
    assert found("[Malignant]*/*.png") == ["[Malignant] Pre-B/a.png", "[Malignant] Pro-B/b.png"]
    assert found("[Malignant]/*.png") == ["M/c.png"]  # no such folder: a set of letters
    assert found("[x]/[y]1.png") == ["[x]/[y]1.png"] and found("[pq]/[xy]1.png") == ["q/y1.png"]
    assert len(found("**/*.png")) == len(found("*")) == len(found("**")) == 6  # folders that match are searched


def test_names_in_bytes_are_kept_in_the_journal_and_escaped_in_tables(file, paths, tmp_path):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    Path(odd).write_bytes(Path(paths[4]).read_bytes())
    twin = str(tmp_path / "caf\\xe9.png")  # what the first one is shown as
    Path(twin).write_bytes(Path(paths[1]).read_bytes())

    def stop(rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_files([odd, twin], Task(str(file)), tmp_path / "a.csv", log=stop)
    assert [row["path"] for row in read_unfinished(tmp_path / "a.csv.unfinished")] == [odd]
    assert predict_files([odd, twin], Task(str(file)), tmp_path / "a.csv", tmp_path / "a.json") == 1
    rows = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert [row["path"] for row in rows] == [twin, twin] == pd.read_csv(tmp_path / "a.csv")["path"].tolist()
    assert [row["class"] for row in rows] == ["Pre-B", "Normal"]
    predictions_html(Predictor.load(file).predict([odd])).encode()


def test_answers_replace_nothing_that_is_read(file, paths, tmp_path):
    before = {path: Path(path).read_bytes() for path in (*paths, str(file))}
    (tmp_path / "link.csv").symlink_to(paths[3])
    task = Task(str(file), overlays=str(tmp_path / "ov"))
    for out, json_file, message in [
        (paths[0], None, "one of the images"),
        (None, paths[8], "one of the images"),
        (tmp_path / "link.csv", None, "one of the images"),
        (file, None, "the model file"),
        (tmp_path / "a", tmp_path / "b/../a", "two files of that name"),
        (tmp_path, None, "choose another name"),
        (f"{file}/a.csv", None, "A file stands"),
    ]:
        with pytest.raises(OutputError, match=message):
            predict_files(paths, task, out, json_file)
    with pytest.raises(OutputError, match="A file stands"):
        check_outputs(paths, Task(str(file), overlays=paths[0]))
    assert before == {path: Path(path).read_bytes() for path in before} and os.listdir(tmp_path) == ["link.csv"]


def test_a_doubtful_mask_is_said_and_does_not_make_the_model_abstain(file, paths):
    model = Predictor.load(file)
    stained = np.full((192, 256, 3), 235, np.uint8)
    stained[:, 60:] = (120, 60, 160)
    row, plain = model.predict([stained, read_image(paths[4])]).rows
    assert row["mask_flag"] == check_mask(segment(stained)) != "" == plain["mask_flag"]
    assert row["why"] == abstain_reasons(row["confidence"], row["distance"], row["n_cells"], model.info["thresholds"])
    assert f"1 cell on 76.6% of the image (doubtful mask: {row['mask_flag']})" in row_text(row)
    assert "doubtful" not in row_text(plain) and row["mask_flag"] in predictions_html(model.predict([stained]))


def test_rows_have_all_columns_and_say_what_is_in_the_image(file, paths):
    import hashlib

    table = Predictor.load(file).predict(paths).table
    assert list(table) == row_columns(CLASSES) and list(table["path"]) == paths
    image = read_image(paths[4])
    mask = segment(image)
    row = table.iloc[4]
    assert (row["n_cells"], row["cell_pixels"], row["cell_area"]) == (count_cells(mask), mask.sum(), round(mask.mean(), 5))
    assert row["sha256"] == hashlib.sha256(Path(paths[4]).read_bytes()).hexdigest()
    np.testing.assert_allclose(table[[f"p_{name}" for name in CLASSES]].sum(axis=1), 1, atol=1e-5)
    assert (table["confidence"] == table[[f"p_{name}" for name in CLASSES]].max(axis=1)).all()


@pytest.mark.parametrize("kind", ["image", "pair", "cells"])
def test_batches_arrays_and_paths_agree(place, paths, kind):
    model = Predictor.load(place / f"run/exported/{kind}.onnx")
    whole = model.predict_proba(paths)
    assert whole.shape == (9, 3) and whole.dtype == np.float32
    pixels = [read_image(path) for path in paths]
    np.testing.assert_allclose(model.predict_proba(pixels), whole, atol=1e-6)
    for size in (1, 4):
        parts = list(model.iter_predict(paths, batch_size=size))
        assert max(map(len, parts)) == size
        np.testing.assert_allclose([row["p_Pre-B"] for part in parts for row in part.rows], whole[:, 1], atol=2e-6)


def test_a_pair_that_is_given_is_not_made_again(place, paths):
    model, image = Predictor.load(place / "run/exported/pair.onnx"), read_image(paths[3])
    twin = apply_mask(image, segment(image))
    pair = np.stack([resize_square(image, 224), resize_square(twin, 224)])
    np.testing.assert_allclose(model.predict_proba(pair[None]), model.predict_proba([image]), atol=1e-6)
    assert not np.allclose(model.predict_proba(np.stack([pair[[0, 0]]])), model.predict_proba(pair[None]), atol=1e-3)


def test_a_image_without_cells_is_not_answered(place):
    blank = np.full((96, 128, 3), 235, np.uint8)
    for kind in ("image", "pair", "cells"):
        row = Predictor.load(place / f"run/exported/{kind}.onnx").predict([blank]).rows[0]
        assert row["abstain"] and "no cells found" in row["why"] and row["n_cells"] == 0
        assert np.isfinite([row[f"p_{name}"] for name in CLASSES]).all()


def test_bad_images_are_rows_and_the_rest_goes_on(file, paths, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    bad = [str(tmp_path / name) for name in ("broken.jpg", "empty.png", "nowhere.png", "folder")]
    table = Predictor.load(file).predict([bad[0], paths[0], *bad[1:]]).table
    assert list(table["error"] == "") == [False, True, False, False, False]
    assert table.loc[table["error"] != "", "abstain"].all() and (table.loc[table["error"] != "", "class"] == "").all()
    assert all(path in error for path, error in zip(table["path"], table["error"]) if error)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((20, 30), float),
        np.zeros((20, 30, 3)),
        np.zeros((20, 30, 4), np.uint8),
        np.zeros((20, 30, 3), np.uint16),
        np.zeros((3, 20, 30), np.uint8),
        np.zeros((20, 30, 3), bool),
        np.zeros(7),
        np.zeros((2, 2, 2, 20, 30, 3)),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_arrays_that_are_no_images_are_refused_as_they_were_given(file, array):
    model = Predictor.load(file)
    for asked in (array, [array]):
        (row,) = model.predict(asked).rows
        assert str(array.dtype) in row["error"] and str(array.shape) in row["error"] and row["abstain"]
        with pytest.raises(ImageError, match=str(array.dtype)):
            model.predict_proba(asked)


@pytest.mark.parametrize("thing", [None, 5, [3.5], object()])
def test_what_is_no_image_at_all_is_one_line(file, thing):
    (row,) = Predictor.load(file).predict(thing).rows
    assert "not an image" in row["error"]


@pytest.mark.parametrize("kind", ["image", "pair", "cells"])
def test_images_in_memory_are_answered_as_files_are(place, paths, kind):
    model, pixels = Predictor.load(place / f"run/exported/{kind}.onnx"), read_image(paths[4])
    image = Image.fromarray(pixels)
    whole = model.predict_proba(paths[4:5])
    for image in (pixels, image, image.convert("RGBA"), [image], [pixels]):
        np.testing.assert_allclose(model.predict_proba(image), whole, atol=1e-6)
    grey = np.repeat(pixels[..., 1:2], 3, axis=2)
    for image in (grey[..., 0], Image.fromarray(grey[..., 0])):
        np.testing.assert_allclose(model.predict_proba(image), model.predict_proba([grey]), atol=1e-6)
    assert model.predict([image])._repr_html_().count('src="data:image/jpeg') == 1
    assert saliency(model, image).shape == (1, 224, 224)


def test_a_predictor_can_be_sent_to_other_processes(place, paths):
    dummy_model_file(place / "gone.onnx", "pair")
    model = Predictor.load(place / "gone.onnx", count=False)
    model.info["title"] = "Mine"
    (place / "gone.onnx").unlink()
    sent = pickle.loads(pickle.dumps(model))
    assert sent.info == model.info and not sent.count and repr(sent) == repr(model)
    np.testing.assert_array_equal(sent.predict_proba(paths[:2]), model.predict_proba(paths[:2]))
    from joblib import Parallel, delayed

    far = Parallel(n_jobs=2)(delayed(model.predict_proba)(paths[i : i + 1]) for i in range(2))
    np.testing.assert_allclose(np.concatenate(far), model.predict_proba(paths[:2]), atol=1e-6)
    with pytest.raises(TypeError, match="Predictor.load"):
        pickle.dumps(Predictor(model.session, model.info))


@given(st.floats(0, 1), st.floats(0, 10), st.sampled_from([None, 0, 5]))
def test_nothing_doubtful_is_accepted(confidence, distance, n_cells):
    why = abstain_reasons(confidence, distance, n_cells, {"confidence": 0.7, "distance": 3.0})
    assert (why == "") == (confidence >= 0.7 and distance <= 3.0 and n_cells != 0)


def test_not_a_number_is_doubtful():
    limits = {"confidence": 0.7, "distance": 3.0}
    assert abstain_reasons(float("nan"), 1, 3, limits) == "not sure"
    assert abstain_reasons(0.9, float("nan"), 3, limits) == "unlike the training images"


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_csv_and_json_hold_the_same(file, paths, tmp_path, n_jobs):
    said = []
    assert predict_files(paths, Task(str(file)), tmp_path / "a.csv", tmp_path / "a.json", 4, n_jobs, said.extend) == 0
    table, rows = pd.read_csv(tmp_path / "a.csv", keep_default_na=False), json.loads((tmp_path / "a.json").read_text())
    assert list(table["path"]) == paths == [row["path"] for row in rows] == [row["path"] for row in said]
    np.testing.assert_allclose(table["confidence"], [row["confidence"] for row in rows])
    assert sorted(each.name for each in tmp_path.iterdir() if each.suffix != ".lock") == ["a.csv", "a.json"]


def test_a_stopped_run_goes_on_where_it_was(file, paths, tmp_path):
    def stop(rows):
        if rows[0]["path"] == paths[4]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_files(paths, Task(str(file)), tmp_path / "a.csv", batch_size=3, log=stop)
    assert [row["path"] for row in read_unfinished(tmp_path / "a.csv.unfinished")] == paths[:7]
    assert not (tmp_path / "a.csv").exists()
    with open(tmp_path / "a.csv.unfinished", "a") as lines:
        lines.write('{"path": "cut of')
    asked = []
    assert predict_files(paths, Task(str(file)), tmp_path / "a.csv", log=asked.extend) == 7
    assert [row["path"] for row in asked] == paths[7:]
    assert list(pd.read_csv(tmp_path / "a.csv")["path"]) == paths


def test_changed_files_other_models_and_errors_are_asked_again(place, file, tmp_path):
    write_smears(tmp_path / "s", 1, height=96, width=128)
    mine = [*list_images(tmp_path / "s"), str(tmp_path / "later.png")]
    journal = tmp_path / "a.csv.unfinished"
    rows = answer_files(Task(str(file)), mine)
    assert {row["model_sha256"] for row in rows} == {Predictor.load(file).info["sha256"]}
    journal.write_text("".join(json.dumps(row) + "\n" for row in [rows[0] | {"model_version": "other"}, *rows[1:]]))
    write_image(mine[1], smear("Normal", 9, 96, 128).image)
    write_image(mine[3], smear("Pro-B", 9, 96, 128).image)
    asked = []
    assert predict_files(mine, Task(str(file)), tmp_path / "a.csv", log=asked.extend) == 1
    assert {row["path"] for row in asked} == {mine[0], mine[1], mine[3]} and not any(row["error"] for row in asked)


def test_a_killed_run_loses_nothing(file, place, tmp_path):
    """SIGKILL in the middle of a real process; the second run answers only what is left."""
    source = list_images(place / "smears")
    for number in range(300):
        os.link(source[number % 9], tmp_path / f"{number:04d}.png")
    command = [
        sys.executable,
        "-m",
        "leukemia_nb",
        "predict",
        str(tmp_path),
        "--model",
        str(file),
        "--batch-size",
        "5",
        "--out",
        str(tmp_path / "a.csv"),
    ]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal, end = tmp_path / "a.csv.unfinished", time.monotonic() + 120
    while time.monotonic() < end and run.poll() is None and len(list(read_unfinished(journal))) < 20:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    kept = len(list(read_unfinished(journal)))
    assert 20 <= kept < 300 and not (tmp_path / "a.csv").exists()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and f"{kept} of them before" in done.stdout
    assert pd.read_csv(tmp_path / "a.csv")["path"].tolist() == list_images(tmp_path)


def test_overlays_and_saliency(place, paths, tmp_path):
    for kind in ("image", "pair"):
        task = Task(str(place / f"run/exported/{kind}.onnx"), str(tmp_path / kind), saliency=True)
        row = answer_files(task, paths[4:5])[0]
        for what in ("cells", "saliency"):
            assert read_image(overlay_file(row, task.overlays, what)).shape == read_image(paths[4]).shape
    heat = saliency(Predictor.load(place / "run/exported/image.onnx"), paths[4])
    assert heat.shape == (1, 224, 224) and heat.min() >= 0 and heat.max() <= 1


def test_every_model_beside_the_others(place, paths, tmp_path):
    problems = []
    table = compare_models_on([*paths, "nowhere.png"], exported_models(place / "run"), problems.append)
    assert list(table["path"]) == [*paths, "nowhere.png"] and problems == list(table["error"][9:])
    assert set(table["true label"][:9]) == set(CLASSES) and not any(table["error"][:9]) and table.iloc[9]["made_up_pair"] == ""
    single = Predictor.load(place / "run/exported/pair.onnx").predict(paths).table
    np.testing.assert_allclose(table.set_index("path").loc[paths, "made_up_pair confidence"], single["confidence"], atol=1e-5)
    text = comparison_text(table.assign(**{"made_up_pair doubt": "not sure"}))
    assert len(text.splitlines()) == 11 and len(re.findall(r"\(P?[rN]o.*? \d\.\d\d\)|\(P.*? \d\.\d\d\)", text)) == 9
    with pytest.raises(ModelError, match="no exported models"):
        exported_models(tmp_path)
    with pytest.raises(ModelError, match="no such folder"):
        exported_models(tmp_path / "nowhere")
    with pytest.raises(ImageError, match="No image can be read"):
        compare_models_on(["nowhere.png"], exported_models(place / "run"), problems.append)
    assert len(problems) == 2


def test_a_torn_model_file_does_not_stop_the_others(place, paths, tmp_path):
    (tmp_path / "torn.onnx").write_bytes(b"half a file")
    problems = []
    table = compare_models_on(paths, [tmp_path / "torn.onnx", *exported_models(place / "run")], problems.append)
    assert len(table) == 9 and "torn.onnx: not a model file" in problems[0] and len(problems) == 1
    with pytest.raises(ModelError, match="No model file can be opened"):
        compare_models_on(paths, [tmp_path / "torn.onnx"], problems.append)


def test_the_display_is_safe_and_says_all(file, paths, tmp_path):
    odd = tmp_path / "<b>&.png"
    odd.write_bytes(Path(paths[4]).read_bytes())
    predictions = Predictor.load(file).predict([odd, "nowhere.png", *paths])
    text = predictions_html(predictions, most=3)
    assert "<b>&" not in text and "&lt;b&gt;&amp;" in text and "Research use only" in text
    assert text.count('class="lnb-card"') == 3 and text.count("<img") == 2 and "8 more in .table" in text
    assert text.count('class="lnb-bar"') == 6 and predictions[0]._repr_html_().count("<img") == 1
    assert "nowhere.png" in confidence_text(predictions.rows[1])


def test_the_display_says_numbers_and_no_verdict(file, paths, tmp_path):
    model = Predictor.load(file)
    predictions = model.predict(paths)
    for text in (predictions_html(predictions), *map(confidence_text, predictions.rows), repr(predictions)):
        assert "blast" not in text and "Hardly" not in text and "Little doubt" not in text
    assert "Confidence" in predictions_html(predictions) and "white blood cells</b> segmented" not in predictions_html(
        predictions
    )
    assert re.search(r"<b>\d+</b> white blood cells? segmented, <b>[\d.]+%</b> of the image", predictions_html(predictions))
    assert "not calibrated: made up" in predictions_html(predictions) and "are calibrated" not in predictions_html(predictions)
    row = predictions.rows[4] | {
        "class": "Pre-B",
        "confidence": 0.999,
        "abstain": False,
        "p_Pre-B": 0.999,
        "p_Normal": 0.001,
        "p_Pro-B": 0.0,
    }
    assert confidence_text(row) == "Confidence 99.9%; next is Normal, 0.1%."


def test_the_display_goes_on_without_a_file_that_is_gone(file, paths, tmp_path):
    (tmp_path / "a.png").write_bytes(Path(paths[4]).read_bytes())
    predictions = Predictor.load(file).predict([tmp_path / "a.png"])
    (tmp_path / "a.png").unlink()
    assert "Confidence" in predictions_html(predictions)


def test_the_predict_path_loads_nothing_heavy(file, paths):
    code = (
        "import sys\nfrom leukemia_nb.study.command_line import app\n"
        f"try: app(['predict', {paths[0]!r}, '--model', {str(file)!r}])\nexcept SystemExit as end: print('status', end.code)\n"
        "heavy = ('tensorflow', 'torch', 'keras', 'onnx', 'sklearn', 'matplotlib', 'seaborn', 'pandas', 'joblib', 'scipy', 'skimage')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-2:] == ["status 0", "[]"], done.stdout + done.stderr
