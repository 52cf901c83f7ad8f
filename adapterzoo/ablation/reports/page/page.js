"use strict";
// Without this script every table and picture is there; it adds sorting and filtering.

const ORDERS = ["none", "ascending", "descending"];

function key(cell) {
  if ("none" in cell.dataset) return null;
  const value = cell.dataset.key;
  if (value === undefined) return cell.textContent;
  return Number.isNaN(Number(value)) ? value : Number(value);
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}

function sort(table, rows, index, order) {
  const sorted = [...rows];
  if (order !== "none") {
    const sign = order === "ascending" ? 1 : -1;
    const keys = new Map(rows.map((row) => [row, key(row.cells[index])]));
    sorted.sort((a, b) => {
      const [x, y] = [keys.get(a), keys.get(b)];
      if (x === null || y === null) return (x === null) - (y === null); // what is not there comes last
      return sign * compare(x, y);
    });
  }
  table.tBodies[0].append(...sorted);
}

function makeSortable(table, rows) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = header.textContent;
    header.replaceChildren(button);
    header.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const next = ORDERS[(ORDERS.indexOf(header.getAttribute("aria-sort")) + 1) % ORDERS.length];
      headers.forEach((other) => other.setAttribute("aria-sort", "none"));
      header.setAttribute("aria-sort", next);
      sort(table, rows, index, next);
    });
  });
}

function labelled(text, control) {
  const label = document.createElement("label");
  label.append(text, control);
  return label;
}

function choice(rows, index) {
  const select = document.createElement("select");
  const values = [...new Set(rows.map((row) => row.cells[index].textContent))];
  select.append(new Option("all", "", true, true));
  values.forEach((value, place) => select.append(new Option(value || "(none)", String(place))));
  const passes = (row) => select.value === "" || row.cells[index].textContent === values[Number(select.value)];
  return { select, passes, several: values.length > 1 };
}

function makeFilters(listing, table, rows) {
  const bar = document.createElement("div");
  bar.className = "filters";
  bar.setAttribute("role", "search");
  const text = document.createElement("input");
  text.type = "search";
  bar.append(labelled("text", text));
  const choices = [];
  [...table.tHead.rows[0].cells].forEach((header, index) => {
    if (!("filtered" in header.dataset)) return;
    const one = choice(rows, index);
    if (!one.several) return;
    choices.push(one);
    bar.append(labelled(header.textContent, one.select));
  });
  const shown = document.createElement("output");
  shown.setAttribute("aria-live", "polite");
  bar.append(shown);
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  const apply = () => {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const visible = choices.every((one) => one.passes(row)) && words.every((word) => texts.get(row).includes(word));
      row.hidden = !visible;
      count += visible;
    }
    shown.textContent = `${count} of ${rows.length} rows`;
  };
  bar.addEventListener("input", apply);
  apply();
  listing.prepend(bar);
}

for (const listing of document.querySelectorAll(".listing")) {
  const table = listing.querySelector("table");
  const rows = [...table.tBodies[0].rows];
  if (rows.length < 2) continue;
  if (rows.length > 5) makeFilters(listing, table, rows);
  makeSortable(table, rows);
}

// On paper nothing can be opened: pictures of all panels are printed, tracebacks only where they were open.
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details.more:not([open])")];
  opened.forEach((part) => { part.open = true; });
});
addEventListener("afterprint", () => opened.forEach((part) => { part.open = false; }));
