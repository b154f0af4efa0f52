"""Values of smears, masks, cells, colours, near-duplicates and splits, as they were computed once: python tests/test_golden.py writes them.

They hold of data.synthetic, data.near_duplicates, processing.segmentation, processing.cells, processing.colour,
processing.dataset and processing.splitting, and are coarse enough for another processor's last bits.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

FILE = Path(__file__).with_name("golden.json")


def coarse(image, side=6):
    """Means of an image's blocks, and how fast it changes: a list of numbers."""
    import cv2

    image = np.float32(image)
    blocks = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
    return [*blocks.ravel().tolist(), float(np.abs(np.diff(image, axis=0)).mean()), float(np.abs(np.diff(image, axis=1)).mean())]


def areas(labels):
    return np.bincount(labels.ravel()).tolist()


@pytest.fixture(scope="module")
def smears():
    return make_smears()


def make_smears():
    from leukemia_nb.data.synthetic import make_smear

    # 11 has a smudge, 3 has touching cells; each class once in its own laboratory and once in another one
    small = {
        f"{name} {seed}": make_smear(name, seed, 192, 256, 0.3)
        for name in ("Normal", "Early Pre-B", "Pre-B", "Pro-B")
        for seed in (3, 11)
    }
    return small | {"large": make_smear("Pre-B", 5, 480, 640, 1.0), "seen": make_smear("Pro-B", 7, 384, 512, site="A")}


def synthetic(smears):
    return {
        name: {"image": coarse(each.image), "cells": areas(each.cells), "nuclei": int(each.nuclei.sum()), "site": each.site}
        for name, each in smears.items()
    }


def segmentation(smears):
    from leukemia_nb.processing.cells import find_cells
    from leukemia_nb.processing.segmentation import (
        a_channel,
        check_mask,
        draw_outlines,
        mask_quality,
        segment,
        segmentation_steps,
        otsu_threshold,
    )

    found = {}
    for name in ("Normal 3", "large", "seen"):
        image, truth = smears[name].image, smears[name].cells > 0
        for method in ("kmeans", "nucleus"):
            mask = segment(image, method, 450)
            found[f"{name} {method}"] = {
                "mask": coarse(mask),
                **mask_quality(mask, truth),
                "outlined": coarse(draw_outlines(image, mask)),
            }
    found["otsu threshold"] = otsu_threshold(a_channel(smears["seen"].image))
    found["steps"] = {step: coarse(image) for step, image in segmentation_steps(smears["seen"].image, 300).items()}
    square = np.zeros((100, 100), bool)
    square[:1, :10] = True
    masks = {
        "small": square[:, ::-1] & (np.arange(100) < 91),
        "large": ~square,
        "border": np.pad(np.zeros((96, 96), bool), 2, constant_values=True),
    }
    masks["one"] = np.pad(np.ones((70, 70), bool), 15)
    found["flags"] = {name: check_mask(mask) for name, mask in masks.items()}
    found["grey"] = [float(a_channel(np.full((20, 30), 77, np.uint8)).mean()), len(find_cells(np.full((20, 30), 77, np.uint8)))]
    return found


def cells(smears):
    from leukemia_nb.data.images import resize_square
    from leukemia_nb.processing.cells import (
        FEATURE_NAMES,
        cell_crops,
        cell_table,
        count_quality,
        find_cells,
        label_cells,
        typical_area,
    )

    found = {}
    for name, each in smears.items():
        labels = find_cells(each.image, 400)
        found[name] = {
            "areas": areas(labels),
            "where": coarse(labels > 0),
            **count_quality(labels, each.cells),
            "typical": typical_area(labels),
        }
    truth = smears["large"].cells > 0
    found["divided"] = {
        "areas": sorted(areas(label_cells(truth))),
        "count": int(label_cells(truth).max()),
        "deep": areas(label_cells(truth, 0.3, 0.97)),
    }
    for name in ("large", "seen"):
        image = resize_square(smears[name].image)
        crops, masks = cell_crops(image, max_cells=3, seed=4)
        table = cell_table(image, find_cells(image))
        found[f"crops of {name}"] = {"crops": [coarse(crop, 3) for crop in crops], "masks": [int(mask.sum()) for mask in masks]}
        found[f"features of {name}"] = {"cell": table["cell"].tolist(), **{each: table[each].tolist() for each in FEATURE_NAMES}}
    return found


def colour(smears):
    from leukemia_nb.processing.colour import colour_statistics, reinhard_transfer

    first, second = smears["large"], smears["seen"]
    own, wanted = colour_statistics(first.image, first.cells > 0), colour_statistics(second.image)
    return {
        "statistics": [*own.ravel().tolist(), *wanted.ravel().tolist()],
        "moved": coarse(reinhard_transfer(first.image, own, wanted)),
    }


def near_duplicates(folder, smears):
    from leukemia_nb.data.images import write_image
    from leukemia_nb.data.near_duplicates import find_near_duplicates, group_images, leakage_report
    from leukemia_nb.data.synthetic import make_smear

    field = make_smear("Pre-B", 8, 600, 800).image
    images = {"a": field[:400, :400], "b": field[150:550, 120:520], "c": field[:400, 400:], "d": smears["seen"].image[:, :384]}
    images |= {"e": np.rot90(field[:400, :400]), "f": smears["large"].image[:400, :400]}
    for name, image in images.items():
        write_image(folder / f"{name}.png", np.ascontiguousarray(image))
    paths = [folder / f"{name}.png" for name in images]
    pairs = find_near_duplicates(paths)
    split = pd.DataFrame({"pair": [str(path) for path in paths], "subset": ["train", "test", "train", "val", "test", "test"]})
    split["group"] = group_images(paths, pairs)
    short = pairs.assign(a=pairs["a"].map(lambda path: Path(path).stem), b=pairs["b"].map(lambda path: Path(path).stem))
    return {
        "pairs": short.to_dict("list"),
        "groups": split["group"].tolist(),
        "leakage": leakage_report(split, pairs).to_dict("list"),
    }


def splitting():
    import warnings

    from leukemia_nb.processing.dataset import oversample_with_flips
    from leukemia_nb.processing.splitting import smallest_class, split_pairs, stratified_sample

    names = [f"{label}/{number:02}" for label, size in (("Normal", 31), ("Pre-B", 44), ("Pro-B", 57)) for number in range(size)]
    pairs = pd.DataFrame(
        {"pair": names, "class": [name.split("/")[0] for name in names], "path": names, "sha256": names, "pixels": names}
    )
    pairs.loc[5:7, "sha256"], pairs.loc[40:42, "pixels"], pairs.loc[43:45, "pixels"] = "x", "y", "z"
    groups = [name[:-1] + str(int(name[-1]) // 3) for name in names]
    found = {"smallest": [smallest_class(), smallest_class(0.6, 0.2), smallest_class(0.5, 0.34)]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # copies that stay together shift the sizes
        tables = {
            "random": split_pairs(pairs, seed=3),
            "other seed": split_pairs(pairs, train_size=0.6, test_size=0.25, seed=4),
            "grouped": split_pairs(pairs, "grouped", groups, 0.6, 0.2, seed=1),
        }
    for name, table in tables.items():
        found[name] = {"subset": "".join(table["subset"].str[1]), "group": table["group"].tolist()}
        copies = oversample_with_flips(table, 2)
        copies = copies[copies["flip"] != "none"]
        found[f"{name} flips"] = (copies["pair"] + " " + copies["flip"] + copies["repeat"].astype(str)).tolist()
    found["sample"] = [stratified_sample(pairs["class"], n, seed).tolist() for n, seed in ((7, 0), (20, 1), (131, 2))]
    return found


def plain(content):
    """What JSON would give back."""
    return json.loads(json.dumps(content, default=lambda value: value.tolist()))


def same(found, golden, where=""):
    """Assert that two structures are equal, numbers nearly so."""
    if isinstance(golden, dict):
        assert list(found) == list(golden), where
        for key in golden:
            same(found[key], golden[key], f"{where} {key}")
    elif isinstance(golden, list) and any(isinstance(each, list | str) for each in golden):
        assert len(found) == len(golden), where
        for number, (one, other) in enumerate(zip(found, golden)):
            same(one, other, f"{where} {number}")
    elif isinstance(golden, str):
        assert str(found) == golden, where
    else:
        assert np.shape(found) == np.shape(golden), where
        np.testing.assert_allclose(np.float64(found), np.float64(golden), rtol=2e-3, atol=2e-3, err_msg=where)


@pytest.mark.parametrize("part", [synthetic, segmentation, cells, colour], ids=lambda part: part.__name__)
def test_images(part, smears):
    same(plain(part(smears)), json.loads(FILE.read_text())[part.__name__])


def test_near_duplicates(smears, tmp_path):
    same(plain(near_duplicates(tmp_path, smears)), json.loads(FILE.read_text())["near_duplicates"])


def test_splitting():
    same(plain(splitting()), json.loads(FILE.read_text())["splitting"])


def rounded(value):
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value


if __name__ == "__main__":
    import tempfile

    made = make_smears()
    content = {part.__name__: part(made) for part in (synthetic, segmentation, cells, colour)}
    with tempfile.TemporaryDirectory() as folder:
        content |= {"near_duplicates": near_duplicates(Path(folder), made), "splitting": splitting()}
    FILE.write_text(json.dumps(rounded(plain(content)), separators=(",", ":")) + "\n")
