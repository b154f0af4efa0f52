"""Seconds of each step of a finished study, beside the arithmetic of its networks: python benchmarks/study_steps.py RUN

The floating-point operations (two for a multiplication and addition) are those of the convolutions and matrix products in the
exported networks; a training step counts as three forward passes. The machine's speed is that of a product of two 2048 x 2048
float32 matrices in one thread, the best of ten, while the rest of the machine is idle. Steps run side by side, so the seconds of
all steps are more than the study takes.
"""

import argparse
import json
import os
import platform
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from predict_speed import operations

ROOT = Path(__file__).resolve().parents[1]


def machine_gflops() -> float:
    """10^9 floating-point operations in a second of one thread's matrix product."""
    torch.set_num_threads(1)
    matrix, times = torch.rand(2048, 2048), []
    for _ in range(10):
        began = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - began)
    return 2 * 2048**3 / min(times) / 1e9


def step_gflop(run: Path, step: str, images: pd.Series, forward: dict[str, float]) -> float | None:
    """Operations that a step's networks need at least, in 10^9; None for a step without a network that is counted."""
    kind, _, name = step.partition("-")
    if kind == "features":
        return 2 * images.sum() * forward[name] if name in forward else None
    if kind != "train" or name not in forward or name == "cells":
        return None
    predicted = (images["val"] + images["test"]) * forward[name]
    frozen = (run / "features" / "mobilenet_v2.npz").is_file() and name in ("mobilenet_v2", "dual_channel")
    epochs = 0 if frozen else len(pd.read_csv(run / "models" / name / "history.csv"))
    return predicted + epochs * forward[name] * (3 * images["train"] + images["val"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder of a finished study")
    run = parser.parse_args().run
    forward = {path.stem: operations(path) / 1e9 for path in sorted(run.glob("exported/*.onnx"))}
    records = [json.loads(path.read_text()) for path in run.glob("steps/*.json")]
    images = pd.read_csv(run / "dataset.csv").groupby("subset").size()
    speed = machine_gflops()
    starts = [datetime.fromisoformat(record["began"]) for record in records]
    ends = [start + timedelta(seconds=record["seconds"]) for start, record in zip(starts, records)]
    steps: dict[str, dict[str, Any]] = {}
    for record in sorted(records, key=lambda record: -record["seconds"]):
        gflop = step_gflop(run, record["step"], images, forward)
        steps[record["step"]] = {"seconds": record["seconds"]} | (
            {} if gflop is None else {"gflop": round(gflop), "seconds_of_arithmetic": round(gflop / speed, 1)}
        )
    result = {
        "run": run.name,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "images": {name: int(number) for name, number in images.items()},
        "study_seconds": round((max(ends) - min(starts)).total_seconds()),
        "sum_of_steps_seconds": round(sum(record["seconds"] for record in records)),
        "gflops_of_one_thread": round(speed, 1),
        "gflop_of_one_image": {name: round(value, 3) for name, value in forward.items()},
        "steps": steps,
    }
    (ROOT / "benchmarks" / "results" / "study_steps.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: result[name] for name in list(result)[:-1]}, indent=1))


if __name__ == "__main__":
    main()
