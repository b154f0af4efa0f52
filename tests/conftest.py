"""Fixtures shared by the tests."""
import os
from pathlib import Path

import pytest

os.environ.update(YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false", TF_CPP_MIN_LOG_LEVEL="2", MPLBACKEND="agg")
ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("LEUKEMIA_NB_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real pictures; the test skips where it is missing."""
    folder = SHARED / "data"
    if not (folder / "taleqani").is_dir():
        pytest.skip(f"real pictures not here: {folder}")
    return folder


@pytest.fixture(scope="session")
def shared_weights() -> Path:
    """Folder of pretrained weight files; the test skips where it is missing."""
    folder = SHARED / "weights"
    if not folder.is_dir():
        pytest.skip(f"pretrained weights not here: {folder}")
    return folder


@pytest.fixture(scope="session", autouse=True)
def torch_before_tensorflow() -> None:
    """All test modules share a process: torch must be loaded first, the other order aborts it."""
    from leukemia_nb.yolo import yolo_framework

    yolo_framework()
