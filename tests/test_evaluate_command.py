"""`evaluate` and `predict --by`: every image is a row, labels and groups are kept apart, finished predictions stay."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from leukemia_nb.data.files import read_table
from leukemia_nb.data.images import ImageError, read_image, write_image
from leukemia_nb.data.near_duplicates import has_similar_fingerprint, image_fingerprints
from leukemia_nb.data.synthetic import make_smear
from leukemia_nb.evaluation.metrics import proportions_table
from leukemia_nb.evaluation.uncertainty import clopper_pearson
from leukemia_nb.inference import batch
from leukemia_nb.inference.batch import predictions_by_group
from leukemia_nb.inference.external import coverage_table, error_gallery, labelled_images, predict_labelled, read_evaluation
from leukemia_nb.inference.model_file import open_model_file, write_model_file
from leukemia_nb.processing.splitting import SplitError
from leukemia_nb.study.command_line import app
from leukemia_nb.testing import dummy_evaluation, dummy_predictions

CLASSES = ("Normal", "Pre-B", "Pro-B")


def silent(line):
    pass


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    dummy_evaluation(folder, per_class=4)
    return folder


def test_the_whole_command(place, tmp_path):
    models = [word for model in sorted((place / "models").glob("*.onnx")) for word in ("--model", model)]
    out = tmp_path / "out"
    done = run("evaluate", place / "hospital", *models, "--groups-from", "parent", "--out", out)
    assert done.exit_code == 0, done.output
    results, metrics = read_table(out / "results.csv"), json.loads((out / "metrics.json").read_text())
    assert len(results) == len(list((place / "hospital").rglob("*.png"))) == 4 * 4 + 2
    assert results.loc[results["problem"] != "", "pair"].tolist() == ["Normal/cut off"]
    assert {row["n_images"] for row in metrics["proportions"] if row["metric"] == "accuracy"} == {13}
    assert all(row["n_seen"] == 1 for row in metrics["seen"])
    assert {row["class"] for row in metrics["unknown_classes"]} == {"Early Pre-B"}
    assert sum(row["n_images"] for row in metrics["unknown_classes"]) == 2 * 4
    assert {row["interval"] for row in metrics["proportions"] if row["metric"] == "accuracy"} == {"Korn-Graubard (ICC = 1)"}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "has seen 1 of the 13 images" in page and "<script src" not in page and 'href="http' not in page.split("<main>")[0]
    before = (out / "steps/evaluate.json").read_text()
    assert run("evaluate", place / "hospital", *models, "--groups-from", "parent", "--out", out).exit_code == 0
    assert (out / "steps/evaluate.json").read_text() == before, "what is up to date is not executed again"


def test_images_that_the_model_has_seen_are_reported(place, tmp_path):
    model = sorted((place / "models").glob("*.onnx"))[0]
    predict_labelled(labelled_images(place / "hospital", CLASSES, log=silent), [model], tmp_path / "all")
    (table,) = read_evaluation(tmp_path / "all").values()
    (seen,) = table[table["seen"].astype(bool)].itertuples()
    target = tmp_path / "seen" / Path(seen.path).relative_to(place / "hospital")
    target.parent.mkdir(parents=True)
    shutil.copy(seen.path, target)
    done = run("evaluate", tmp_path / "seen", "--model", model, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "has seen 1 of the 1 images" in page and "1 image in the folder seen;" in page and "No groups were given:" in page


def test_groups_of_several_classes_are_given_and_left_out(place, tmp_path):
    """The same patients in every class: the sensitivities are not independent, and no patient has one class."""
    model = sorted((place / "models").glob("*.onnx"))[0]
    for number, label in enumerate((*CLASSES, "Early Pre-B")):
        for patient in range(3):
            write_image(tmp_path / f"in/{label}/P{patient}/x.png", make_smear(label, 50 + 7 * number + patient, 96, 128).image)
    write_image(tmp_path / "in/Normal/Q/x.png", make_smear("Normal", 99, 96, 128).image)
    write_image(tmp_path / "in/Early Pre-B/Q/x.png", make_smear("Early Pre-B", 98, 96, 128).image)
    done = run("evaluate", tmp_path / "in", "--model", model, "--groups-from", "parent", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    page, metrics = (tmp_path / "out/report.html").read_text(), json.loads((tmp_path / "out/metrics.json").read_text())
    assert "every group that was given has images of more than one class" in page and "No groups were given" not in page
    accuracy, balanced = metrics["proportions"][:2]
    assert accuracy["groups"] == balanced["groups"] == 4 and balanced["low"] is None and accuracy["low"] is not None
    assert metrics["by_group"] == [] and metrics["selective"][0]["low"] == pytest.approx(accuracy_bounds(accuracy)[0], abs=1e-6)


def accuracy_bounds(row):
    """Interval of the error rate, from that of the accuracy."""
    return 1 - row["high"], 1 - row["low"]


def test_finished_predictions_are_kept_until_something_changes(place, tmp_path, monkeypatch):
    folder, model = tmp_path / "hospital", sorted((place / "models").glob("*.onnx"))[0]
    shutil.copytree(place / "hospital", folder)
    images, calls = labelled_images(folder, CLASSES, log=silent), []
    predict = batch._predict_batch
    monkeypatch.setattr(batch, "_predict_batch", lambda task, paths: calls.extend(paths) or predict(task, paths))
    predict_labelled(images, [model], tmp_path / "out")
    assert len(calls) == len(images)
    predict_labelled(images, [model], tmp_path / "out")
    assert len(calls) == len(images), "also with an image that cannot be read"
    write_image(images["path"][0], make_smear("Pro-B", 5, 96, 128).image)
    predict_labelled(images, [model], tmp_path / "out")
    assert len(calls) == 2 * len(images)


def test_classes_are_folders_and_none_is_lost(tmp_path):
    smear = make_smear("Normal", 1, 96, 128).image
    names = ["Benign/1.png", "set/[Malignant] Pre-B/p 1/2.png", "hairy cells/p 1/3.png", "loose.png"]
    for number, name in enumerate(names):
        write_image(tmp_path / name, np.roll(smear, 9 * number, axis=1))
    found = labelled_images(tmp_path, CLASSES, "parent", log=silent).set_index("path")
    labels = {Path(path).name: (row["class"], row["group"]) for path, row in found.iterrows()}
    assert labels == {"1.png": ("Normal", ""), "2.png": ("Pre-B", "p 1"), "3.png": ("hairy cells", "p 1"), "loose.png": ("", "")}
    assert "lies in no folder of a class" in found["problem"][found["class"] == ""].item()
    with pytest.raises(
        ImageError,
        match="no image in a folder of a class that the model knows .all, hem.; classes here: Benign, hairy cells, set",
    ):
        labelled_images(tmp_path, ["all", "hem"], log=silent)


def test_copies_are_one_group_and_no_image_has_two_classes(place, tmp_path):
    model = sorted((place / "models").glob("*.onnx"))[0]
    for number, label in enumerate(CLASSES):
        write_image(tmp_path / "in" / label / "1.png", make_smear(label, 40 + number, 192, 256).image)
    image = read_image(tmp_path / "in/Normal/1.png")
    write_image(tmp_path / "in/Normal/flipped.jpg", np.ascontiguousarray(image[:, ::-1]))
    shutil.copy(tmp_path / "in/Pre-B/1.png", tmp_path / "in/Pro-B/again.png")
    images = predict_labelled(labelled_images(tmp_path / "in", CLASSES, log=silent), [model], tmp_path / "out").set_index("pair")
    assert images.loc["Normal/1", "group"] == images.loc["Normal/flipped", "group"]
    assert images.index[images["problem"] != ""].tolist() == ["Pre-B/1", "Pro-B/again"]
    (table,) = read_evaluation(tmp_path / "out").values()
    assert table["subset"].value_counts().to_dict() == {"test": 3, "problem": 2}


def test_files_without_fingerprints_open_and_say_so(place, tmp_path):
    import onnx

    file = sorted((place / "models").glob("*.onnx"))[0]
    _, info, constants = open_model_file(file)
    constants.pop("fingerprints")
    network = onnx.load(file)
    write_model_file(tmp_path / "old.onnx", network, {k: v for k, v in info.items() if k != "sha256"}, constants)
    images = labelled_images(place / "hospital", CLASSES, log=silent)
    predict_labelled(images, [tmp_path / "old.onnx"], tmp_path / "out")
    assert json.loads((tmp_path / "out/models.json").read_text())["models"][0]["fingerprints"] == 0
    (table,) = read_evaluation(tmp_path / "out").values()
    assert not table["seen"].any()


@pytest.mark.parametrize("change", ["resized", "compressed", "flipped", "turned", "same"])
def test_fingerprints_find_copies_and_nothing_else(change, tmp_path):
    import cv2

    known = [make_smear(label, seed, 192, 256).image for seed, label in enumerate(CLASSES * 5)]
    image = known[4]
    changed = {
        "resized": cv2.resize(image, (512, 384)),
        "compressed": cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 30])[1], 1),
        "flipped": image[::-1],
        "turned": np.rot90(image),
        "same": image,
    }[change]
    fingerprints, number = image_fingerprints([*known, np.ascontiguousarray(changed)]), np.arange(len(known) + 1)
    found = has_similar_fingerprint(fingerprints, fingerprints, (number, number))
    assert np.flatnonzero(found).tolist() == [4, len(known)]
    flat = image_fingerprints([np.zeros((32, 32, 3), np.uint8)])
    assert not has_similar_fingerprint(flat, flat).any(), "flat images are like nothing"


def test_images_that_are_alike_are_no_copies(place, tmp_path):
    """Crops of single cells: a disc in the middle of each, with another texture."""
    disc = np.hypot(*np.mgrid[-60:60, -60:60]).clip(0, 45)
    for number in range(6):
        texture = np.random.default_rng(number).normal(0, 30, (15, 15, 1)).repeat(8, 0).repeat(8, 1)
        crop = np.clip(40 + 4 * disc[..., None] + texture * (disc < 40)[..., None], 0, 255).astype(np.uint8).repeat(3, axis=2)
        write_image(tmp_path / "crops" / CLASSES[number % 2] / f"{number}.png", crop)
    write_image(tmp_path / "crops" / CLASSES[1] / "copy.png", crop[::-1])
    images = labelled_images(tmp_path / "crops", CLASSES, log=silent)
    found = predict_labelled(images, sorted((place / "models").glob("*.onnx"))[:1], tmp_path / "out")
    fingerprints, number = image_fingerprints(images["path"]), np.arange(len(images))
    assert has_similar_fingerprint(fingerprints, fingerprints, (number, number)).all(), "they are alike by fingerprints"
    assert (found["problem"] == "").all() and found["group"].nunique() == 6 and found["ambiguous"].all()


def test_a_model_that_knows_no_class_of_the_images_is_named(place, tmp_path):
    import onnx

    from leukemia_nb.models.interface import ModelError
    from leukemia_nb.testing import dummy_model_file

    known = sorted((place / "models").glob("*.onnx"))[0]
    other = dummy_model_file(tmp_path / "other.onnx", classes=("Pre-B", "Pro-B"), smears=2)
    write_image(tmp_path / "images/Normal/a.png", make_smear("Normal", 1, 96, 128).image)
    images = labelled_images(tmp_path / "images", CLASSES, log=silent)
    with pytest.raises(ModelError, match="other.onnx: knows Pre-B, Pro-B; the images are Normal. Leave it out"):
        predict_labelled(images, [known, other], tmp_path / "out")
    for name in ("MobileNetV2", "mobilenet_v2"):
        shutil.copy(known, tmp_path / f"{name}.onnx")
    predict_labelled(images, [tmp_path / "MobileNetV2.onnx", tmp_path / "mobilenet_v2.onnx"], tmp_path / "out")
    assert list(read_evaluation(tmp_path / "out")) == ["MobileNetV2", "MobileNetV2-2"]
    _, info, constants = open_model_file(known)
    info = {key: value for key, value in info.items() if key != "sha256"} | {"classes": ["Normal", "PreB", "ProB"]}
    write_model_file(tmp_path / "spelled.onnx", onnx.load(known), info, constants)
    done = run(
        "evaluate", tmp_path / "images", "--model", known, "--model", tmp_path / "spelled.onnx", "--out", tmp_path / "none"
    )
    assert done.exit_code == 1 and "spell a class differently are evaluated one by one" in str(done.exception)


def test_the_table_of_the_groups_is_not_overwritten(place, tmp_path):
    model = sorted((place / "models").glob("*.onnx"))[0]
    images = sorted((place / "hospital/Normal").rglob("*.png"))[:2]
    for name, out in (("s.csv", "s.csv"), ("q_by_group.csv", "q.csv")):
        table = tmp_path / name
        table.write_text("path,group\n" + "".join(f"{path},P1\n" for path in images))
        before = table.read_text()
        done = run("predict", *images, "--model", model, "--out", tmp_path / out, "--by", table)
        assert done.exit_code == 1 and "is the table of the groups" in str(done.exception) and table.read_text() == before


def test_proportions_by_group_and_by_image():
    table = dummy_predictions(0.9)
    alone, grouped = proportions_table(table), proportions_table(table, {pair: pair[:-1] for pair in table["pair"]})
    accuracy = alone.iloc[0]
    assert (accuracy["low"], accuracy["high"]) == pytest.approx(clopper_pearson(accuracy["n_correct"], accuracy["n_images"]))
    assert (grouped["high"] - grouped["low"] >= alone["high"] - alone["low"] - 1e-9).all() and (
        grouped["groups"] < alone["groups"]
    ).all()
    one = proportions_table(table[table["class"] == "Pre-B"]).set_index(["metric", "class"])
    assert one["estimate"].isna().sum() == 2 + 1 == (one["n_images"] == 0).sum()
    row = one.loc[("balanced accuracy", "")]
    assert row[["estimate", "low", "high"]].tolist() == pytest.approx(
        one.loc[("sensitivity", "Pre-B"), ["estimate", "low", "high"]].tolist()
    )


def test_a_group_is_predicted_from_the_images_that_are_accepted():
    table = pd.DataFrame(
        {
            "predicted": ["A", "A", "B", "B", ""],
            "p_A": [0.9, 0.7, 0.4, 0.1, np.nan],
            "p_B": [0.1, 0.3, 0.6, 0.9, np.nan],
            "confidence": [0.9, 0.7, 0.6, 0.9, np.nan],
            "abstains": [False, False, False, True, True],
        }
    )
    found = predictions_by_group(table, ["one", "one", "one", "two", "one"]).set_index("group")
    assert found.loc["one", ["predicted", "n_images", "n_predicted", "n_agree", "n_abstained", "n_unreadable"]].tolist() == [
        *("A", 4, 3, 2, 0, 1)
    ]
    assert found.loc["one", "confidence"] == pytest.approx(2 / 3, abs=1e-6)
    assert found.loc["two", ["predicted", "n_abstained"]].tolist() == ["", 1]


def test_predict_by_folder(place, tmp_path):
    model = sorted((place / "models").glob("*.onnx"))[0]
    done = run("predict", place / "hospital", "--model", model, "--out", tmp_path / "p.csv", "--by", "folder")
    assert done.exit_code == 1, "an image is cut off"
    found, table = read_table(tmp_path / "p_by_group.csv"), read_table(tmp_path / "p.csv")
    assert found["n_images"].sum() == len(table) and found["n_unreadable"].sum() == 1
    assert set(found["group"]) == {os.path.dirname(path) for path in table["path"]}
    assert "--by needs a table" in run("predict", place / "hospital", "--model", model, "--by", "folder").output
    listed = tmp_path / "patients.csv"
    pd.DataFrame({"path": table["path"][:6], "patient": ["x", "y"] * 3}).to_csv(listed, index=False)
    run("predict", place / "hospital", "--model", model, "--out", tmp_path / "q.csv", "--by", listed)
    assert {"x", "y"} < set(read_table(tmp_path / "q_by_group.csv")["group"])


def test_coverage_counts_only_known_classes(place):
    predictions = read_evaluation(place / "evaluation")
    row = coverage_table(predictions).iloc[0]
    assert row["n_images"] == 13 and row["n_accepted"] == round(row["coverage"] * 13)
    page = error_gallery({"m": next(iter(predictions.values())).assign(predicted="Pro-B", confidence=0.5)}, max_images=2)
    assert page.count("<figure>") == 2 and "more misclassified images" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no such folder"),
        (["{place}/hospital", "--groups-from", "slide"], "--groups-from parent"),
        (["{place}/models"], "no image in a folder of a class"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_words(arguments, message, place, tmp_path):
    model = sorted((place / "models").glob("*.onnx"))[0]
    given = [word.format(place=place) for word in arguments]
    done = run("evaluate", *given, "--model", model, "--out", tmp_path / "out")
    text = done.output + str(done.exception)
    assert done.exit_code and message in " ".join(text.split()) and not (tmp_path / "out").exists()


def test_a_class_map_renames_and_leaves_out(tmp_path):
    for name in ("Healthy/1.png", "Blurred/2.png", "Other/3.png", "Pro/4.png"):
        write_image(tmp_path / "in" / name, make_smear("Normal", 1, 96, 128).image)
    text = 'exclude = ["Blurred"]\n[classes.Normal]\nfolders = ["Healthy"]\n[classes.Pro-B]\nfolders = ["Pro"]\n'
    (tmp_path / "map.toml").write_text(text)
    lines = []
    found = labelled_images(tmp_path / "in", CLASSES, class_map=tmp_path / "map.toml", log=lines.append)
    assert found["class"].tolist() == ["Normal", "Other", "Pro-B"] and "1 in folders that the class map leaves out" in lines
    with pytest.raises(SplitError, match="no folders below those of the classes"):
        labelled_images(tmp_path / "in", CLASSES, "parent", log=silent)


def test_missing_packages_are_named_before_any_prediction(place, tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "papermill" else find(name, *more))
    model = sorted((place / "models").glob("*.onnx"))[0]
    done = run("evaluate", place / "hospital", "--model", model, "--out", tmp_path / "out")
    assert "not installed: papermill" in str(done.exception) and not (tmp_path / "out").exists()
