"""Cards and checklist: every figure is that of the files, what is missing is named, nothing is claimed that is not known."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import PurePosixPath

import pandas as pd
import pytest
import yaml

from leukemia_nb.data.files import file_sha256, read_json, read_table, write_table
from leukemia_nb.models.interface import MODELS
from leukemia_nb.study.cards import (
    MissingResultError,
    _Results,
    _model_card,
    render,
    reporting_items,
    write_cards,
    write_croissant,
)
from leukemia_nb.study.driver import _section_steps
from leukemia_nb.audit.saliency import saliency_summary
from leukemia_nb.testing import dummy_dataset, dummy_run

STATEMENT = '{% import "statements.md.j2" as statements with context %}{% call part() %}{{ statements.'


def state(run, statement, *arguments):
    """One statement of a run, as in cards and checklist, in one line."""
    call = f"{statement}({', '.join(map(repr, arguments))})"
    return " ".join(render(STATEMENT + call + " }}{% endcall %}", run).split())


def fact(run, expression):
    """The value of an expression in a template."""
    return render("{% call part() %}{{ " + expression + " }}{% endcall %}", run)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return dummy_run(tmp_path_factory.mktemp("cards") / "run")


@pytest.fixture
def run(made, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(made, tmp_path / "run")


def change(run, name, model, **values):
    """Set columns of a model's rows in a table of metrics."""
    table = read_table(run / "metrics" / name)
    for column, value in values.items():
        table[column] = table[column].astype(object)
        table.loc[table["model"] == model, column] = value
    write_table(run / "metrics" / name, table)


def test_an_empty_run_gives_no_result_and_names_the_steps(tmp_path):
    card = _model_card(tmp_path, "yolo11")
    assert "%" not in re.sub("95 %|85 %|5 %", "", card) and "model-index" not in card
    for step in ("train", "split", "compare", "shortcut-audit"):
        assert f"*{step}" in card, step
    with pytest.raises(MissingResultError, match=r"`metrics/cross_validation.csv` is written by the step \*cross-validate\*"):
        _Results(tmp_path).table("metrics/cross_validation.csv")


def test_a_file_without_the_model_is_not_taken(run):
    with pytest.raises(MissingResultError, match="has no row for Single-cell"):
        _Results(run).table("metrics/models.csv", "cells")


def test_figures_are_those_of_the_files(run):
    change(run, "models.csv", "yolov8", n_correct=90, n_images=97)
    change(run, "grouped_accuracy.csv", "yolov8", grouped_low=0.123, grouped_high=0.987, groups=55)
    card = " ".join(_model_card(run, "yolov8").split())
    assert "**Test accuracy:** 92.8 % (95 % CI 85.7–97.0; 90/97)." in card
    assert "(55 groups): 100.0 % (95 % CI 12.3–98.7, Korn-Graubard (ICC = 1))" in card
    assert "40 of 111 test images show" in card and "144/200" in card


def test_the_tables_of_the_dummy_run_agree(run):
    split, leakage = read_table(run / "split.csv"), read_table(run / "leakage.csv").set_index("subset")
    seen = split.loc[split["subset"] == "train", "group"]
    assert (split[split["subset"] == "test"]["group"].isin(seen).sum(), leakage.loc["test", "near_duplicates"]) == (40, 40)
    for file in (run / "predictions").glob("*.csv"):
        assert set(read_table(file)["pair"]) == set(split.loc[split["subset"] != "train", "pair"])
    card = " ".join(_model_card(run, "yolo11").split())
    assert "; 71/71)" in card and "(91 groups)" in card and "with 36 flipped copies" in card


def test_a_constant_predictor_is_called_that(run):
    assert "**Constant predictor:** it predicts Pro-B for every image" in state(run, "accuracy", "efficientnet_b0")
    assert "Constant predictor" not in state(run, "accuracy", "yolov8")


def test_first_lines_are_yaml_with_the_fields_of_hugging_face(run):
    fields = yaml.safe_load(_model_card(run, "yolo12").split("---")[1])
    result = fields["model-index"][0]["results"][0]
    assert fields["license"] == "agpl-3.0" and fields["library_name"] == "ultralytics"
    assert result["dataset"]["split"] == "test"
    assert result["metrics"][0] == {"type": "accuracy", "value": 1.0, "name": "Accuracy 100.0 % (95 % CI 96.7–100.0; 111/111)"}
    table = read_table(run / "metrics" / "models.csv").set_index("model").loc["yolo12"]
    values = {each["type"]: each["value"] for each in result["metrics"]}
    assert values == {"accuracy": table["accuracy"], "balanced_accuracy": table["balanced_accuracy"]} | {
        "f1": table["macro_f1"],
        "roc_auc": table["auc"],
    }
    assert set(fields["metrics"]) == set(values)
    alone = fields["model-index"][0]["results"][1]
    assert alone["dataset"]["config"] == "without near-duplicates in training" and "71/71" in alone["metrics"][0]["name"]
    other = yaml.safe_load(_model_card(run, "mobilenet_v2").split("---")[1])
    assert (other["license"], other["library_name"]) == ("other", "keras")


def test_hugging_faces_own_library_reads_the_card(run):
    """Required fields of the documented schema; and their library, where it is installed."""
    content = _model_card(run, "mobilenet_v2")
    for result in yaml.safe_load(content.split("---")[1])["model-index"][0]["results"]:
        assert {"type"} <= result["task"].keys() and {"type", "name"} <= result["dataset"].keys()
        assert all({"type", "value"} <= metric.keys() and isinstance(metric["value"], float) for metric in result["metrics"])
    hub = pytest.importorskip("huggingface_hub")
    data = hub.ModelCard(content).data
    found = [(each.metric_type, each.metric_value, each.dataset_config) for each in data.eval_results]
    assert data.pipeline_tag == data.eval_results[0].task_type == "image-classification" and len(found) == len(set(found)) == 5


@pytest.fixture
def run_with_images(run):
    """The run with a dataset folder as the step *split* writes it."""
    (run / "dataset.csv").unlink()
    table = read_table(f"{dummy_dataset(run / 'dataset', per_class=4, size=16)}.csv").drop_duplicates("pair")
    split = table[["pair", "class", "subset"]].assign(path="a.png", sha256="0" * 64, group=range(len(table)))
    write_table(run / "split.csv", split[["pair", "class", "path", "sha256", "subset", "group"]])
    return run


def test_croissant_describes_every_column_file_class_and_subset(run_with_images):
    run = run_with_images
    split, dataset = read_table(run / "split.csv"), read_table(run / "dataset.csv")
    content = read_json(write_croissant(run))
    sets = {each["name"]: each for each in content["recordSet"]}
    for name, table in {"split": split, "dataset": dataset}.items():
        assert [field["source"]["extract"]["column"] for field in sets[name]["field"]] == table.columns.tolist()
    assert {each["classes/name"] for each in sets["classes"]["data"]} == set(split["class"])
    assert {each["subsets/name"] for each in sets["subsets"]["data"]} == set(split["subset"])
    files = {each["@id"]: each for each in content["distribution"]}
    assert all(files[name]["sha256"] == file_sha256(run / files[name]["contentUrl"]) for name in ("split.csv", "dataset.csv"))
    for channel in ("original", "segmented", "cells"):
        paths = ("dataset/" + dataset[channel]).tolist()
        assert all(PurePosixPath(path).match(files[f"{channel}-images"]["includes"]) for path in paths)
        for field in sets[channel]["field"][2:]:
            found = [re.match(field["source"]["transform"]["regex"], path)[1] for path in paths]
            assert found == dataset[field["name"]].tolist()
    assert (
        content["conformsTo"] == "http://mlcommons.org/croissant/1.0"
        and content["license"]
        and "research only" in content["description"]
    )


def test_the_library_of_croissant_reads_tables_and_images(run_with_images):
    croissant, run = pytest.importorskip("mlcroissant"), run_with_images
    dataset = read_table(run / "dataset.csv")
    loaded = croissant.Dataset(jsonld=str(write_croissant(run)))
    assert not loaded.metadata.issues.errors
    assert sum(1 for _ in loaded.records("split")) == len(read_table(run / "split.csv"))
    records = [(each["original/subset"].decode(), each["original/class"].decode()) for each in loaded.records("original")]
    assert sorted(records) == sorted(zip(dataset["subset"], dataset["class"]))


def test_licences(run):
    for model in ("yolov8", "yolo11", "yolo12"):
        assert state(run, "licence", model).startswith("AGPL-3.0")
    assert "ImageNet" in state(run, "licence", "mobilenet_v2") and "ImageNet" not in state(run, "licence", "cells")


def test_random_initialisation_is_a_limitation(run):
    record = run / "models" / "yolo12" / "model.json"
    assert "Random initialisation" in _model_card(run, "yolo12")
    record.write_text(json.dumps({"weights_source": "ImageNet classifier (a.pt)", "best_epoch": 1}))
    assert "Random initialisation" not in _model_card(run, "yolo12")


def test_the_recorded_epoch_is_that_of_the_card(run):
    history = read_table(run / "models" / "yolo11" / "history.csv")
    history.loc[3, ["val_loss", "val_accuracy"]] = [0.25, 0.625]
    write_table(run / "models" / "yolo11" / "history.csv", history)
    (run / "models" / "yolo11" / "model.json").write_text(json.dumps({"best_epoch": 4}))
    card = " ".join(_model_card(run, "yolo11").split())
    assert "10 of at most 10; the weights of epoch 4 were kept, the one with the highest validation accuracy" in card
    assert "(validation loss 0.2500, validation accuracy 62.5 %)" in card


def test_a_model_without_epochs_or_exporter_has_a_card(run, monkeypatch):
    monkeypatch.setitem(MODELS, "mobilenet_v2", replace(MODELS["mobilenet_v2"], exporter=""))
    table = read_table(run / "models" / "mobilenet_v2" / "history.csv")
    write_table(run / "models" / "mobilenet_v2" / "history.csv", table.iloc[:0])
    card = _model_card(run, "mobilenet_v2")
    assert "none, it is not trained in epochs" in card and "has no exported file" in card


def test_items_of_an_empty_run_are_open(tmp_path):
    status = reporting_items(tmp_path).set_index("Topic")["Status"]
    assert status["Performance"] == status["External testing"] == "Not in this run"


@pytest.mark.parametrize(
    ("foreground", "other_cue", "verdict"),
    [
        ((150, 0.7, 0.8), (40, 0.15, 0.25), "It relies more on the foreground"),
        ((40, 0.15, 0.25), (150, 0.7, 0.8), "It relies more on the background"),
        ((101, 0.43, 0.58), (84, 0.35, 0.49), "The intervals of foreground and background reliance overlap"),
    ],
)
def test_the_verdict_goes_no_further_than_the_intervals(run, foreground, other_cue, verdict):
    rows = [
        dict(kind="mixed_next", cue=cue, n_images=200, count=count, proportion=count / 200, low=low, high=high, title="YOLO11")
        for cue, (count, low, high) in {"foreground": foreground, "other_cue": other_cue, "neither": (0, 0, 0)}.items()
    ]
    write_table(run / "metrics" / "cue_conflict.csv", pd.DataFrame(rows).assign(model="yolo11"))
    assert state(run, "reliance", "yolo11").startswith(verdict)
    write_table(run / "metrics" / "cue_conflict.csv", pd.DataFrame(rows).assign(model="cells"))
    cells = state(run, "reliance", "cells")
    assert "It does not show that the class is predicted from biology" in cells and "95.1 % (95 % CI 91.0–98.0) accuracy" in cells


def test_near_duplicates_in_training_are_left_out(run):
    test = read_table(run / "predictions" / "mobilenet_v2.csv").query("subset == 'test'").reset_index(drop=True)
    split = test[["pair", "class"]].assign(sha256="0", subset="test", group=range(len(test)))
    seen = split.head(40).assign(subset="train", pair="other " + split["pair"].head(40))
    write_table(run / "split.csv", pd.concat([split, seen]))
    predicted = test[["p_Normal", "p_Pre-B", "p_Pro-B"]].to_numpy().argmax(axis=1)[40:]
    correct = (pd.Series(["Normal", "Pre-B", "Pro-B"])[predicted].to_numpy() == test["class"][40:].to_numpy()).sum()
    assert f"; {correct}/71)" in state(run, "without_near_duplicates", "mobilenet_v2")


TALEQANI, OWN, SYNTHETIC = "Taleqani Hospital blood smears", "images of the user's own", "synthetic smears"


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["C:\\data\\Benign\\WBC-Benign-001.jpg", "C:\\data\\Pro\\WBC-Malignant-Pro-038.JPG"], TALEQANI),
        (["[Malignant] Pre-B/Snap_001.jpg", "/d/Benign/Sap_013 (1).jpg"], TALEQANI),
        (["/d/Normal/a.png", "/d/Pre-B/b.png"], OWN),
        ([f"Benign/{i}.jpg" for i in range(8)] + ["x/a.jpg"], OWN),
    ],
)
def test_images_are_known_by_their_names(tmp_path, paths, expected):
    write_table(tmp_path / "manifest.csv", pd.DataFrame({"path": paths}))
    assert fact(tmp_path, "run.data_set.name") == expected


def test_the_public_images_are_recognised(shared_data, tmp_path):
    paths = [str(path) for path in (shared_data / "taleqani").rglob("*.jpg")]
    write_table(tmp_path / "manifest.csv", pd.DataFrame({"path": paths}))
    assert len(paths) > 2000 and fact(tmp_path, "run.data_set.name") == TALEQANI


def test_the_split_is_described_as_it_was(run):
    study = json.loads((run / "study.json").read_text())
    assert "image-level split" in state(run, "division") and "images and exact copies" in state(run, "disjoint")
    (run / "study.json").write_text(json.dumps(study | {"split": "grouped"}))
    assert "no group is in two subsets" in state(run, "division") and "groups of near-duplicates" in state(run, "disjoint")
    (run / "study.json").write_text(json.dumps(study | {"split": "grouped", "groups_from": "parent"}))
    assert "near-duplicates joined with the folders below those of the classes" in state(run, "division")
    (run / "study.json").write_text(json.dumps(study | {"split": "folders"}))
    assert "in which the images were given" in state(run, "division")
    (run / "study.json").write_text(json.dumps(study | {"split_file": "a.csv"}))
    assert "earlier study" in state(run, "division")


def test_items_are_named_once_and_point_to_sections_and_files_that_exist(run):
    items = reporting_items(run)
    assert len(items) == 83 and items["Topic"].is_unique
    titles = {"What is this accuracy worth?", "Reporting and limitations", "How to reproduce this study", "top of the page"}
    titles |= {"The images", "Split", "Compare", "cards/", "predictions/", ""}
    assert set(items["Where"]) <= titles
    assert {"overview", "split", "compare", "shortcut-audit", "cards"} <= set(_section_steps())


def test_what_cannot_be_known_is_not_claimed(run):
    status = reporting_items(run).set_index("Topic")["Status"]
    for topic in ("Dates", "Eligibility", "Setting and centres", "Blinding", "Funding", "Ethics"):
        assert status[topic] == "Not reported", topic
    for topic in ("External testing", "Sample size", "Fairness", "Registration", "Patients and public"):
        assert status[topic] == "Not done", topic
    assert status["Explanations and their check"] == "Not in this run" and status["Performance"] == "Reported"


def test_synthetic_images_have_no_patients(run):
    (run / "study.json").write_text(json.dumps(json.loads((run / "study.json").read_text()) | {"data": ""}))
    assert fact(run, "run.data_set.name") == SYNTHETIC
    status = reporting_items(run).set_index("Topic")["Status"]
    for topic in ("Treatment", "Ethics", "Blinding", "Who is in each subset", "Fairness"):
        assert status[topic] == "Not applicable", topic
    assert "hematogone" not in _model_card(run, "yolo11") and "apache-2.0" in _model_card(run, "mobilenet_v2")


def test_missing_measurements_make_the_item_open(run):
    (run / "metrics" / "models.csv").unlink()
    items = reporting_items(run).set_index("Topic")
    assert items.loc["Performance", "Status"] == "Not in this run" and "*compare*" in items.loc["Performance", "Statement"]
    assert "`metrics/cue_conflict.csv`" not in render("limitations.md.j2", run)
    (run / "metrics" / "cue_conflict.csv").unlink()
    assert "`metrics/cue_conflict.csv` is written by the step *shortcut-audit*" in render("limitations.md.j2", run)


def test_lowest_and_highest_are(run):
    text = state(run, "performance")
    assert text.startswith("Lowest: EfficientNet-B0 35.1 %") and "; 39/111)" in text
    assert "Highest: YOLO12 100.0 %" in text and "; 111/111)" in text


def test_wrong_predictions_are_counted_by_image(run):
    for file in (run / "predictions").glob("*.csv"):
        table = read_table(file)
        table = table.assign(**{f"p_{name}": (table["class"] == name).astype(float) for name in ("Normal", "Pre-B", "Pro-B")})
        if file.stem == "yolo11":
            table.loc[table["pair"] == "Pro-B/Snap_001", ["p_Normal", "p_Pro-B"]] = [1.0, 0.0]
        write_table(file, table)
    text = state(run, "wrong_predictions")
    assert text == "1 of 111 test images are predicted wrong by at least one of 7 models, one of them by 1."


def test_a_study_of_one_model(run):
    for file in (run / "predictions").glob("*.csv"):
        if file.stem != "yolo11":
            file.unlink()
    for name in ("models", "grouped_accuracy", "classes", "calibration", "cue_conflict", "robustness"):
        table = read_table(run / "metrics" / f"{name}.csv")
        write_table(run / "metrics" / f"{name}.csv", table[table["model"] == "yolo11"])
    pairs = read_table(run / "metrics" / "pairs_of_models.csv")
    write_table(run / "metrics" / "pairs_of_models.csv", pairs.head(0))
    items = reporting_items(run).set_index("Topic")
    assert items.loc["Uncertainty", "Status"] == "Reported" and "Highest" not in items.loc["Performance", "Statement"]
    assert "backbone" not in _model_card(run, "yolo11").split("## Evaluation")[1]
    assert "1 model, trained on 132 images" in render("summary.md.j2", run)


def test_calibrated_is_said_only_where_a_temperature_was_fitted(run):
    table = read_table(run / "metrics" / "calibration.csv").set_index("model")
    table["note"], table["temperature"] = table["note"].astype(object), table["temperature"].astype(object)
    table.loc["nasnet_mobile", ["note", "temperature"]] = ["", 1.25]
    table.loc["yolo11", ["note", "temperature"]] = ["at the limit", 0.05]
    write_table(run / "metrics" / "calibration.csv", table.reset_index())
    assert "have the temperature applied (1.25, fitted" in state(run, "exported_calibration", "nasnet_mobile")
    assert "are not calibrated" in state(run, "exported_calibration", "yolo11")
    write_table(run / "metrics" / "calibration.csv", table.reset_index().drop(columns=["temperature", "note"]))
    assert "not calibrated: there are no validation images" in state(run, "exported_calibration", "nasnet_mobile")


def test_new_images_with_classes_are_not_passed_over(run):
    study = json.loads((run / "study.json").read_text())
    assert state(run, "external").startswith("Not done")
    (run / "study.json").write_text(json.dumps(study | {"new_images": "/somewhere"}))
    assert state(run, "external").startswith("Partly reported: 6 of 6 new images")


def test_nothing_is_called_a_diagnosis_and_no_image_is_named(run):
    write_cards(run, ["yolo11"])
    texts = [(run / "cards/yolo11.md").read_text(), render("limitations.md.j2", run), *reporting_items(run)["Statement"]]
    for text in texts:
        assert "Snap_" not in text
        for place in re.finditer("diagnos", text):
            assert re.search(r"\b(no|not|No prediction)\b", text[max(0, place.start() - 60) : place.start()])


def test_saliency_of_images_of_one_group_has_no_interval(run):
    numbers = {"energy_inside": [0.5, 0.7], "area_inside": 0.1, "centre_bias": 0.2, "original_channel": 1.0}
    table = pd.DataFrame({"pair": ["a", "b"]} | numbers)
    said = []
    for groups in ({"a": 0, "b": 1}, {"a": 0, "b": 0}):
        saliency_summary({"mobilenet_v2": table}, groups=groups).to_csv(run / "metrics/saliency.csv", index=False)
        said.append(state(run, "saliency", "mobilenet_v2"))
    assert "60.0 % of the saliency lies on the white blood cells (95 % CI " in said[0] and "bootstrap of groups)" in said[0]
    assert "(no interval: all images are of one group)" in said[1] and "95 % CI" not in said[1] and "nan" not in said[1]
