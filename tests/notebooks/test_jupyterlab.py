"""A chapter as its reader runs it: opened in a real JupyterLab, every cell run from the menu's command, saved, looked at.

It takes as long as the chapter does, so it has a call of its own: `make lab-test`. SAFESCALE_LAB names the chapter by the
beginning of its file name (default 02).
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import psutil
import pytest

from safescale_lib.course import QUIZ_MIME
from safescale_lib.measure import OUTCOME_MIME

pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
from playwright.sync_api import Browser, Page

from tests.site.conftest import browser  # noqa: F401  (the fixture that finds Chromium, or skips and says so)

pytestmark = pytest.mark.browser

HERE = Path(__file__).parents[2] / "notebooks"
START_SECONDS, RUN_SECONDS = 90, 900

# Two cells with every kind of output of ours that JupyterLab draws: enough to see a broken display in half a minute.
SMALL = """\
from io import BytesIO

from PIL import Image

from safescale_lib.course import Choice, Question, quiz, slider
from safescale_lib.measure.intervals import rate
from safescale_lib.measure.outcomes import Outcome, claim, table

def png(grey):
    held = BytesIO()
    Image.new("L", (60, 40), grey).save(held, format="png")
    return held.getvalue()

outcome = Outcome("a.b", "method", "rate", rate([True] * 90 + [False] * 10))
outcome
%%
claim("most of them", outcome > 0.7)
%%
table("A table", ["a", "b"], [(1, 2)])
%%
quiz("small", Question("Which?", right=Choice("this", "Yes."), wrong=[Choice("that", "No.")]))
%%
texts = ["dark", "light"]
slider("grey", label="grey", values=[0, 200], frames=[png(0), png(200)], texts=texts, caption="A grey field.", alt="A field.")
"""


# --- a server that leaves nothing behind --------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def end(server: subprocess.Popen[bytes]) -> None:
    """Ask the server to stop, which also stops its kernels; after that, kill whatever of the family is left."""
    try:
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    server.terminate()
    _, left = psutil.wait_procs(family, timeout=15)
    for process in left:
        process.kill()
    psutil.wait_procs(left, timeout=15)
    server.wait(timeout=15)


@contextmanager
def jupyter_lab(folder: Path) -> Iterator[tuple[str, str]]:
    """JupyterLab on loopback over a folder's notebooks: its address and its token. Settings of this user play no part."""
    port, token, home = free_port(), secrets.token_hex(16), folder / ".jupyter"
    settings = home / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')  # no pop-up
    places = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
    }
    environment = os.environ | {name: str(home / place) for name, place in places.items()} | {"JUPYTER_TOKEN": token}
    flags = [
        "--no-browser",
        "--allow-root",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        f"--ServerApp.root_dir={folder}",
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.news_url=None",
    ]
    log = folder / ".jupyter" / "server.log"
    with log.open("wb") as written:
        command = [sys.executable, "-m", "jupyterlab", *flags]
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=written, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}/"
    try:
        waited = time.monotonic()
        while not answers(f"{address}api/status?token={token}"):
            late = time.monotonic() - waited > START_SECONDS
            if late or server.poll() is not None:
                pytest.fail(f"JupyterLab did not start:\n{log.read_text('utf-8', 'replace')[-3000:]}")
            time.sleep(0.5)
        yield address, token
    finally:
        end(server)


def answers(address: str) -> bool:
    try:
        with urlopen(address, timeout=5) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


# --- a reader ------------------------------------------------------------------------------------------------------

READY = """() => {
  const app = window.jupyterapp;
  const panel = app?.shell.currentWidget;
  const ready = app?.commands.hasCommand("notebook:run-all-cells") && panel?.context?.isReady && panel.sessionContext?.isReady;
  return Boolean(ready) && panel.sessionContext.session?.kernel?.status === "idle";
}"""
RUN_AND_SAVE = """async (seconds) => {
  const run = window.jupyterapp.commands.execute("notebook:run-all-cells").then(() => "ran");
  const late = new Promise((resolve) => setTimeout(() => resolve("late"), 1000 * seconds));
  const ended = await Promise.race([run, late]);
  await window.jupyterapp.shell.currentWidget.context.save();
  return ended;
}"""
BRING = """async (index) => {
  const notebook = window.jupyterapp.shell.currentWidget.content;
  notebook.activeCellIndex = index;
  await notebook.scrollToItem(index);
}"""


def run_all(page: Page, address: str, token: str, name: str) -> str:
    """Open a notebook, run all its cells, save it. Says "ran", or "late" if time was up."""
    page.goto(f"{address}lab/tree/{name}?token={token}", timeout=1000 * START_SECONDS)
    page.wait_for_function(READY, timeout=1000 * START_SECONDS)
    return str(page.evaluate(RUN_AND_SAVE, RUN_SECONDS))


def see(page: Page, notebook: nbformat.NotebookNode, mime: str, selector: str) -> None:
    """The first output that carries the type is drawn, not only stored. JupyterLab draws a cell when it comes into view."""
    carriers = [place for place, cell in enumerate(notebook.cells) if carries(cell, mime)]
    assert carriers, f"no cell carries {mime}"
    page.evaluate(BRING, carriers[0])
    page.locator(f".jp-Notebook-cell .jp-OutputArea {selector}").first.wait_for(state="visible", timeout=15_000)


def carries(cell: nbformat.NotebookNode, mime: str) -> bool:
    return any(mime in output.get("data", {}) for output in cell.get("outputs", []))


def unwell(notebook: nbformat.NotebookNode) -> list[str]:
    """Code cells that were not run, or show an error."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = [f"{cell.id} was not run" for cell in cells if cell.execution_count is None]
    for cell in cells:
        bad = (output for output in cell.outputs if output.output_type == "error")
        found += [f"{cell.id}: {output.ename}: {output.evalue[:300]}" for output in bad]
    return found


@pytest.fixture
def lab(tmp_path: Path, browser: Browser) -> Iterator[Callable[..., tuple[Page, nbformat.NotebookNode]]]:  # noqa: F811
    """A function that puts a notebook into an empty folder, runs it in JupyterLab and gives the page and the saved file."""
    with jupyter_lab(tmp_path) as (address, token):
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        page = context.new_page()

        def opened(source: Path | nbformat.NotebookNode) -> tuple[Page, nbformat.NotebookNode]:
            target = tmp_path / "notebook.ipynb"
            shutil.copy(source, target) if isinstance(source, Path) else nbformat.write(source, target)
            fresh = nbformat.read(target, as_version=4)
            for cell in fresh.cells:  # so that what is found afterwards was made here
                if cell.cell_type == "code":
                    cell.update(outputs=[], execution_count=None)
            nbformat.write(fresh, target)
            ended = run_all(page, address, token, target.name)
            saved = nbformat.read(target, as_version=4)
            assert ended == "ran", f"not done after {RUN_SECONDS} s; " + "; ".join(unwell(saved))
            return page, saved

        yield opened
        context.close()


def of_cells(text: str) -> nbformat.NotebookNode:
    cells = [nbformat.v4.new_code_cell(cell.strip()) for cell in text.split("\n%%\n")]
    kernel: dict[str, Any] = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=kernel)


def test_our_displays_are_drawn(lab: Callable[..., tuple[Page, nbformat.NotebookNode]]) -> None:
    page, saved = lab(of_cells(SMALL))
    assert unwell(saved) == []
    see(page, saved, OUTCOME_MIME, ".safescale-outcome")
    for name in ("claim", "table"):
        page.locator(f".jp-OutputArea .safescale-{name}").first.wait_for(state="visible", timeout=15_000)
    see(page, saved, QUIZ_MIME, ".safescale-quiz")
    choice = page.locator(".jp-OutputArea .safescale-right")
    assert not choice.locator("p").is_visible()
    choice.locator("summary").click()
    choice.locator("p").wait_for(state="visible", timeout=5_000)
    page.evaluate(BRING, len(saved.cells) - 1)
    pictures = page.locator(".jp-OutputArea .safescale-frame img")
    pictures.last.wait_for(state="visible", timeout=15_000)
    assert pictures.count() == 2
    assert pictures.evaluate_all("images => images.every((image) => image.naturalWidth === 60)")


def test_a_failing_cell_is_noticed(lab: Callable[..., tuple[Page, nbformat.NotebookNode]]) -> None:
    _, saved = lab(of_cells("1 + 1\n%%\n1 / 0\n%%\n2 + 2"))
    first, second = unwell(saved)
    assert "ZeroDivisionError" in first + second
    assert "was not run" in first + second


def test_a_chapter_runs_in_jupyterlab(lab: Callable[..., tuple[Page, nbformat.NotebookNode]]) -> None:
    wanted = os.environ.get("SAFESCALE_LAB", "02")
    (chapter,) = HERE.glob(f"{wanted}*.ipynb")
    page, saved = lab(chapter)
    assert unwell(saved) == []
    see(page, saved, OUTCOME_MIME, ".safescale-outcome, .safescale-table")
    committed = nbformat.read(chapter, as_version=4)
    places = [[carries(cell, OUTCOME_MIME) for cell in notebook.cells] for notebook in (saved, committed)]
    assert places[0] == places[1]


def test_the_server_leaves_no_process_behind(tmp_path: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    with jupyter_lab(tmp_path) as (address, token):
        started = set(psutil.Process().children(recursive=True)) - before
        assert started
        assert not answers(f"{address}api/contents?token={'0' * len(token)}")  # nobody enters without the token
    assert not [process for process in started if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
