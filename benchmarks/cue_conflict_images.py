"""Which images the cue-conflict composites of a finished study were made of.

    python benchmarks/cue_conflict_images.py [--run runs/taleqani] [--shared ../shared]

Counts them by subset, those with a near-duplicate in training (`taleqani.py`:
found by this project or listed), and those on which the single-cell model was designed.
Writes benchmarks/results/cue_conflict_images.json.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd

from cell_model import chosen_on
from leukemia_nb.data.files import read_table
from taleqani import GROUPED_BY, known_images

ROOT = Path(__file__).resolve().parents[1]


def sampled(run: Path) -> pd.DataFrame:
    "Rows of the split for the pairs that the step `cue-conflict` has taken."
    split, made = read_table(run / "split.csv"), read_table(run / "audit/cue_conflict.csv")
    return split[split["pair"].isin(made["pair"])]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--run", type=Path, default=ROOT / "runs/taleqani")
    options.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    asked = options.parse_args()
    images, near = known_images(asked.shared / "data")
    place = {Path(file).name: number for number, file in enumerate(images["file"])}
    split = read_table(asked.run / "split.csv")
    trained = {place[Path(path).name] for path in split["path"][split["subset"] == "train"]}
    table = sampled(asked.run)
    made_of = np.array([place[Path(path).name] for path in table["path"]])
    groups = set(images["group"].iloc[list(trained)])
    files = set(images["file"].iloc[list(trained)])
    partners = {one for a, b in zip(near["a"], near["b"]) for one, other in ((a, b), (b, a)) if other in files}
    report = {
        "images": len(made_of),
        "grouped_by": GROUPED_BY,
        **table["subset"].value_counts().to_dict(),
        "near_duplicate_in_training": int(images["group"].iloc[made_of].isin(groups).sum()),
        "near_duplicate_in_training_directly": int(images["file"].iloc[made_of].isin(partners).sum()),
        "single_cell_model_designed_on": int(np.isin(made_of, chosen_on(images)).sum()),
    }
    target = ROOT / "benchmarks/results/cue_conflict_images.json"
    target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
