"""The atlas and what is read off it: true to the data, and the filters driven for real, with and without the script."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import jsonschema
import pytest
from bs4 import BeautifulSoup

from safescale_lib.survey import (
    AXES,
    THREATS,
    Coverage,
    cards,
    chapters,
    coverage,
    leaves,
    nearest_running,
    outcomes,
    scorecard,
)
from safescale_lib.survey.scorecard import as_text, schema

pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
from playwright.sync_api import Browser, Page, expect

from tests.site.watched import opened

pytestmark = pytest.mark.site

Pages = dict[str, BeautifulSoup]
NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
PATCH = "atlas-vfm-vit-adversarial-attack-patch"


def card_id(key: str) -> str:
    return "atlas-" + re.sub(r"[._]", "-", key)


@lru_cache(maxsize=1)
def covered() -> Coverage:
    return coverage()


STRAIGHT = str.maketrans({"\u201c": '"', "\u201d": '"', "\u2019": "'", "\u2026": "..."})  # the site sets them as a printer does


@pytest.fixture(scope="module")
def atlas(pages: Pages) -> BeautifulSoup:
    return pages["book/atlas.html"]


# --- true to the data ---------------------------------------------------------------------------------------------


def test_every_leaf_has_a_card_with_its_words_tags_and_papers(atlas: BeautifulSoup) -> None:
    shown = {str(card["id"]): card for card in atlas.select("article.safescale-card")}
    assert list(shown) == [card_id(leaf.key) for leaf in leaves()]
    for key, card in cards().items():
        place = shown[card_id(key)]
        text = " ".join(place.get_text(" ").replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").split())
        for words in (card.node.title, *AXES["access"].values[card.tags.access]):
            assert words in text, key
        assert (place["data-chapter"], place["data-side"], place["data-threat"]) == (key.split(".")[0], card.side, card.threat)
        for axis in AXES:
            assert str(place[f"data-{axis}"]).split() == list(card.tags.on(axis)), key
        papers = place.select(".safescale-papers li")
        assert len(papers) == len(card.papers)
        for paper, link in zip(card.papers, papers, strict=True):
            assert str(paper.year) in link.a.get_text()
            assert str(link.a["href"]).startswith("bibliography.html#")
        assert place.select_one(f"p.safescale-title a[href='#{card_id(key)}']")


def test_the_status_is_computed(atlas: BeautifulSoup) -> None:
    for entry in covered().leaves:
        place = atlas.find(id=card_id(entry.node.key))
        assert place["data-status"] == ("runs" if entry.runs else "not-yet")
        status = place.select_one(".safescale-status")
        links = [str(link["href"]) for link in status.select("a")]
        if entry.runs:
            first = entry.outcomes[0]
            assert f"../notebooks/{Path(first.notebook).stem}.html#cell-{first.cell}" in links
            assert (
                f"{first.outcome['value']:.3f} [{first.outcome['low']:.3f}, {first.outcome['high']:.3f}]" in status.get_text()
            )
            for bound in entry.functions:
                assert bound.name in status.get_text()
        else:
            near = nearest_running(entry.node.key, covered())
            assert (f"#{card_id(near.node.key)}" in links) if near else not links
            assert "Not yet" in status.get_text()


def test_the_page_stays_small(site: Path) -> None:
    assert (site / "book" / "atlas.html").stat().st_size < 1_500_000


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_with_an_outcome_has_an_anchor(notebook: Path, pages: Pages) -> None:
    page = pages[f"notebooks/{notebook.stem}.html"]
    for cell in {entry.cell for entry in outcomes(notebook)}:
        found = page.select_one(f"div.cell#cell-{cell}")
        assert found, cell
        assert found.select_one(".safescale-outcome, .safescale-table"), f"{cell} shows no outcome"


def test_the_matrix_counts_and_leads_to_what_it_counts(pages: Pages) -> None:
    runs: Counter[tuple[str, str]] = Counter()
    every: Counter[tuple[str, str]] = Counter()
    for key, card in cards().items():
        for place in ((card.threat, key.split(".")[0]), (card.threat, ""), ("", key.split(".")[0]), ("", "")):
            every[place] += 1
            runs[place] += covered().nodes[key].runs
    body = pages["book/coverage.html"].select(".safescale-matrix tbody tr")
    for threat, row in zip([*THREATS, ""], body, strict=True):
        for family, cell in zip([*(chapter.key for chapter in chapters()), ""], row.select("td"), strict=True):
            if not every[threat, family]:
                assert cell.get_text() == "\N{EN DASH}"
                continue
            assert cell.get_text() == f"{runs[threat, family]} / {every[threat, family]}"
            asked = {name: values[0] for name, values in parse_qs(urlsplit(str(cell.a["href"])).query).items()}
            assert asked == {name: value for name, value in (("threat", threat), ("chapter", family)) if value}
    assert body[-1].select("td")[-1].get_text() == f"{covered().count().runs} / 355"


def test_the_views_list_what_runs_along_every_axis(pages: Pages) -> None:
    for axis, known in AXES.items():
        for value in known.values:
            on = [key for key, card in cards().items() if value in card.tags.on(axis)]
            running = [covered().nodes[key] for key in on if covered().nodes[key].runs]
            section = pages["book/views.html"].select_one(f"section#view-{axis}-{value}")
            assert f"{len(running)} of {len(on)} techniques run" in section.get_text()
            assert section.select_one(f"a[href='atlas.html?{axis}={value}']")
            listed = [(link.get_text(), str(link["href"]).partition("#")[2]) for link in section.select("li a")]
            assert listed == [(entry.node.title, f"cell-{entry.outcomes[0].cell}") for entry in running]


def test_the_scorecard_is_served_for_machines_and_for_people(site: Path, pages: Pages) -> None:
    document = scorecard(covered=covered())
    assert (site / "scorecard.json").read_text("utf-8") == as_text(document)
    assert json.loads((site / "scorecard.schema.json").read_text("utf-8")) == schema()
    jsonschema.Draft202012Validator(schema()).validate(json.loads((site / "scorecard.json").read_text("utf-8")))
    rows = pages["book/scorecard.html"].select("table.safescale-sortable tbody tr")
    for row, outcome in zip(rows, document["outcomes"], strict=True):
        texts = [cell.get_text().translate(STRAIGHT) for cell in row.select("th, td")]
        assert texts[:4] == [
            outcome["title"],
            outcome["method"],
            outcome["metric"],
            f"{outcome['value']:.3f}",
        ]
        assert texts[5] == f"{outcome['n']:,}"
        assert row.a["href"] == f"../{outcome['link']}"
        assert (site / urlsplit(outcome["link"]).path).is_file()
    for field in ("value", "against", "cost.seconds", "notebooks[].sha256"):
        assert any(code.get_text() == field for code in pages["book/scorecard.html"].select("tbody code")), field


def test_scripts_are_loaded_where_they_are_needed_only(pages: Pages) -> None:
    for path, page in pages.items():
        names = {urlsplit(str(script["src"])).path.rpartition("/")[2] for script in page.select("script[src]")}
        assert ("atlas.js" in names) == bool(page.select("form.safescale-filters")), path
        assert ("tables.js" in names) == ("datatables.js" in names) == bool(page.select("table.safescale-sortable")), path


# --- in a browser -------------------------------------------------------------------------------------------------


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    with opened(browser, address) as found:
        yield found


SEEN = "() => [...document.querySelectorAll('%s')].filter((part) => part.checkVisibility()).map((part) => part.id)"
VISIBLE, HEADINGS = SEEN % ".safescale-card", SEEN % "section[id^=atlas-]"


def matching(**wanted: str) -> list[str]:
    """Ids of the cards that a filter must leave."""
    found = []
    for key, card in cards().items():
        facts = {"chapter": (key.split(".")[0],), "side": (card.side,), "threat": (card.threat,)}
        facts |= {axis: card.tags.on(axis) for axis in AXES} | {"status": ("runs" if covered().nodes[key].runs else "not-yet",)}
        if all(value in facts[name] for name, value in wanted.items()):
            found.append(card_id(key))
    return found


@pytest.mark.browser
@pytest.mark.parametrize(
    "wanted",
    [
        {"chapter": "vlp"},
        {"side": "benchmark"},
        {"threat": "jailbreak", "access": "black-box"},
        {"target": "application", "change": "input", "stage": "deployment"},
        {"status": "runs"},
        {"stage": "pre-training", "status": "not-yet"},
        {"chapter": "vfm", "threat": "agent"},
    ],
    ids=lambda wanted: "-".join(wanted.values()),
)
def test_an_address_filters_the_cards(page: Page, address: str, wanted: dict[str, str]) -> None:
    page.goto(f"{address}book/atlas.html?" + "&".join(f"{name}={value}" for name, value in wanted.items()))
    expected = matching(**wanted)
    assert page.evaluate(VISIBLE) == expected
    expect(page.locator(".safescale-filters [role=status]")).to_have_text(f"{len(expected)} of 355 cards")
    for name, value in wanted.items():
        expect(page.locator(f"#atlas-{name}")).to_have_value(value)
    parts = set(page.evaluate(HEADINGS))
    assert all(any(card.startswith(f"{part}-") for card in expected) for part in parts)  # no heading without a card
    assert {f"atlas-{card.split('-')[1]}" for card in expected} <= parts


@pytest.mark.browser
def test_choices_stand_in_the_address_and_the_back_button_takes_them_back(page: Page, address: str) -> None:
    page.goto(f"{address}book/atlas.html")
    assert len(page.evaluate(VISIBLE)) == 355
    page.get_by_label("Threat", exact=True).select_option("Backdoor")
    page.get_by_label("Side", exact=True).select_option("Defense")
    assert parse_qs(urlsplit(page.url).query) == {"threat": ["backdoor"], "side": ["defense"]}
    assert page.evaluate(VISIBLE) == matching(threat="backdoor", side="defense")
    page.go_back()
    assert parse_qs(urlsplit(page.url).query) == {"threat": ["backdoor"]}
    expect(page.get_by_label("Side", exact=True)).to_have_value("")
    assert page.evaluate(VISIBLE) == matching(threat="backdoor")
    page.go_back()
    assert len(page.evaluate(VISIBLE)) == 355
    page.go_forward()
    assert page.evaluate(VISIBLE) == matching(threat="backdoor")
    page.reload()
    assert page.evaluate(VISIBLE) == matching(threat="backdoor")
    page.get_by_role("button", name="Show all cards").click()
    page.wait_for_function("location.search === ''")
    assert len(page.evaluate(VISIBLE)) == 355


# The word is not q: Sphinx's own search script reads that on every page, and fails where no results belong.
@pytest.mark.browser
def test_words_are_searched_by_keyboard_and_make_one_step_in_the_history(page: Page, address: str) -> None:
    page.goto(f"{address}book/atlas.html?chapter=vfm")
    box = page.get_by_role("searchbox", name="Search", exact=True)
    box.focus()
    page.keyboard.type("PATCH-fool vision")
    shown = page.evaluate(VISIBLE)
    assert PATCH in shown
    assert len(shown) < len(matching(chapter="vfm"))
    assert parse_qs(urlsplit(page.url).query) == {"chapter": ["vfm"], "find": ["PATCH-fool vision"]}
    page.keyboard.press("Enter")  # sends nothing
    assert page.evaluate(VISIBLE) == shown
    page.go_back()
    assert page.evaluate(VISIBLE) == matching(chapter="vfm")
    expect(box).to_have_value("")
    box.fill("no card says this")
    assert page.evaluate(VISIBLE) == []
    expect(page.locator(".safescale-filters [role=status]")).to_have_text("0 of 355 cards")


@pytest.mark.browser
def test_a_deep_link_shows_its_card_even_if_it_is_filtered_out(page: Page, address: str) -> None:
    page.goto(f"{address}book/atlas.html?chapter=llm#{PATCH}")
    assert page.evaluate(VISIBLE) == [PATCH, *matching(chapter="llm")]
    expect(page.locator(f"#{PATCH}")).to_be_in_viewport()
    expect(page.locator(".safescale-filters [role=status]")).to_contain_text("and 1 that the address names")
    page.get_by_label("Side", exact=True).select_option("Attack")  # a new choice is a new view
    assert page.evaluate(VISIBLE) == matching(chapter="llm", side="attack")


@pytest.mark.browser
def test_links_between_cards_work_while_filtered(page: Page, address: str) -> None:
    wanted = next(card for card in matching(status="not-yet", chapter="vlp", threat="adversarial"))
    page.goto(f"{address}book/atlas.html?status=not-yet")
    relative = page.locator(f"#{wanted} .safescale-status a").first
    target = str(relative.get_attribute("href")).removeprefix("#")
    expect(page.locator(f"#{target}")).to_be_hidden()
    relative.click()
    expect(page.locator(f"#{target}")).to_be_in_viewport()


@pytest.mark.browser
def test_unknown_values_in_an_address_are_as_good_as_none(page: Page, address: str) -> None:
    page.goto(f"{address}book/atlas.html?access=sideways&nonsense=1#nowhere")
    assert len(page.evaluate(VISIBLE)) == 355


@pytest.mark.browser
def test_the_link_of_a_card_leads_to_the_very_cell(page: Page, address: str) -> None:
    page.goto(f"{address}book/atlas.html#{PATCH}")
    page.locator(f"#{PATCH}").get_by_role("link", name="to the cell").click()
    cell = page.locator(".cell:target")
    expect(cell).to_be_in_viewport(timeout=20_000)  # a whole chapter loads first
    assert "Patch-Fool" in cell.inner_text()


@pytest.mark.browser
@pytest.mark.parametrize("path", ["atlas", "scorecard", "datasets", "coverage", "views"])
def test_without_the_script_everything_is_there(browser: Browser, address: str, path: str) -> None:
    with opened(browser, address, java_script_enabled=False) as page:
        page.goto(f"{address}book/{path}.html?chapter=vfm")
        for form in page.locator(".safescale-filters").all():
            expect(form).to_be_hidden()
        for kind in (".safescale-card", ".safescale-sortable tbody tr"):
            hidden = [place for place in page.locator(f"article {kind}").all()[::40] if not place.is_visible()]
            assert not hidden
        counts = {"atlas": (".safescale-card", 355), "datasets": (".safescale-sortable tbody tr", 142)}
        if path in counts:
            expect(page.locator(counts[path][0])).to_have_count(counts[path][1])


COLUMN = """name => {
  const table = document.querySelector("table.safescale-sortable");
  const heads = [...table.tHead.rows[0].cells].map((cell) => cell.textContent.trim());
  return [...table.tBodies[0].rows].map((row) => row.cells[heads.indexOf(name)].textContent.trim());
}"""


@pytest.mark.browser
@pytest.mark.parametrize("column", ["value", "n", "forwards", "seconds"])
def test_numbers_sort_as_numbers(page: Page, address: str, column: str) -> None:
    page.goto(f"{address}book/scorecard.html")
    page.locator(".dt-length select").select_option("-1")
    before = page.evaluate(COLUMN, column)
    head = page.locator("table.safescale-sortable thead th", has_text=re.compile(f"^{column}$"))
    for order in ("ascending", "descending"):
        head.get_by_role("button").focus()
        page.keyboard.press("Enter")
        expect(head).to_have_attribute("aria-sort", order)
        numbers = [float(text.replace(",", "")) for text in page.evaluate(COLUMN, column)]
        assert numbers == sorted(numbers, reverse=order == "descending")
        assert len(numbers) == len(before)
    assert len({text.count(",") for text in before}) > 1 or column != "forwards"  # a test of commas too


@pytest.mark.browser
def test_the_scorecard_is_filtered_and_searched_and_remembers_it(page: Page, address: str) -> None:
    every = scorecard(covered=covered())["outcomes"]
    page.goto(f"{address}book/scorecard.html")
    page.get_by_label("Threat", exact=True).select_option("Backdoor")
    wanted = [outcome for outcome in every if outcome["threat"] == "backdoor"]
    assert page.evaluate(COLUMN, "technique") == [outcome["title"] for outcome in wanted][:50]
    page.get_by_label("Search", exact=True).last.fill("WaNet")
    page.wait_for_function("location.search.includes('find=WaNet')")
    page.reload()
    expect(page.get_by_label("Threat", exact=True)).to_have_value("Backdoor")
    expect(page.get_by_label("Search", exact=True).last).to_have_value("WaNet")
    shown = page.locator(".dt-info")
    expect(shown).to_be_visible()
    key = "vfm.vit.adversarial_attack.patch"
    page.goto(f"{address}book/scorecard.html?find={key}")
    count = sum(outcome["technique"] == key for outcome in every)
    expect(shown).to_have_text(f"Rows 1 to {count} of {count} (of {len(every)})")


@pytest.mark.browser
def test_datasets_are_found_by_family_and_word(page: Page, address: str) -> None:
    page.goto(f"{address}book/datasets.html")
    expect(page.locator(".dt-info")).to_contain_text("of 142")
    page.get_by_label("Family", exact=True).select_option("Agents")
    assert set(page.evaluate(COLUMN, "family")) == {"Agents"}
    assert len(page.evaluate(COLUMN, "name")) == 24
    page.get_by_label("Family", exact=True).select_option("All")
    page.get_by_label("Search", exact=True).last.fill("CIFAR-100")
    assert "CIFAR-100" in page.evaluate(COLUMN, "name")


@pytest.mark.browser
def test_the_atlas_works_from_disk(browser: Browser, site: Path) -> None:
    """Without any server, the filters work too."""
    with opened(browser, "file://") as page:
        page.goto((site / "book" / "atlas.html").resolve().as_uri())
        page.get_by_label("Status", exact=True).select_option("Runs here")
        assert page.evaluate(VISIBLE) == matching(status="runs")
        page.goto((site / "book" / "scorecard.html").resolve().as_uri())
        expect(page.locator(".dt-info")).to_be_visible()
