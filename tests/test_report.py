"""The report: the executed notebooks as one file, complete, in order, and without requests."""

import base64
import re
import shutil
from html.parser import HTMLParser

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from leukemia_nb.study.cards import render
from leukemia_nb.study.report import build_report, report_notebook
from leukemia_nb.testing import dummy_run

PIXEL = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
VOID = {"meta", "img", "br", "hr", "input"}


class Checked(HTMLParser):
    """Fails on a tag that is not closed in order; collects ids, links and sources."""

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.links, self.images = [], [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        assert tag not in {"script", "link", "iframe"}
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if "href" in found else []
        self.images += [found] if tag == "img" else []

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def write_section(run, step, *cells):
    """An executed notebook of a run."""
    (run / "notebooks").mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=list(cells)), run / "notebooks" / f"{step}.ipynb")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = dummy_run(tmp_path_factory.mktemp("report") / "run")
    table = "<table class='dataframe'><tr><td>97.6 %</td></tr></table>"
    figure = new_output("display_data", {"image/png": PIXEL, "text/plain": "<Figure>"})
    write_section(
        folder,
        "compare",
        new_markdown_cell("# Compare\n\n> Side by side\n\n## Test accuracy\n\nSee [metrics](../04_evaluation/30_metrics.ipynb)."),
        new_markdown_cell("::: {.callout-note}\nsecret note of the published page\n:::", metadata={"tags": ["site"]}),
        new_code_cell("run = ''", metadata={"tags": ["parameters"]}, outputs=[new_output("stream", text="secret parameters")]),
        new_code_cell(
            "secret_code = 1", outputs=[new_output("stream", text="said"), new_output("execute_result", {"text/html": table})]
        ),
        new_code_cell('#| fig-alt: Accuracy of "each" <model>\nplot()', outputs=[figure]),
        new_code_cell(
            "1", metadata={"tags": ["remove-output"]}, outputs=[new_output("execute_result", {"text/plain": "hidden"})]
        ),
    )
    write_section(folder, "overview", new_markdown_cell("# The images\n\n## Flow"))
    write_section(folder, "train-yolo11", new_markdown_cell("# Not in the report"))
    return folder


@pytest.fixture(scope="module")
def page(run):
    return build_report(run).read_text(encoding="utf-8")


def test_one_file_that_needs_nothing_else(page):
    checked = Checked(page)
    assert [image["src"] for image in checked.images] == [f"data:image/png;base64,{PIXEL}"]
    assert checked.images[0]["alt"] == 'Accuracy of "each" <model>'
    assert not re.search(r"@import|url\(|https?://", page)
    assert {link.removeprefix("#") for link in checked.links} <= set(checked.ids)
    assert "color-scheme" in page and "@media print" in page and "prefers-color-scheme: dark" in page


def test_sections_stand_in_the_order_of_the_study(page, run):
    titles = [re.sub("<[^>]+>|¶", "", title) for title in re.findall("<h2[^>]*>(.*?)</h2>", page)]
    assert titles == ["The images", "Compare", "How to reproduce this study"]
    assert [title for title, _ in report_notebook(run).metadata["contents"]] == titles
    assert page.count("<h1") == 1 and "Not in the report" not in page


def test_code_streams_parameters_and_tagged_outputs_are_hidden(page):
    for text in ("secret", "said", "hidden", "ipynb"):
        assert text not in page, text
    assert "97.6 %" in page and "metrics" in page and "<h3" in page


def test_the_summary_has_the_figures_of_the_files(page):
    for part in (
        "7 models, trained on 132 images",
        "YOLOv8, YOLO11, YOLO12",
        "96.7–100.0; 111/111",
        "98.2 %",
        "For research only",
    ):
        assert part in " ".join(page.split()), part
    for part in ("train-yolo11", "3.11.7", "2.1 minutes"):
        assert part in page, part
    assert "diagnos" not in page.lower()


def test_what_is_missing_is_named(tmp_path):
    page = build_report(tmp_path).read_text(encoding="utf-8")
    Checked(page)
    assert "is written by the step" in page and "<img" not in page
    with pytest.raises(FileNotFoundError, match="no such run"):
        build_report(tmp_path / "none")


def test_the_same_files_give_the_same_page(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    one, two = (build_report(copy).read_bytes() for _ in range(2))
    assert one == two


def test_the_flow_of_images_is_counted(run):
    text = " ".join(re.sub("<[^>]+>", " ", render("flow.html.j2", run)).split())
    assert "260 files found ↓ 1 left out 259 images split" in text
    assert "train 132 Normal 31 Pre-B 56 Pro-B 45 val 16" in text and "test 111 Normal 25 Pre-B 47 Pro-B 39" in text
