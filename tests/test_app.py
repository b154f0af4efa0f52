"""The page for images: its handlers without a browser, its server, and the whole of it in a headless Chromium."""

import base64
import itertools
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from http.cookiejar import CookieJar
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import ROOT

from leukemia_nb.data.images import ImageError, write_image
from leukemia_nb.data.synthetic import make_smear
from leukemia_nb.inference import app
from leukemia_nb.inference.batch import exported_models
from leukemia_nb.inference.predictor import find_image_cells
from leukemia_nb.testing import dummy_model_file

KINDS = ("image", "pair", "cells")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with three exported models and one broken file."""
    folder = tmp_path_factory.mktemp("run")
    for kind in KINDS:
        dummy_model_file(folder / "exported" / f"{kind}.onnx", kind)
    (folder / "exported" / "torn.onnx").write_bytes(b"half a file")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What people drop in: a smear, a file that is none, a name that is markup."""
    folder = tmp_path_factory.mktemp("files")
    write_image(folder / "smear.png", make_smear("Pro-B", seed=5, height=384, width=512).image)
    write_image(folder / '<b>ü & ".jpg', make_smear("Normal", seed=1, height=192, width=256).image)
    (folder / "letter.png").write_bytes(b"Dear colleague, please find attached")
    return folder


@pytest.fixture(scope="module")
def page(run):
    return app.app(run)


def receive(page, file):
    page.receive(file.name, file.read_bytes())


def test_a_cell_that_vanishes_in_a_narrow_image_does_not_end_the_page():
    cells = np.zeros((16, 40), np.int32)
    cells[2:6, 3:9], cells[8:12, 20:30] = 1, 3  # number 2 is gone where the labels are scaled down
    assert "2 white blood cells found" in app._image_html("narrow.png", np.zeros((16, 40, 3), np.uint8), cells)


def test_an_image_is_shown_with_cells_and_predictions(page, files):
    receive(page, files / "smear.png")
    image, cells = page.shown
    assert cells.max() > 3 and (cells == find_image_cells(image)).all() and cells.shape == image.shape[:2]
    assert {model.report(image).rows[0]["n_cells"] for model in page.models} == {int(cells.max())}  # one count
    assert page.image.value.count("<path") == cells.max() and f"{cells.max()} white blood cells found" in page.image.value
    assert page.predictions.value.count('class="app-line') == 1 + len(KINDS)
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", page.predictions.value)]
    assert np.allclose(np.sum(np.reshape(widths, (len(KINDS), 3)), axis=1), 100, atol=0.2)
    assert page.predictions.value.count("Confidence ") + page.predictions.value.count("Abstains") == len(KINDS)
    assert page.about.value.count("not calibrated") == len(KINDS) and page.about.value.count("never tested") == len(KINDS)
    assert page.button.layout.display == "" and page.saliency.value == ""


def test_saliency_is_on_the_button_and_goes_with_its_image(page, files):
    receive(page, files / "smear.png")
    page.button.click()
    assert page.saliency.value.count("<figure>") == len(KINDS) and "on the cells," in page.saliency.value
    assert page.button.layout.display == "none"
    receive(page, files / '<b>ü & ".jpg')
    assert page.saliency.value == "" and page.button.layout.display == ""


def test_a_bad_file_removes_the_last_image(page, files):
    receive(page, files / "smear.png")
    receive(page, files / "letter.png")
    assert "letter.png: not an image" in page.message.value and 'class="app-note app-error"' in page.message.value
    assert page.image.value == page.predictions.value == page.saliency.value == ""
    assert page.button.layout.display == "none" and page.shown is None
    receive(page, files / "smear.png")
    assert page.message.value == "" and page.image.value


def test_a_failure_of_the_software_is_reported_on_the_page(page, files, monkeypatch):
    monkeypatch.setattr(app, "find_image_cells", lambda image, size: 1 / 0)
    receive(page, files / "smear.png")
    assert "the software failed (ZeroDivisionError" in page.message.value and page.predictions.value == ""


def test_a_model_that_cannot_be_opened_is_named_and_the_others_predict(page):
    assert len(page.models) == len(KINDS) and "torn.onnx: not a model file" in page.head.value


def test_without_a_study_cells_are_found_and_the_page_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("LEUKEMIA_NB_RUN", str(tmp_path / "nowhere"))
    page = app.app()
    assert "there is no such folder" in page.head.value and "make app RUN=runs/name" in page.head.value and not page.models
    page.examples[1].click()
    assert "synthetic smear 1 (Pre-B)" in page.image.value and "white blood cells found" in page.image.value
    assert "No models" in page.predictions.value and page.button.layout.display == "none"


def test_names_are_text_without_markup_and_control_characters(page, files):
    receive(page, files / '<b>ü & ".jpg')
    assert "&lt;b&gt;ü &amp; &#34;.jpg" in page.image.value and "<b>ü" not in page.image.value
    page.receive("<img src=x>", b"no image")
    assert "<img src=x>" not in page.message.value and "&lt;img src=x&gt;" in page.message.value
    page.receive("a\x1b[31m\nb\u202e.png", (files / "smear.png").read_bytes())
    assert "a\\x1b[31m\\nb\\u202e.png" in page.image.value and not re.search("[\x1b\u202e]", page.image.value)
    page.receive("a\x1b[31m.png", b"no image")
    assert "a\\x1b[31m.png: not" in page.message.value and "\x1b" not in page.message.value


def test_an_upload_is_held_to_the_limits_of_a_file(page):
    """Size in bytes, size in pixels, formats: a page that is not ours sends what it likes."""
    page.receive("huge.png", bytes(65_000_000))
    assert "huge.png: 65 MB, over the limit of 64 MB" in page.message.value
    page.receive("slide.tif", None, 80)
    assert "slide.tif: 80 MB, over the limit of 64 MB" in page.message.value
    page.receive("vast.png", png_header(1_000_000, 1_000_000))
    assert page.message.value.count("vast.png") == 1 and "pixels" in page.message.value
    page.receive("drawing.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(x) run\n")
    assert "drawing.png: not" in page.message.value and page.image.value == ""


def png_header(width, height):
    """A PNG that says it is very large."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_no_upload_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ImageError, match=r"^\.\./a/b\.png: not an image"):
        app._read_upload("../a/b.png", b"nothing")
    assert not list(tmp_path.iterdir())


def test_models_abstain_from_blank_and_foreign_images(page):
    page.show("blank.png", np.full((300, 400, 3), 240, np.uint8))
    assert "No white blood cells found" in page.image.value and "no cells found" in page.predictions.value
    assert "No prediction" in page.predictions.value
    page.show("negative.png", 255 - make_smear("Pre-B", seed=3, height=384, width=512).image)
    assert "No prediction" in page.predictions.value and "What is outlined may not be cells" in page.predictions.value
    assert "app-chosen" not in page.predictions.value


def row(prediction, reasons=""):
    return {"predicted": prediction, "abstains": bool(reasons), "abstain_reasons": reasons}


@pytest.mark.parametrize(
    ("rows", "headline"),
    [
        ([], ("No models", "The cells are found without them.")),
        ([row("A")], ("The model predicts A", "None abstains.")),
        ([row("A"), row("A")], ("All 2 models predict A", "None abstains.")),
        ([row("A"), row("A"), row("B", "low confidence")], ("2 of 3 models predict A", "1 abstains (low confidence).")),
        ([row("A"), row("B")], ("The models disagree", "2 models: 1 predicts A, 1 predicts B.")),
        ([row("A"), row("A", "x"), row("B", "x")], ("Most models abstain", "3 models: 1 predicts A, 2 abstain (x).")),
        ([row("A", "x")], ("No prediction", "1 model: 1 abstains (x).")),
    ],
)
def test_headlines(rows, headline):
    assert app._headline(rows) == headline


def download(html):
    """The file behind a download link."""
    return base64.b64decode(re.search(r'href="data:text/csv;base64,([^"]*)"', html)[1])


def command(*arguments, cwd=None):
    """Predictions of `leukemia_nb predict` as the bytes of its table."""
    with tempfile.TemporaryDirectory() as folder:
        program = [sys.executable, "-m", "leukemia_nb", "predict", *map(str, arguments), "--out", f"{folder}/a.csv"]
        subprocess.run(program, cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
        return Path(folder, "a.csv").read_bytes()


def test_a_folder_has_the_commands_table_and_filters(page, run, files):
    page.gallery.folder.value = str(files)
    page.gallery.button.click()
    assert page.gallery.csv == command(files, "--model", page.models[0].file) == download(page.gallery.shown.value)
    assert "3 images found" in page.gallery.shown.value and page.gallery.shown.value.count("<figure") == 3
    assert page.gallery.shown.value.count("<img") == 2 and "not an image" in page.gallery.shown.value
    by_outcome = {}
    for outcome in ("predicted", "abstained", "not read", "all"):
        page.gallery.outcome.value = outcome
        by_outcome[outcome] = page.gallery.shown.value.count("<figure")
    assert by_outcome["not read"] == 1 and sum(by_outcome.values()) == 6 and by_outcome["all"] == 3
    page.gallery.predicted.value = "Pro-B"
    assert page.gallery.shown.value.count("<figure") == sum(row["predicted"] == "Pro-B" for row in page.gallery.rows)
    assert page.gallery.predicted.options == ("all", *page.models[0].info["classes"])
    page.gallery.predicted.value, page.gallery.order.value = "all", "least confident first"
    confidences = [float(found) for found in re.findall(r"Confidence ([\d.]+)%", page.gallery.shown.value)]
    assert confidences == sorted(confidences)
    page.gallery.order.value = "by name"


def test_several_uploads_have_the_commands_table_and_are_not_kept(page, files, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names = sorted(file.name for file in files.iterdir())
    page.show("one.png", make_smear("Pre-B", seed=3, height=96, width=128).image)
    page.receive_files([(name, (files / name).read_bytes(), 0.0) for name in names] + [("slide.tif", None, 80.0)])
    assert page.image.value == "" and "over the limit of 64 MB: slide.tif" in page.message.value
    assert page.gallery.csv == command(*names, "--model", page.models[0].file, cwd=files)
    assert "&lt;b&gt;ü &amp; &#34;.jpg" in page.gallery.shown.value and "<b>ü" not in page.gallery.shown.value
    assert not list(tmp_path.iterdir())
    page.receive_files([("smear.png", (files / "smear.png").read_bytes(), 0.0)])
    assert page.gallery.rows == [] and page.gallery.shown.value == page.message.value == "" and page.image.value


def test_uploads_of_one_name_and_names_with_folders_stay_apart(page, files):
    content = (files / "smear.png").read_bytes()
    page.receive_files([("../smear.png", content, 0.0), ("b\\smear.png", content, 0.0), ("/etc/x", b"nothing", 0.0)])
    assert [row["path"] for row in page.gallery.rows] == ["smear.png", "smear-2.png", "x"]
    assert page.gallery.rows[0]["sha256"] == page.gallery.rows[1]["sha256"] and "nothing" not in page.gallery.rows[2]["predicted"]


def test_a_folder_that_cannot_be_predicted_is_named(page, run, tmp_path, monkeypatch):
    for folder, message in (("/no/such", "/no/such: there is no such folder"), ("  ", "no name: there is no such folder")):
        page.gallery.predict_folder(folder)
        assert message in page.gallery.message.value and page.gallery.shown.value == ""
    page.gallery.predict_folder(str(tmp_path))
    assert "not predicted" in page.gallery.shown.value.lower() or page.gallery.message.value
    monkeypatch.setattr("leukemia_nb.inference.gallery.predict_files", lambda *_, **__: 1 / 0)
    page.gallery.predict_folder(str(tmp_path))
    assert "the software failed (ZeroDivisionError" in page.gallery.message.value and page.gallery.rows == []


def test_the_app_needs_no_framework_and_no_widgets_to_be_imported():
    code = (
        "import sys, leukemia_nb.inference.app\n"
        "print([n for n in ('tensorflow', 'torch', 'onnx', 'sklearn', 'ipywidgets', 'voila', 'anywidget') if n in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "[]"


# The server


class Server:
    """The page as `make app` serves it, on a free port."""

    def __init__(self, run, log, browser=False, **environment):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        code = f"from leukemia_nb.inference import app; app.serve({str(run)!r}, {port}, browser={browser})"
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
        with open(log, "w") as target:
            self.process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=target, stderr=target, env=variables)
        wait_for(lambda: self.process.poll() is not None or "token=" in log.read_text())
        assert self.process.poll() is None, log.read_text()
        self.address = re.search(r"http://127\.0\.0\.1:\d+/\?token=\S+", log.read_text())[0]
        self.place, self.token = self.address.split("?token=")
        self.cookies = CookieJar()

    def get(self, path="", cookies=None, **headers):
        """Status and text of the answer to a request."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar() if cookies is None else cookies))
        try:
            with opener.open(urllib.request.Request(self.place + path, headers=names), timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def kernels(self):
        return [child for child in psutil.Process(self.process.pid).children() if "ipykernel_launcher" in child.cmdline()]


@pytest.fixture(scope="module")
def server(run, tmp_path_factory):
    """Another Python's kernel comes first on JUPYTER_PATH, the home folder cannot be written to, a token is guessed."""
    pytest.importorskip("voila", reason="Voilà serves the page")
    folder = tmp_path_factory.mktemp("voila")
    specification = folder / "share" / "kernels" / "python3"
    specification.mkdir(parents=True)
    (specification / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"}))
    settings = {"JUPYTER_TOKEN": "guess", "JUPYTER_PATH": str(folder / "share"), "HOME": "/proc/nowhere"}
    server = Server(run, folder / "log.txt", **settings)
    try:
        yield server
    finally:
        stop(server.process)


KERNEL = "00000000-0000-0000-0000-000000000000"


@pytest.mark.parametrize("path", ["", "?token=guess", "?token=", "index.html", f"api/kernels/{KERNEL}"])
def test_without_the_token_no_page_is_served_and_no_kernel_starts(server, path):
    """Voilà shows its login page instead."""
    for headers in ({}, {"Authorization": "token guess"}, {"Cookie": "username-127-0-0-1=x"}):
        status, text = server.get(path, **headers)
        assert (status in (403, 404) or "login" in text) and "widget-view" not in text and server.token not in text
    assert not server.kernels()


@pytest.mark.parametrize("host", ["evil.example", "192.168.1.7", "localhost.evil.example", "[::2]"])
def test_another_hosts_name_is_refused_even_with_the_token(server, host):
    """DNS rebinding: a site lets its own name point here."""
    assert server.get(f"?token={server.token}", Host=host)[0] == 403 and not server.kernels()


def test_the_token_is_long_and_only_this_computer_can_connect(server):
    assert len(server.token) >= 32 and server.token != "guess"
    assert all(server.token not in " ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
    listening = [c.laddr.ip for c in psutil.Process(server.process.pid).net_connections() if c.status == "LISTEN"]
    assert set(listening) == {"127.0.0.1"}


def test_with_the_token_the_page_comes_and_its_kernel_is_reached_with_the_cookie_alone(server):
    websocket = pytest.importorskip("websocket", reason="websocket-client looks at a page")
    status, text = server.get(f"?token={server.token}", server.cookies)
    assert status == 200 and "application/vnd.jupyter.widget-view" in text
    for path in re.findall(r'(?:src|href)="(/[^"]+)"', text):
        assert server.get(path.removeprefix("/"), server.cookies)[0] == 200, path
    (kernel,) = server.kernels()
    assert kernel.cmdline()[0] == sys.executable  # this Python, whatever kernels are installed
    name = re.search(r"kernel-([0-9a-f-]{36})\.json", kernel.cmdline()[-1])[1]
    channels = f"{server.place.replace('http', 'ws')}api/kernels/{name}/channels"
    cookie = "; ".join(f"{each.name}={each.value}" for each in server.cookies)
    for refused in ({}, {"cookie": cookie, "origin": "http://evil.example"}):
        with pytest.raises(websocket.WebSocketBadStatusException, match="403"):
            websocket.create_connection(channels, timeout=60, **refused)
    websocket.create_connection(channels, timeout=60, cookie=cookie).close()


def test_the_policy_names_no_other_address():
    assert all(word not in app._POLICY for word in ("http:", "https:", "*"))


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
        arguments = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--remote-debugging-port=0",
            f"--user-data-dir={folder}",
            "about:blank",
        ]
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

    def choose(self, *files):
        """Choose files and wait until the page is done with them."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=".app-drop input")["nodeId"]
        self.send("DOM.setFileInputFiles", files=list(map(str, files)), nodeId=node)
        wait_for(lambda: self.text(".app-drop").startswith("Drop images"))

    def width(self, width, height=900):
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def close(self):
        self.socket.close()
        stop(self.process)


@pytest.fixture(scope="module")
def browser(server, tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium here to look at the page with")
    found = Browser(tmp_path_factory.mktemp("chromium"))
    try:
        found.width(1280)
        found.send("Page.navigate", url=server.address)
        wait_for(lambda: found.count(".app-drop input"))
        yield found
    finally:
        found.close()


def test_in_a_browser_an_image_shows_cells_bars_and_confidence(browser, files):
    assert "research only" in browser.text(".app header")
    browser.choose(files / "smear.png")
    wait_for(lambda: browser.count(".app-line") == 1 + len(KINDS))
    outlines = browser.count(".app-image svg path")
    assert outlines > 3 and f"{outlines} white blood cells found" in browser.text(".app-image figcaption")
    box = "document.querySelector('.app-image {}').getBoundingClientRect()"
    assert browser.value(f"Math.abs({box.format('svg')}.width - {box.format('img')}.width)") < 1
    bars = browser.value(
        "[...document.querySelectorAll('.app-line > span > i > i')].map(i => i.offsetWidth / i.parentNode.offsetWidth)"
    )
    assert len(bars) == 3 * len(KINDS) and np.allclose(np.sum(np.reshape(bars, (-1, 3)), axis=1), 1, atol=0.06)
    texts = browser.value("[...document.querySelectorAll('.app-line small')].map(e => e.innerText)")
    assert len(texts) == len(KINDS) and all(re.search("Confidence|Abstains", text) for text in texts)


def test_in_a_browser_the_outlines_can_be_hidden(browser, files):
    browser.choose(files / "smear.png")
    wait_for(lambda: browser.count(".app-image input"))
    visible = "getComputedStyle(document.querySelector('.app-image svg')).visibility"
    assert browser.value(visible) == "visible"
    browser.value("document.querySelector('.app-image input').click()")
    assert browser.value(visible) == "hidden"


def test_in_a_browser_the_button_adds_saliency_maps(browser, files):
    browser.choose(files / "smear.png")
    wait_for(lambda: browser.count(".app-line"))
    browser.value("document.querySelector('button.app-go').click()")
    wait_for(lambda: browser.count(".app-saliency figure") == len(KINDS))
    assert "on the cells," in browser.text(".app-saliency")


def test_in_a_browser_a_broken_file_is_named(browser, files):
    browser.choose(files / "smear.png")
    wait_for(lambda: browser.count(".app-image"))
    browser.choose(files / "letter.png")
    wait_for(lambda: "letter.png: not an image" in browser.text(".app-error"))
    wait_for(lambda: browser.count(".app-image") == browser.count(".app-line") == 0)
    assert "Drop images" in browser.text(".app-drop")


def test_in_a_browser_an_image_can_be_dropped_anywhere_and_a_huge_one_is_refused_there(browser):
    drop = """(bytes => {{ const files = new DataTransfer(); files.items.add(new File([bytes], "{name}"));
        document.querySelector(".app h1").dispatchEvent(new DragEvent("drop", {{dataTransfer: files, bubbles: true}})); }})({bytes})"""
    browser.value(drop.format(name="slide.tif", bytes=f"new Uint8Array({app._MAX_UPLOAD}e6 + 1)"))
    wait_for(lambda: "slide.tif: 64 MB, over the limit" in browser.text(".app-error"))
    canvas = """new Promise(done => {{ const c = document.createElement("canvas"); c.width = c.height = 64; c.getContext("2d").fillRect(0, 0, 9, 9);
        c.toBlob(done) }}).then(blob => {})"""
    browser.value(canvas.format(drop.format(name="dropped.png", bytes="blob")))
    wait_for(lambda: "dropped.png, 64 × 64 pixels" in browser.text(".app-image"))


def test_in_a_browser_a_large_file_arrives(browser, tmp_path):
    """Past tornado's usual 10 MB a message."""
    noise = np.random.default_rng(0).integers(0, 255, (2000, 2500, 3)).astype(np.uint8)
    write_image(tmp_path / "large.png", noise)
    assert (tmp_path / "large.png").stat().st_size > 11e6
    browser.choose(tmp_path / "large.png")
    wait_for(lambda: "large.png, 2500 × 2000" in browser.text(".app-image"))


def test_in_a_browser_several_images_make_a_gallery(browser, run, files):
    names = sorted(file.name for file in files.iterdir())
    browser.choose(*(files / name for name in names))
    wait_for(lambda: browser.count(".app-gallery figure") == len(names))
    assert browser.count(".app-image") == 0 and browser.count(".app-gallery img") == 2
    link = browser.value("document.querySelector('.app-csv').outerHTML")
    assert download(link) == command(*names, "--model", exported_models(run)[0], cwd=files)
    select = """(([...document.querySelectorAll(".app-folder select")].find(e => [...e.options].some(o => o.text.startsWith("not")))))"""
    browser.value(f"{select}.selectedIndex = 3; {select}.dispatchEvent(new Event('change', {{bubbles: true}}))")
    wait_for(lambda: browser.count(".app-gallery figure") == 1)
    assert "letter.png" in browser.text(".app-gallery") and browser.value("document.documentElement.scrollWidth") <= 1280


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
    asked = {
        e["params"]["requestId"]: e["params"]["request"]["url"]
        for e in browser.events
        if e["method"] == "Network.requestWillBeSent"
    }
    failed = {
        e["params"]["requestId"]: e["params"].get("blockedReason")
        for e in browser.events
        if e["method"] == "Network.loadingFailed"
    }
    elsewhere = {number: url for number, url in asked.items() if not url.startswith((server.place, "data:", "blob:", "about:"))}
    assert len(asked) > 10
    assert all(failed.get(number) == "csp" for number in elsewhere), elsewhere
    sockets = [e["params"]["url"] for e in browser.events if e["method"] == "Network.webSocketCreated"]
    assert sockets and all(url.startswith(server.place.replace("http", "ws")) for url in sockets)
    thrown = [e["params"]["exceptionDetails"] for e in browser.events if e["method"] == "Runtime.exceptionThrown"]
    assert not thrown
