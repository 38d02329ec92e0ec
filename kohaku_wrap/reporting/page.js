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
    all("svg.plot").forEach((plot) => plot.toggleAttribute("hidden", plot.dataset.axis !== axis));
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
    const near = (high - low) / 60;
    const words = pieces(chart.dataset.chart).flatMap((piece) => {
      const spot = nearest(piece.x[axis], x);
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

  // A page of a run that goes on reloads itself, and stays where it was scrolled to.
  const reload = +document.body.dataset.reload;
  if (reload) {
    if (kept.scroll !== undefined) { history.scrollRestoration = "manual"; scrollTo(0, kept.scroll); }
    addEventListener("pagehide", () => { kept.scroll = scrollY; keep(); });
    setInterval(() => { if (!document.querySelector("dialog[open]")) location.reload(); }, reload * 1000);
  }
})();
