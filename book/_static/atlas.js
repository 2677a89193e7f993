// The atlas is filtered in the page. The address holds the state, so that a view can be shared and the back button works.
// A card or a part that the address names by its anchor is shown even where a filter would hide it.
document.addEventListener("DOMContentLoaded", () => {
  const form = document.querySelector(".safescale-filters");
  if (!form) return;
  const cards = [...document.querySelectorAll(".safescale-card")];
  const texts = new Map(cards.map((card) => [card, card.textContent.toLowerCase()]));
  const parts = [...document.querySelectorAll("section[id^='atlas-']")];
  const count = form.querySelector("[role='status']");
  const fields = [...form.elements].filter((field) => field.name);

  const matches = (card) =>
    fields.every(({ name, value }) => {
      const wanted = value.trim().toLowerCase();
      if (name === "find") return wanted.split(/\s+/).every((word) => texts.get(card).includes(word));
      return !wanted || card.dataset[name].split(" ").includes(wanted);
    });

  const named = () => {
    const found = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    return found?.matches(".safescale-card, section[id^='atlas-']") ? found : null;
  };

  function show() {
    const place = named();
    let matching = 0;
    let besides = 0;
    for (const card of cards) {
      const found = matches(card);
      const kept = !found && Boolean(place?.contains(card));
      matching += found;
      besides += kept;
      card.hidden = !found && !kept;
    }
    for (const part of parts) part.hidden = !part.querySelector(".safescale-card:not([hidden])");
    const more = besides ? `, and ${besides} that the address names` : "";
    count.textContent = `${matching} of ${cards.length} cards${more}`;
    return place;
  }

  function read() {
    const state = new URLSearchParams(location.search);
    for (const field of fields) {
      field.value = state.get(field.name) ?? "";
      if (field.selectedIndex === -1) field.value = ""; // a value that no option has
    }
    show()?.scrollIntoView();
  }

  // Typing makes one step in the history, each choice makes one.
  let typing = false;
  function write(replace) {
    const state = new URLSearchParams(fields.filter(({ value }) => value.trim()).map(({ name, value }) => [name, value.trim()]));
    const address = location.pathname + (state.size ? `?${state}` : "");
    if (address === location.pathname + location.search + location.hash) return;
    history[replace ? "replaceState" : "pushState"](null, "", address);
  }

  form.addEventListener("input", ({ target }) => {
    write(typing && target.name === "find");
    typing = target.name === "find";
    show();
  });
  form.addEventListener("reset", () => {
    setTimeout(() => {
      for (const field of fields) field.value = "";
      typing = false;
      write(false);
      show();
    });
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  addEventListener("popstate", () => {
    typing = false;
    read();
  });
  form.hidden = false;
  read();
});
