"""The built pages, read without a browser."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup, Tag

pytestmark = pytest.mark.site

Pages = dict[str, BeautifulSoup]
ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LOADED = {"script": "src", "img": "src", "source": "src", "iframe": "src", "video": "src", "audio": "src", "embed": "src"}


def loads(page: BeautifulSoup) -> Iterator[tuple[Tag, str]]:
    """Everything a browser fetches to show the page."""
    for name, attribute in LOADED.items():
        yield from ((tag, str(tag[attribute])) for tag in page.find_all(name, attrs={attribute: True}))
    for tag in page.find_all("link", href=True):
        if set(tag["rel"]) & {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "manifest"}:
            yield tag, str(tag["href"])


def outside(reference: str) -> bool:
    """Does it name another host, or the root of this one?"""
    parts = urlsplit(reference.strip())
    return parts.scheme != "data" and bool(parts.scheme or parts.netloc or reference.startswith("/"))


def test_every_expected_page_is_there(pages: Pages) -> None:
    named = ("index", "how_to_use", "responsible_use", "model_cards", "coverage", "benchmarks", "bibliography")
    expected = {f"book/{name}.html" for name in named} | {f"notebooks/{path.stem}.html" for path in NOTEBOOKS}
    assert NOTEBOOKS
    assert expected | {"index.html", "search.html"} <= set(pages)


def test_every_page_has_a_title_of_its_own_and_a_language(pages: Pages) -> None:
    titles: dict[str, str] = {}
    for path, page in pages.items():
        title = page.title.get_text(strip=True) if page.title else ""
        assert title, f"{path} has no title"
        assert page.select('html[lang="en"]'), f"{path} names no language"
        assert title not in titles, f"{path} has the title of {titles[title]}"
        titles[title] = path


def test_every_picture_has_an_alternative(pages: Pages) -> None:
    for path, page in pages.items():
        for image in page.find_all("img"):
            decorative = "logo__image" in image.get("class", []) and image.find_parent("a").get_text(strip=True)
            assert image.has_attr("alt"), f"{path}: {image['src']} has no alt attribute"
            assert decorative or str(image["alt"]).strip(), f"{path}: {image['src']} has an empty alt text"


def test_figures_have_a_number_and_a_caption(pages: Pages) -> None:
    for path, page in pages.items():
        for figure in page.select("article figure"):
            assert figure.select_one("figcaption .caption-number"), f"{path}: the figure {figure.get('id')} has no number"
            caption = "".join(text.get_text(strip=True) for text in figure.select("figcaption .caption-text"))
            assert caption, f"{path}: the figure {figure.get('id')} has no caption"


def test_tables_of_our_data_have_a_caption_and_headings(pages: Pages) -> None:
    for path, page in pages.items():
        for table in page.select(".safescale-table table, table.safescale-data"):
            caption = " ".join(text.get_text(strip=True) for text in table.find_all("caption"))
            assert caption, f"{path}: a table has no caption"
            assert all(heading.get("scope") for heading in table.find_all("th")), f"{path}: {caption}"


def test_pages_fetch_nothing_from_another_host(pages: Pages) -> None:
    for path, page in pages.items():
        for tag, reference in loads(page):
            assert not outside(reference), f"{path} fetches {reference} ({tag.name})"
        inline = " ".join(script.get_text() for script in page.find_all("script", src=False))
        assert not re.search(r"https?://", inline), f"{path}: an inline script names another host"


def test_style_sheets_fetch_nothing_from_another_host(site: Path) -> None:
    sheets = list(site.rglob("*.css"))
    assert any(sheet.name == "safescale.css" for sheet in sheets)
    for sheet in sheets:
        text = re.sub(r"/\*.*?\*/", "", sheet.read_text("utf-8"), flags=re.DOTALL)
        for reference in re.findall(r"""(?:url\(|@import)\s*["']?([^"')\s]+)""", text):
            assert not outside(reference), f"{sheet.name} fetches {reference}"
            if not reference.startswith(("data:", "#")):
                target = sheet.parent / urlsplit(reference).path
                assert target.exists(), f"{sheet.name}: {reference} is missing"


def test_links_and_anchors_lead_somewhere(site: Path, pages: Pages) -> None:
    anchors = {path: {str(tag["id"]) for tag in page.find_all(id=True)} for path, page in pages.items()}
    for path, page in pages.items():
        links = [(tag, str(tag["href"])) for tag in page.find_all("a", href=True)]
        for _, reference in [*links, *loads(page)]:
            parts = urlsplit(reference)
            if parts.scheme or parts.netloc:
                continue
            assert not reference.startswith("/"), f"{path}: {reference} breaks under a subpath"
            target = ((site / path).parent / unquote(parts.path)).resolve() if parts.path else (site / path).resolve()
            assert target.is_file(), f"{path}: {reference} is missing"
            inside = target.relative_to(site.resolve()).as_posix()
            if parts.fragment and inside in anchors:
                assert unquote(parts.fragment) in anchors[inside], f"{path}: {reference} leads to no anchor"


def test_ids_are_unique(pages: Pages) -> None:
    for path, page in pages.items():
        ids = [str(tag["id"]) for tag in page.find_all(id=True)]
        assert not {name for name in ids if ids.count(name) > 1}, path


def test_no_path_of_this_machine_is_published(site: Path) -> None:
    places = {str(ROOT), sys.prefix, tempfile.gettempdir(), str(Path.home())} - {"/"}
    private = re.compile(
        "|".join(f"{re.escape(place)}/" for place in sorted(places)) + r"|/(?:home|Users)/\w+/|[A-Z]:\\Users\\"
    )
    read = [
        *site.glob("*.html"),
        *site.glob("book/*"),
        *site.glob("notebooks/*"),
        *site.glob("*.js"),
        *site.glob("_sources/**/*"),
    ]
    assert read
    for path in filter(Path.is_file, read):
        found = private.search(path.read_text("utf-8"))
        assert not found, f"{path.relative_to(site)} names {found and found[0]}"


def test_mathjax_is_loaded_where_there_are_formulas_only(site: Path, pages: Pages) -> None:
    for path, page in pages.items():
        loaded = any("mathjax" in reference for _, reference in loads(page))
        assert loaded == bool(page.select("article .math")), path
    assert sum(file.stat().st_size for file in (site / "_static/mathjax").rglob("*") if file.is_file()) < 2.5e6


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_chapter_shows_all_of_its_notebook(notebook: Path, pages: Pages) -> None:
    page = pages[f"notebooks/{notebook.stem}.html"]
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", ())]
    html = "".join("".join(data.get("text/html", "")) for data in outputs)
    for kind in ("safescale-outcome", "safescale-claim", "safescale-table"):
        assert len(page.select(f".{kind}")) == html.count(f'class="{kind}"'), kind
    assert len(page.select("article figure img")) == sum("image/png" in data for data in outputs)
    assert not page.select(".safescale-caption")
    number = int(notebook.stem[:2])
    assert page.select_one("article h1").get_text().startswith(f"{number}. ")
    for caption in page.select("figcaption .caption-number"):
        assert caption.get_text().startswith(f"Figure {number}."), caption.get_text()


def test_the_model_cards_are_those_of_the_zoo(pages: Pages) -> None:
    from safescale_lib import zoo

    page = pages["book/model_cards.html"]
    assert zoo.names()
    for name in zoo.names():
        card = zoo.card(name)
        section = page.select_one(f"section#model-{name}")
        assert section, f"no card of {name}"
        text = section.get_text(" ")
        for row in card["metrics"]:
            assert row["metric"] in text
            assert f"{row['low']:.3f} to {row['high']:.3f}" in text
        assert f"{card['parameters']:,}" in text


def test_coverage_is_computed(pages: Pages) -> None:
    from safescale_lib.survey import chapters, coverage

    covered, page = coverage(), pages["book/coverage.html"]
    rows = [[cell.get_text(strip=True) for cell in row.select("th, td")] for row in page.select("table tbody tr")]
    for chapter in chapters():
        assert [f"{chapter.number}. {chapter.title}", *map(str, covered.count(chapter.key))] in rows
    for entry in covered.leaves:
        assert entry.node.title in page.get_text(" "), entry.node.key
    assert f"{covered.count().leaves} techniques" in " ".join(pages["book/index.html"].article.get_text().split())
