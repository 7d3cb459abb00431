"use strict";
// Tables that sort, examples that filter. Without this script the page shows everything that it shows with it.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const valueOf = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value ?? cell.textContent.trim();
  };
  for (const head of table.querySelectorAll("th[data-sort]")) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const isDown = head.getAttribute("aria-sort") === "descending";
      const sign = isDown ? 1 : -1;
      for (const other of table.querySelectorAll("[aria-sort]")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", isDown ? "ascending" : "descending");
      const column = Number(head.dataset.sort);
      const compare = (left, right) => {
        const [a, b] = [valueOf(left, column), valueOf(right, column)];
        const difference = Number(a) - Number(b);
        return sign * (Number.isNaN(difference) ? a.localeCompare(b, "en", {numeric: true}) : difference);
      };
      body.append(...[...body.rows].sort(compare));
    });
  }
}

const form = document.getElementById("filter");
const cards = [...document.querySelectorAll(".card")];
if (cards.length) {
  const [topic, encoder, text, count, unfold] =
    ["filter-topic", "filter-encoder", "filter-text", "filter-count", "unfold"].map((id) => document.getElementById(id));
  const tasks = [...document.querySelectorAll("details.task")];
  const words = new Map();
  const wordsOf = (card) => {
    if (!words.has(card)) words.set(card, card.textContent.toLowerCase());
    return words.get(card);
  };
  const apply = () => {
    const sought = text.value.trim().toLowerCase();
    for (const card of cards) {
      card.hidden = Boolean((topic.value && card.dataset.topic !== topic.value)
        || (encoder.value && !card.dataset.encoders.split(" ").includes(encoder.value))
        || (sought && !wordsOf(card).includes(sought)));
    }
    const isFiltered = topic.value || encoder.value || sought;
    for (const task of tasks) {
      task.hidden = !task.querySelector(".card:not([hidden])");
      if (isFiltered && !task.hidden && sought) task.open = true;
    }
    count.value = `${cards.filter((card) => !card.hidden).length} of ${cards.length} examples`;
  };
  for (const field of [topic, encoder, text]) field.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  unfold.addEventListener("click", () => {
    const open = tasks.some((task) => !task.open);
    for (const task of tasks) task.open = open;
    unfold.textContent = open ? "Fold all" : "Unfold all";
  });
  form.hidden = false;
  apply();
}
