"""Shortcut baselines on the real images, cross-validated over all of them, in random folds and in folds of whole groups
of near-duplicates (`taleqani.py`: found by this project or listed).

    nice -n 15 python benchmarks/shortcuts.py [--per-class N] [--jobs 2]

Writes benchmarks/results/shortcuts.json. The images stay where they are (`../shared/data`, or LEUKEMIA_NB_SHARED).
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from leukemia_nb.audit.baselines import BASELINES, baseline_features, baseline_table, cross_validate_baselines
from leukemia_nb.data.files import atomic_path
from leukemia_nb.data.images import read_image
from taleqani import GROUPED_BY, check_apart, known_images

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("LEUKEMIA_NB_SHARED", ROOT.parent / "shared")) / "data"


class Files(Sequence):
    "Images of files, read when asked for."

    def __init__(self, files: Sequence[Path]):
        self.files = list(files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> np.ndarray:
        return read_image(self.files[row])


def choose_images(per_class: int | None) -> tuple[pd.DataFrame, pd.DataFrame]:
    "Files of the three study classes with class and group, at most `per_class` of each; near-duplicates found."
    table, near = known_images(SHARED)
    if per_class:
        table = table.groupby("class").sample(per_class, random_state=0)
    return table.sort_values("file", ignore_index=True), near


def summarise(found: pd.DataFrame) -> dict[str, dict]:
    "Accuracy and interval of each baseline."
    rounded = found.set_index("name")[["accuracy", "low", "high"]].round(4).join(found.set_index("name")["interval"])
    return rounded.to_dict("index")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-class", type=int, help="images of each class; all of them if left out")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    asked = parser.parse_args()
    table, near = choose_images(asked.per_class)
    check_apart(table, near, table.groupby("group").indices.values())  # folds are of whole groups
    began = time.time()
    features = baseline_features(Files(table["path"]), n_jobs=asked.jobs)
    seconds, results, y = {"features": round(time.time() - began, 1)}, {}, table.set_index("file")["class"]
    group = table.set_index("file")["group"]
    for folds, together in (("random 5-fold", None), ("grouped 5-fold", group.to_numpy())):
        began = time.time()
        predictions = cross_validate_baselines(features, y, together, n_jobs=asked.jobs)
        # near-duplicates are no independent images, whether or not folds separate them
        found = baseline_table({name: each.assign(group=each["pair"].map(group)) for name, each in predictions.items()})
        seconds[folds], results[folds] = round(time.time() - began, 1), summarise(found)
        print(folds, found[["title", "accuracy", "low", "high"]].round(3).to_string(index=False), sep="\n")
    report = {
        "images": len(table),
        "by_class": table["class"].value_counts().to_dict(),
        "groups": int(table["group"].nunique()),
        "grouped_by": GROUPED_BY,
        "chance": round(float(table["class"].value_counts(normalize=True).iloc[0]), 4),
        "baselines": {name: BASELINES[name].cue for name in features},
        "seconds": seconds,
        "results": results,
    }
    with atomic_path(ROOT / "benchmarks" / "results" / "shortcuts.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
