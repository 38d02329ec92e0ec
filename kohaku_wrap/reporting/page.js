"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const key = "kwrap " + location.pathname;
  let kept = {};
  try { kept = JSON.parse(sessionStorage.getItem(key) || "{}"); } catch { /* a browser that keeps nothing */ }
  const keep = () => { try { sessionStorage.setItem(key, JSON.stringify(kept)); } catch { /* the same */ } };

  // The axis: each chart is drawn once for each, and one of them is shown.
  const show = (axis) => {
    all(".chart svg.plot").forEach((plot) => plot.toggleAttribute("hidden", plot.dataset.axis !== axis));
    all(".readout").forEach((line) => { line.textContent = "\u00a0"; });
    kept.axis = axis;
    keep();
  };
  const radios = all("input[name=axis]");
  const chosen = radios.find((each) => each.value === kept.axis) || radios[0];
  if (chosen) {
    chosen.checked = true;
    radios.forEach((each) => each.addEventListener("change", () => show(each.value)));
    show(chosen.value);
  }

  // The values under the pointer, or under the cursor that the arrow keys move.
  const number = (value) => (Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(4)));
  const pieces = (name) => data.runs.flatMap((run) => run.charts[name] || []);
  const nearest = (places, x) => {
    let low = 0, high = places.length - 1;
    while (high - low > 1) { const middle = (low + high) >> 1; if (places[middle] < x) low = middle; else high = middle; }
    return Math.abs(places[low] - x) <= Math.abs(places[high] - x) ? low : high;
  };
  const tell = (chart, plot, x) => {
    const axis = plot.dataset.axis, low = +plot.dataset.xLow, high = +plot.dataset.xHigh;
    const at = ((x - low) / (high - low)) * 1000;
    plot.querySelector(".cursor").setAttribute("d", `M${at},0 ${at},200`);
    const words = pieces(chart.dataset.chart).flatMap((piece) => {
      const places = piece.x[axis], spot = nearest(places, x);
      const near = Math.max((high - low) / 60, (places[places.length - 1] - places[0]) / Math.max(1, places.length - 1) * 0.6);
      if (Math.abs(piece.x[axis][spot] - x) > near) return [];
      const span = piece.low[spot] === piece.high[spot] ? "" : ` (${number(piece.low[spot])} to ${number(piece.high[spot])})`;
      return [`${piece.label}, attempt ${piece.attempt}${piece.kept ? "" : ", trained again later"}, step ${number(piece.x.steps[spot])}: ${number(piece.value[spot])}${span}`];
    });
    chart.querySelector(".readout").textContent = words.join("  ·  ") || "\u00a0";
  };
  all(".chart").forEach((chart) => {
    const shown = () => chart.querySelector("svg.plot:not([hidden])");
    let share = 0.5;
    const move = () => { const plot = shown(); tell(chart, plot, +plot.dataset.xLow + share * (plot.dataset.xHigh - plot.dataset.xLow)); };
    chart.addEventListener("pointermove", (event) => {
      const box = shown().getBoundingClientRect();
      share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      move();
    });
    chart.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -0.01, ArrowRight: 0.01, Home: -1, End: 1 }[event.key];
      if (!by) return;
      share = Math.min(1, Math.max(0, share + by));
      move();
      event.preventDefault();
    });
  });

  // Pictures: a slider over the steps, and a large view that the arrow keys go through.
  const dialog = document.querySelector("dialog");
  all(".gallery").forEach((gallery) => {
    const place = gallery.dataset.run;
    const { steps, rows } = data.runs[place].pictures;
    const slider = gallery.querySelector("input");
    const figures = all("figure", gallery);
    const put = (image, row, at) => {
      const address = rows[row].cells[steps[at]];
      image.alt = `${rows[row].label}, optimizer step ${steps[at]}${address ? "" : ": not drawn"}`;
      if (address) image.src = address; else image.removeAttribute("src");
    };
    const slide = () => {
      gallery.querySelector("output").textContent = steps[slider.value].toLocaleString("en");
      figures.forEach((figure) => put(figure.querySelector("img"), figure.dataset.row, slider.value));
      kept["slider" + place] = steps[slider.value];
      keep();
    };
    slider.addEventListener("input", slide);
    const before = steps.indexOf(kept["slider" + place]);
    if (before >= 0) { slider.value = before; slide(); }
    figures.forEach((figure) => figure.querySelector("button").addEventListener("click", () => {
      const row = figure.dataset.row;
      let at = +slider.value;
      const large = () => { put(dialog.querySelector("img"), row, at); dialog.querySelector("p").textContent = `${rows[row].label}, optimizer step ${steps[at]}`; };
      dialog.onkeydown = (event) => {
        const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
        if (by) { at = Math.min(steps.length - 1, Math.max(0, at + by)); large(); event.preventDefault(); }
      };
      large();
      dialog.showModal();
    }));
  });
  if (dialog) {
    dialog.querySelector("button").addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  }

  // A table of runs is sorted by the column whose head is pressed, and the other way when it is pressed again.
  all("table.sortable thead button").forEach((button, column) => button.addEventListener("click", () => {
    const head = button.parentElement, body = head.closest("table").tBodies[0];
    const falls = head.getAttribute("aria-sort") === "ascending";
    all("th", head.parentElement).forEach((each) => each.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", falls ? "descending" : "ascending");
    const value = (row) => { const cell = row.cells[column]; return "sort" in cell.dataset ? parseFloat(cell.dataset.sort) : cell.textContent.trim(); };
    const compare = (one, two) => (typeof one === "string" ? one.localeCompare(two) : (isNaN(one) ? -Infinity : one) - (isNaN(two) ? -Infinity : two) || 0);
    body.append(...[...body.rows].sort((one, two) => compare(value(one), value(two)) * (falls ? -1 : 1)));
  }));

  // A page of a run that goes on reloads itself, and stays where it was scrolled to.
  const reload = +document.body.dataset.reload;
  if (reload) {
    if (kept.scroll !== undefined) { history.scrollRestoration = "manual"; scrollTo(0, kept.scroll); }
    addEventListener("pagehide", () => { kept.scroll = scrollY; keep(); });
    setInterval(() => { if (!document.querySelector("dialog[open]")) location.reload(); }, reload * 1000);
  }
})();
