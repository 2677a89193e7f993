// Whatever is wider than its box scrolls inside it; while it does, the keyboard must reach it and a name must say what
// it is. A box can change at any time: formulas are set late, solutions unfold, windows turn. So it is watched.
document.addEventListener("DOMContentLoaded", () => {
  const kinds = {
    Formula: "div.math",
    Table: ".safescale-table, .pst-scrollable-table-container, .dt-layout-table",
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

// A slider moves through pictures that were made with the notebook. The page holds all of them, each with its text; here
// they are laid on one another and an input brings one to the front. What a screen reader says: the value, then the text.
document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".safescale-slider").forEach((box, number) => {
    const frames = [...box.querySelectorAll(".safescale-frame")];
    const part = (name, properties, ...inside) => {
      const made = Object.assign(document.createElement(name), properties);
      made.append(...inside);
      return made;
    };
    const id = `safescale-slider-${number + 1}`;
    const input = part("input", { type: "range", id, min: 0, max: frames.length - 1, step: 1, value: 0 });
    const marks = frames.map((frame) => part("span", {}, part("span", {}, frame.dataset.value)));
    const row = part("div", { className: "safescale-marks" }, ...marks);
    row.setAttribute("aria-hidden", "true"); // the input says its value
    const said = part("p", { className: "safescale-said" });
    said.setAttribute("role", "status");
    const show = (index) => {
      frames.forEach((frame, place) => frame.classList.toggle("current", place === index));
      marks.forEach((mark, place) => mark.classList.toggle("current", place === index));
      input.setAttribute("aria-valuetext", frames[index].dataset.value);
    };
    input.addEventListener("input", () => {
      show(input.valueAsNumber);
      said.textContent = frames[input.valueAsNumber].querySelector("span").textContent;
    });
    const label = part("label", { htmlFor: id }, box.dataset.label);
    const control = part("div", { className: "safescale-control" }, label, input, row, said);
    box.querySelector(".safescale-frames").before(control);
    box.classList.add("live");
    show(0);
  });
});

// A quiz works without a script; this counts. The answer opened first is the answer given. Nothing is stored or sent.
document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".safescale-quiz").forEach((quiz) => {
    const questions = [...quiz.querySelectorAll("fieldset")];
    const given = new Map();
    const score = document.createElement("p");
    score.className = "safescale-score";
    score.setAttribute("role", "status");
    quiz.append(score);
    for (const question of questions) {
      for (const choice of question.querySelectorAll("details")) {
        choice.addEventListener("toggle", () => {
          if (!choice.open || given.has(question)) return;
          given.set(question, choice.classList.contains("safescale-right"));
          const right = [...given.values()].filter(Boolean).length;
          score.textContent = `${given.size} of ${questions.length} answered, ${right} right at the first try.`;
        });
      }
    }
  });
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
