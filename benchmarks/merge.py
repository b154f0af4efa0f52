"""Put the results of all benchmarks into benchmarks/results.json, a key a benchmark."""

import json
from pathlib import Path

FOLDER = Path(__file__).parent

if __name__ == "__main__":
    found = {path.stem: json.loads(path.read_text()) for path in sorted((FOLDER / "results").glob("*.json"))}
    (FOLDER / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{FOLDER / 'results.json'}: {', '.join(found)}")
