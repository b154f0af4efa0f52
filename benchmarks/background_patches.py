"""Is it the cells? The features of cells on the real images, measured in the cells, in their rims and in background patches.

    nice -n 10 python benchmarks/background_patches.py [--every N] [--jobs 1]

Five folds of whole groups of near-duplicates (`taleqani.py`: found by this project or listed), two repeats, a logistic regression
for each region and feature family (`leukemia_nb.audit.patches`); nothing is tuned. Writes results/background_patches.json.
The images stay where they are (`../shared/data`, or LEUKEMIA_NB_SHARED). About five minutes of one core.
"""

import argparse
import json
import time

from leukemia_nb.audit.patches import FEATURE_FAMILIES, cross_validate_regions, region_features
from leukemia_nb.data.files import atomic_path
from shortcuts import ROOT, SHARED, Files
from taleqani import GROUPED_BY, check_apart, known_images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="take every n-th image, to try the script; nothing is written")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    asked = parser.parse_args()
    table, near = known_images(SHARED)
    table = table.iloc[:: asked.every].reset_index(drop=True)
    check_apart(table, near, table.groupby("group").indices.values())  # folds are of whole groups
    began = time.process_time()
    features = region_features(Files(table["path"]), n_jobs=asked.jobs)
    y, groups = table.set_index("file")["class"], table["group"].to_numpy()
    found = cross_validate_regions(features, y, groups, repeats=2, n_jobs=asked.jobs)
    print(found.drop(columns=["title", "interval"]).round(3).to_string(index=False))
    report = {
        "images": len(table),
        "groups": int(table["group"].nunique()),
        "grouped_by": GROUPED_BY,
        "folds": "5 folds of whole groups, 2 repeats",
        "families": {family: list(names) for family, names in FEATURE_FAMILIES.items()},
        "cpu_seconds": round(time.process_time() - began),
        "results": found.round(4).to_dict("records"),
    }
    if asked.every == 1:
        with atomic_path(ROOT / "benchmarks" / "results" / "background_patches.json") as temporary:
            temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
