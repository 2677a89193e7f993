"""The book as one page, which `book/pdf.py` prints: `jupyter-book build . --builder singlehtml`-like, made to work.

What paper cannot use stays out. The library's pages and the atlas are for looking things up, one entry at a time, with
search and links; printed they would be several times as long as the chapters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from docutils import nodes
from sphinx import addnodes

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ONE_PAGE = "singlehtml"


def share_visitors(app: Sphinx) -> None:
    """Some extensions say how to write their nodes for the builder `html` only; one page is written in the same way.

    Sphinx falls back to those by itself, but not once any extension has named the one-page builder.
    """
    handlers = app.registry.translation_handlers
    handlers[ONE_PAGE] = {**handlers.get("html", {}), **handlers.get(ONE_PAGE, {})}


def leave_out(app: Sphinx, doctree: nodes.document) -> None:
    """Take pages out of the contents, so that the one page does not hold them; links to them become plain text later."""
    if app.builder.name != ONE_PAGE:
        return
    out = tuple(app.config.print_leaves_out)
    for toctree in list(doctree.findall(addnodes.toctree)):
        toctree["entries"] = [entry for entry in toctree["entries"] if not str(entry[1]).startswith(out)]
        toctree["includefiles"] = [name for name in toctree["includefiles"] if not name.startswith(out)]
        if not toctree["entries"]:
            toctree.parent.remove(toctree)


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx's entry point."""
    app.add_config_value("print_leaves_out", [], "env", [list])
    app.add_css_file("print.css", media="print")
    app.connect("builder-inited", share_visitors)
    app.connect("doctree-read", leave_out, priority=900)  # after the contents have been written down
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
