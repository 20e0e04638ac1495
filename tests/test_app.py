"""The app in a real browser: JupyterLab and voila, Debian's Chromium, Playwright.

`XLSTM_METAL_PICTURE=1 python -m pytest tests/test_app.py` also writes the picture in the docs, nbs/tutorials/playground.png."""
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "nbs" / "tutorials" / "82_playground.ipynb"
PICTURE = TUTORIAL.with_name("playground.png")
PROMPT = "def area(width, height):\n"
CELLS = [f"""\
import asyncio
import xlstm_metal as xm
model, tokenizer = xm.load()
app = xm.Playground(model, tokenizer, max_tokens=300)
app""", "app", """\
def tokens(): return len(app.run.tokens) if app.run else 0
first = tokens()
await asyncio.sleep(.5)
print("meanwhile", tokens() - first)""", "app.close()"]


def browsers():
    names = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"
    mac = [f"/Applications/{n}.app/Contents/MacOS/{n}" for n in ("Chromium", "Google Chrome")]
    return [p for p in (*map(shutil.which, names), *mac) if p and Path(p).exists()]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    "JupyterLab on a notebook of our own, voila on the tutorial; both start while the browser does."
    folder = tmp_path_factory.mktemp("app")
    cells = [dict(cell_type="code", id=f"cell{j}", source=c, metadata={}, outputs=[], execution_count=None) for j, c in enumerate(CELLS)]
    kernel = dict(display_name="python3", language="python", name="python3")
    (folder / "nbs").mkdir()
    (folder / "nbs" / "app.ipynb").write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)))
    quiet = folder / "settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    homes = {f"{k}_DIR": str(folder / k) for k in ("JUPYTER_CONFIG", "JUPYTER_RUNTIME", "JUPYTERLAB_WORKSPACES")}
    env = os.environ | homes | dict(PYTHONPATH=str(ROOT), JUPYTERLAB_SETTINGS_DIR=str(folder / "settings"), IPYTHONDIR=str(folder / "ipython"))
    lab, voila = free_port(), free_port()
    commands = [[*"-m jupyterlab --no-browser --allow-root --IdentityProvider.token= --LabApp.expose_app_in_browser=True".split(),
                 f"--port={lab}", f"--ServerApp.root_dir={folder / 'nbs'}"],
                [*"-m voila --no-browser".split(), f"--port={voila}", str(TUTORIAL)]]
    with open(folder / "log", "w") as log:
        running = [subprocess.Popen([sys.executable, *c], env=env, cwd=folder, stdout=log, stderr=log) for c in commands]
    yield f"http://127.0.0.1:{lab}", f"http://127.0.0.1:{voila}", folder / "log"
    for p in running: p.terminate() # with their kernels
    for p in running: p.wait(20)


@pytest.fixture(scope="module")
def browser():
    if not browsers(): pytest.skip("there is no Chromium or Chrome to drive; on Debian: apt-get install chromium")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=browsers()[0], args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"])
        yield b
        b.close()


def wait_until(condition, what, seconds=60):
    end = time.time() + seconds
    while not (got := condition()):
        assert time.time() < end, f"timed out waiting for {what}"
        time.sleep(.02)
    return got


def open_page(browser, url, log, **size):
    def is_up():
        with socket.socket() as s: return s.connect_ex(("127.0.0.1", urlsplit(url).port)) == 0
    wait_until(is_up, f"{url}:\n{log.read_text()}")
    page = browser.new_page(viewport=dict(width=1250, height=1400), **size)
    page.set_default_timeout(60_000)
    page.on("dialog", lambda d: d.accept()) # leave a notebook that is not saved
    page.goto(url, timeout=180_000) # voila runs the whole notebook first
    return page


class App:
    "One display of a Playground on a page."
    def __init__(self, page, which=0): self.page, self.root = page, page.locator(".xm-app").nth(which)
    def click(self, name): self.root.locator("button", has_text=name).click()
    def text(self): return self.root.locator(".xm-text pre").inner_text() if self.root.locator(".xm-text pre").count() else ""
    def status(self): return self.root.locator(".xm-status > span").first.inner_text()
    def idle(self): return self.root.locator("button", has_text="Generate").is_enabled()
    def wait(self): wait_until(self.idle, "the end of the task")
    def set(self, label, value):
        field = self.root.locator(f"label:text-is('{label}') ~ input")
        field.fill(str(value))
        field.press("Tab")

    def watch_growing(self, times):
        "Wait until the text has grown so many times; the first length may be that of another run."
        lengths = []
        def grown():
            if (n := len(self.text())) not in lengths: lengths.append(n)
            return len(lengths) > times
        wait_until(grown, "a growing text")
        assert lengths[1:] == sorted(lengths[1:])


def ready(page):
    page.wait_for_selector(".jp-CodeCell")
    page.wait_for_function("jupyterapp.shell.currentWidget.sessionContext?.session?.kernel?.status == 'idle'")


def run_cell(page, j):
    page.locator(".jp-CodeCell .jp-InputPrompt").nth(j).click()
    page.evaluate("void jupyterapp.commands.execute('notebook:run-cell')")


@pytest.fixture(scope="module")
def lab(browser, servers):
    "The notebook with its app shown twice."
    page = open_page(browser, f"{servers[0]}/lab/tree/app.ipynb", servers[2])
    ready(page)
    for j in range(3): run_cell(page, j)
    page.wait_for_function("document.querySelectorAll('.xm-app').length == 2")
    wait_until(lambda: "meanwhile 0" in page.inner_text(".jp-Notebook"), "the last cell")
    return page


def test_generate_stop_fork_continue_in_two_displays(lab):
    import xlstm_metal as xm
    app, twin = App(lab), App(lab, 1)
    app.root.locator("textarea").fill(PROMPT)
    app.click("Generate")
    app.watch_growing(4)
    app.click("Stop")
    app.wait()
    count = int(re.match(r"stopped: (\d+) of 300 tokens generated, [\d.]+ tokens/s", app.status())[1])
    text = app.text()
    assert 4 <= count < 300 and text == PROMPT + xm.generate(*xm.load(), PROMPT, max_tokens=count)
    time.sleep(.5)
    assert app.text() == text

    for _ in range(3): app.root.locator(".noUi-handle").last.press("ArrowLeft")
    wait_until(lambda: app.root.locator(".xm-after").count(), "what a fork would leave out")
    app.click("Fork here")
    wait_until(lambda: app.status().startswith("run 2 is a fork of run 1"), "the fork")
    short = app.text()
    assert len(short) < len(text) and text.startswith(short)
    app.set("tokens", 9)
    app.click("Continue")
    wait_until(lambda: app.status().startswith("9 of 9 tokens generated"), "the end of the task")
    longer = PROMPT + xm.generate(*xm.load(), PROMPT, max_tokens=count - 3 + 9)
    wait_until(lambda: app.text() == longer, "the text of the fork without a cursor")
    wait_until(lambda: twin.text() == app.text() and twin.status() == app.status(), "the other display")


def test_surprise_and_memories_pages(lab):
    app = App(lab)
    app.click("Surprise")
    wait_until(lambda: app.root.locator(".xm-surprise span[style*=background]").count() > 9, "coloured tokens")
    app.click("Memories")
    wait_until(lambda: app.root.locator(".xm-memories img").count() == 4, "four heat maps")
    assert all(app.root.locator(".xm-memories img").nth(j).evaluate("i => i.complete && i.naturalWidth == 9") for j in range(4))
    app.click("Text")


def test_nothing_overflows_at_500_pixels(lab):
    lab.evaluate("jupyterapp.shell.collapseLeft()")
    lab.set_viewport_size(dict(width=500, height=1400))
    wait_until(lambda: App(lab).root.bounding_box()["width"] < 460, "the narrow page")
    time.sleep(.3)
    overflowing = App(lab).root.evaluate("""app => [...app.querySelectorAll('*')].filter(e =>
        e.getBoundingClientRect().right > app.getBoundingClientRect().right + 1).map(e => e.className)""")
    lab.set_viewport_size(dict(width=1250, height=1400))
    assert overflowing == []


def test_html_in_a_prompt_is_shown_as_text(lab):
    app, markup = App(lab), "<img src=x onerror='window.broken = 1'><script>window.broken = 1</script>&lt;b&gt;"
    app.root.locator("textarea").fill(markup)
    app.set("tokens", 3)
    app.click("Generate")
    wait_until(lambda: app.text().startswith(markup) and app.idle(), "the text")
    app.click("Surprise")
    wait_until(lambda: app.root.locator(".xm-surprise pre").count(), "the tokens")
    app.click("Text")
    assert not lab.evaluate("window.broken") and not app.root.locator("pre img, pre script").count()


def test_closed_app_comes_back(lab):
    app = App(lab)
    text = wait_until(app.text, "the text")
    run_cell(lab, 3)
    wait_until(lambda: not lab.locator(".xm-app").count(), "a page without the app")
    run_cell(lab, 1)
    wait_until(lambda: lab.locator(".xm-app").count() == 1 and app.text() == text, "the app")


def test_generation_survives_waiting_cells_and_a_page_reload(lab):
    app = App(lab)
    app.root.locator("textarea").fill(PROMPT)
    app.set("tokens", 1000)
    app.click("Generate")
    app.watch_growing(2)
    run_cell(lab, 2)
    wait_until(lambda: re.search(r"meanwhile [1-9]", lab.inner_text(".jp-Notebook")), "the waiting cell")
    assert not app.idle()
    lab.reload() # without having saved the notebook
    ready(lab)
    run_cell(lab, 1)
    app.watch_growing(2)
    app.click("Stop")
    app.wait()
    assert app.status().startswith("stopped: ")


def test_voila_serves_the_tutorial_without_code(browser, servers):
    page = open_page(browser, servers[1], servers[2], device_scale_factor=1.5)
    page.wait_for_function("document.querySelectorAll('.xm-app').length == 2")
    app = App(page)
    wait_until(lambda: app.root.locator("option").count() == 2, "the runs of the tutorial")
    assert not page.locator(".jp-InputArea-editor").count()
    if os.environ.get("XLSTM_METAL_PICTURE"): take_picture(app)
    app.set("tokens", 500)
    app.click("Generate")
    app.watch_growing(2)
    app.click("Stop")
    app.wait()
    assert re.match("stopped: [0-9]+ of ", app.status())


def take_picture(app):
    from PIL import Image
    app.root.locator("option").last.click()
    app.click("Surprise")
    wait_until(lambda: app.root.locator(".xm-here").count(), "the tokens")
    time.sleep(.5)
    app.root.screenshot(path=PICTURE)
    app.click("Text")
    Image.open(PICTURE).convert("RGB").quantize(64).save(PICTURE, optimize=True)
