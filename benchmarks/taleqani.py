"""The real images of the study's classes and their groups of near-duplicates, the same for every benchmark.

Two images are of one group where this project's finder pairs them or `taleqani_fields.csv` lists them together, directly
or through other images. Near-duplicates of which neither knows, and images of one patient, can still be in two groups.
Near-duplicates are searched twice, among all images and among those of the study's classes: the index of the search depends on
its images, so that each search finds a few pairs that the other does not. The result is kept in a file of the temporary folder.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from leukemia_nb.data import near_duplicates as leakage
from leukemia_nb.data.classes import CLASSES, read_class_map
from leukemia_nb.data.manifest import merge_groups
from leukemia_nb.data.files import atomic_path, file_sha256

GROUPED_BY = "near-duplicates of find_near_duplicates, joined with the listed groups of taleqani_fields.csv"


def found_pairs(files: list[Path], folder: Path) -> pd.DataFrame:
    "Pairs of near-duplicates among files, a and b as paths below the folder; kept from one run to the next."
    digests = [file_sha256(leakage.__file__), *map(file_sha256, files)]
    kept = Path(tempfile.gettempdir()) / f"leukemia_nb_pairs_{hashlib.sha256(''.join(digests).encode()).hexdigest()[:16]}.csv"
    if not kept.is_file():
        pairs = leakage.find_near_duplicates(files)
        with atomic_path(kept) as temporary:
            pairs.to_csv(temporary, index=False)
    pairs = pd.read_csv(kept)
    return pairs.assign(**{side: [Path(path).relative_to(folder).as_posix() for path in pairs[side]] for side in "ab"})


def known_images(
    data: Path,  # folder with taleqani and taleqani_fields.csv
) -> tuple[pd.DataFrame, pd.DataFrame]:  # file, class, group, listed group, path; pairs found, a and b as files
    "Images of the three study classes with their groups, and the pairs of near-duplicates among them."
    table, folder = pd.read_csv(data / "taleqani_fields.csv").rename(columns={"overlap_group": "listed"}), data / "taleqani"
    class_map = read_class_map()
    table["class"] = [class_map.class_of(file.split("/")[0]) for file in table["file"]]
    table["path"] = [folder / file for file in table["file"]]
    studied = table["class"].isin(CLASSES)
    pairs = pd.concat([found_pairs(list(table["path"][rows]), folder) for rows in (studied | True, studied)])
    pairs = pairs.drop_duplicates(["a", "b"])
    table["found"] = leakage.group_images(table["file"], pairs)
    table["group"] = merge_groups(table, ["listed", "found"])
    table = table[studied].drop(columns="found").reset_index(drop=True)
    return table, pairs[pairs["a"].isin(table["file"]) & pairs["b"].isin(table["file"])].reset_index(drop=True)


def check_apart(
    table: pd.DataFrame,  # file, group, listed
    pairs: pd.DataFrame,  # a, b: files
    parts: Iterable[np.ndarray],  # places in the table, of each fold or subset
) -> None:
    "Fail where a pair found, a listed group or a group of near-duplicates has images in two parts."
    part = pd.Series(-1, index=table["file"])
    for number, places in enumerate(parts):
        part.iloc[places] = number
    a, b = (part.reindex(pairs[side]).fillna(-1).to_numpy() for side in "ab")
    crossing = (a != b) & (a >= 0) & (b >= 0)
    assert not crossing.any(), f"{crossing.sum()} pairs of near-duplicates are in two parts: {pairs[crossing].head(3)}"
    placed = part[part >= 0]
    for name in ("group", "listed"):
        number = placed.groupby(table.set_index("file")[name][placed.index]).nunique()
        assert number.max() == 1, f"{name}: {(number > 1).sum()} groups are in two parts"
