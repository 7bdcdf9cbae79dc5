// Marks the tables that a phone shows a row at a time (site.css): of several columns, with sentences in them.
const COLUMNS = 3;
const SENTENCE = 40;

for (const table of document.querySelectorAll(".md-content table:not([class])")) {
  const columns = Array.from(table.querySelectorAll("thead th"), (head) => head.textContent.trim());
  const cells = Array.from(table.querySelectorAll("tbody td"));
  if (columns.length >= COLUMNS && cells.some((cell) => cell.textContent.length > SENTENCE)) {
    table.dataset.stacked = "";
    for (const cell of cells) {
      cell.dataset.column = columns[cell.cellIndex];
    }
  }
}
