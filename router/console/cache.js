// What the caches answered, and how often one that matches by meaning may have been wrong.

import { get } from "./api.js";
import { meter, percent } from "./charts.js";
import { bytes, card, empty, h, number, table } from "./dom.js";

const USES = { hit: "answered from a cache", shared: "answered by another request's execution", miss: "made anew", bypass: "made anew: not to be looked for" };

export async function cache(page, { every }) {
  const shown = h("div", { class: "stack" });
  page.append(shown);
  await every(2, async () => {
    const { cache: found } = await get("/admin/status");
    shown.replaceChildren(...(found ? [uses(found), h("div", { class: "cards" }, Object.entries(found.layers).map(layer))] : [empty("Answers are not kept on this device: the cache is off.")]));
  });
}

function uses({ requests, in_flight: inFlight }) {
  const total = Object.values(requests).reduce((sum, count) => sum + count, 0);
  if (!total) return empty("No request has come by a cache yet.");
  const rows = Object.entries(requests).map(([use, count]) =>
    [use, USES[use] ?? "", meter([use === "hit" || use === "shared" ? "edge" : "random", count / total]), number(count), percent(count / total, 1)]);
  return table(["use:head", ":words", ":meters", "requests:number", "share:number"], rows, { caption: `Requests, ${number(inFlight)} under way` });
}

function layer([name, counts]) {
  const asked = counts.hits + counts.misses;
  const facts = {
    "hit rate": asked ? `${percent(counts.hits / asked, 1)} of ${number(asked)}` : null,
    answers: number(counts.entries),
    size: bytes(counts.size),
    "given up for room": number(counts.evictions),
    errors: number(counts.errors),
  };
  const rest = [asked ? meter(["edge", counts.hits / asked]) : null];
  if (counts.false_hit_rate != null) rest.push(wrong(counts));
  return card(name, null, facts, rest);
}

// A caller who asks anew at once was probably not helped.
function wrong({ hits, suspected, false_hit_rate: rate, refused }) {
  const guards = Object.entries(refused).sort(([, a], [, b]) => b - a);
  const most = Math.max(...guards.map(([, count]) => count), 1);
  return h("div", { class: "stack" },
    h("p", { class: rate > 0.02 ? "bad" : "faint" }, hits ? `${number(suspected)} of ${number(hits)} answers were asked anew at once: ${percent(rate, 1)} suspected false hits.` : "No answer by meaning yet, so none was wrong."),
    hits ? meter(["bad", rate]) : null,
    guards.length ? table(["kept apart by:head", ":meters", "times:number"], guards.map(([guard, count]) => [guard.replaceAll("_", " "), meter(["cloud", count / most]), number(count)]), { caption: "What looked alike and was not" }) : null);
}
