// Both sides, the traffic and the caches, as they are.

import { get } from "./api.js";
import { card, h, money, ms, number } from "./dom.js";
import { shares } from "./charts.js";

export async function now(page, { every }) {
  const cards = h("div", { class: "cards" });
  page.append(cards);
  await every(2, async () => {
    const status = await get("/admin/status");
    cards.replaceChildren(edge(status), cloud(status), traffic(status), inForce(status), ...spending(status), ...classes(status), ...caches(status));
  });
}

function edge({ edge, device, running }) {
  return card("This device", { good: edge === "ready", text: edge }, {
    model: device.model,
    running: `${number(running)} of ${number(device.slots)} slots`,
    waiting: `${number(device.queue_depth)} of ${number(device.queue_capacity)}`,
    decodes: device.tokens_per_s == null ? null : `${number(device.tokens_per_s)} tokens/s`,
    reads: device.prefill_tokens_per_s == null ? null : `${number(device.prefill_tokens_per_s)} tokens/s`,
    processor: device.cpu_percent == null ? null : `${number(device.cpu_percent)} %`,
    battery: device.battery_percent == null ? "none" : `${number(device.battery_percent)} %${device.on_battery ? ", in use" : ""}`,
  });
}

function cloud({ cloud, link }) {
  const good = cloud === "connected" && link.admitting;
  return card("Cloud", { good: good || cloud === "none", text: cloud }, {
    model: link.model,
    "round trip": ms(link.round_trip_s),
    "first token": ms(link.first_token_s),
    breaker: link.breaker,
    "back in": link.retry_after_s == null ? null : `${number(link.retry_after_s, 1)} s`,
  });
}

function traffic({ routes, failovers, uptime_s }) {
  const sum = (counts) => Object.values(counts).reduce((total, count) => total + count, 0);
  const ended = Object.fromEntries(Object.entries(routes).map(([target, outcomes]) => [target, sum(outcomes)]));
  const failed = sum(Object.fromEntries(Object.entries(routes).map(([target, outcomes]) => [target, outcomes.error ?? 0])));
  return card("Answered", null,
    { requests: number(sum(ended)), failed: number(failed), "stood in for the cloud": number(failovers), up: span(uptime_s) }, shares(ended));
}

function inForce({ policy }) {
  return card("Policy", null, { name: policy.name, mode: policy.mode, rules: number(policy.rules.length), "rejected files": number(policy.reload_failures) });
}

function spending({ spent }) {
  if (!spent) return [];
  const tenants = Object.entries(spent.tenants).filter(([name]) => name).map(([name, amount]) => [`by ${name}`, money(amount, spent.currency)]);
  return [card("Cloud's cost", null, { today: money(spent.today, spent.currency), "of that, set aside": money(spent.set_aside, spent.currency), ...Object.fromEntries(tenants) })];
}

function classes({ classes }) {
  const rows = Object.entries(classes).map(([name, { requests, p50_ms, p95_ms, p99_ms }]) => {
    const shares = [p50_ms, p95_ms, p99_ms].map((share) => number(100 * share));
    return [name.replaceAll("_", " "), `${shares.join(" / ")} % of ${number(requests)}`];
  });
  return rows.length ? [card("First token within p50 / p95 / p99", null, Object.fromEntries(rows))] : [];
}

function caches({ cache }) {
  if (!cache) return [];
  return Object.entries(cache.layers ?? {}).map(([name, counts]) => {
    const rows = Object.entries(counts).filter(([, value]) => typeof value === "number");
    return card(`Cache: ${name}`, null, Object.fromEntries(rows.map(([what, value]) => [what.replaceAll("_", " "), number(value, 3)])));
  });
}

const span = (seconds) =>
  seconds < 120 ? `${Math.round(seconds)} s` : seconds < 7200 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
