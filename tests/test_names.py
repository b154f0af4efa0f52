"""Names of files, classes, models and runs are shown letter by letter: in figures, on pages, in cards and on the terminal."""

import html
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from markdown_it import MarkdownIt

from leukemia_nb.audit.baselines import baseline_table
from leukemia_nb.audit.robustness import robustness_figure
from leukemia_nb.audit.saliency import saliency_figure
from leukemia_nb.data.files import escape_text
from leukemia_nb.data.images import write_image
from leukemia_nb.data.synthetic import make_smear
from leukemia_nb.evaluation.calibration import reliability_figure
from leukemia_nb.evaluation.metrics import (
    accuracy_figure,
    compare_models,
    confusion_figure,
    curves_figure,
    precision_recall_figure,
    roc_figure,
)
from leukemia_nb.evaluation.predictions import new_images_figure, new_images_table
from leukemia_nb.evaluation.uncertainty import compare_model_pairs, difference_figure
from leukemia_nb.models import interface as models
from leukemia_nb.plotting import plot_style
from leukemia_nb.study.cards import markdown_text, _model_card, render
from leukemia_nb.study.report import build_report
from leukemia_nb.testing import dummy_model_file, dummy_predictions, dummy_run

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
    write_image(tmp_path / "in" / name.replace(".jpg", ".png"), make_smear("Pro-B", 1, 64, 64).image)
    dummy_model_file(tmp_path / "run" / "exported" / "dummy.onnx", size=64)
    done = subprocess.run(
        [sys.executable, "-m", "leukemia_nb", "compare", tmp_path / "in", "--run", tmp_path / "run", "--out", tmp_path / "out"],
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
        difference_figure(compare_model_pairs(predictions)),
        accuracy_figure(baseline_table({"colour": predictions["yolo11"], **predictions})),
        curves_figure(
            {first: pd.DataFrame({"epoch": [1, 2], "accuracy": 0.5, "loss": 1.0, "val_accuracy": 0.5, "val_loss": 1.0})}
        ),
    ):
        text = drawn(figure, tmp_path)
        assert "$" not in first or first in text
    table = pd.DataFrame(
        [
            dict(
                model=first,
                title=first,
                corruption="hue",
                severity=severity,
                clean=severity == 0,
                agreement=0.5,
                confidence=0.5,
                accuracy=0.5,
                low=0.4,
                high=0.6,
                chance=0.4,
            )
            for severity in (0, 5)
        ]
    )
    drawn(robustness_figure(table), tmp_path)


def test_figures_of_images_take_any_file_and_class(predictions, tmp_path):
    for name in NAMES:
        write_image(tmp_path / "new" / name.replace(".jpg", ".png"), np.full((48, 64, 3), 180, np.uint8))
    new_images = {
        model: table.head(4).assign(
            subset="new",
            pair=[name.replace(".jpg", ".png") for name in NAMES],
            path=[name.replace(".jpg", ".png") for name in NAMES],
        )
        for model, table in predictions.items()
    }
    text = drawn(new_images_figure(new_images_table(new_images), tmp_path / "new"), tmp_path)
    assert all(name.replace(".jpg", ".png") in text for name in NAMES) and CLASSES[0] in text
    image = make_smear("Pro-B", 1, 64, 64).image
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
    """Once as a text, once as a cell of a table; line ends are escaped, as on a terminal."""
    plain = html.escape(escape_text(name))
    markdown = MarkdownIt("gfm-like", {"html": True, "linkify": False})
    assert markdown.render(f"It is {markdown_text(name)}.").strip() == f"<p>It is {plain}.</p>"
    page = markdown.render(f"| a | b |\n| --- | --- |\n| {markdown_text(name)} | 2 |\n")
    assert f"<td>{plain}</td>" in page and page.count("<td") == 2


def test_a_run_and_a_model_of_any_name_give_a_whole_report_and_card(tmp_path, monkeypatch):
    title = "Mine | `x` *y* <script>alert(1)</script> $z$"
    monkeypatch.setitem(models.MODELS, "yolo11", replace(models.MODELS["yolo11"], title=title))
    run = dummy_run(tmp_path / "a*b*_c_[d](e) <script>`$")
    card = _model_card(run, "yolo11")
    body = MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(card.split("---", 2)[2])
    assert "<script" not in body and "a*b*_c_[d](e)" in body and html.escape(title) in body
    page = build_report(run).read_text(encoding="utf-8")
    assert "<script" not in page and html.escape(title) in page
    assert "<script" not in render("flow.html.j2", run)
