// Sorts a table by the column whose title is clicked: figures by their value, anything else by name.
for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "descending";
      for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "ascending" : "descending");
      const key = (row) => {
        const text = row.cells[column].textContent;
        return [/^[+-]?\d+(\.\d+)?%?( \[|$)/.test(text) ? parseFloat(text) : NaN, text];
      };
      const order = (a, b) => {
        const [[x, first], [y, second]] = [key(a), key(b)];
        if (isNaN(x) && isNaN(y)) return first.localeCompare(second) * (down ? 1 : -1);
        if (isNaN(x) || isNaN(y)) return isNaN(x) ? 1 : -1;
        return (x - y) * (down ? 1 : -1);
      };
      for (const body of table.tBodies) body.append(...[...body.rows].sort(order));
    });
  });
}
