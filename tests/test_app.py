"""The page for one image: its handlers without a browser, and the whole of it in a headless Chromium."""

import itertools
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import ROOT

from leukemia_nb.inference import app
from leukemia_nb.data.images import ImageError, write_image
from leukemia_nb.inference.predictor import dummy_model_file, seal
from leukemia_nb.data.synthetic import smear

KINDS = ("image", "pair", "cells")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with three exported models and one broken file."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "exported").mkdir()
    for kind in KINDS:
        dummy_model_file(folder / "exported" / f"{kind}.onnx", kind)
    (folder / "exported" / "torn.onnx").write_bytes(b"half a file")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What people drop in: a smear, a file that is none, a name that is markup."""
    folder = tmp_path_factory.mktemp("files")
    write_image(folder / "smear.png", smear("Pro-B", seed=5).image)
    write_image(folder / '<b>ü & ".jpg', smear("Normal", seed=1, height=384, width=512).image)
    (folder / "letter.png").write_bytes(b"Dear colleague, please find attached")
    return folder


def look(page, file):
    page.look(file.name, file.read_bytes())


def test_a_image_is_shown_with_cells_answers_and_doubt(run, files):
    page = app.panel(run)
    look(page, files / "smear.png")
    cells = page.shown[1].max()
    assert cells > 3
    assert page.seen.value.count("<path") == cells and f"{cells} white blood cells segmented" in page.seen.value
    assert page.answers.value.count('class="app-line') == 1 + len(KINDS)
    widths = [float(w) for w in re.findall(r"width:([\d.]+)%", page.answers.value)]
    assert np.allclose(np.sum(np.reshape(widths, (len(KINDS), 3)), axis=1), 100, atol=0.2)
    assert page.answers.value.count("Confidence ") + page.answers.value.count("Abstains") == len(KINDS)
    assert "doubt" not in page.answers.value and "alibrated" not in page.answers.value
    assert page.about.value.count("not calibrated") == len(KINDS)
    assert page.button.layout.display == "" and page.looks.value == ""


def test_saliency_is_on_the_button_and_goes_with_its_image(run, files):
    page = app.panel(run)
    look(page, files / "smear.png")
    page.button.click()
    assert page.looks.value.count("<figure>") == len(KINDS) and "on the cells, by chance" in page.looks.value
    assert page.button.layout.display == "none" and not page.button.disabled
    look(page, files / '<b>ü & ".jpg')
    assert page.looks.value == "" and page.button.layout.display == ""


def test_a_bad_file_takes_the_last_image_away(run, files):
    page = app.panel(run)
    look(page, files / "smear.png")
    look(page, files / "letter.png")
    assert "letter.png: not an image" in page.message.value
    assert page.seen.value == page.answers.value == page.looks.value == ""
    assert page.button.layout.display == "none" and page.shown is None
    look(page, files / "smear.png")
    assert page.message.value == "" and page.seen.value


def test_a_failure_of_the_software_is_said_on_the_page(run, files, monkeypatch):
    page = app.panel(run)
    monkeypatch.setattr(app, "find_cells", lambda image: 1 / 0)
    look(page, files / "smear.png")
    assert "the software failed (ZeroDivisionError" in page.message.value and page.answers.value == ""


def test_a_model_that_cannot_be_opened_is_named_and_the_others_answer(run):
    page = app.panel(run)
    assert len(page.models) == len(KINDS) and "torn.onnx: not a model file" in page.head.value


@pytest.mark.parametrize(
    "described", ["[]", "null", "{", '{"format": 2}', '{"format": 2, "title": ["\\u001b[31m"], "classes": 3}']
)
def test_a_sealed_file_with_a_malformed_description_is_one_line_and_the_others_answer(run, tmp_path, described):
    import onnx

    model = onnx.load(run / "exported" / "image.onnx")
    entries = {entry.key: entry.value for entry in model.metadata_props if entry.key != "sha256"} | {"leukemia_nb": described}
    model.ClearField("metadata_props")
    onnx.helper.set_model_props(model, entries)
    (tmp_path / "exported").mkdir()
    shutil.copy(run / "exported" / "cells.onnx", tmp_path / "exported")
    (tmp_path / "exported" / "odd\x1b.onnx").write_bytes(seal(model.SerializeToString()))
    page = app.panel(tmp_path)
    note = re.search(r'role="status">([^<]*)<', page.head.value)[1]
    assert len(page.models) == 1 and "odd\\x1b.onnx: " in note and "\n" not in note and "\x1b" not in note and len(note) < 500


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
    assert "white blood cells segmented" in page.seen.value and "No models" in page.answers.value
    assert page.button.layout.display == "none"


def test_names_are_text_and_not_markup(run, files):
    page = app.panel(run)
    look(page, files / '<b>ü & ".jpg')
    assert "&lt;b&gt;ü &amp; &quot;.jpg" in page.seen.value and "<b>ü" not in page.still()
    page.look("<img src=x>", b"no image")
    assert "<img src=x>" not in page.message.value and "&lt;img src=x&gt;" in page.message.value


def test_control_characters_in_names_are_escaped(run, files):
    page = app.panel(run)
    page.look("a\x1b[31m\nb\u202e.png", (files / "smear.png").read_bytes())
    assert "a\\x1b[31m\\nb\\u202e.png" in page.seen.value and not re.search("[\x1b\u202e]", page.still())
    page.look("a\x1b[31m.png", b"no image")
    assert "a\\x1b[31m.png: not" in page.message.value and "\x1b" not in page.still()


def test_an_upload_is_held_to_the_limits_of_a_file(run, monkeypatch):
    """Size in bytes, size in pixels, formats: a page that is not ours sends what it likes."""
    page = app.panel(run)
    page.look("huge.png", bytes(300_000_000))
    assert "huge.png: 300 MB, over the limit" in page.message.value
    page.look("vast.png", png_header(1_000_000, 1_000_000))
    assert page.message.value.count("vast.png") == 1 and "pixels" in page.message.value
    page.look("drawing.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(x) run\n")
    assert "drawing.png: not" in page.message.value and page.seen.value == ""


def png_header(width, height):
    """A PNG that says it is very large."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def test_no_upload_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ImageError, match=r"^\.\./a/b\.png: not an image"):
        app.read_upload("../a/b.png", b"nothing")
    assert not list(tmp_path.iterdir())


def test_a_blank_field_has_no_cells_and_no_answer(run):
    page = app.panel(run)
    page.show("blank.png", np.full((300, 400, 3), 240, np.uint8))
    assert "No white blood cells segmented" in page.seen.value
    assert "No answer" in page.answers.value and "no cells found" in page.answers.value


def test_a_image_from_elsewhere_gets_no_answer_and_its_outlines_are_doubted(run):
    page = app.panel(run)
    page.show("negative.png", 255 - smear("Pre-B", seed=3, height=384, width=512).image)
    assert "No answer" in page.answers.value and "What is outlined may not be cells" in page.answers.value
    assert "app-chosen" not in page.answers.value


def test_the_app_needs_no_framework_and_no_widgets_to_be_imported():
    code = (
        "import sys, leukemia_nb.inference.app\n"
        "print([n for n in ('tensorflow', 'torch', 'onnx', 'ipywidgets', 'voila', 'anywidget') if n in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "[]"


# The server


class Server:
    """The page as `make app` serves it, on a free port, for two pages at a time."""

    def __init__(self, run, log, browser=False, **environment):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        code = f"from leukemia_nb import app; app.KERNELS = 2; app.serve({str(run)!r}, {port}, browser={browser})"
        with open(log, "w") as target:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                cwd=ROOT,
                stdout=target,
                stderr=target,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
            )
        wait_for(lambda: self.process.poll() is not None or "token=" in log.read_text())
        assert self.process.poll() is None, log.read_text()
        self.address = re.search(r"http://127\.0\.0\.1:\d+/\?token=\S+", log.read_text())[0]
        self.place, self.token = self.address.split("?token=")

    def status(self, path="", token=None, method="GET", **headers):
        """Status and text of the answer to a request."""
        url = self.place + path + ("" if token is None else f"?token={token}")
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=names, method=method), timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def kernels(self):
        return [child for child in psutil.Process(self.process.pid).children() if "ipykernel_launcher" in child.cmdline()]


@pytest.fixture(scope="module")
def server(run, tmp_path_factory):
    pytest.importorskip("voila", reason="Voilà serves the page")
    server = Server(run, tmp_path_factory.mktemp("voila") / "log.txt", JUPYTER_TOKEN="guess")
    try:
        yield server
    finally:
        stop(server.process)


KERNEL = "00000000-0000-0000-0000-000000000000"


@pytest.mark.parametrize("path", ["", "login", "index.html", f"api/kernels/{KERNEL}", f"api/kernels/{KERNEL}/channels"])
@pytest.mark.parametrize("token", [None, "", "guess", "é"])
def test_without_the_token_nothing_is_served_and_no_kernel_starts(server, path, token):
    assert server.status(path, token and urllib.parse.quote(token))[0] == 403
    assert server.status(path, Authorization="token guess", Cookie="username-127-0-0-1=x")[0] == 403
    assert not server.kernels()


def test_the_refusal_says_what_to_do_and_gives_no_cookie_that_would_do(server):
    status, text = server.status()
    assert status == 403 and "make app" in text and server.token not in text


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8866", "192.168.1.7", "localhost.evil.example", "[::2]", "0.0.0.0"]
)
def test_another_hosts_name_is_refused_even_with_the_token(server, host):
    """DNS rebinding: a site lets its own name point here."""
    assert server.status(token=server.token, Host=host)[0] == 403
    assert not server.kernels()


def test_the_token_is_long_new_each_time_and_in_no_process_list(server):
    assert len(server.token) >= 32 and server.token != "guess"
    assert all(server.token not in " ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))


def test_the_browser_is_given_a_private_file_and_not_the_token(run, tmp_path):
    browser = tmp_path / "browser"
    browser.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/given.part\ncp "${{1#file://}}" {tmp_path}/page.html\n'
        f'ls -ld "$(dirname "${{1#file://}}")" > {tmp_path}/folder\nmv {tmp_path}/given.part {tmp_path}/given\n'
    )
    browser.chmod(0o755)
    server = Server(run, tmp_path / "log.txt", browser=True, BROWSER=str(browser))
    try:
        wait_for((tmp_path / "given").is_file)
    finally:
        stop(server.process)
    given = (tmp_path / "given").read_text().split()
    assert given[-1].startswith("file:///") and server.token not in " ".join(given)
    assert server.address in (tmp_path / "page.html").read_text() and (tmp_path / "folder").read_text().startswith("drwx------")
    assert not Path(given[-1].removeprefix("file://")).exists()


def test_only_this_computer_can_connect(server):
    listening = [c.laddr.ip for c in psutil.Process(server.process.pid).net_connections() if c.status == "LISTEN"]
    assert set(listening) == {"127.0.0.1"}


def test_with_the_token_the_page_comes_and_kernels_stay_capped(server):
    """Two processes are the most: a third page is told so, and takes the place of one that was closed."""
    websocket = pytest.importorskip("websocket", reason="websocket-client looks at a page")
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: server.status(token=server.token), range(4)))
    assert sorted(status for status, _ in answers) == [200, 200, 503, 503] and len(server.kernels()) == 2
    seen = [child.cmdline()[-1] for child in server.kernels()]
    names = [re.search(r"kernel-([0-9a-f-]{36})\.json", name)[1] for name in seen]
    place = server.place.replace("http", "ws")
    with pytest.raises(websocket.WebSocketBadStatusException, match="403"):
        websocket.create_connection(f"{place}api/kernels/{names[0]}/channels", timeout=60)
    with pytest.raises(websocket.WebSocketBadStatusException, match="403"):  # a page of another site, even with the token
        websocket.create_connection(
            f"{place}api/kernels/{names[0]}/channels?token={server.token}", origin="http://evil.example", timeout=60
        )
    sockets = [
        websocket.create_connection(f"{place}api/kernels/{name}/channels?token={server.token}", timeout=60) for name in names
    ]
    status, text = server.status(token=server.token)
    assert status == 503 and "close one" in text and [child.cmdline()[-1] for child in server.kernels()] == seen
    for open_page in sockets:
        open_page.close()
    wait_for(lambda: server.status(token=server.token)[0] == 200)
    assert len(server.kernels()) == 2


def test_the_page_runs_in_this_python_whatever_kernels_are_installed(run, tmp_path):
    """Another Python's kernel specification of the same name comes first on JUPYTER_PATH, and HOME cannot be written to."""
    specification = tmp_path / "share" / "kernels" / "python3"
    specification.mkdir(parents=True)
    (specification / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"}))
    server = Server(run, tmp_path / "log.txt", JUPYTER_PATH=str(tmp_path / "share"), HOME="/proc/nowhere")
    try:
        assert server.status(token=server.token)[0] == 200
        assert server.kernels()[0].cmdline()[0] == sys.executable
    finally:
        stop(server.process)


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

    def choose(self, file):
        """Choose a file and wait until the page is done with it."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=".app-drop input")["nodeId"]
        self.send("DOM.setFileInputFiles", files=[str(file)], nodeId=node)
        wait_for(lambda: self.text(".app-drop").startswith("Drop an image"))

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


def test_in_a_browser_a_image_shows_cells_bars_and_doubt(browser, files):
    assert "research only" in browser.text(".app header")
    browser.choose(files / "smear.png")
    wait_for(lambda: browser.count(".app-line") == 1 + len(KINDS))
    outlines = browser.count(".app-image svg path")
    assert outlines > 3 and f"{outlines} white blood cells segmented" in browser.text(".app-image figcaption")
    box = "document.querySelector('.app-image {}').getBoundingClientRect()"
    assert browser.value(f"Math.abs({box.format('svg')}.width - {box.format('img')}.width)") < 1
    bars = browser.value(
        "[...document.querySelectorAll('.app-line > span > i > i')].map(i => i.offsetWidth / i.parentNode.offsetWidth)"
    )
    assert len(bars) == 3 * len(KINDS) and np.allclose(np.sum(np.reshape(bars, (-1, 3)), axis=1), 1, atol=0.06)
    doubts = browser.value("[...document.querySelectorAll('.app-line small')].map(e => e.innerText)")
    assert len(doubts) == len(KINDS) and all(re.search("Confidence|Abstains", doubt) for doubt in doubts)


def test_in_a_browser_the_outlines_can_be_taken_away(browser, files):
    browser.choose(files / "smear.png")
    wait_for(lambda: browser.count(".app-image input"))
    visible = "getComputedStyle(document.querySelector('.app-image svg')).visibility"
    assert browser.value(visible) == "visible"
    browser.value("document.querySelector('.app-image input').click()")
    assert browser.value(visible) == "hidden"


def test_in_a_browser_the_button_shows_where_each_model_looks(browser, files):
    browser.choose(files / "smear.png")
    wait_for(lambda: browser.count(".app-line"))
    browser.value("document.querySelector('button.app-go').click()")
    wait_for(lambda: browser.count(".app-looks figure") == len(KINDS))
    assert "on the cells, by chance" in browser.text(".app-looks")


def test_in_a_browser_a_broken_file_is_said_to_be_one(browser, files):
    browser.choose(files / "smear.png")
    wait_for(lambda: browser.count(".app-image"))
    browser.choose(files / "letter.png")
    wait_for(lambda: "letter.png: not an image" in browser.text(".app-wrong"))
    wait_for(lambda: browser.count(".app-image") == browser.count(".app-line") == 0)
    assert "Drop an image" in browser.text(".app-drop")


def test_in_a_browser_a_image_can_be_dropped_anywhere_and_a_huge_one_is_refused_there(browser):
    drop = """(bytes => {{ const files = new DataTransfer(); files.items.add(new File([bytes], "{name}"));
        document.querySelector(".app h1").dispatchEvent(new DragEvent("drop", {{dataTransfer: files, bubbles: true}})); }})({bytes})"""
    browser.value(drop.format(name="slide.tif", bytes=f"new Uint8Array({app.LIMIT}e6 + 1)"))
    wait_for(lambda: "slide.tif: 64 MB, over the limit" in browser.text(".app-wrong"))
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
