"""A head on features that are computed once, against `fit` through the frozen backbone in every epoch (Keras' guide).

    LEUKEMIA_NB_WEIGHTS=../shared/weights python benchmarks/training.py runs/taleqani/dataset [--epochs 20]

Both train MobileNetV2's head on the same dataset folder, with the same batch size, learning rate and number of epochs, one after
the other in one process; the time runs from building the network to the trained network. Writes benchmarks/results/training.json.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import keras
import pandas as pd

from leukemia_nb.evaluation.uncertainty import clopper_pearson
from leukemia_nb.models.interface import BACKBONES, local_weights, make_model, package_versions
from leukemia_nb.processing.dataset import Pairs

RESULT = Path(__file__).parent / "results" / "training.json"
SIZE = 224


def once(dataset: Path, epochs: int) -> keras.Model:
    """This project's way."""
    model = make_model("mobilenet_v2", weights="local", image_size=SIZE, epochs=epochs, patience=epochs)
    model.fit(dataset)
    return model.network_


def every_epoch(dataset: Path, epochs: int) -> keras.Model:
    """Keras' guide to transfer learning, first part: the base model frozen, `fit` on images."""
    train, val = (
        keras.utils.image_dataset_from_directory(
            dataset / "original" / subset, image_size=(SIZE, SIZE), batch_size=32, verbose=False
        )
        for subset in ("train", "val")
    )
    base = keras.applications.MobileNetV2(
        weights=str(local_weights(*BACKBONES["mobilenet_v2"].files)), include_top=False, input_shape=(SIZE, SIZE, 3)
    )
    base.trainable = False
    inputs = keras.Input((SIZE, SIZE, 3))
    x = keras.layers.Rescaling(1 / 127.5, offset=-1)(inputs)
    x = keras.layers.GlobalAveragePooling2D()(base(x, training=False))
    outputs = keras.layers.Dense(len(train.class_names), activation="softmax")(keras.layers.Dropout(0.2)(x))
    network = keras.Model(inputs, outputs)
    network.compile(keras.optimizers.Adam(1e-3), loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    network.fit(train, validation_data=val, epochs=epochs, verbose=0)
    return network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, nargs="?", default=Path("runs/taleqani/dataset"), help="dataset folder of a study")
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    if not Path(f"{options.dataset}.csv").is_file():
        parser.exit(message=f"{options.dataset}: no dataset of a study; run `make study` with the real images first.\n")
    subsets = {subset: Pairs(options.dataset, subset, SIZE) for subset in ("train", "val", "test")}
    test = subsets["test"]
    pixels, labels = test.read(range(len(test)), "original").astype("float32"), test.labels
    classes = sorted(set(labels))
    rows = []
    for name, train in (("features computed once", once), ("fit through the backbone", every_epoch)):
        began = time.perf_counter()
        network = train(options.dataset, options.epochs)
        seconds = time.perf_counter() - began
        predicted = network.predict(pixels, verbose=0).argmax(axis=1)
        n_correct = int((pd.Categorical(labels, classes).codes == predicted).sum())
        low, high = clopper_pearson(n_correct, len(labels))
        rows.append(
            {"way": name, "seconds": round(seconds, 1), "n_correct": n_correct, "n_images": len(labels), "low": low, "high": high}
        )
        print(rows[-1], flush=True)
    result = {
        "model": "mobilenet_v2",
        "epochs": options.epochs,
        **{subset: len(pairs) for subset, pairs in subsets.items()},
        "rows": rows,
        "times_faster": round(rows[1]["seconds"] / rows[0]["seconds"], 1),
        "interval": "Clopper-Pearson 95 %",
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": package_versions("keras", "tensorflow", "numpy"),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(result["times_faster"], "times faster")


if __name__ == "__main__":
    main()
