// Both sides, the traffic and the money, as they are.

import { get } from "./api.js";
import { meter, percent } from "./charts.js";
import { bytes, card, h, money, ms, number, table } from "./dom.js";

export async function now(page, { every }) {
  const cards = h("div", { class: "cards" });
  page.append(cards);
  await every(2, async () => {
    const status = await get("/admin/status");
    cards.replaceChildren(edge(status), cloud(status), traffic(status), inForce(status), ...spending(status), ...predictions(status), ...classes(status));
  });
}

function edge({ edge, device, running }) {
  return card("This device", { good: edge === "ready", text: edge }, {
    model: device.model,
    running: `${number(running)} of ${number(device.slots)} slots`,
    waiting: `${number(device.queue_depth)} of ${number(device.queue_capacity)}`,
    decodes: rate(device.tokens_per_s),
    reads: rate(device.prefill_tokens_per_s),
    processor: device.cpu_percent == null ? null : `${number(device.cpu_percent)} %`,
    "memory free": bytes(device.memory_available),
    battery: device.battery_percent == null ? "none" : `${number(device.battery_percent)} %${device.on_battery ? ", in use" : ""}`,
    "model's restarts": number(device.restarts),
  });
}

const rate = (perSecond) => (perSecond == null ? null : `${number(perSecond)} tokens/s`);

function cloud({ cloud, link }) {
  const good = cloud === "connected" && link.admitting && !link.draining;
  const text = link.draining ? "draining" : link.admitting ? cloud : "resting";
  return card("Cloud", { good: good || cloud === "none", text: cloud === "none" ? "none configured" : text }, {
    model: link.model,
    "round trip": ms(link.round_trip_s),
    "first token": ms(link.first_token_s),
    "failed lately": percent(link.failure_ratio),
    "lost on the way": percent(link.trouble?.loss),
    breaker: link.breaker,
    ...(link.retry_after_s == null ? {} : { "back in": `${number(link.retry_after_s, 1)} s` }),
  });
}

function traffic({ routes, failovers, uptime_s }) {
  const sum = (counts) => Object.values(counts).reduce((total, count) => total + count, 0);
  const ended = Object.entries(routes).map(([target, outcomes]) => [target, sum(outcomes)]);
  const all = ended.reduce((total, [, count]) => total + count, 0);
  const failed = Object.entries(routes).reduce((total, [target, outcomes]) => total + (target === "none" ? 0 : (outcomes.error ?? 0)), 0);
  const by = Object.fromEntries(ended.map(([target, count]) => [target === "none" ? "refused" : target, `${number(count)} · ${percent(count / all)}`]));
  const bar = all ? meter(...ended.map(([target, count]) => [target === "none" ? "bad" : target, count / all])) : null;
  return card("Answered", null, { requests: number(all), ...by, failed: number(failed), "stood in for the cloud": number(failovers), up: span(uptime_s) }, bar);
}

function inForce({ policy }) {
  return card("Policy", null, { name: policy.name, mode: policy.mode, rules: number(policy.rules.length), "rejected files": number(policy.reload_failures) });
}

function spending({ spent }) {
  if (!spent) return [];
  const tenants = Object.entries(spent.tenants).sort(([, a], [, b]) => b - a).map(([name, amount]) => [name ? `by ${name}` : "without a key", money(amount, spent.currency)]);
  return [card("Cloud's cost", null, { today: money(spent.today, spent.currency), "of that, set aside": money(spent.set_aside, spent.currency), ...Object.fromEntries(tenants.slice(0, 8)) })];
}

function predictions({ predictions }) {
  const known = Object.entries(predictions).filter(([, one]) => one.answers);
  const rows = known.map(([target, one]) => [target, ms(seconds(one.first_token_error_ms)), ms(seconds(one.total_error_ms)), number(one.answers)]);
  if (!rows.length) return [];
  const shown = table(["side:head", "first token:number", "whole answer:number", "answers:number"], rows);
  return [h("section", { class: "card wide" }, h("h2", {}, "Predictions off by, in the median"), shown)];
}

function classes({ classes }) {
  const rows = Object.entries(classes).map(([name, { requests, p50_ms, p95_ms, p99_ms }]) =>
    [name.replaceAll("_", " "), ...[p50_ms, p95_ms, p99_ms].map((share) => percent(share)), number(requests)]);
  if (!rows.length) return [];
  const shown = table(["class:head", "p50:number", "p95:number", "p99:number", "requests:number"], rows);
  return [h("section", { class: "card wide" }, h("h2", {}, "First tokens within their class's targets"), shown)];
}

const seconds = (milliseconds) => (milliseconds == null ? null : milliseconds / 1000);

const span = (seconds) =>
  seconds < 120 ? `${Math.round(seconds)} s` : seconds < 7200 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
