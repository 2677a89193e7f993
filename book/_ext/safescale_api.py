"""The library's reference: pages from docstrings, tied to the notebooks that use them, both ways.

- `.. api:: MODULE ...` documents every public function, class and constant of a module and of the modules below it;
- sphinx-codeautolink turns each call in a notebook into a link to its entry, and here also each name in a printed source;
- every entry says where in the survey it belongs, and which sections of the notebooks use it: both are computed.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import PurePath
from textwrap import dedent
from typing import TYPE_CHECKING, Any, NamedTuple

from bs4 import BeautifulSoup
from docutils import nodes
from docutils.statemachine import StringList
from sphinx import addnodes
from sphinx.util.docutils import SphinxDirective, SphinxRole
from sphinx_codeautolink.extension.directive import PrefaceMarker, SkipMarker
from sphinx_codeautolink.parse import parse_names

if TYPE_CHECKING:
    from types import ModuleType

    from sphinx.application import Sphinx

LIBRARY = "safescale_lib"
LINKED = ("html", "dirhtml")  # builders for which codeautolink works; under others its markers would stay in the pages
MANY = 6  # so many sections are shown at once; more unfold


# ------------------------------------------------------------------------------------------------------ what there is


class Member(NamedTuple):
    """A public name of a module: "function", "class", "data", or "alias" for something defined elsewhere."""

    name: str
    kind: str
    remark: str = ""  # of a constant: the comment beside or above it


def modules_of(package: str) -> Iterator[str]:
    """A module and everything below it, in the order of the survey where a package names one, else by name."""
    yield package
    module = importlib.import_module(package)
    for below in pkgutil.iter_modules(getattr(module, "__path__", ()), f"{package}."):
        yield from modules_of(below.name)


def members(module: ModuleType) -> list[Member]:
    """The public names a module binds at its top, in their order; what it only imports belongs to another module."""
    source = inspect.getsource(module)
    lines, found = source.splitlines(), []
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            kind = "class" if isinstance(statement, ast.ClassDef) else "function"
            found.append(Member(statement.name, kind))
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            for name in _bound(statement):
                kind = _kind(module, getattr(module, name, None))
                found.append(Member(name, kind, _remark(lines, statement)))
    return [member for member in found if not member.name.startswith("_") and member.kind]


def _bound(statement: ast.Assign | ast.AnnAssign) -> list[str]:
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    return [name for target in targets for name in _stored(target)]


def _stored(code: ast.AST) -> list[str]:
    return [part.id for part in ast.walk(code) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]


def _kind(module: ModuleType, value: Any) -> str:
    if type(value).__name__ in ("TypeVar", "ParamSpec"):
        return ""  # a device of the type checker
    return "alias" if callable(value) and getattr(value, "__module__", "").startswith(f"{LIBRARY}.") else "data"


def _remark(lines: list[str], statement: ast.stmt) -> str:
    """The comment behind a constant, or the lines of comment above it."""
    behind = re.search(r"\s{2}# (.+)$", lines[(statement.end_lineno or statement.lineno) - 1])
    if behind:
        return behind[1]
    above: list[str] = []
    for line in reversed(lines[: statement.lineno - 1]):
        if not (comment := re.match(r"# ?(?!-{5})(.*)", line)):
            break
        above.insert(0, comment[1])
    return " ".join(above)


# ----------------------------------------------------------------------------------------------------------- the pages


class Api(SphinxDirective):
    """`.. api:: MODULE ...`: a section for each module, an entry for each public name."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        return [self.section(name) for package in self.arguments[0].split() for name in modules_of(package)]

    def section(self, name: str) -> nodes.section:
        module = importlib.import_module(name)
        self.env.note_dependency(inspect.getfile(module))
        section = nodes.section("", ids=[f"module-page-{name.replace('.', '-').replace('_', '-')}"])
        section += nodes.title("", "", nodes.literal("", name.removeprefix(f"{LIBRARY}.")))
        lines = StringList([line for entry in entries(module) for line in entry], source=name)
        self.state.nested_parse(lines, 0, section)
        return section


def entries(module: ModuleType) -> Iterator[list[str]]:
    """reStructuredText for one module."""
    name = module.__name__
    yield [f".. automodule:: {name}", ""]
    aliases = []
    for member in members(module):
        full = f"{name}.{member.name}"
        if member.kind == "alias":
            value = getattr(module, member.name)
            aliases.append(f":py:obj:`{member.name} <{value.__module__}.{value.__qualname__}>`")
        elif member.kind == "class":
            yield [f".. autoclass:: {full}", "   :members:", "   :member-order: bysource", ""]
        elif member.kind == "function":
            yield [f".. autofunction:: {full}", ""]
        else:
            value = getattr(module, member.name)
            if " object at 0x" in repr(value):  # an address says nothing, and is another one in every build
                yield [f".. py:data:: {member.name}", f"   :module: {name}", "", f"   {_inline(member.remark, set())}", ""]
                continue
            untold = isinstance(value, PurePath) or len(repr(value)) > 70  # a path is this machine's own
            yield [f".. autodata:: {full}", *(["   :no-value:"] if untold else []), ""]
    if aliases:
        yield [f"Defined elsewhere and bound to this part of the survey: {', '.join(aliases)}.", ""]


def process_docstring(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Our docstrings are prose: make it reStructuredText, then say where the thing belongs and who uses it."""
    if not name.startswith(LIBRARY):
        return
    if what in ("data", "attribute") and not _documented(name):
        lines[:] = [remarks().get(name, "")]  # else Python's own words on the value's type
    lines[:] = prose("\n".join(lines), _parameters(value))
    if what in ("function", "class", "data"):
        for bound in techniques().get(name, ()):
            lines += ["", f"In the survey: :place-in-survey:`{bound.key}`. Source: :cite:t:`{bound.paper}`."]
        lines += ["", f".. used-in:: {name}"]


def _documented(name: str) -> bool:
    """Does a docstring follow the constant?"""
    module, _, member = name.rpartition(".")
    try:
        body = ast.parse(inspect.getsource(importlib.import_module(module))).body
    except ModuleNotFoundError:
        return True  # an attribute of a class: autodoc found its words
    for statement, after in pairwise(body):
        if isinstance(statement, ast.Assign | ast.AnnAssign) and member in _bound(statement):
            return isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    return False


@lru_cache(maxsize=1)
def remarks() -> dict[str, str]:
    found = {}
    for name in modules_of(LIBRARY):
        found.update({f"{name}.{m.name}": m.remark for m in members(importlib.import_module(name)) if m.kind == "data"})
    return found


def _parameters(value: Any) -> set[str]:
    try:
        return set(inspect.signature(value).parameters)
    except (TypeError, ValueError):
        return set()


def prose(text: str, parameters: set[str]) -> list[str]:
    """A plain docstring as reStructuredText: nothing in it is markup but `code`, [citation], lists and indented code."""
    made: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        lines = paragraph.split("\n")
        if not paragraph:
            continue
        if all(line.startswith("    ") for line in lines if line):
            made += [f".. code-block:: {_language(lines)}", "", *lines, ""]
            continue
        for position, line in enumerate(lines):
            if position and line.startswith("- ") and not lines[position - 1].startswith(("- ", "  ")):
                made.append("")
            made.append(_inline(line, parameters))
        made.append("")
    return made


def _language(lines: list[str]) -> str:
    try:
        ast.parse(dedent("\n".join(lines)))
    except SyntaxError:
        return "text"  # a sketch, or a command line
    return "python"


def _inline(line: str, parameters: set[str]) -> str:
    bullet = "- " if line.startswith("- ") else ""
    parts = line.removeprefix("- ").split("`")
    if len(parts) % 2 == 0:  # a single backtick is no code
        parts = ["'".join(parts)]
    return bullet + "".join(rf"\ ``{part}``\ " if i % 2 else _escaped(part, parameters) for i, part in enumerate(parts))


def _escaped(text: str, parameters: set[str]) -> str:
    text = re.sub(r"([\\*|])|(?<=\w)_(?!\w)", r"\\\g<0>", text)
    text = re.sub(r"^(\w+[.)]|[-+=~#:]+)(?=\s|$)", r"\\\1", text)  # no list, no underline
    text = re.sub(r"\[(\w+)((?:, [^\]]+)?)\]", _citation, text)
    named = rf"\b({'|'.join(sorted(parameters))})\b(?=(?:, \w+)*(?: \([^)]*\))?:)" if parameters else None
    return re.sub(named, r"\ ``\1``\ ", text) if named else text


def _citation(found: re.Match[str]) -> str:
    key, where = found.groups()
    return rf":cite:p:`{key}`\ {where}" if key in cited() else found[0]


def process_signature(
    app: Sphinx, what: str, name: str, value: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None] | None:
    """A protocol is never made, so it has no arguments; a default that is made anew each time has no text; and what the
    command line is told about an argument is no part of its type.
    """
    if what == "class" and getattr(value, "_is_protocol", False):
        return "", None
    if not signature:
        return None
    plain = re.sub(r"[~\w.]*Annotated\[([^,\[\]]+), <[^>]*>\]", r"\1", signature)
    return plain.replace("<factory>", "..."), returns


def skip_member(app: Sphinx, what: str, name: str, value: Any, skip: bool, options: Any) -> bool | None:
    """The fields of a named tuple stand in its signature; Python's words about them say nothing."""
    return True if str(getattr(value, "__doc__", "")).startswith("Alias for field number") else None


@lru_cache(maxsize=1)
def cited() -> frozenset[str]:
    from safescale_lib.survey import citation_keys

    return frozenset(citation_keys())


@lru_cache(maxsize=1)
def techniques() -> dict[str, list[Any]]:
    """The bindings of each function, by its full name."""
    from safescale_lib.survey import bindings

    found: dict[str, list[Any]] = {}
    for bound in bindings():
        found.setdefault(f"{bound.module}.{bound.name}", []).append(bound)
    return found


# ------------------------------------------------------------------------------------------------- links, both ways


class used_in(nodes.General, nodes.Element):
    """Stands for the sections that use a name until all pages have been read."""


class atlas_link(nodes.Inline, nodes.TextElement):
    """Stands for a link to a technique's card until all pages are known."""


class UsedIn(SphinxDirective):
    """`.. used-in:: NAME`: the notebook sections whose code uses it."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        return [used_in("", name=self.arguments[0])]


class AtlasLink(SphinxRole):
    """`` :place-in-survey:`key.of.the.leaf` ``: the technique's place in the survey, linked to its card in the atlas."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        from safescale_lib.survey import node
        from safescale_lib.survey import nodes as taxonomy

        found = node(self.text)
        above = [taxonomy()[key] for key in found.path if key != found.key]
        number = next((step.number for step in reversed([*above, found]) if step.number), "")
        words = f"{number} {', '.join(step.title for step in [*above[1:], found])}".strip()
        return [atlas_link("", words, key=self.text)], []


def anchor_of(key: str) -> str:
    """Id of a technique's card on the atlas page."""
    return f"atlas-{re.sub(r'[._]', '-', key)}"


def introduce_cells(app: Sphinx, doctree: nodes.document) -> None:
    """A notebook is one program: tell codeautolink what each cell's names mean from the cells before it.

    Its own way, to read all earlier cells again before each, takes most of a minute on a chapter of 250 cells.
    """
    if app.builder.name not in LINKED:
        return
    bound: dict[str, str] = {}
    for block in list(doctree.findall(nodes.literal_block)):
        if block.get("language") != "ipython3":
            continue
        source = ast.parse(block.astext())
        if preface := _needed(_names(source), bound):
            block.parent.insert(block.parent.index(block), PrefaceMarker(content="\n".join(preface), level="next"))
        for statement in source.body:
            for name, code in _binds(statement).items():
                bound.pop(name, None)  # bound again, it comes after what it needs
                bound[name] = code


def _binds(statement: ast.stmt) -> dict[str, str]:
    """What a statement binds at a notebook's top, each name with code that binds it in the same way."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.partition(".")[0]: ast.unparse(statement) for alias in statement.names}
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return {statement.name: f"def {statement.name}(): pass"}  # hides an imported name
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        return dict.fromkeys(_bound(statement), ast.unparse(statement))
    return {name: f"{name} = None" for name in _stored(statement)}


def _names(source: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(source) if isinstance(part, ast.Name)}


def _needed(names: set[str], bound: dict[str, str]) -> list[str]:
    """The statements that give the names their meaning, and those that these need, in the order of the notebook."""
    wanted, waiting = set[str](), names & set(bound)
    while waiting:
        name = waiting.pop()
        wanted.add(name)
        waiting |= (_names(ast.parse(bound[name])) & set(bound)) - wanted
    return list(dict.fromkeys(code for name, code in bound.items() if name in wanted))


def link_sources(app: Sphinx, doctree: nodes.document) -> None:
    """Printed sources: their heading leads to the entry, and codeautolink leaves their code to `name_sources`.

    As part of the notebook's own code, a printed definition would hide the imported function of the same name.
    """
    for block in list(doctree.findall(nodes.literal_block)):
        if name := _printed(block):
            place = block.parent.index(block)
            block["safescale-source"] = name
            block.rawsource = dedent(block.rawsource)  # a method is printed as it stands in its class
            block.children = []
            block += nodes.Text(block.rawsource)
            if app.builder.name in LINKED:
                block.parent.insert(place, SkipMarker(level="next"))
            if "._" in name or not _described(name):
                continue  # private, or a method that does what its protocol says: it has no entry
            heading = block.parent[place - 1]
            link = addnodes.pending_xref(
                "", heading[0], refdomain="py", reftype="obj", reftarget=name, refexplicit=True, refdoc=app.env.docname
            )
            heading.children = []
            heading += link


def _described(name: str) -> bool:
    """Has what a full name stands for a docstring of its own?"""
    path = name.split(".")
    for end in range(len(path), 0, -1):
        try:
            found: object = importlib.import_module(".".join(path[:end]))
        except ModuleNotFoundError:
            continue
        for attribute in path[end:]:
            found = getattr(found, attribute)
        return bool(found.__doc__)
    return False


def _printed(block: nodes.literal_block) -> str | None:
    """Full name of what a block prints, if `figures.source` made it."""
    place = block.parent.index(block)
    heading = block.parent[place - 1] if place else None
    if not isinstance(heading, nodes.paragraph) or block.get("language") != "python":
        return None
    alone = len(heading) == 1 and isinstance(heading[0], nodes.literal) and heading.astext().startswith(f"{LIBRARY}.")
    return heading.astext() if alone else None


def name_sources(app: Sphinx, doctree: nodes.document) -> None:
    """Give codeautolink the names in printed sources: what they mean is known from the module that defines them."""
    transforms = getattr(app.env, "sphinx_codeautolink_transforms", {}).get(app.env.docname, ())
    printed = {b.astext(): b for b in doctree.findall(nodes.literal_block) if b.get("safescale-source")}
    for transform in transforms:
        if block := printed.get(transform.source):
            preface = preface_of(block["safescale-source"], transform.source)
            names = parse_names("\n".join([*preface, transform.source]), block)
            for name in names:
                name.lineno -= len(preface)
                name.end_lineno -= len(preface)
            transform.names = [name for name in names if name.lineno > 0]


def preface_of(name: str, source: str) -> list[str]:
    """The imports that make sense of a printed source: where each library name in it is defined."""
    path = name.split(".")
    while True:  # the longest importable part is the module
        try:
            space = vars(importlib.import_module(".".join(path)))
            break
        except ModuleNotFoundError:
            path.pop()
    lines = []
    for alias in sorted(_names(ast.parse(source)) & set(space)):
        value = space[alias]
        if inspect.ismodule(value):
            package, _, module = value.__name__.rpartition(".")
        else:
            package, module = getattr(value, "__module__", None) or "", getattr(value, "__qualname__", "")
        if package.split(".")[0] == LIBRARY and module and "." not in module:
            lines.append(f"from {package} import {module} as {alias}")
    return lines


def functions_named_like_their_module(app: Sphinx) -> None:
    """Where a package offers a function by its module's name, as `survey.coverage`, the name in code is the function."""
    for name in modules_of(LIBRARY):
        package, _, last = name.rpartition(".")
        value = getattr(importlib.import_module(package), last, None) if package else None
        if value is not None and not inspect.ismodule(value):
            app.config.codeautolink_inventory_map[name] = f"{value.__module__}.{value.__qualname__}"


class Use(NamedTuple):
    """A section of a notebook: its page, its anchor and its titles from the chapter's down."""

    page: str
    anchor: str
    titles: tuple[str, ...]


def uses(app: Sphinx) -> dict[str, dict[Use, None]]:
    """Every name's sections in the order of the book, from what codeautolink resolved."""
    found: dict[str, dict[Use, None]] = {}
    transforms = getattr(app.env, "sphinx_codeautolink_transforms", {})
    for page in sorted(transforms):
        if PurePath(page).parts[0] != "notebooks":
            continue
        for transform in transforms[page]:
            at = Use(page, transform.example.ref_id or "", tuple(transform.example.headings))
            for name in transform.names:
                found.setdefault(name.resolved_location, {})[at] = None
    return found


def resolve(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Put links in place of what had to wait for all pages."""
    html = app.builder.name in LINKED
    for place in list(doctree.findall(atlas_link)):
        link: nodes.Element = nodes.inline("", place.astext())
        if html and "book/atlas" in app.env.found_docs:
            address = f"{app.builder.get_relative_uri(docname, 'book/atlas')}#{anchor_of(place['key'])}"
            link = nodes.reference("", place.astext(), internal=True, refuri=address)
        place.replace_self(link)
    waiting = list(doctree.findall(used_in))
    known = uses(app) if waiting else {}
    for place in waiting:
        place.replace_self(_uses(app, docname, list(known.get(place["name"], ()))))


def _uses(app: Sphinx, docname: str, sections: list[Use]) -> list[nodes.Node]:
    """One paragraph for each chapter; a long list unfolds."""
    made: list[nodes.Node] = []
    for page in dict.fromkeys(use.page for use in sections):
        here = [use for use in sections if use.page == page]
        links: list[nodes.Node] = []
        for use in here:
            title = use.titles[-1]
            if sum(other.titles[-1] == title for other in here) > 1 and len(use.titles) > 2:
                title = f"{use.titles[-2]}: {title}"
            address = f"{app.builder.get_relative_uri(docname, page)}#{use.anchor}"
            links += [nodes.Text(", " if links else ""), nodes.reference("", title, internal=True, refuri=address)]
        number = re.match(r"\d+", PurePath(page).name)
        where = f"chapter {int(number[0])}" if number else here[0].titles[0]
        if len(here) > MANY:
            made.append(nodes.raw("", f"<details><summary>Used in {len(here)} sections of {where}</summary>", format="html"))
            made += [nodes.paragraph("", "", *links), nodes.raw("", "</details>", format="html")]
        else:
            made.append(nodes.paragraph("", "", nodes.Text(f"Used in {where}: "), *links))
    return [nodes.container("", *made, classes=["safescale-uses"])] if made else []


# -------------------------------------------------------------------------------------------------- accessible pages


def mend_lists(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """Sphinx writes the lines of a signature as a list of definitions without terms, and viewcode a list inside a list."""
    if not pagename.startswith(("book/api/", "_modules/index")) or "body" not in context:
        return
    page = BeautifulSoup(context["body"], "html.parser")
    for lines in page.select("dt.sig > dl"):
        for line in lines.find_all("dd", recursive=False):
            line.name = "span"
        lines.name, lines["class"] = "span", "safescale-arguments"
    for inner in page.select("ul > ul"):
        above = inner.find_previous_sibling("li")
        if above:
            above.append(inner.extract())
    context["body"] = str(page)


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx's entry point."""
    for extension in ("sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_codeautolink"):
        app.setup_extension(extension)
    app.add_css_file("api.css")
    app.add_node(used_in)
    app.add_node(atlas_link)
    app.add_directive("api", Api)
    app.add_directive("used-in", UsedIn)
    app.add_role("place-in-survey", AtlasLink())
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("autodoc-process-signature", process_signature)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("builder-inited", functions_named_like_their_module, priority=400)
    app.connect("doctree-read", introduce_cells, priority=480)
    app.connect("doctree-read", link_sources, priority=480)
    app.connect("doctree-read", name_sources, priority=500)  # codeautolink reads the pages at 490
    app.connect("doctree-resolved", resolve)
    app.connect("html-page-context", mend_lists)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
