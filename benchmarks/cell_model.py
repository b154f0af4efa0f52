"""Foreground reliance of the single-cell model and of a frozen MobileNetV2 on the real images.

    nice -n 10 .venv/bin/python benchmarks/cell_model.py [--shared ../shared] [--every 1]

Five folds of groups of near-duplicates (`taleqani.py`: found by this project or listed). The single-cell model (features,
network, augmentation) was designed on 418 images; they and all their near-duplicates are the validation fold. The other images
make four folds (StratifiedGroupKFold, seed 0): the first is the test, on which nothing was chosen, the rest is training. The
cross-validated rows repeat this with every fold as test in turn, so they include images that the model was designed on.
Training cells take the colours of images of their own fold, so that no test image's colours are trained on.
Writes benchmarks/results/cell_model.json; what was tried (`tried_on_validation`) is kept from the file that is there, and comes
from the exploration of 24 November 2026. About 15 minutes of one quiet core.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import cv2
import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from leukemia_nb.audit.cue_conflict import cue_conflict_rates, make_composites, _paste_cells
from leukemia_nb.data.images import read_image
from leukemia_nb.data.manifest import CLASSES
from leukemia_nb.evaluation.uncertainty import _sign_flip_test, korn_graubard_interval, two_way_interval
from leukemia_nb.models.cell_model import COLOURS, CellClassifier, Cells, _augment_colours, aggregate_cells, describe_cells
from leukemia_nb.models.cell_model import _fit_cell_layers, _fit_image_layers, _fit_temperature
from leukemia_nb.processing.cells import cell_crops, find_cells
from taleqani import GROUPED_BY, check_apart, known_images

ROOT = Path(__file__).resolve().parents[1]
WHOLE = "MobileNetV2, whole image"
SINGLE_CELL = "Single-cell model"
INPUTS = {"jitter": "colour-jittered", "normalised": "colour-normalised", "grey": "greyscale"}
NAMES = {"own": SINGLE_CELL} | {colours: f"{SINGLE_CELL}, {name} input" for colours, name in INPUTS.items()}


def log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def proportion(correct: np.ndarray, groups: np.ndarray) -> dict:
    "Proportion of correct predictions with its 95 % interval, which allows for groups of near-duplicates."
    found = korn_graubard_interval(correct, groups)
    rounded = {name: round(getattr(found, name), 4) for name in ("low", "high")}
    return {
        "proportion": round(found.estimate, 4),
        **rounded,
        "count": int(np.sum(correct)),
        "n": found.n,
        "groups": found.groups,
    }


def backbone_features(images: np.ndarray, shared: Path) -> np.ndarray:
    "Features of the frozen MobileNetV2, averaged over the image."
    os.environ["LEUKEMIA_NB_WEIGHTS"] = str(shared / "weights")
    from leukemia_nb.models.transfer import build_backbone

    backbone, _ = build_backbone("mobilenet_v2", weights="local")
    batches = (images[start : start + 64] for start in range(0, len(images), 64))
    return np.concatenate([backbone.predict(batch, batch_size=32, verbose=0).mean(axis=(1, 2)) for batch in batches])


def part(found: Cells, rows: np.ndarray) -> Cells:
    "Cells of some images, renumbered."
    place = np.full(found.n_images, -1)
    place[rows] = np.arange(len(rows))
    keep = place[found.image_index] >= 0
    return Cells(found.features[keep], place[found.image_index][keep], len(rows))


def join(parts: list[Cells], rows: list[np.ndarray], n: int) -> Cells:
    "Cells of several folds as one, with the images' numbers in the whole."
    return Cells(np.concatenate([p.features for p in parts]), np.concatenate([r[p.image_index] for p, r in zip(parts, rows)]), n)


def describe_fold(images: np.ndarray, y: np.ndarray) -> tuple[list[Cells], list[Cells]]:
    "Of one fold: the cells in each of `COLOURS`, and the versions that training uses."
    cv2.setNumThreads(1)
    cropped = [cell_crops(image) for image in images]
    return [describe_cells(cropped, colours) for colours in COLOURS], _augment_colours(cropped, y)


def predict_cells(model: CellClassifier, images: np.ndarray) -> np.ndarray:
    "Class names, two processes."
    parts = Parallel(n_jobs=2)(delayed(model.predict)(images[i : i + 70]) for i in range(0, len(images), 70))
    return np.concatenate(parts)


def composites(images: np.ndarray, cells: np.ndarray, labels: np.ndarray, kinds: list[str], seed: int) -> tuple:
    "`make_composites`, one process for each kind."
    made = Parallel(n_jobs=2)(delayed(make_composites)(images, cells, labels, [kind], seed) for kind in kinds)
    return np.concatenate([m[0] for m in made]), pd.concat([m[1] for m in made], ignore_index=True)


def fit_cells(found: list[Cells], y: np.ndarray, train: np.ndarray, validation: np.ndarray) -> CellClassifier:
    "CellClassifier.fit on cells described before."
    model = CellClassifier("cells", classes=CLASSES)
    model.classes_ = np.array(CLASSES)
    model.class_proportions_, model.temperature_ = np.bincount(y[train]) / len(train), 1.0
    versions = [part(f, train) for f in found]
    model.image_layers_ = _fit_image_layers(versions, y[train])
    val = part(found[0], validation)
    _fit_cell_layers(model, versions, y[train], val, y[validation])
    model.temperature_ = _fit_temperature(model, val, y[validation])
    return model


def fit_whole(values: np.ndarray, y: np.ndarray, train: np.ndarray, validation: np.ndarray):
    "Logistic regression on features of whole images, strength chosen on validation."
    fits = [
        make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=500)).fit(values[train], y[train])
        for c in (1e-3, 1e-2, 1e-1, 1)
    ]
    return max(fits, key=lambda m: m.score(values[validation], y[validation]))


def edge_features(images: np.ndarray) -> np.ndarray:
    "Only the outermost pixels of the refined masks, where an old background would show: means and deviations of L, A, B."
    kernel, rows, owner = np.ones((3, 3), np.uint8), [], []
    for i, image in enumerate(images):
        for crop, mask in zip(*cell_crops(image)):
            ring = mask & (cv2.erode(mask.astype(np.uint8), kernel) == 0)
            if ring.sum() < 5:
                continue
            lab = cv2.cvtColor(crop, cv2.COLOR_RGB2LAB)[ring].astype(float)
            rows.append(np.r_[lab.mean(axis=0), lab.std(axis=0)])
            owner.append(i)
    return aggregate_cells(Cells(np.array(rows), np.array(owner), len(images)))


def chosen_on(table: pd.DataFrame) -> np.ndarray:
    "Places of the images on which the model was designed: the validation part of the exploration, which knew listed groups only."
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0).split(table, table["class"], table["listed"])
    return [test for _, test in folds][1]


def five_folds(table: pd.DataFrame) -> list[np.ndarray]:
    "Places of the test, of the validation (all on which the model was designed, with near-duplicates) and of three more folds."
    validation = table["group"].isin(table["group"].iloc[chosen_on(table)]).to_numpy()
    rest = np.flatnonzero(~validation)
    others = table.iloc[rest]
    folds = StratifiedGroupKFold(4, shuffle=True, random_state=0).split(others, others["class"], others["group"])
    first, *more = [rest[test] for _, test in folds]
    return [first, np.flatnonzero(validation), *more]


def cross_validate_both(
    y: np.ndarray, folds: list[np.ndarray], taught: list[Cells], found: list[Cells], whole: np.ndarray
) -> tuple[dict[str, np.ndarray], tuple]:
    "Whether each image is predicted correctly out of fold, by model and colours; and the models of the first fold."
    correct, first = {name: np.zeros(len(y), bool) for name in ("mobilenet_v2", *COLOURS)}, ()
    for k, fold in enumerate(folds):
        validation = folds[(k + 1) % 5]
        train = np.setdiff1d(np.arange(len(y)), np.r_[fold, validation])
        cells, net = fit_cells(taught, y, train, validation), fit_whole(whole, y, train, validation)
        correct["mobilenet_v2"][fold] = net.predict(whole[fold]) == y[fold]
        for colours, f in zip(COLOURS, found):
            correct[colours][fold] = cells.log_scores(part(f, fold)).argmax(axis=1) == y[fold]
        first = first or (cells, net, train)
    return correct, first


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    options.add_argument("--every", type=int, default=1, help="take every n-th image, to try the script")
    asked = options.parse_args()
    table, near = known_images(asked.shared / "data")
    table = table.iloc[:: asked.every].reset_index(drop=True)
    images = np.stack([read_image(path) for path in table.path])
    labels = table["class"].to_numpy(dtype=str)
    y, classes = np.searchsorted(CLASSES, labels), np.array(CLASSES)
    folds = five_folds(table)
    check_apart(table, near, folds)
    test = folds[0]
    report: dict = {
        "images": len(y),
        "groups": int(table.group.nunique()),
        "grouped_by": GROUPED_BY,
        "near_duplicate_pairs": len(near),
        "pairs_across_folds": 0,
        "test": len(test),
        "validation": len(folds[1]),
        "designed_on": len(chosen_on(table)),
        "training": len(y) - len(test) - len(folds[1]),
        "interval": "Korn-Graubard 95 % (ICC = 1) by group of near-duplicates",
    }

    log("features of cells")
    start = time.process_time()
    describe_cells(cell_crops(image) for image in images[:100])
    report["cpu_seconds_per_image"] = round((time.process_time() - start) / min(100, len(y)), 3)
    described = Parallel(n_jobs=2)(delayed(describe_fold)(images[f], y[f]) for f in folds)
    found, taught = ([join(parts, folds, len(y)) for parts in zip(*which)] for which in zip(*described))
    report["images_without_cells"] = int(len(y) - len(np.unique(found[0].image_index)))
    log("features of whole images")
    whole = backbone_features(images, asked.shared)

    log("five folds")
    correct, (cells, net, train) = cross_validate_both(y, folds, taught, found, whole)
    names = {"mobilenet_v2": WHOLE, **NAMES}
    group = table.group.to_numpy()
    report["accuracy_test"] = {names[k]: proportion(v[test], group[test]) for k, v in correct.items()}
    report["accuracy_cross_validated"] = {names[k]: proportion(v, group) for k, v in correct.items()}
    report["discordant_test"] = {
        "only MobileNetV2 correct": int((correct["mobilenet_v2"] & ~correct["own"])[test].sum()),
        "only single-cell model correct": int((correct["own"] & ~correct["mobilenet_v2"])[test].sum()),
    }
    difference = correct["own"][test].astype(int) - correct["mobilenet_v2"][test]
    report["p_test"] = {"p": _sign_flip_test(difference, group[test], 0), "test": "sign-flip permutation test, by group"}
    log(json.dumps({key: report[key] for key in ("accuracy_test", "accuracy_cross_validated")}))

    log("cue-conflict composites of test images")
    mine = images[test]
    masks = np.stack([find_cells(p) for p in mine])
    kinds = ["mixed_next", "only_bg", "colour_transfer", "background_colour", "cell_colour", "other_scale_bar"]
    made, about = composites(mine, masks, labels[test], kinds, 2)
    of_kind = {kind: (made[(about.kind == kind).to_numpy()], about[about.kind == kind].reset_index(drop=True)) for kind in kinds}
    (mixed, rows), (empty, _) = of_kind["mixed_next"], of_kind["only_bg"]
    rims = np.stack([_paste_cells(mine[r.row], masks[r.row], empty[r.donor], 0.3, 0) for r in rows.itertuples()])
    of_kind["mixed_next_old_rim"] = rims, rows.assign(kind="mixed_next_old_rim")
    lines = []
    for kind, (changed, table_of) in of_kind.items():
        predictions = {
            SINGLE_CELL: predict_cells(cells, changed),
            WHOLE: classes[net.predict(backbone_features(changed, asked.shared))],
        }
        for model, predicted in predictions.items():
            lines.append(cue_conflict_rates(table_of, predicted, group[test]).assign(model=model))
            log(f"{kind}, {model}: {lines[-1].proportion.round(4).tolist()}")
    report["cue_conflict_test"] = pd.concat(lines).round(4).to_dict("records")
    report["mixed_next_by_classes"] = []
    followed = rows.assign(correct=predict_cells(cells, mixed) == rows.foreground)
    for (foreground, other), part_of in followed.groupby(["foreground", "other_cue"]):
        at = two_way_interval(part_of.correct, *(group[test][part_of[side]] for side in ("row", "donor")))
        rate = {"proportion": round(at.estimate, 4), "low": round(at.low, 4), "high": round(at.high, 4), "n": at.n}
        report["mixed_next_by_classes"].append({"foreground": foreground, "other_cue": other} | rate)

    log("edge only")
    edge = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(edge_features(images[train]), y[train])
    itself = np.arange(len(test))
    plain = mine, pd.DataFrame({"kind": "unchanged", "row": itself, "donor": itself, "foreground": labels[test], "other_cue": ""})
    controls = [plain, of_kind["mixed_next"], of_kind["mixed_next_old_rim"]]
    edges = [
        cue_conflict_rates(table_of, classes[edge.predict(edge_features(changed))], group[test]) for changed, table_of in controls
    ]
    report["edge_only_test"] = pd.concat(edges).round(4).to_dict("records")

    target = ROOT / "benchmarks/results/cell_model.json"
    if target.is_file():
        report["tried_on_validation"] = json.loads(target.read_text()).get("tried_on_validation", [])
    if asked.every == 1:
        target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
