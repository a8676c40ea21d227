// Decisions as they are made, newest first.

import { get } from "./api.js";
import { chip, clock, h, money, ms, number, table } from "./dom.js";

const KEPT = 500;

export async function decisions(page, { every }) {
  let last = 0;
  const rows = [];
  const filter = h("input", { type: "search", class: "grow", placeholder: "Filter: a reason, a model, edge, cloud …", "aria-label": "Filter", oninput: show });
  const body = table(["time", "target", "why", "model", "prompt", "answer", "first token", "whole", "cost", "ended", "shadow", "policy"], []);
  const empty = h("p", { class: "faint" }, "Nothing yet. Decisions appear here when their requests have ended.");
  page.append(h("div", { class: "row" }, filter), empty, body);

  function show() {
    const wanted = filter.value.trim().toLowerCase();
    body.querySelector("tbody").replaceChildren(...rows.filter((row) => row.text.includes(wanted)).map((row) => row.element));
    empty.hidden = rows.length > 0;
  }

  await every(1, async () => {
    const found = (await get(`/admin/decisions?after=${last}`)).decisions;
    if (!found.length) return show();
    last = found.at(-1).number;
    rows.unshift(...found.reverse().map(row));
    rows.length = Math.min(rows.length, KEPT);
    show();
  });
}

function row(one) {
  const target = one.refused ? "refused" : one.target;
  const cells = [
    h("td", {}, clock(one.at)),
    h("td", {}, chip(target), one.served && one.served !== one.target ? [" → ", chip(one.served)] : null),
    h("td", { class: "reason" }, one.reason, one.redact ? " (redacted)" : "", one.label !== "free" ? ` [${one.label}]` : ""),
    h("td", {}, one.model),
    h("td", { class: "number" }, number(one.prompt_tokens)),
    h("td", { class: "number" }, number(one.completion_tokens)),
    h("td", { class: "number" }, ms(one.first_token_s)),
    h("td", { class: "number" }, ms(one.total_s)),
    h("td", { class: "number" }, money(one.cost, one.currency)),
    h("td", {}, one.refused || one.ending),
    h("td", {}, one.shadow ?? "–"),
    h("td", {}, h("code", {}, one.policy)),
  ];
  return { text: `${target} ${one.reason} ${one.model} ${one.ending} ${one.tenant}`.toLowerCase(), element: h("tr", {}, cells) };
}
