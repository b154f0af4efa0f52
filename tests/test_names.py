"""Names of files, classes, models and runs are shown letter by letter: in figures, on pages, in cards and on the terminal."""

import html
import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from markdown_it import MarkdownIt

from leukemia_nb.models import interface as models
from leukemia_nb.study.cards import classes_of_run, dummy_measurements, model_card, reporting_blocks
from leukemia_nb.data.files import shown
from leukemia_nb.evaluation.metrics import (
    accuracy_figure,
    compare_models,
    confusion_figure,
    curves_figure,
    dummy_predictions,
    markdown_text,
    roc_figure,
    unseen_figure,
    unseen_html,
    unseen_table,
)
from leukemia_nb.plotting import plot_style
from leukemia_nb.data.images import write_image
from leukemia_nb.inference.predictor import dummy_model_file
from leukemia_nb.study.report import build_report, dummy_run, prose
from leukemia_nb.audit.robustness import robustness_figure
from leukemia_nb.audit.saliency import saliency_figure
from leukemia_nb.audit.baselines import baseline_table, baselines_figure, views_figure
from leukemia_nb.data.synthetic import smear
from leukemia_nb.evaluation.uncertainty import compare_pairs, difference_figure, precision_recall_figure, reliability_figure

NAMES = ["a$b_{c.jpg", "$\\frac{1}{$.png", "x^$y$_2$.png", "50 $ (1).png"]
CLASSES = ["a$b_{c", "$\\alphaa$", "p^$_"]  # matplotlib knows no alphaa


@pytest.fixture(params=["mobilenet_v2", "a$b_{c model"])
def predictions(request):
    """Two models, one of whose names may be mathematics, on classes whose names are."""
    return {name: dummy_predictions(0.9, (9, 9, 9), CLASSES, seed=i) for i, name in enumerate((request.param, "yolo11"))}


def drawn(figure, tmp_path):
    """Texts of a figure, once it has been drawn in both formats outside of the style, as the notebooks draw it."""
    for ending in ("png", "svg"):
        figure.savefig(tmp_path / f"figure.{ending}", bbox_inches="tight")
    import matplotlib.text

    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


@pytest.mark.parametrize("name", NAMES[:2])
def test_compare_draws_files_of_any_name(tmp_path, name):
    write_image(tmp_path / "in" / name.replace(".jpg", ".png"), smear("Pro-B", 1, 64, 64).image)
    dummy_model_file(tmp_path / "run" / "exported" / "made_up.onnx", size=64)
    done = subprocess.run(
        [sys.executable, "-m", "leukemia_nb", "compare", tmp_path / "in", "--study", tmp_path / "run", "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 5000
    assert pd.read_csv(tmp_path / "out" / "comparison.csv")["path"].str.contains(name[:5], regex=False).all()


def test_figures_of_predictions_take_any_class_and_title(predictions, tmp_path):
    comparison = compare_models(predictions)
    first = next(iter(predictions))
    for figure in (
        accuracy_figure(comparison),
        confusion_figure(predictions),
        roc_figure(predictions),
        precision_recall_figure(predictions),
        reliability_figure(predictions),
        difference_figure(compare_pairs(predictions)),
        baselines_figure(baseline_table({"colour": predictions["yolo11"], **predictions})),
        curves_figure(
            {first: pd.DataFrame({"epoch": [1, 2], "accuracy": 0.5, "loss": 1.0, "val_accuracy": 0.5, "val_loss": 1.0})}
        ),
    ):
        text = drawn(figure, tmp_path)
        assert "$" not in first or first in text
    table = pd.DataFrame(
        [dict(model=first, change="hue", level=level, accuracy=0.5, low=0.4, high=0.6, chance=0.4) for level in (0, 5)]
    )
    drawn(robustness_figure(table), tmp_path)


def test_figures_of_images_take_any_file_and_class(predictions, tmp_path):
    for name in NAMES:
        write_image(tmp_path / "new" / name.replace(".jpg", ".png"), np.full((48, 64, 3), 180, np.uint8))
    unseen = {
        model: table.head(4).assign(
            subset="unseen",
            pair=[name.replace(".jpg", ".png") for name in NAMES],
            path=[name.replace(".jpg", ".png") for name in NAMES],
        )
        for model, table in predictions.items()
    }
    text = drawn(unseen_figure(unseen_table(unseen), tmp_path / "new"), tmp_path)
    assert all(name.replace(".jpg", ".png") in text for name in NAMES) and CLASSES[0] in text
    image = smear("Pro-B", 1, 64, 64).image
    assert CLASSES[0] in drawn(views_figure([image], CLASSES[:1]), tmp_path)
    masks = np.zeros((1, 64, 64), bool)
    assert CLASSES[0] in drawn(
        saliency_figure(image[None], {next(iter(predictions)): np.ones((1, 64, 64))}, masks, CLASSES[:1]), tmp_path
    )


def test_the_style_reads_no_text_as_mathematics():
    import matplotlib as mpl

    with plot_style():
        assert mpl.rcParams["text.parse_math"] is False


MARKS = [
    "a|b",
    "`x`",
    "[a](http://b)",
    "*a* **b**",
    "<script>alert(1)</script>",
    "a_b _c_",
    "$x$",
    "~~a~~",
    "a\\|b",
    "&amp;",
    "a\r\nb",
    "# a",
    "a\u2028b",
]


@pytest.mark.parametrize("name", MARKS)
def test_names_in_markdown_are_read_as_they_are(name):
    """Once as a text, once as a cell of a table, by another parser of Markdown; line ends are escaped, as on a terminal."""
    plain = html.escape(shown(name))
    assert prose(f"It is {markdown_text(name)}.").strip() == f"<p>It is {plain}.</p>"
    page = MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(
        f"| a | b |\n| --- | --- |\n| {markdown_text(name)} | 2 |\n"
    )
    assert f"<td>{plain}</td>" in page and page.count("<td") == 2


@pytest.mark.parametrize("name", MARKS)
def test_names_on_pages_are_escaped(name):
    table = pd.DataFrame({"image": [name], "path": [name], "true label": [name], "M": ["b"], "M confidence": [0.5]})
    page = unseen_html(table)
    assert "<script" not in page and html.escape(name) in page


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("names") / "made-up"
    dummy_run(folder)
    dummy_measurements(folder)
    return folder


def test_a_run_and_a_model_of_any_name_give_a_whole_report_and_card(made, tmp_path, monkeypatch):
    title = "Mine | `x` *y* <script>alert(1)</script> $z$"
    monkeypatch.setitem(models.MODELS, "yolo11", models.ModelEntry(title, "leukemia_nb.models.yolo", "Yolo", "torch"))
    run = shutil.copytree(made, tmp_path / "a*b*_c_[d](e) <script>`$", ignore=shutil.ignore_patterns("pairs"))
    for name in ("grouped_accuracy", "models", "follow", "robustness"):
        file = run / "metrics" / f"{name}.csv"
        table = pd.read_csv(file, keep_default_na=False)
        table.loc[table["model"] == "yolo11", "title"] = title
        table.to_csv(file, index=False)
    card = model_card(run, "yolo11")
    body = MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(card.split("---", 2)[2])
    assert "<script" not in body and "a*b*_c_[d](e)" in body and html.escape(title) in body
    (run / "sections").mkdir(exist_ok=True)
    (run / "sections" / "70.json").write_text(
        json.dumps({"title": "Reporting", "blocks": reporting_blocks(run, list(models.MODELS)[:2])})
    )
    page = build_report(run).read_text(encoding="utf-8")
    assert "<script" not in page and html.escape(title) in page
    assert len(classes_of_run(run)) == 3
