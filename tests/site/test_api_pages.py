"""The library's pages: complete, and linked with the notebooks in both directions."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from bs4 import BeautifulSoup, Tag

pytestmark = pytest.mark.site

Pages = dict[str, BeautifulSoup]
ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "safescale_lib"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
CHECKER_ONLY = ("TypeVar", "ParamSpec")


@pytest.fixture(scope="module")
def api() -> ModuleType:
    pytest.importorskip("sphinx_codeautolink")
    spec = importlib.util.spec_from_file_location("safescale_api", ROOT / "book" / "_ext" / "safescale_api.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def defined() -> Iterator[str]:
    """Full name of everything public that the library's files define at their top."""
    for path in sorted(LIBRARY.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for statement in ast.parse(path.read_text("utf-8")).body:
            if isinstance(statement, ast.FunctionDef | ast.ClassDef):
                names = [statement.name]
            elif isinstance(statement, ast.Assign | ast.AnnAssign):
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                names = [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
            else:
                continue
            for name in names:
                value = getattr(importlib.import_module(module), name, None)
                elsewhere = callable(value) and getattr(value, "__module__", module) not in (module, "typing", "types")
                ours = str(getattr(value, "__module__", "")).startswith("safescale_lib.")
                if not name.startswith("_") and type(value).__name__ not in CHECKER_ONLY and not (elsewhere and ours):
                    yield f"{module}.{name}"


def entries(pages: Pages) -> Counter[str]:
    """How many entries each name has on the library's pages."""
    api_pages = [page for path, page in pages.items() if path.startswith("book/api/")]
    return Counter(str(entry["id"]) for page in api_pages for entry in page.select("dl.py > dt.sig[id]"))


def test_every_public_name_has_exactly_one_entry(pages: Pages) -> None:
    names, found = list(defined()), entries(pages)
    assert len(names) > 200
    assert [name for name in names if found[name] != 1] == []


def test_every_function_and_class_has_words(pages: Pages) -> None:
    kinds = "dl.py.function > dt.sig, dl.py.class > dt.sig"
    silent = [
        entry["id"]
        for path, page in pages.items()
        if path.startswith("book/api/")
        for entry in page.select(kinds)
        if len(words(entry.find_next_sibling("dd"))) < 15
    ]
    assert silent == []


def test_no_entry_names_this_machine_or_leaves_a_type_unread(pages: Pages) -> None:
    for path, page in pages.items():
        if path.startswith("book/api/"):
            text = page.article.get_text()
            assert str(ROOT) not in text, path
            assert "~safescale_lib" not in text, path
            assert "object at 0x" not in text, path


def words(content: Any) -> str:
    assert isinstance(content, Tag)
    paragraph = content.find("p", recursive=False)
    return paragraph.get_text() if paragraph else ""


class Names:
    """What a notebook's names mean, as far as its imports say."""

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}

    def read(self, cell: ast.Module) -> None:
        for statement in cell.body:
            if isinstance(statement, ast.ImportFrom) and str(statement.module).startswith("safescale_lib"):
                package = importlib.import_module(str(statement.module))
                for alias in statement.names:
                    value = getattr(package, alias.name, None) or importlib.import_module(f"{package.__name__}.{alias.name}")
                    self.known[alias.asname or alias.name] = value
            for part in ast.walk(statement):
                hides = isinstance(part, ast.FunctionDef | ast.ClassDef) and part.name
                stored = isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store) and part.id
                self.known.pop(str(hides or stored), None)

    def meaning(self, code: ast.expr) -> Any:
        if isinstance(code, ast.Name):
            return self.known.get(code.id)
        if isinstance(code, ast.Attribute) and (inside := self.meaning(code.value)) is not None:
            return getattr(inside, code.attr, None)
        return None


def calls(cell: ast.Module, names: Names) -> Counter[str]:
    """The library's functions and classes that a cell calls, by full name."""
    found: Counter[str] = Counter()
    for part in ast.walk(cell):
        if isinstance(part, ast.Call) and (value := names.meaning(part.func)) is not None:
            module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
            if str(module).startswith("safescale_lib.") and "_" not in (name[:1],):
                found[f"{module}.{name}"] += 1
    return found


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_call_of_the_library_leads_to_its_entry_and_back(notebook: Path, pages: Pages) -> None:
    page = pages[f"notebooks/{notebook.stem}.html"]
    blocks = {block.get_text().strip(): block for block in page.select(".cell_input pre")}
    back = {
        str(entry["id"]): entry.find_next_sibling("dd").select(f".safescale-uses a[href*='{notebook.stem}.html#']")
        for path, api_page in pages.items()
        if path.startswith("book/api/")
        for entry in api_page.select("dl.py > dt.sig[id]")
    }
    names, checked = Names(), 0
    for cell in json.loads(notebook.read_text("utf-8"))["cells"]:
        if cell["cell_type"] != "code" or {"remove-input", "remove-cell"} & set(cell["metadata"].get("tags", ())):
            continue
        source = "".join(cell["source"])
        code = ast.parse(source)
        imports = ast.Module([part for part in code.body if isinstance(part, ast.ImportFrom)], [])
        names.read(imports)
        block = blocks[source.strip()]
        for name, times in calls(code, names).items():
            links = block.select(f'a.sphinx-codeautolink-a[href$="#{name}"]')
            assert len(links) >= times, f"{cell.get('id')}: {name} is called {times} times, linked {len(links)} times"
            assert back[name], f"the entry of {name} names no section of {notebook.stem}"
            checked += times
        names.read(code)
    assert checked > 20


def test_printed_sources_lead_to_the_library(pages: Pages) -> None:
    boxes = [
        box
        for path, page in pages.items()
        if path.startswith("notebooks/")
        for box in page.select(".cell_output .highlight-python")
    ]
    assert boxes
    headings = [box.find_previous("p") for box in boxes]
    named = [heading for heading in headings if heading and heading.get_text().startswith("safescale_lib.")]
    assert len(named) == len(boxes)
    entries = {str(entry["id"]) for page in pages.values() for entry in page.select("dl.py dt.sig[id]")}
    public = {heading.get_text().strip(): heading for heading in named if "._" not in heading.get_text()}
    assert all(heading.select_one(f"a[href*='#{name}']") for name, heading in public.items() if name in entries)
    assert public.keys() - entries <= {"safescale_lib.llm.jailbreak_defense.inference.MovingTarget.respond"}  # has no docstring
    assert sum(len(box.select("a.sphinx-codeautolink-a")) for box in boxes) >= len(boxes)


def test_a_technique_leads_to_its_card_and_its_paper(pages: Pages) -> None:
    from safescale_lib.survey import bindings

    entry_of = {
        str(entry["id"]): entry.find_next_sibling("dd")
        for path, page in pages.items()
        if path.startswith("book/api/")
        for entry in page.select("dl.py > dt.sig[id]")
    }
    for bound in bindings():
        entry = entry_of[f"{bound.module}.{bound.name}"]
        assert entry.select_one("a[href*='bibliography.html#']"), bound
        if "book/atlas.html" in pages:
            anchor = f"atlas-{bound.key.replace('.', '-').replace('_', '-')}"
            assert entry.select_one(f"a[href$='atlas.html#{anchor}']"), bound
            assert pages["book/atlas.html"].find(id=anchor), bound


def test_docstrings_become_text_and_nothing_else(api: ModuleType) -> None:
    text = "Climb, eps * steps, |delta| and x_ stay. `code` is code.\n\neps: radius. - no list\n\n- one\n- two\n\n    x = f(1)"
    made = "\n".join(api.prose(text, {"eps"}))
    assert r"eps \* steps, \|delta\| and x\_ stay" in made
    assert "``code``" in made
    assert "``eps``\\ : radius" in made
    assert "\n- one\n- two\n" in made
    assert ".. code-block:: python\n\n    x = f(1)" in made
    assert api.prose("", set()) == []
    assert "code-block:: text" in "\n".join(api.prose("    f(...): what", set()))


def test_a_cell_knows_what_earlier_cells_bound(api: ModuleType) -> None:
    bound: dict[str, str] = {}
    for code in ("from a import f, g", "import b as c", "x = c.d(1)", "def g(): return 2", "for i in []: pass"):
        bound |= api._binds(ast.parse(code).body[0])
    assert api._needed({"x", "y"}, bound) == ["import b as c", "x = c.d(1)"]
    assert api._needed({"g"}, bound) == ["def g(): pass"]
    assert api._needed({"i"}, bound) == ["i = None"]
