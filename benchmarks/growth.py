"""How time and memory grow with the number of images, step by step. Writes benchmarks/results/growth.json.

    nice -n 5 python benchmarks/growth.py [--images 500 2000 8000] [--tables 2000 20000 200000] [--only STAGE ...]

Images are 224 x 224 crops of synthetic smears, each turned by its own angle, resized, with its own light and noise, so
that they are new to the finder of near-duplicates; there is a smear for every 20 of them. Every fiftieth is a crop of
its predecessor's smear shifted by a third: near-duplicates that are to be found. Tables have so many rows and no
images behind them. Each measurement runs in a process of its own, with one worker: processor seconds (user and system)
and peak memory (ru_maxrss), that of the imports included. The exponent is the slope of log time on log n: 1 is linear.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "growth.json"
CLASSES = ("Normal", "Pre-B", "Pro-B")


def cpu_seconds() -> float:
    "Processor seconds of this process and of its children that have ended."
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in usage)


def write_images(folder: Path, number: int) -> None:
    "So many JPEG files, a third of them in each class."
    import cv2
    import numpy as np

    from leukemia_nb.data.images import write_image
    from leukemia_nb.data.synthetic import make_smear

    random = np.random.default_rng(0)
    for place in range(number):
        label = CLASSES[place // 20 % 3]
        if place % 20 == 0:
            smear = make_smear(label, seed=place, height=448, width=448).image
        again = place % 50 == 49
        if not again:
            angle, scale, centre = random.uniform(0, 360), random.uniform(0.8, 1.2), random.uniform(174, 274, 2)
        move = cv2.getRotationMatrix2D(tuple(centre), angle, scale)
        move[:, 2] += 112 - centre - (75, 0) if again else 112 - centre
        image = cv2.warpAffine(smear, move, (224, 224), borderMode=cv2.BORDER_REFLECT)
        noisy = image * random.uniform(0.9, 1.05) + random.normal(0, 3, image.shape)
        path = folder / label / f"{label}_{place:06d}.jpg"
        write_image(path, np.clip(noisy, 0, 255).astype(np.uint8), quality=90)


def measure_manifest(folder: Path) -> dict:
    "Search, open and hash all images."
    from leukemia_nb.data.manifest import build_manifest

    return {"images": len(build_manifest(folder / "images", log=lambda line: None))}


def measure_prepare(folder: Path) -> dict:
    "Manifest, masks, pairs and cell features."
    from leukemia_nb.processing.dataset import prepare_folder

    return {"images": len(prepare_folder(folder / "images", folder / "run", segmentation="nucleus", n_jobs=1))}


def measure_near_duplicates(folder: Path) -> dict:
    "Search of the images, with the seconds of its parts and how many of the shifted crops it finds."
    from leukemia_nb.data import near_duplicates as finder

    seconds = {}

    def timed(name: str, function: Callable) -> Callable:
        def run(*arguments: object, **options: object) -> object:
            start = cpu_seconds()
            try:
                return function(*arguments, **options)
            finally:
                seconds[name] = seconds.get(name, 0) + cpu_seconds() - start

        return run

    parts = {"candidates": "_similar_means", "matches and votes": "_propose_overlaps", "alignment": "_check_overlaps"}
    for name, function in parts.items():
        setattr(finder, function, timed(name, getattr(finder, function)))
    files = sorted(map(str, (folder / "images").rglob("*.jpg")), key=lambda path: path[-10:])
    start = cpu_seconds()
    found = finder.find_near_duplicates(files, n_jobs=1)
    seconds["description"] = cpu_seconds() - start - sum(seconds.values())
    number = [sorted(int(name[-10:-4]) for name in both) for both in zip(found["a"], found["b"])]
    shifted = [[place - 1, place] for place in range(49, len(files), 50)]
    kept = sum(both in number for both in shifted)
    return {"images": len(files), "parts": seconds, "shifted": len(shifted), "shifted_found": kept, "pairs": len(found)}


def measure_dataset(folder: Path) -> dict:
    "Links and flips of the dataset folder."
    import pandas as pd

    from leukemia_nb.data.files import read_table
    from leukemia_nb.processing.dataset import write_dataset
    from leukemia_nb.processing.splitting import split_pairs

    split = split_pairs(read_table(folder / "run" / "pairs.csv"))
    dataset = write_dataset(split, folder / "run" / "prepared", folder / "run" / "dataset")
    return {"images": len(split), "files": 3 * len(dataset), "flips": int(pd.Series(dataset["flip"] != "none").sum())}


def tables(number: int) -> tuple:
    "Pairs and near-duplicates of so many images: names as of several slides, one image in ten with a near-duplicate."
    import numpy as np
    import pandas as pd

    place = np.arange(number)
    label = np.array(CLASSES, object)[place % 3]
    pair = [f"{name}/image-{i}" for name, i in zip(label, place)]
    path = [f"/data/slides/{name}/slide{i // 50:05d}/image.jpg" for name, i in zip(label, place)]
    digest = [f"{i:064x}" for i in place]
    pairs = pd.DataFrame({"pair": pair, "class": label, "path": path, "sha256": digest, "pixels": digest, "problem": ""})
    near = place[: len(place) - 3][::10]
    return pairs, pd.DataFrame({"a": np.array(pair, object)[near], "b": np.array(pair, object)[near + 3]})


def measure_split_random(number: int) -> None:
    "Groups, random split, leakage."
    split_with("random", number)


def measure_split_grouped(number: int) -> None:
    "Groups, group-disjoint split, leakage."
    split_with("grouped", number)


def split_with(method: str, number: int) -> None:
    "Conflicting labels, groups, split, its check and leakage of so many rows."
    from leukemia_nb.data.manifest import mark_conflicting_labels, merge_groups
    from leukemia_nb.data.near_duplicates import group_images, leakage_report
    from leukemia_nb.processing.splitting import check_split, split_pairs, usable_pairs

    pairs, near = tables(number)
    usable = usable_pairs(mark_conflicting_labels(pairs))
    usable["found"] = group_images(usable["pair"], near)
    split = split_pairs(usable, method, groups=merge_groups(usable, ["sha256", "found"]))
    check_split(split, grouped=method == "grouped")
    leakage_report(split, near)


def measure_names(number: int) -> None:
    "Unique names of images of which all have the same file name."
    from leukemia_nb.data.files import unique_names

    assert len(set(unique_names(["image"] * number))) == number


def measure_listed_groups(number: int) -> None:
    "Groups of images listed by paths of another computer."
    import pandas as pd

    from leukemia_nb.data.files import write_table
    from leukemia_nb.processing.splitting import image_groups

    names = [f"{CLASSES[i % 3]}/slide{i:06d}/image.jpg" for i in range(number)]
    with tempfile.TemporaryDirectory() as folder:
        table = pd.DataFrame({"path": [f"D:\\slides\\{name}" for name in names], "group": [str(i // 50) for i in range(number)]})
        write_table(Path(folder) / "groups.csv", table)
        groups = image_groups(Path(folder) / "groups.csv", [f"/data/{name}" for name in names], log=print)
    assert groups == table["group"].tolist()


def measure_oversampling(number: int) -> None:
    "Choice and paths of flipped copies, three classes in proportions of 1 to 2 to 4."
    import numpy as np
    import pandas as pd

    from leukemia_nb.processing.dataset import _dataset_paths, oversample_with_flips

    label = np.array(CLASSES, object)[np.array([0, 1, 1, 2, 2, 2, 2])[np.arange(number) % 7]]
    pair = [f"{name}/image-{i}" for i, name in enumerate(label)]
    split = pd.DataFrame({"pair": pair, "class": label, "subset": "train"})
    _dataset_paths(oversample_with_flips(split))


def measure_written_table(number: int) -> None:
    "Write and read a table with a row for each of seven cells of an image."
    import numpy as np
    import pandas as pd

    from leukemia_nb.data.files import read_table, write_table
    from leukemia_nb.processing.cells import FEATURE_NAMES

    with tempfile.TemporaryDirectory() as folder:
        values = np.random.default_rng(0).normal(size=(7 * number, len(FEATURE_NAMES))).astype(np.float32)
        table = pd.DataFrame(values, columns=list(FEATURE_NAMES))
        table.insert(0, "pair", [f"Pre-B/image-{i // 7}" for i in range(len(table))])
        write_table(Path(folder) / "cells.csv", table)
        assert len(read_table(Path(folder) / "cells.csv")) == len(table)


def measure_report(number: int) -> None:
    "Tables and figures of the comparison of three models; 5 % of the images are of the test set."
    from leukemia_nb.evaluation import calibration, metrics, uncertainty
    from leukemia_nb.testing import dummy_predictions

    per_class = [max(number // 60, 5)] * 3
    predictions = {name: dummy_predictions(0.9 + place / 50, per_class, seed=place) for place, name in enumerate("abc")}
    groups = {pair: place // 2 for place, pair in enumerate(predictions["a"]["pair"])}
    metrics.accuracy_figure(metrics.compare_models(predictions))
    metrics.grouped_accuracy(predictions, groups)
    uncertainty.compare_model_pairs(predictions, groups=groups)
    [metrics.class_table(table) for table in predictions.values()]
    calibration.calibration_table(predictions)
    for figure in (metrics.confusion_figure, metrics.roc_figure, metrics.precision_recall_figure, calibration.reliability_figure):
        figure(predictions).savefig(os.devnull, format="png")


def measure_points(number: int) -> dict:
    "Matching and voting of 15 points of each image, in parts of a tenth of the size: parts at a tenth of the images."
    import numpy as np

    from leukemia_nb.data import near_duplicates as finder

    random = np.random.default_rng(0)
    kinds = random.gamma(0.5, 30, (500, 128))  # points look alike, as those of cells do
    finder._POINTS_AT_ONCE //= 10
    finder._N_KEYPOINTS = 15

    def points() -> tuple:
        values = kinds[random.integers(0, len(kinds), 15)] * random.uniform(0.4, 1.6, (15, 128))
        return random.uniform(0, 224, (15, 3)).astype(np.float32), np.clip(values, 0, 255).astype(np.uint8)

    described = [points()[1] for _ in range(300)]
    finder._read_green, finder._keypoints = (lambda path: path), (lambda place: (None, described[place % 300]))
    with tempfile.TemporaryDirectory() as folder:
        store = finder._Points(Path(folder), finder._part_centres(range(number), seed=0))
        for _ in range(number):
            store.add(*points())
        return {"n_parts": len(store.centres), "pairs": len(finder._propose_overlaps(store, Path(folder)))}


OF_IMAGES = {"manifest": measure_manifest, "prepare": measure_prepare, "near-duplicates": measure_near_duplicates}
OF_IMAGES |= {"dataset": measure_dataset}
OF_TABLES = {
    "split, random": measure_split_random,
    "split, grouped": measure_split_grouped,
    "unique names": measure_names,
    "listed groups": measure_listed_groups,
    "oversampling": measure_oversampling,
    "cell features": measure_written_table,
    "report": measure_report,
    "points": measure_points,
}
SIZES = {"points": [5000, 10000], "split, grouped": [2000, 8000]}  # of stages that take long


def inside(stage: str, argument: str) -> None:
    "Measure one stage; printed as JSON on the last line."
    import pandas  # noqa: F401

    import leukemia_nb.processing.dataset  # noqa: F401

    start = cpu_seconds(), time.perf_counter()
    extra = (OF_IMAGES[stage](Path(argument)) if stage in OF_IMAGES else OF_TABLES[stage](int(argument))) or {}
    row = {"cpu_seconds": cpu_seconds() - start[0], "seconds": time.perf_counter() - start[1]}
    print(json.dumps(row | {"peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024} | extra))


def run(stage: str, argument: str | Path | int, number: int) -> dict:
    "A stage in a process of its own."
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    call = [sys.executable, __file__, "--inside", stage, str(argument)]
    text = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    row = {"n": number} | json.loads(text.splitlines()[-1])
    print(stage, {name: round(value, 2) if isinstance(value, float) else value for name, value in row.items()}, flush=True)
    return row


def slope(sizes: list[int], values: list[float]) -> float:
    "Least-squares slope of log values on log sizes."
    import numpy as np

    return float(np.polyfit(np.log(sizes), np.log(np.maximum(values, 1e-3)), 1)[0])


def summarise(rows: list[dict]) -> dict:
    "Measurements of a stage with its exponents; of its parts as well, where it has some."
    sizes = [row["n"] for row in rows]
    last = rows[-2:]
    found = {"rows": rows}
    if len(rows) > 1:
        found["exponent"] = slope(sizes, [row["cpu_seconds"] for row in rows])
        found["exponent_of_the_last_two"] = slope([row["n"] for row in last], [row["cpu_seconds"] for row in last])
        grown = last[-1]["peak_memory_mb"] - last[0]["peak_memory_mb"]
        found["memory_kb_per_image"] = 1024 * grown / (last[-1]["n"] - last[0]["n"])
        if "parts" in rows[0]:
            parts = {name: slope(sizes, [row["parts"][name] for row in rows]) for name in rows[0]["parts"]}
            found["exponent_of_parts"] = parts
    return found


def rounded(content: object) -> object:
    "The same with four significant digits."
    if isinstance(content, dict):
        return {name: rounded(value) for name, value in content.items()}
    if isinstance(content, list):
        return [rounded(value) for value in content]
    return float(f"{content:.4g}") if isinstance(content, float) else content


def main(images: list[int], sizes: list[int], only: list[str], into: str) -> None:
    "Measure everything and write the results; those of other stages and other numbers of images are kept."
    stages: dict[str, list[dict]] = {}
    for number in images:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            chosen = [stage for stage in OF_IMAGES if not only or stage in only]
            if chosen:
                write_images(folder / "images", number)
            for stage in chosen:
                stages.setdefault(stage, []).append(run(stage, folder, number))
    for stage in [stage for stage in OF_TABLES if not only or stage in only]:
        stages[stage] = [run(stage, number, number) for number in SIZES.get(stage, sizes) if sizes]
    result = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    result.setdefault(into, {})
    for stage, rows in stages.items():
        known = result[into].get(stage, {"rows": []})["rows"]
        rows += [row for row in known if row["n"] not in [each["n"] for each in rows]]
        rows.sort(key=lambda row: row["n"])
    result["machine"] = {"cores": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()[0]}
    result[into] |= {stage: summarise(rows) for stage, rows in stages.items() if rows}
    RESULTS.write_text(json.dumps(rounded(result), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="*", default=[500, 2000, 8000], help="numbers of synthetic images")
    parser.add_argument("--tables", type=int, nargs="*", default=[2000, 20000, 200000], help="numbers of rows")
    parser.add_argument("--only", nargs="*", default=[], help="stages to be measured; all where left out")
    parser.add_argument("--into", default="stages", help="key of the results; 'before' with the code of another checkout")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        inside(*options.inside)
    else:
        main(options.images, options.tables, options.only, options.into)
