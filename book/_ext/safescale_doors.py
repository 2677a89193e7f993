"""What the pages for readers, runners and teachers need beyond prose.

- `{launch-buttons}`: open a notebook in Colab or Binder; the target is the one address in `_config.yml`;
- `{execution-table}`: what each notebook costs, as measured when it was last run;
- `` {part}`02_vision_foundation_models: At full scale` ``: a link to a section of a notebook, named by its title.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import yaml
from docutils import nodes
from safescale_book import FromData, table
from sphinx import addnodes
from sphinx.util import logging
from sphinx.util.docutils import SphinxRole

if TYPE_CHECKING:
    from sphinx.application import Sphinx

logger = logging.getLogger(__name__)

SLOWEST = 8  # cells shown of a notebook


# ----------------------------------------------------------------------------------------------------- launch buttons


class Repository(NamedTuple):
    """Where the book's files can be fetched from: https://github.com/OWNER/NAME, and the branch."""

    address: str
    branch: str

    @property
    def path(self) -> str:
        """OWNER/NAME. Raises ValueError for an address that Colab and Binder do not take."""
        found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?", self.address)
        if not found:
            raise ValueError(f"repository.url must read https://github.com/OWNER/NAME, got {self.address!r}")
        return found[1]

    def colab(self, notebook: str) -> str:
        return f"https://colab.research.google.com/github/{self.path}/blob/{quote(self.branch)}/{quote(notebook)}"

    def binder(self, notebook: str) -> str:
        at = quote(self.branch, safe="")
        return f"https://mybinder.org/v2/gh/{self.path}/{at}?urlpath={quote(f'lab/tree/{notebook}', safe='')}"


def configured(root: Path) -> Repository | None:
    """The repository that `_config.yml` names, or None while it names none."""
    settings = yaml.safe_load((root / "_config.yml").read_text("utf-8")).get("repository") or {}
    address = settings.get("url") or ""
    return Repository(address, settings.get("branch") or "main") if address else None


class LaunchButtons(FromData):
    """`{launch-buttons}`: for each notebook a link to open it in Colab and one for Binder."""

    def render(self) -> list[nodes.Node]:
        self.env.note_dependency(str(self.root / "_config.yml"))
        repository = configured(self.root)
        if repository is None:
            text = "The buttons appear here once the book has a public address: the entry "
            return [nodes.paragraph("", text, nodes.literal("", "repository.url"), nodes.Text(" of _config.yml."))]
        rows = []
        for path in notebooks(self.root):
            name = f"notebooks/{path.name}"
            links = [_button("Colab", repository.colab(name)), _button("Binder", repository.binder(name))]
            rows.append((chapter(path), *links))
        return [table("Open a chapter on somebody else's machine", ("chapter", "Colab", "Binder"), rows)]


def _button(text: str, address: str) -> nodes.reference:
    return nodes.reference("", f"Open in {text}", refuri=address, classes=["safescale-launch"])


# --------------------------------------------------------------------------------------------------- execution times


class Cell(NamedTuple):
    """A code cell: the heading it stands under, and its first line."""

    section: str
    line: str


def notebooks(root: Path) -> list[Path]:
    return sorted((root / "notebooks").glob("[0-9]*.ipynb"))


def chapter(path: Path) -> str:
    return f"{int(path.stem[:2])}. {path.stem[3:].replace('_', ' ').capitalize()}"


def code_cells(notebook: dict[str, Any]) -> Iterator[Cell]:
    """Every code cell with the nearest heading above it."""
    section = ""
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            unfenced = re.sub(r"^(```|~~~|:::).*?^\1", "", source, flags=re.MULTILINE | re.DOTALL)
            section = next(reversed(re.findall(r"^#+ (.+)$", unfenced, re.MULTILINE)), section)
        elif cell["cell_type"] == "code":
            yield Cell(section, next((line for line in source.splitlines() if line.strip()), ""))


class ExecutionTable(FromData):
    """`{execution-table}`: seconds, memory and cells of each notebook, then the slowest cells of each."""

    def render(self) -> list[nodes.Node]:
        rows, details = [], []
        for path in notebooks(self.root):
            self.env.note_dependency(str(path))
            cells = list(code_cells(self.read(path)))
            costs = self.costs(path, len(cells))
            rows.append((self.link(path), str(len(cells)), *summary(costs)))
            if costs:
                details += self.details(path, cells, costs)
        header = ("notebook", "code cells", "seconds", "peak memory", "longest cell")
        return [table("What a run of each notebook costs", header, rows), *details]

    def costs(self, path: Path, cells: int) -> dict[str, Any] | None:
        """What was measured, if it was measured on the notebook as it is."""
        measured = path.parent / "measured" / f"{path.stem}.json"
        if not measured.is_file():
            return None
        found = self.read(measured)
        return found if len(found["cell_seconds"]) == cells else None

    def details(self, path: Path, cells: Sequence[Cell], costs: dict[str, Any]) -> list[nodes.Node]:
        slowest = sorted(zip(costs["cell_seconds"], cells, strict=True), key=lambda pair: -pair[0])[:SLOWEST]
        rows = [(cell.section, [nodes.literal("", cell.line)], f"{seconds:.1f}") for seconds, cell in slowest]
        return [
            table(f"Chapter {int(path.stem[:2])}: the slowest cells", ("section", "first line", "seconds"), rows),
            nodes.paragraph("", f"Chapter {int(path.stem[:2])} was measured on: {costs['machine']}."),
        ]

    def link(self, path: Path) -> nodes.Node:
        if f"notebooks/{path.stem}" not in self.env.found_docs:
            return nodes.Text(chapter(path))  # made, but not in the book
        target = {"reftype": "doc", "refdomain": "std", "reftarget": f"/notebooks/{path.stem}", "refexplicit": True}
        return addnodes.pending_xref("", nodes.inline("", chapter(path)), refdoc=self.env.docname, **target)


def summary(costs: dict[str, Any] | None) -> tuple[str, str, str]:
    """Seconds, memory and longest cell of one notebook, in words."""
    if costs is None:
        return "not measured yet", "", ""
    memory = f"{costs['peak_mib']:,} MiB" if costs["peak_mib"] else "unknown"
    return f"{costs['seconds']:.0f}", memory, f"{max(costs['cell_seconds']):.1f} s"


# ------------------------------------------------------------------------------------------------- links to sections


class part_link(nodes.Inline, nodes.TextElement):
    """Stands for a link to a section of a notebook until all pages have been read."""


class Part(SphinxRole):
    """`` {part}`STEM: title of a section` ``, or `` {part}`STEM` `` for the whole chapter.

    While the book lacks the notebook, the words stand without a link. A title that a notebook lacks fails a strict build.
    """

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        stem, _, title = self.text.partition(": ")
        link = part_link("", title or chapter(Path(stem)), page=f"notebooks/{stem}", title=title)
        self.set_source_info(link)
        return [link], []


def resolve_parts(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Put links in place of the parts."""
    for place in list(doctree.findall(part_link)):
        page, title = place["page"], place["title"]
        words: nodes.Element = nodes.inline("", place.astext())
        if page in app.env.found_docs:
            anchors = {link.astext(): link["anchorname"] for link in app.env.tocs[page].findall(nodes.reference)}
            if title and title not in anchors:
                logger.warning("{part}: %s has no section %r", page, title, location=place)
            address = app.builder.get_relative_uri(docname, page) + anchors.get(title, "")
            words = nodes.reference("", place.astext(), internal=True, refuri=address)
        place.replace_self(words)


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx's entry point."""
    app.add_directive("launch-buttons", LaunchButtons)
    app.add_directive("execution-table", ExecutionTable)
    app.add_node(part_link)
    app.add_role("part", Part())
    app.connect("doctree-resolved", resolve_parts)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
