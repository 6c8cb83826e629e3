// On a phone, a table that is wider than the page, or has rows of many lines, shows a block for each row, with a label for
// each cell.
const MAX_ROW_HEIGHT = 120; // pixels
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
    const isNarrow = table.scrollWidth > width || [...table.rows].some((row) => row.clientHeight > MAX_ROW_HEIGHT);
    table.toggleAttribute("data-stacked", innerWidth < 720 && isNarrow);
  }
}

addEventListener("resize", stackWideTables);
stackWideTables();

// No line ends within an option such as --batch-size.
for (const code of document.querySelectorAll(".md-content :not(pre) > code")) {
  code.classList.toggle("option", /^-[\w-]+$/.test(code.textContent));
}
for (const code of document.querySelectorAll(".md-content .highlight code:not(:has(span))")) {
  code.innerHTML = code.innerHTML.replace(/(?<=^|\s)-[\w-]+/g, '<span class="option">$&</span>');
}
