"use strict";
// Shows and hides runs, switches the axis, and shows the numbers under the pointer. The part of the address after
// the # holds what is shown, as in #axis=bytes&hide=1,2.
(() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const charts = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const runs = all("input[name=run]"), axes = all("input[name=axis]");
  const hidden = (run) => runs.length > 0 && !runs[run].checked;

  function show() {
    runs.forEach((input, run) => document.body.classList.toggle(`off-${run}`, !input.checked));
    const axis = axes.find((input) => input.checked);
    if (axis) all("[data-axis]").forEach((card) => { card.hidden = card.dataset.axis !== axis.value; });
  }

  function read() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    const hide = (wanted.get("hide") || "").split(",");
    runs.forEach((input, run) => { input.checked = !hide.includes(String(run)); });
    const axis = axes.find((input) => input.value === wanted.get("axis"));
    if (axis) axis.checked = true;
    show();
  }

  function write() {
    const axis = axes.find((input) => input.checked);
    const hide = runs.map((input, run) => (input.checked ? null : run)).filter((run) => run !== null);
    const parts = [...(axis ? [`axis=${encodeURIComponent(axis.value)}`] : []), ...(hide.length ? [`hide=${hide}`] : [])];
    history.replaceState(null, "", `#${parts.join("&")}`);
    show();
  }

  function number(value) {
    return Math.abs(value) >= 1e5 ? value.toLocaleString("en-US") : String(+value.toPrecision(5));
  }

  function point(event) {
    const svg = event.currentTarget, chart = charts[svg.closest("figure").dataset.chart];
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const [left, , right] = chart.box, [low, high] = chart.xlim;
    const share = ((event.clientX - box.left) * scale - left) / (right - left);
    if (share < -0.02 || share > 1.02) return leave();
    const place = (x) => chart.log ? Math.log(x / low) / Math.log(high / low) : (x - low) / (high - low);
    const lines = [];
    for (const curve of chart.curves) {
      if (hidden(curve.run)) continue;
      let best = 0;
      curve.x.forEach((x, i) => { if (Math.abs(place(x) - share) < Math.abs(place(curve.x[best]) - share)) best = i; });
      lines.push([curve, best]);
    }
    tip.replaceChildren(...lines.map(([curve, best]) => {
      const line = document.createElement("div"), key = document.createElement("i");
      key.style.background = `var(--c${curve.run % 8})`;
      line.append(key, `${curve.name}: ${number(curve.y[best])} at ${number(curve.x[best])}`);
      return line;
    }));
    tip.hidden = lines.length === 0;
    const width = tip.offsetWidth;
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 4))}px`;
    tip.style.top = `${Math.max(4, event.clientY - tip.offsetHeight - 12)}px`;
  }

  function leave() { tip.hidden = true; }

  for (const input of [...runs, ...axes]) input.addEventListener("change", write);
  for (const svg of all("figure[data-chart] svg")) {
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("pointerleave", leave);
  }
  addEventListener("hashchange", read);
  read();
})();
