"""Every page in a real browser: light and dark, desk and phone, with the keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import axe_playwright_python
import pytest

pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
from playwright.sync_api import Browser, BrowserContext, Page, Request

pytestmark = [pytest.mark.site, pytest.mark.browser]

AXE = next(Path(axe_playwright_python.__file__).parent.rglob("axe.min.js"))
# All rules that axe runs unasked, and two that it keeps for those who ask. Without preload axe fetches nothing itself.
RULES = {rule: {"enabled": True} for rule in ("label-content-name-mismatch", "focus-order-semantics")}
NO_CONTRAST = {"color-contrast": {"enabled": False}}  # colours do not depend on the width, and this rule takes most of the time
WIDTHS = {"desk": (1280, 900), "phone": (360, 740)}
UNFOLD = """async () => {
  document.querySelectorAll("article details").forEach((part) => (part.open = true));
  document.querySelectorAll("article button.toggle-button").forEach((button) => button.click());
  await new Promise(requestAnimationFrame);
  await Promise.allSettled(document.getAnimations().map((moving) => moving.finished));  // half faded in, contrast is low
}"""
SETTLED = """() => (!window.MathJax?.startup || window.MathJax.startup.promise)
  .then?.(() => document.fonts.ready) ?? document.fonts.ready"""
OVERFLOW = """() => {
  const page = document.documentElement;
  return page.scrollWidth <= page.clientWidth + 1 ? "" : `${page.scrollWidth} px in a window of ${page.clientWidth}`;
}"""


@pytest.fixture(scope="session")
def paths(site: Path) -> list[str]:
    """Every page, as a path below the address. Of the pages that hold one source file each, the shortest and the longest do."""
    found = [path for path in sorted(site.rglob("*.html")) if "_static" not in path.parts and path != site / "index.html"]
    sources = sorted((path for path in found if "_modules" in path.parts), key=lambda path: path.stat().st_size)
    found = [path for path in found if path not in sources[1:-1]]
    return [path.relative_to(site).as_posix() for path in found]


@contextmanager
def opened(browser: Browser, address: str, problems: list[str], **settings: Any) -> Iterator[Page]:
    """A page in a context of its own that writes down every error and stops every request to elsewhere."""
    context: BrowserContext = browser.new_context(**settings)
    page = context.new_page()

    def stop(request: Request) -> bool:
        away = not request.url.startswith((address, "data:", "blob:", "about:"))
        if away:
            problems.append(f"asks for {request.url}")
        return away

    context.route("**/*", lambda route, request: route.abort() if stop(request) else route.continue_())
    page.on("console", lambda message: problems.append(f"console: {message.text}") if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(f"script error: {error}"))
    page.on("response", lambda answer: problems.append(f"{answer.status}: {answer.url}") if answer.status >= 400 else None)
    try:
        yield page
    finally:
        context.close()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("colours", ["light", "dark"])
def test_every_page(browser: Browser, address: str, paths: list[str], colours: str, width: str) -> None:
    wide, high = WIDTHS[width]
    axe, faults = AXE.read_text("utf-8"), []
    rules = RULES if width == "desk" else RULES | NO_CONTRAST
    options = {"preload": False, "resultTypes": ["violations"], "rules": rules}
    problems: list[str] = []
    with opened(browser, address, problems, viewport={"width": wide, "height": high}, color_scheme=colours) as page:
        for path in paths:
            problems.clear()
            page.goto(address + path)
            page.evaluate(SETTLED)
            if page.evaluate("document.documentElement.dataset.theme") != colours:
                problems.append(f"is not {colours}")
            for state in ("folded", "unfolded"):
                if sideways := page.evaluate(OVERFLOW):
                    problems.append(f"{state}, it scrolls sideways: {sideways}")
                if state == "folded":
                    page.evaluate(UNFOLD)
            page.evaluate(axe)
            for violation in page.evaluate("options => axe.run(document, options)", options)["violations"]:
                where = "; ".join(f"{node['target']} {node['html'][:120]}" for node in violation["nodes"][:3])
                problems.append(f"axe {violation['id']}, {len(violation['nodes'])} times: {where}")
            faults += [f"{path}: {problem}" for problem in problems]
    assert not faults, "\n".join(faults)


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """An empty page at desk width; whatever goes wrong in it fails the test."""
    problems: list[str] = []
    with opened(browser, address, problems, viewport={"width": 1280, "height": 900}) as found:
        yield found
    assert not problems, "\n".join(problems)


def test_the_root_leads_to_the_book(page: Page, address: str) -> None:
    page.goto(address)
    page.wait_for_url("**/book/index.html")
    assert page.title()


def test_search_finds_the_chapter(page: Page, address: str) -> None:
    page.goto(f"{address}book/index.html")
    page.keyboard.press("Control+k")
    page.keyboard.type("FGSM")
    page.keyboard.press("Enter")
    found = page.locator("#search-results li a[href*='notebooks/02_vision_foundation_models']").first
    found.wait_for()
    page.wait_for_load_state("networkidle")  # the quotations are fetched after the list
    found.click()
    page.wait_for_url("**/notebooks/02_vision_foundation_models.html*")


def test_the_colours_can_be_switched_and_stay(page: Page, address: str) -> None:
    page.goto(f"{address}book/index.html")
    ground = "getComputedStyle(document.body).backgroundColor"
    theme = "document.documentElement.dataset.theme"
    seen = {}
    for _ in range(3):  # light, dark and as the system says, in some order
        page.locator("button.theme-switch-button:visible").click()
        seen[page.evaluate(theme)] = page.evaluate(ground)
    assert set(seen) == {"light", "dark"}
    assert seen["light"] != seen["dark"]
    while page.evaluate("document.documentElement.dataset.mode") != "dark":
        page.locator("button.theme-switch-button:visible").click()
    page.goto(f"{address}book/how_to_use.html")
    assert page.evaluate(theme) == "dark"
    assert page.evaluate(ground) == seen["dark"]


def test_tab_reaches_the_skip_link_first(page: Page, address: str) -> None:
    page.goto(f"{address}notebooks/02_vision_foundation_models.html")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#main-content"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.querySelector('#main-content').contains(document.activeElement)")


def test_folded_parts_unfold_by_keyboard(page: Page, address: str) -> None:
    page.goto(f"{address}notebooks/02_vision_foundation_models.html")
    folded = page.locator("article details").first
    inside = folded.locator(":scope > :not(summary)").first
    assert not inside.is_visible()
    folded.locator("summary").focus()
    page.keyboard.press("Enter")
    inside.wait_for(state="visible")


def test_wide_tables_scroll_by_keyboard(browser: Browser, address: str) -> None:
    problems: list[str] = []
    with opened(browser, address, problems, viewport={"width": 360, "height": 740}) as page:
        page.goto(f"{address}book/coverage.html")
        container = page.locator(".pst-scrollable-table-container[tabindex='0']").first
        container.wait_for()
        container.focus()
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        page.wait_for_function("() => document.activeElement.scrollLeft > 0")
    assert not problems, "\n".join(problems)


def test_the_chapter_opens_from_disk(browser: Browser, site: Path) -> None:
    """Without any server: formulas are set, nothing is asked of a host."""
    chapter = (site / "notebooks" / "02_vision_foundation_models.html").resolve().as_uri()
    problems: list[str] = []
    with opened(browser, "file://", problems) as page:
        page.goto(chapter)
        page.evaluate(SETTLED)
        formulas = cast("int", page.locator("article .math").count())
        assert page.locator("article .math mjx-container").count() >= formulas
    assert not problems, "\n".join(problems)
