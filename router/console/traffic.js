// What the latest decisions come to: where they went and why, how long it took, what was predicted, what it cost.

import { get } from "./api.js";
import { chart, figure, linear, meter, named, percent } from "./charts.js";
import { empty, h, money, moment, ms, number, table } from "./dom.js";

const GROUPS = [":head", ":meters", "decisions:number", "share:number", "to the cloud:number", "refused:number", "failed:number", "first token p50:number", "p95:number", "cost:number"];
const LISTED = 20;

export async function traffic(page) {
  const found = await get("/admin/activity");
  if (!found.decisions) return page.append(empty("Nothing yet. What requests come to is shown here when they have ended."));
  const { goal, in_force: aim } = await get("/admin/difficulty");
  page.append(h("div", { class: "stack" },
    h("p", { class: "faint" }, `The latest ${number(found.decisions)} decisions, from ${moment(found.first_at)} to ${moment(found.last_at)}.`),
    h("div", { class: "columns" }, h("div", { class: "card" }, shares(found.periods, goal && aim)), h("div", { class: "stack" }, waits(found), attained(found))),
    forecasts(found),
    ...["targets", "rules", "tenants", "classes"].map((what) => groups(what, found)),
    spending(found)));
}

function shares(periods, aim) {
  const all = periods.map((one, at) => [at, one.to_cloud / one.decisions]);
  const byGoal = periods.map((one, at) => [at, one.goal_to_cloud / one.by_goal]).filter(([, share]) => !Number.isNaN(share));
  const lines = [{ kind: "cloud", points: all }, { kind: "router", points: byGoal }];
  if (aim) lines.push({ kind: "random", points: [[-0.5, aim.cloud_share], [periods.length - 0.5, aim.cloud_share]] });
  const legend = { cloud: "of all decisions", router: "of those that the goal decided", ...(aim ? { random: `the goal's target, ${percent(aim.cloud_share)}` } : {}) };
  const said = `Share to the cloud: ${percent(all.at(-1)[1])} in the latest period`;
  return figure(chart(said, named("time, UTC", periods.map((one) => one.label.slice(5))), linear("to the cloud", 0, 1), lines, all.map((at) => ({ kind: "cloud", at, r: 2.5 }))), said, legend);
}

function waits({ waits }) {
  const three = (spread) => (spread ? [ms(spread.p50), ms(spread.p95), ms(spread.p99)] : ["–", "–", "–"]);
  const rows = waits.flatMap((one) => [[`${one.server}: first token`, ...three(one.first_token_s)], [`${one.server}: whole answer`, ...three(one.total_s)]]);
  return table(["answered by:head", "p50:number", "p95:number", "p99:number"], rows, { caption: "Waits" });
}

function attained({ attained }) {
  const rows = attained.map((one) => [spaced(one.name), number(one.requests), percent(one.p50), percent(one.p95), percent(one.p99)]);
  return table(["class:head", "requests:number", "in p50:number", "in p95:number", "in p99:number"], rows, { caption: "First tokens within their class's targets" });
}

function forecasts({ forecasts }) {
  if (!forecasts.length) return empty("Nothing was predicted yet: it takes some answers of each side to tell from.");
  const what = { first_token_s: "first token", total_s: "whole answer" };
  const rows = forecasts.map((one) => [`${one.target}: ${what[one.what]}`, number(one.answers), ms(one.off_s.p50), ms(one.off_s.p95), percent(one.too_low)]);
  return table(["prediction of:head", "answers:number", "off by p50:number", "p95:number", "took longer:number"], rows, { caption: "Predicted and happened" });
}

const spaced = (name) => name.replaceAll("_", " ");

const cost = (amounts) => Object.entries(amounts).map(([currency, amount]) => money(amount, currency)).join(", ") || "–";

function groups(what, found) {
  const all = found[what];
  const rows = all.slice(0, LISTED).map((one) => [
    (what === "classes" ? spaced(one.name) : one.name) || "(no key shown)",
    meter(...[["edge", one.decisions - one.to_cloud - one.refused], ["cloud", one.to_cloud], ["bad", one.refused]].map(([kind, count]) => [kind, count / found.decisions])),
    number(one.decisions), percent(one.decisions / found.decisions), percent(one.to_cloud / one.decisions), number(one.refused), number(one.failed),
    ms(one.first_token_s?.p50), ms(one.first_token_s?.p95), cost(one.cost),
  ]);
  const more = all.length > LISTED ? `, ${LISTED} of ${all.length}` : "";
  return table(GROUPS, rows, { caption: `By ${{ targets: "target", rules: "rule", tenants: "tenant", classes: "class" }[what]}${more}`, even: true });
}

function spending({ periods, cost: whole }) {
  if (!Object.keys(whole).length) return empty("Nothing is known of money: the policy has no prices.");
  const rows = periods.slice(-LISTED).reverse().map((one) => [one.label, number(one.decisions), number(one.to_cloud), cost(one.cost)]);
  return table(["from, UTC:head", "decisions:number", "to the cloud:number", "cost:number"], rows, { caption: `Spending: ${cost(whole)} in all` });
}
