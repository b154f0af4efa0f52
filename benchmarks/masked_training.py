"""MobileNetV2 features with a linear classifier, trained on whole images, cells alone or background alone, tested on all three.

    python benchmarks/masked_training.py RUN

RUN is the folder of a finished study with pretrained MobileNetV2 features. The grid is that of Xiao et al. (2020): rows are
the images of training, columns those of the test, in five group-disjoint folds over all images. *Cells alone* are the segmented
images of the study; in *background alone* the white blood cells are inpainted (Only-BG). Nothing is tuned.
Writes benchmarks/results/masked_training.json; about 10 minutes of one core.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from leukemia_nb.audit.cue_conflict import make_composites
from leukemia_nb.data.files import read_table
from leukemia_nb.evaluation.uncertainty import korn_graubard_interval
from leukemia_nb.models.transfer import build_backbone, read_features
from leukemia_nb.processing.dataset import Pairs

ROOT = Path(__file__).resolve().parents[1]
FOLDS, SEED = 5, 0


def background_features(pairs: Pairs) -> np.ndarray:
    "Features (n, 1280) of the images with their white blood cells removed."
    backbone, _ = build_backbone("mobilenet_v2", weights="local")
    labels, found = pairs.labels, []
    other = int(np.flatnonzero(labels != labels[0])[0])  # composites want two classes; the added image is dropped again
    for start in range(0, len(pairs), 32):
        rows = [*range(start, min(start + 32, len(pairs))), 0, other]
        images, cells = pairs.read(rows), pairs.read(rows, "cells")
        made, _ = make_composites(images, cells, labels[rows], ["only_bg"], SEED)
        found.append(backbone.predict(made[:-2].astype(np.float32), verbose=0).mean(axis=(1, 2)))
    return np.concatenate(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of a finished study")
    run = parser.parse_args().run
    dataset = Pairs(run / "dataset")
    pairs = Pairs(run / "dataset", table=dataset.table[dataset.table["flip"] == "none"].reset_index(drop=True))
    arrays = read_features(run / "features/mobilenet_v2.npz")
    places = {name: row for row, (name, flip) in enumerate(zip(arrays["pair"], arrays["flip"])) if flip == "none"}
    rows = [places[name] for name in pairs.table["pair"]]
    X = {"whole image": arrays["original"][rows], "cells alone": arrays["segmented"][rows]}
    X["background alone"] = background_features(pairs)
    y = pairs.labels
    groups = read_table(run / "split.csv").set_index("pair")["group"][pairs.table["pair"]].to_numpy()
    correct = {(trained, tested): np.zeros(len(y)) for trained in X for tested in X}
    for train, test in StratifiedGroupKFold(FOLDS, shuffle=True, random_state=SEED).split(y, y, groups):
        for trained in X:
            model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(X[trained][train], y[train])
            for tested in X:
                correct[trained, tested][test] = model.predict(X[tested][test]) == y[test]
    table = []
    for (trained, tested), values in correct.items():
        found = korn_graubard_interval(values, groups)
        row = {"trained_on": trained, "tested_on": tested, "accuracy": found.estimate, "low": found.low, "high": found.high}
        table.append(row | {"n_correct": int(values.sum()), "n_images": found.n, "groups": found.groups})
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in table[-1].items()})
    report = {"folds": FOLDS, "interval": found.method, "chance": float(np.unique(y, return_counts=True)[1].max() / len(y))}
    target = ROOT / "benchmarks/results/masked_training.json"
    target.write_text(json.dumps(report | {"grid": table}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
