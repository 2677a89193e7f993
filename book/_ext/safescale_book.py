"""What the book's website needs beyond stock Jupyter Book; each piece says why it is here.

- offline: MathJax from an installed package, no live-code script, so that no request leaves the site;
- notebooks: what JupyterLab needs but the site does not is taken out of their outputs before they are read;
- numbers: a chapter carries the survey's number, which its file name begins with;
- directives: model cards, coverage and benchmarks are made from data, never typed;
- pages: the theme's faults in accessibility and scripting are mended in the finished HTML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from shutil import copyfile, copytree
from typing import TYPE_CHECKING, Any

from bs4 import BeautifulSoup
from docutils import nodes
from sphinx import addnodes
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.config import Config
    from sphinx.environment import BuildEnvironment

    from safescale_lib.survey import Coverage, Node, NodeCoverage

logger = logging.getLogger(__name__)

VENDOR_MIME = "application/vnd.safescale."
CAPTION_FOR_LAB = '<div class="safescale-caption"'


# ---------------------------------------------------------------------------------------------------------- offline

MATHJAX = "tex-chtml-full.js"  # holds every TeX package: the smaller component fetches some of them when first used
MATHJAX_FONTS = "output/chtml/fonts/woff-v2"


def vendored_mathjax() -> Path:
    """Folder of the MathJax files in the package that carries them.

    The package is also a Sphinx extension, but as one it copies all 15 MB; the book needs one script and its fonts.
    """
    spec = find_spec("sphinx-mathjax-offline")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("MathJax is missing: install the book's requirements (package sphinx-mathjax-offline)")
    return Path(spec.submodule_search_locations[0], "static", "mathjax")


def use_vendored_mathjax(app: Sphinx, config: Config) -> None:
    """Point Sphinx at our copy.

    The menu is off because it would load further components. Formulas stay readable for screen readers: MathJax
    writes hidden MathML beside each.
    """
    config.mathjax_path = f"mathjax/{MATHJAX}"
    config.mathjax3_config = {"options": {"enableMenu": False}}


def copy_mathjax(static: Path) -> None:
    """Put the script and its fonts into the site."""
    source, target = vendored_mathjax(), static / "mathjax"
    copytree(source / MATHJAX_FONTS, target / MATHJAX_FONTS, dirs_exist_ok=True)
    copyfile(source / MATHJAX, target / MATHJAX)


def without_thebe(app: Sphinx, config: Config) -> None:
    """Unhook sphinx-thebe, which Jupyter Book always loads.

    It writes a script into every page that names another host and fails with "has already been declared".
    """
    for listeners in list(app.events.listeners.values()):
        for listener in list(listeners):
            if listener.handler.__module__.partition(".")[0] == "sphinx_thebe":
                app.disconnect(listener.id)
    app.registry.css_files[:] = [entry for entry in app.registry.css_files if "thebe" not in entry[0]]


# -------------------------------------------------------------------------------------------------------- notebooks


def prepare_notebook(app: Sphinx, docname: str, source: list[str]) -> None:
    """Shape a notebook's outputs for the site before myst-nb reads them; the file itself stays as it is."""
    if not str(app.env.doc2path(docname)).endswith(".ipynb"):
        return
    notebook = json.loads(source[0])
    notebook["cells"] = [part for cell in notebook["cells"] for part in _parts(cell, docname)]
    source[0] = json.dumps(notebook)


def _parts(cell: dict[str, Any], docname: str) -> list[dict[str, Any]]:
    """One cell, or several if it shows a figure and more: myst-nb gives every output of a cell the figure's name."""
    if cell["cell_type"] != "code":
        return [cell]
    for output in cell["outputs"]:
        # myst-nb warns of a type it cannot draw, though another type of the same output is drawn.
        for mime in [mime for mime in output.get("data", {}) if mime.startswith(VENDOR_MIME)]:
            del output["data"][mime]
    # The caption below a figure is for JupyterLab; here the figure has a numbered one.
    outputs = [output for output in cell["outputs"] if CAPTION_FOR_LAB not in _html(output)]
    settings = cell["metadata"].get("mystnb", {})
    if any(_is_picture(output) for output in outputs) and not settings.get("image", {}).get("alt"):
        logger.warning("cell %s shows a picture without an alt text", cell.get("id"), location=docname)
    groups: list[list[dict[str, Any]]] = [[]]
    for output in outputs:
        if groups[-1] and _is_picture(output) != _is_picture(groups[-1][-1]):
            groups.append([])
        groups[-1].append(output)
    if len(groups) == 1 or "figure" not in settings:
        return [{**cell, "outputs": outputs}]
    parts = []
    for position, group in enumerate(groups):
        metadata = {key: value for key, value in cell["metadata"].items() if key != "mystnb"}
        if _is_picture(group[0]):
            metadata["mystnb"] = settings
        part = {**cell, "outputs": group, "metadata": metadata}
        if position:
            part |= {
                "id": f"{cell.get('id', 'cell')}-{position}",
                "source": "# more of the output above",
            }  # never empty: skipped
            metadata["tags"] = [*metadata.get("tags", []), "remove-input"]
        parts.append(part)
    return parts


def _html(output: dict[str, Any]) -> str:
    text = output.get("data", {}).get("text/html", "")
    return text if isinstance(text, str) else "".join(text)


def _is_picture(output: dict[str, Any]) -> bool:
    return any(mime.startswith("image/") for mime in output.get("data", {}))


# ---------------------------------------------------------------------------------------------------------- numbers


def number_chapters(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Give each chapter the number in its file name: chapter 2 is 2 also while the book has no chapter 1.

    Runs after Sphinx has numbered sections and figures by position; returns the pages to write again.
    """
    moved = []
    for docname, sections in env.toc_secnumbers.items():
        named = re.match(r"(\d+)_", docname.rpartition("/")[2])
        if not named or not sections.get(""):
            continue
        number = int(named[1])

        def renumber(counted: Sequence[int] | None, number: int = number) -> tuple[int, ...] | None:
            return (number, *counted[1:]) if counted else None  # sections too deep to be numbered stay so

        env.toc_secnumbers[docname] = {anchor: renumber(counted) for anchor, counted in sections.items()}
        env.toc_fignumbers[docname] = {
            kind: {name: renumber(counted) for name, counted in figures.items()}
            for kind, figures in env.toc_fignumbers.get(docname, {}).items()
        }
        for numbered in (env.titles[docname], *env.tocs[docname].findall(nodes.reference)):
            if numbered.get("secnumber"):
                numbered["secnumber"] = renumber(numbered["secnumber"])
        moved.append(docname)
    return moved


# ------------------------------------------------------------------------------------------------------- directives


class FromData(SphinxDirective):
    """A directive that renders files of the repository. Files that are missing or wrong fail a strict build."""

    def run(self) -> list[nodes.Node]:
        try:
            return self.render()
        except (OSError, LookupError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}".replace(f"{self.root}/", "")
            logger.warning("{%s} cannot be rendered: %s", self.name, reason, location=self.get_location())
            return [nodes.warning("", nodes.paragraph("", f"This part could not be made. {reason}"))]

    def render(self) -> list[nodes.Node]:
        raise NotImplementedError

    @property
    def root(self) -> Path:
        return Path(self.env.srcdir)

    def read(self, path: Path) -> Any:
        """A JSON file of the repository; the page is rendered again when it changes."""
        self.env.note_dependency(str(path))
        return json.loads(path.read_text(encoding="utf-8"))

    def words(self, text: str) -> list[nodes.Node]:
        """A sentence in which backticks mark code."""
        return self.parse_inline(text)[0]

    def bullets(self, items: Sequence[str]) -> list[nodes.Node]:
        """A list of sentences, or nothing."""
        entries = [nodes.list_item("", nodes.paragraph("", "", *self.words(item))) for item in items]
        return [nodes.bullet_list("", *entries)] if entries else []

    def section(self, title: Iterable[nodes.Node], *content: nodes.Node, name: str) -> nodes.section:
        """A section with a heading; name: its anchor."""
        section = nodes.section("", nodes.title("", "", *title), *content, names=[name])
        self.state.document.note_implicit_target(section, section)
        return section


class ModelCards(FromData):
    """`{model-cards}`: a section for every model that ships with the book, from its card.json."""

    def render(self) -> list[nodes.Node]:
        shelf = self.root / "safescale_lib" / "zoo"
        if (shelf / "manifest.json").exists():
            self.env.note_dependency(str(shelf / "manifest.json"))
        paths = sorted(shelf.glob("weights/*/card.json"))
        if not paths:
            raise FileNotFoundError("no card.json below safescale_lib/zoo/weights")
        return [self.card(self.read(path)) for path in paths]

    def card(self, card: dict[str, Any]) -> nodes.section:
        facts = [
            ("architecture", card["architecture"]),
            ("parameters", f"{card['parameters']:,}"),
            ("file", f"{card['bytes'] / 1e6:.2f} MB in half precision"),
            ("data", self.words(card["data"])),
            ("recipe", "; ".join(_setting(key, value) for key, value in card["recipe"].items())),
            ("seed", card["seed"]),
            ("training time", f"{card['seconds']:,.0f} s on {card['machine']}"),
            ("intended use", self.words(card["intended_use"])),
            ("limits", self.words(card["limits"])),
        ]
        measured = [
            (row["metric"], f"{row['value']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}", f"{row['n']:,}")
            for row in card["metrics"]
        ]
        return self.section(
            [nodes.Text(f"{card['title']}: "), nodes.literal("", card["name"])],
            nodes.paragraph("", "", *self.words(card["summary"])),
            table(f"What {card['name']} measures on its test set", ("metric", "value", "95 % interval", "n"), measured),
            table(f"What {card['name']} is, how it was made and what it is for", ("property", "value"), facts, wrap=True),
            name=f"model-{card['name']}",
        )


class BenchmarkTable(FromData):
    """`{benchmark-table} NAME`: the table, its notes and how to read it, from benchmarks/results/NAME.json."""

    required_arguments = 1

    def render(self) -> list[nodes.Node]:
        result = self.read(self.root / "benchmarks" / "results" / f"{self.arguments[0]}.json")
        where = f"Measured on {result['machine']}" + (f", {result['date']}." if result.get("date") else ".")
        method = [nodes.paragraph("", "How it was measured:"), *self.bullets(result["notes"])] if result.get("notes") else []
        content = [table(result["title"], result["columns"], result["rows"]), nodes.paragraph("", where)]
        return [*self.bullets(result["readings"]), *content, *method]


class CoverageTables(FromData):
    """`{coverage}`: how much of the survey's taxonomy runs, by chapter, and every technique in its place."""

    def render(self) -> list[nodes.Node]:
        for path in sorted((self.root / "notebooks").glob("*.ipynb")):
            self.env.note_dependency(str(path))
        covered = measured_coverage(self.root)
        from safescale_lib.survey import chapters

        rows = [(f"{c.number}. {c.title}", *covered.count(c.key)) for c in chapters()]
        total = ("Whole survey", *covered.count())
        header = ("chapter", "run", "have a function", "techniques")
        return [
            table("Techniques of the survey that run in this book", header, [*rows, total]),
            self.baselines(covered),
            *(self.chapter(chapter, covered) for chapter in chapters()),
        ]

    def baselines(self, covered: Coverage) -> nodes.section:
        rows = [
            (self.path(entry.node), _functions(entry), self.link(entry), str(len(entry.outcomes)))
            for entry in covered.baselines
        ]
        intro = (
            "A baseline is a method that a branch of the survey starts from. It is not one of the survey's own techniques "
            "and never counts as one."
        )
        content = table("Baselines of this edition", ("branch", "functions", "notebook", "outcomes"), rows, wrap=True)
        return self.section([nodes.Text("Baselines")], nodes.paragraph("", intro), content, name="baselines")

    def chapter(self, chapter: Node, covered: Coverage) -> nodes.section:
        rows: list[str | Sequence[Cell]] = []
        for section in chapter.children:
            rows.append(f"{section.number} {section.title}: {covered.count(section.key)}")
            for branch in section.children:
                names = [self.technique(covered.nodes[leaf.key]) for leaf in branch.leaves()]
                rows.append((branch.title, str(covered.count(branch.key)).replace(" ", "\N{NO-BREAK SPACE}"), joined(names)))
        caption = f"{chapter.title}: {covered.count(chapter.key)} techniques run"
        content = table(caption, ("branch", "run", "techniques"), rows, wrap=True)
        return self.section([nodes.Text(f"{chapter.number}. {chapter.title}")], content, name=f"coverage-{chapter.key}")

    def technique(self, entry: NodeCoverage) -> list[nodes.Node]:
        """A technique's name; one that runs is set strong and leads to its notebook."""
        if not entry.runs:
            return [nodes.Text(entry.node.title)]
        return [nodes.strong("", "", self.link(entry, entry.node.title)), nodes.Text(" (runs)")]

    def link(self, entry: NodeCoverage, text: str = "") -> nodes.Node:
        """A reference to the page of the notebook that shows the first outcome."""
        if not entry.outcomes:
            return nodes.Text(text or "none yet")
        stem = Path(entry.outcomes[0].notebook).stem
        label = nodes.inline("", text or f"chapter {int(stem[:2])}")
        target = {"reftype": "doc", "refdomain": "std", "reftarget": f"/notebooks/{stem}", "refexplicit": True}
        return addnodes.pending_xref("", label, refdoc=self.env.docname, **target)

    @staticmethod
    def path(node: Node) -> str:
        from safescale_lib.survey import nodes as taxonomy

        above = [taxonomy()[key] for key in node.path]
        return ", ".join(f"{step.number} {step.title}".strip() for step in above[1:])


class CoverageNumber(SphinxRole):
    """`` {coverage}`runs` ``: a number inside prose: `runs`, `bound`, `leaves`, `baselines` or `papers`."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        from safescale_lib.survey import papers

        covered = measured_coverage(Path(self.env.srcdir))
        baselines = sum(len(entry.functions) for entry in covered.baselines)
        numbers = {**covered.count()._asdict(), "baselines": baselines, "papers": len(papers())}
        if self.text not in numbers:
            logger.warning("{coverage} knows %s, not %r", ", ".join(numbers), self.text, location=self.get_location())
            return [], []
        return [nodes.Text(f"{numbers[self.text]:,}")], []


@lru_cache(maxsize=1)  # importing the chapters takes seconds, and several pages ask
def measured_coverage(root: Path) -> Coverage:
    from safescale_lib.survey import coverage

    return coverage(root / "notebooks")


Cell = str | int | float | nodes.Node | Sequence[nodes.Node]


def table(caption: str, header: Sequence[str], rows: Iterable[str | Sequence[Cell]], *, wrap: bool = False) -> nodes.table:
    """A captioned table with row headings; a row that is one text heads the rows below it.

    wrap: let long cells break into lines; else only headings do, and a wide table scrolls.
    """
    width = len(header)
    group = nodes.tgroup("", cols=width)
    group += [nodes.colspec("", colwidth=1, stub=int(not column)) for column in range(width)]
    group += nodes.thead("", _row(header))
    group += nodes.tbody("", *(_row([row], span=width) if isinstance(row, str) else _row(row) for row in rows))
    return nodes.table("", nodes.title("", caption), group, classes=["safescale-data", *(["wrap"] if wrap else [])])


def _row(cells: Sequence[Cell], span: int = 1) -> nodes.row:
    more = {"morecols": span - 1} if span > 1 else {}
    return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", *_inline(cell)), **more) for cell in cells))


def _inline(cell: Cell) -> Sequence[nodes.Node]:
    if isinstance(cell, nodes.Node):
        return [cell]
    if isinstance(cell, (str, int, float)):
        return [nodes.Text(_short(cell))]
    return cell


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _setting(name: str, value: object) -> str:
    """One number of a recipe; a radius in pixel units reads as the field writes it."""
    number = f"{value * 255:.4g}/255" if name == "eps" and isinstance(value, float) else _short(value)
    return f"{name.replace('_', ' ')} {number}"


def joined(parts: Sequence[Sequence[nodes.Node]]) -> list[nodes.Node]:
    """The parts with a comma between them."""
    return [node for position, part in enumerate(parts) for node in ([nodes.Text(", ")] if position else []) + list(part)]


def _functions(entry: NodeCoverage) -> list[nodes.Node]:
    return joined([[nodes.literal("", f"{f.module.removeprefix('safescale_lib.')}.{f.name}")] for f in entry.functions])


# ------------------------------------------------------------------------------------------------------------ pages


def finish(app: Sphinx, exception: Exception | None) -> None:
    """After an HTML build: add MathJax and mend every page. Doing it twice changes nothing."""
    if exception or app.builder.format != "html":
        return
    site = Path(app.outdir)
    copy_mathjax(site / "_static")
    for path in sorted(site.rglob("*.html")):
        if "_static" not in path.relative_to(site).parts:
            path.write_text(mended(path.read_text(encoding="utf-8"), app.config), encoding="utf-8")


def mended(html: str, config: Config) -> str:
    """One finished page, made accessible and free of the theme's script errors."""
    page = BeautifulSoup(html, "html.parser")
    if page.body is None:  # the redirect at the root, a single <meta> tag
        refresh = str(page.find("meta"))
        return (
            f'<!DOCTYPE html>\n<html lang="{config.language}"><head><meta charset="utf-8"/>{refresh}'
            f"<title>{config.html_title}</title></head>"
            f'<body><main><h1>{config.html_title}</h1><p><a href="{_refresh_target(refresh)}">Open the book</a></p></main>'
            "</body></html>\n"
        )
    for mend in (_head, _formulas, _landmarks, _names, _tables, _exercises, _bibliography, _contents):
        mend(page)
    return re.sub(r"^\s*(<!DOCTYPE html>)\s*", r"\1\n", str(page))  # the parser adds an empty line there each time


def _refresh_target(refresh: str) -> str:
    found = re.search(r"url=([^\"]+)", refresh)
    return found[1] if found else "book/index.html"


COLOUR_MODE = """
    (() => {
      const root = document.documentElement;
      const mode = localStorage.getItem("mode") || "auto";
      const dark = mode === "auto" ? matchMedia("(prefers-color-scheme: dark)").matches : mode === "dark";
      root.dataset.mode = mode;
      root.dataset.theme = dark ? "dark" : "light";
    })();
"""


def _head(page: BeautifulSoup) -> None:
    """One viewport; and the colours are chosen before the first paint, where the theme first names none and logs an error."""
    for repeated in page.select('meta[name="viewport"]')[1:]:
        repeated.decompose()
    for script in page.select("head script[data-cfasync]"):
        script.string = COLOUR_MODE


def _formulas(page: BeautifulSoup) -> None:
    """MathJax loads where there are formulas; Sphinx loads it also where a page below in the contents has some."""
    if not page.select("article .math"):
        for script in page.select('script[src*="mathjax/"]'):
            script.decompose()
        for script in page.find_all("script", string=re.compile(r"^window\.MathJax = ")):
            script.decompose()


def _landmarks(page: BeautifulSoup) -> None:
    """Everything visible belongs to a landmark (axe: region); the theme's empty ones go."""
    for sidebar in page.select("#pst-primary-sidebar"):
        sidebar["role"], sidebar["aria-label"] = "complementary", "Book"
    for empty in page.select("header#pst-header, footer.bd-footer"):
        if not empty.get_text(strip=True) and not empty.find("button"):
            empty["hidden"] = ""


def _names(page: BeautifulSoup) -> None:
    """A control that shows text is named by it (axe: label-content-name-mismatch); one that shows an icon keeps its label."""
    for control in page.select("button[aria-label], summary[aria-label]"):
        if control.get_text(strip=True):
            del control["aria-label"]
    for summary in page.select("summary"):
        if not summary.get_text(strip=True) and not summary.get("aria-label"):
            summary["aria-label"] = "Show the pages below"
    for icon in page.select("i[class*=fa-], span[class*=fa-]"):
        icon["aria-hidden"] = "true"
        if icon.find_parent("button", attrs={"aria-label": True}):
            del icon["title"]  # it would count as a second name


def _tables(page: BeautifulSoup) -> None:
    """Headings say what they head. A head without words, which Markdown asks for, goes: the first column heads its rows."""
    for head in page.select("article thead"):
        if not head.get_text(strip=True) and head.parent:
            for row in head.parent.select("tbody tr"):
                row.find("td").name = "th"
            head.decompose()
    for heading in page.select("thead th:not([scope])"):
        heading["scope"] = "col"
    for heading in page.select("tbody th:not([scope])"):
        heading["scope"] = "row"


def _exercises(page: BeautifulSoup) -> None:
    """sphinx-exercise gives every exercise and every solution on a page the same id."""
    for body in page.select("section#exercise-content, section#solution-content"):
        del body["id"]


def _bibliography(page: BeautifulSoup) -> None:
    """The entries of a list are list items; docutils gives them a role that has been withdrawn."""
    for entry in page.select(".citation-list > .citation"):
        entry["role"] = "listitem"


def _contents(page: BeautifulSoup) -> None:
    """The theme's script expects a right-hand contents list on every page and fails where there is none."""
    content = page.select_one(".bd-content")
    if content and not page.select_one("div.bd-sidebar-secondary"):
        content.append(page.new_tag("div", attrs={"class": "bd-sidebar-secondary", "style": "display: none"}))


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx's entry point."""
    app.add_css_file("safescale.css")
    app.add_js_file("safescale.js", loading_method="defer")
    app.add_directive("model-cards", ModelCards)
    app.add_directive("benchmark-table", BenchmarkTable)
    app.add_directive("coverage", CoverageTables)
    app.add_role("coverage", CoverageNumber())
    app.connect("config-inited", use_vendored_mathjax)
    app.connect("config-inited", without_thebe)
    app.connect("source-read", prepare_notebook)
    app.connect("env-get-updated", number_chapters, priority=900)
    app.connect("build-finished", finish)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
