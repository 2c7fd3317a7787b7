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
addEventListener("beforeprint", () => {
  for (const fold of document.querySelectorAll("details")) fold.open = true;
});
