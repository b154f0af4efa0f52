"""Can the features of cells pass the background-patch control? Variants of the single-cell model on the real images.

    nice -n 10 python benchmarks/cell_variants.py [--every N] [--cache FOLDER]

The grouped design of `cell_model.py`: training, validation (all images on which the single-cell model was designed) and test. For
each set of features: accuracy in the cells; accuracy of the same features in background patches (the control, fitted on patches);
and of the model of cells on test images that are compressed (JPEG), blurred, on another class's background (Mixed-Next) or in
another class's colours. One classifier for all: of logistic regressions of three strengths and a forest, the one that is best
on validation images. Nothing is chosen on test images. Writes results/cell_variants.json. About fifteen minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import pickle
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pandas as pd
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from leukemia_nb.audit.cue_conflict import make_composites
from leukemia_nb.audit.baselines import background_pixels
from leukemia_nb.audit.patches import FEATURE_FAMILIES
from leukemia_nb.audit.robustness import corrupt
from leukemia_nb.data.files import atomic_path
from leukemia_nb.data.images import read_image
from leukemia_nb.data.manifest import CLASSES
from leukemia_nb.evaluation.uncertainty import korn_graubard_interval
from leukemia_nb.models.cell_model import Cells, aggregate_cells
from leukemia_nb.processing.cells import (
    FEATURE_NAMES,
    _crop,
    _sample_cells,
    _usable_cells,
    _whiten_background,
    cell_features,
    find_cells,
)
from leukemia_nb.processing.colour import colour_statistics, reinhard_transfer
from leukemia_nb.processing.segmentation import otsu_threshold
from cell_model import five_folds
from shortcuts import ROOT, SHARED
from taleqani import GROUPED_BY, check_apart, known_images

MAX_CELLS = 6
NUCLEUS = ("log nucleus area", "N:C ratio", "solidity", "axis ratio", "1/circularity", "eccentric place", "parts", "contrast")
SIZES = {"plain": 39, "levelled": 39, "nucleus": len(NUCLEUS)}


def nucleus_features(crop: np.ndarray, mask: np.ndarray) -> list[float]:
    "Shape of the nucleus (the darker part by Otsu's threshold of green) and its contrast to the cytoplasm, free of units."
    green, kernel = crop[..., 1], np.ones((3, 3), np.uint8)
    nucleus = cv2.morphologyEx((mask & (green <= otsu_threshold(green[mask]))).astype(np.uint8), cv2.MORPH_OPEN, kernel)
    if nucleus.sum() < 12:
        nucleus = mask.astype(np.uint8)
    parts, _, stats, _ = cv2.connectedComponentsWithStats(nucleus)
    contour = max(cv2.findContours(nucleus, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0], key=cv2.contourArea)
    area, hull = max(1.0, cv2.contourArea(contour)), max(1.0, cv2.contourArea(cv2.convexHull(contour)))
    rows = np.argwhere(nucleus > 0)
    spread = np.sqrt(np.maximum(np.linalg.eigvalsh(np.cov(rows.T)), 0.01))
    away = np.linalg.norm(rows.mean(axis=0) - np.argwhere(mask).mean(axis=0)) / np.sqrt(mask.sum())
    inside, outside = green[nucleus > 0].mean(), green[mask & (nucleus == 0)].mean() if (mask & (nucleus == 0)).any() else 255
    contrast = (outside - inside) / max(1.0, 255 - inside)
    large = (stats[1:, cv2.CC_STAT_AREA] > 0.1 * nucleus.sum()).sum()
    rough = cv2.arcLength(contour, True) ** 2 / (4 * np.pi * area)
    return [np.log(nucleus.sum()), nucleus.sum() / mask.sum(), area / hull, spread[0] / spread[1], rough, away, large, contrast]


def describe(image: np.ndarray, crops: np.ndarray, masks: np.ndarray, corners: list) -> np.ndarray:
    "Features of some places of an image, (n, 86): as they are, on the levelled image, and of the nucleus there."
    levelled = np.pad(level(image), ((24, 24), (24, 24), (0, 0)), mode="edge")
    rows = [np.zeros((0, sum(SIZES.values())))]
    for crop, mask, (row, column) in zip(crops, masks, corners):
        smooth = np.ascontiguousarray(levelled[row : row + 48, column : column + 48])
        rows.append(np.r_[cell_features(crop, mask), cell_features(smooth, mask), nucleus_features(smooth, mask)][None])
    return np.concatenate(rows).astype(np.float32)


def level(image: np.ndarray) -> np.ndarray:
    "Illumination divided out by the background's colour, and a common, coarser sharpness."
    return cv2.GaussianBlur(_whiten_background(image), (0, 0), 1.2)


def describe_cells(image: np.ndarray, cells: np.ndarray) -> np.ndarray:
    "Features of at most MAX_CELLS cells."
    chosen = _usable_cells(image, cells)
    chosen = [chosen[i] for i in _sample_cells(len(chosen), MAX_CELLS, 0)]
    crops, masks = _crop(image, cells, chosen)
    return describe(image, crops, masks, [(row, column) for _, row, column in chosen])


def describe_background(image: np.ndarray, cells: np.ndarray, masks: np.ndarray, seed: int) -> np.ndarray:
    "Features of background patches in the outlines of another image's cells, placed as `background_patches` places them."
    free, rng = np.pad(background_pixels(image, cells), 24).view(np.uint8), np.random.default_rng(seed)
    corners, kept = [], []
    for mask in masks:
        places = np.argwhere(cv2.erode(free, mask.view(np.uint8), anchor=(24, 24), borderValue=0))
        if len(places):
            corners.append(rng.choice(places) - 24)
            kept.append(mask)
    padded = np.pad(image, ((24, 24), (24, 24), (0, 0)))
    return describe(image, [np.ascontiguousarray(padded[r : r + 48, c : c + 48]) for r, c in corners], kept, corners)


def describe_images(
    images: np.ndarray, donors: dict[str, list[np.ndarray]], cells: np.ndarray | None = None
) -> dict[str, list[np.ndarray]]:
    "Rows of features of each image: of its cells, and of background patches in the outlines that each list of masks gives."
    rows: dict[str, list] = {"cells": [], **{which: [] for which in donors}}
    for i, image in enumerate(images):
        found = find_cells(image) if cells is None else cells[i]
        rows["cells"].append(describe_cells(image, found))
        for which, masks in donors.items():
            rows[which].append(describe_background(image, found, masks[i], i))
    return rows


def aggregate(rows: list[np.ndarray]) -> np.ndarray:
    "Means and standard deviations over the cells or patches of each image, 0 without any."
    index = np.repeat(np.arange(len(rows)), [len(one) for one in rows])
    return aggregate_cells(Cells(np.concatenate(rows), index, len(rows)))


def corrupted(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    "Focus, stain, noise and compression at random, for training."
    if rng.random() < 0.6:
        image = corrupt(image[None], "blur", rng.uniform(0.3, 1.4))[0]
    if rng.random() < 0.5:
        own, shift = colour_statistics(image), rng.normal(0, 1, 3) * (12, 6, 6)
        image = reinhard_transfer(image, own, np.stack([own[0] + shift, own[1] * np.exp(rng.normal(0, 0.2, 3))]), (0.0, np.inf))
    if rng.random() < 0.5:
        image = np.clip(image + rng.normal(0, rng.uniform(1, 6), image.shape), 0, 255).astype(np.uint8)
    return corrupt(image[None], "jpeg", rng.integers(30, 95))[0] if rng.random() < 0.6 else image


SHAPE, CHROMATIN, TEXTURE, COLOUR, ALL = FEATURE_FAMILIES.values()
INNER = tuple(name for name in ALL if name not in SHAPE)
Part = tuple[str, tuple[str, ...], bool]  # block, names, whether the mean of the image's own reference patches is subtracted
LEVELLED: tuple[Part, ...] = (("plain", SHAPE, False), ("nucleus", NUCLEUS, False), ("levelled", INNER, False))


TRAINING = {"not augmented": 0, "augmented": 2, "augmented, with other classes' colours": 3}  # sets that are added to training


class Variant(NamedTuple):
    "Features that a model of cells may be given."

    kind: str  # what sets it apart from the others of the figure
    parts: tuple[Part, ...]
    training: tuple[str, ...] = ("augmented",)  # keys of TRAINING
    removed: int = 0  # directions in which background patches of training images vary most, taken out of the features


VARIANTS: dict[str, Variant] = {
    "All 39 features": Variant("families", (("plain", ALL, False),), tuple(TRAINING)),
    "Colour": Variant("families", (("plain", COLOUR, False),)),
    "Texture and granularity": Variant("families", (("plain", TEXTURE, False),)),
    "Darkness and its distribution": Variant("families", (("plain", CHROMATIN, False),)),
    "Cell size and shape": Variant("families", (("plain", SHAPE, False),)),
    "Size, shape and nucleus": Variant("families", (("plain", SHAPE, False), ("nucleus", NUCLEUS, False))),
    "Levelled": Variant("levelled", LEVELLED, tuple(TRAINING)[1:]),
    "Levelled, minus own background": Variant(
        "minus own background", (("plain", SHAPE, False), ("nucleus", NUCLEUS, False), ("levelled", INNER, True))
    ),
}
VARIANTS |= {
    f"Levelled, {n} background directions removed": Variant("directions removed", LEVELLED, tuple(TRAINING)[1 : 2 + (n == 60)], n)
    for n in (5, 10, 20, 30, 40, 60)
}


ATTRIBUTES: dict[str, tuple[str, str]] = {  # of WBCAtt -> block and feature; each without a unit
    "Cell size (log area)": ("plain", "log area"),
    "Cell shape (solidity)": ("plain", "solidity"),
    "Nucleus shape (solidity)": ("nucleus", "solidity"),
    "Nuclear-cytoplasmic ratio": ("nucleus", "N:C ratio"),
    "Chromatin density (contrast to cytoplasm)": ("nucleus", "contrast"),
    "Granularity (gradient at σ=1)": ("levelled", "gradient magnitude at σ=1"),
    "Lightness (mean L)": ("levelled", "mean L"),
    "Redness (mean A)": ("levelled", "mean A"),
}


def features(described: dict[str, list[np.ndarray]], which: str, parts: tuple[Part, ...]) -> np.ndarray:
    "Aggregated features of a variant, (n, 2 d)."
    starts = dict(zip(SIZES, np.cumsum([0, *SIZES.values()])))
    names = {"plain": FEATURE_NAMES, "levelled": FEATURE_NAMES, "nucleus": NUCLEUS}
    means = aggregate(described["reference"])
    places = [(starts[block] + names[block].index(name), relative) for block, chosen, relative in parts for name in chosen]
    columns, relative = (np.array(values) for values in zip(*places))
    own = [row[:, columns] - relative * mean[columns] for row, mean in zip(described[which], means)]
    return aggregate(own)


def projection(cells: np.ndarray, background: np.ndarray, y: np.ndarray, removed: int) -> np.ndarray:
    "Matrix (d, d): features whitened within classes of cells, without the directions in which background patches vary most."
    scale = cells.std(axis=0) + 1e-6
    within = np.concatenate([cells[y == label] - cells[y == label].mean(axis=0) for label in np.unique(y)]) / scale
    values, vectors = np.linalg.eigh(np.cov(within.T) + 0.05 * np.eye(len(scale)))
    whiten = vectors * values**-0.5 @ vectors.T / scale[:, None]
    patches = np.clip((background - background.mean(axis=0)) / scale, -30, 30) * scale @ whiten
    directions = np.linalg.eigh(np.cov(patches.T))[1][:, len(scale) - removed :]
    return whiten @ (np.eye(len(scale)) - directions @ directions.T)


def select(sets: dict[str, dict], labels: dict[str, np.ndarray], floor: float) -> tuple[Part, ...]:
    "Forward selection with removals on validation images: accuracy in cells, less twice the background patches' above a floor."
    names = [(block, name) for block, chosen, _ in LEVELLED for name in chosen]
    values = {
        (name, which): features(sets[name], which, LEVELLED) for name in ("train", "val") for which in ("cells", "background")
    }

    @cache
    def accuracy(chosen: frozenset, which: str) -> float:
        columns = [place + shift for shift in (0, len(names)) for place in sorted(chosen)]
        model = make_pipeline(StandardScaler(), LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.02))
        return model.fit(values["train", which][:, columns], labels["train"]).score(
            values["val", which][:, columns], labels["val"]
        )

    def aim(chosen: frozenset) -> float:
        return accuracy(chosen, "cells") - 2 * max(0, accuracy(chosen, "background") - floor) if chosen else -1

    best = max((frozenset([place]) for place in range(len(names))), key=aim)
    while True:
        new = max((best ^ {place} for place in range(len(names))), key=aim)
        if aim(new) <= aim(best):
            break
        best = new
    blocks = {block: tuple(name for place, (of, name) in enumerate(names) if of == block and place in best) for block, _ in names}
    return tuple((block, chosen, False) for block, chosen in blocks.items() if chosen)


def fit(X: np.ndarray, y: np.ndarray, X_val: np.ndarray, y_val: np.ndarray):
    "Of logistic regressions of three strengths and a forest, the best on validation images."
    models = [LogisticRegression(C=c, max_iter=1000, class_weight="balanced") for c in (0.01, 0.1, 1)]
    models.append(RandomForestClassifier(100, class_weight="balanced", random_state=0, min_samples_leaf=2))
    fitted = [make_pipeline(StandardScaler(), model).fit(X, y) for model in models]
    return max(fitted, key=lambda model: model.score(X_val, y_val))


def measure(variant: Variant, sets: dict[str, dict], labels: dict[str, np.ndarray], augmented: int) -> dict[str, np.ndarray]:
    "Whether each image is predicted correctly from a variant's features, in every set."
    y, y_val, parts = labels["train"], labels["val"], variant.parts
    project = np.eye(2 * sum(len(names) for _, names, _ in parts))
    if variant.removed:
        both = (features(sets["train"], which, parts) for which in ("cells", "background"))
        project = projection(*both, y, variant.removed)

    def of(name: str, which: str = "cells") -> np.ndarray:
        return features(sets[name], which, parts) @ project

    more = sorted(name for name in sets if name.startswith("augmented"))[:augmented]
    model = fit(np.concatenate([of("train"), *map(of, more)]), np.tile(y, 1 + len(more)), of("val"), y_val)
    control = fit(of("train", "background"), y, of("val", "background"), y_val)
    found = {"validation": model.predict(of("val")) == y_val}
    found["background patches, validation"] = control.predict(of("val", "background")) == y_val
    found["background patches"] = control.predict(of("test", "background")) == labels["test"]
    found |= {name: model.predict(of(name)) == labels["test"] for name in ("test", "jpeg", "blur", "mixed_next", "cell_colour")}
    found["Normal called leukaemia"] = ~found["test"][labels["test"] == "Normal"]
    return found


def measured_rows(name: str, variant: Variant, training: str, sets: dict, labels: dict, groups: dict) -> list[dict]:
    "One row for each measure of a variant, with the Korn-Graubard interval of groups of near-duplicates."
    rows = []
    for which, correct in measure(variant, sets, labels, TRAINING[training]).items():
        of = groups["val" if "validation" in which else "test"]
        of = of[labels["test"] == "Normal"] if which.startswith("Normal") else of
        found = korn_graubard_interval(correct.astype(float), of)
        row = {"variant": name, "kind": variant.kind, "training": training, "measure": which}
        row |= {"proportion": round(found.estimate, 4), "low": round(found.low, 4), "high": round(found.high, 4)}
        rows.append(row | {"count": int(correct.sum()), "n": found.n, "groups": found.groups})
    return rows


def attributes_by_class(sets: dict[str, dict], labels: dict[str, np.ndarray]) -> list[dict]:
    "Mean of each attribute by class and region, in standard deviations over all images of training, validation and test."
    parts, rows = tuple((block, (name,), False) for block, name in ATTRIBUTES.values()), []
    y = np.concatenate([labels[name] for name in ("train", "val", "test")])
    for region in ("cells", "background"):
        means = np.concatenate([features(sets[name], region, parts) for name in ("train", "val", "test")])[:, : len(parts)]
        there = np.concatenate([[len(row) > 0 for row in sets[name][region]] for name in ("train", "val", "test")])
        z = (means - means[there].mean(axis=0)) / means[there].std(axis=0)
        for label in CLASSES:
            mean = z[there & (y == label)].mean(axis=0).round(3).tolist()
            rows += [{"region": region, "class": label, "attribute": name, "mean": m} for name, m in zip(ATTRIBUTES, mean)]
    return rows


def describe_all(table: pd.DataFrame, parts: dict[str, np.ndarray]) -> dict[str, dict]:
    "Features of training, validation and test images, of three changed versions of training and of four of the test images."
    cv2.setNumThreads(1)
    images = np.stack([read_image(path) for path in table["path"]])
    cells = np.stack([find_cells(image) for image in images])
    masks = [describe_masks(image, found) for image, found in zip(images, cells)]
    order, n = np.random.default_rng(0).permutation(len(images)), len(images)
    place = np.argsort(order)
    donors = {
        which: [masks[order[(place[i] + shift) % n]] for i in range(n)] for which, shift in (("background", 1), ("reference", 2))
    }
    sets = {}
    for name, rows in parts.items():
        sets[name] = describe_images(images[rows], {which: [of[i] for i in rows] for which, of in donors.items()}, cells[rows])
        print(name, round(time.process_time()), flush=True)
    reference = {name: {"reference": [donors["reference"][i] for i in rows]} for name, rows in parts.items()}
    for seed in (1, 2):
        rng = np.random.default_rng(seed)
        changed = np.stack([corrupted(images[i], rng) for i in parts["train"]])
        sets[f"augmented {seed}"] = describe_images(changed, reference["train"], cells[parts["train"]])
    sets["augmented 3"] = transferred(
        images[parts["train"]], cells[parts["train"]], table["class"].to_numpy(str)[parts["train"]], reference["train"]
    )
    test, labels = images[parts["test"]], table["class"].to_numpy(str)[parts["test"]]
    changed = {"jpeg": corrupt(test, "jpeg", 50), "blur": corrupt(test, "blur", 1)}
    for kind in ("mixed_next", "cell_colour"):
        changed[kind] = make_composites(test, cells[parts["test"]], labels, [kind], 2)[0]
    for name, made in changed.items():
        sets[name] = describe_images(made, reference["test"])
        print(name, round(time.process_time()), flush=True)
    return sets


def transferred(images: np.ndarray, cells: np.ndarray, labels: np.ndarray, reference: dict) -> dict[str, list[np.ndarray]]:
    "Features of training images whose cells have the colours of another class's training cells."
    return describe_images(make_composites(images, cells, labels, ["cell_colour"], 5)[0], reference, cells)


def describe_masks(image: np.ndarray, cells: np.ndarray) -> np.ndarray:
    "Masks of at most MAX_CELLS cells."
    chosen = _usable_cells(image, cells)
    return _crop(image, cells, [chosen[i] for i in _sample_cells(len(chosen), MAX_CELLS, 0)])[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="take every n-th image, to try the script; nothing is written")
    parser.add_argument("--cache", type=Path, help="file that keeps the features between runs")
    asked = parser.parse_args()
    if asked.cache and asked.cache.is_file():
        table, sets = pickle.loads(asked.cache.read_bytes())
    else:
        table, near = known_images(SHARED)
        table, sets = table.iloc[:: asked.every].reset_index(drop=True), None
        check_apart(table, near, five_folds(table))
    test, val, *rest = five_folds(table)
    parts = {"train": np.sort(np.concatenate(rest)), "val": val, "test": test}
    sets = sets or describe_all(table, parts)
    if asked.cache:
        asked.cache.write_bytes(pickle.dumps((table, sets)))
    labels = {name: table["class"].to_numpy(str)[rows] for name, rows in parts.items()}
    groups = {name: table["group"].to_numpy()[rows] for name, rows in parts.items()}
    chosen = {f"Selected, floor {floor:.0%}": Variant("selected", select(sets, labels, floor)) for floor in (0.45, 0.55, 0.65)}
    results = []
    for name, variant in (VARIANTS | chosen).items():
        for training in variant.training:
            rows = measured_rows(name, variant, training, sets, labels, groups)
            print(name, training, {row["measure"]: row["proportion"] for row in rows}, flush=True)
            results += rows
    report = {"images": len(table), "grouped_by": GROUPED_BY, **{name: len(rows) for name, rows in parts.items()}}
    report |= {
        "interval": "Korn-Graubard (ICC = 1)",
        "selected": {name: variant.parts for name, variant in chosen.items()},
        "attributes": attributes_by_class(sets, labels),
        "results": results,
    }
    if asked.every == 1:
        with atomic_path(ROOT / "benchmarks" / "results" / "cell_variants.json") as temporary:
            temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
