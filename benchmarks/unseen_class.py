"""Which distance refuses images of a class that no model was trained on? Early Pre-B, for model files of a run.

    nice -n 10 python benchmarks/unseen_class.py --run runs/taleqani [--models mobilenet_v2 cells] [--cache FOLDER]

Nothing is fitted on early Pre-B. Every method is fitted on training images and accepts 95 % of the validation images without a
near-duplicate in training. The adopted method was chosen with these images in view: results are given for two halves of
the early Pre-B images (even and odd numbers of the listed groups), which is no independent confirmation. Layers are feature
maps of the network at four sizes, averaged over the image, with their standard deviations; they are not in the model files'
outputs and are added to the graph here. `--cache` keeps what the networks computed.
Writes benchmarks/results/unseen_class.json, a model at a time.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pandas as pd
from abstaining import ROOT, SHARED, area_under_curve, proportion, sources
from scipy.spatial.distance import cdist
from scipy.special import logsumexp

from leukemia_nb.data.files import atomic_path
from leukemia_nb.data.images import read_image
from leukemia_nb.data.near_duplicates import pairs_without_near_duplicates
from leukemia_nb.inference.export import _choose_thresholds
from leukemia_nb.inference.model_file import open_model_file
from leukemia_nb.inference.ood import _fit_mahalanobis, image_statistics, _mahalanobis_distance
from leukemia_nb.inference.predictor import _network_inputs, prepare_image
from leukemia_nb.processing.dataset import Pairs

RESULTS = ROOT / "benchmarks/results/unseen_class.json"
ELSEWHERE = ("bccd", "pbc_lymphocyte", "wbc_masks", "photographs", "blank", "noise", "blurred", "stained", "hue")
METHODS = {  # title: distances, whether one score joins them with the confidence
    "shared covariance, nearest class (before)": (("features nearest", "statistics nearest"), False),
    "statistics: own covariance, predicted class (adopted)": (("features nearest", "statistics predicted"), False),
    "both: own covariance, predicted class": (("features predicted", "statistics predicted"), False),
    "energy in the place of the features": (("energy", "statistics nearest"), False),
    "fifth nearest neighbour": (("features neighbour", "statistics neighbour"), False),
    "fifth nearest neighbour, and of four layers": (("features neighbour", "statistics neighbour", "layers"), False),
    "shared covariance, one score with the confidence": (("features nearest", "statistics nearest"), True),
    "own covariance, predicted class, one score": (("features predicted", "statistics predicted"), True),
    "fifth nearest neighbour, one score": (("features neighbour", "statistics neighbour"), True),
    "fifth nearest neighbour, and of four layers, one score": (("features neighbour", "statistics neighbour", "layers"), True),
}
Arrays = dict[str, np.ndarray]  # "<source>|<what>" -> array


def layer_outputs(network: onnx.ModelProto, feed: dict) -> list[tuple[str, tuple[int, int]]]:
    "Names of the last and the middle feature map of each size 56, 28, 14, 7, with their spatial axes."
    shaped = onnx.shape_inference.infer_shapes(network).graph.value_info
    known = {value.name: value for value in shaped if len(value.type.tensor_type.shape.dim) == 4}
    names = [name for node in network.graph.node for name in node.output if name in known]
    every = onnx.ModelProto()
    every.CopyFrom(network)
    every.graph.output.extend(known[name] for name in names)
    found: dict[int, list] = {}
    for name, values in zip(names, start(every).run(names, feed)):
        _, a, b, c = values.shape
        axes = (1, 2) if a == b else (2, 3)
        side, channels = values.shape[axes[0]], c if axes == (1, 2) else a
        if values.shape[axes[0]] == values.shape[axes[1]] and side in (56, 28, 14, 7) and channels >= 16:
            found.setdefault(side, []).append((name, axes))
    chosen = [each for maps in found.values() for each in ([maps[-1], maps[len(maps) // 2]] if len(maps) > 2 else maps[-1:])]
    network.graph.output.extend(known[name] for name, _ in chosen)
    return chosen


def add_logits(network: onnx.ModelProto) -> list[str]:
    "Make the input of the last softmax an output; its name."
    (*_, softmax) = (node for node in network.graph.node if node.op_type == "Softmax")
    network.graph.output.append(onnx.helper.make_tensor_value_info(softmax.input[0], onnx.TensorProto.FLOAT, None))
    return [softmax.input[0]]


def start(network: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC, 3
    return onnxruntime.InferenceSession(network.SerializeToString(), options)


def compute(file: Path, images: dict[str, list]) -> Arrays:
    "Probabilities p, features f, logits l, means m<i> and deviations s<i> of layers, and statistics t of every source."
    _, info, _ = open_model_file(file, 1)
    network, found = onnx.load(file), {}
    prepared = {name: [prepare_image(image, info, count=False) for image in shown] for name, shown in images.items()}
    session = start(network)
    layers = [] if info["input"] == "cells" else layer_outputs(network, next(_network_inputs(session, prepared["test"][:1])))
    logits = [] if info["input"] == "cells" else add_logits(network)
    session = start(network)
    for name, each in prepared.items():
        parts: dict[str, list] = {}
        for feed in _network_inputs(session, each):
            asked = ["probabilities", "features", *(layer for layer, _ in layers), *logits]
            probabilities, features, *maps = session.run(asked, feed)
            row = {"p": probabilities, "f": features} | ({"l": maps.pop()} if logits else {})
            row |= {f"m{i}": values.mean(axis=axes) for i, (values, (_, axes)) in enumerate(zip(maps, layers))}
            row |= {f"s{i}": values.std(axis=axes) for i, (values, (_, axes)) in enumerate(zip(maps, layers))}
            for key, values in row.items():
                parts.setdefault(key, []).append(values)
        found |= {f"{name}|{key}": np.concatenate(values).astype(np.float32) for key, values in parts.items()}
        found[f"{name}|t"] = image_statistics(np.stack([one.square for one in each]))
    return found


def energy(arrays: Arrays, names: list[str]) -> Arrays | None:
    "Negative log-sum-exp of the logits (Liu et al. 2020); None without logits."
    return {name: -logsumexp(arrays[f"{name}|l"], axis=1) for name in names} if f"{names[0]}|l" in arrays else None


def neighbour(values: Arrays, names: list[str]) -> Arrays:
    "Distance to the fifth nearest training image (Sun et al. 2022) on 96 principal components of standardised values."
    fitted = _fit_mahalanobis(values["train"].astype(float), np.zeros(len(values["train"])), standardise=True)
    scores = {name: (values[name] - fitted["mean"]) / fitted["scale"] @ fitted["axes"] for name in names}
    return {name: np.sort(cdist(scores[name], scores["train"]), axis=1)[:, 4] for name in names}


def distances(arrays: Arrays, labels: np.ndarray, cells: bool) -> dict[str, Arrays | list[Arrays]]:
    "Title -> source -> distance of each image; the layers are a list."
    names = sorted({key.split("|")[0] for key in arrays})
    found: dict = {}
    for kind, key in (("features", "f"), ("statistics", "t")):
        values = {name: arrays[f"{name}|{key}"] for name in names}
        predicted = {name: arrays[f"{name}|p"].argmax(axis=1) for name in names}
        standardise = cells and kind == "features"
        shared, own = (_fit_mahalanobis(values["train"].astype(float), labels, standardise, by_class=each) for each in (0, 1))
        found[f"{kind} nearest"] = {name: _mahalanobis_distance(values[name], shared) for name in names}
        found[f"{kind} predicted"] = {name: _mahalanobis_distance(values[name], own, predicted[name]) for name in names}
        found[f"{kind} neighbour"] = neighbour(values, names)
    numbers = sorted(int(key[7:]) for key in arrays if key.startswith("train|m"))[::2]
    layers = [{name: np.hstack([arrays[f"{name}|m{i}"], arrays[f"{name}|s{i}"]]) for name in names} for i in numbers]
    found["layers"] = [neighbour(layer, names) for layer in layers]
    found["energy"] = energy(arrays, names)
    return found


def refused(parts: list[Arrays], confidence: Arrays, free: np.ndarray, one_score: bool) -> tuple[Arrays, Arrays]:
    "Whether each image is refused, and the score that orders images, by source."
    names = [name for name in parts[0] if name != "train"]

    def units(values: Arrays) -> Arrays:
        middle, high = np.quantile(values["val"][free], (0.5, 0.975))
        return {name: (values[name] - middle) / max(high - middle, 1e-9) for name in names}

    odds = {name: np.log(np.clip(1 - confidence[name], 1e-7, 1)) - np.log(np.clip(confidence[name], 1e-7, 1)) for name in names}
    if one_score:
        every = [units(odds), *(units({name: np.log(np.maximum(part[name], 1e-9)) for name in names}) for part in parts)]
        score = {name: np.mean([each[name] for each in every], axis=0) for name in names}
        threshold = np.quantile(score["val"][free], 0.95, method="higher")
        return {name: score[name] > threshold for name in names}, score
    ratio = {name: np.max([units(part)[name] for part in parts], axis=0) for name in names}
    if all(part["val"].min() >= 0 for part in parts):  # distances: multiples of the percentile, as a model file has them
        ratio = {name: np.max([part[name] / np.quantile(part["val"][free], 0.975) for part in parts], axis=0) for name in names}
    limits = _choose_thresholds(confidence["val"][free], ratio["val"][free])
    low = {name: (confidence[name] < limits["confidence"]) | (ratio[name] > limits["distance"]) for name in names}
    order = units(odds)
    return low, {name: np.maximum(ratio[name], order[name]) for name in names}


def evaluate(found: dict, arrays: Arrays, free: dict[str, np.ndarray], even: np.ndarray) -> dict:
    "Proportions refused by each method."
    confidence = {key[:-2]: values.max(axis=1) for key, values in arrays.items() if key.endswith("|p")}
    rows = {}
    for title, (kinds, one_score) in METHODS.items():
        parts = [part for kind in kinds for part in (found[kind] if kind == "layers" else [found[kind]])]
        if not parts or None in parts or ("layers" in kinds and not found["layers"]):
            continue
        low, score = refused(parts, confidence, free["val"], one_score)
        worst = min(ELSEWHERE, key=lambda name: low[name].mean())
        inside = np.r_[score["val"][free["val"]], score["test"][free["test"]]]
        rows[title] = {
            "early, even groups": proportion(low["early"][even]),
            "early, odd groups": proportion(low["early"][~even]),
            "test": proportion(low["test"]),
            "test without near-duplicates": proportion(low["test"][free["test"]]),
            "elsewhere, lowest": proportion(low[worst]) | {"source": worst},
            "auroc": area_under_curve(inside, score["early"]),
        }
        print(
            f"  {title:56s}",
            *(f"{name} {one['proportion'] if isinstance(one, dict) else one}" for name, one in rows[title].items()),
        )
    return rows


def main(run: Path, models: list[str], cache: Path | None) -> None:
    split = pd.read_csv(run / "split.csv")
    train = Pairs(run / "dataset", "train")
    subsets = {"train": Pairs(run / "dataset", table=train.table.drop_duplicates("pair"))}
    subsets |= {name: Pairs(run / "dataset", name) for name in ("val", "test")}
    files = sorted((SHARED / "taleqani/Early").glob("*.jpg"))[::3]
    groups = pd.read_csv(SHARED / "taleqani_fields.csv").set_index("file")["overlap_group"]
    even = np.array([groups[f"Early/{file.name}"] % 2 == 0 for file in files])
    free = {
        name: subsets[name].table["pair"].isin(pairs_without_near_duplicates(split, name)).to_numpy() for name in ("val", "test")
    }
    images: dict = {}
    for file in [run / "exported" / f"{model}.onnx" for model in models]:
        kept = cache / f"{file.stem}.npz" if cache else None
        if kept and kept.is_file():
            arrays = dict(np.load(kept))
        else:
            if not images:
                images = sources(subsets["test"].read(slice(None))) | {"early": [read_image(one) for one in files]}
                images |= {name: list(subsets[name].read(slice(None))) for name in ("train", "val")}
            arrays = compute(file, images)
            if kept:
                np.savez(kept, **arrays)
        print(file.stem)
        found = evaluate(distances(arrays, subsets["train"].labels, file.stem == "cells"), arrays, free, even)
        result = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"models": {}}
        result |= {"early": len(files), "validation_images": int(free["val"].sum()), "coverage": 0.95}
        result["models"][file.stem] = found
        with atomic_path(RESULTS) as temporary:
            Path(temporary).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "runs/taleqani")
    parser.add_argument("--models", nargs="*", default=["mobilenet_v2", "yolov8", "yolo11", "cells"])
    parser.add_argument("--cache", type=Path, help="folder that keeps what the networks computed; it must exist")
    asked = parser.parse_args()
    main(asked.run, asked.models, asked.cache)
