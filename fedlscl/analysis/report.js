// A click on the head of a column sorts the table by it, a second one the other way round, a third one as it was.
for (const table of document.querySelectorAll("table.numbers")) {
  const body = table.tBodies[0], before = [...body.rows], heads = [...table.tHead.rows[0].cells];
  if (before.length < 2) continue;
  heads.forEach((head, column) => {
    const numeric = head.classList.contains("number") || before.some((row) => row.cells[column].dataset.sort);
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    const value = (row) => {
      const cell = row.cells[column];
      if (!numeric) return cell.textContent.trim();
      const found = parseFloat(cell.dataset.sort ?? cell.textContent.trim().replace(/,/g, ""));
      return Number.isNaN(found) ? null : found;
    };
    button.addEventListener("click", () => {
      const first = numeric ? "descending" : "ascending", second = numeric ? "ascending" : "descending";
      const now = head.getAttribute("aria-sort"), next = now === first ? second : now === second ? null : first;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      if (next) head.setAttribute("aria-sort", next);
      const sign = next === "descending" ? -1 : 1;
      // what has no number stays at the end
      const sorted = next && [...before].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === null || y === null) return (x === null) - (y === null);
        return sign * (numeric ? x - y : x.localeCompare(y));
      });
      body.append(...(sorted || before));
    });
  });
}
