"""The house rules: notebooks, generated package, wheel."""

import configparser
import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import lint_notebooks
import nbformat
import pytest
from conftest import ROOT
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
STUDY = [p for p in NOTEBOOKS if p.parent.name == "study"]
MODULES = sorted(
    ".".join(p.relative_to(ROOT / "leukemia_nb").with_suffix("").parts)
    for p in (ROOT / "leukemia_nb").rglob("*.py")
    if not p.stem.startswith("_")
)
NEED_TRAIN = ("models.classifier", "models.transfer", "models.yolo", "models.cell_model", "testing")  # scikit-learn estimators
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


def test_the_parameters_tag_survives_cleaning(copy):
    for notebook in STUDY:
        target = copy / "nbs" / "study" / notebook.name
        subprocess.run([BIN / "nbdev_clean", "--fname", target], cwd=copy, check=True, capture_output=True)
        tagged = [cell for cell in nbformat.read(target, 4).cells if "parameters" in cell.metadata.get("tags", [])]
        assert len(tagged) == 1, notebook.name


FUNCTION = """#| export
def double(
    number: int,  # any
) -> int:  # twice as much
    "Twice a number."
    return 2 * number"""
FAULTS = {
    "backticks": (FUNCTION.replace("# any", "# any `int`"), "backticks in a parameter's comment"),
    "type": (FUNCTION.replace("number: int", "number"), "no type for number"),
    "return": (FUNCTION.replace(" -> int:  # twice as much", ":"), "no type of the return"),
    "docstring": (FUNCTION.replace('    "Twice a number."\n', ""), "double has no docstring"),
    "long": (FUNCTION.replace("    return", "    number += 0\n" * 100 + "    return"), "lines exported in one cell"),
    "imports": ("import os\nos.getcwd()", "imports something and does more"),
    "print": ("print(double(2))", "prints where it could show a value"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_linter_finds_what_is_wrong_with_a_library_notebook(fault):
    good, example = nbformat.v4.new_code_cell(FUNCTION), nbformat.v4.new_code_cell("double(2)")
    assert list(lint_notebooks.check_library([good, example])) == []
    assert "example" in "".join(lint_notebooks.check_library([good]))
    source, message = FAULTS[fault]
    assert message in "".join(lint_notebooks.check_library([nbformat.v4.new_code_cell(source), example]))


def test_the_linter_finds_what_is_wrong_with_a_page(tmp_path):
    """Old words, links that lead nowhere, figures without a text, and a title that shares its cell."""
    cells = [nbformat.v4.new_markdown_cell("# Title\n\n> Subtitle\n\nMore [here](gone.ipynb).")]
    figure = nbformat.v4.new_output("display_data", {"image/png": "x"})
    cells += [nbformat.v4.new_code_cell("picture", outputs=[figure])]
    messages = "\n".join(lint_notebooks.check_page(cells, tmp_path))
    for part in (
        "title and a subtitle alone",
        "gone.ipynb leads nowhere",
        "without fig-alt",
        "'picture' is not the field's word",
    ):
        assert part in messages


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("image/svg+xml", "<svg/>", "without fig-alt"),
        ("text/html", '<img src="data:x">', "<img> without alt"),
        ("text/markdown", "## a module", "output: asis"),
        ("text/plain", "PosixPath('/tmp/tmpa1b2c3/out')", "'/tmp/tmpa1b2c3' belongs"),
        ("text/plain", "file:///no/network", "'file:///' belongs"),
        ("text/html", "<td>smoke-0hzuppwx</td>", "'smoke-0hzuppwx' belongs"),
        ("text/plain", "Updated Ultralytics settings", "'Ultralytics settings' belongs"),
    ],
)
def test_the_linter_finds_what_is_wrong_with_an_output(kind, text, message):
    assert message in "".join(lint_notebooks.check_output("", nbformat.v4.new_output("display_data", {kind: text})))
    assert not list(
        lint_notebooks.check_output("#| fig-alt: a\n#| output: asis", nbformat.v4.new_output("display_data", {kind: "a"}))
    )


def test_the_linter_asks_a_study_page_where_its_outputs_come_from():
    note = nbformat.v4.new_markdown_cell("::: {.callout-note}\n[Findings](../findings.ipynb)\n:::", metadata={"tags": ["site"]})
    assert not list(lint_notebooks.check_study_page([note])) and list(lint_notebooks.check_study_page([]))


def test_the_linter_finds_an_import_against_the_flow_and_long_functions(tmp_path):
    module = tmp_path / "splitting.py"
    module.write_text("from ..models.interface import MODELS\n\n\ndef long():\n" + "    pass\n" * 40 + f"TEXT = 'a{'b' * 300}'\n")
    messages = "\n".join(lint_notebooks.check_module(module, "leukemia_nb.processing.splitting"))
    for part in ("imports leukemia_nb.models.interface, which comes after", "long has 41 lines", "a text of 301 characters"):
        assert part in messages
    assert "comes after" not in "".join(lint_notebooks.check_module(module, "leukemia_nb.evaluation.metrics"))


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
    """Only the base requirements are installed: no TensorFlow, no torch, no scikit-learn, no nbdev. Models need `train`."""
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "venv", *(["--without-pip"] if shutil.which("uv") else []), tmp_path / "env"], check=True
    )
    install = ["uv", "pip", "install", "-q", "--python", python] if shutil.which("uv") else [python, "-m", "pip", "install", "-q"]
    (tmp_path / "pins.txt").write_text("\n".join(map(str, LOCK)))
    subprocess.run([*install, "-c", tmp_path / "pins.txt", wheel], check=True, timeout=900)
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module('leukemia_nb.' + name)\nprint('all')"
    done = subprocess.run(
        [python, "-c", code, *(name for name in MODULES if name not in NEED_TRAIN)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
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
