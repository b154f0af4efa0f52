"""This project's ways of training beside the frameworks' plain ones.

    LEUKEMIA_NB_WEIGHTS=../shared/weights python benchmarks/training.py runs/taleqani/dataset [--only head|keras|yolo]

head: a head on features that are computed once, against `fit` through the frozen backbone in every epoch (Keras' guide). Both
train MobileNetV2's head on the same dataset folder, with the same batch size, learning rate and number of epochs, one after the
other in one process; the time runs from building the network to the trained network.
keras, yolo: processor time of a training step of 32 images of 224 x 224 pixels on one thread. Keras networks with fused batch
normalisation and Adam against Keras' own, each in its process, YOLO networks in the channels-last memory format against PyTorch's
default, in turns in one process; medians. For Keras also the first step, in which TensorFlow traces and optimises the graph.
Writes benchmarks/results/training.json.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}

import numpy as np
import pandas as pd

from leukemia_nb.evaluation.uncertainty import clopper_pearson
from leukemia_nb.models.interface import BACKBONES, local_weights, make_model, package_versions
from leukemia_nb.models.transfer import build_backbone, compile_fused
from leukemia_nb.processing.dataset import Pairs

RESULT = Path(__file__).parent / "results" / "training.json"
SIZE = 224


def once(dataset: Path, epochs: int) -> Any:
    """This project's way."""
    model = make_model("mobilenet_v2", weights="local", image_size=SIZE, epochs=epochs, patience=epochs)
    model.fit(dataset)
    return model.network_


def every_epoch(dataset: Path, epochs: int) -> Any:
    """Keras' guide to transfer learning, first part: the base model frozen, `fit` on images."""
    import keras

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


def processor_seconds(step) -> float:
    """Processor time of one call."""
    began = time.process_time()
    step()
    return time.process_time() - began


def summary(ours: float, plain: float, repeats: int) -> dict:
    """Both processor times and their ratio."""
    faster = round(float(plain / ours), 2)
    return {"seconds": round(float(ours), 3), "plain_seconds": round(float(plain), 3), "times_faster": faster, "repeats": repeats}


def keras_steps(name: str, repeats: int) -> dict:
    """A network of random weights trained whole, compiled by `compile_fused` and by Keras' `compile`, in a process each."""
    command = [sys.executable, __file__, "--repeats", str(repeats), "--inside"]
    run = [subprocess.run([*command, side, name], check=True, capture_output=True, text=True) for side in ("fused", "plain")]
    ours, plain = [json.loads(each.stdout.splitlines()[-1]) for each in run]
    return {
        "network": name,
        "building_and_first_step": summary(ours["first"], plain["first"], 1),
        "step": summary(ours["step"], plain["step"], repeats),
    }


def keras_side(side: str, name: str, repeats: int) -> dict:
    """Processor time of building a network with its first step, and of a step."""
    import keras

    random = np.random.default_rng(0)
    images, targets = random.integers(0, 256, (32, SIZE, SIZE, 3)).astype(np.float32), random.integers(0, 3, 32)
    made = []

    def first() -> None:
        backbone, _ = build_backbone(name, weights="random", image_size=SIZE)
        pooled = keras.layers.GlobalAveragePooling2D()(backbone.output)
        network = keras.Model(backbone.input, keras.layers.Dense(3, activation="softmax")(pooled))
        if side == "fused":
            network = compile_fused(network, 1e-3)
        else:
            adam = keras.optimizers.Adam(1e-3)
            network.compile(adam, "sparse_categorical_crossentropy", metrics=["accuracy"], jit_compile=False)
            adam.build(network.trainable_variables)
        network.train_on_batch(images, targets)
        made.append(network)

    begun = processor_seconds(first)
    steps = [processor_seconds(lambda: made[0].train_on_batch(images, targets)) for _ in range(repeats)]
    return {"first": begun, "step": float(np.median(steps))}


def yolo_steps(name: str, repeats: int) -> dict:
    """A YOLO classifier of random weights, in both memory formats."""
    import torch
    from ultralytics.nn.tasks import ClassificationModel

    torch.set_num_threads(1)
    images, targets = torch.rand(32, 3, SIZE, SIZE), torch.arange(32) % 3

    def step(memory_format):
        network = ClassificationModel(f"{name}n-cls.yaml", nc=3, verbose=False).train().to(memory_format=memory_format)
        adam = torch.optim.AdamW(network.parameters(), 1e-3)

        def one() -> None:
            adam.zero_grad()
            torch.nn.functional.cross_entropy(network(images), targets).backward()
            adam.step()

        one()
        return one

    both = step(torch.channels_last), step(torch.contiguous_format)
    times = np.median([[processor_seconds(each) for each in both] for _ in range(repeats)], axis=0)
    return {"network": name, "step": summary(*times, repeats)}


def train_head(options: argparse.Namespace) -> dict:
    """Both ways of training MobileNetV2's head."""
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
    return {
        "model": "mobilenet_v2",
        "dataset": str(Path(*options.dataset.parts[-3:])),
        "epochs": options.epochs,
        **{subset: len(pairs) for subset, pairs in subsets.items()},
        "rows": rows,
        "times_faster": round(rows[1]["seconds"] / rows[0]["seconds"], 1),
        "interval": "Clopper-Pearson 95 %",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, nargs="?", default=Path("runs/taleqani/dataset"), help="dataset folder of a study")
    parser.add_argument("--epochs", type=int, default=20, help="of the head")
    parser.add_argument("--repeats", type=int, default=5, help="of a step")
    parser.add_argument("--only", choices=("head", "keras", "yolo"), help="one part; what is known of the others is kept")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)  # one side of keras
    options = parser.parse_args()
    if options.inside:
        return print(json.dumps(keras_side(*options.inside, options.repeats)))
    if options.only is None:  # TensorFlow and PyTorch cannot share a process
        for part in ("head", "keras", "yolo"):
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", part], check=True)
        return
    if options.only != "head" and "TF_NUM_INTRAOP_THREADS" not in os.environ:
        one_thread = dict.fromkeys(("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS"), "1")
        subprocess.run([sys.executable, *sys.argv], env=os.environ | one_thread, check=True)
        return
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "load_before": round(os.getloadavg()[0], 1)}
    machine["versions"] = package_versions("keras", "tensorflow", "torch", "ultralytics", "numpy")
    if options.only == "head":
        if not Path(f"{options.dataset}.csv").is_file():
            parser.exit(message=f"{options.dataset}: no dataset of a study; run `make study` with the real images first.\n")
        found = train_head(options)
    else:
        measure, names = {"keras": (keras_steps, BACKBONES), "yolo": (yolo_steps, ("yolov8", "yolo11", "yolo12"))}[options.only]
        found = {"rows": []}
        for name in names:
            found["rows"].append(measure(name, options.repeats))
            print(found["rows"][-1], flush=True)
    known = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    known = {part: known[part] for part in ("head", "keras", "yolo") if part in known}
    RESULT.write_text(json.dumps(known | {options.only: found | machine}, indent=1) + "\n")


if __name__ == "__main__":
    main()
