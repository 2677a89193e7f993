// Whatever is wider than its box scrolls inside it; while it does, the keyboard must reach it and a name must say what
// it is. A box can change at any time: formulas are set late, solutions unfold, windows turn. So it is watched.
document.addEventListener("DOMContentLoaded", () => {
  const kinds = {
    Formula: "div.math",
    Table: ".safescale-table, .pst-scrollable-table-container",
    Code: "pre",
  };
  const watch = new ResizeObserver((boxes) => {
    for (const { target } of boxes) {
      const scrolls = target.scrollWidth > target.clientWidth;
      for (const [name, value] of [
        ["tabindex", "0"],
        ["role", "region"],
        ["aria-label", target.dataset.name],
      ]) {
        if (scrolls) target.setAttribute(name, value);
        else target.removeAttribute(name);
      }
    }
  });
  for (const [kind, selector] of Object.entries(kinds)) {
    document.querySelectorAll(`.bd-article :is(${selector})`).forEach((box, index) => {
      box.dataset.name = `${kind} ${index + 1}, scrolls sideways`;
      watch.observe(box);
    });
  }
});

// Search results quote the page from its start. Without this they quote the names of the buttons above the text.
if (typeof Search === "object") {
  const quote = Search.htmlToText;
  Search.htmlToText = (html, anchor) => {
    const page = new DOMParser().parseFromString(html, "text/html");
    page.querySelectorAll(".bd-header-article, .onlyprint, footer").forEach((part) => part.remove());
    return quote(page.documentElement.outerHTML, anchor);
  };
}
