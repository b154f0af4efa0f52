"""Speed and memory of preparing pairs, on synthetic 1024x768 smears. Writes benchmarks/results/prepare.json.

    python benchmarks/prepare.py [--images 48]

Measured: images a second with 1 and 2 workers; peak memory for N and 4N images; from a decoded image to a saved
pair, against the same recipe with cv2.kmeans (ten attempts), with equal masks; reading of saved pairs.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from leukemia_nb.data.manifest import build_manifest
from leukemia_nb.data.files import atomic_path
from leukemia_nb.data.images import read_image, resize_square, write_image
from leukemia_nb.processing.dataset import Pairs, _save_png, _pair_files, prepare_pairs
from leukemia_nb.processing.segmentation import a_channel, apply_mask, cluster_mask, original_study_mask
from leukemia_nb.data.synthetic import make_smear

RESULTS = Path(__file__).parent / "results" / "prepare.json"
CLASSES = ("Normal", "Pre-B", "Pro-B")


def write_images(folder: Path, number: int) -> None:
    "As many smears as asked for, as JPEG, a third of them in each class."
    for place in range(number):
        label = CLASSES[place % 3]
        write_image(folder / label / f"{label}_{place:03d}.jpg", make_smear(label, seed=place).image)


def prepare(folder: str, out: str, workers: int, times: int) -> None:
    "Prepare a folder, each image under so many names; print seconds and peak memory. Runs in a process of its own."
    manifest = build_manifest(folder)
    rows = [manifest.assign(pair=manifest["pair"] + f"_{copy}") for copy in range(times)]
    many = type(manifest)({name: np.concatenate([part[name] for part in rows]) for name in manifest.columns})
    if workers > 1:
        prepare_pairs(manifest[:workers], f"{out}/warm", n_jobs=workers)
    start = time.perf_counter()
    table = prepare_pairs(many, out, n_jobs=workers)
    seconds = time.perf_counter() - start
    assert (table["problem"] == "").all() and len(table) == len(manifest) * times
    peak = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    if workers > 1:
        from joblib.externals.loky import get_reusable_executor

        get_reusable_executor().shutdown(wait=True)
        peak[1] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(
        json.dumps(
            {
                "workers": workers,
                "images": len(many),
                "images_per_second": round(len(many) / seconds, 2),
                "peak_memory_mb": round(peak[0]),
                "peak_memory_of_a_worker_mb": round(peak[1]) if workers > 1 else None,
            }
        )
    )


def exact_recipe(image: np.ndarray, folder: Path, pair: str) -> np.ndarray:
    "The same steps as here: mask, original and segmented image, saved."
    mask, names = original_study_mask(image), _pair_files(pair)
    for channel, one in (("original", image), ("segmented", apply_mask(image, mask))):
        _save_png(folder / names[channel], resize_square(one))
    return mask


def kmeans_recipe(image: np.ndarray, folder: Path, pair: str) -> tuple[np.ndarray, np.ndarray]:
    "The original study's recipe as it is usually written: cv2.kmeans with ten attempts on the a channel, then the same clean-up."
    a = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)[:, :, 1]
    stop = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 100, 0.2)
    _, labels, centres = cv2.kmeans(a.reshape(-1, 1).astype(np.float32), 2, None, stop, 10, cv2.KMEANS_RANDOM_CENTERS)
    cluster = (labels.reshape(a.shape) == centres.argmax()).astype(np.uint8)
    mask = cv2.morphologyEx(cluster, cv2.MORPH_OPEN, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3)))
    mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (7, 7)))
    _, parts, statistics, _ = cv2.connectedComponentsWithStats(mask)
    large = statistics[:, cv2.CC_STAT_AREA] >= 500 * mask.size / (1024 * 768)
    large[0] = False
    mask = large[parts]
    segmented = cv2.bitwise_and(image, image, mask=mask.astype(np.uint8))
    names = _pair_files(pair)
    for name, one in ((names["original"], image), (names["segmented"], segmented)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        small = cv2.resize(one, (224, 224), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(folder / name), cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
    return mask, cluster > 0


def scatter(image: np.ndarray, cluster: np.ndarray) -> float:
    "Sum of squares within two clusters of the a channel: what k-means is to make small."
    a = a_channel(image).astype(float)
    return sum(float(((a[side] - a[side].mean()) ** 2).sum()) for side in (cluster, ~cluster))


def compare(files: list[Path], folder: Path) -> dict:
    "Both recipes on the same decoded images, one after the other, single-threaded; median times and equal masks."
    cv2.setNumThreads(1)
    cv2.setRNGSeed(0)
    seconds: dict[str, list[float]] = {"ours": [], "kmeans": []}
    equal, same_files, tighter = 0, 0, []
    for file in files:
        image = read_image(file)
        start = time.perf_counter()
        mine = exact_recipe(image, folder, "Pre-B/ours")
        middle = time.perf_counter()
        (theirs, cluster) = kmeans_recipe(image, folder, "Pre-B/kmeans")
        seconds["ours"].append(middle - start)
        seconds["kmeans"].append(time.perf_counter() - middle)
        equal += int((mine == theirs).all())
        if (mine != theirs).any():
            tighter.append(scatter(image, cluster_mask(a_channel(image))) < scatter(image, cluster))
        same_files += all(
            (read_image(folder / one) == read_image(folder / other)).all()
            for one, other in list(zip(_pair_files("Pre-B/ours").values(), _pair_files("Pre-B/kmeans").values()))[:2]
        )
    ours, kmeans = (float(np.median(seconds[name])) for name in ("ours", "kmeans"))
    return {
        "images": len(files),
        "size": "x".join(map(str, image.shape[1::-1])),
        "ours_ms": round(ours * 1e3, 1),
        "cv2_kmeans_ms": round(kmeans * 1e3, 1),
        "times_faster": round(kmeans / ours, 1),
        "target_times_faster": 15,
        "equal_masks": equal,
        "unequal_masks_where_ours_is_the_better_clustering": sum(tighter),
        "equal_saved_pairs": same_files,
    }


def reading(table, folder: Path) -> dict:
    "Pairs a second on reading, by what is read."
    pairs, found = Pairs(folder, table=table), {}
    for name, read in (("originals", lambda: pairs.read(slice(None))), ("both", lambda: pairs[:])):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            read()
            times.append(time.perf_counter() - start)
        found[f"{name}_per_second"] = round(len(pairs) / min(times))
    return found


def run(folder: Path, out: Path, workers: int, times: int) -> dict:
    "`prepare` in a process of its own, on a fresh folder."
    shutil.rmtree(out, ignore_errors=True)
    call = [sys.executable, __file__, "--inside", str(folder), str(out), str(workers), str(times)]
    return json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main(number: int) -> None:
    "Measure everything and write the results."
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_images(work / "smears", number)
        result = {
            "machine": {
                "cpu": cpu(),
                "cores": os.cpu_count(),
                "load_before": os.getloadavg()[0],
                "python": platform.python_version(),
                "opencv": cv2.__version__,
                "numpy": np.__version__,
            },
            "images": f"{number} synthetic smears, 1024x768 JPEG",
        }
        result["prepare"] = [run(work / "smears", work / "pairs", workers, times) for workers in (1, 2) for times in (1, 4)]
        manifest = build_manifest(work / "smears")
        table = prepare_pairs(manifest, work / "read")
        start = time.perf_counter()
        prepare_pairs(manifest, work / "read")
        result["resume_images_per_second"] = round(len(table) / (time.perf_counter() - start))
        result["reading"] = reading(table, work / "read")
        result["segment_to_saved_pair"] = compare([work / "smears" / path for path in manifest["path"][:24]], work / "compared")
        real = sorted(
            (Path(os.environ.get("LEUKEMIA_NB_SHARED", Path(__file__).parents[2] / "shared")) / "data/kaggle_fullres").rglob(
                "*.jpg"
            )
        )
        real = [file for file in real if read_image(file).shape == (768, 1024, 3)]
        if real:
            result["segment_to_saved_pair_real_images"] = compare(real[:24], work / "compared")
        result["machine"]["load_after"] = os.getloadavg()[0]
    RESULTS.parent.mkdir(exist_ok=True)
    with atomic_path(RESULTS) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def cpu() -> str:
    "Name of the processor, where the system tells it."
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=48, help="synthetic images, N; memory is measured for N and 4N")
    parser.add_argument("--inside", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        prepare(*options.inside[:2], *map(int, options.inside[2:]))
    else:
        main(options.images)
