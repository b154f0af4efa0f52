"""YOLO classifiers on the real images: accuracy after a few epochs from each source of weights, and time an image.

    LEUKEMIA_NB_WEIGHTS=../shared/weights python benchmarks/yolo.py [--per-class 100] [--epochs 3] [--preprocessing fixed]

Training, validation and test are of whole groups of near-duplicates (`taleqani.py`: found by this project or listed).
Writes benchmarks/results/yolo.json.
"""

import argparse
import json
import os
import platform
import time
import warnings
from pathlib import Path

import numpy as np

from leukemia_nb.evaluation.uncertainty import clopper_pearson
from leukemia_nb.data.images import read_image
from leukemia_nb.models.interface import Images, make_model, versions
from taleqani import GROUPED_BY, INTERVAL, check_apart, known_images

ROOT = Path(__file__).resolve().parents[1]


def parts_of(data: Path, per_class: int) -> dict[str, Images]:
    table, near = known_images(data)
    groups = np.random.default_rng(0).permutation(table.group.unique())
    place = table.group.map(dict(zip(groups, np.linspace(0, 1, len(groups)))))
    parts, places = {}, []
    for name, low, high, number in (("train", 0, 0.7, per_class), ("validation", 0.7, 0.8, 40), ("test", 0.8, 1.01, 80)):
        rows = table[(place >= low) & (place < high)].groupby("class").sample(frac=1, random_state=0)
        rows = rows.groupby("class").head(number)
        places.append(rows.index.to_numpy())
        parts[name] = Images([read_image(path) for path in rows.path], rows["class"])
    check_apart(table, near, places)
    return parts


def tested(right: np.ndarray) -> dict:
    "Accuracy on the test with its exact interval."
    low, high = clopper_pearson(int(right.sum()), len(right))
    return {"test_accuracy": round(float(right.mean()), 4), "low": round(low, 4), "high": round(high, 4)}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    ask.add_argument("--per-class", type=int, default=100)
    ask.add_argument("--epochs", type=int, default=3)
    ask.add_argument("--preprocessing", default="native", choices=["native", "rescale"])
    ask.add_argument("--models", nargs="*", default=["yolov8", "yolo11", "yolo12"])
    ask.add_argument("--weights", nargs="*", default=["local", "random"])
    given = ask.parse_args()
    parts, rows, done = parts_of(given.data, given.per_class), [], set()
    for name in given.models:
        for weights in given.weights:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                model = make_model(name, weights=weights, preprocessing=given.preprocessing, epochs=given.epochs)
                cpu, wall = time.process_time(), time.perf_counter()
                history = model.fit(parts["train"], parts["validation"], progress=print)
            if (name, model.weights_source_) in done:
                continue
            done.add((name, model.weights_source_))
            trained = len(history) * len(parts["train"])
            rows.append(
                dict(
                    model=name,
                    preprocessing=given.preprocessing,
                    weights=model.weights_source_,
                    epochs=len(history),
                    kept=model.best_epoch_,
                    train=len(parts["train"]),
                    test=len(parts["test"]),
                    collapsed=model.collapsed_,
                    **tested(model.predict(parts["test"]) == parts["test"].labels),
                    val_accuracy=history.val_accuracy.round(4).tolist(),
                    seconds=round(time.perf_counter() - wall, 1),
                    cpu_ms_a_image=round(1000 * (time.process_time() - cpu) / trained, 1),
                )
            )
            print(rows[-1], flush=True)
    results = dict(
        machine=platform.platform(),
        cores=os.cpu_count(),
        load=os.getloadavg(),
        grouped_by=GROUPED_BY,
        interval=INTERVAL,
        versions=versions("torch", "ultralytics"),
        rows=rows,
    )
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    (folder / "yolo.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
