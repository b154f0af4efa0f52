"""Do the exported models abstain from what is not like their training images? On the real images, for every model file of a run.

    nice -n 10 python benchmarks/abstaining.py --run runs/taleqani --exported runs/taleqani/exported [--models cells yolo11]
    nice -n 10 python benchmarks/abstaining.py --choose mobilenet_v2 yolo11   # how the distance was chosen

Images from elsewhere only measure: thresholds are in the files, set by the validation images, and the kind of distance
was chosen (`--choose`) on training images made unlike themselves. One exception: the few images of full resolution were
looked at while choosing, and are one reason why the finest edges are left out of the appearance.
`accepted_predicted_as` counts the predictions of the images on which a model does not abstain; for a class that no model
was trained on (`early`), all of them are wrong.
Writes benchmarks/results/abstaining.json, a model at a time.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from leukemia_nb.data.files import atomic_path
from leukemia_nb.data.images import read_image
from leukemia_nb.evaluation.uncertainty import clopper_pearson
from leukemia_nb.processing.dataset import Pairs
from leukemia_nb.inference.predictor import PreparedImage, Predictor, _rows, prepare_image
from leukemia_nb.audit.robustness import corrupt

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("LEUKEMIA_NB_SHARED", ROOT.parent / "shared")) / "data"
RESULTS = ROOT / "benchmarks/results/abstaining.json"
OF_TEST = ("test", "blurred", "stained", "hue")  # sources made of the test images, in their order
PHOTOGRAPHS = (
    "astronaut.png camera.png chelsea.png coffee.png coins.png rocket.jpg hubble_deep_field.jpg "
    "retina.jpg moon.png brick.png grass.png gravel.png motorcycle_left.png motorcycle_right.png "
    "clock_motion.png page.png text.png cell.png ihc.png microaneurysms.png"
).split()
ABOUT = {
    "test": "test subset, many of whose images have a near-duplicate in training: should be predicted",
    "full_resolution": "the same images at full resolution, some of them of the training subset: should be predicted",
    "bccd": "blood smears of another laboratory (BCCD)",
    "pbc_lymphocyte": "single normal lymphocytes of another laboratory (PBC)",
    "wbc_masks": "single white blood cells of another laboratory (segmentation_WBC)",
    "photographs": "images that are no smears: scikit-learn's two samples and scikit-image's bundled ones",
    "blank": "one colour",
    "noise": "uniform or Gaussian noise",
    "blurred": "test images, blurred by 6 pixels of 224",
    "stained": "test images, blue stain times 2 and pink halved, or the other way round",
    "hue": "test images, hue turned by 40 degrees",
    "early": "early Pre-B of the same laboratory, a class that no model was trained on",
}


def from_folder(folder: Path, most: int | None = None) -> list[np.ndarray]:
    "Images below a folder, evenly spread if there are more."
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".bmp", ".tif", ".tiff"))
    rows = np.unique(np.linspace(0, len(files) - 1, min(most or len(files), len(files))).round().astype(int))
    return [read_image(files[row]) for row in rows]


def photographs() -> list[np.ndarray]:
    "Images that scikit-learn and scikit-image carry in their own packages."
    import skimage.data
    from sklearn.datasets import load_sample_images

    folder = Path(str(skimage.data.__file__)).parent
    return [read_image(folder / name) for name in PHOTOGRAPHS if (folder / name).is_file()] + load_sample_images().images


def blank(number: int, seed: int) -> list[np.ndarray]:
    "Images of one colour; black, grey and white among them."
    colours = np.vstack([[[0] * 3, [128] * 3, [255] * 3], np.random.default_rng(seed).integers(0, 256, (number - 3, 3))])
    return [np.full((224, 224, 3), colour, np.uint8) for colour in colours]


def noise(number: int, seed: int) -> list[np.ndarray]:
    "Uniform noise, and Gaussian noise around a colour, by turns."
    random, found = np.random.default_rng(seed), []
    for place in range(number):
        normal = random.normal(random.uniform(60, 200, 3), random.uniform(10, 60), (224, 224, 3))
        found.append(np.clip(normal, 0, 255).astype(np.uint8) if place % 2 else random.integers(0, 256, (224, 224, 3), np.uint8))
    return found


def sources(test: np.ndarray) -> dict[str, list[np.ndarray]]:
    "Name -> images uint8 RGB, in the order of `ABOUT`."
    full = [image for name in ("Benign", "Pre", "Pro") for image in from_folder(SHARED / "kaggle_fullres" / name)]
    stained = [corrupt(image[None], "stain_balance", 2 if i % 2 else 0.5)[0] for i, image in enumerate(test)]
    turned = [corrupt(image[None], "hue", 40 if i % 2 else -40)[0] for i, image in enumerate(test)]
    return {
        "test": list(test),
        "full_resolution": full,
        "bccd": from_folder(SHARED / "bccd/images"),
        "pbc_lymphocyte": from_folder(SHARED / "pbc_lymphocyte"),
        "wbc_masks": from_folder(SHARED / "wbc_masks", 100),
        "photographs": photographs(),
        "blank": blank(40, 1),
        "noise": noise(60, 1),
        "blurred": list(corrupt(test, "blur", 6)),
        "stained": stained,
        "hue": turned,
        "early": from_folder(SHARED / "taleqani/Early", 100),
    }


def shuffled(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    "The 49 squares of an image of 224 x 224 in another order: the same colours and edges, no whole cells."
    squares = image.reshape(7, 32, 7, 32, 3).swapaxes(1, 2).reshape(49, 32, 32, 3)[random.permutation(49)]
    return squares.reshape(7, 7, 32, 32, 3).swapaxes(1, 2).reshape(224, 224, 3)


def shifted(train: Pairs) -> dict[str, list[np.ndarray]]:
    "Training images made unlike themselves, and images of nothing: what the kind of distance is chosen on."
    random = np.random.default_rng(7)
    images = train.read(random.choice(len(train), 240, replace=False))
    gains = [image * np.exp(random.choice([-1, 1], 3) * random.uniform(0.2, 0.5, 3)) for image in images[90:150]]
    close = [cv2.resize(image[80:136, 80:136], (224, 224), interpolation=cv2.INTER_CUBIC) for image in images[170:210]]
    return {
        "blank": blank(30, 2),
        "noise": noise(30, 2),
        "blurred": [corrupt(p[None], "blur", random.uniform(3, 8))[0] for p in images[:60]],
        "channels swapped": [p[..., [(1, 2, 0), (2, 0, 1), (2, 1, 0)][i % 3]] for i, p in enumerate(images[60:90])],
        "channels brighter or darker": [np.clip(gain, 0, 255).astype(np.uint8) for gain in gains],
        "negative": [255 - image for image in images[150:170]],
        "cut out and enlarged": close,
        "squares shuffled": [shuffled(image, random) for image in images[210:240]],
    }


def area_under_curve(inside: np.ndarray, outside: np.ndarray) -> float:
    "Chance that an image from outside has the larger number."
    from sklearn.metrics import roc_auc_score

    return round(float(roc_auc_score(np.r_[np.zeros(len(inside)), np.ones(len(outside))], np.r_[inside, outside])), 4)


def proportion(flags: np.ndarray) -> dict[str, float]:
    "A proportion with its exact 95 % interval."
    low, high = clopper_pearson(int(flags.sum()), len(flags))
    return {"proportion": round(float(flags.mean()), 4), "low": round(low, 4), "high": round(high, 4), "n": len(flags)}


def measure(
    file: Path, images: dict[str, list[np.ndarray]], labels: np.ndarray, looked: dict[str, dict[str, list[PreparedImage]]]
) -> dict:
    "What one model file abstains from, by source; `labels` are those of the test images, `looked` is filled by kind of input."
    predictor = Predictor(file, threads=1)
    info, limits = predictor.info, predictor.info["thresholds"]
    if info["input"] not in looked:
        looked[info["input"]] = {name: [prepare_image(image, info) for image in shown] for name, shown in images.items()}
    found: dict = {
        "version": info["version"],
        "thresholds": limits,
        "validation_images": info["training"]["validation"],
        "validation_coverage": info["coverage"]["val"],
        "sources": {},
    }
    for name, looks in looked[info["input"]].items():
        table = pd.DataFrame(_rows(predictor, looks))
        unlike, unsure = ~(table["ood_distance"] <= limits["distance"]), ~(table["confidence"] >= limits["confidence"])
        doubt = (1 - table["confidence"]) / max(1 - limits["confidence"], 1e-6)
        score = np.maximum(table["ood_distance"] / limits["distance"], doubt)
        kept = ~table["abstains"]
        row = {
            "n": len(table),
            "abstained": proportion(table["abstains"]),
            "abstained_by_distance": proportion(unlike),
            "abstained_by_confidence": proportion(unsure),
            "abstained_by_no_cells": proportion(table["n_cells"] == 0),
            "accepted": int(kept.sum()),
            "accepted_predicted_as": {
                label: proportion(table["predicted"][kept] == label) for label in info["classes"] if kept.any()
            },
        }
        if name in OF_TEST:
            correct = table["predicted"] == labels
            row |= {"accuracy": proportion(correct), "accuracy_of_predicted": proportion(correct[kept]) if kept.any() else None}
        if name == "test":
            inside = table["ood_distance"], score
        else:
            row |= {
                "auroc_distance": area_under_curve(inside[0], table["ood_distance"]),
                "auroc_combined": area_under_curve(inside[1], score),
            }
        found["sources"][name] = row
        print(
            f"{file.stem:16s} {name:16s} n {row['n']:4d}  abstained {row['abstained']['proportion']:.3f}"
            f"  by distance {row['abstained_by_distance']['proportion']:.3f}  AUROC {row.get('auroc_distance', '')}",
            flush=True,
        )
    return found


def kinds_of_distance(train: np.ndarray, labels: np.ndarray) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    "The distances that were compared, each a function of features (n, d)."
    from leukemia_nb.inference.ood import _fit_mahalanobis, _mahalanobis_distance
    from sklearn.neighbors import NearestNeighbors

    fitted = _fit_mahalanobis(train, labels)
    one = _fit_mahalanobis(train, np.zeros(len(labels)))
    near = NearestNeighbors(n_neighbors=5).fit(train)

    def outside_axes(values: np.ndarray) -> np.ndarray:
        centred = values - one["mean"]
        return (centred**2).sum(axis=1) - ((centred @ one["axes"]) ** 2).sum(axis=1)

    found = {
        "mahalanobis, nearest class": lambda values: _mahalanobis_distance(values, fitted),
        "mahalanobis, one cloud": lambda values: _mahalanobis_distance(values, one),
        "fifth nearest neighbour": lambda values: near.kneighbors(values)[0][:, -1],
    }
    return found | ({"outside the leading axes": outside_axes} if len(one["whitening"]) < train.shape[1] else {})


def choose(run: Path, name: str) -> dict:
    "Proportion of changed training images beyond the reach of each kind of distance, which holds 97.5 % of validation."
    from leukemia_nb.inference.export import _run_exported, export_network
    from leukemia_nb.inference.model_file import _start_session
    from leukemia_nb.models.interface import load_model

    model, dataset = load_model(run / "models" / name), run / "dataset"
    train, val = Pairs(dataset, "train"), Pairs(dataset, "val")
    train = Pairs(dataset, table=train.table.drop_duplicates("pair"))
    session, kinds = _start_session(export_network(model).SerializeToString(), model.name, None), ["features", "statistics"]
    fitted, held_out = _run_exported(session, model, train), _run_exported(session, model, val)
    changed = {title: _run_exported(session, model, np.stack(images)) for title, images in shifted(train).items()}
    table: dict = {}
    distances: dict = {}
    for kind in kinds:
        for title, distance in kinds_of_distance(fitted[kind], train.labels).items():
            reach = np.quantile(distance(held_out[kind]), 0.975)
            distances[kind, title] = {name: distance(values[kind]) / reach for name, values in changed.items()}
    best = "mahalanobis, nearest class"
    both = zip(distances["features", best].items(), distances["statistics", best].values())
    distances["the larger of both", best] = {name: np.maximum(a, b) for (name, a), b in both}
    for (kind, title), values in distances.items():
        table[f"{kind}: {title}"] = {name: round(float((far > 1).mean()), 3) for name, far in values.items()}
    return table


def save(part: str, name: str, found: dict) -> None:
    "Put one model's results into the results file."
    result = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"sources": ABOUT, "models": {}, "choice": {}}
    result |= {"sources": ABOUT, "interval": "Clopper-Pearson 95 %, images taken as independent"}
    result[part][name] = found
    with atomic_path(RESULTS) as temporary:
        Path(temporary).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "runs/taleqani")
    parser.add_argument("--exported", type=Path, help="folder of the model files; RUN/exported if not given")
    parser.add_argument("--models", nargs="*", help="names of the model files; all in the folder if not given")
    parser.add_argument("--choose", nargs="*", default=[], help="compare the kinds of distance for these models instead")
    asked = parser.parse_args()
    began = time.time()
    if asked.choose:
        for name in asked.choose:
            save("choice", name, choose(asked.run, name))
    else:
        test = Pairs(asked.run / "dataset", "test")
        made, looked = sources(test.read(slice(None))), {}
        folder = asked.exported or asked.run / "exported"
        for file in sorted(folder.glob("*.onnx")):
            if not asked.models or file.stem in asked.models:
                save("models", file.stem, measure(file, made, test.labels, looked))
    print(f"{time.time() - began:.0f} s")
