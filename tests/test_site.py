"""The published site, as far as it can be checked without Quarto: order, titles, outputs, links, README, workflow."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
import yaml
from conftest import ROOT

NBS = ROOT / "nbs"
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`[^`\n]*`")


def name_of(notebook: Path) -> str:
    return notebook.relative_to(NBS).as_posix()


def cells_of(notebook: Path) -> list:
    return nbformat.read(notebook, 4).cells


def texts(cells) -> list[str]:
    """Markdown of a notebook: its own and what its code has shown."""
    found = [cell.source for cell in cells if cell.cell_type == "markdown" and cell.get("source")]
    for cell in cells:
        found += [
            "".join(output.data["text/markdown"])
            for output in cell.get("outputs", [])
            if "text/markdown" in output.get("data", {})
        ]
    return found


def links(cells) -> list[str]:
    return [unquote(link) for text in texts(cells) for link in LINK.findall(CODE.sub("", FENCE.sub("", text)))]


def anchors(cells) -> set[str]:
    """Identifiers of the headings, as Pandoc makes them."""
    found = set()
    for text in texts(cells):
        for heading in re.findall(r"^#{1,6} +(.+?)\s*$", FENCE.sub("", text), re.MULTILINE):
            words = re.sub(r"[^\w\-. ]", "", heading.lower()).strip().replace(" ", "-")
            found.add(re.sub(r"^[^a-z]+", "", words))
    return found


def contents(entries) -> list[str]:
    """Files of a sidebar, in reading order."""
    found = []
    for entry in entries:
        if isinstance(entry, str):
            found.append(entry)
        elif "section" in entry:
            found += contents(entry["contents"])
        else:
            found.append(entry["href"])
    return found


SIDEBAR = contents(yaml.safe_load((NBS / "sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"])


def test_the_sidebar_names_every_notebook_once():
    assert sorted(SIDEBAR) == sorted(map(name_of, NOTEBOOKS))


def test_a_newcomer_reads_result_findings_method_reference_howto_ethics():
    assert SIDEBAR[:2] == ["index.ipynb", "findings.ipynb"]
    assert SIDEBAR[-3:] == ["reference.ipynb", "how_to_add_a_model.ipynb", "data_and_ethics.ipynb"]
    study = [name for name in SIDEBAR if name.startswith("study/")]
    assert SIDEBAR[2 : 2 + len(study)] == sorted(study)
    assert all(name[0].isdigit() for name in SIDEBAR[2 + len(study) : -3])


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
def test_a_page_has_a_title_and_a_subtitle_in_a_cell_of_their_own(notebook):
    """nbdev makes front matter of the first Markdown cell: whatever else stands in it is not published."""
    first = next(cell.source for cell in cells_of(notebook) if cell.cell_type == "markdown")
    title, subtitle = (line for line in first.splitlines() if line.strip())
    assert title.startswith("# ") and subtitle.startswith("> ")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
def test_a_page_is_committed_with_outputs_without_errors_and_small(notebook):
    outputs = [output for cell in cells_of(notebook) for output in cell.get("outputs", [])]
    assert outputs, f"nothing to see: run `jupyter nbconvert --to notebook --execute --inplace nbs/{name_of(notebook)}`"
    assert not [output for output in outputs if output.output_type == "error"]
    assert notebook.stat().st_size < 1_200_000


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
def test_a_cell_that_imports_holds_nothing_else(notebook):
    """nbdev runs such cells, and no others but the exported, when it prepares a page that has exports."""
    sources = [cell.source for cell in cells_of(notebook) if cell.cell_type == "code"]
    if not any("#| export" in source for source in sources):
        return
    for source in sources:
        if "#| export" in source:
            continue
        imports = [isinstance(statement, ast.Import | ast.ImportFrom) for statement in ast.parse(source).body]
        assert all(imports) or not any(imports), source


def leads_somewhere(link: str, cells, folder: Path) -> bool:
    """Whether a relative link of a page leads to a file, and to a heading of it if it names one."""
    path, _, anchor = link.partition("#")
    target = folder / path
    if path and not target.exists():
        return False
    if not anchor:
        return True
    return anchor in anchors(cells_of(target) if path else cells)


def broken(cells, folder: Path) -> list[str]:
    """Relative links of a page that lead nowhere."""
    return [link for link in links(cells) if not re.match(r"[a-z]+:", link) and not leads_somewhere(link, cells, folder)]


def test_links_of_the_readme_lead_somewhere():
    readme = [nbformat.v4.new_markdown_cell((ROOT / "README.md").read_text(encoding="utf-8"))]
    assert len(links(readme)) > 5 and not broken(readme, ROOT)


def test_the_readme_is_the_index():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for text in texts(cells_of(NBS / "index.ipynb")):
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


def test_the_reference_names_every_public_function_and_class():
    shown = "\n".join(texts(cells_of(NBS / "reference.ipynb")))
    for notebook in NBS.glob("[0-9]*/*.ipynb"):
        export = re.search(r'"#\| default_exp (\w+)"', notebook.read_text(encoding="utf-8"))
        module = importlib.import_module(f"leukemia_nb.{export[1]}")
        for name in module.__all__:
            if callable(getattr(module, name)) and getattr(getattr(module, name), "__module__", "") == module.__name__:
                assert f"[{name}]({notebook.name}#{name.lower()})" in shown, (
                    f"run nbs/reference.ipynb again: {module.__name__}.{name}"
                )


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
def test_a_page_shows_no_warning_and_no_progress_bar(notebook):
    outputs = [output for cell in cells_of(notebook) if cell.cell_type == "code" for output in cell.outputs]
    assert [output.text[:200] for output in outputs if output.get("name") == "stderr"] == []


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


def test_links_between_pages_lead_somewhere(processed):
    lost = {page.name: found for page in processed.rglob("*.ipynb") if (found := broken(cells_of(page), page.parent))}
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
    assert [entry["href"] for entry in own["website"]["navbar"]["left"] if entry["href"] not in SIDEBAR] == []


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
