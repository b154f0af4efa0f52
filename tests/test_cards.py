"""Cards and checklists: every number is from a file of the run, and what is missing is named."""

import json
import re
import shutil

import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from leukemia_nb.study.cards import (
    ITEMS,
    MADE_BY,
    OWN,
    SYNTHETIC,
    TALEQANI,
    Item,
    MissingResultError,
    accuracy_text,
    class_text,
    data_set,
    disjoint_answer,
    division_text,
    external_answer,
    failures_answer,
    filled_in,
    how_to_load,
    known_limits,
    licence_text,
    limits_statement,
    dummy_measurements,
    markdown_table,
    model_card,
    model_details,
    reporting_blocks,
    reporting_items,
    results_answer,
    robustness_text,
    run_table,
    share_text,
    trained_models,
    training_run,
    accuracy_without_near_duplicates,
    verdict,
    what_it_follows,
    write_cards,
)
from leukemia_nb.data.files import read_table, write_table
from leukemia_nb.evaluation.metrics import read_predictions, write_predictions
from leukemia_nb.study.report import SECTIONS, build_report, dummy_run, write_section
from leukemia_nb.study.driver import StudySettings, study_steps


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cards") / "made-up"
    dummy_run(folder)
    dummy_measurements(folder)
    return folder


@pytest.fixture
def run(made, tmp_path):
    "A copy that a test may change."
    return shutil.copytree(made, tmp_path / "run", ignore=shutil.ignore_patterns("pairs"))


def change(run, name, model, **values):
    table = read_table(run / "metrics" / name)
    for column, value in values.items():
        table[column] = table[column].astype(object)
        table.loc[table["model"] == model, column] = value
    write_table(run / "metrics" / name, table)


def test_an_empty_run_gives_no_result_and_names_the_steps(tmp_path):
    card = model_card(tmp_path, "yolo11")
    assert "%" not in card and "model-index" not in card
    for step in ("train", "split", "compare", "worth"):
        assert f"*{step}*" in card
    with pytest.raises(MissingResultError, match=r"`metrics/cross_validation.csv` is written by the step \*cross-validate\*"):
        run_table(tmp_path, "metrics/cross_validation.csv")


def test_every_step_that_is_named_is_a_step_of_the_study(tmp_path):
    steps = study_steps(StudySettings())
    names = {step.name for step in steps} | {step.name.split("-")[0] for step in steps}
    assert set(MADE_BY.values()) <= names
    writes = {output: step.name for step in steps for output in step.outputs}
    for name, step in MADE_BY.items():
        if name in writes:
            assert writes[name] == step


def test_a_file_of_another_model_is_not_taken(run):
    with pytest.raises(MissingResultError, match=r"has no row for Cell-centred \(ours\)"):
        run_table(run, "metrics/models.csv", "cells")


def test_numbers_are_those_of_the_files(run):
    change(run, "models.csv", "yolov8", right=90, images=97)
    change(run, "grouped_accuracy.csv", "yolov8", grouped_low=0.123, grouped_high=0.987)
    card = model_card(run, "yolov8")
    assert share_text(90, 97) in card and "95 % CI 12.3% to 98.7%, Clopper-Pearson on effective groups" in card
    assert "111 of 111" not in accuracy_text(run, "yolov8")


def test_collapsed_model_is_called_that(run):
    assert "It has collapsed" in accuracy_text(run, "efficientnet_b0")
    assert "collapsed" not in accuracy_text(run, "yolov8")


def test_first_lines_are_yaml_with_the_fields_of_hugging_face(run):
    fields = yaml.safe_load(model_card(run, "yolo12").split("---")[1])
    result = fields["model-index"][0]["results"][0]
    assert fields["license"] == "agpl-3.0" and fields["pipeline_tag"] == "image-classification"
    assert result["dataset"]["split"] == "test" and result["metrics"][0]["value"] == 1.0
    other = yaml.safe_load(model_card(run, "mobilenet_v2").split("---")[1])
    assert other["license"] == "other" and other["library_name"] == "keras"


def test_licences(run):
    for model in ("yolov8", "yolo11", "yolo12"):
        assert licence_text(run, model).startswith("AGPL-3.0")
    assert "ImageNet" in licence_text(run, "mobilenet_v2") and "ImageNet" not in licence_text(run, "cells")


def test_random_weights_are_told(run):
    record = run / "models" / "yolo12" / "model.json"
    assert "Random weights" in known_limits(run, "yolo12") and "random initialisation" in model_details(run, "yolo12")
    record.write_text(json.dumps({"weights_source": "ImageNet classifier (a.pt)"}))
    assert "Random weights" not in known_limits(run, "yolo12")


def test_best_epoch_is_the_recorded_one_or_the_lowest_loss(run):
    history = read_table(run / "models" / "yolo11" / "history.csv")
    lowest = int(history.loc[history["val_loss"].idxmin(), "epoch"])
    assert f"kept: epoch {lowest}," in training_run(run, "yolo11")
    (run / "models" / "yolo11" / "model.json").write_text(json.dumps({"best_epoch": 2}))
    assert "kept: epoch 2," in training_run(run, "yolo11")


@pytest.mark.parametrize(
    ("source", "settings", "said"),
    [
        ("ImageNet (mobilenet.h5, values as known)", {"fine_tune": None}, "the backbone is frozen"),
        ("ImageNet (mobilenet.h5, values as known)", {"fine_tune": True}, "the whole network"),
        ("random initialisation", {"fine_tune": None}, "the whole network"),
    ],
)
def test_what_was_trained(run, source, settings, said):
    (run / "models" / "mobilenet_v2" / "model.json").write_text(json.dumps({"weights_source": source, "settings": settings}))
    assert said in training_run(run, "mobilenet_v2")


def follow(run, cells, other, n=200):
    rows = [
        dict(kind="swap", follows=who, n=n, count=count, share=count / n, low=low, high=high, model="yolo11", title="YOLO11")
        for who, (count, low, high) in {"cells": cells, "other": other, "neither": (0, 0, 0)}.items()
    ]
    write_table(run / "metrics" / "follow.csv", pd.DataFrame(rows))
    return verdict(run, "yolo11")


def test_verdict_goes_no_further_than_the_intervals(run):
    assert follow(run, (150, 0.7, 0.8), (40, 0.15, 0.25)).startswith("It follows the cells more often")
    assert follow(run, (40, 0.15, 0.25), (150, 0.7, 0.8)).startswith("It follows the background more often")
    assert follow(run, (101, 0.43, 0.58), (84, 0.35, 0.49)).startswith("Whether cells or background weigh more cannot be told")


def test_the_cell_model_is_not_praised_for_what_it_is_built_to_do(run):
    table = read_table(run / "metrics" / "follow.csv")
    write_table(run / "metrics" / "follow.csv", table[table["model"] == "yolo11"].assign(model="cells"))
    assert "by construction" in verdict(run, "cells")


def test_relatives_in_training_are_left_out(run):
    test = read_predictions(run / "predictions" / "mobilenet_v2.csv").query("subset == 'test'").reset_index(drop=True)
    split = test[["pair", "class"]].assign(sha256="0", subset="test", related=range(len(test)))
    seen = split.head(40).assign(subset="train", pair="other " + split["pair"].head(40))
    write_table(run / "split.csv", pd.concat([split, seen]))
    right, n = accuracy_without_near_duplicates(run, "mobilenet_v2")
    assert n == len(test) - 40
    probabilities = test[["p_Normal", "p_Pre-B", "p_Pro-B"]].to_numpy().argmax(axis=1)[40:]
    assert right == (pd.Series(["Normal", "Pre-B", "Pro-B"])[probabilities].to_numpy() == test["class"][40:].to_numpy()).sum()


@given(st.lists(st.text("ab|\\ ", max_size=5), min_size=1, max_size=4))
def test_bars_do_not_break_a_table(texts):
    lines = markdown_table(pd.DataFrame({"a": texts, "b": 1})).split("\n")
    assert len(lines) == 2 + len(texts)
    assert all(len(re.findall(r"(?<!\\)\|", line)) >= 3 for line in lines)


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["C:\\data\\Benign\\WBC-Benign-001.jpg", "C:\\data\\Pro\\WBC-Malignant-Pro-038.JPG"], TALEQANI),
        (["/d/[Malignant] Pre-B/Snap_001.jpg", "/d/Benign/Sap_013 (1).jpg"], TALEQANI),
        (["/d/Normal/a.png", "/d/Pre-B/b.png"], OWN),
    ],
)
def test_images_are_known_by_their_names(tmp_path, paths, expected):
    write_table(tmp_path / "manifest.csv", pd.DataFrame({"path": paths}))
    assert data_set(tmp_path) is expected


def test_the_public_images_are_recognised(shared_data, tmp_path):
    paths = [str(path) for path in (shared_data / "taleqani").rglob("*.jpg")]
    write_table(tmp_path / "manifest.csv", pd.DataFrame({"path": paths}))
    assert len(paths) > 2000 and data_set(tmp_path) is TALEQANI


def test_division_is_told_as_it_was(run):
    study = json.loads((run / "study.json").read_text())
    assert "image by image" in division_text(run) and "images and exact copies" in disjoint_answer(run)
    (run / "study.json").write_text(json.dumps(study | {"split": "grouped"}))
    assert "no group is in two subsets" in division_text(run) and "groups of related images" in disjoint_answer(run)
    (run / "study.json").write_text(json.dumps(study | {"split_file": "a.csv"}))
    assert "earlier study" in division_text(run)


def test_items_point_to_sections_and_files_that_exist(run):
    write_cards(run, trained_models(run))
    titles = {title for title, _ in SECTIONS} | {
        "What is this accuracy worth?",
        "Reporting and limits",
        "How to reproduce this",
        "top of the page",
        "",
    }
    assert {item.where for item in ITEMS} - titles == {"cards/", "predictions/"}
    assert (run / "cards").is_dir() and (run / "predictions").is_dir()


def test_topics_are_named_once():
    assert len({item.topic for item in ITEMS}) == len(ITEMS)


def test_status_is_what_the_answer_begins_with(run):
    row = filled_in(Item("x", "1", "", "In part: some."), run)
    assert (row["Status"], row["Answer"]) == ("In part", "Some.")
    assert filled_in(Item("x", "1", "", "All of it."), run)["Status"] == "Answered"


def test_what_cannot_be_known_is_not_claimed(run):
    items = reporting_items(run).set_index("Topic")
    for topic in ("Dates", "Who was taken in", "Setting and centres", "Blinding", "Funding", "Ethics"):
        assert items.loc[topic, "Status"] == "Not known", topic
    for topic in ("External testing", "Sample size", "Fairness", "Registration", "Patients and public"):
        assert items.loc[topic, "Status"] == "Not done", topic


def test_drawings_have_no_patients(run):
    (run / "study.json").write_text(json.dumps(json.loads((run / "study.json").read_text()) | {"data": ""}))
    assert data_set(run) is SYNTHETIC
    items = reporting_items(run).set_index("Topic")
    for topic in ("Treatment", "Ethics", "Blinding", "Who is in each subset", "Fairness"):
        assert items.loc[topic, "Status"] == "Does not apply", topic
    assert "hematogone" not in model_card(run, "yolo11")


def test_missing_measurements_make_the_item_open(run):
    (run / "metrics" / "models.csv").unlink()
    items = reporting_items(run).set_index("Topic")
    assert items.loc["Performance", "Status"] == "Not in this run" and "*compare*" in items.loc["Performance", "Answer"]
    assert "`metrics/follow.csv`" not in limits_statement(run)
    (run / "metrics" / "follow.csv").unlink()
    assert "`metrics/follow.csv` is written by the step *worth*" in limits_statement(run)


def test_lowest_and_highest_are(run):
    text = results_answer(run)
    assert text.startswith("Lowest: EfficientNet-B0 39 of 111") and "Highest: YOLO12 111 of 111" in text


def test_wrong_answers_are_counted_by_image(run):
    for model in trained_models(run):
        table = read_predictions(run / "predictions" / f"{model}.csv")
        sure = table.assign(**{f"p_{name}": (table["class"] == name).astype(float) for name in ("Normal", "Pre-B", "Pro-B")})
        if model == "yolo11":
            sure.loc[sure["pair"] == "Pro-B/test_001", ["p_Normal", "p_Pro-B"]] = [1.0, 0.0]
        write_predictions(sure, run / "predictions" / f"{model}.csv")
    assert "1 of 111 test images are wrong" in failures_answer(run) and "one of them for 1;" in failures_answer(run)
    assert "test_001" not in failures_answer(run)


def test_a_study_of_one_model(run):
    for file in (run / "predictions").glob("*.csv"):
        if file.stem != "yolo11":
            file.unlink()
    for name in ("models", "grouped_accuracy", "classes", "calibration", "follow", "robustness"):
        table = read_table(run / "metrics" / f"{name}.csv")
        write_table(run / "metrics" / f"{name}.csv", table[table["model"] == "yolo11"])
    (run / "metrics" / "pairs_of_models.csv").unlink()
    items = reporting_items(run).set_index("Topic")
    assert items.loc["Uncertainty", "Status"] == "Answered" and "Lowest" not in items.loc["Performance", "Answer"]


def test_the_report_takes_the_section(run):
    write_section(run, "70_reporting", "Reporting and limits", reporting_blocks(run, trained_models(run)))
    page = build_report(run).read_text()
    assert "Reporting and limits" in page and "e078378" in page and "e240300" in page
    for item in ITEMS:
        assert f"<td>{item.topic}</td>" in page
    saved = read_table(run / "metrics" / "reporting_items.csv")
    assert len(saved) == len(ITEMS) and saved["Answer"].notna().all()


def test_every_interval_names_its_method(run):
    """In cards, limits and items: wherever two percentages stand as an interval, the method is in the same sentence or the head."""
    texts = [model_card(run, "mobilenet_v2"), limits_statement(run), *reporting_items(run)["Answer"]]
    bounds = re.compile(r"\d% to [\d.]+%(?P<after>[^)\n]*)")
    for text in texts:
        for found in bounds.finditer(text):
            line = text[text.rfind("\n", 0, found.start()) + 1 : text.find("\n", found.end())]
            if line.startswith("|"):  # a table: its head, or the sentence below it
                continue
            assert "Clopper-Pearson" in found["after"] or "sensitivity" in line, line
    for part in (class_text(run, "mobilenet_v2"), what_it_follows(run, "mobilenet_v2"), robustness_text(run, "mobilenet_v2")):
        assert "Clopper-Pearson" in part


def test_calibrated_is_said_only_where_a_temperature_was_fitted(run):
    told = {name: how_to_load(run, name) for name in trained_models(run)}
    table = read_table(run / "metrics" / "calibration.csv").set_index("model")
    for name, text in told.items():
        fitted = not table.loc[name, "note"] if isinstance(table.loc[name, "note"], str) else True
        assert ("have the temperature applied" in text) == fitted and ("are not calibrated" in text) != fitted
    assert {"have the" in text for text in told.values()} == {True, False}  # both are tried
    write_table(run / "metrics" / "calibration.csv", table.reset_index().drop(columns=["temperature", "note"]))
    assert "not calibrated: there are no validation images" in how_to_load(run, "nasnet_mobile")


def test_items_say_what_the_project_does(run):
    items = reporting_items(run).set_index("Topic")["Answer"]
    assert "blurred" not in items["Poor or missing input"] and "No diagram" not in items["Flow of images"]
    assert "Flow of the images" in build_report(run).read_text(encoding="utf-8")  # the diagram that the item names
    assert "metadata is not read" not in items["De-identification"]
    assert "YOLOv8" in items["How predictors were handled"] and "backbone" in items["How predictors were handled"]
    for file in (run / "predictions").glob("*.csv"):
        if file.stem != "yolo11":
            file.unlink()
    items = reporting_items(run).set_index("Topic")["Answer"]
    assert "backbone" not in items["How predictors were handled"]  # no network of Keras in this run


def test_new_images_with_classes_are_not_passed_over(run):
    study = json.loads((run / "study.json").read_text())
    assert external_answer(run).startswith("Not done")
    (run / "study.json").write_text(json.dumps(study | {"unseen": "/somewhere"}))
    assert external_answer(run).startswith("In part: 6 of 6 new images")


def test_nothing_is_called_a_diagnosis(run):
    texts = [model_card(run, "yolo11"), limits_statement(run), *reporting_items(run)["Answer"]]
    for text in texts:
        for place in re.finditer("diagnos", text):
            assert re.search(r"\b(no|not|No answer)\b", text[max(0, place.start() - 60) : place.start()]), text[
                place.start() - 60 :
            ]
