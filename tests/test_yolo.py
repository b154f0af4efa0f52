"""The YOLO classifiers: silent, offline, whole images, and the same answers as ultralytics gives."""

import json
import os
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("ultralytics")
from leukemia_nb.models import yolo
from leukemia_nb.data.files import file_sha256
from leukemia_nb.models.interface import MODELS, ModelError, Images, load_model, make_model

ROOT = Path(__file__).resolve().parents[1]
COLOURS = {"Pro-B": (200, 60, 60), "Normal": (60, 200, 60), "Pre-B": (60, 60, 200)}  # not in alphabetical order
PAIRS_TRAINER = yolo.pairs_trainer
SMALL = dict(weights="random", image_size=32, epochs=1, batch_size=6)


def tinted(per_class: int, seed: int, size: int = 32) -> Images:
    rng = np.random.default_rng(seed)
    labels = np.repeat(list(COLOURS), per_class)
    noise = rng.normal(0, 25, (len(labels), size, size, 3))
    means = np.array([COLOURS[label] for label in labels])[:, None, None]
    return Images((means + noise).clip(0, 255).astype(np.uint8), labels, size=size)


def child(code: str, **environment: str) -> subprocess.CompletedProcess:
    names = ("YOLO_CONFIG_DIR", "YOLO_OFFLINE", "YOLO_AUTOINSTALL", "OMP_NUM_THREADS")
    clean = {key: value for key, value in os.environ.items() if key not in names}
    clean.update(PYTHONPATH=str(ROOT), **environment)
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=clean, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.fixture(scope="module")
def trained():
    model = make_model("yolov8", classes=tuple(COLOURS), weights="random", image_size=32, epochs=8, batch_size=6, patience=8)
    model.fit(tinted(12, 0), tinted(4, 1))
    return model


def test_registry_leads_here():
    for name in ("yolov8", "yolo11", "yolo12"):
        assert MODELS[name].module == "leukemia_nb.models.yolo" and getattr(yolo, MODELS[name].class_name).name == name


def test_import_of_the_module_brings_no_torch():
    done = child("import sys, leukemia_nb.models.yolo; assert not {'torch', 'ultralytics', 'tensorflow'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


def test_class_order_is_the_callers(trained):
    assert list(trained.classes_) == list(COLOURS) != sorted(COLOURS)
    test = tinted(8, 2)
    assert (trained.predict(test) == test.labels).mean() >= 0.9
    right = trained.predict_proba(test)[np.arange(len(test)), [list(COLOURS).index(label) for label in test.labels]]
    assert right.mean() > 0.5


def test_history(trained):
    table = trained.history_
    assert list(table.columns) == ["epoch", "accuracy", "loss", "val_accuracy", "val_loss", "seconds"]
    assert list(table.epoch) == list(range(1, 9)) and np.isfinite(table.to_numpy()).all() and (table.seconds > 0).all()
    assert trained.best_epoch_ == table.val_loss.idxmin() + 1
    probabilities, validation = trained.predict_proba(tinted(4, 1)), tinted(4, 1)
    own = (trained.classes_[probabilities.argmax(1)] == validation.labels).mean()
    assert own == pytest.approx(table.val_accuracy[trained.best_epoch_ - 1], abs=1e-4)  # the kept weights are that epoch's


def test_answers_of_every_kind_of_image(trained):
    test = tinted(2, 3)
    expected = trained.predict_proba(test)
    assert expected.dtype == np.float32 and expected.shape == (6, 3)
    assert np.allclose(expected.sum(1), 1, atol=1e-5)
    assert np.allclose(trained.predict_proba(test.images), expected, atol=1e-5)
    assert np.allclose(trained.predict_proba(list(test.images)), expected, atol=1e-5)
    pairs = np.stack([test.images, np.zeros_like(test.images)], axis=1)
    assert np.allclose(trained.predict_proba(pairs), expected, atol=1e-5)  # the original is asked, not its twin
    assert trained.predict_proba([np.full((40, 70, 3), 90, np.uint8)]).shape == (1, 3)
    assert trained.predict_proba(np.zeros((0, 32, 32, 3), np.uint8)).shape == (0, 3)


def test_features_lead_to_the_answers(trained):
    test = tinted(2, 4)
    features, linear = trained.features(test), trained.network_.model[-1].linear.cpu()
    assert features.shape == (6, 1280) and features.dtype == np.float32
    logits = features @ linear.weight.numpy().T + linear.bias.numpy()
    odds = np.exp(logits - logits.max(1, keepdims=True))
    assert np.allclose(odds / odds.sum(1, keepdims=True), trained.predict_proba(test), atol=1e-4)


def test_border_counts(trained):
    "An image that differs on its border only gets another answer: nothing is cropped."
    image = np.random.default_rng(0).integers(0, 256, (1, 48, 64, 3), dtype=np.uint8)
    other = image.copy()
    other[:, :, :6] = 0
    other[:, :, -6:] = 0
    assert np.abs(trained.predict_proba(image) - trained.predict_proba(other)).max() > 1e-4


@pytest.mark.parametrize("name", ["yolov8", "yolo11", "yolo12"])
def test_equal_to_ultralytics_predict(name):
    yolo.yolo_framework()
    import torch
    from ultralytics import YOLO

    test = tinted(2, 5, size=64)
    model = make_model(name, weights="random", image_size=64)
    model.classes_ = np.array(list(COLOURS))
    network, _ = yolo.new_network(name, 3, seed=4)
    torch.nn.init.normal_(network.model[-1].linear.weight, std=3.0)  # answers that differ
    model._use(network.state_dict())
    theirs = YOLO(f"{name}n-cls.yaml", task="classify")
    theirs.model = type(theirs.model)(f"{name}n-cls.yaml", nc=3, verbose=False)
    theirs.model.load_state_dict(network.state_dict())
    theirs.model.args, theirs.model.task = dict(task="classify"), "classify"
    results = theirs.predict([image[..., ::-1] for image in test.images], imgsz=64, device="cpu", verbose=False, save=False)
    assert np.abs(np.stack([r.probs.data.numpy() for r in results]) - model.predict_proba(test)).max() < 1e-4


def test_saved_and_loaded(trained, tmp_path):
    folder = trained.save(tmp_path / "model")
    assert sorted(p.name for p in folder.iterdir()) == ["history.csv", "model.json", "network.pt"]
    again, test = load_model(folder), tinted(2, 6)
    assert np.array_equal(again.predict_proba(test), trained.predict_proba(test))
    assert list(again.classes_) == list(COLOURS) and again.weights_source_ == "random initialisation"


@pytest.mark.filterwarnings("ignore:yolo11 collapsed:RuntimeWarning")
@pytest.mark.parametrize("preprocessing", ["native", "rescale"])
def test_same_seed_same_answers_and_random_state_untouched(preprocessing):
    import torch

    train, validation, answers = tinted(4, 0), tinted(2, 1), []
    for seed in (1, 1, 2):
        np.random.seed(7), torch.manual_seed(7)
        model = make_model("yolo11", preprocessing=preprocessing, seed=seed, **SMALL)
        model.fit(train, validation)
        np.testing.assert_array_equal(np.random.rand(2), np.random.RandomState(7).rand(2))
        assert torch.initial_seed() == 7 and torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(7)))
        answers.append(model.predict_proba(validation))
    assert np.array_equal(answers[0], answers[1]) and not np.allclose(answers[0], answers[2], atol=1e-6)


def test_fixed_shows_whole_images_and_deck_does_not():
    from PIL import Image

    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    flips = [image, image[::-1], image[:, ::-1], image[::-1, ::-1]]
    seen = {
        preprocessing: [
            (transform(Image.fromarray(image)).numpy().transpose(1, 2, 0) * 255).round().astype(int) for _ in range(30)
        ]
        for preprocessing in ("native", "rescale")
        for transform in [yolo.training_transforms(preprocessing, 64)]
    }
    whole = {
        preprocessing: [any(np.array_equal(each, flip) for flip in flips) for each in each_seen]
        for preprocessing, each_seen in seen.items()
    }
    assert all(whole["native"]) and sum(whole["rescale"]) < 5


def test_a_last_batch_of_one_and_frozen_layers():
    train = Images(tinted(5, 0).images[:13], tinted(5, 0).labels[:13], size=32)
    model = make_model("yolov8", fine_tune=False, seed=3, **SMALL)
    model.fit(train, tinted(2, 1))
    start, _ = yolo.new_network("yolov8", 3, seed=3)
    before, after = start.state_dict(), model.network_.state_dict()
    assert np.array_equal(before["model.4.cv1.conv.weight"].numpy(), after["model.4.cv1.conv.weight"].numpy())
    assert not np.array_equal(before["model.9.linear.weight"].numpy(), after["model.9.linear.weight"].numpy())


def test_loss_that_explodes_is_said(monkeypatch):
    yolo.yolo_framework()

    def explode(self, preds, batch):
        loss = (preds[1] if isinstance(preds, tuple) else preds).sum() * float("nan")
        return loss, {"loss": loss.detach()}

    monkeypatch.setattr(yolo.counting_loss(), "__call__", explode)
    with pytest.raises(ModelError, match="not a number in epoch 1. Use a lower learning_rate"):
        make_model("yolov8", **SMALL).fit(tinted(2, 0), tinted(2, 1))


def test_settings_ultralytics_cannot_use_are_refused():
    with pytest.raises(ModelError, match="image_size=100 is not a multiple of 32"):
        make_model("yolo12", **{**SMALL, "image_size": 100}).fit(tinted(2, 0), tinted(2, 1))
    with pytest.raises(ModelError, match="learning_rate=3.0 is above 1"):
        make_model("yolov8", learning_rate=3.0, **SMALL).fit(tinted(2, 0), tinted(2, 1))


def test_patience_ends_training():
    model = make_model("yolov8", **{**SMALL, "epochs": 30}, patience=1, learning_rate=1e-5)
    flat = Images(np.full((6, 32, 32, 3), 128, np.uint8), np.tile(list(COLOURS), 2), size=32)
    with pytest.warns(RuntimeWarning, match="collapsed"):
        history = model.fit(tinted(4, 0), flat)
    assert len(history) < 30


# ---------------------------------------------------------------- weights
def test_weights_from_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LEUKEMIA_NB_WEIGHTS", str(tmp_path))
    assert yolo.new_network("yolo11", 3, "local")[1] == "random initialisation"
    assert "no ImageNet classifier is published for YOLO12" in yolo.new_network("yolo12", 3, "imagenet")[1]
    from ultralytics.nn.tasks import DetectionModel
    from ultralytics.utils.patches import torch_save

    detector = DetectionModel("yolo11n.yaml", verbose=False)
    torch_save({"model": detector}, tmp_path / "yolo11n.pt")
    network, source = yolo.new_network("yolo11", 3, "local")
    assert source.startswith("COCO detector's backbone (yolo11n.pt, sha256 ")
    own, theirs = network.state_dict(), detector.state_dict()
    assert np.array_equal(own["model.9.cv2.bn.weight"].numpy(), theirs["model.10.cv2.bn.weight"].numpy())
    assert own["model.9.m.0.attn.qkv.conv.weight"].equal(theirs["model.10.m.0.attn.qkv.conv.weight"])
    (tmp_path / "yolo11n.pt").write_bytes(b"PK half a file")
    with pytest.raises(ModelError, match="yolo11n.pt: not a whole ultralytics weight file"):
        yolo.new_network("yolo11", 3, "local")


def test_no_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("LEUKEMIA_NB_WEIGHTS", str(tmp_path))
    yolo.yolo_framework()

    def refused(*args, **kwargs):
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr("ultralytics.utils.downloads.safe_download", refused)
    with pytest.raises(ModelError, match="yolov8n-cls.pt is not here and could not be downloaded") as error:
        make_model("yolov8", **{**SMALL, "weights": "imagenet"}).fit(tinted(2, 0), tinted(2, 1))
    assert "\n" not in str(error.value) and "LEUKEMIA_NB_WEIGHTS" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_file_that_runs_code_is_refused(tmp_path, monkeypatch):
    import torch

    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "code ran"),))

    monkeypatch.setenv("LEUKEMIA_NB_WEIGHTS", str(tmp_path))
    torch.save({"model": Trap()}, tmp_path / "yolov8n-cls.pt")
    with pytest.raises(ModelError, match="not a whole ultralytics weight file"):
        yolo.new_network("yolov8", 3, "local")
    assert not (tmp_path / "code ran").exists()


@pytest.mark.parametrize(
    "name, start, taken",
    [
        ("yolov8", "ImageNet classifier (yolov8n-cls.pt, sha256 f5079cd98062, 156 of 158", 156),
        ("yolo11", "COCO detector's backbone (yolo11n.pt, sha256 0ebbc80d4a76, 228 of 236", 228),
    ],
)
def test_real_weight_files(name, start, taken, shared_weights, monkeypatch):
    monkeypatch.setenv("LEUKEMIA_NB_WEIGHTS", str(shared_weights))
    network, source = yolo.new_network(name, 3, "local")
    assert source.startswith(start)
    assert int(source.rsplit(", ", 1)[1].split(" of ")[0]) >= taken


# ---------------------------------------------------------------- a good guest
def test_nothing_sent_nothing_written_elsewhere(tmp_path):
    home, work, model = tmp_path / "home", tmp_path / "work", tmp_path / "model"
    home.mkdir(), work.mkdir()
    done = child(
        f"""
        import os, socket, sys, tempfile
        before = {{name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "PYTHONHASHSEED")}}
        def refused(*args, **kwargs): raise AssertionError("the network was used")
        socket.socket.connect = socket.getaddrinfo = refused
        os.chdir({str(work)!r}); tempfile.tempdir = {str(tmp_path / "temporary")!r}; os.mkdir(tempfile.tempdir)
        import numpy as np
        from leukemia_nb.models.interface import Images, make_model
        rng = np.random.default_rng(0)
        some = lambda: Images(rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8), ["a", "b"] * 4, size=32)
        model = make_model("yolov8", weights="random", image_size=32, epochs=2, batch_size=4)
        import warnings; warnings.simplefilter("ignore")
        model.fit(some(), some(), progress=print); model.save({str(model)!r})
        assert before == {{name: os.environ.get(name) for name in before}}
        """,
        HOME=str(home),
        MPLCONFIGDIR=str(tmp_path / "mpl"),
        ULTRALYTICS_API_KEY="ul_" + "0" * 40,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch") == 2 and len(done.stdout.splitlines()) == 2 and not done.stderr.strip(), done.stderr
    assert not [p for folder in (home, work) for p in folder.rglob("*") if p.is_file()]
    assert not list((tmp_path / "temporary").iterdir())  # cleaned up at exit


def test_refused_beside_tensorflow():
    done = child("""
        import sys, types
        sys.modules["tensorflow"] = types.ModuleType("tensorflow")
        from leukemia_nb.models.interface import ModelError
        from leukemia_nb.models.yolo import yolo_framework
        try: yolo_framework()
        except ModelError as error: print(error)
        assert "torch" not in sys.modules
        """)
    assert done.returncode == 0 and "a process, or a notebook kernel, of their own" in done.stdout, done.stderr


# ---------------------------------------------------------------- several GPUs
def on_two_processors(monkeypatch, whole):
    "Ultralytics' way with two GPUs, with two processes of the processor in their place: no machine with two GPUs is at hand."

    def make(*arguments):
        class OnTwo(whole(*arguments)):
            def __init__(self, *given, **settings):
                super().__init__(*given, **settings)
                self.world_size, self.ddp = 2, "LOCAL_RANK" not in os.environ

            def _setup_ddp(self):
                import torch

                torch.distributed.init_process_group("gloo")
                wrap = torch.nn.parallel.DistributedDataParallel
                torch.nn.parallel.DistributedDataParallel = lambda model, device_ids, **settings: wrap(model, **settings)

        return OnTwo

    monkeypatch.setattr(yolo, "pairs_trainer", make)


def test_two_processes_learn_together_and_what_they_found_comes_back(monkeypatch):
    on_two_processors(monkeypatch, yolo.pairs_trainer)
    model = make_model("yolov8", classes=tuple(COLOURS), weights="random", image_size=32, epochs=8, batch_size=12, patience=8)
    validation = tinted(4, 1)
    model.fit(tinted(12, 0), validation)
    assert list(model.history_.epoch) == list(range(1, 9)) and np.isfinite(model.history_.to_numpy()).all()
    own = (model.predict(validation) == validation.labels).mean()
    assert own == pytest.approx(model.history_.val_accuracy[model.best_epoch_ - 1], abs=1e-4)
    assert (model.predict(tinted(8, 2)) == tinted(8, 2).labels).mean() >= 0.9


def test_a_process_that_stops_is_told(monkeypatch):
    def broken(*arguments):
        class Broken(PAIRS_TRAINER(*arguments)):
            def get_dataset(self):
                if "LOCAL_RANK" in os.environ:
                    raise MemoryError("no room")
                return super().get_dataset()

        return Broken

    on_two_processors(monkeypatch, broken)
    with pytest.raises(ModelError, match="its processes said why"):
        make_model("yolov8", **SMALL).fit(tinted(2, 0), tinted(2, 1))


def test_gpus_that_are_not_there(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ModelError, match="gpus=2, but torch sees 1 GPUs here. Use gpus=1"):
        make_model("yolov8", gpus=2, **SMALL).fit(tinted(2, 0), tinted(2, 1))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert yolo.training_settings(make_model("yolov8", gpus=2, **SMALL), 10)["device"] == "0,1"


# ---------------------------------------------------------------- real images
def test_real_images_with_pretrained_weights(shared_data, shared_weights, monkeypatch):
    "Two epochs on 40 images a class, tested on fields that share nothing with them."
    from leukemia_nb.data.images import read_image

    monkeypatch.setenv("LEUKEMIA_NB_WEIGHTS", str(shared_weights))
    table = pd.read_csv(shared_data / "taleqani_fields.csv")
    table["class"] = table.file.str.split("/").str[0].map({"Benign": "Normal", "Pre": "Pre-B", "Pro": "Pro-B"})
    table = table.dropna(subset=["class"]).assign(part=lambda t: t.overlap_group % 3)
    parts = []
    for part, number in enumerate((40, 10, 20)):
        rows = pd.concat([group.sample(number, random_state=0) for _, group in table[table.part == part].groupby("class")])
        parts.append(Images([read_image(shared_data / "taleqani" / file) for file in rows.file], rows["class"], size=96))
    model = make_model("yolov8", weights="local", image_size=96, epochs=2, batch_size=16)
    model.fit(parts[0], parts[1])
    assert (model.predict(parts[2]) == parts[2].labels).mean() > 0.8


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


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 4])  # the globals have other names in them
@pytest.mark.parametrize("kind", ["eval", "exec", "system", "open", "subprocess", "runpy"])
def test_code_in_a_weight_file_is_refused_and_not_run(tmp_path, monkeypatch, kind, protocol, zipped):
    """ultralytics 8.4.0 to 8.4.66 run the first two."""
    import torch

    network, _ = yolo.new_network("yolov8", 3)
    torch.save(
        {"model": network, "ema": None, "date": payloads(tmp_path)[kind]},
        tmp_path / "yolov8n-cls.pt",
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=zipped,
    )
    monkeypatch.setenv("LEUKEMIA_NB_WEIGHTS", str(tmp_path))
    with pytest.raises(ModelError, match=r"yolov8n-cls\.pt: not a whole ultralytics weight file"):
        make_model("yolov8", **{**SMALL, "weights": "local"}).fit(tinted(2, 0), tinted(2, 1))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["eval", "system"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_code_in_a_saved_models_weights_is_refused_and_not_run(trained, tmp_path, kind, protocol):
    """Whoever changes the file changes its checksum in model.json too."""
    import torch

    folder = trained.save(tmp_path / "model")
    torch.save({"weight": payloads(tmp_path)[kind]}, folder / "network.pt", pickle_protocol=protocol)
    facts = json.loads((folder / "model.json").read_text())
    facts["files"]["network.pt"] = file_sha256(folder / "network.pt")
    (folder / "model.json").write_text(json.dumps(facts))
    with pytest.raises(ModelError, match=r"^[^\n]*model does not hold a whole model \(UnpicklingError[^\n]*$"):
        load_model(folder)
    assert not (tmp_path / "ran").exists()


def test_a_home_that_cannot_be_written_to_is_no_obstacle():
    done = child(
        """
        import numpy as np
        from leukemia_nb.models.interface import Images, make_model
        images = Images(np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8), ["a", "b"] * 3, size=32)
        model = make_model("yolov8", weights="random", image_size=32, epochs=1, batch_size=3)
        print(len(model.fit(images, images)))
        """,
        HOME="/proc/nowhere",
        XDG_CONFIG_HOME="/proc/nowhere",
    )
    assert done.returncode == 0 and done.stdout.endswith("1\n"), done.stderr
