"""The page for one picture: its handlers without a browser, and the whole of it in a headless Chromium."""
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from leukemia_nb import app
from leukemia_nb.images import PictureError, write_picture
from leukemia_nb.predictor import made_up_model_file
from leukemia_nb.synthetic import smear

KINDS = ("picture", "pair", "cells")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with three exported models and one broken file."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "exported").mkdir()
    for kind in KINDS:
        made_up_model_file(folder / "exported" / f"{kind}.onnx", kind)
    (folder / "exported" / "torn.onnx").write_bytes(b"half a file")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What people drop in: a smear, a file that is none, a name that is markup."""
    folder = tmp_path_factory.mktemp("files")
    write_picture(folder / "smear.png", smear("Pro-B", seed=5).picture)
    write_picture(folder / "<b>ü & \".jpg", smear("Normal", seed=1, height=384, width=512).picture)
    (folder / "letter.png").write_bytes(b"Dear colleague, please find attached")
    return folder


def look(page, file):
    page.look(file.name, file.read_bytes())


def test_a_picture_is_shown_with_cells_answers_and_doubt(run, files):
    page = app.panel(run)
    look(page, files / "smear.png")
    cells = page.shown[1].max()
    assert cells > 3
    assert page.seen.value.count("<path") == cells and f"{cells} white cells found" in page.seen.value
    assert page.answers.value.count('class="app-line') == 1 + len(KINDS)
    widths = [float(w) for w in re.findall(r"width:([\d.]+)%", page.answers.value)]
    assert np.allclose(np.sum(np.reshape(widths, (len(KINDS), 3)), axis=1), 100, atol=0.2)
    assert page.answers.value.count("Confidence") + page.answers.value.count("Abstains") >= len(KINDS)
    assert page.button.layout.display == "" and page.looks.value == ""


def test_saliency_is_on_the_button_and_goes_with_its_picture(run, files):
    page = app.panel(run)
    look(page, files / "smear.png")
    page.button.click()
    assert page.looks.value.count("<figure>") == len(KINDS) and "on the cells, by chance" in page.looks.value
    assert page.button.layout.display == "none" and not page.button.disabled
    look(page, files / "<b>ü & \".jpg")
    assert page.looks.value == "" and page.button.layout.display == ""


def test_a_bad_file_takes_the_last_picture_away(run, files):
    page = app.panel(run)
    look(page, files / "smear.png")
    look(page, files / "letter.png")
    assert "letter.png: not a picture" in page.message.value
    assert page.seen.value == page.answers.value == page.looks.value == ""
    assert page.button.layout.display == "none" and page.shown is None
    look(page, files / "smear.png")
    assert page.message.value == "" and page.seen.value


def test_a_failure_of_the_software_is_said_on_the_page(run, files, monkeypatch):
    page = app.panel(run)
    monkeypatch.setattr(app, "find_cells", lambda picture: 1 / 0)
    look(page, files / "smear.png")
    assert "the software failed (ZeroDivisionError" in page.message.value and page.answers.value == ""


def test_a_model_that_cannot_be_opened_is_named_and_the_others_answer(run):
    page = app.panel(run)
    assert len(page.models) == len(KINDS) and "torn.onnx: not a model file" in page.head.value


def test_without_a_study_the_page_says_what_to_do_and_calls_its_models_made_up(tmp_path, monkeypatch):
    monkeypatch.setenv("LEUKEMIA_NB_RUN", str(tmp_path / "nowhere"))
    page = app.panel()
    assert "there is no such folder" in page.head.value and "make app RUN=runs/name" in page.head.value
    assert all("Made-up" in model.info["title"] for model in page.models)
    page.look_at_drawn("Pre-B")
    assert page.answers.value.count("Made-up") == 3 and "drawn smear 1 (Pre-B)" in page.seen.value


def test_without_any_model_cells_are_still_found(files):
    page = app.Panel([], "no models")
    look(page, files / "smear.png")
    assert "white cells found" in page.seen.value and "No models" in page.answers.value
    assert page.button.layout.display == "none"


def test_names_are_text_and_not_markup(run, files):
    page = app.panel(run)
    look(page, files / "<b>ü & \".jpg")
    assert "&lt;b&gt;ü &amp; &quot;.jpg" in page.seen.value and "<b>ü" not in page.still()
    page.look("<img src=x>", b"no picture")
    assert "<img src=x>" not in page.message.value and "&lt;img src=x&gt;" in page.message.value


def test_no_upload_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(PictureError, match=r"^\.\./a/b\.png: not a picture"):
        app.read_upload("../a/b.png", b"nothing")
    assert not list(tmp_path.iterdir())


def test_a_blank_field_has_no_cells_and_no_answer(run):
    page = app.panel(run)
    page.show("blank.png", np.full((300, 400, 3), 240, np.uint8))
    assert "No white cells found" in page.seen.value
    assert "No answer" in page.answers.value and "no cells found" in page.answers.value


def test_a_picture_from_elsewhere_gets_no_answer_and_its_outlines_are_doubted(run):
    page = app.panel(run)
    page.show("negative.png", 255 - smear("Pre-B", seed=3, height=384, width=512).picture)
    assert "No answer" in page.answers.value and "What is outlined may not be cells" in page.answers.value
    assert "app-chosen" not in page.answers.value


def test_the_app_needs_no_framework_and_no_widgets_to_be_imported():
    code = ("import sys, leukemia_nb.app\n"
            "print([n for n in ('tensorflow', 'torch', 'onnx', 'ipywidgets', 'voila', 'anywidget') if n in sys.modules])")
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "[]"


# The browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def wait_for(what, seconds=120):
    """Ask until the answer is true."""
    end = time.monotonic() + seconds
    while not (found := what()):
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds} s")
        time.sleep(0.1)
    return found


def stop(process):
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Browser:
    """A headless Chromium, spoken to in its own DevTools protocol."""

    def __init__(self, folder):
        websocket = pytest.importorskip("websocket", reason="websocket-client drives the browser")
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                     "--disable-background-networking", "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen([CHROMIUM, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        chosen = Path(folder) / "DevToolsActivePort"
        wait_for(chosen.is_file)
        port = chosen.read_text().splitlines()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            page = next(target for target in json.load(answer) if target["type"] == "page")
        self.socket = websocket.create_connection(page["webSocketDebuggerUrl"], suppress_origin=True, timeout=60)
        self.numbers, self.events = itertools.count(1), []
        for domain in ("Page", "DOM", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method, **parameters):
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def value(self, expression):
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def text(self, selector):
        return self.value(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")

    def count(self, selector):
        return self.value(f"document.querySelectorAll({json.dumps(selector)}).length")

    def choose(self, file):
        """Choose a file and wait until the page is done with it."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=".app-drop input")["nodeId"]
        self.send("DOM.setFileInputFiles", files=[str(file)], nodeId=node)
        wait_for(lambda: self.text(".app-drop").startswith("Drop a picture"))

    def width(self, width, height=900):
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def close(self):
        self.socket.close()
        stop(self.process)


@pytest.fixture(scope="module")
def server(run, tmp_path_factory):
    """The page as `make app` serves it, on a free port."""
    pytest.importorskip("voila", reason="Voilà serves the page")
    if CHROMIUM is None:
        pytest.skip("no Chromium here to look at the page with")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("voila") / "log.txt"
    code = f"from leukemia_nb.app import serve; serve({str(run)!r}, {port}, browser=False)"
    with open(log, "w") as target:
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=target, stderr=target,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        wait_for(lambda: process.poll() is not None or f":{port}" in log.read_text())
        assert process.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}/"
    finally:
        stop(process)


@pytest.fixture(scope="module")
def browser(server, tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp("chromium"))
    try:
        found.width(1280)
        found.send("Page.navigate", url=server)
        wait_for(lambda: found.count(".app-drop input"))
        yield found
    finally:
        found.close()


def test_in_a_browser_a_picture_shows_cells_bars_and_doubt(browser, files):
    assert "research only" in browser.text(".app header")
    browser.choose(files / "smear.png")
    wait_for(lambda: browser.count(".app-line") == 1 + len(KINDS))
    outlines = browser.count(".app-picture svg path")
    assert outlines > 3 and f"{outlines} white cells found" in browser.text(".app-picture figcaption")
    box = "document.querySelector('.app-picture {}').getBoundingClientRect()"
    assert browser.value(f"Math.abs({box.format('svg')}.width - {box.format('img')}.width)") < 1
    bars = browser.value("[...document.querySelectorAll('.app-line > span > i > i')].map(i => i.offsetWidth / i.parentNode.offsetWidth)")
    assert len(bars) == 3 * len(KINDS) and np.allclose(np.sum(np.reshape(bars, (-1, 3)), axis=1), 1, atol=0.06)
    doubts = browser.value("[...document.querySelectorAll('.app-line small')].map(e => e.innerText)")
    assert len(doubts) == len(KINDS) and all(re.search("Confidence|Abstains", doubt) for doubt in doubts)


def test_in_a_browser_the_outlines_can_be_taken_away(browser, files):
    browser.choose(files / "smear.png")
    wait_for(lambda: browser.count(".app-picture input"))
    visible = "getComputedStyle(document.querySelector('.app-picture svg')).visibility"
    assert browser.value(visible) == "visible"
    browser.value("document.querySelector('.app-picture input').click()")
    assert browser.value(visible) == "hidden"


def test_in_a_browser_the_button_shows_where_each_model_looks(browser, files):
    browser.choose(files / "smear.png")
    wait_for(lambda: browser.count(".app-line"))
    browser.value("document.querySelector('button.app-go').click()")
    wait_for(lambda: browser.count(".app-looks figure") == len(KINDS))
    assert "on the cells, by chance" in browser.text(".app-looks")


def test_in_a_browser_a_broken_file_is_said_to_be_one(browser, files):
    browser.choose(files / "smear.png")
    wait_for(lambda: browser.count(".app-picture"))
    browser.choose(files / "letter.png")
    wait_for(lambda: "letter.png: not a picture" in browser.text(".app-wrong"))
    wait_for(lambda: browser.count(".app-picture") == browser.count(".app-line") == 0)
    assert "Drop a picture" in browser.text(".app-drop")


def test_in_a_browser_a_picture_can_be_dropped_anywhere_and_a_huge_one_is_refused_there(browser):
    drop = """(bytes => {{ const files = new DataTransfer(); files.items.add(new File([bytes], "{name}"));
        document.querySelector(".app h1").dispatchEvent(new DragEvent("drop", {{dataTransfer: files, bubbles: true}})); }})({bytes})"""
    browser.value(drop.format(name="slide.tif", bytes=f"new Uint8Array({app.LIMIT}e6 + 1)"))
    wait_for(lambda: "slide.tif: 64 MB, over the limit" in browser.text(".app-wrong"))
    canvas = """new Promise(done => {{ const c = document.createElement("canvas"); c.width = c.height = 64; c.getContext("2d").fillRect(0, 0, 9, 9);
        c.toBlob(done) }}).then(blob => {})"""
    browser.value(canvas.format(drop.format(name="dropped.png", bytes="blob")))
    wait_for(lambda: "dropped.png, 64 × 64 pixels" in browser.text(".app-picture"))


def test_in_a_browser_a_large_file_arrives(browser, tmp_path):
    """Past tornado's usual 10 MB a message."""
    noise = np.random.default_rng(0).integers(0, 255, (2000, 2500, 3)).astype(np.uint8)
    write_picture(tmp_path / "large.png", noise)
    assert (tmp_path / "large.png").stat().st_size > 11e6
    browser.choose(tmp_path / "large.png")
    wait_for(lambda: "large.png, 2500 × 2000" in browser.text(".app-picture"))


@pytest.mark.parametrize("width", [360, 800, 1280])
def test_in_a_browser_nothing_is_wider_than_the_window(browser, files, width):
    browser.width(width)
    browser.choose(files / "smear.png")
    wait_for(lambda: browser.count(".app-line"))
    assert browser.value("document.documentElement.scrollWidth") <= width
    wide = f"[...document.querySelectorAll('.app *')].filter(e => e.getBoundingClientRect().right > {width}).map(e => e.outerHTML.slice(0, 80))"
    assert browser.value(wide) == []


def test_in_a_browser_nothing_leaves_the_machine(browser, server):
    """Every request that got as far as the network went to the server; the others were stopped by its policy."""
    asked = {e["params"]["requestId"]: e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"}
    failed = {e["params"]["requestId"]: e["params"].get("blockedReason") for e in browser.events if e["method"] == "Network.loadingFailed"}
    elsewhere = {number: url for number, url in asked.items() if not url.startswith((server, "data:", "blob:", "about:"))}
    assert len(asked) > 10
    assert all(failed.get(number) == "csp" for number in elsewhere), elsewhere
    sockets = [e["params"]["url"] for e in browser.events if e["method"] == "Network.webSocketCreated"]
    assert sockets and all(url.startswith(server.replace("http", "ws")) for url in sockets)
    thrown = [e["params"]["exceptionDetails"] for e in browser.events if e["method"] == "Runtime.exceptionThrown"]
    assert not thrown
