"""Keep the numbers of a finished study for the documentation: `make results RUN=runs/taleqani`.

Copies tables only, no picture and no file name of a picture, to benchmarks/results/<name of the run>/.
"""
import argparse
import json
from pathlib import Path

import pandas as pd

from leukemia_nb.files import read_table, write_table
from leukemia_nb.evaluation import answers, read_all_predictions, take_subset

RESULTS = Path(__file__).parent / "results"
TABLES = ("metrics/models.csv", "metrics/classes.csv", "metrics/grouped_accuracy.csv", "metrics/pairs_of_models.csv",
          "metrics/calibration.csv", "metrics/controls.csv", "metrics/cross_validation.csv", "metrics/saliency.csv",
          "metrics/efficientnet.csv", "metrics/efficientnet_last.csv", "metrics/reporting_items.csv", "metrics/follow.csv",
          "metrics/follow_by_pair.csv", "metrics/worth.csv", "metrics/robustness.csv", "leakage.csv")


def collect(run: Path, out: Path) -> None:
    """Copy the tables of a run, the sizes of its subsets, the histories, and the time of each step."""
    out.mkdir(parents=True, exist_ok=True)
    for name in TABLES:
        if (run / name).is_file():
            write_table(out / Path(name).name, read_table(run / name))
    for history in sorted(run.glob("models/*/history.csv")):
        write_table(out / f"history_{history.parent.name}.csv", read_table(history))
    exported = [json.loads(path.read_text()) for path in sorted(run.glob("exported/*.json"))]
    kept = ("name", "version", "bytes", "difference", "temperature", "calibration", "thresholds", "accepted", "test")
    (out / "exported.json").write_text(json.dumps([{key: info.get(key) for key in kept} for info in exported], indent=1) + "\n")
    tests = {name: take_subset(table) for name, table in read_all_predictions(run / "predictions").items()}
    said = [test.assign(model=name, answer=answers(test)) for name, test in tests.items()]
    write_table(out / "confusion.csv", pd.concat(said).groupby(["model", "class", "answer"]).size().reset_index(name="pictures"))
    split = read_table(run / "split.csv")
    write_table(out / "subsets.csv", split.groupby(["class", "subset"]).size().unstack().reset_index())
    steps = [json.loads(path.read_text()) for path in sorted(run.glob("steps/*.json"))]
    study = json.loads((run / "study.json").read_text())
    study |= {"data": Path(study["data"]).name, "steps": {step["step"]: step["seconds"] for step in steps}}
    (out / "study.json").write_text(json.dumps(study, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder of a finished study")
    run = parser.parse_args().run
    collect(run, RESULTS / run.name)
    print(RESULTS / run.name)
