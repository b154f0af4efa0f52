"""Fingerprints of model files on the real images: which correlation separates copies from all other images.

    nice -n 10 python benchmarks/fingerprints.py [--out benchmarks/results/fingerprints.json]

Copies are those that `find_duplicates` finds at full size; overlapping fields are listed in taleqani_fields.csv. The
originals of 1024x768 pixels stand for images that were resized and compressed again.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from leukemia_nb.data.near_duplicates import _similar_means, find_duplicates, image_fingerprints

SHARED = Path(os.environ.get("LEUKEMIA_NB_SHARED", Path(__file__).resolve().parents[2] / "shared"))
THRESHOLDS = (0.9, 0.93, 0.95, 0.97, 0.99)


def similar_fingerprints(fingerprints: np.ndarray, min_correlation: float = 0.95) -> pd.DataFrame:
    """Pairs of images whose fingerprints are those of copies, each pair once."""
    found = _similar_means(np.asarray(fingerprints, np.float32), min_correlation)
    return found.drop_duplicates(["a", "b"]).sort_values(["a", "b"], ignore_index=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED / "data")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/fingerprints.json")
    args = parser.parse_args()
    fields = pd.read_csv(args.data / "taleqani_fields.csv")
    paths, group = [args.data / "taleqani" / file for file in fields["file"]], fields["overlap_group"].to_numpy()
    place = {str(path): number for number, path in enumerate(paths)}
    copies = {(place[a], place[b]) for a, b in find_duplicates(paths)[["a", "b"]].to_numpy()}
    known, rows = image_fingerprints(paths), []
    for threshold in THRESHOLDS:
        found = similar_fingerprints(known, threshold)
        copy = np.array([pair in copies for pair in zip(found["a"], found["b"])], bool)
        shared = group[found["a"]] == group[found["b"]]
        rows.append(
            {
                "min_correlation": threshold,
                "copies_found": int(copy.sum()),
                "overlapping": int((~copy & shared).sum()),
                "others": int((~copy & ~shared).sum()),
            }
        )
    twins = pd.read_csv(args.data / "kaggle_fullres/matches.csv")
    originals = image_fingerprints(args.data / "kaggle_fullres" / file for file in twins["file"])
    found = similar_fingerprints(np.concatenate([originals, known]))
    meant = {
        (i, len(originals) + place.get(str(args.data / "taleqani" / file), -1)) for i, file in enumerate(twins["taleqani_match"])
    }
    here = sum(str(args.data / "taleqani" / file) in place for file in twins["taleqani_match"])
    elsewhere = image_fingerprints(sorted((args.data / "pbc_lymphocyte").glob("*.jpg")))
    between = similar_fingerprints(np.concatenate([elsewhere, known]))
    across = between[(between["a"] < len(elsewhere)) & (between["b"] >= len(elsewhere))]
    result = {
        "command": "python benchmarks/fingerprints.py",
        "images": len(paths),
        "pairs": len(paths) * (len(paths) - 1) // 2,
        "copies": len(copies),
        "by_threshold": rows,
        "originals_of_1024x768": {"with_a_twin": here, "found": sum(pair in meant for pair in zip(found["a"], found["b"]))},
        "other_laboratory": {
            "images": len(elsewhere),
            "found": len(across),
            "among_themselves": len(between[between["b"] < len(elsewhere)]),
        },
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
