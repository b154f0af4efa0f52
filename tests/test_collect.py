"""The collector of a study's figures for the documentation: no image and no name of an image leaves the run."""

import json
import shutil
import subprocess
import sys

import pandas as pd
import pytest
from conftest import ROOT

from leukemia_nb.data.files import read_table, write_table
from leukemia_nb.study.cards import reporting_items
from leukemia_nb.testing import dummy_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = dummy_run(tmp_path_factory.mktemp("collect") / "dummy")
    write_table(folder / "metrics" / "reporting_items.csv", reporting_items(folder))
    return folder


def collected(run, tmp_path):
    """What the script leaves, run as a person runs it, from a copy of it so that nothing is written into the repository."""
    (tmp_path / "benchmarks").mkdir()
    script = shutil.copy(ROOT / "benchmarks" / "collect_study.py", tmp_path / "benchmarks")
    done = subprocess.run([sys.executable, script, run], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return tmp_path / "benchmarks" / "results" / run.name


def names(run):
    found = set()
    for file in (run / "manifest.csv", run / "pairs.csv", *run.glob("new_images/*.csv"), *run.glob("predictions/*.csv")):
        table = read_table(file)
        for column in {"pair", "path", "original", "segmented"} & set(table.columns):
            found |= set(table[column]) | {value.rsplit("/", 1)[-1] for value in table[column]}
    return {name for name in found if len(name) > 3}


def test_no_name_of_an_image_is_collected(run, tmp_path):
    out = collected(run, tmp_path)
    files = list(out.iterdir())
    assert {"models.csv", "grouped_accuracy.csv", "reporting_items.csv", "confusion.csv", "study.json"} <= {
        file.name for file in files
    }
    texts = {file.name: file.read_text(encoding="utf-8") for file in files}
    assert not [(file, name) for file, text in texts.items() for name in names(run) if name in text]


def test_names_that_an_answer_or_a_table_holds_are_taken_out(run, tmp_path):
    """As in runs of earlier versions, whose statements named the images that most models had wrong."""
    old = shutil.copytree(run, tmp_path / "run")
    items = read_table(old / "metrics" / "reporting_items.csv")
    pair, path = read_table(old / "manifest.csv").loc[7, ["pair", "path"]]
    items.loc[items["Topic"] == "Wrong predictions", "Statement"] = (
        f"Partly reported: 1 of 3 wrong; most often {pair} by 3, {path.split('/')[-1]} by 1."
    )
    write_table(old / "metrics" / "reporting_items.csv", items)
    write_table(old / "metrics" / "cue_conflict.csv", read_table(old / "metrics" / "cue_conflict.csv").assign(pair=pair))
    (old / "study.json").write_text(
        json.dumps({"data": "/home/someone/slides", "new_images": "/home/someone/new", "note": [pair]})
    )
    out = collected(old, tmp_path)
    text = (out / "reporting_items.csv").read_text(encoding="utf-8")
    assert pair not in text and path.split("/")[-1] not in text and "1 of 3 wrong; most often (image) by 3, (image) by 1." in text
    assert "pair" not in pd.read_csv(out / "cue_conflict.csv")
    study = json.loads((out / "study.json").read_text())
    assert study["note"] == ["(image)"] and "someone" not in json.dumps(study)


def test_the_committed_tables_name_no_image():
    for file in (ROOT / "benchmarks" / "results").glob("*/*.*"):
        text = file.read_text(encoding="utf-8")
        assert "WBC-Benign-" not in text and "WBC-Malignant-" not in text and "Snap_" not in text, file


def test_the_statement_itself_counts_and_names_nothing(run):
    statements = reporting_items(run).set_index("Topic")["Statement"]
    assert "of 111 test images are predicted wrong" in statements["Wrong predictions"]
    assert not [name for name in names(run) if any(name in statement for statement in statements)]
