"""Pages that read the repository run wherever their kernel is started, as JupyterLab, papermill, nbconvert and nbdev start it."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT


@pytest.mark.parametrize("page", ["findings", "reference", "data_and_ethics"])
def test_a_page_runs_from_any_folder(page, tmp_path):
    """Papermill and JupyterLab may start the kernel anywhere; the result is that of the page's own folder."""
    code = (
        "import sys, nbformat; from nbclient import NotebookClient\n"
        "nb = nbformat.read(sys.argv[1], 4); NotebookClient(nb, timeout=300, kernel_name='python3').execute(); nbformat.write(nb, sys.argv[2])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown = []
    for folder in (tmp_path, ROOT / "nbs"):
        done = subprocess.run(
            [sys.executable, "-c", code, ROOT / "nbs" / f"{page}.ipynb", tmp_path / f"{len(shown)}.ipynb"],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        cells = nbformat.read(tmp_path / f"{len(shown)}.ipynb", 4).cells
        shown.append([output.get("data", {}).get("text/markdown") for cell in cells for output in cell.get("outputs", [])])
    assert shown[0] == shown[1] and any(shown[0])


def test_nothing_but_the_pages_place_is_asked(tmp_path):
    """No page looks for the repository beside the working folder alone."""
    for page in ("findings", "reference", "data_and_ethics"):
        text = Path(ROOT / "nbs" / f"{page}.ipynb").read_text(encoding="utf-8")
        assert 'Path(\\"../' not in text
