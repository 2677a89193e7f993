"""Our Sphinx extension: the parts that a good build does not show."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.site

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def extension() -> ModuleType:
    spec = importlib.util.spec_from_file_location("safescale_book", ROOT / "book" / "_ext" / "safescale_book.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PICTURE = {"output_type": "display_data", "data": {"image/png": "", "text/plain": "a curve"}}
CAPTION = {"output_type": "display_data", "data": {"text/html": ['<div class="safescale-caption">', "It falls.</div>"]}}
CARD = {"output_type": "display_data", "data": {"text/html": "<div></div>", "application/vnd.safescale.outcome+json": {}}}


def cell(*outputs: dict[str, Any], alt: str = "A falling curve.", figure: bool = True) -> dict[str, Any]:
    settings = {"image": {"alt": alt}, "figure": {"name": "fig-a", "caption": "It falls."}} if figure else {}
    copies = [{**output, "data": dict(output["data"])} for output in outputs]
    return {"cell_type": "code", "id": "c", "source": "show()", "metadata": {"mystnb": settings}, "outputs": copies}


def test_a_caption_for_jupyterlab_is_dropped(extension: ModuleType) -> None:
    (part,) = extension._parts(cell(PICTURE, CAPTION), "chapter")
    assert part["outputs"] == [PICTURE]


def test_only_the_picture_becomes_the_figure(extension: ModuleType) -> None:
    before, picture, after = extension._parts(cell(CARD, PICTURE, CAPTION, CARD), "chapter")
    assert [list(part["outputs"][0]["data"]) for part in (before, picture, after)] == [
        ["text/html"],
        ["image/png", "text/plain"],
        ["text/html"],
    ]
    assert "mystnb" in picture["metadata"]
    assert "mystnb" not in before["metadata"] | after["metadata"]
    assert before["source"] == "show()"
    assert all(part["source"] and part["metadata"]["tags"] == ["remove-input"] for part in (picture, after))
    assert len({part["id"] for part in (before, picture, after)}) == 3


def test_other_cells_stay_as_they_are(extension: ModuleType) -> None:
    text = {"cell_type": "markdown", "source": "words", "metadata": {}}
    assert extension._parts(text, "chapter") == [text]
    (part,) = extension._parts(cell(figure=False), "chapter")
    assert part == cell(figure=False)


PAGE = """<!DOCTYPE html><html lang="en"><head><meta name="viewport"/><meta name="viewport"/>
<script data-cfasync="false">document.documentElement.dataset.mode = "";</script></head>
<body><div id="pst-primary-sidebar"><button aria-label="Search">Search <kbd>K</kbd></button>
<button aria-label="Search"><i class="fa-search"></i></button></div>
<main><div class="bd-content"><article><pre>a  b
  c</pre><section id="solution-content"></section><section id="solution-content"></section></article></div></main>
<script>window.MathJax = {}</script><script src="_static/mathjax/tex.js"></script></body></html>"""


def test_mending_a_page(extension: ModuleType) -> None:
    class Config:
        language, html_title = "en", "The book"

    once = extension.mended(PAGE, Config)
    assert extension.mended(once, Config) == once
    assert once.count("viewport") == 1
    assert once.count('aria-label="Search"') == 1  # the icon keeps its name, the text names itself
    assert "solution-content" not in once
    assert "bd-sidebar-secondary" in once
    assert "MathJax" not in once
    assert "mathjax" not in once
    assert "<pre>a  b\n  c</pre>" in once
    redirect = extension.mended('<meta http-equiv="Refresh" content="0; url=book/index.html" />\n', Config)
    assert "<title>The book</title>" in redirect
    assert 'href="book/index.html"' in redirect
    assert extension.mended(redirect, Config).count("<title>") == 1


@pytest.mark.parametrize(
    ("directive", "complaint"),
    [
        ("```{model-cards}\n```", "no card.json below safescale_lib/zoo/weights"),
        ("```{benchmark-table} absent\n```", "absent.json"),
        ("Today {coverage}`nothing` run.", "not 'nothing'"),
    ],
)
def test_missing_data_fails_a_strict_build(tmp_path: Path, directive: str, complaint: str) -> None:
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "index.md").write_text(f"# A page\n\n{directive}\n", "utf-8")
    settings = f"import sys\nsys.path.insert(0, {str(ROOT / 'book/_ext')!r})\nextensions = ['myst_parser', 'safescale_book']\n"
    (tmp_path / "conf.py").write_text(settings, "utf-8")
    build = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "-n", "--keep-going", "-q", "-b", "html", str(tmp_path), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert build.returncode != 0
    assert complaint in build.stderr
    assert str(tmp_path) + "/safescale_lib" not in build.stderr
