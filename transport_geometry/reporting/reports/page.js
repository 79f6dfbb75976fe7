"use strict";
// tables: a head sorts by its column, numbers by their value (an interval by its first), what is missing last
const missing = text => text === "" || text === "undefined";
function number(text) {
  const form = /^[^\w+-]*([+-]?\d[\d,]*\.?\d*(?:e[+-]?\d+)?)([kMB]?)(?!\w)/i;
  const found = text.replace(/\u2212/g, "-").match(form);
  const scale = {k: 1e3, m: 1e6, b: 1e9};
  return found ? found[1].replace(/,/g, "") * (scale[found[2].toLowerCase()] || 1) : NaN;
}
function sort(table, column) {
  const head = table.tHead.rows[0].cells[column], body = table.tBodies[0], rows = [...body.rows];
  const text = row => row.cells[column].textContent.trim();
  const there = rows.filter(row => !missing(text(row)));
  const numeric = there.every(row => !Number.isNaN(number(text(row))));
  const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const compare = numeric ? (a, b) => number(text(a)) - number(text(b))
    : (a, b) => text(a).localeCompare(text(b), "en", {numeric: true});
  there.sort((a, b) => down * compare(a, b));
  body.append(...there, ...rows.filter(row => missing(text(row))));
  for (const one of head.parentNode.cells) one.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down > 0 ? "ascending" : "descending");
}
for (const table of document.querySelectorAll("table"))
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const name = head.textContent;
    head.textContent = "";
    const button = head.appendChild(document.createElement("button"));
    Object.assign(button, {type: "button", textContent: name});
    button.ariaLabel = name || "first column";
    button.onclick = () => sort(table, column);
  });
