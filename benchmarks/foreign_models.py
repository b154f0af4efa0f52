"""Audit classifiers built as public notebooks on this data set build them, written anew.

    nice -n 10 python benchmarks/foreign_models.py train --work FOLDER [--only NAME]
    nice -n 10 python benchmarks/foreign_models.py audit --work FOLDER [--only NAME]

They are our re-implementations of what such notebooks have in common, at a reduced size, not anybody's models: none of their
code or weights is used. Each splits the images at random, as most such notebooks do, so near-duplicates of test images are in
training: 80 % for training, the rest for the test, from which the audit draws. `train` leaves four model files in FOLDER, each in
the format that such a notebook leaves, with a TOML beside it where the file does not say how it wants its pixels; `audit` runs
`leukemia_nb audit` on each and writes benchmarks/results/foreign_models.json, a model at a time.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT / "shared" if (ROOT / "shared").exists() else ROOT.parent / "shared"
RESULTS = ROOT / "benchmarks/results/foreign_models.json"
CLASSES = ("Benign", "Pre", "Pro")  # the folders of the publication, in the order that every loader below takes them
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def split_images(work: Path, seed: int = 0) -> None:
    "Links to the images in train/<class> and test/<class>: a random 80/20 split, as `train_test_split` gives it."
    rng = np.random.default_rng(seed)
    for name in CLASSES:
        files = sorted((SHARED / "data/taleqani" / name).glob("*.jpg"))
        test = set(rng.permutation(len(files))[: len(files) // 5].tolist())
        for place, file in enumerate(files):
            link = work / "images" / ("test" if place in test else "train") / name / file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to(file.resolve())


def keras_data(work: Path, size: int):
    import keras

    folder, options = work / "images/train", {"image_size": (size, size), "batch_size": 32, "label_mode": "categorical"}
    return keras.utils.image_dataset_from_directory(folder, seed=1, **options)


def keras_cnn(work: Path) -> None:
    "Plain CNN, Keras (.keras): rescaling inside, four convolutions with pooling, two dense layers, from random weights."
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)
    parts: list = [keras.Input((128, 128, 3)), layers.Rescaling(1 / 255)]
    for filters in (16, 32, 64, 128):
        parts += [layers.Conv2D(filters, 3, activation="relu", padding="same"), layers.MaxPooling2D()]
    parts += [layers.Flatten(), layers.Dense(128, activation="relu"), layers.Dropout(0.5), layers.Dense(3, activation="softmax")]
    model = keras.Sequential(parts)
    model.compile("adam", "categorical_crossentropy", metrics=["accuracy"])
    model.fit(keras_data(work, 128), epochs=10, verbose=2)
    model.save(work / "keras_cnn.keras")


def keras_mobilenet(work: Path) -> None:
    "Transfer learning, Keras (ONNX): MobileNetV2 of ImageNet frozen, one dense layer on its averaged features, pixels -1 to 1."
    import keras

    keras.utils.set_random_seed(0)
    weights = next((SHARED / "weights").glob("mobilenet_v2*no_top.h5"))
    base = keras.applications.MobileNetV2((160, 160, 3), include_top=False, weights=str(weights), pooling="avg")
    batches = [(keras.applications.mobilenet_v2.preprocess_input(x.numpy()), y.numpy()) for x, y in keras_data(work, 160)]
    features = np.concatenate([base.predict_on_batch(x) for x, _ in batches])
    head = keras.Sequential([keras.Input((1280,)), keras.layers.Dropout(0.2), keras.layers.Dense(3, activation="softmax")])
    head.compile("adam", "categorical_crossentropy", metrics=["accuracy"])
    head.fit(features, np.concatenate([y for _, y in batches]), epochs=20, verbose=2)
    whole = keras.Model(base.input, head(base.output, training=False))
    whole(np.zeros((1, 160, 160, 3), np.float32))  # Keras exports only what was called
    whole.export(work / "keras_mobilenet.onnx", format="onnx", verbose=False)
    write_settings(work / "keras_mobilenet.toml", range="-1-1", classes=CLASSES)


def torch_mobilenet(work: Path) -> None:
    "MobileNetV3-small, torchvision (ONNX): random weights, ImageNet's mean and standard deviation, logits."
    import torch
    from torchvision import datasets, models
    from torchvision.transforms import v2

    torch.manual_seed(0)
    steps = [v2.Resize((128, 128)), v2.RandomHorizontalFlip(), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    data = datasets.ImageFolder(work / "images/train", v2.Compose([*steps, v2.Normalize(**IMAGENET)]))
    loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True, drop_last=True)
    model = models.mobilenet_v3_small(num_classes=3)
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=10 * len(loader))
    for epoch in range(10):
        losses = []
        for images, labels in loader:
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {np.mean(losses):.3f}", flush=True)
    axes = {"images": {0: "n"}, "logits": {0: "n"}}
    names = {"input_names": ["images"], "output_names": ["logits"], "dynamic_axes": axes}
    torch.onnx.export(model.eval(), (torch.zeros(1, 3, 128, 128),), work / "torch_mobilenet.onnx", dynamo=False, **names)
    write_settings(work / "torch_mobilenet.toml", range="0-1", **IMAGENET, classes=CLASSES)


def yolo(work: Path) -> None:
    "YOLOv8n-cls, ultralytics (.pt): ImageNet weights, fine-tuned by its command line for three epochs."
    command = ["yolo", "classify", "train", f"data={work / 'images'}", f"model={SHARED / 'weights/yolov8n-cls.pt'}", "imgsz=128"]
    command += [
        "epochs=3",
        "batch=32",
        "workers=0",
        "device=cpu",
        f"project={work}",
        "name=yolo_run",
        "exist_ok=True",
        "plots=False",
    ]
    subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:], "val=False"], check=True, cwd=work)
    shutil.copy(work / "yolo_run/weights/last.pt", work / "yolo.pt")


BUILDERS: dict[str, Callable[[Path], None]] = {
    "keras_cnn": keras_cnn,
    "keras_mobilenet": keras_mobilenet,
    "torch_mobilenet": torch_mobilenet,
    "yolo": yolo,
}
FILES = {"keras_cnn": "keras_cnn.keras", "keras_mobilenet": "keras_mobilenet.onnx", "torch_mobilenet": "torch_mobilenet.onnx"}
FILES["yolo"] = "yolo.pt"


def write_settings(file: Path, **settings) -> None:
    file.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))


def train(work: Path, only: list[str]) -> None:
    "Each model in a process of its own: two frameworks in one process abort it."
    split_images(work)
    for name in only:
        began = os.times()
        code = "import pathlib, sys; sys.path.insert(0, sys.argv[1]); import foreign_models as f; "
        code += "f.BUILDERS[sys.argv[2]](pathlib.Path(sys.argv[3]))"
        subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), name, str(work)], check=True)
        ended = os.times()
        seconds = ended.children_user + ended.children_system - began.children_user - began.children_system
        (work / f"{name}.json").write_text(json.dumps({"cpu_seconds": round(seconds), "at": time.strftime("%Y-%m-%d")}))
        print(f"{name}: {seconds:.0f} CPU seconds", flush=True)


def audit(work: Path, only: list[str]) -> None:
    "`leukemia_nb audit` of each model on its test images, in intervals that count overlapping fields of view as one."
    fields = pd.read_csv(SHARED / "data/taleqani_fields.csv").rename(columns={"file": "path", "overlap_group": "group"})
    fields[fields["path"].str.split("/").str[0].isin(CLASSES)][["path", "group"]].to_csv(work / "groups.csv", index=False)
    for name in only:
        out = work / "audits" / name
        command = [
            sys.executable,
            "-m",
            "leukemia_nb",
            "audit",
            work / "images/test",
            "--model",
            work / FILES[name],
            "--out",
            out,
        ]
        options = ["--images", "150", "--groups", work / "groups.csv", *(["--allow-pickle"] if name == "yolo" else [])]
        subprocess.run([*map(str, [*command, *options])], check=True, cwd=ROOT)
        found = json.loads((out / "audit.json").read_text())
        result = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"models": {}}
        measures = {
            key: found[key] for key in ("rates", "differences", "lowest_under_corruption", "saliency", "only_bg_without_cells")
        }
        described = {
            "description": BUILDERS[name].__doc__,
            "kind": Path(FILES[name]).suffix,
            **json.loads((work / f"{name}.json").read_text()),
        }
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
        described |= {"commit": commit, "images": found["images"], "chance": found["chance"], **measures}
        result["models"][name] = described
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["train", "audit"])
    parser.add_argument("--work", type=Path, required=True, help="folder for the images' links, the models and the audits")
    parser.add_argument("--only", nargs="*", default=list(BUILDERS), choices=list(BUILDERS))
    asked = parser.parse_args()
    {"train": train, "audit": audit}[asked.stage](asked.work.resolve(), asked.only)
