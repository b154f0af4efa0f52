"""How many random mutants of the exported code do tests and notebooks kill? python benchmarks/mutation.py --mutants 150

A mutant is one comparison, arithmetic operation, number or condition changed in one exported cell, in a copy of the checkout.
Its notebook runs first, then the tests of its module; a mutant that both let pass has survived. Figures are not mutated, and
tests marked as slow, such as those of whole studies, are left out. They may kill some of the survivors.
The sample is that of the smallest hashes, so that it stays the same where the code does. Each mutant is written as soon as it
is judged; another run goes on there, and judges again the mutants of changed cells and those that survived.
"""

import argparse
import ast
import hashlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from leukemia_nb.evaluation.uncertainty import clopper_pearson

ROOT = Path(__file__).resolve().parents[1]
COMPARE = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.In: "not in",
    ast.NotIn: "in",
}
ARITHMETIC = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*", ast.Pow: "*"}
CHECKED: set[tuple[str, ...]] = set()  # commands that pass on the unchanged checkout
CHECKING: defaultdict[tuple[str, ...], threading.Lock] = defaultdict(threading.Lock)
SKIPPED = re.compile(r"figure|plot|panel|style|overlay|outlines", re.IGNORECASE)


@dataclass(frozen=True)
class Mutant:
    """One change of one exported cell."""

    notebook: str  # below the checkout
    module: str  # file of the package, below the checkout
    function: str
    before: str  # source of the changed expression
    after: str
    cell: str  # source of the cell, unchanged
    place: int  # of `before` in the cell, in characters

    def describe(self) -> str:
        return f"{self.function}: {self.before} -> {self.after}"

    def identity(self, seed: int = 0) -> str:
        text = f"{seed} {self.module} {self.place} {self.describe()} {self.cell}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def changed_cell(self) -> str:
        return self.cell[: self.place] + self.after + self.cell[self.place + len(self.before) :]


def changes(node: ast.AST, source: str) -> str | None:
    """The changed source of a node, or None for one that is left alone."""
    part = lambda child: ast.get_source_segment(source, child)  # noqa: E731
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARE and len(node.ops) == 1:
        return f"{part(node.left)} {COMPARE[type(node.ops[0])]} {part(node.comparators[0])}"
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC and not is_text(node.left):
        return f"{part(node.left)} {ARITHMETIC[type(node.op)]} {part(node.right)}"
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return repr(node.value + 1)
    if isinstance(node, ast.BoolOp):
        word = " or " if isinstance(node.op, ast.And) else " and "
        return word.join(f"({part(value)})" for value in node.values)
    if isinstance(node, ast.If | ast.IfExp):
        return None if isinstance(node.test, ast.Compare | ast.BoolOp) else f"not ({part(node.test)})"
    return None


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", None), str)


def all_mutants() -> Iterator[Mutant]:
    for notebook in sorted((ROOT / "nbs").glob("[0-9]*/*.ipynb")):
        sources = ["".join(cell["source"]) for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]]
        target = re.search(r"^#\| default_exp ([\w.]+)", "\n".join(sources), re.MULTILINE)
        if target is None or target[1] in ("plotting", "testing"):
            continue
        for source in sources:
            head, _, cell = source.partition("\n")
            if head.startswith("#| export"):
                yield from cell_mutants(cell, notebook, f"leukemia_nb/{target[1].replace('.', '/')}.py")


def cell_mutants(cell: str, notebook: Path, module: str) -> Iterator[Mutant]:
    """All mutants of the functions of one exported cell."""
    starts = [0]
    for line in cell.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for function in ast.walk(ast.parse(cell)):
        if not isinstance(function, ast.FunctionDef) or SKIPPED.search(function.name):
            continue
        inside = [node for statement in function.body for node in ast.walk(statement)]
        for node in inside:
            after = changes(node, cell)
            target = node.test if isinstance(node, ast.If | ast.IfExp) else node
            before = after and ast.get_source_segment(cell, target)
            if before and cell.isascii():
                place = starts[target.lineno - 1] + target.col_offset
                yield Mutant(str(notebook.relative_to(ROOT)), module, function.name, before, after, cell, place)


def tests_of(module: str) -> list[str]:
    """The four test files that name a module most often, its own first; none of the project's own files."""
    name, room = Path(module).stem, Path(module).parent.name
    named = re.compile(rf"\b{room}\.{name}\b|from leukemia_nb\.{room} import [^\n]*\b{name}\b")
    times = {path: len(named.findall(path.read_text(encoding="utf-8"))) for path in sorted((ROOT / "tests").glob("test_*.py"))}
    found = [path for path in times if times[path] and path.stem not in ("test_cluster", "test_project", "test_site")]
    found.sort(key=lambda path: (path.stem != f"test_{name}", -times[path]))
    return [f"tests/{path.name}" for path in found[:4]]


def survives(mutant: Mutant, copy: Path) -> bool:
    """Whether tests and notebook pass with the mutant in them."""
    files = {name: (copy / name).read_text(encoding="utf-8") for name in (mutant.notebook, mutant.module)}
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment.setdefault("LEUKEMIA_NB_SHARED", str(ROOT.parent / "shared"))
    programs, book = Path(sys.executable).parent, json.loads(files[mutant.notebook])
    for cell in book["cells"]:
        head, _, source = "".join(cell["source"]).partition("\n")
        if source == mutant.cell:
            cell["source"] = f"{head}\n{mutant.changed_cell()}"
    tests = [
        [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "--timeout", "1500", name]
        for name in tests_of(mutant.module)
    ]
    exported = mutant.cell.strip()
    assert files[mutant.module].count(exported) == 1, f"{mutant.module} is not what nbdev_export writes"
    changed = files[mutant.module].replace(exported, mutant.changed_cell().strip())
    for command in [[str(programs / "nbdev_test"), "--path", mutant.notebook, "--n_workers", "0"], *tests]:
        try:
            (copy / mutant.notebook).write_text(json.dumps(book), encoding="utf-8")
            (copy / mutant.module).write_text(changed, encoding="utf-8")
            killed = not passes(command, copy, environment)
        finally:
            for name, text in files.items():
                (copy / name).write_text(text, encoding="utf-8")
        if killed:
            with CHECKING[tuple(command)]:  # what fails without a mutant kills none
                if tuple(command) not in CHECKED and not passes(command, copy, environment):
                    raise SystemExit(f"fails without any mutant: {' '.join(command)}")
                CHECKED.add(tuple(command))
            return False
    return True


def passes(command: list[str], folder: Path, environment: dict[str, str]) -> bool:
    try:
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=1800).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutants", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--room", default="", help="only mutants of this package, such as evaluation")
    options = parser.parse_args()
    found = [mutant for mutant in all_mutants() if options.room in mutant.module.split("/")[1:] + [""]]
    chosen = sorted(found, key=lambda mutant: mutant.identity(options.seed))[: options.mutants]
    file = ROOT / "benchmarks/results" / f"mutation{options.room and '_'}{options.room}.json"
    verdicts = json.loads(file.read_text(encoding="utf-8"))["verdicts"] if file.is_file() else {}
    judged = {mutant: verdicts[mutant.identity()] for mutant in chosen if mutant.identity() in verdicts}
    chosen = [mutant for mutant in chosen if judged.get(mutant) != "killed"]
    copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        for job in range(options.jobs):
            copies.put(
                Path(
                    shutil.copytree(
                        ROOT, Path(folder) / str(job) / "leukemia_nb", ignore=shutil.ignore_patterns(".venv", "runs", ".git")
                    )
                )
            )

        def judge(mutant: Mutant) -> bool:
            copy = copies.get()
            try:
                return survives(mutant, copy)
            finally:
                copies.put(copy)

        with ThreadPoolExecutor(options.jobs) as pool:
            for mutant, alive in zip(chosen, pool.map(judge, chosen)):
                print("SURVIVED" if alive else "killed", mutant.module, mutant.describe(), flush=True)
                judged[mutant] = "survived" if alive else "killed"
                write(judged, len(found), options.seed, file)


def write(judged: dict[Mutant, str], n_possible: int, seed: int, file: Path) -> None:
    """Write what is known so far: the order of the hashes is random, so that the first mutants are a random sample too."""
    killed = list(judged.values()).count("killed")
    low, high = clopper_pearson(killed, len(judged))
    result = {"seed": seed, "of": n_possible, "mutants": len(judged), "killed": killed, "low": low, "high": high}
    survivors = [{"module": mutant.module, "change": mutant.describe()} for mutant in judged if judged[mutant] == "survived"]
    result |= {"interval": "Clopper-Pearson, 95 %", "survivors": survivors}
    result["verdicts"] = {mutant.identity(): verdict for mutant, verdict in judged.items()}
    file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
