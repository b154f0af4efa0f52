"""Memory of `leukemia_nb predict` over a hundred and over ten thousand images. Writes benchmarks/results/predict_memory.json.

    python benchmarks/predict_memory.py [--model FILE] [--images 10000]

The images are hard links to a few synthetic smears of different sizes; each run is a process of its own, with CSV and
JSON written, one or two worker processes. Measured: the largest resident set of the command, and of its largest worker.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import psutil

from leukemia_nb.data.files import atomic_path
from leukemia_nb.data.images import write_image
from leukemia_nb.inference.model_file import open_model_file
from leukemia_nb.testing import dummy_model_file
from leukemia_nb.data.synthetic import make_smear

RESULTS = Path(__file__).parent / "results" / "predict_memory.json"
SIZES = ((192, 256), (224, 224), (240, 320))


def write_images(folder: Path, number: int) -> None:
    "As many images as asked for: six smears, and hard links to them."
    folder.mkdir(parents=True)
    for place, (label, size) in enumerate((label, size) for label in ("Normal", "Pre-B") for size in SIZES):
        write_image(folder / f"{place:05d}.jpg", make_smear(label, place, *size).image)
    for place in range(6, number):
        os.link(folder / f"{place % 6:05d}.jpg", folder / f"{place:05d}.jpg")


def run(folder: Path, model: Path, work: Path, n_jobs: int) -> dict:
    "Memory and time of one command."
    command = [
        sys.executable,
        "-m",
        "leukemia_nb",
        "predict",
        str(folder),
        "--model",
        str(model),
        "--n-jobs",
        str(n_jobs),
        "--out",
        str(work / "predictions.csv"),
        "--json",
        str(work / "predictions.json"),
    ]
    start = time.perf_counter()
    largest, worker = 0, 0
    with psutil.Popen(command, stderr=open(os.devnull, "w"), stdout=open(os.devnull, "w")) as process:
        while process.poll() is None:
            time.sleep(0.05)
            try:
                largest = max(largest, process.memory_info().rss)
                worker = max([worker, *(child.memory_info().rss for child in process.children(recursive=True))])
            except psutil.Error:
                continue
    predictions = json.loads((work / "predictions.json").read_text())
    assert process.returncode == 0 and not any(row["problem"] for row in predictions)
    return {
        "images": len(predictions),
        "workers": n_jobs,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_mb": round(largest / 2**20, 1),
        "peak_memory_of_a_worker_mb": round(worker / 2**20, 1),
    }


def main(model: str, number: int) -> None:
    "Measure and write the results."
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        file = Path(model) if model else dummy_model_file(work / "dummy.onnx")
        runs = []
        for n_jobs in (1, 2):
            for count in (100, number):
                if not (work / str(count)).is_dir():
                    write_images(work / str(count), count)
                runs.append(run(work / str(count), file, work, n_jobs))
                print(runs[-1], flush=True)
        growth = {
            f"growth_mb_with_{n_jobs}_workers": round(
                max(
                    many["peak_memory_mb"] - few["peak_memory_mb"],
                    many["peak_memory_of_a_worker_mb"] - few["peak_memory_of_a_worker_mb"],
                ),
                1,
            )
            for n_jobs, few, many in ((1, *runs[:2]), (2, *runs[2:]))
        }
        result = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
            "load": round(os.getloadavg()[0], 1),
            "model": open_model_file(file)[1]["title"],
            "runs": runs,
            **growth,
        }
    with atomic_path(RESULTS) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="exported model file; a dummy one if left out")
    parser.add_argument("--images", type=int, default=10_000)
    options = parser.parse_args()
    main(options.model, options.images)
