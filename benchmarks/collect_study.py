"""Keep the figures of a finished study for the documentation: `make results RUN=runs/taleqani`.

Copies tables only, no image and no name of an image, to benchmarks/results/<name of the run>/. Names that the run knows from its
manifest are taken out of every text, and columns of names are left out, whatever table they stand in.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from leukemia_nb.data.files import read_table, write_table
from leukemia_nb.evaluation.predictions import predicted_labels, read_all_predictions, take_subset

RESULTS = Path(__file__).parent / "results"
TABLES = (
    "metrics/models.csv",
    "metrics/classes.csv",
    "metrics/grouped_accuracy.csv",
    "metrics/pairs_of_models.csv",
    "metrics/calibration.csv",
    "metrics/selective.csv",
    "metrics/selective_corrupted.csv",
    "metrics/baselines.csv",
    "metrics/cross_validation.csv",
    "metrics/saliency.csv",
    "metrics/efficientnet.csv",
    "metrics/efficientnet_last.csv",
    "metrics/reporting_items.csv",
    "metrics/cue_conflict.csv",
    "metrics/cue_conflict_by_classes.csv",
    "metrics/new_images.csv",
    "metrics/robustness.csv",
    "leakage.csv",
)
NAMES = ("pair", "path", "image", "original", "segmented", "cells")  # columns that hold names of images


def image_names(run: Path) -> list[str]:
    """Names of the images of a run, longest first: paths, file names, and the names that tables give them."""
    tables = [read_table(file) for file in (run / "manifest.csv", run / "pairs.csv", run / "split.csv") if file.is_file()]
    tables += [read_table(file) for file in sorted(run.glob("new_images/*.csv"))]
    found = {str(value) for table in tables for name in NAMES if name in table for value in table[name]}
    found |= {Path(name.replace("\\", "/")).name for name in found if "." in name}
    return sorted(found - {"", "nan"}, key=len, reverse=True)


def nameless(names: list[str]) -> Callable[[Any], Any]:
    """A function that takes the names of images out of all texts of a value, a list or a dictionary."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(one) for key, one in value.items()}
        if isinstance(value, list):
            return [clean(one) for one in value]
        if isinstance(value, str):
            for name in names:
                value = value.replace(name, "(image)")
        return value

    return clean


def collect(run: Path, out: Path) -> None:
    """Copy the tables of a run, the sizes of its subsets, the histories, and the time of each step."""
    out.mkdir(parents=True, exist_ok=True)
    clean = nameless(image_names(run))

    def keep_table(name: str, table: pd.DataFrame) -> None:
        names = [column for column in NAMES if column in table]
        numbers = table[names].apply(pd.to_numeric, errors="coerce").notna().any()  # such as the original study's accuracies
        table = table.drop(columns=[column for column in names if not numbers[column]])
        write_table(out / name, table.map(clean))

    def keep_json(name: str, content: object) -> None:
        (out / name).write_text(json.dumps(clean(content), indent=1) + "\n")

    for name in TABLES:
        if (run / name).is_file():
            keep_table(Path(name).name, read_table(run / name))
    for history in sorted(run.glob("models/*/history.csv")):
        keep_table(f"history_{history.parent.name}.csv", read_table(history))
    exported = [json.loads(path.read_text()) for path in sorted(run.glob("exported/*.json"))]
    kept = ("name", "version", "bytes", "difference", "temperature", "calibration", "thresholds", "coverage", "test")
    keep_json("exported.json", [{key: info.get(key) for key in kept} for info in exported])
    tests = {name: take_subset(table) for name, table in read_all_predictions(run / "predictions").items()}
    predicted = [test.assign(model=name, predicted=predicted_labels(test)) for name, test in tests.items()]
    keep_table("confusion.csv", pd.concat(predicted).groupby(["model", "class", "predicted"]).size().reset_index(name="n_images"))
    split = read_table(run / "split.csv")
    keep_table("subsets.csv", split.groupby(["class", "subset"]).size().unstack().reset_index())
    steps = [json.loads(path.read_text()) for path in sorted(run.glob("steps/*.json"))]
    study = json.loads((run / "study.json").read_text())
    study |= {name: Path(study.get(name, "")).name for name in ("data", "new_images", "groups", "split_file")}  # no one's folders
    study |= {"steps": {step["step"]: step["seconds"] for step in steps}}
    keep_json("study.json", study)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder of a finished study")
    run = parser.parse_args().run
    collect(run, RESULTS / run.name)
    print(RESULTS / run.name)
