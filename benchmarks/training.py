"""Training a frozen MobileNetV2 with cached features against the same training without; the same weights come out.

    python benchmarks/training.py [--per-class 90] [--epochs 20] [--image-size 224] [--statistics]

Needs the real images and the MobileNetV2 weights of ../shared. Also measures how BatchNorm's statistics decide what a network
trained from random weights answers (see nbs/03_models/20_transfer.ipynb). Writes benchmarks/results/training.json.
"""

import argparse
import json
import os
import platform
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("LEUKEMIA_NB_SHARED", ROOT.parent / "shared"))
os.environ.setdefault("LEUKEMIA_NB_WEIGHTS", str(SHARED / "weights"))
sys.path.insert(0, str(ROOT))

import numpy as np

from leukemia_nb.data.images import read_image
from leukemia_nb.models.interface import Images, make_model, versions


def real_images(per_class: int, size: int):
    """Training and validation images (2:1), evenly spread over the three study classes."""
    images, labels = [], []
    for folder, name in {"Benign": "Normal", "Pre": "Pre-B", "Pro": "Pro-B"}.items():
        files = sorted((SHARED / "data" / "taleqani" / folder).iterdir())
        for place in np.linspace(0, len(files) - 1, per_class).round().astype(int):
            images.append(read_image(files[place]))
            labels.append(name)
    validation = np.arange(len(labels)) % 3 == 2
    return [
        Images([p for p, part in zip(images, chosen) if part], np.array(labels)[chosen], size)
        for chosen in (~validation, validation)
    ]


def train(name: str, cache: bool, sources, **settings):
    """A trained model and the seconds it took, building and compiling included."""
    model = make_model(name, **settings)
    model.cache_features = cache
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        model.fit(*sources, progress=print)
    return model, time.perf_counter() - start


def cached_against_long_way(name: str, sources, **settings) -> dict:
    """Seconds both ways and whether weights and answers are the same to the last bit."""
    cached, cached_seconds = train(name, True, sources, **settings)
    long, long_seconds = train(name, False, sources, **settings)
    weights = [np.array_equal(a, b) for a, b in zip(cached.head_.get_weights(), long.head_.get_weights(), strict=True)]
    return dict(
        model=name,
        weights_source=cached.weights_source_,
        training=len(sources[0]),
        validation=len(sources[1]),
        image_size=settings["image_size"],
        epochs=len(cached.history_),
        seconds_cached=round(cached_seconds, 2),
        seconds_long_way=round(long_seconds, 2),
        times_faster=round(long_seconds / cached_seconds, 2),
        seconds_per_epoch_cached=round(float(cached.history_.seconds[1:].median()), 4),
        seconds_per_epoch_long_way=round(float(long.history_.seconds[1:].median()), 3),
        identical_weights=all(weights),
        identical_history=bool(cached.history_.drop(columns="seconds").equals(long.history_.drop(columns="seconds"))),
        identical_answers=bool(np.array_equal(cached.predict_proba(sources[1]), long.predict_proba(sources[1]))),
        validation_accuracy=round(float(cached.history_.val_accuracy.max()), 4),
    )


def statistics_of_batchnorm(epochs: int = 8) -> list[dict]:
    """One training of a whole random network, asked with measured statistics and with Keras' own running ones."""
    sources, rows = real_images(100, 96), []
    for images in (256, 0):
        model = make_model("mobilenet_v2", weights="random", image_size=96, batch_size=16, epochs=epochs, patience=epochs)
        model.statistics_images = images
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            history = model.fit(*sources, progress=print)
        rows.append(
            dict(
                statistics="measured after each epoch" if images else "Keras' running average",
                **history.drop(columns=["epoch", "seconds"]).round(4).to_dict("list"),
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per-class", type=int, default=90, help="images of each class, two thirds for training")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "training.json")
    parser.add_argument("--statistics", action="store_true", help="measure the BatchNorm statistics too (minutes)")
    options = parser.parse_args()
    if not (SHARED / "data" / "taleqani").is_dir():
        sys.exit(f"no real images in {SHARED / 'data'}")
    sources = real_images(options.per_class, options.image_size)
    settings = dict(image_size=options.image_size, epochs=options.epochs, patience=options.epochs)
    rows = [cached_against_long_way("mobilenet_v2", sources, **settings)]
    result = dict(
        training=rows,
        load_before=os.getloadavg()[0],
        cores=os.cpu_count(),
        machine=platform.processor() or platform.machine(),
        versions=versions("keras", "tensorflow", "numpy"),
        python=platform.python_version(),
    )
    old = json.loads(options.out.read_text()) if options.out.exists() else {}
    result["statistics"] = statistics_of_batchnorm() if options.statistics else old.get("statistics")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
