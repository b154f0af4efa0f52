"""The frameworks' own loaders read the dataset folder, and open the saved models where this library is not imported."""

import subprocess
import sys

import numpy as np
import pytest

from leukemia_nb.models.interface import make_model

pytestmark = pytest.mark.filterwarnings("ignore:.*constant predictor:RuntimeWarning")
CLASSES = ["Normal", "Pre-B", "Pro-B"]
SIZES = {"train": 12, "val": 6, "test": 6}


def bare(code: str, *arguments: object) -> np.ndarray:
    """What a fresh interpreter prints as numbers; this library cannot be imported in it."""
    blocked = "import sys; sys.modules['leukemia_nb'] = None\n"
    command = [sys.executable, "-P", "-c", blocked + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.array(done.stdout.split()[-18:], float).reshape(6, 3)


@pytest.mark.parametrize("channel", ["original", "segmented"])
def test_keras_reads_the_dataset(dataset, channel):
    import keras

    for subset, n in SIZES.items():
        found = keras.utils.image_dataset_from_directory(
            dataset / channel / subset, image_size=(64, 64), batch_size=n, shuffle=False, verbose=False
        )
        images, labels = next(iter(found))
        assert found.class_names == CLASSES and images.shape == (n, 64, 64, 3)
        assert labels.numpy().tolist() == np.repeat([0, 1, 2], n // 3).tolist()


@pytest.mark.parametrize("channel", ["original", "segmented"])
def test_torchvision_reads_the_dataset(dataset, channel):
    from torchvision.datasets import ImageFolder

    from leukemia_nb.processing.dataset import Pairs

    for subset, n in SIZES.items():
        found = ImageFolder(dataset / channel / subset)
        assert found.classes == CLASSES and len(found) == n
        np.testing.assert_array_equal(np.array(found[0][0]), Pairs(dataset, subset).read([0], channel)[0])


@pytest.mark.slow
def test_ultralytics_trains_on_the_dataset(dataset, tmp_path):
    from leukemia_nb.models.yolo import import_ultralytics

    model = import_ultralytics().YOLO("yolov8n-cls.yaml")
    model.train(
        data=dataset / "original", epochs=1, imgsz=32, workers=0, project=tmp_path, name="train", plots=False, verbose=False
    )
    assert list(model.names.values()) == CLASSES and (tmp_path / "train" / "weights" / "best.pt").is_file()
    for subset in SIZES:
        (dataset / "original" / f"{subset}.cache").unlink(missing_ok=True)


@pytest.mark.slow
def test_keras_opens_a_saved_model_and_predicts_the_same(dataset, tmp_path):
    from leukemia_nb.processing.dataset import Pairs

    model = make_model("mobilenet_v2", weights="random", fine_tune=False, image_size=32, epochs=1, batch_size=6).fit(dataset)
    model.save(tmp_path / "model")
    test = Pairs(dataset, "test", 32)
    np.save(tmp_path / "pixels.npy", test.read(slice(None)))
    code = (
        "import keras, numpy as np\nprint(*keras.models.load_model(sys.argv[1]).predict(np.load(sys.argv[2]), verbose=0).ravel())"
    )
    found = bare(code, tmp_path / "model" / "model.keras", tmp_path / "pixels.npy")
    np.testing.assert_allclose(found, model.predict_proba(test), atol=1e-5)


@pytest.mark.slow
def test_ultralytics_opens_a_saved_model_and_predicts_the_same(dataset, tmp_path):
    from leukemia_nb.processing.dataset import Pairs

    settings = {"weights": "random", "image_size": 64, "epochs": 1, "batch_size": 6, "train_arguments": {"workers": 0}}
    model = make_model("yolov8", **settings).fit(dataset)
    model.save(tmp_path / "model")
    test = Pairs(dataset, "test")
    code = (
        "from ultralytics import YOLO\n"
        "for result in YOLO(sys.argv[1]).predict(sys.argv[2:], imgsz=64, verbose=False): print(*result.probs.data.tolist())"
    )
    found = bare(code, tmp_path / "model" / "best.pt", *(dataset / path for path in test.table["original"]))
    np.testing.assert_allclose(found, model.predict_proba(test), atol=1e-4)
