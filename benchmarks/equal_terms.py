"""Networks on equal terms: the same images, epochs, batches and seeds, on the random and on the group-disjoint split.

    python benchmarks/equal_terms.py RUN --work FOLDER

RUN is the folder of a study of real images, finished as far as its step `split`. MobileNetV2 and the dual-channel model, whose
frozen ImageNet features are computed once, are trained for five seeds and 20 epochs, each with its own split, flips and training.
The five networks that are trained whole are trained for three seeds at a reduced size, 64 pixels, for 5 epochs. Keras models are
trained with the input range that their backbone was published with ("native") and with [0, 1] ("rescale", the original study's
division by 255); the YOLOs know the second only, which is their own.

Each training is a process of its own and its row is written when it ends, so that a run that was stopped goes on where it was.
Networks that are trained whole use one thread, since their figures depend on the number. Nothing is tuned.
Writes benchmarks/results/equal_terms.json; about half an hour of two cores, and two hours of one core for the five.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pandas as pd

from leukemia_nb.data.classes import CLASSES
from leukemia_nb.data.files import read_table
from leukemia_nb.models.interface import make_model
from leukemia_nb.processing.dataset import Pairs, flip, write_dataset
from leukemia_nb.processing.splitting import split_pairs, usable_pairs

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "equal_terms.json"
FLIPS = ("none", "horizontal", "vertical", "both")
FROZEN = {"image_size": 224, "epochs": 20, "batch_size": 32, "patience": 20}
WHOLE = {"image_size": 64, "epochs": 5, "batch_size": 32, "patience": 5}
SETTINGS = dict.fromkeys(("mobilenet_v2", "dual_channel"), FROZEN) | dict.fromkeys(
    ("yolov8", "yolo11", "yolo12", "efficientnet_b0", "nasnet_mobile"), WHOLE
)
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}


def planned() -> list[dict]:
    "All trainings, seed by seed."
    rows = [
        {"model": model, "split": split, "preprocessing": preprocessing, "seed": seed}
        for seed, preprocessing, model, split in product(range(5), ("native", "rescale"), SETTINGS, ("random", "grouped"))
    ]
    return [
        row
        for row in rows
        if SETTINGS[row["model"]] is FROZEN
        or (row["seed"] < 3 and (row["preprocessing"] == "native" or not row["model"].startswith("yolo")))
    ]


def features_of_all(run: Path, preprocessing: str, file: Path) -> None:
    "MobileNetV2 features of every usable pair in each of its four flips, in the form that `write_features` has."
    from leukemia_nb.models.transfer import _describe_features, build_backbone, import_keras

    keras = import_keras()
    backbone, source = build_backbone("mobilenet_v2", "local", preprocessing)
    pooled = keras.Model(backbone.input, keras.layers.GlobalAveragePooling2D()(backbone.output))
    pairs = Pairs(run / "prepared", table=usable_pairs(read_table(run / "pairs.csv")))
    rows, found = np.arange(len(pairs)), {"original": [], "segmented": []}
    for kind, channel in product(FLIPS, found):
        for start in range(0, len(rows), 64):
            images = pairs.read(rows[start : start + 64], channel)
            found[channel].append(pooled.predict_on_batch(np.stack([flip(image, kind) for image in images]).astype(np.float32)))
    arrays = {channel: np.concatenate(parts) for channel, parts in found.items()}
    np.savez(
        file,
        **arrays,
        pair=np.tile(pairs.table["pair"].to_numpy(str), 4),
        flip=np.repeat(FLIPS, len(rows)),
        made_with=np.array(_describe_features("mobilenet_v2", source, preprocessing, 224)),
    )


def select_features(all_features: Path, dataset: Path, file: Path) -> None:
    "The rows of one dataset, as the step *features* of a study writes them."
    with np.load(all_features) as stored:
        places = {key: row for row, key in enumerate(zip(stored["pair"], stored["flip"]))}
        table = Pairs(dataset).table
        rows = [places[key] for key in zip(table["pair"], table["flip"])]
        arrays = {key: stored[key][rows] for key in ("original", "segmented", "pair", "flip")}
        np.savez(file, **arrays, subset=table["subset"].to_numpy(str), made_with=stored["made_with"])


def split_of(run: Path, row: dict) -> pd.DataFrame:
    "The split of one seed."
    pairs = usable_pairs(read_table(run / "pairs.csv"))
    groups = read_table(run / "split.csv").set_index("pair")["group"]
    pairs = pairs[pairs["pair"].isin(groups.index)].reset_index(drop=True)  # images with conflicting labels are left out
    return split_pairs(pairs, row["split"], groups=groups[pairs["pair"]], seed=row["seed"])


def train(run: Path, work: Path, row: dict) -> dict:
    "One training and its test accuracy."
    split, settings = split_of(run, row), SETTINGS[row["model"]]
    with tempfile.TemporaryDirectory(dir=work) as folder:
        dataset = Path(folder) / "dataset"
        write_dataset(split, run / "prepared", dataset, seed=row["seed"])
        file = Path(folder) / "features.npz" if settings is FROZEN else None
        if file:
            select_features(work / f"{row['preprocessing']}.npz", dataset, file)
        model = make_model(
            row["model"], weights="local", preprocessing=row["preprocessing"], seed=row["seed"], classes=CLASSES, **settings
        )
        began = time.perf_counter()
        model.fit(dataset, file)
        seconds = time.perf_counter() - began
        test = Pairs(dataset, "test", settings["image_size"])
        predicted = model.predict(test)
    counts = {"n_train": int((split["subset"] == "train").sum()), "n_test": len(test)}
    return (
        row
        | settings
        | counts
        | {
            "n_correct": int((predicted == test.labels).sum()),
            "best_epoch": model.best_epoch_,
            "weights": model.weights_source_,
            "seconds": round(seconds, 1),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of a finished study")
    parser.add_argument("--work", type=Path, default=Path("runs/equal_terms"), help="folder for features and datasets")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a row as JSON: train it here and print the result
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.one:
        print("\n" + json.dumps(train(options.run, options.work, json.loads(options.one))))
        return
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    for row in planned():
        if any(row.items() <= done.items() for done in rows):
            continue
        features = options.work / f"{row['preprocessing']}.npz"
        frozen = SETTINGS[row["model"]] is FROZEN
        if frozen and not features.is_file():
            features_of_all(options.run, row["preprocessing"], features)
        command = [sys.executable, __file__, options.run, "--work", options.work, "--one", json.dumps(row)]
        environment = os.environ if frozen else os.environ | ONE_THREAD
        printed = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
        done = printed.splitlines()[-1]
        rows.append(json.loads(done))
        print(done, flush=True)
        RESULTS.write_text(json.dumps({"data": "taleqani, Benign/Pre/Pro", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
