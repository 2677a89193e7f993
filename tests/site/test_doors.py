"""The pages for readers, runners and teachers, the page of costs, and the book on paper."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from bs4 import BeautifulSoup

Pages = dict[str, BeautifulSoup]
ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def doors(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "book" / "_ext"))
    return importlib.import_module("safescale_doors")


# --- doors ----------------------------------------------------------------------------------------------------------


@pytest.mark.site
def test_the_title_page_leads_to_the_three_doors(pages: Pages) -> None:
    cards = pages["book/index.html"].select(".safescale-door a[href]")
    assert [str(card["href"]) for card in cards] == [f"{name}.html#door-{name}" for name in ("read", "run", "teach")]
    for name in ("read", "run", "teach"):
        assert pages[f"book/{name}.html"].find(id=f"door-{name}")
        assert pages["book/how_to_use.html"].select_one(f"article a[href^='{name}.html']")


@pytest.mark.site
def test_the_paths_lead_into_sections_of_every_chapter_in_the_book(pages: Pages) -> None:
    links = [str(link["href"]) for link in pages["book/read.html"].select("article a[href*='notebooks/']")]
    for notebook in NOTEBOOKS:
        if f"notebooks/{notebook.stem}.html" in pages:
            assert sum(f"{notebook.stem}.html#" in link for link in links) >= 3
    assert not any(link.endswith("#") for link in links)


@pytest.mark.site
def test_the_buttons_wait_for_an_address(doors: ModuleType, pages: Pages) -> None:
    buttons = pages["book/run.html"].select(".safescale-launch")
    repository = doors.configured(ROOT)
    if repository is None:
        assert not buttons
        assert "repository.url" in pages["book/run.html"].article.get_text()
    else:
        assert len(buttons) == 2 * len(NOTEBOOKS)


def test_the_buttons_lead_to_one_configured_address(doors: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "_config.yml").write_text("repository:\n  url: https://github.com/some-one/the.book/\n  branch: a/b\n")
    repository = doors.configured(tmp_path)
    assert repository.colab("notebooks/01_x.ipynb") == (
        "https://colab.research.google.com/github/some-one/the.book/blob/a/b/notebooks/01_x.ipynb"
    )
    assert repository.binder("notebooks/01_x.ipynb") == (
        "https://mybinder.org/v2/gh/some-one/the.book/a%2Fb?urlpath=lab%2Ftree%2Fnotebooks%2F01_x.ipynb"
    )
    (tmp_path / "_config.yml").write_text("repository:\n  url: ''\n")
    assert doors.configured(tmp_path) is None


@pytest.mark.parametrize("address", ["https://example.org/a/b", "https://github.com/only-owner", "git@github.com:a/b.git"])
def test_an_address_that_no_button_takes_is_refused(doors: ModuleType, address: str) -> None:
    with pytest.raises(ValueError, match=r"repository\.url"):
        doors.Repository(address, "main").colab("x.ipynb")


def test_the_program_for_your_own_model_runs_on_a_full_size_checkpoint(tmp_path: Path) -> None:
    import numpy as np
    import torch
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification

    from safescale_lib.zoo.adapter import PixelClassifier, save_classifier

    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = ViTForImageClassification(ViTConfig(num_labels=1000))  # ViT-B/16 at 224 pixels
    save_classifier(PixelClassifier(vit, (0.5,) * 3, (0.5,) * 3), tmp_path / "checkpoint")
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for number, path in enumerate(paths):
        pixels = np.random.default_rng(number).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    outcome = loaded(ROOT / "book" / "examples" / "own_model.py").attacked(str(tmp_path / "checkpoint"), paths, steps=2)
    assert outcome.measured.n == 2
    assert outcome.cost.backwards > 0
    assert outcome.control is not None


# --- costs ----------------------------------------------------------------------------------------------------------


def test_cells_are_found_below_their_headings(doors: ModuleType) -> None:
    cells: list[dict[str, Any]] = [
        {"cell_type": "markdown", "source": "# Title\n\n## First\n\n```bash\n# no heading\n```\n"},
        {"cell_type": "code", "source": "\nx = 1\ny = 2"},
        {"cell_type": "markdown", "source": ["Words\n", "only"]},
        {"cell_type": "code", "source": ["z = 3"]},
    ]
    assert list(doors.code_cells({"cells": cells})) == [("First", "x = 1"), ("First", "z = 3")]


def test_costs_in_words(doors: ModuleType) -> None:
    costs = {"seconds": 12.34, "peak_mib": 2048, "cell_seconds": [1.0, 11.3]}
    assert doors.summary(costs) == ("12", "2,048 MiB", "11.3 s")
    assert doors.summary(costs | {"peak_mib": None})[1] == "unknown"
    assert doors.summary(None) == ("not measured yet", "", "")


@pytest.mark.site
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_page_of_costs_shows_what_was_measured(doors: ModuleType, notebook: Path, pages: Pages) -> None:
    page = pages["book/execution.html"]
    rows = [[cell.get_text(strip=True) for cell in row.select("th, td")] for row in page.select("table tbody tr")]
    (row,) = (row for row in rows if row[0] == doors.chapter(notebook))
    cells = [c for c in json.loads(notebook.read_text("utf-8"))["cells"] if c["cell_type"] == "code"]
    assert row[1] == str(len(cells))
    measured = notebook.parent / "measured" / f"{notebook.stem}.json"
    costs = json.loads(measured.read_text("utf-8")) if measured.exists() else None
    current = costs if costs and len(costs["cell_seconds"]) == len(cells) else None
    assert tuple(row[2:]) == doors.summary(current)
    if current:
        assert current["machine"] in page.get_text()


@pytest.mark.site
def test_the_changelog_is_the_one_of_the_repository(pages: Pages) -> None:
    first = next(line for line in (ROOT / "CHANGELOG.md").read_text("utf-8").splitlines() if line.startswith("## "))
    headings = [heading.get_text().rstrip("#") for heading in pages["book/changelog.html"].select("article h2")]
    assert first.removeprefix("## ") in headings


# --- paper ----------------------------------------------------------------------------------------------------------

TOY = {
    "index": "# The toy book\n\nFirst words.\n\n```{toctree}\none\ntwo\nlookup\n```\n",
    "one": "# Chapter one\n\n```{box}\n```\n\n<details><summary>Solution</summary><p>It is done.</p></details>\n\n"
    "See [the lookup page](lookup.md).\n\n```python\n" + "x = " + " + ".join(["12345"] * 60) + "  # THE END\n```\n",
    "two": "# Chapter two\n\n## A section\n\nLast words.\n",
    "lookup": "# Lookup\n\nOnly for the site.\n",
}
# As some extensions are: one says how to write its node for the builder "html" only, another names the one-page builder.
TOY_EXTENSION = """
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

class box(nodes.General, nodes.Element): pass
class other(nodes.General, nodes.Element): pass

class Box(SphinxDirective):
    def run(self): return [box()]

def write(self, node): self.body.append("<p>A box.")

def close(self, node): self.body.append("</p>")

def setup(app):
    app.add_node(box, html=(write, close))
    app.add_node(other, singlehtml=(write, close))
    app.add_directive("box", Box)
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory, browser: Any) -> Any:
    """A toy book of three pages, one of which stays out, printed as the whole book is."""
    from sphinx.application import Sphinx

    pypdf = pytest.importorskip("pypdf")
    folder = tmp_path_factory.mktemp("toy")
    for name, text in TOY.items():
        (folder / f"{name}.md").write_text(text)
    (folder / "toy_extension.py").write_text(TOY_EXTENSION)
    settings: dict[str, Any] = {
        "extensions": ["myst_parser", "toy_extension", "safescale_pdf"],
        "html_theme": "sphinx_book_theme",
        "html_static_path": [str(ROOT / "book" / "_static")],
        "print_leaves_out": ["lookup"],
        "project": "toy",
    }
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(ROOT / "book" / "_ext"))
        patched.syspath_prepend(str(folder))
        out = folder / "out"
        app = Sphinx(str(folder), None, str(out), str(out / "trees"), "singlehtml", settings, status=None, warning=None)
        app.build(force_all=True)
    assert app.statuscode == 0
    target = folder / "toy.pdf"
    # the browser of the other tests runs in this thread already, and a thread may hold one driver
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as threads:
        threads.submit(loaded(ROOT / "book" / "pdf.py").print_page, out / "index.html", target).result()
    return pypdf.PdfReader(target)


@pytest.mark.browser
def test_paper_shows_all_of_a_chapter_and_nothing_of_the_screen(printed: Any) -> None:
    text = " ".join(" ".join(page.extract_text() for page in printed.pages).split())
    for words in ("First words.", "A box.", "It is done.", "THE END", "Last words."):
        assert words in text
    assert "Only for the site." not in text
    assert "Search" not in text
    width = max(float(page.mediabox.width) for page in printed.pages)
    assert 594 < width < 597  # A4


@pytest.mark.browser
def test_paper_has_pages_an_outline_tags_and_no_link_to_what_is_left_out(printed: Any) -> None:
    def titles(entries: list[Any]) -> list[str]:
        return [title for e in entries for title in (titles(e) if isinstance(e, list) else [e.title])]

    outline = titles(printed.outline)
    assert {"Chapter one", "Chapter two", "A section"} <= set(outline)
    assert "Lookup" not in outline
    pages = [printed.get_destination_page_number(e) for e in printed.outline if not isinstance(e, list)]
    assert pages == sorted(pages)
    starts = [n for n, page in enumerate(printed.pages) if "Chapter two" in page.extract_text()]
    assert starts
    assert starts[-1] > 0, "a chapter begins a page"
    assert printed.trailer["/Root"]["/MarkInfo"]["/Marked"]
    for page in printed.pages:
        for note in page.get("/Annots", []):
            assert "lookup" not in str(note.get_object().get("/A", "")), "a dead link"
