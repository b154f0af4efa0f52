"""Speed and quality of segmentation, measured side by side in one run: writes benchmarks/results/segmentation.json.

Ratios and quality on real images where ../shared/data is (LEUKEMIA_NB_SHARED names another place), otherwise on smears.

    python benchmarks/segmentation.py [PART ...]

With the names of parts, such as mask_flags, only these are measured anew.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
from scipy.ndimage import find_objects

from leukemia_nb.data.images import read_image
from leukemia_nb.evaluation.uncertainty import clopper_pearson
from leukemia_nb.processing.cells import count_quality, find_cells, label_cells
from leukemia_nb.processing.segmentation import (
    SEGMENTATION_METHODS,
    _kmeans_mask,
    a_channel,
    cluster_mask,
    apply_mask,
    check_mask,
    clean_mask,
    drop_small,
    flag_mask,
    original_study_mask,
    mask_quality,
    segment,
)
from leukemia_nb.data.images import resize_square
from leukemia_nb.processing.dataset import _save_png
from leukemia_nb.data.synthetic import make_smear

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("LEUKEMIA_NB_SHARED", ROOT.parent / "shared")) / "data"


def machine() -> dict:
    "Name of the machine and of what matters for speed."
    cpu = (
        next(
            (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
            platform.processor(),
        )
        if Path("/proc/cpuinfo").exists()
        else platform.processor()
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": sys.version.split()[0],
        "opencv": cv2.__version__,
        "numpy": np.__version__,
        "opencv_threads": cv2.getNumThreads(),
    }


def interval(values, draws=2000) -> dict:
    "Mean with its 95 % interval: percentile bootstrap, images taken as independent."
    values = np.asarray(values, float)
    means = np.random.default_rng(0).choice(values, (draws, len(values))).mean(1)
    return {
        "n": len(values),
        "mean": round(values.mean(), 4),
        "low": round(np.quantile(means, 0.025), 4),
        "high": round(np.quantile(means, 0.975), 4),
        "median": round(np.median(values), 4),
    }


def fastest(task: Callable[[], object], repeats: int) -> float:
    "Shortest of several times in seconds: the one least disturbed by other processes."
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        task()
        times.append(time.perf_counter() - start)
    return min(times)


def save_pair(image: np.ndarray, mask: np.ndarray, folder: Path, level: int | None = None) -> None:
    "Both images of a pair at 224x224 as the study saves them, or as PNG with one of OpenCV's compression levels."
    for name, half in (("ori", image), ("mask", apply_mask(image, mask))):
        small, path = resize_square(half), folder / f"{name}.png"
        if level is None:
            _save_png(path, small)
        else:
            cv2.imwrite(str(path), cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, level])


def kmeans_study_mask(image: np.ndarray) -> np.ndarray:
    "`original_study_mask` with cv2.kmeans."
    return drop_small(clean_mask(_kmeans_mask(a_channel(image))))


def times(image: np.ndarray, folder: Path) -> dict:
    "Seconds for each step on one image, and whether the two recipes give equal masks."
    channel, mask = a_channel(image), original_study_mask(image)

    row = {
        "cluster_exact": fastest(lambda: cluster_mask(channel), 30),
        "cluster_kmeans": fastest(lambda: _kmeans_mask(channel), 2),
        "kmeans": fastest(lambda: original_study_mask(image), 15),
        "study_kmeans": fastest(lambda: kmeans_study_mask(image), 2),
        "pair": fastest(lambda: save_pair(image, original_study_mask(image), folder), 15),
        "pair_kmeans": fastest(lambda: save_pair(image, kmeans_study_mask(image), folder), 2),
        "nucleus": fastest(lambda: find_cells(image), 2),
        "save_png_study": fastest(lambda: save_pair(image, mask, folder), 5),
        "save_png_3": fastest(lambda: save_pair(image, mask, folder, 3), 5),
        "save_png_9": fastest(lambda: save_pair(image, mask, folder, 9), 5),
    }
    return row | {
        "equal": float((mask == kmeans_study_mask(image)).all()),
        "iou": mask_quality(mask, kmeans_study_mask(image))["iou"],
    }


def speed(images: list[np.ndarray]) -> dict:
    "Exact clustering against cv2.kmeans, for the step, the segmentation and the pair on disk; every mask compared."
    with tempfile.TemporaryDirectory() as folder:
        rows = [times(image, Path(folder)) for image in images]
    table = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    report = {
        f"{key}_ms": round(float(np.median(values)) * 1000, 3) for key, values in table.items() if key not in ("equal", "iou")
    }
    for key in ("cluster", "kmeans", "pair"):
        ratio = table[f"{key}_kmeans"] / table["cluster_exact" if key == "cluster" else key]
        report[f"{key}_times_faster"] = {"median": round(float(np.median(ratio)), 1), "lowest": round(float(ratio.min()), 1)}
    return {
        "images": len(rows),
        "size": "1024x768",
        "masks_equal": table["equal"].mean(),
        "lowest_iou": table["iou"].min(),
        **report,
    }


def agreement(paths: list[Path]) -> dict:
    "Masks of the exact 2-means and of cv2.kmeans' best of ten, before and after cleaning."
    rows = []
    for path in paths:
        image = read_image(path)
        channel = a_channel(image)
        pairs = ((cluster_mask(channel), _kmeans_mask(channel)), (original_study_mask(image), kmeans_study_mask(image)))
        rows.append([value for one, two in pairs for value in ((one == two).all(), mask_quality(one, two)["iou"])])
    same, iou, same_clean, iou_clean = np.array(rows, float).T
    return {
        "n": len(rows),
        "identical_clusters": same.mean(),
        "lowest_iou": iou.min(),
        "mean_iou": iou.mean(),
        "identical_masks": same_clean.mean(),
        "lowest_mask_iou": iou_clean.min(),
    }


def expert_masks() -> dict:
    "IoU and Dice on whole cells of wbc_masks; odd numbers were used for development, even ones held back."
    report = {}
    for half, rest in (("odd, development", 1), ("even, held back", 0)):
        for method in SEGMENTATION_METHODS:
            rows = [
                mask_quality(segment(read_image(path), method), cv2.imread(str(path.with_suffix(".png")), 0) > 0)
                for path in sorted((DATA / "wbc_masks").glob("*.bmp"))
                if int(path.stem) % 2 == rest
            ]
            report.setdefault(half, {})[method] = {key: interval([row[key] for row in rows]) for key in ("iou", "dice")}
    return report


def mask_flags() -> dict:
    "K-means masks of wbc_masks that `flag_mask` flags beside the second method's; the limit was chosen on odd numbers."
    report, halves = {}, {1: "odd, development", 0: "even, held back"}
    for path in sorted((DATA / "wbc_masks").glob("*.bmp")):
        image, truth = read_image(path), cv2.imread(str(path.with_suffix(".png")), 0) > 0
        mask = segment(image, "kmeans")
        kind = "failed" if mask_quality(mask, truth)["iou"] < 0.7 else "good"
        counts = report.setdefault(halves[int(path.stem) % 2], {}).setdefault(kind, {"n": 0, "flagged": 0, "flagged_by_size": 0})
        flags = flag_mask(image, mask, "kmeans"), check_mask(mask)
        for key, more in zip(counts, (1, bool(flags[0]), bool(flags[1]))):
            counts[key] += more
    for counts in (counts for kinds in report.values() for counts in kinds.values()):
        counts["low"], counts["high"] = clopper_pearson(counts["flagged"], counts["n"])
    return report | {"fields": {folder.name: field_flags(folder) for folder in sorted((DATA / "taleqani").iterdir())}}


def field_flags(folder: Path) -> dict:
    "How many masks of whole fields are flagged, of which no truth is known; every eighth image."
    images = [read_image(path) for path in sorted(folder.glob("*.jpg"))[::8]]
    flags = [flag_mask(image, segment(image, "kmeans"), "kmeans") for image in images]
    return {"n": len(flags), "flagged": sum(map(bool, flags))}


def boxes() -> dict:
    """White cells of bccd found, and labels that fit no box of one: by box IoU >= 0.5, and by the centre of a label in the box.

    Of the labels that fit no box, those with their centre in a white cell's box are pieces of it (over-splitting), the rest
    lie elsewhere. A box with the centres of several labels is a white cell that was split.
    """
    report = {
        method: dict.fromkeys(
            ("images", "white_cells", "found", "found_by_centre", "split", "labels", "false", "false_pieces", "false_elsewhere"),
            0,
        )
        for method in SEGMENTATION_METHODS
    }
    for path in sorted((DATA / "bccd" / "boxes").glob("*.xml")):
        true = [
            [int(item.find(f"bndbox/{key}").text) for key in ("ymin", "xmin", "ymax", "xmax")]
            for item in ET.parse(path).iter("object")
            if item.find("name").text == "WBC"
        ]
        image = read_image(DATA / "bccd" / "images" / f"{path.stem}.jpg")
        for method, row in report.items():
            labels = find_cells(image) if method == "nucleus" else label_cells(segment(image))
            count_boxes(row, true, [(w[0].start, w[1].start, w[0].stop, w[1].stop) for w in find_objects(labels)])
    return report


def count_boxes(row: dict, true: list, found: list) -> None:
    "Add the counts of one image: boxes (top, left, bottom, right) of its white cells and of the labels found."
    shape = len(true), len(found)
    fits = np.array([[box_iou(a, b) >= 0.5 for b in found] for a in true], bool).reshape(shape)
    holds = np.array([[centre_inside(a, b) for b in found] for a in true], bool).reshape(shape)
    false = ~fits.any(0)
    for key, value in {
        "images": 1,
        "white_cells": shape[0],
        "found": fits.any(1).sum(),
        "found_by_centre": holds.any(1).sum(),
        "split": (holds.sum(1) > 1).sum(),
        "labels": shape[1],
        "false": false.sum(),
        "false_pieces": (false & holds.any(0)).sum(),
        "false_elsewhere": (false & ~holds.any(0)).sum(),
    }.items():
        row[key] += int(value)


def centre_inside(a, b) -> bool:
    "Whether the centre of box b lies in box a (top, left, bottom, right)."
    return a[0] <= (b[0] + b[2]) / 2 <= a[2] and a[1] <= (b[1] + b[3]) / 2 <= a[3]


def box_iou(a, b) -> float:
    "Overlap of two boxes (top, left, bottom, right)."
    inner = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return inner / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner)


def smears(height: int, width: int, seeds: int) -> dict:
    "Masks and counts on drawn smears, for each method."
    report = {}
    for method in SEGMENTATION_METHODS:
        masks, counts = [], []
        for label in ("Normal", "Pre-B", "Pro-B"):
            for seed in range(100, 100 + seeds):
                drawn = make_smear(label, seed, height, width)
                labels = find_cells(drawn.image) if method == "nucleus" else label_cells(segment(drawn.image))
                masks.append(mask_quality(labels > 0, drawn.cells > 0))
                counts.append(count_quality(labels, drawn.cells))
        report[method] = {
            "iou": interval([row["iou"] for row in masks]),
            "dice": interval([row["dice"] for row in masks]),
            **{key: sum(row[key] for row in counts) for key in ("true", "found", "matched", "missed", "false")},
        }
    return report


def scale_bars(per_class: int = 30) -> dict:
    "Share of images with something found in the bottom-right corner, where the scale bar is burned in (28x44 of 224)."
    report = {}
    for folder in ("Benign", "Early", "Pre", "Pro"):
        paths = sorted((DATA / "taleqani" / folder).glob("*.jpg"))
        paths = paths[:: max(1, len(paths) // per_class)]
        report[folder] = {"n": len(paths)} | {
            method: round(float(np.mean([segment(read_image(path), method)[208:218, 196:222].any() for path in paths])), 3)
            for method in SEGMENTATION_METHODS
        }
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="only these parts")
    parts = parser.parse_args().parts
    real = (DATA / "taleqani").is_dir()
    images = (
        [
            image
            for path in sorted((DATA / "kaggle_fullres").glob("*/*.jpg"))
            if (image := read_image(path)).shape == (768, 1024, 3)
        ][::2]
        if real
        else [make_smear(label, seed).image for label in ("Normal", "Pre-B", "Pro-B") for seed in range(3)]
    )
    tasks = {"speed": lambda: speed(images)}
    if real:
        every = sorted((DATA / "taleqani").glob("*/*.jpg"))
        tasks |= {
            "agreement_with_kmeans_taleqani_224": lambda: agreement(every[::25]),
            "agreement_with_kmeans_wbc_masks": lambda: agreement(sorted((DATA / "wbc_masks").glob("*.bmp"))[::3]),
            "wbc_masks": expert_masks,
            "mask_flags": mask_flags,
            "scale_bar_corner": scale_bars,
            "bccd": boxes,
        }
    tasks |= {"synthetic_224": lambda: smears(224, 224, 10), "synthetic_1024x768": lambda: smears(768, 1024, 2)}
    result = {"machine": machine(), "images": "real" if real else "synthetic"}
    target = ROOT / "benchmarks/results/segmentation.json"
    target.parent.mkdir(exist_ok=True)
    if parts:
        result, tasks = json.loads(target.read_text()), {name: tasks[name] for name in parts}
    for name, task in tasks.items():
        result[name] = task()
        print(json.dumps({name: result[name]}, indent=1, default=float), flush=True)
        target.write_text(json.dumps(result, indent=1, default=float) + "\n")
