for (const head of document.querySelectorAll("table.sort th")) {
  head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") === "descending";
    const body = head.closest("table").tBodies[0], column = head.cellIndex;
    const key = (row) => {
      const text = row.cells[column].textContent.replace(/,/g, "");
      const value = parseFloat(text);
      return isNaN(value) ? text : value;
    };
    const order = (a, b) => {
      const [x, y] = [key(a), key(b)];
      const less = typeof x === typeof y ? (x < y ? -1 : x > y ? 1 : 0)
        : typeof x === "number" ? -1 : 1;
      return up ? less : -less;
    };
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...[...body.rows].sort(order));
  });
}
// Values where the pointer is: a line, a dot on every curve, and a text in the chart.
for (const text of document.querySelectorAll("svg .reading")) {
  const svg = text.ownerSVGElement, line = svg.querySelector(".pointer");
  const curves = [...svg.querySelectorAll("[data-values]")].map((group) => ({
    name: group.dataset.name,
    values: group.dataset.values.split(";").map((pair) => pair.split(" ")),
    points: [...group.querySelector("polyline").points],
    dot: group.querySelector(".end"),
  }));
  const put = (dot, point) => {
    dot.setAttribute("cx", point.x);
    dot.setAttribute("cy", point.y);
  };
  const show = (event) => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const near = curves.map((curve) => {
      const far = curve.points.map((point) => Math.abs(point.x - x));
      const n = far.indexOf(Math.min(...far));
      put(curve.dot, curve.points[n]);
      return { curve, n, far: far[n] };
    });
    const { curve, n } = near.reduce((a, b) => (b.far < a.far ? b : a));
    const at = curve.points[n].x, left = at < svg.viewBox.baseVal.width / 2;
    line.setAttribute("d", `M${at} ${line.dataset.top}V${line.dataset.bottom}`);
    const rows = [`${text.dataset.axis} ${curve.values[n][0]}`];
    for (const each of near) {
      const [step, value] = each.curve.values[each.n];
      const where = step === curve.values[n][0] ? "" : ` (${step})`;
      rows.push(curves.length > 1 ? `${each.curve.name} ${value}${where}` : value);
    }
    text.setAttribute("text-anchor", left ? "start" : "end");
    text.replaceChildren(...rows.map((row) => {
      const span = document.createElementNS(svg.namespaceURI, "tspan");
      span.setAttribute("x", at + (left ? 8 : -8));
      span.setAttribute("dy", 14);
      span.textContent = row;
      return span;
    }));
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", () => {
    text.replaceChildren();
    line.setAttribute("d", "");
    for (const { dot, points } of curves) put(dot, points.at(-1));
  });
}
addEventListener("beforeprint", () => {
  for (const fold of document.querySelectorAll("details")) fold.open = true;
});
// Frames of which a slider shows one.
for (const box of document.querySelectorAll(".frames")) {
  const label = box.querySelector(".slider"), slider = label.querySelector("input");
  const frames = [...box.querySelectorAll(".frame")];
  const show = () => {
    frames.forEach((frame, n) => { frame.hidden = n !== slider.valueAsNumber; });
    const name = frames[slider.valueAsNumber].dataset.name;
    label.querySelector("output").textContent = name;
    slider.setAttribute("aria-valuetext", name);
  };
  label.hidden = false;
  slider.addEventListener("input", show);
  show();
}
// What is wider than its box can be scrolled with the keyboard, and has a name.
function reachable(box) {
  const wide = box.scrollWidth > box.clientWidth;
  const title = box.closest("section").querySelector("h2").textContent;
  const names = { tabindex: "0", role: "group", "aria-label": `${title}, scrollable` };
  for (const [name, value] of Object.entries(names)) {
    wide ? box.setAttribute(name, value) : box.removeAttribute(name);
  }
}
const scrolled = [...document.querySelectorAll(".scroll")];
const boxes = new ResizeObserver((entries) => entries.forEach((entry) => reachable(entry.target)));
scrolled.forEach((box) => boxes.observe(box));
addEventListener("load", () => scrolled.forEach(reachable)); // pictures widen what is in a box
