"""The published site, as far as it can be checked without Quarto: order, titles, outputs, links, README, workflow."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import ROOT
from lint_notebooks import anchors, broken_links, cells_of, links, markdown, sidebar_files

NBS = ROOT / "nbs"
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def name_of(notebook: Path) -> str:
    return notebook.relative_to(NBS).as_posix()


SIDEBAR = sidebar_files(yaml.safe_load((NBS / "sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"])


def test_a_newcomer_reads_findings_study_method_howto_glossary_reference_ethics():
    assert SIDEBAR[:2] == ["index.ipynb", "findings.ipynb"]
    assert SIDEBAR[-3:] == ["glossary.ipynb", "reference.ipynb", "data_and_ethics.ipynb"]
    study = [name for name in SIDEBAR if name.startswith("study/")]
    assert SIDEBAR[2 : 2 + len(study)] == sorted(study)
    rest = [name for name in SIDEBAR[2 + len(study) : -3] if not name.startswith("how_to")]
    assert all(name[0].isdigit() for name in rest)


def test_links_of_the_readme_lead_somewhere():
    readme = [nbformat.v4.new_markdown_cell((ROOT / "README.md").read_text(encoding="utf-8"))]
    assert len(links(readme)) > 5 and not broken_links(readme, ROOT)


def test_the_readme_is_the_index():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for text in markdown(cells_of(NBS / "index.ipynb")):
        assert re.sub(r"\]\(([\w/]+\.ipynb)", r"](nbs/\1", text).strip() in readme, "run `make export`"
    assert "make study " in readme and "make test " in readme and len(readme.splitlines()) < 90


def test_the_readme_names_commands_that_there_are():
    from leukemia_nb.study.command_line import app

    readme, makefile = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "Makefile"))
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    named = re.findall(r"^leukemia_nb (\w+)", readme, re.MULTILINE)
    assert named and set(named) <= commands
    targets = re.findall(r"^make (\w+)", readme, re.MULTILINE)
    assert targets and set(targets) <= set(re.findall(r"^(\w+):", makefile, re.MULTILINE))


def shown_commands() -> list[str]:
    """Commands of this project with options that the README or a page shows: in its text, its code or its stored outputs."""
    texts = [(ROOT / "README.md").read_text(encoding="utf-8")]
    for notebook in NOTEBOOKS:
        for cell in nbformat.read(notebook, 4).cells:
            data = [output.get("data", {}).get("text/markdown", "") for output in cell.get("outputs", [])]
            texts += [cell.source, *("".join(one) for one in data)]
    lines = [
        line for text in texts for line in re.findall(r"(?:^|`)((?:leukemia_nb|make study) [^`\n]*--[^`\n]*)", text, re.MULTILINE)
    ]
    return sorted({line for line in lines if not re.search(r"[{}…]|\[OPTIONS\]|COMMAND", line)})


@pytest.mark.parametrize("line", shown_commands())
def test_a_shown_command_has_options_that_there_are(line):
    """Click reads the whole line before it prints the help."""
    from typer.testing import CliRunner

    from leukemia_nb.study.command_line import app

    words = shlex.split(line, comments=True)
    if words[0] == "make":
        given = dict(word.split("=", 1) for word in words[2:])
        words = ["leukemia_nb", "study", "--data", given.get("DATA", "folder"), *shlex.split(given.get("ARGS", ""))]
    result = CliRunner().invoke(app, [*words[1:], "--help"])
    assert result.exit_code == 0, f"{line}: {result.output}"


@pytest.mark.parametrize(
    "file", sorted((ROOT / "benchmarks" / "results").glob("*/study.json")), ids=lambda file: file.parent.name
)
def test_the_command_of_a_measured_study_still_runs(file):
    """The findings show the command of this file's settings: they are settings of today's study, and are accepted."""
    from dataclasses import fields

    from leukemia_nb.study.settings import StudySettings

    kept = json.loads(file.read_text(encoding="utf-8"))
    known = {field.name for field in fields(StudySettings)} & kept.keys()
    StudySettings(**{name: kept[name] for name in known} | {"data": "", "per_class": 120})
    assert set(kept) - known <= {"versions", "steps"}


def test_the_reference_names_every_public_function_and_class():
    shown = "\n".join(markdown(cells_of(NBS / "reference.ipynb")))
    for notebook in NBS.glob("[0-9]*/*.ipynb"):
        export = re.search(r'"#\| default_exp ([\w.]+)"', notebook.read_text(encoding="utf-8"))
        module = importlib.import_module(f"leukemia_nb.{export[1]}")
        for name in module.__all__:
            if callable(getattr(module, name)) and getattr(getattr(module, name), "__module__", "") == module.__name__:
                assert f"[{name}]({notebook.relative_to(NBS).as_posix()}#{name.lower()})" in shown, (
                    f"run nbs/reference.ipynb again: {module.__name__}.{name}"
                )


@pytest.fixture(scope="module")
def processed(copy):
    """The half of nbdev's docs that needs no Quarto: the pages as Quarto would get them."""
    code = "from nbdev.serve import proc_nbs; print(proc_nbs())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHONPATH": str(copy)},
    )
    assert done.returncode == 0, done.stderr
    return copy / "_proc"


def test_all_pages_can_be_processed(processed):
    made = sorted(p.relative_to(processed).as_posix() for p in processed.rglob("*.ipynb"))
    assert made == sorted(map(name_of, NOTEBOOKS))


def test_signatures_say_what_a_class_takes(processed):
    """Fields of named tuples, the bases of exceptions: nothing reads (*args, **kwargs)."""
    shown = {page: "\n".join(markdown(cells_of(page))) for page in processed.rglob("*.ipynb")}
    assert [page.name for page, text in shown.items() if re.search(r"\*args,? *\n? *\*\*kwargs", text)] == []
    assert any("class Cells(NamedTuple):\n    features: np.ndarray" in text for text in shown.values())


def test_links_between_pages_lead_somewhere(processed):
    lost = {page.name: found for page in processed.rglob("*.ipynb") if (found := broken_links(cells_of(page), page.parent))}
    assert not lost


def test_links_to_names_lead_to_the_page_and_heading_that_explain_them(processed):
    """nbdev turns `names` in prose into addresses of the published site."""
    site = yaml.safe_load((NBS / "nbdev.yml").read_text(encoding="utf-8"))["website"]["site-url"] + "/"
    pages = {}
    for page in processed.rglob("*.ipynb"):
        cells = cells_of(page)
        front = yaml.safe_load(cells[0].source.strip().strip("-"))
        pages[(page.parent.relative_to(processed) / front["output-file"]).as_posix()] = anchors(cells)
    lost, seen = [], 0
    for page in processed.rglob("*.ipynb"):
        for link in links(cells_of(page)):
            if not link.startswith(site):
                continue
            path, _, anchor = link.removeprefix(site).partition("#")
            seen += 1
            if path not in pages or (anchor and anchor not in pages[path]):
                lost.append(f"{page.name}: {link}")
    assert seen > 100 and not lost


def test_settings_of_the_site_name_files_that_are_there():
    settings = yaml.safe_load((NBS / "_quarto.yml").read_text(encoding="utf-8"))
    assert settings["project"]["type"] == "website"
    joined = [yaml.safe_load((NBS / file).read_text(encoding="utf-8")) for file in settings["metadata-files"]]
    own = next(one for one in joined if "format" in one)
    assert (NBS / own["format"]["html"]["css"]).is_file()
    entries = [page for entry in own["website"]["navbar"]["left"] for page in entry.get("menu", [entry])]
    assert [entry["href"] for entry in entries if entry["href"] not in SIDEBAR] == []
    assert (NBS / own["website"]["favicon"]).is_file()


@pytest.mark.parametrize("workflow", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda p: p.name)
def test_the_workflow_pins_what_it_runs(workflow):
    text = workflow.read_text(encoding="utf-8")
    assert yaml.safe_load(text)["jobs"]
    for line in text.splitlines():
        if "uses:" in line:
            assert re.search(r"uses: [\w./-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+$", line), line
    assert "latest" not in text and re.search(r'python-version: "\d+\.\d+\.\d+"', text)


def test_the_site_is_built_by_a_quarto_of_known_version_and_checksum():
    environment = yaml.safe_load((ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8"))["env"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", environment["QUARTO_VERSION"]) and re.fullmatch(
        r"[0-9a-f]{64}", environment["QUARTO_SHA256"]
    )
