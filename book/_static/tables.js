// Tables to sort and search, by DataTables. Without the script the table stands whole in the page.
// The search and the chosen values stand in the address, so that a view can be shared.
document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll("table.safescale-sortable").forEach((table, number) => {
    const titles = JSON.parse(table.dataset.filters || "{}");
    const asked = new URLSearchParams(location.search);
    const rows = [...table.tBodies[0].rows];
    const chosen = {};

    const controls = document.createElement("div");
    controls.className = "safescale-choices";
    for (const [name, title] of Object.entries(titles)) {
      const id = `safescale-choice-${number}-${name}`;
      const label = Object.assign(document.createElement("label"), { htmlFor: id, textContent: title });
      const select = Object.assign(document.createElement("select"), { id, name });
      const values = [...new Set(rows.map((row) => row.dataset[name]))].filter(Boolean);
      select.append(new Option("All", ""), ...values.map((value) => new Option(value, value)));
      select.value = values.includes(asked.get(name)) ? asked.get(name) : "";
      chosen[name] = select;
      const field = document.createElement("div");
      field.append(label, select);
      controls.append(field);
    }

    const drawn = new DataTable(table, {
      autoWidth: false,
      order: [],
      pageLength: 50,
      lengthMenu: [25, 50, 100, { label: "all", value: -1 }],
      search: { search: asked.get("find") ?? "" },
      layout: {
        top2: controls.childElementCount ? controls : null,
        topStart: "search",
        topEnd: "info",
        bottomStart: "pageLength",
        bottomEnd: "paging",
      },
      language: {
        search: "Search",
        info: "Rows _START_ to _END_ of _TOTAL_",
        infoEmpty: "No rows",
        infoFiltered: "(of _MAX_)",
        lengthMenu: "_MENU_ rows a page",
        zeroRecords: "No row fits.",
      },
    });
    drawn.search.fixed("choices", (text, data, index) => {
      const row = drawn.row(index).node();
      return Object.entries(chosen).every(([name, { value }]) => !value || row.dataset[name] === value);
    });
    const remember = () => {
      const chosenNow = Object.entries(chosen).map(([name, { value }]) => [name, value]);
      const state = new URLSearchParams([["find", drawn.search()], ...chosenNow].filter(([, value]) => value));
      const address = location.pathname + (state.size ? `?${state}` : "") + location.hash;
      if (address !== location.pathname + location.search + location.hash) history.replaceState(null, "", address);
    };
    controls.addEventListener("change", () => drawn.draw());
    drawn.on("search.dt", remember);
    drawn.draw();
  });
});
