// Decisions as they are made, newest first.

import { get } from "./api.js";
import { chip, clock, empty, h, money, ms, number, row, table } from "./dom.js";

const KEPT = 500;
const COLUMNS = ["time", "target", "why:reason", "model:words", "prompt:number", "answer:number", "first token:number", "whole:number", "cost:number", "ended:detail"];

export async function decisions(page, { every }) {
  let last = 0;
  const rows = [];
  const filter = h("input", { type: "search", class: "grow", placeholder: "Filter: a reason, a model, a tenant, edge, cloud …", "aria-label": "Filter", oninput: show });
  const held = h("input", { type: "checkbox" });
  const count = h("span", { class: "faint", role: "status" });
  const body = table(COLUMNS, []);
  const nothing = empty("Nothing yet. Decisions appear here when their requests have ended.");
  page.append(h("div", { class: "row" }, filter, h("label", {}, held, " Hold"), count), nothing, body);

  function show() {
    const wanted = filter.value.trim().toLowerCase();
    const found = rows.filter((one) => one.text.includes(wanted));
    body.querySelector("tbody").replaceChildren(...found.map((one) => one.element));
    count.textContent = rows.length ? `${number(found.length)} of the latest ${number(rows.length)}` : "";
    nothing.hidden = rows.length > 0;
    body.hidden = !rows.length;
  }

  await every(1, async () => {
    if (held.checked) return;
    const found = (await get(`/admin/decisions?after=${last}`)).decisions;
    if (found.length) {
      last = found.at(-1).number;
      rows.unshift(...found.reverse().map(shown));
      rows.length = Math.min(rows.length, KEPT);
    }
    if (found.length || !rows.length) show();
  });
}

function shown(one) {
  const target = one.refused ? "refused" : one.target;
  const served = one.served && one.served !== one.target ? [one.switched ? " then " : " → ", chip(one.served)] : null;
  const element = row(COLUMNS, [
    clock(one.at),
    [chip(target), served],
    [one.reason || one.refused, more(one)],
    h("span", { class: "cut", title: one.model }, one.model),
    number(one.prompt_tokens),
    number(one.completion_tokens),
    ms(one.first_token_s),
    ms(one.total_s),
    money(one.cost, one.currency),
    one.refused || one.ending,
  ]);
  return { text: `${target} ${one.reason} ${one.model} ${one.refused || one.ending} ${one.tenant} ${one.label} ${one.cache} ${one.policy}`.toLowerCase(), element };
}

function more(one) {
  const said = [
    one.label !== "free" ? one.label : null,
    one.redact ? "redacted" : null,
    one.tenant ? `tenant ${one.tenant}` : null,
    one.difficulty == null || one.reason.includes("difficulty") ? null : `difficulty ${one.difficulty.toFixed(2)}`,
    one.judged,
    ["hit", "shared"].includes(one.cache) ? `cache ${one.cache}` : null,
    one.shadow && one.shadow !== (one.target || one.refused) ? `shadow: ${one.shadow}` : null,
    `policy ${one.policy}`,
  ].filter(Boolean);
  return h("small", { class: "faint" }, said.join(" · "));
}
