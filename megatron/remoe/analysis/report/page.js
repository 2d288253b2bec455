"use strict";
(async () => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const select = document.getElementById("layer");

  // Tables sort by the keys of their cells.
  for (const button of all(".sortable th button")) {
    button.addEventListener("click", () => {
      const title = button.parentElement;
      const body = title.closest("table").tBodies[0];
      const up = title.getAttribute("aria-sort") !== "ascending";
      const column = title.cellIndex;
      const key = (row) => row.cells[column].dataset.key;
      const numbers = [...body.rows].every((row) => key(row) !== "" && !isNaN(key(row)));
      const compare = numbers ? (a, b) => key(a) - key(b) : (a, b) => key(a).localeCompare(key(b));
      for (const other of all("th", title.parentElement)) other.removeAttribute("aria-sort");
      title.setAttribute("aria-sort", up ? "ascending" : "descending");
      body.append(...[...body.rows].sort((a, b) => (up ? compare(a, b) : compare(b, a))));
    });
  }

  if (!globalThis.DecompressionStream) {
    document.getElementById("notice").hidden = false;
    return;
  }
  const inflate = (id) => {
    const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };
  const { plots, tables, texts, templates } = JSON.parse(await inflate("data"));

  for (const link of all("a.csv")) {
    const table = tables[link.dataset.table];
    if (table === undefined) link.hidden = true;
    else link.href = URL.createObjectURL(new Blob([table], { type: "text/csv" }));
  }

  // The switch for the layer shows what belongs to it, and colors the text.
  const samples = all(".sample").map((root) => ({
    root,
    tokens: all(".tokens span", root),
    told: root.querySelector(".told"),
    ...texts[root.dataset.sample],
  }));
  const show = () => {
    const layer = select.value;
    for (const one of all("[data-layer]")) one.hidden = !one.dataset.layer.split(" ").includes(layer);
    for (const one of all(".which")) {
      one.textContent = layer === "all" ? "mean over layers" : `layer ${layer}`;
    }
    for (const { root, tokens, layers } of samples) {
      const { levels, scale } = layers[layer] ?? { levels: "", scale: [] };
      tokens.forEach((token, i) => (token.className = `c${levels[i] ?? ""}`));
      root.querySelector(".scale").replaceChildren(
        ...scale.flatMap(([level, meaning]) => {
          const sign = document.createElement("span");
          sign.className = `c${level}`;
          sign.textContent = meaning;
          return [sign, " "];
        }),
      );
    }
  };
  select.addEventListener("change", show);
  show();

  for (const { root, tokens, told, counts, losses } of samples) {
    const places = new Map(tokens.map((token, i) => [token, i]));
    const tell = (event) => {
      const i = places.get(event.target);
      if (i === undefined) return;
      const experts = Object.entries(counts).map(([layer, values]) => `layer ${layer}: ${values[i]}`);
      told.textContent = `“${event.target.textContent}” · active experts in ${experts.join(", ")} · loss of the next token ${losses[i]}`;
    };
    root.addEventListener("pointerover", tell);
    root.addEventListener("click", tell);
  }

  // Figures are drawn when they come near the screen, or before the page is printed.
  const script = document.createElement("script");
  script.textContent = await inflate("plotly");
  document.head.append(script);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const look = () => (dark.matches ? templates.dark : templates.light);
  const config = { responsive: true, displayModeBar: false };
  const dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom"; // a finger scrolls
  const drawn = new Set();
  const draw = (plot) => {
    if (drawn.has(plot)) return;
    drawn.add(plot);
    const { data, layout } = plots[plot.id];
    Plotly.newPlot(plot, data, { ...layout, dragmode, template: look() }, config);
  };
  const near = new IntersectionObserver(
    (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => draw(entry.target)),
    { rootMargin: "400px" },
  );
  const every = all(".plot");
  every.forEach((plot) => near.observe(plot));
  const redraw = (template, size) => drawn.forEach((plot) => Plotly.relayout(plot, { template, ...size }));
  dark.addEventListener("change", () => redraw(look(), {}));
  addEventListener("beforeprint", () => {
    every.filter((plot) => !plot.closest("[hidden]")).forEach(draw);
    redraw(templates.light, { width: 640 });
  });
  addEventListener("afterprint", () => redraw(look(), { width: null, autosize: true }));
})();
