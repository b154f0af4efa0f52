"""The house rules: notebooks, generated package, wheel."""
import ast
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
LIBRARY = [p for p in NOTEBOOKS if p.parent.name == "nbs" and p.name[0].isdigit()]
STUDY = [p for p in NOTEBOOKS if p.parent.name == "study"]
MODULES = sorted(p.stem for p in (ROOT / "leukemia_nb").glob("*.py") if not p.stem.startswith("_"))
BIN = Path(sys.executable).parent


def test_export_and_clean_leave_git_clean(copy):
    for command in ("nbdev_export", "nbdev_clean"):
        subprocess.run([BIN / command], cwd=copy, check=True, capture_output=True, timeout=300)
    changed = subprocess.run(["git", "-C", copy, "status", "--short"], check=True, capture_output=True, text=True).stdout
    assert changed == "", f"run `make export` and commit:\n{changed}"


@pytest.mark.parametrize("notebook", STUDY, ids=lambda p: p.name)
def test_the_parameters_tag_survives_cleaning(notebook, tmp_path, copy):
    target = copy / "nbs" / "study" / notebook.name
    subprocess.run([BIN / "nbdev_clean", "--fname", target], cwd=copy, check=True, capture_output=True)
    tagged = [cell for cell in nbformat.read(target, 4).cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1


@pytest.mark.parametrize("notebook", STUDY, ids=lambda p: p.name)
def test_study_notebooks_have_typed_commented_parameters_and_no_exports(notebook):
    cells = nbformat.read(notebook, 4).cells
    source = next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    tree = ast.parse(source)
    assert all(isinstance(node, ast.AnnAssign) for node in tree.body)
    assert all("  # " in line for line in source.splitlines())
    assert not any("#| export" in cell.source or "#| default_exp" in cell.source for cell in cells)


def exported(notebook):
    """The exported definitions of a library notebook: (cell number, name, node)."""
    for number, cell in enumerate(nbformat.read(notebook, 4).cells):
        if cell.cell_type == "code" and "#| export" in cell.source:
            for node in ast.parse(cell.source).body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                    yield number, node.name, node


@pytest.mark.parametrize("notebook", LIBRARY, ids=lambda p: p.name)
def test_every_public_definition_is_documented(notebook):
    bare = [name for _, name, node in exported(notebook) if not ast.get_docstring(node)]
    assert not bare


@pytest.mark.parametrize("notebook", LIBRARY, ids=lambda p: p.name)
def test_public_functions_are_shown_after_their_cell(notebook):
    """By name, in a later cell that is not exported; one in six may be shown through its callers alone."""
    cells = nbformat.read(notebook, 4).cells
    functions = [(number, name) for number, name, node in exported(notebook) if isinstance(node, ast.FunctionDef)]
    later = {number: "\n".join(c.source for c in cells[number + 1:] if c.cell_type == "code" and "#| export" not in c.source)
             for number, _ in functions}
    hidden = [name for number, name in functions if name not in later[number]]
    assert len(hidden) <= max(1, len(functions) / 6), hidden


def test_the_notebooks_are_valid():
    for notebook in NOTEBOOKS:
        nbformat.validate(json.loads(notebook.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def wheel(copy):
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", "dist", "."], cwd=copy, check=True,
                   capture_output=True, timeout=300)
    return next((copy / "dist").glob("*.whl"))


def test_the_wheel_holds_the_study_notebooks(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for notebook in STUDY:
        assert f"leukemia_nb/study_notebooks/{notebook.name}" in names


def test_every_module_imports_from_the_wheel_in_a_clean_environment(wheel, tmp_path):
    """Only the base requirements are installed: no TensorFlow, no torch, no nbdev."""
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", *(["--without-pip"] if shutil.which("uv") else []), tmp_path / "env"], check=True)
    install = ["uv", "pip", "install", "-q", "--python", python] if shutil.which("uv") else [python, "-m", "pip", "install", "-q"]
    subprocess.run([*install, "-c", ROOT / "constraints.txt", wheel], check=True, timeout=900)
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module('leukemia_nb.' + name)\nprint('all')"
    done = subprocess.run([python, "-c", code, *MODULES], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout == "all\n", done.stderr
    again = subprocess.run([python, "-m", "leukemia_nb", "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "segment" in again.stdout, again.stderr


def test_no_module_imports_a_framework():
    code = ("import importlib, sys\nimport leukemia_nb\nfor name in sys.argv[1:]: importlib.import_module('leukemia_nb.' + name)\n"
            "print([n for n in ('tensorflow', 'keras', 'torch', 'ultralytics') if n in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code, *MODULES], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stderr
