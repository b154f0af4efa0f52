"""Shortcut controls on the real images, cross-validated over all of them, in random folds and in folds of whole groups
of near-duplicates (`taleqani.py`: found by this project or listed).

    nice -n 15 python benchmarks/shortcuts.py [--per-class N] [--jobs 2]

Writes benchmarks/results/shortcuts.json. The images stay where they are (`../shared/data`, or LEUKEMIA_NB_SHARED).
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from leukemia_nb.data.files import atomic_path, file_sha256
from leukemia_nb.data.images import read_image
from leukemia_nb.audit.baselines import BASELINES, baseline_features, baseline_table, cross_validate_baselines
from leukemia_nb.evaluation.uncertainty import cached_features
from taleqani import GROUPED_BY, check_apart, known_images

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("LEUKEMIA_NB_SHARED", ROOT.parent / "shared")) / "data"


def known_images(per_class: int | None) -> tuple[pd.DataFrame, pd.DataFrame]:
    "Files of the three study classes with class and group, at most `per_class` of each, drawn with seed 0; pairs found."
    table, near = known_images(SHARED)
    table = table.assign(pair=table["file"], path=table["file"])
    if per_class:
        table = table.groupby("class").sample(per_class, random_state=0)
    return table.sort_values("pair", ignore_index=True), near


class Files:
    "Images of a table, read when asked for."

    def __init__(self, table: pd.DataFrame):
        self.files = [SHARED / "taleqani" / name for name in table["file"]]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, row: int) -> np.ndarray:
        return read_image(self.files[row])


def features_of(table: pd.DataFrame, cache: Path, n_jobs: int) -> dict[str, np.ndarray]:
    "What every control sees of every image, kept in a file from one run to the next."
    files, widths = Files(table), {}
    blank = baseline_features(np.full((1, 224, 224, 3), 230, np.uint8))
    widths = {name: numbers.shape[1] for name, numbers in blank.items()}
    keys = [f"{file_sha256(file)} {sorted(widths.items())}" for file in files.files]
    joined = cached_features(cache, keys, lambda: np.hstack(list(baseline_features(files, n_jobs=n_jobs).values())))
    parts = np.split(joined, np.cumsum(list(widths.values()))[:-1], axis=1)
    return dict(zip(widths, parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-class", type=int, help="images of each class; all of them if left out")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "leukemia_nb_shortcuts.npz")
    asked = parser.parse_args()
    table, near = known_images(asked.per_class)
    check_apart(table, near, table.groupby("group").indices.values())  # folds are of whole groups
    began = time.time()
    features = features_of(table, asked.cache, asked.jobs)
    seconds = {"features": round(time.time() - began, 1)}
    results = {}
    for folds, groups in (("random 5-fold", None), ("grouped 5-fold", table["group"])):
        began = time.time()
        found = baseline_table(cross_validate_baselines(features, table, groups, n_jobs=asked.jobs))
        seconds[folds] = round(time.time() - began, 1)
        results[folds] = {
            row["name"]: {
                "accuracy": round(row["accuracy"], 4),
                "low": round(row["low"], 4),
                "high": round(row["high"], 4),
                "interval": row["interval"],
            }
            for row in found.to_dict("records")
        }
        print(folds, found[["title", "accuracy", "low", "high"]].round(3).to_string(index=False), sep="\n")
    report = {
        "images": len(table),
        "by_class": table["class"].value_counts().to_dict(),
        "groups": table["group"].nunique(),
        "grouped_by": GROUPED_BY,
        "chance": round(float(table["class"].value_counts(normalize=True).iloc[0]), 4),
        "controls": {name: BASELINES[name].sees for name in features},
        "seconds": seconds,
        "results": results,
    }
    with atomic_path(ROOT / "benchmarks" / "results" / "shortcuts.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
