"""The report: one file, complete, escaped, and honest about what is missing."""

import base64
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from leukemia_nb.data.files import write_table
from leukemia_nb.data.images import write_image
from leukemia_nb.evaluation.metrics import dummy_predictions, write_predictions
from leukemia_nb.study.report import (
    Section,
    build_report,
    facts_html,
    figure_html,
    dummy_run,
    prose,
    render_report,
    report_sections,
    split_section,
    summary_html,
    table_html,
    tiles_html,
    write_section,
)

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Checked(HTMLParser):
    "Fails on a tag that is not closed in order; collects ids, links and sources."

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.links, self.sources = [], [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in found:
            self.ids.append(found["id"])
        if "href" in found:
            self.links.append(found["href"])
        if "src" in found:
            self.sources.append(found["src"])
        if tag == "img":
            assert found.get("alt")
        assert tag not in {"script", "link", "iframe"}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    dummy_run(folder)
    return folder


@pytest.fixture(scope="module")
def text(run):
    return build_report(run).read_text(encoding="utf-8")


def test_one_file_that_needs_nothing_else(text):
    page = Checked(text)
    assert page.sources and all(source.startswith("data:image/") for source in page.sources)
    assert page.links == [f"#{name}" for name in page.ids] and len(set(page.ids)) == len(page.ids)
    assert not re.search(r"@import|url\(|https?://", re.sub(r"base64,[\w+/=]+", "", text))
    for source in page.sources:
        data = base64.b64decode(source.split(",")[1])
        assert data.startswith(b"\x89PNG") or ET.fromstring(data).tag.endswith("svg")


def test_numbers_are_those_of_the_files(text):
    for part in (
        "39/111",
        "107/111",
        "35.1 %",
        "96.7–100.0 %",
        "EfficientNet-B0 has collapsed",
        "cannot be told apart",
        "Snap_059.png: the file ends too early",
        "6 of 259 masks",
        "For research only",
        "train-yolo11",
        "random initialisation",
    ):
        assert part in text, part
    assert "diagnos" not in text.lower()


def test_sections_whose_files_are_absent_are_left_out(text, tmp_path):
    assert re.findall("<h2>(.*)</h2>", text) == [
        "The images",
        "The split",
        "Processing",
        "Training",
        "Test accuracy",
        "By class",
        "Calibration",
        "Single images",
        "How to reproduce this",
    ]
    assert report_sections(tmp_path) == [] and "No model has been trained" in summary_html(tmp_path)
    write_table(
        tmp_path / "split.csv",
        pd.DataFrame({"pair": ["a", "b"], "class": ["Normal", "Pro-B"], "subset": ["train", "test"], "sha256": "x"}),
    )
    assert [section.title for section in report_sections(tmp_path)] == ["The split"]
    Checked(build_report(tmp_path).read_text(encoding="utf-8"))
    with pytest.raises(FileNotFoundError, match="no such run"):
        build_report(tmp_path / "none")


def test_sections_of_other_steps_come_before_the_reproduction(tmp_path):
    (tmp_path / "study.json").write_text(json.dumps({"seed": 3}))
    write_table(tmp_path / "metrics" / "controls.csv", pd.DataFrame({"seen": ["background"], "accuracy": [0.96]}))
    write_image(tmp_path / "figures" / "x.png", np.zeros((4, 4, 3), np.uint8))
    write_section(tmp_path, "60_later", "Later", [{"prose": "Later."}])
    write_section(
        tmp_path,
        "50_worth",
        "What is this accuracy worth?",
        [
            {"prose": "Less <b>than</b> it **seems**."},
            {"facts": {"images": 200}},
            {"table": "metrics/controls.csv", "caption": "Controls"},
            {"figure": "figures/x.png", "alt": "black"},
            {"figure": "figures/none.png"},
        ],
    )
    sections = report_sections(tmp_path)
    assert [s.title for s in sections][-3:] == ["What is this accuracy worth?", "Later", "How to reproduce this"]
    body = sections[-3].body
    assert "&lt;b&gt;" in body and "<strong>seems</strong>" in body and "0.960" in body and "none.png has not been made" in body
    Checked(build_report(tmp_path).read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match="x: a block is prose, table, figure or facts, not image"):
        write_section(tmp_path, "x", "X", [{"image": ""}])


def test_everything_is_escaped(tmp_path):
    bad = "<script>alert('x')</script>"
    blocks = [
        prose(bad),
        table_html(pd.DataFrame({bad: [bad]}), bad),
        facts_html({bad: bad}, bad),
        tiles_html([(bad, bad)]),
        figure_html(Figure(), bad, bad),
    ]
    page = render_report(bad, [Section(bad, "".join(blocks))], tmp_path / "r.html", kicker=bad, footer=bad).read_text(
        encoding="utf-8"
    )
    Checked(page)
    assert "<script" not in page


def test_tables():
    table = table_html(
        pd.DataFrame({"n": [1234, 5], "share": [0.12345, np.nan], "name": ["a", None], "flag": [True, False]}), digits=2
    )
    for text in ("1,234", "0.12", "<td class='number'>–</td>", ">True<"):
        assert text in table, text
    assert "2 more rows" in table_html(pd.DataFrame({"a": range(5)}), most=3)


def test_figures_by_file(tmp_path):
    write_image(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
    assert "data:image/png;base64," in figure_html(tmp_path / "a.png", "black", width=200)
    with pytest.raises(ValueError, match="only PNG, JPEG and SVG"):
        figure_html(tmp_path / "a.pdf", "x")
    figure = Figure()
    figure.subplots().imshow(np.zeros((3, 3)))
    assert "data:image/png" in figure_html(figure, "photograph")


def test_one_model_and_a_test_set_without_every_class(tmp_path):
    write_predictions(dummy_predictions(0.9, (0, 9, 11)), tmp_path / "predictions" / "yolo11.csv")
    page = build_report(tmp_path).read_text(encoding="utf-8")
    Checked(page)
    assert "One model was put to 20 test images" in page and "No ROC curves: no image of Normal" in page
    one, two = (build_report(tmp_path, tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert one == two  # the same files, the same page


@pytest.mark.parametrize(
    "partners, said",
    [((5, 40), "5 of 16 validation images and 40 of 111 test images show"), ((0, 0), "No image has a related one")],
)
def test_leakage_is_told(tmp_path, partners, said):
    write_table(tmp_path / "split.csv", pd.DataFrame({"pair": ["a"], "class": ["Normal"], "subset": ["train"], "sha256": "x"}))
    write_table(
        tmp_path / "leakage.csv", pd.DataFrame({"subset": ["validation", "test"], "images": [16, 111], "with_partner": partners})
    )
    assert said in split_section(tmp_path)
