"""Make the book one PDF: `python book/pdf.py [--page PAGE.html] [--output FILE.pdf]`.

Sphinx writes the book as one page, as strictly as it builds the site; headless Chromium prints that page. Formulas are set
and folded parts unfolded before it prints. With --page, a page that is there already is printed.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "_build" / "pdf"
TARGET = ROOT / "_build" / "safescale.pdf"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

# Solutions, hints and sources unfold; a link to a page that is not printed becomes text; and what is wider than the
# paper is set smaller, down to six tenths. What is wider still, wraps: see print.css.
PREPARE = """async (width) => {
  document.documentElement.dataset.theme = "light";
  document.documentElement.dataset.mode = "light";
  for (const part of document.querySelectorAll("details")) part.open = true;
  for (const part of document.querySelectorAll(".toggle-hidden")) part.classList.remove("toggle-hidden");
  for (const image of document.querySelectorAll("img[loading]")) image.loading = "eager";
  for (const link of document.querySelectorAll("article a[href]")) {
    const address = link.getAttribute("href");
    const target = decodeURIComponent(address.split("#")[1] ?? "");
    const here = /^(book\\/index\\.html)?#/.test(address) && document.getElementById(target);
    if (here) link.setAttribute("href", `#${target}`);
    else if (!/^https?:/.test(address)) link.removeAttribute("href");
  }
  await (window.MathJax?.startup?.promise ?? Promise.resolve());
  await document.fonts.ready;
  await Promise.all([...document.images].map((image) => image.decode().catch(() => {
    throw new Error(`the picture ${image.src} cannot be shown`);
  })));
  for (const part of document.querySelectorAll("article pre, article table, article .sd-card")) {
    const box = ".pst-scrollable-table-container, .safescale-table, div.highlight";
    const block = part.closest(".cell_input") ?? part.closest(box) ?? part;
    if (block.getBoundingClientRect().height < 420) block.style.breakInside = "avoid";
  }
  for (const table of document.querySelectorAll("article table")) {
    const scale = Math.max(0.6, Math.min(1, width / table.scrollWidth));
    if (scale < 1) table.style.zoom = scale;
  }
  return [...document.querySelectorAll("h1, h2, h3, h4")].map((heading) => {
    const words = heading.cloneNode(true);
    words.querySelectorAll(".headerlink").forEach((link) => link.remove());
    return words.textContent.trim();
  });
}"""
PAPER_WIDTH = 680  # pixels between the margins of an A4 page
FOOTER = (
    '<div style="font: 8px sans-serif; width: 100%; padding: 0 15mm; display: flex; justify-content: space-between">'
    '<span class="title"></span><span class="pageNumber"></span></div>'
)


def one_page() -> Path:
    """Write the book as one page, warnings as errors; its path."""
    build = [Path(sys.executable).with_name("jupyter-book"), "build", ROOT, "--path-output", BUILD]
    options = ["--builder", "custom", "--custom-builder", "singlehtml", "-W", "-n", "--keep-going", "--all", "-q"]
    subprocess.run([*map(str, build), *options], check=True)
    site = BUILD / "_build" / "singlehtml"
    return Path(shutil.copyfile(site / "book" / "index.html", site / "book.html"))  # its addresses count from there


def chromium() -> str:
    """The browser that prints. Raises RuntimeError where there is none."""
    named = os.environ.get("SAFESCALE_CHROMIUM")
    found = named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not found:
        raise RuntimeError("no Chromium found: install the package `chromium`, or name a binary in SAFESCALE_CHROMIUM")
    return found


def print_page(page: Path, target: Path) -> None:
    """Print a page of the disk as A4, with page numbers, an outline and tags for screen readers."""
    from playwright.sync_api import sync_playwright

    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_suffix(".partial.pdf")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        opened = browser.new_page(viewport={"width": PAPER_WIDTH, "height": 1000}, color_scheme="light")
        opened.set_default_timeout(300_000)
        opened.emulate_media(media="print", color_scheme="light")
        for script in ("datatables", "tables"):  # without it a table stands whole, with it one screen of its rows
            opened.route(f"**/{script}.js*", lambda route: route.abort())
        opened.goto(page.resolve().as_uri())
        headings = opened.evaluate(PREPARE, PAPER_WIDTH)
        opened.pdf(
            path=str(aside),
            format="A4",
            margin={"top": "15mm", "bottom": "18mm", "left": "15mm", "right": "15mm"},
            print_background=True,
            display_header_footer=True,
            header_template="<span></span>",
            footer_template=FOOTER,
            outline=True,
            tagged=True,
        )
        browser.close()
    name_outline(aside, headings)
    os.replace(aside, target)


def name_outline(pdf: Path, headings: list[str]) -> None:
    """Give the outline the words of the headings.

    The browser writes a heading twice where it moved to the next page, and without the space where it broke into lines.
    """
    from pypdf import PdfWriter
    from pypdf.generic import NameObject, TextStringObject

    written = PdfWriter(clone_from=pdf)
    wording = {"".join(words.split()): " ".join(words.split()) for words in headings}

    def rename(entry: Any) -> None:
        while entry is not None:
            entry = entry.get_object()
            if "/Title" in entry:
                title = "".join(str(entry["/Title"]).split())
                known = wording.get(title) or wording.get(title[: len(title) // 2], str(entry["/Title"]))
                entry[NameObject("/Title")] = TextStringObject(known)
            rename(entry.get("/First"))
            entry = entry.get("/Next")

    rename(written.root_object.get("/Outlines"))
    written.write(pdf)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--page", type=Path, help="print this page; the whole book is built if left out")
    parser.add_argument("--output", type=Path, default=TARGET)
    arguments = parser.parse_args()
    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it remarks on how the browser counts its objects
    try:
        print_page(arguments.page or one_page(), arguments.output)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        print(f"pdf: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
