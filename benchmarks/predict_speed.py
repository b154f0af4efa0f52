"""From image files to predictions: our exported files beside Keras' `predict` and ultralytics' `predict`, the same weights.

    python benchmarks/predict_speed.py [--run runs/taleqani] [--exported FOLDER] [--repeats 15]

Every side has a process of its own, loaded and warm; the sides take turns, in a new order each time. Reading and resizing
are the same functions on our side and Keras'; ultralytics reads with its own loader. With `count`, every side also finds and
counts the white blood cells as ours does. Times are wall time and, less disturbed by neighbours, processor time; medians,
ratios of medians, and bootstrapped 95 % intervals. Writes benchmarks/results/predict_speed.json.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/predict_speed.json"
OTHERS = {"mobilenet_v2": "keras", "yolov8": "ultralytics"}
SIZES = {"224x224": (224, 224), "1024x768": (768, 1024)}


# ---- inside a process: a function that predicts files ----


def ours(model: Path):
    "Our exported file."
    from leukemia_nb.inference.predictor import Predictor

    predictor = Predictor(model)

    def predict(files: list[str], count: bool) -> np.ndarray:
        if not count:
            return predictor.predict_proba(files)
        rows = predictor.report(files).rows
        return np.array([[row[f"p_{name}"] for name in predictor.classes_] for row in rows])

    return predict


def count_in(images: list[np.ndarray]) -> None:
    "Number of white blood cells, as in our predictor."
    from leukemia_nb.data.images import resize_square
    from leukemia_nb.processing.cells import find_cells

    for image in images:
        find_cells(resize_square(image, 224)).max()


def keras(folder: Path):
    "The study's Keras model, with its `predict`."
    from leukemia_nb.data.images import read_image, resize_square
    from leukemia_nb.models.interface import load_model

    model = load_model(folder)

    def predict(files: list[str], count: bool) -> np.ndarray:
        images = [read_image(file) for file in files]
        if count:
            count_in(images)
        batch = np.stack([resize_square(image, model.image_size) for image in images])
        return model.network_.predict(batch, batch_size=32, verbose=0)

    return predict


def ultralytics(folder: Path):
    "The study's `best.pt` in an ultralytics `YOLO` object, with its `predict`."
    from leukemia_nb.models.interface import load_model

    model = load_model(folder)
    order = [list(model.network_.names.values()).index(name) for name in model.classes_]

    def predict(files: list[str], count: bool) -> np.ndarray:
        settings = {"imgsz": model.image_size, "batch": len(files), "device": "cpu", "verbose": False, "save": False}
        found = model.network_.predict(files, **settings)
        if count:
            count_in([np.ascontiguousarray(result.orig_img[..., ::-1]) for result in found])
        return np.stack([result.probs.data.numpy()[order] for result in found])

    return predict


def serve(side: str, model: str) -> None:
    "Answer the requests that come on standard input, one JSON line each."
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a framework prints does not disturb
    predict = globals()[side](Path(model))
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        wall, processor = time.perf_counter(), time.process_time()
        found = predict(request["files"], request["count"])
        print(
            json.dumps(
                {
                    "wall": time.perf_counter() - wall,
                    "processor": time.process_time() - processor,
                    "probabilities": np.asarray(found, float).tolist(),
                }
            ),
            file=out,
            flush=True,
        )


class Side:
    "A process that predicts."

    def __init__(self, side: str, model: Path):
        environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}
        environment["OPENCV_FOR_THREADS_NUM"] = "1"  # as in our commands; also faster on the other sides
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--inside", side, str(model)],
            text=True,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        assert self.process.stdout.readline() == "ready\n", f"{side} did not start"

    def predict(self, files: list[str], count: bool) -> dict:
        self.process.stdin.write(json.dumps({"files": files, "count": count}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


# ---- comparing ----


def compare(first: Side, second: Side, files: list[str], batch: int, count: bool, repeats: int, temperature: float) -> dict:
    "Both sides on the same files, in turns; the temperature is only in our file, and is applied to theirs to compare."
    times: dict[str, list[list[float]]] = {"wall": [[], []], "processor": [[], []]}
    worst, random = 0.0, np.random.default_rng(0)
    for repeat in range(-2, repeats):  # two rounds to warm up
        some = [files[(repeat * batch + i) % len(files)] for i in range(batch)]
        found: list[dict] = [{}, {}]
        for which in random.permutation(2):
            found[which] = (first, second)[which].predict(some, count)
        if repeat < 0:
            continue
        calibrated = np.array(found[1]["probabilities"]) ** (1 / temperature)
        calibrated /= calibrated.sum(axis=1, keepdims=True)
        worst = max(worst, float(np.abs(np.array(found[0]["probabilities"]) - calibrated).max()))
        for clock in times:
            for which in range(2):
                times[clock][which].append(found[which][clock] / batch * 1e3)
    result: dict = {
        "batch": batch,
        "count": count,
        "repeats": repeats,
        "largest_difference": round(worst, 6),
        "same_predictions": worst < 1e-3,
    }  # ultralytics' predict cuts the sides off an image that is not square
    for clock, (ours_ms, theirs_ms) in times.items():
        a, b = np.array(ours_ms), np.array(theirs_ms)
        draws = random.integers(0, repeats, (2000, repeats))
        ratios = np.quantile(np.median(b[draws], axis=1) / np.median(a[draws], axis=1), [0.025, 0.975])
        result[clock] = {
            "ours_ms": round(float(np.median(a)), 2),
            "theirs_ms": round(float(np.median(b)), 2),
            "times_faster": round(float(np.median(b) / np.median(a)), 2),
            "interval": ratios.round(2).tolist(),
        }
    return result


# ---- where the time goes ----


def median_ms(step, repeats: int = 15) -> float:
    "Median processor time of a step, both cores together."
    times = []
    for _ in range(repeats):
        start = time.process_time()
        step()
        times.append(time.process_time() - start)
    return round(float(np.median(times[1:])) * 1e3, 2)


def operations(model: Path) -> float:
    "Multiplications and additions of one image, in the convolutions and matrix products; the sizes are those of a run."
    import onnx
    import onnxruntime

    network = onnx.load(model)
    weights = {tensor.name: tuple(tensor.dims) for tensor in network.graph.initializer}
    nodes = [node for node in network.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    known = {value.name for value in (*network.graph.input, *network.graph.output)}
    shown = {name for node in nodes for name in (node.input[0], node.output[0])} - known
    network.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(shown))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(network.SerializeToString(), options)
    images = {
        each.name: np.zeros(
            [size if isinstance(size, int) else 1 for size in each.shape], np.float32 if "float" in each.type else np.uint8
        )
        for each in session.get_inputs()
    }
    arrays = images | dict(zip([each.name for each in session.get_outputs()], session.run(None, images)))
    summed = [
        np.prod(weights[node.input[1]][1:]) if node.op_type == "Conv" else arrays[node.input[0]].shape[-1] for node in nodes
    ]
    return float(sum(2 * arrays[node.output[0]].size * length for node, length in zip(nodes, summed)))


def steps_of(file: str) -> dict:
    "Reading, resizing and finding the cells of one image, and the study's segmentation and count at full size, each alone."
    from leukemia_nb.data.images import read_image, resize_square
    from leukemia_nb.processing.cells import find_cells, label_cells
    from leukemia_nb.processing.segmentation import segment

    image = read_image(file)
    square, mask = resize_square(image, 224), segment(image)
    return {
        "read_ms": median_ms(lambda: read_image(file)),
        "find_cells_ms": median_ms(lambda: find_cells(square)),
        "resize_ms": median_ms(lambda: resize_square(image, 224)),
        "segment_full_size_ms": median_ms(lambda: segment(image)),
        "count_full_size_ms": median_ms(lambda: label_cells(mask)),
    }


def network_of(model: Path, file: str) -> dict:
    "The network beside this machine's matrix product, in processor time; with single images waiting threads count, too."
    from leukemia_nb.inference.predictor import Predictor, prepare_image, _run_network

    predictor = Predictor(model)
    one = prepare_image(file, predictor.info)
    square = np.random.default_rng(0).random((1536, 1536), dtype=np.float32)
    seconds: dict[str, list[float]] = {"product": [], "1": [], "8": [], "32": []}
    for _ in range(12):  # in turns, so that neighbours disturb all alike
        for name, times in seconds.items():
            time.sleep(0.05)  # until the threads of the run before have stopped waiting for more
            start = time.process_time()
            if name == "product":
                square @ square
            else:
                _run_network(predictor.session, [one] * int(name))
            times.append((time.process_time() - start) / (1 if name == "product" else int(name)))
    best = {name: min(times[1:]) * 1e3 for name, times in seconds.items()}
    peak, needed = 2 * 1536**3 / best.pop("product") / 1e6, operations(model) / 1e9  # GFLOP/s, GFLOP
    limit = needed / peak * 1e3
    return {
        "processor_ms_per_image_by_batch": {name: round(value, 2) for name, value in best.items()},
        "gflop_per_image": round(needed, 3),
        "matrix_product_gflop_per_processor_second": round(peak, 1),
        "limit_processor_ms_per_image": round(limit, 2),
        "proportion_of_the_limit": {name: round(limit / value, 2) for name, value in best.items()},
    }


def first_prediction(python: str, model: Path, file: str, repeats: int) -> dict:
    "Seconds from the command to its prediction and its processor time, each time a new process."
    wall, processor = [], []
    for _ in range(repeats):
        before, start = os.times(), time.perf_counter()
        command = [python, "-m", "leukemia_nb", "predict", file, "--model", str(model.resolve())]
        subprocess.run(command, check=True, capture_output=True, cwd=Path(file).parent)
        wall.append(time.perf_counter() - start)
        after = os.times()
        processor.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return {
        "seconds": round(float(np.median(wall)), 2),
        "largest_seconds": round(max(wall), 2),
        "processor_seconds": round(float(np.median(processor)), 2),
        "repeats": repeats,
    }


def main(run: Path, exported: Path, repeats: int, python: str, models: list[str]) -> None:
    "Measure and write the results; those of models that are not asked for stay."
    from leukemia_nb.data.files import atomic_path
    from leukemia_nb.data.images import write_image
    from leukemia_nb.inference.model_file import open_model_file
    from leukemia_nb.data.synthetic import make_smear

    result: dict = json.loads(RESULTS.read_text()) if RESULTS.exists() and set(models) != set(OTHERS) else {}
    result |= {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "load_before": round(os.getloadavg()[0], 1),
        "images": "synthetic smears, JPEG",
    }
    for part in ("network", "first_prediction", "compared"):
        result.setdefault(part, {})
    with tempfile.TemporaryDirectory() as name:
        files: dict[str, list[str]] = {}
        for size, shape in SIZES.items():
            files[size] = [str(Path(name) / size / f"{i:02d}.jpg") for i in range(32)]
            for i, file in enumerate(files[size]):
                write_image(file, make_smear(("Normal", "Pre-B", "Pro-B")[i % 3], i, *shape).image)
        result["steps"] = {size: steps_of(files[size][1]) for size in SIZES}
        for model in models:
            theirs = OTHERS[model]
            file, folder = exported / f"{model}.onnx", run / "models" / model
            if not file.is_file() or not folder.is_dir():
                print(f"{model}: no exported file or no trained model, left out")
                continue
            temperature = float(open_model_file(file)[1]["temperature"])
            result["network"][model] = network_of(file, files["224x224"][1])
            result["first_prediction"][model] = first_prediction(python, file, files["1024x768"][1], 5)
            sides = Side("ours", file), Side(theirs, folder)
            rows = result["compared"][f"{model}: ours against {theirs}"] = []
            for size in SIZES:
                for batch, count in ((1, False), (1, True), (32, False), (32, True)):
                    times = repeats if batch == 1 else max(5, repeats // 3)
                    rows.append({"images": size, **compare(*sides, files[size], batch, count, times, temperature)})
                    print(model, rows[-1], flush=True)
            for side in sides:
                side.close()
    result["load_after"] = round(os.getloadavg()[0], 1)
    if not result["compared"]:
        return print("nothing to compare: run a study and its export step first")
    with atomic_path(RESULTS) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "compared"}, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=ROOT / "runs/taleqani", help="run folder with trained models")
    parser.add_argument("--exported", type=Path, help="folder of exported files; RUN/exported if left out")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--python", default=sys.executable, help="Python that gives the first answer, base requirements only")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--models", nargs="+", choices=OTHERS, default=list(OTHERS), help="models to measure")
    options = parser.parse_args()
    if options.inside:
        serve(*options.inside)
    else:
        main(options.run, options.exported or options.run / "exported", options.repeats, options.python, options.models)
