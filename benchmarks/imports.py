"""Time of importing each module in a fresh process, best of five; writes benchmarks/results/imports.json."""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODULES = [
    "",
    *sorted(
        "." + ".".join(path.relative_to(ROOT / "leukemia_nb").with_suffix("").parts)
        for path in (ROOT / "leukemia_nb").rglob("*.py")
        if not path.stem.startswith("_")
    ),
]


def seconds(statement: str, repeats: int = 5) -> float:
    """Shortest wall time of a Python process that runs one statement."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True, cwd=ROOT)
        times.append(time.perf_counter() - began)
    return min(times)


if __name__ == "__main__":
    bare = seconds("pass")
    found = {f"leukemia_nb{name}": round(seconds(f"import leukemia_nb{name}") - bare, 3) for name in MODULES}
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "load": round(os.getloadavg()[0], 1),
        "bare_python_seconds": round(bare, 3),
        "import_seconds": found,
    }
    (ROOT / "benchmarks/results/imports.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
