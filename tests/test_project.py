"""The house rules: notebooks, generated package, wheel."""

import ast
import configparser
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
LIBRARY = [p for p in NOTEBOOKS if p.parent.name[0].isdigit()]
STUDY = [p for p in NOTEBOOKS if p.parent.name == "study"]
MODULES = sorted(
    ".".join(p.relative_to(ROOT / "leukemia_nb").with_suffix("").parts)
    for p in (ROOT / "leukemia_nb").rglob("*.py")
    if not p.stem.startswith("_")
)
BIN = Path(sys.executable).parent
ENTRIES = re.split(r"\n(?=\S)", "\n" + (ROOT / "requirements.lock").read_text(encoding="utf-8").strip())[1:]
LOCK = [Requirement(entry.split("\\")[0]) for entry in ENTRIES if not entry.startswith("#")]
PYTHONS = ("3.11.9", "3.12.9", "3.13.9")


def locked(python):
    """What the lock file pins on Linux under a Python: name -> version."""
    place = {
        **default_environment(),
        "python_full_version": python,
        "python_version": python.rpartition(".")[0],
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "os_name": "posix",
    }
    pins = [pin for pin in LOCK if pin.marker is None or pin.marker.evaluate(place)]
    names = [canonicalize_name(pin.name) for pin in pins]
    assert len(set(names)) == len(names), "two releases of one package apply"
    return {name: str(pin.specifier).removeprefix("==") for name, pin in zip(names, pins, strict=True)}, place


def test_every_locked_package_has_one_release_and_hashes_and_no_index():
    for entry in ENTRIES:
        if not entry.startswith("#"):
            assert re.fullmatch(r"[\w.-]+==[\w.]+( ; .+)?( \\\n    --hash=sha256:[0-9a-f]{64})+", entry), entry[:100]
    text = "\n".join(ENTRIES)
    assert "://" not in text and "--index" not in text and "--find-links" not in text


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_locked_within_its_range(python):
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    pins, _ = locked(python)
    for key in ("requirements", "train_requirements", "dev_requirements"):
        for requirement in map(Requirement, settings["DEFAULT"][key].split()):
            name = canonicalize_name(requirement.name)
            assert name in pins, f"{name} of {key} is not in requirements.lock: run `make lock`"
            assert requirement.specifier.contains(pins[name]), f"{name}=={pins[name]} is locked, {requirement} is asked for"


def test_what_the_locked_packages_need_is_locked_too():
    """By the metadata of those that are installed here; torch and torchvision come as a pair in this way."""
    pins, place = locked("{}.{}.{}".format(*sys.version_info))
    checked = 0
    for distribution in importlib.metadata.distributions():
        if pins.get(canonicalize_name(distribution.name)) != distribution.version:
            continue
        for requirement in map(Requirement, distribution.requires or []):
            if requirement.marker is None or requirement.marker.evaluate({**place, "extra": ""}):
                pin = pins.get(canonicalize_name(requirement.name))
                assert pin and requirement.specifier.contains(pin, prereleases=True), f"{distribution.name} needs {requirement}"
                checked += 1
    assert checked > 100 and "torchvision" in pins


def test_make_installs_what_is_locked_and_nothing_else():
    """Dry runs, with uv and without: hashes are required, and nothing is resolved or built from unlocked packages."""
    for uv in ("", "uv"):
        plan = subprocess.run(
            ["make", "-n", "-B", "install", f"UV={uv}"], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout
        installs = [line for line in plan.splitlines() if " install " in line]
        assert len(installs) == 2 and "--require-hashes -r requirements.lock" in installs[0]
        assert "--no-deps" in installs[1] and "--no-build-isolation" in installs[1]
        assert "GB" in plan[: plan.index(installs[0])], "the first thing said is how much is coming"


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
    later = {
        number: "\n".join(c.source for c in cells[number + 1 :] if c.cell_type == "code" and "#| export" not in c.source)
        for number, _ in functions
    }
    hidden = [name for number, name in functions if name not in later[number]]
    assert len(hidden) <= max(1, len(functions) / 6), hidden


def test_the_notebooks_are_valid():
    for notebook in NOTEBOOKS:
        nbformat.validate(json.loads(notebook.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def wheel(copy):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", "dist", "."],
        cwd=copy,
        check=True,
        capture_output=True,
        timeout=300,
    )
    return next((copy / "dist").glob("*.whl"))


def test_the_wheel_holds_the_study_notebooks(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for notebook in STUDY:
        assert f"leukemia_nb/study_notebooks/{notebook.name}" in names


def test_every_module_imports_from_the_wheel_in_a_clean_environment(wheel, tmp_path):
    """Only the base requirements are installed: no TensorFlow, no torch, no nbdev."""
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "venv", *(["--without-pip"] if shutil.which("uv") else []), tmp_path / "env"], check=True
    )
    install = ["uv", "pip", "install", "-q", "--python", python] if shutil.which("uv") else [python, "-m", "pip", "install", "-q"]
    (tmp_path / "pins.txt").write_text("\n".join(map(str, LOCK)))
    subprocess.run([*install, "-c", tmp_path / "pins.txt", wheel], check=True, timeout=900)
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module('leukemia_nb.' + name)\nprint('all')"
    done = subprocess.run([python, "-c", code, *MODULES], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout == "all\n", done.stderr
    again = subprocess.run([python, "-m", "leukemia_nb", "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "segment" in again.stdout, again.stderr


def test_no_module_imports_a_framework():
    code = (
        "import importlib, sys\nimport leukemia_nb\nfor name in sys.argv[1:]: importlib.import_module('leukemia_nb.' + name)\n"
        "print([n for n in ('tensorflow', 'keras', 'torch', 'ultralytics') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *MODULES], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stderr
