"""The built site: read from disk, served under a subpath, opened in Chromium."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import pytest
from bs4 import BeautifulSoup

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parents[2]
SUBPATH = "/book/"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the site: the one SAFESCALE_SITE names, else built here as strictly as `make book` does."""
    if built := os.environ.get("SAFESCALE_SITE"):
        folder = ROOT / built
        assert (folder / "index.html").is_file(), f"SAFESCALE_SITE={built} holds no site; build it with: make book"
        return folder
    target = tmp_path_factory.mktemp("site")
    command = [Path(sys.executable).with_name("jupyter-book"), "build", ROOT, "--path-output", target]
    build = subprocess.run(
        [*map(str, command), "-W", "-n", "--keep-going", "--all", "-q"], capture_output=True, text=True, timeout=300
    )
    assert build.returncode == 0, f"the strict build failed:\n{build.stdout[-2000:]}\n{build.stderr[-4000:]}"
    return target / "_build" / "html"


@pytest.fixture(scope="session")
def pages(site: Path) -> dict[str, BeautifulSoup]:
    """Every page of the site, parsed, by its path in the site."""
    paths = (path for path in sorted(site.rglob("*.html")) if "_static" not in path.relative_to(site).parts)
    return {path.relative_to(site).as_posix(): BeautifulSoup(path.read_text("utf-8"), "html.parser") for path in paths}


class UnderSubpath(SimpleHTTPRequestHandler):
    """A plain file server that knows the site below SUBPATH only, as a host with several sites does."""

    def translate_path(self, path: str) -> str:
        inside = path.startswith(SUBPATH)
        return super().translate_path(path.removeprefix(SUBPATH.rstrip("/")) if inside else "/outside-the-site")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="session")
def address(site: Path) -> Iterator[str]:
    """Where the site is served on loopback, ending in a slash."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(UnderSubpath, directory=str(site))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}{SUBPATH}"
        server.shutdown()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Headless Chromium; skipped where there is none, unless SAFESCALE_REQUIRE_BROWSER is set."""
    named = os.environ.get("SAFESCALE_CHROMIUM")
    found = named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not found:
        missing = "no Chromium found: install the package `chromium`, or name a binary in SAFESCALE_CHROMIUM"
        if os.environ.get("SAFESCALE_REQUIRE_BROWSER"):
            pytest.fail(missing)
        pytest.skip(missing)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=found, args=list(FLAGS))
        yield launched
        launched.close()
