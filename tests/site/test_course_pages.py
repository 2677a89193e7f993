"""Quizzes and sliders on the built site: by mouse and keyboard, with and without the script, on desk and phone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bs4 import BeautifulSoup, Tag

pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
from playwright.sync_api import Browser, Page

from tests.site.watched import opened

pytestmark = [pytest.mark.site, pytest.mark.browser]

Pages = dict[str, BeautifulSoup]
NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("[0-9]*.ipynb"))


def first(pages: Pages, kind: str) -> str:
    """The first page that shows one; skipped where no page does."""
    found = next((path for path, page in pages.items() if page.select_one(f".safescale-{kind}")), None)
    if not found:
        pytest.skip(f"no page shows a {kind} yet")
    return found


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_chapter_shows_every_quiz_and_slider_of_its_notebook(notebook: Path, pages: Pages) -> None:
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", ())]
    html = "".join("".join(data.get("text/html", "")) for data in outputs)
    for kind in ("quiz", "slider"):
        assert len(pages[f"notebooks/{notebook.stem}.html"].select(f".safescale-{kind}")) == html.count(
            f'class="safescale-{kind}"'
        )


# --- slider -------------------------------------------------------------------------------------------------------

ON_TOP = "frames => frames.map((frame) => getComputedStyle(frame).visibility === 'visible')"
SCROLLS = "box => [box.parentElement.scrollWidth - box.parentElement.clientWidth, box.parentElement.tabIndex]"
JUMPS = "boxes => boxes.map((box) => box.getBoundingClientRect().height)"


@pytest.mark.parametrize("width", [1280, 360])
def test_a_slider_moves_by_keyboard_and_says_what_is_seen(browser: Browser, address: str, pages: Pages, width: int) -> None:
    path = first(pages, "slider")
    source = pages[path].select_one(".safescale-slider")
    assert isinstance(source, Tag)
    values = [str(frame["data-value"]) for frame in source.select(".safescale-frame")]
    texts = [frame.select_one("p span").get_text() for frame in source.select(".safescale-frame")]
    with opened(browser, address, viewport={"width": width, "height": 800}) as page:
        page.goto(address + path)
        box = page.locator(".safescale-slider").first
        control, frames, said = box.get_by_role("slider"), box.locator(".safescale-frame"), box.get_by_role("status")
        assert control.count() == 1
        assert page.get_by_role("slider", name=str(source["data-label"]), exact=True).count() >= 1
        assert said.text_content() == ""  # nothing is read out before somebody moves
        high = box.evaluate_all(JUMPS)
        control.focus()
        for place, key in enumerate(["Home", *["ArrowRight"] * (len(values) - 1)]):
            page.keyboard.press(key)
            assert control.get_attribute("aria-valuetext") == values[place]
            assert frames.evaluate_all(ON_TOP) == [other == place for other in range(len(values))]
            if place:
                assert said.text_content() == texts[place]
        page.keyboard.press("Home")
        assert frames.evaluate_all(ON_TOP)[0]
        assert box.evaluate_all(JUMPS) == high
        assert box.evaluate(SCROLLS) == [0, -1]  # the theme makes what scrolls a stop of the tab key, without a name
        picture = frames.first.locator("img").bounding_box()
        assert picture
        assert picture["x"] >= 0
        assert picture["x"] + picture["width"] <= width


def test_a_slider_shows_every_picture_without_the_script(browser: Browser, address: str, pages: Pages) -> None:
    path = first(pages, "slider")
    with opened(browser, address, java_script_enabled=False) as page:
        page.goto(address + path)
        box = page.locator(".safescale-slider").first
        assert box.locator("input").count() == 0
        frames = box.locator(".safescale-frame")
        tops = [frame.bounding_box()["y"] for frame in frames.all()]
        assert tops == sorted(set(tops))  # one below the other
        for frame in frames.all():
            assert frame.locator("img").is_visible()
            assert frame.locator("p").is_visible()


def test_a_slider_asks_for_nothing_and_stays_small(pages: Pages) -> None:
    path = first(pages, "slider")
    for box in pages[path].select(".safescale-slider"):
        sources = [str(image["src"]) for image in box.select("img")]
        assert all(source.startswith("data:image/png;base64,") for source in sources)
        assert len(str(box)) < 400_000
        assert not [name for tag in box.find_all(True) for name in tag.attrs if name.startswith("on")]


# --- quiz ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [True, False])
def test_a_quiz_unfolds_by_keyboard(browser: Browser, address: str, pages: Pages, script: bool) -> None:
    path = first(pages, "quiz")
    with opened(browser, address, java_script_enabled=script) as page:
        page.goto(address + path)
        asked = page.locator(".safescale-quiz").first.get_by_role("group").first
        for choice in asked.locator("details").all():
            feedback = choice.locator("p")
            assert not feedback.is_visible()
            choice.locator("summary").focus()
            page.keyboard.press("Enter")
            feedback.wait_for(state="visible")
            assert feedback.inner_text().startswith(("Right. ", "Not quite. "))


def test_a_quiz_counts_the_first_answer_only(browser: Browser, address: str, pages: Pages) -> None:
    path = first(pages, "quiz")
    with opened(browser, address, viewport={"width": 360, "height": 800}) as page:
        page.goto(address + path)
        quiz = page.locator(".safescale-quiz").first
        asked, score = quiz.locator("fieldset"), quiz.get_by_role("status")
        count = asked.count()
        assert score.text_content() == ""
        asked.nth(0).locator(".safescale-right summary").click()
        expect_text(page, f"1 of {count} answered, 1 right at the first try.")
        asked.nth(0).locator(".safescale-wrong summary").first.click()  # looking at the others costs nothing
        if count > 1:
            asked.nth(1).locator(".safescale-wrong summary").first.click()
            expect_text(page, f"2 of {count} answered, 1 right at the first try.")
            asked.nth(1).locator(".safescale-right summary").click()
            page.wait_for_timeout(100)
            assert score.text_content() == f"2 of {count} answered, 1 right at the first try."
        assert page.evaluate("Object.keys(localStorage).filter((key) => key.includes('safescale'))") == []


def expect_text(page: Page, text: str) -> None:
    page.locator(".safescale-quiz [role=status]", has_text=text).first.wait_for(timeout=5_000)


def test_what_is_right_is_said_in_words(pages: Pages) -> None:
    path = first(pages, "quiz")
    for asked in pages[path].select(".safescale-quiz fieldset"):
        verdicts = [choice.select_one("p strong").get_text() for choice in asked.select("details")]
        assert sorted(set(verdicts)) == ["Not quite.", "Right."]
        assert verdicts.count("Right.") == 1
        assert asked.legend.get_text(strip=True)
