"""The YOLO classifiers: offline, without telemetry, class order, weight files, what ultralytics is given."""

import json
import os
import platform
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from leukemia_nb.models.interface import MODELS, ModelError, load_model, make_model

pytestmark = pytest.mark.filterwarnings("ignore:.*constant predictor:RuntimeWarning")
ROOT = Path(__file__).resolve().parents[1]
ORDER = ("Pro-B", "Normal", "Pre-B")  # not in alphabetical order
SMALL = {"weights": "random", "image_size": 32, "epochs": 1, "batch_size": 6, "train_arguments": {"workers": 0}}


def child(code: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("YOLO_", "ULTRALYTICS_"))}
    clean.update(PYTHONPATH=str(ROOT), **environment)
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, env=clean, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def trained(dataset):
    settings = SMALL | {"epochs": 3, "seed": 1}
    return make_model("yolov8", **settings, classes=ORDER).fit(dataset)


@pytest.fixture(scope="module")
def test_pairs(dataset):
    from leukemia_nb.processing.dataset import Pairs

    return Pairs(dataset, "test", 32)


def test_history_is_ultralytics_results(trained):
    table = trained.history_
    assert list(table) == ["epoch", "accuracy", "loss", "val_accuracy", "val_loss", "seconds"] and table["epoch"].tolist() == [
        1,
        2,
        3,
    ]
    assert table["accuracy"].isna().all() and np.isfinite(table.drop(columns="accuracy")).all(axis=None)
    assert (table["seconds"] > 0).all()
    kept = table["val_accuracy"][table["val_accuracy"] == table["val_accuracy"].max()].index[-1]
    assert trained.best_epoch_ == kept + 1  # of several, ultralytics keeps the last


def test_class_order_is_the_callers(trained, test_pairs):
    names = trained.network_.names
    assert trained.classes_.tolist() == list(ORDER) and sorted(names.values()) == sorted(ORDER) != list(ORDER)
    images = [image[..., ::-1] for image in test_pairs.read(slice(None))]  # ultralytics takes arrays in BGR order
    results = trained.network_.predict(images, imgsz=32, verbose=False)
    theirs = [{names[i]: float(p) for i, p in enumerate(result.probs.data)} for result in results]
    expected = [[each[name] for name in ORDER] for each in theirs]
    np.testing.assert_allclose(trained.predict_proba(test_pairs), expected, atol=1e-5)


def test_the_border_of_an_image_counts(trained):
    image = np.random.default_rng(0).integers(0, 256, (1, 48, 64, 3), dtype=np.uint8)
    other = image.copy()
    other[:, :, :6] = other[:, :, -6:] = 0
    assert not np.array_equal(trained.extract_features(image), trained.extract_features(other))


def test_saved_and_loaded(trained, test_pairs, tmp_path):
    folder = trained.save(tmp_path / "model")
    assert sorted(path.name for path in folder.iterdir()) == ["best.pt", "history.csv", "model.json"]
    again = load_model(folder)
    np.testing.assert_array_equal(again.predict_proba(test_pairs), trained.predict_proba(test_pairs))
    np.testing.assert_array_equal(again.extract_features(test_pairs), trained.extract_features(test_pairs))
    assert again.extract_features(test_pairs).shape == (6, 256) and again.weights_source_ == "random initialisation"


def test_its_own_files_open_as_classifiers_of_any_origin(trained, test_pairs, tmp_path):
    from leukemia_nb.inference.classifier import open_classifier

    trained.save(tmp_path / "model")
    images, order = test_pairs.read(slice(None)), list(trained.network_.names.values())
    with pytest.raises(ModelError, match="can execute code"):
        open_classifier(tmp_path / "model/best.pt")
    opened = [open_classifier(tmp_path / "model/best.pt", allow_pickle=True)]
    again = type(trained.network_)(tmp_path / "model/best.pt")  # exported beside its file
    opened.append(open_classifier(again.export(format="onnx", imgsz=32, verbose=False)))
    for model in opened:
        assert model.classes_.tolist() == order and model.settings.range == "0-1" and model.settings.crop_mode == "center"
        found = model.predict_proba(images)[:, [order.index(name) for name in trained.classes_]]
        np.testing.assert_allclose(found, trained.predict_proba(images), atol=2e-4)


def test_the_dataset_folder_is_left_as_it_was(trained, dataset):
    assert sorted(path.name for path in (dataset / "original").iterdir()) == ["test", "train", "val"]


def test_same_seed_same_predictions(dataset, test_pairs):
    found = []
    for seed in (1, 1, 2):
        model = make_model("yolo11", **SMALL, seed=seed).fit(dataset)
        found.append(model.predict_proba(test_pairs))
    assert np.array_equal(found[0], found[1]) and not np.allclose(found[0], found[2], atol=1e-6)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="channels-last is chosen on x86 processors")
def test_networks_are_trained_channels_last_and_kept_in_the_usual_format(dataset, monkeypatch):
    import torch
    from ultralytics.engine.trainer import BaseTrainer

    def channels_last(network):
        weights = [part.weight for part in network.modules() if isinstance(part, torch.nn.Conv2d) and part.weight.shape[2] > 1]
        return [each.shape[1] > 1 and not each.is_contiguous() for each in weights if each.shape[1] > 1]

    seen, step = [], BaseTrainer.optimizer_step

    def noted(trainer):
        seen.extend(channels_last(trainer.model) + channels_last(trainer.ema.ema))
        step(trainer)

    monkeypatch.setattr(BaseTrainer, "optimizer_step", noted)
    model = make_model("yolov8", **SMALL | {"epochs": 1}).fit(dataset)
    assert len(seen) > 20 and all(seen) and not any(channels_last(model.network_.model))


def test_ultralytics_is_given_the_settings():
    from leukemia_nb.models.yolo import _training_arguments

    plain = _training_arguments(make_model("yolov8", augmentation="default"), layers=10)
    assert not {"scale", "erasing", "auto_augment", "flipud"} & set(plain)  # ultralytics' defaults, as in the original study
    assert (plain["optimizer"], plain["lr0"], plain["nbs"], plain["momentum"]) == ("AdamW", 1e-3, 32, 0.9)
    assert _training_arguments(make_model("yolov8", preprocessing="rescale"), 10) == _training_arguments(make_model("yolov8"), 10)
    own = {"fine_tune": False, "epochs": 7, "batch_size": 5, "patience": 3, "seed": 4, "device": "0,1", "learning_rate": 0.02}
    found = _training_arguments(make_model("yolov8", **own, train_arguments={"epochs": 8}), layers=10)
    expected = {
        "epochs": 8,
        "batch": 5,
        "imgsz": 224,
        "seed": 4,
        "patience": 3,
        "device": "0,1",
        "freeze": 9,
        "lr0": 0.02,
        "nbs": 5,
    }
    assert (
        found == found | expected | {"scale": 0.0, "erasing": 0.0, "flipud": 0.5, "optimizer": "AdamW"}
        and plain["freeze"] is None
    )


def test_whole_images_are_shown_flipped():
    from PIL import Image
    from ultralytics.data.augment import classify_augmentations

    from leukemia_nb.models.yolo import _training_arguments

    given = _training_arguments(make_model("yolov8"), layers=10)
    settings = {
        "hflip": given["fliplr"],
        "vflip": given["flipud"],
        **{key: given[key] for key in ("erasing", "auto_augment", "hsv_h", "hsv_s", "hsv_v")},
    }
    transform = classify_augmentations(64, scale=(1 - given["scale"], 1.0), **settings)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    flips = {flip.tobytes() for flip in (image, image[::-1], image[:, ::-1], image[::-1, ::-1])}
    seen = [(transform(Image.fromarray(image)).numpy().transpose(1, 2, 0) * 255).round().astype(np.uint8) for _ in range(30)]
    assert {each.tobytes() for each in seen} == flips


def test_settings_that_ultralytics_cannot_use_are_named(dataset):
    with pytest.raises(ModelError, match="image_size=100 is not a multiple of 32"):
        make_model("yolo12", image_size=100)
    with pytest.raises(ModelError, match=r"^yolov8: training stopped \([^\n]*no_such"):
        make_model("yolov8", **SMALL | {"train_arguments": {"no_such": 1}}).fit(dataset)


# ---------------------------------------------------------------- weights
def opened(name, weights):
    from leukemia_nb.models.yolo import _build_network

    return _build_network(name, MODELS[name].weight_files, weights)


def test_weights_come_from_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LEUKEMIA_NB_WEIGHTS", str(tmp_path))
    assert opened("yolo11", "local")[1] == "random initialisation"
    assert opened("yolo12", "imagenet")[1] == "random initialisation (no ImageNet classifier is published for it)"
    from ultralytics import YOLO

    detector = YOLO("yolo11n.yaml")
    detector.save(tmp_path / "yolo11n.pt")
    network, source = opened("yolo11", "local")
    assert source.startswith("COCO detector's backbone (yolo11n.pt, sha256 ")
    own, theirs = (net.model.state_dict()["model.4.cv1.conv.weight"].float().numpy() for net in (network, detector))
    np.testing.assert_allclose(own, theirs, atol=1e-3)  # the file is in half precision
    (tmp_path / "yolo11n.pt").write_bytes(b"PK half a file")
    with pytest.raises(ModelError, match="yolo11n.pt: not a complete ultralytics weight file"):
        opened("yolo11", "local")


@pytest.mark.parametrize("name", ["yolov8", "yolo11", "yolo12"])
def test_the_same_seed_gives_the_same_network_from_a_detectors_weights(dataset, tmp_path, monkeypatch, name):
    """Whatever random numbers were taken before: the file lacks the classifying layers."""
    import torch
    from ultralytics import YOLO

    monkeypatch.setenv("LEUKEMIA_NB_WEIGHTS", str(tmp_path))
    YOLO(f"{name}n.yaml").save(tmp_path / f"{name}n.pt")

    def trained(before, seed=0):
        torch.manual_seed(before)
        model = make_model(name, **SMALL | {"weights": "local", "seed": seed}).fit(dataset)
        assert model.weights_source_.startswith("COCO detector")
        return torch.cat([each.float().ravel() for each in model.network_.model.state_dict().values()])

    first = trained(before=1)
    assert torch.equal(first, trained(before=2)) and not torch.equal(first, trained(before=1, seed=1))


def test_without_a_network_one_line_names_the_file_and_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("LEUKEMIA_NB_WEIGHTS", str(tmp_path))

    def refused(*args, **kwargs):
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr("ultralytics.utils.downloads.safe_download", refused)
    with pytest.raises(ModelError, match=r"^[^\n]*yolov8n-cls.pt: not [^\n]*not downloaded [^\n]*LEUKEMIA_NB_WEIGHTS[^\n]*$"):
        opened("yolov8", "imagenet")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, start",
    [
        ("yolov8", "ImageNet classifier (yolov8n-cls.pt, sha256 f5079cd98062)"),
        ("yolo11", "COCO detector's backbone (yolo11n.pt, sha256 0ebbc80d4a76)"),
    ],
)
def test_real_weight_files_open(name, start, shared_weights, monkeypatch):
    monkeypatch.setenv("LEUKEMIA_NB_WEIGHTS", str(shared_weights))
    assert opened(name, "local")[1] == start


class Runs:
    """Pickled, it calls a function when it is opened."""

    def __init__(self, function, *arguments):
        self.called = function, arguments

    def __reduce__(self):
        return self.called


def payloads(folder):
    """Things that leave a file where they are run."""
    mark, script = folder / "ran", folder / "script.py"
    script.write_text(f"open({str(mark)!r}, 'w')")
    return {
        "eval": Runs(eval, f"open({str(mark)!r}, 'w')"),
        "exec": Runs(exec, f"open({str(mark)!r}, 'w')"),
        "system": Runs(os.system, f"touch {mark}"),
        "open": Runs(open, str(mark), "w"),
        "subprocess": Runs(subprocess.call, ["touch", str(mark)]),
        "runpy": Runs(runpy.run_path, str(script)),
    }


@pytest.mark.parametrize("protocol", [2, 4])  # the globals have other names in them
@pytest.mark.parametrize("kind", ["eval", "exec", "system", "open", "subprocess", "runpy"])
def test_code_in_a_weight_file_is_refused_and_not_run(tmp_path, monkeypatch, kind, protocol):
    """ultralytics 8.4.0 to 8.4.66 run the first two."""
    import torch

    torch.save({"model": payloads(tmp_path)[kind]}, tmp_path / "yolov8n-cls.pt", pickle_protocol=protocol)
    monkeypatch.setenv("LEUKEMIA_NB_WEIGHTS", str(tmp_path))
    with pytest.raises(ModelError, match=r"yolov8n-cls\.pt: not a complete ultralytics weight file"):
        opened("yolov8", "local")
    assert not (tmp_path / "ran").exists()


def test_code_in_a_saved_models_file_is_refused_and_not_run(trained, tmp_path):
    """Whoever changes the file changes its checksum in model.json too."""
    import torch

    from leukemia_nb.data.files import file_sha256

    folder = trained.save(tmp_path / "model")
    torch.save({"model": payloads(tmp_path)["eval"]}, folder / "best.pt")
    facts = json.loads((folder / "model.json").read_text())
    facts["files"]["best.pt"] = file_sha256(folder / "best.pt")
    (folder / "model.json").write_text(json.dumps(facts))
    with pytest.raises(ModelError, match=r"^[^\n]*model does not hold a complete model [^\n]*$"):
        load_model(folder)
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- offline, and nothing left behind
@pytest.mark.slow
def test_nothing_is_sent_and_nothing_is_written_elsewhere(dataset, tmp_path):
    home, work, model = tmp_path / "home", tmp_path / "work", tmp_path / "model"
    home.mkdir(), work.mkdir()
    done = child(
        f"""
        import os, socket, tempfile, warnings; warnings.simplefilter("ignore")
        def refused(*args, **kwargs): raise AssertionError("the network was used")
        socket.socket.connect = socket.getaddrinfo = refused
        os.chdir({str(work)!r}); tempfile.tempdir = {str(tmp_path / "temporary")!r}; os.mkdir(tempfile.tempdir)
        from leukemia_nb.models.interface import make_model
        settings = dict(weights="random", image_size=32, epochs=2, batch_size=6, train_arguments=dict(workers=0))
        make_model("yolov8", **settings).fit({str(dataset)!r}).save({str(model)!r})
        from ultralytics import settings
        from ultralytics.utils.events import events
        assert not events.enabled and not any(settings[name] for name in ("sync", "wandb", "comet", "mlflow"))
        """,
        HOME=str(home),
        MPLCONFIGDIR=str(tmp_path / "mpl"),
        ULTRALYTICS_API_KEY="ul_" + "0" * 40,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout.strip() and not done.stderr.strip(), done.stdout + done.stderr
    assert not [path for folder in (home, work) for path in folder.rglob("*") if path.is_file()]
    assert not list((tmp_path / "temporary").iterdir())  # removed at exit


def test_refused_beside_tensorflow_and_the_module_imports_no_torch():
    done = child("""
        import sys, types
        from leukemia_nb.models.interface import ModelError
        from leukemia_nb.models.yolo import import_ultralytics
        assert not {"torch", "ultralytics", "tensorflow"} & set(sys.modules)
        sys.modules["tensorflow"] = types.ModuleType("tensorflow")
        try: import_ultralytics()
        except ModelError as error: print(error)
        assert "torch" not in sys.modules
        """)
    assert done.returncode == 0 and "a process, or a notebook kernel, of their own" in done.stdout, done.stderr
