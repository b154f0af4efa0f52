"""House rules of notebooks and exported code, in one run: python tests/lint_notebooks.py [checkout]"""

import ast
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import nbformat
import yaml

ROOMS = ("data", "processing", "models", "evaluation", "audit", "inference", "study")
OLD_WORDS = re.compile(
    r"\b(pictures?|the deck|deck's|told apart|tell apart|made-up|made up|twins?|shortcut controls?|counterfactuals?|"
    r"right answers?|relatives?|recipe|blasts? found)\b",
    re.IGNORECASE,
)
# Aims: a median of 10 lines per cell, 8,500 lines in all. What is above today may not grow.
LIMITS = {"exported cell": 40, "function": 40, "median of exported cells": 12, "lines": 13890, "public names": 329, "text": 240}
# Temporary and home folders, addresses of files and objects, names of example runs, ultralytics' line on its settings.
STRAY = re.compile(
    r"/tmp/\w+|/(?:home|root|work)/\w+/|file:///|\bsmoke-\w{6,}|Ultralytics settings|<[^<>]* object at 0x[0-9a-f]+>"
)
FENCE, CODE = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE), re.compile(r"`[^`\n]*`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def cells_of(notebook: Path) -> list:
    return nbformat.read(notebook, 4).cells


def markdown(cells: list) -> list[str]:
    """Markdown of a notebook: its own and what its code has shown."""
    shown = [output.get("data", {}).get("text/markdown", "") for cell in cells for output in cell.get("outputs", [])]
    return [cell.source for cell in cells if cell.cell_type == "markdown"] + ["".join(text) for text in shown if text]


def links(cells: list) -> list[str]:
    return [unquote(link) for text in markdown(cells) for link in LINK.findall(CODE.sub("", FENCE.sub("", text)))]


def anchors(cells: list) -> set[str]:
    """Identifiers of the headings, as Pandoc makes them."""
    found = set()
    for text in markdown(cells):
        for heading in re.findall(r"^#{1,6} +(.+?)\s*$", FENCE.sub("", text), re.MULTILINE):
            words = re.sub(r"[^\w\-. ]", "", heading.lower()).strip().replace(" ", "-")
            found.add(re.sub(r"^[^a-z]+", "", words))
    return found


def broken_links(cells: list, folder: Path, headings: bool = True) -> list[str]:
    """Relative links of a page that lead to no file, or to no heading of it (nbdev adds some when it prepares a page)."""
    lost = []
    for link in links(cells):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        there = not path or (folder / path).exists()
        if not there or (headings and anchor and anchor not in anchors(cells_of(folder / path) if path else cells)):
            lost.append(link)
    return lost


def code_cells(cells: list) -> Iterator[tuple[int, str, bool]]:
    """Number, source and whether it is exported, of each code cell."""
    for number, cell in enumerate(cells):
        if cell.cell_type == "code":
            yield number, cell.source, re.search(r"^#\| *exports?\b", cell.source, re.MULTILINE) is not None


def check_page(cells: list, folder: Path) -> Iterator[str]:
    """Title, subtitle, outputs, figures, links and words of any page."""
    first = next((cell.source for cell in cells if cell.cell_type == "markdown"), "")
    if not re.fullmatch(r"# .+\n+> .+", first.strip()):
        yield "the first Markdown cell is not a title and a subtitle alone"
    outputs = [(cell, output) for cell in cells for output in cell.get("outputs", [])]
    if not outputs and any(cell.cell_type == "code" for cell in cells):
        yield "no outputs: execute it"
    for cell, output in outputs:
        if output.output_type == "error" or output.get("name") == "stderr":
            yield f"cell {cells.index(cell)}: an output is an error or a warning"
        yield from (f"cell {cells.index(cell)}: {message}" for message in check_output(cell.source, output))
    yield from (f"link {link} leads nowhere" for link in broken_links(cells, folder, headings=False))
    for number, cell in enumerate(cells):
        if word := OLD_WORDS.search(cell.source):
            yield f"cell {number}: {word[0]!r} is not the field's word, see the glossary"


def check_output(source: str, output: dict) -> Iterator[str]:
    """Text of each image, contents, and what belongs to the machine that executed the page."""
    data = {kind: "".join(text) for kind, text in output.get("data", {}).items()}
    shown = "".join(data.get("text/html", ""))
    if any(kind.startswith("image/") for kind in data) and "fig-alt:" not in source:
        yield "an image without fig-alt"
    if any("alt=" not in image for image in re.findall(r"<img\b[^>]*>", shown)):
        yield "an <img> without alt"
    heading = re.search(r"^#+ ", data.get("text/markdown", ""), re.MULTILINE)  # of the page, unless it is a page of its own
    if heading and len(heading[0]) > 2 and "output: asis" not in source:
        yield "headings that the contents of the page miss: put #| output: asis"
    texts = [text for kind, text in data.items() if not kind.startswith("image/")] + ["".join(output.get("text", ""))]
    if stray := next(filter(None, map(STRAY.search, texts)), None):
        yield f"{stray[0]!r} belongs to the machine that executed the page"


def check_study_page(cells: list) -> Iterator[str]:
    """A study page says where its outputs come from, and leads to the findings; the report leaves this cell out."""
    notes = [cell for cell in cells if cell.source.startswith("::: {.callout") and "site" in cell.metadata.get("tags", [])]
    if len(notes) != 1 or "../findings.ipynb" not in notes[0].source:
        yield "no callout, tagged site, that says what run the outputs are of and links to ../findings.ipynb"


def check_library(cells: list) -> Iterator[str]:
    """Exported cells, their documentation, and their examples."""
    later = [(number, source) for number, source, exported in code_cells(cells) if not exported]
    for number, source, exported in code_cells(cells):
        body = ast.parse("\n".join(line for line in source.splitlines() if not line.startswith(("%", "!")))).body
        imports = [isinstance(node, ast.Import | ast.ImportFrom) for node in body]
        if not exported:
            if any(imports) and not all(imports):
                yield f"cell {number}: imports something and does more, which nbdev runs when it prepares the page"
            if re.search(r"^print\(", source, re.MULTILINE):
                yield f"cell {number}: prints where it could show a value"
            continue
        lines = sum(1 for line in source.splitlines() if line.strip() and not line.startswith("#|"))
        if lines > LIMITS["exported cell"] and not imports[0]:
            yield f"cell {number}: {lines} lines exported in one cell"
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                yield from (f"cell {number}: {message}" for message in check_definition(node, source))
                if not any(node.name in text for place, text in later if place > number):
                    yield f"cell {number}: {node.name} has no example after it"


def check_definition(node: ast.FunctionDef | ast.ClassDef, source: str) -> Iterator[str]:
    """Docstring, types and comments of a public definition."""
    if not ast.get_docstring(node):
        yield f"{node.name} has no docstring"
    if not isinstance(node, ast.FunctionDef):
        return
    arguments = [a for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if a.arg != "self"]
    if bare := [argument.arg for argument in arguments if argument.annotation is None]:
        yield f"{node.name}: no type for {', '.join(bare)}"
    if node.returns is None:
        yield f"{node.name}: no type of the return"
    head = source.splitlines()[node.lineno - 1 : node.body[0].lineno - 1]
    comments = sum("# " in line for line in head)
    if comments < len(arguments):
        yield f"{node.name}: {len(arguments)} parameters, {comments} comments"
    if any("`" in line for line in head):
        yield f"{node.name}: backticks in a parameter's comment"


def check_parameters(cells: list) -> Iterator[str]:
    """The parameters of a study notebook."""
    tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        yield f"{len(tagged)} cells are tagged parameters"
        return
    if not all(isinstance(node, ast.AnnAssign) for node in ast.parse(tagged[0]).body):
        yield "a parameter has no type"
    if not all("  # " in line for line in tagged[0].splitlines() if line and not line.startswith("#")):
        yield "a parameter has no comment"


def room_of(module: str) -> int:
    """Place of a module in the order of the rooms; -1 for what stands beside them."""
    part = module.split(".")[1] if "." in module else ""
    return ROOMS.index(part) if part in ROOMS else -1


def check_module(path: Path, module: str) -> Iterator[str]:
    """Imports, length of functions and length of texts in an exported module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)
    docstrings = {id(n.body[0].value) for n in ast.walk(tree) if isinstance(n, documented) and ast.get_docstring(n)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            target = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
            for name in {target, *(f"{target}.{alias.name}" for alias in node.names)}:
                if name.startswith("leukemia_nb") and room_of(module) >= 0 and room_of(name) > room_of(module):
                    yield f"line {node.lineno}: {module} imports {name}, which comes after it"
                if name == "leukemia_nb.testing":
                    yield f"line {node.lineno}: imports leukemia_nb.testing"
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > LIMITS["function"]:
            yield f"line {node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        text = getattr(node, "value", None) if isinstance(node, ast.Constant) and id(node) not in docstrings else None
        if isinstance(text, str) and (len(text) > LIMITS["text"] or text.strip().count("\n") > 1):
            yield f"line {node.lineno}: a text of {len(text)} characters in Python; put it into a file"


def sidebar_files(entries: list) -> list[str]:
    """Files of a sidebar, in reading order."""
    found: list[str] = []
    for entry in entries:
        found += (
            [entry] if isinstance(entry, str) else sidebar_files(entry["contents"]) if "section" in entry else [entry["href"]]
        )
    return found


def summary(modules: dict[str, Path], notebooks: dict[str, list]) -> tuple[dict[str, float], list[str]]:
    """Size of the exported code, and what is over its limit. Lines are those of `ruff format`."""
    sizes = [
        sum(1 for line in source.splitlines() if line.strip() and not line.startswith("#|"))
        for cells in notebooks.values()
        for _, source, exported in code_cells(cells)
        if exported and not all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(source).body)
    ]
    names = 0
    for path in modules.values():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                names += len(node.value.elts)
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in modules.values())
    found = {"lines": lines, "public names": names, "median of exported cells": statistics.median(sizes or [0])}
    return found, [f"{key}: {value} of at most {LIMITS[key]}" for key, value in found.items() if value > LIMITS[key]]


def lint(root: Path) -> tuple[dict[str, float], list[str]]:
    """Size of the code, and every breach of the house rules as `file: message`."""
    nbs, found = root / "nbs", []
    paths = sorted(p for p in nbs.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    pages = {path.relative_to(nbs).as_posix(): cells_of(path) for path in paths}
    for name, cells in pages.items():
        messages = list(check_page(cells, (nbs / name).parent))
        if name.startswith("study/"):
            messages += [*check_parameters(cells), *check_study_page(cells)]
        if any(exported for _, _, exported in code_cells(cells)):
            messages += check_library(cells)
        found += [f"nbs/{name}: {message}" for message in messages]
    package = [p for p in sorted((root / "leukemia_nb").rglob("*.py")) if not p.stem.startswith("_")]
    modules = {".".join(path.relative_to(root).with_suffix("").parts): path for path in package}
    for module, path in modules.items():
        found += [f"{path.relative_to(root)}: {message}" for message in check_module(path, module)]
    listed = sidebar_files(yaml.safe_load((nbs / "sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"])
    found += [f"nbs/sidebar.yml: {name} is not in it once" for name in pages if listed.count(name) != 1]
    found += [f"nbs/sidebar.yml: {name} is not there" for name in listed if name not in pages]
    sizes, over = summary(modules, pages)
    return sizes, found + over


if __name__ == "__main__":
    sizes, breaches = lint(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]).resolve())
    print(*breaches, ", ".join(f"{key}: {value}" for key, value in sizes.items()), sep="\n")
    sys.exit(bool(breaches))
