"""The atlas and what is read off it: cards, coverage matrix, scorecard, views; all made from data, never typed.

- a cell that shows an outcome carries an anchor, so that a card leads to the very cell;
- filters and sorting work in the page, without a server; without a script the pages show everything;
- the scorecard and its schema are also published as files at the site's root.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlencode

from docutils import nodes
from docutils.parsers.rst import directives
from safescale_book import FromData, joined, measured_coverage, table
from sphinx import addnodes

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment
    from sphinx.writers.html5 import HTML5Translator

    from safescale_lib.survey import Card, Coverage, Entry, Node, NodeCoverage, Paper

OUTCOME_MIME = "application/vnd.safescale.outcome+json"
OUTCOMES_ON_A_CARD = 6  # more stand in the scorecard
DATATABLES = "datatables"  # folder of the vendored script in the site's static files


# ------------------------------------------------------------------------------------------------------------ elements


class Element(nodes.General, nodes.TextElement):
    """Any HTML element: `tag` with `attributes`. As a TextElement it may hold links."""


class Inline(nodes.Inline, Element):
    """The same inside a line of text."""


def tag(
    name: str, /, *content: str | nodes.Node, kind: type[Element] = Element, id: str = "", css: str = "", **attributes: str
) -> Element:
    """An element with content; an underscore in an attribute's name is a hyphen in HTML."""
    made = kind("", "", *(nodes.Text(part) if isinstance(part, str) else part for part in content))
    made["tag"], made["attributes"] = name, {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    made["classes"] = css.split()
    made["ids"] = [id] if id else []
    return made


def visit_element(self: HTML5Translator, node: Element) -> None:
    self.body.append(self.starttag(node, node["tag"], "", **node["attributes"]))


def depart_element(self: HTML5Translator, node: Element) -> None:
    if node["tag"] != "input":
        self.body.append(f"</{node['tag']}>")


# ------------------------------------------------------------------------------------------------------------- anchors


def anchor_cells(app: Sphinx, docname: str, source: list[str]) -> None:
    """Before each cell that shows an outcome, a target: the cell gets the anchor `cell-ID`."""
    if not str(app.env.doc2path(docname)).endswith(".ipynb"):
        return
    notebook = json.loads(source[0])
    notebook["cells"] = [part for cell in notebook["cells"] for part in (*_anchor(cell), cell)]
    source[0] = json.dumps(notebook)


def _anchor(cell: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if any(OUTCOME_MIME in output.get("data", {}) for output in cell.get("outputs", ())):
        yield {"cell_type": "markdown", "id": f"{cell['id']}-anchor", "metadata": {}, "source": f"(cell-{cell['id']})="}


def anchor(key: str) -> str:
    """Where the atlas shows a node of the taxonomy."""
    return "atlas-" + re.sub(r"[._]", "-", key)


def atlas_address(**filters: str) -> str:
    """The atlas, filtered, from a page beside it."""
    return f"atlas.html?{urlencode(filters)}"


def plain_where_nothing_is_found(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, content: nodes.Node
) -> nodes.Node | None:
    """A function's name stays plain text where its page does not exist."""
    return content if node.get("safescale_optional") else None


# ---------------------------------------------------------------------------------------------------------- directives


class FromSurvey(FromData):
    """A directive that renders the survey, the cards and what the notebooks measured."""

    @property
    def covered(self) -> Coverage:
        for path in sorted((self.root / "notebooks").glob("*.ipynb")):
            self.env.note_dependency(str(path))
        for path in sorted((self.root / "safescale_lib" / "survey" / "data").rglob("*.*")):
            self.env.note_dependency(str(path))
        return measured_coverage(self.root)

    def reference(self, domain: str, kind: str, target: str, text: str | nodes.Node, **more: Any) -> addnodes.pending_xref:
        content = nodes.inline("", text) if isinstance(text, str) else text
        facts = {"refdomain": domain, "reftype": kind, "reftarget": target, "refexplicit": True, **more}
        return addnodes.pending_xref("", content, refdoc=self.env.docname, refwarn=True, **facts)

    def cell(self, entry: Entry, text: str) -> addnodes.pending_xref:
        """A link to the cell that shows an outcome."""
        return self.reference("std", "ref", f"cell-{entry.cell}".lower(), text)

    def card_link(self, node: Node) -> addnodes.pending_xref:
        return self.reference("std", "ref", anchor(node.key), node.title)

    def function(self, module: str, name: str) -> addnodes.pending_xref:
        """A function's name, which leads to its page where there is one."""
        short = nodes.literal("", f"{module.removeprefix('safescale_lib.')}.{name}")
        found = self.reference("py", "func", f"{module}.{name}", short, safescale_optional=True)
        found["refwarn"] = False
        return found

    def cite(self, paper: Paper) -> list[nodes.Node]:
        return self.words(f"{{cite:p}}`{paper.id}`")

    def place(self, title: str, key: str, *content: nodes.Node) -> nodes.section:
        """A section of the page that other pages can refer to."""
        made = nodes.section("", nodes.title("", title), *content, ids=[anchor(key)], names=[anchor(key)])
        self.state.document.note_explicit_target(made, made)
        return made


class Atlas(FromSurvey):
    """`{atlas}`: a card for every leaf of the taxonomy, with filters."""

    def render(self) -> list[nodes.Node]:
        from safescale_lib.survey import chapters

        covered = self.covered
        return [self.filters(), *(self.chapter(chapter, covered) for chapter in chapters())]

    def filters(self) -> Element:
        """The form; hidden until the script that answers it is there."""
        from safescale_lib.survey import AXES, SIDES, THREATS, chapters

        choices = {
            "chapter": ("Chapter", {chapter.key: f"{chapter.number}. {chapter.title}" for chapter in chapters()}),
            "side": ("Side", _titles(SIDES)),
            "threat": ("Threat", _titles(THREATS)),
            **{name: (axis.title, _titles(axis.values)) for name, axis in AXES.items()},
            "status": ("Status", {"runs": "Runs here", "not-yet": "Not yet"}),
        }
        words = tag("input", id="atlas-find", type="search", name="find", autocomplete="off")
        fields = [_field("find", "Search", words)]
        for name, (title, values) in choices.items():
            options = [tag("option", "All", value=""), *(tag("option", text, value=value) for value, text in values.items())]
            fields.append(_field(name, title, tag("select", *options, id=f"atlas-{name}", name=name)))
        return tag(
            "form",
            *fields,
            tag("button", "Show all cards", type="reset"),
            tag("p", role="status", css="safescale-count"),
            css="safescale-filters",
            role="search",
            aria_label="Filter the cards",
            hidden="",
        )

    def chapter(self, chapter: Node, covered: Coverage) -> nodes.section:
        sections = [
            self.place(
                f"{section.number} {section.title}", section.key, *(self.branch(branch, covered) for branch in section.children)
            )
            for section in chapter.children
        ]
        count = nodes.paragraph("", f"{covered.count(chapter.key)} techniques run.")
        return self.place(f"{chapter.number}. {chapter.title}", chapter.key, count, *sections)

    def branch(self, branch: Node, covered: Coverage) -> nodes.Node:
        """A category with its cards, or the card of a category that is a leaf."""
        cards = [self.card(covered.nodes[leaf.key], covered) for leaf in branch.leaves()]
        return cards[0] if branch.level == "leaf" else self.place(branch.title, branch.key, *cards)

    def card(self, entry: NodeCoverage, covered: Coverage) -> Element:
        from safescale_lib.survey import AXES, card

        own, name = card(entry.node.key), anchor(entry.node.key)
        tags = {f"data_{axis}": " ".join(own.tags.on(axis)) for axis in AXES}
        link = tag("a", own.node.title, " ", tag("span", "#", kind=Inline, aria_hidden="true"), kind=Inline, href=f"#{name}")
        made = tag(
            "article",
            tag("p", link, id=f"{name}-title", css="safescale-title"),
            tag("p", _path(own.node), css="safescale-path"),
            tag("p", own.what),
            self.threat_model(own),
            self.tags(own),
            tag("ul", *(tag("li", *self.paper(found)) for found in own.papers), css="safescale-papers", aria_label="Papers"),
            *(self.runs(entry) if entry.runs else [self.not_yet(own, covered)]),
            id=name,
            css="safescale-card",
            aria_labelledby=f"{name}-title",
            data_chapter=own.node.path[0],
            data_side=own.side,
            data_threat=own.threat,
            data_status="runs" if entry.runs else "not-yet",
            **tags,
        )
        made["names"] = [name]
        self.state.document.note_explicit_target(made, made)
        return made

    @staticmethod
    def threat_model(card: Card) -> Element:
        from safescale_lib.survey import AXES

        goal, sees, budget = {
            "attack": ("Attacker's goal", "Access", "Budget"),
            "defense": ("Protects", "Needs", "Cost"),
            "benchmark": ("Measures", "Needs", "Runs"),
        }[card.side]
        access = AXES["access"].values[card.tags.access]
        facts = ((goal, card.goal), (sees, f"{access.title}. {access.meaning}"), (budget, card.budget))
        return tag("dl", *(part for name, text in facts for part in (tag("dt", name), tag("dd", text))))

    @staticmethod
    def tags(card: Card) -> Element:
        from safescale_lib.survey import AXES, SIDES, THREATS

        titles = [SIDES[card.side].title, THREATS[card.threat].title]
        titles += [axis.values[value].title for name, axis in AXES.items() for value in card.tags.on(name)]
        return tag("ul", *(tag("li", title) for title in titles), css="safescale-tags", aria_label="Tags")

    def paper(self, paper: Paper) -> list[nodes.Node]:
        short = paper.short_name if paper.short_name and not paper.title.startswith(paper.short_name) else ""
        return [nodes.Text(f"{short}: {paper.title} " if short else f"{paper.title} "), *self.cite(paper)]

    def runs(self, entry: NodeCoverage) -> list[Element]:
        seen: dict[tuple[Any, ...], Entry] = {}  # of several seeds the first
        for found in entry.outcomes:
            seen.setdefault((found.outcome.get("method"), found.outcome["metric"], found.outcome["against"]), found)
        first, shown_here = entry.outcomes[0], list(seen.values())[:OUTCOMES_ON_A_CARD]
        more = len(entry.outcomes) - len(shown_here)
        functions = joined([[self.function(bound.module, bound.name)] for bound in entry.functions])
        shown = tag(
            "p", tag("strong", "Runs here", kind=Inline), ": ", self.cell(first, "to the cell"), ". Functions: ", *functions
        )
        caption = f"Outcomes of {entry.node.title}"
        parts = [shown, outcome_table(caption, [self.outcome(found) for found in shown_here])]
        if more > 0:
            address = f"scorecard.html?{urlencode({'find': entry.node.key})}"
            parts.append(tag("p", tag("a", f"{more} more in the scorecard", kind=Inline, href=address)))
        return [tag("div", *parts, css="safescale-status")]

    def outcome(self, entry: Entry) -> Element:
        outcome = entry.outcome
        method = str(outcome.get("method") or outcome["metric"])
        return tag(
            "tr",
            tag("th", self.cell(entry, method), scope="row"),
            tag("td", outcome["metric"]),
            tag("td", f"{outcome['value']:.3f} [{outcome['low']:.3f}, {outcome['high']:.3f}]"),
            tag("td", f"{outcome['n']:,}"),
            tag("td", _number(outcome["control"])),
            tag("td", _number(outcome["utility"])),
        )

    def not_yet(self, card: Card, covered: Coverage) -> Element:
        from safescale_lib.survey import nearest_running, node

        status = tag("strong", "Not yet", kind=Inline)
        near = nearest_running(card.node.key, covered)
        if near is None:
            return tag("p", status, ": nothing of its threat runs in this edition.", css="safescale-status")
        where = node(near.node.path[1])
        return tag(
            "p",
            status,
            ". Nearest running relative: ",
            self.card_link(near.node),
            f" ({where.number} {where.title}), ",
            self.cell(near.outcomes[0], "to its cell"),
            ".",
            css="safescale-status",
        )


def outcome_table(caption: str, rows: Sequence[Element]) -> Element:
    header = ("method", "metric", "value [95 % interval]", "n", "control", "utility")
    return data_table(caption, [tag("th", name, scope="col") for name in header], rows)


def data_table(caption: str, header: Sequence[Element], rows: Iterable[Element], **attributes: str) -> Element:
    """A captioned table that scrolls inside its own box, as those of the notebooks do."""
    inside = tag("table", tag("caption", caption), tag("thead", tag("tr", *header)), tag("tbody", *rows), **attributes)
    return tag("div", inside, css="safescale-table")


class CoverageMatrix(FromSurvey):
    """`{coverage-matrix}`: threat x family, leaves that run of all; each cell leads to these leaves in the atlas."""

    def render(self) -> list[nodes.Node]:
        from safescale_lib.survey import THREATS, cards, chapters

        covered, families = self.covered, chapters()
        runs: defaultdict[tuple[str, str], list[bool]] = defaultdict(list)
        for key, card in cards().items():
            for threat in (card.threat, ""):
                for family in (card.node.path[0], ""):
                    runs[threat, family].append(covered.nodes[key].runs)
        header = ["threat", *(family.title.removesuffix(" Models") for family in families), "all"]
        columns = [*(family.key for family in families), ""]
        rows = [
            tag(
                "tr",
                tag("th", name, scope="row"),
                *(self.count(runs.get((threat, family), []), threat, family) for family in columns),
            )
            for threat, name in [*_titles(THREATS).items(), ("", "All threats")]
        ]
        caption = "Techniques that run, by threat and family: running / all"
        made = data_table(caption, [tag("th", name, scope="col") for name in header], rows)
        made["classes"].append("safescale-matrix")
        return [made]

    @staticmethod
    def count(runs: Sequence[bool], threat: str, family: str) -> Element:
        """One cell: the count as text, a bar as long as the share, and a shade."""
        if not runs:
            return tag("td", tag("span", "\N{EN DASH}", kind=Inline))
        filters = {name: value for name, value in (("threat", threat), ("chapter", family)) if value}
        link = tag("a", f"{sum(runs)} / {len(runs)}", kind=Inline, href=atlas_address(**filters))
        share = f"--share: {sum(runs) / len(runs):.3f}"
        return tag("td", link, style=share, css="some" if any(runs) else "none")


class Scorecard(FromSurvey):
    """`{scorecard}`: every outcome in one table, and where to get it as a file."""

    header = (
        "technique", "method", "metric", "value", "95 % interval", "n", "control", "utility", "adapted to",
        "forwards", "backwards", "queries", "seconds", "seed",
    )  # fmt: skip

    def render(self) -> list[nodes.Node]:
        self.covered  # noqa: B018  the page depends on the data
        document = measured_scorecard(self.root)
        up = "../" * self.env.docname.count("/")
        files = tag(
            "p",
            "As files: ",
            tag("a", "scorecard.json", kind=Inline, href=f"{up}scorecard.json"),
            ", ",
            tag("a", "scorecard.schema.json", kind=Inline, href=f"{up}scorecard.schema.json"),
            ".",
        )
        rows = [self.row(outcome) for outcome in document["outcomes"]]
        filters = json.dumps({"chapter": "Chapter", "side": "Side", "threat": "Threat", "metric": "Metric"})
        caption = f"The {len(rows):,} outcomes of this edition"
        header = [tag("th", name, scope="col") for name in self.header]
        return [files, data_table(caption, header, rows, css="safescale-sortable", data_filters=filters)]

    def row(self, outcome: Mapping[str, Any]) -> Element:
        from safescale_lib.survey import SIDES, THREATS, node

        cost, against = outcome["cost"], outcome["against"]
        link = self.reference("std", "ref", f"cell-{outcome['cell']}".lower(), outcome["title"])
        technique = tag("th", link, scope="row", data_search=f"{outcome['title']} {outcome['technique']}")
        cells = [
            tag("td", outcome["method"]),
            tag("td", outcome["metric"]),
            _sortable(outcome["value"], f"{outcome['value']:.3f}"),
            _sortable(outcome["low"], f"{outcome['low']:.3f} to {outcome['high']:.3f}"),
            _sortable(outcome["n"], f"{outcome['n']:,}"),
            _sortable(outcome["control"], _number(outcome["control"])),
            _sortable(outcome["utility"], _number(outcome["utility"])),
            tag("td", self.reference("std", "ref", anchor(against), node(against).title) if against else "\N{EN DASH}"),
            *(_sortable(cost[name], f"{cost[name]:,}") for name in ("forwards", "backwards", "queries")),
            _sortable(cost["seconds"], f"{cost['seconds']:,.2f}"),
            _sortable(outcome["seed"], "\N{EN DASH}" if outcome["seed"] is None else str(outcome["seed"])),
        ]
        chapter = node(node(outcome["technique"]).path[0])
        return tag(
            "tr",
            technique,
            *cells,
            data_chapter=f"{chapter.number}. {chapter.title}",
            data_side=SIDES[outcome["side"]].title if outcome["side"] else "",
            data_threat=THREATS[outcome["threat"]].title if outcome["threat"] else "",
            data_metric=outcome["metric"],
        )


class ScorecardFields(FromSurvey):
    """`{scorecard-fields}`: what each field of the JSON file means, from its schema."""

    def render(self) -> list[nodes.Node]:
        self.covered  # noqa: B018  the page depends on the data
        from safescale_lib.survey.scorecard import schema

        document = schema()
        outcome = document["properties"]["outcomes"]["items"]
        return [
            table("Fields of the document", ("field", "type", "meaning"), list(_fields(document)), wrap=True),
            table("Fields of an outcome", ("field", "type", "meaning"), list(_fields(outcome)), wrap=True),
        ]


class Views(FromSurvey):
    """`{views}`: the techniques along each axis that the literature sorts them by."""

    def render(self) -> list[nodes.Node]:
        from safescale_lib.survey import AXES

        return [self.axis(name, self.covered) for name in AXES]

    def axis(self, name: str, covered: Coverage) -> nodes.section:
        from safescale_lib.survey import AXES, cards

        axis = AXES[name]
        on = {value: [card for card in cards().values() if value in card.tags.on(name)] for value in axis.values}
        rows = [
            (
                axis.values[value].title,
                *(str(sum(card.side == side for card in found)) for side in ("attack", "defense", "benchmark")),
                str(len(found)),
                str(sum(covered.nodes[card.node.key].runs for card in found)),
            )
            for value, found in on.items()
        ]
        counts = table(
            f"Techniques by {axis.title.lower()}", (axis.title.lower(), "attacks", "defenses", "benchmarks", "all", "run"), rows
        )
        parts = [self.value(name, value, found, covered) for value, found in on.items()]
        return self.section([nodes.Text(axis.title)], nodes.paragraph("", axis.meaning), counts, *parts, name=f"view-{name}")

    def value(self, name: str, value: str, found: Sequence[Card], covered: Coverage) -> nodes.section:
        from safescale_lib.survey import AXES, node

        title, meaning = AXES[name].values[value]
        running = [covered.nodes[card.node.key] for card in found if covered.nodes[card.node.key].runs]
        link = tag("a", f"All {len(found)} in the atlas", kind=Inline, href=atlas_address(**{name: value}))
        count = f"{meaning} {len(running)} of {len(found)} techniques run in this book. "
        listed = []
        for key, entries in groupby(running, key=lambda entry: entry.node.path[1]):
            links = joined([[self.cell(entry.outcomes[0], entry.node.title)] for entry in entries])
            listed.append(nodes.list_item("", nodes.paragraph("", f"{node(key).number} {node(key).title}: ", *links)))
        content: list[nodes.Node] = [nodes.paragraph("", "", nodes.Text(count), link)]
        content += [nodes.bullet_list("", *listed)] if listed else []
        return self.section([nodes.Text(title)], *content, name=f"view-{name}-{value}")


class SearchableTable(FromData):
    """`{searchable-table} FILE.csv`: a table of the repository as one to sort and search; the text is its caption.

    `:columns:` names the columns in order, of which the first heads the rows; by default all. `:filters:` names columns
    to choose values of. A column `family` with the keys of chapters shows their titles.
    """

    required_arguments = 1
    has_content = True
    option_spec: ClassVar[dict[str, Any]] = {"columns": directives.unchanged, "filters": directives.unchanged}

    def render(self) -> list[nodes.Node]:
        from safescale_lib.survey import chapters

        path = self.root / self.arguments[0]
        self.env.note_dependency(str(path))
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        if not rows or not self.content:
            raise ValueError(f"{path.name} must hold rows, and the directive a caption")
        columns = self.options.get("columns", " ".join(rows[0])).split()
        filters = self.options.get("filters", "").split()
        if unknown := {*columns, *filters} - set(rows[0]):
            raise ValueError(f"columns and filters must be in {path.name}, got {', '.join(sorted(unknown))}")
        families = {chapter.key: chapter.title for chapter in chapters()}
        shown = [{**row, **({"family": families[row["family"]]} if "family" in row else {})} for row in rows]
        body = [
            tag(
                "tr",
                *(_cell(row[name], first=name == columns[0]) for name in columns),
                **{f"data_{name}": row[name] for name in filters},
            )
            for row in shown
        ]
        header = [tag("th", name, scope="col") for name in columns]
        choices = json.dumps({name: name.capitalize() for name in filters})
        return [data_table(" ".join(self.content), header, body, css="safescale-sortable wrap", data_filters=choices)]


@lru_cache(maxsize=1)
def measured_scorecard(root: Path) -> dict[str, Any]:
    from safescale_lib.survey import scorecard

    return scorecard(root / "notebooks", covered=measured_coverage(root))


def _titles(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: value.title for key, value in values.items()}


def _path(node: Node) -> str:
    from safescale_lib.survey import nodes as taxonomy

    above = [taxonomy()[key] for key in node.path[:-1]]
    return ", ".join(f"{step.number} {step.title}".strip() for step in above[1:])


def _field(name: str, title: str, control: Element) -> Element:
    return tag("div", tag("label", title, for_=f"atlas-{name}"), control)


def _number(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{value:.3f}"


def _sortable(value: float | None, text: str) -> Element:
    """A cell that sorts by its number; without one it sorts below all."""
    return tag("td", text, data_order="" if value is None else str(value))


def _cell(text: str, *, first: bool) -> Element:
    return tag("th", text, scope="row") if first else tag("td", text)


def _fields(schema: Mapping[str, Any], above: str = "") -> Iterator[tuple[list[nodes.Node], str, str]]:
    """Name, type and meaning of the fields of an object, and of objects inside it; lists of outcomes stand apart."""
    for name, facts in schema["properties"].items():
        kind = facts.get("type", "one of the words listed")
        yield [nodes.literal("", above + name)], " or ".join([kind] if isinstance(kind, str) else kind), facts["description"]
        inside = facts.get("items", facts)
        if "properties" in inside and name != "outcomes":
            yield from _fields(inside, f"{above}{name}{'[]' if 'items' in facts else ''}.")


# --------------------------------------------------------------------------------------------------------------- files


def vendored_datatables() -> Path:
    """Folder of the DataTables bundle in the package that carries it."""
    spec = find_spec("itables")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("DataTables is missing: install the book's requirements (package itables)")
    return Path(spec.submodule_search_locations[0], "html")


def classic_script(module: str) -> str:
    """The bundle, a module, as a script that also works from a plain file: browsers refuse modules there."""
    found = re.search(r"export\s*\{([^}]*)\};?", module)
    named = re.search(r"(\w+) as default", found[1]) if found else None
    if not found or not named:
        raise RuntimeError("the DataTables bundle of itables ends in no default export: its form has changed")
    body = f"{module[: found.start()]}window.DataTable={named[1]};{module[found.end() :]}"
    return f'(() => {{"use strict";\n{body}\n}})();\n'


def load_scripts(app: Sphinx, pagename: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """A page loads the scripts it needs and no others."""
    made = list(doctree.findall(Element)) if doctree else []
    classes = {name for element in made for name in element["classes"]}
    if made:
        app.add_css_file("atlas.css", priority=700)
    if "safescale-filters" in classes:
        app.add_js_file("atlas.js", loading_method="defer")
    if "safescale-sortable" in classes:
        app.add_css_file(f"{DATATABLES}/datatables.css", priority=150)  # ours comes later and decides
        app.add_js_file(f"{DATATABLES}/datatables.js", loading_method="defer", priority=300)
        app.add_js_file("tables.js", loading_method="defer", priority=400)  # before ours, which watches what scrolls


def publish(app: Sphinx, exception: Exception | None) -> None:
    """After an HTML build: the vendored script, the scorecard and its schema."""
    if exception or app.builder.format != "html":
        return
    from safescale_lib.survey.scorecard import as_text, schema_text

    site = Path(app.outdir)
    folder, bundle = site / "_static" / DATATABLES, vendored_datatables()
    folder.mkdir(parents=True, exist_ok=True)
    copyfile(bundle / "dt_bundle.css", folder / "datatables.css")
    _write(folder / "datatables.js", classic_script((bundle / "dt_bundle.js").read_text(encoding="utf-8")))
    if (Path(app.srcdir) / "notebooks").is_dir():
        _write(site / "scorecard.json", as_text(measured_scorecard(Path(app.srcdir))))
        _write(site / "scorecard.schema.json", schema_text())


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.new")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx's entry point."""
    for kind in (Element, Inline):
        app.add_node(kind, html=(visit_element, depart_element))
    app.add_directive("atlas", Atlas)
    app.add_directive("coverage-matrix", CoverageMatrix)
    app.add_directive("scorecard", Scorecard)
    app.add_directive("scorecard-fields", ScorecardFields)
    app.add_directive("views", Views)
    app.add_directive("searchable-table", SearchableTable)
    app.connect("source-read", anchor_cells, priority=400)  # before the outcomes are taken out of the outputs
    app.connect("missing-reference", plain_where_nothing_is_found)
    app.connect("html-page-context", load_scripts)
    app.connect("build-finished", publish)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
