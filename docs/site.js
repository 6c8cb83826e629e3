// On a phone, a table that is wider than the page shows a block for each row, with a label for each cell.
const tables = document.querySelectorAll(".md-content table:not([class])");

for (const table of tables) {
  const labels = [...table.querySelectorAll("thead th")].map((cell) => cell.textContent);
  for (const row of table.querySelectorAll("tbody tr")) {
    [...row.cells].forEach((cell, i) => (cell.dataset.label = labels[i]));
  }
}

function stackWideTables() {
  for (const table of tables) {
    table.removeAttribute("data-stacked");
    const width = table.closest(".md-content__inner").clientWidth;
    table.toggleAttribute("data-stacked", innerWidth < 720 && table.scrollWidth > width);
  }
}

addEventListener("resize", stackWideTables);
stackWideTables();
