"""Fixtures shared by the tests."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")
os.environ.update(YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false", TF_CPP_MIN_LOG_LEVEL="2", MPLBACKEND="agg")


def pytest_configure(config: pytest.Config) -> None:
    """`pytest -m "not slow" tests` leaves out what takes longer than some ten seconds."""
    config.addinivalue_line("markers", "slow: takes longer than some ten seconds")


ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("LEUKEMIA_NB_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real images; the test skips where it is missing."""
    folder = SHARED / "data"
    if not (folder / "taleqani").is_dir():
        pytest.skip(f"real images not here: {folder}")
    return folder


@pytest.fixture(scope="session")
def shared_weights() -> Path:
    """Folder of pretrained weight files; the test skips where it is missing."""
    folder = SHARED / "weights"
    if not folder.is_dir():
        pytest.skip(f"pretrained weights not here: {folder}")
    return folder


@pytest.fixture
def photo() -> np.ndarray:
    """A small image, uint8 (48, 64, 3) RGB, without any symmetry."""
    y, x = np.mgrid[:48, :64]
    found = np.dstack([200 - y, 120 + x, 220 - x]).astype(np.uint8)
    found[:12, :16] = (200, 30, 60)  # tells every rotation from every other
    return found


@pytest.fixture(scope="session")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working tree, committed in a repository of its own."""
    folder = tmp_path_factory.mktemp("copy") / "leukemia_nb"
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\n")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(folder)]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "copy"]):
        subprocess.run(git + arguments, check=True)
    return folder


# test modules that load no framework in this process
WITHOUT_FRAMEWORK = {f"test_{name}" for name in "cards cluster collect command_line environment names pages report study".split()}


@pytest.fixture(scope="session", autouse=True)
def torch_before_tensorflow(request: pytest.FixtureRequest) -> None:
    """All test modules share a process: torch must be loaded first, the other order aborts it."""
    if {Path(item.path).stem for item in request.session.items} <= WITHOUT_FRAMEWORK:
        return
    from leukemia_nb.models.yolo import import_ultralytics

    import_ultralytics()


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset folder of 24 synthetic smears, 64 x 64; for reading only."""
    from leukemia_nb.testing import dummy_dataset

    return dummy_dataset(tmp_path_factory.mktemp("run") / "dataset", per_class=8, size=64)
