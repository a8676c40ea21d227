// What the learned difficulty should bring for each share of requests sent to the cloud, in quality and money; the goal
// to write for it; and how far the difficulty can be believed.

import { get } from "./api.js";
import { chart, figure, linear, percent } from "./charts.js";
import { draft, withGoal } from "./draft.js";
import { facts, h, money, number, table } from "./dom.js";

export async function goal(page, { run }) {
  const found = await get("/admin/difficulty");
  const { curve } = found;
  const at = (share) => Math.round(share * (curve.length - 1));
  const slider = h("input", { type: "range", min: "1", max: String(curve.length - 2), value: String(at(found.in_force?.cloud_share ?? 0.3)), class: "grow", "aria-label": "Share to the cloud", oninput: show });
  const kind = h("select", { "aria-label": "How the goal is written", onchange: show },
    h("option", { value: "cloud_share" }, "at most this share to the cloud"), h("option", { value: "quality" }, "at least this part of the gain"));
  kind.value = found.goal?.quality ? "quality" : "cloud_share";
  const drawn = h("div", { class: "card" });
  const said = h("section", { class: "card", "aria-live": "polite" });
  const tables = h("div");
  page.append(h("div", { class: "stack" },
    h("p", { class: "faint" }, inForce(found)),
    h("div", { class: "columns" }, drawn, h("div", { class: "stack" },
      h("div", { class: "row" }, h("span", {}, "fewer"), slider, h("span", {}, "more to the cloud")),
      said,
      h("div", { class: "row" }, kind, h("button", { class: "main", onclick: () => run(put) }, "Put it into the policy")))),
    tables,
    h("h2", {}, "Calibration"),
    h("p", { class: "faint" }, "How often the cloud was needed, by the difficulty that was said; of questions that the scoring model had not seen. On the dashed line it can be taken at its word."),
    h("div", { class: "cards charts" }, found.measured.map(reliability))));
  show();

  function point() {
    return curve[Number(slider.value)];
  }

  function written() {
    return kind.value === "quality" ? `quality: ${point().recovered.toFixed(2)}` : `cloud_share: ${point().cloud_share.toFixed(2)}`;
  }

  function show() {
    slider.setAttribute("aria-valuetext", `${percent(point().cloud_share)} to the cloud`);
    drawn.replaceChildren(gain(curve, point(), found.in_force));
    said.replaceChildren(facts(expected(point(), Number(slider.value), found)), h("pre", { class: "diff" }, `goal:\n  ${written()}`));
    tables.replaceChildren(quality(found.measured, point().threshold));
  }

  async function put() {
    const { current } = await get("/admin/policy");
    draft.keep(withGoal(draft.text() ?? current.source, written()));
    location.hash = "#policy";
  }
}

function inForce({ goal, in_force: aim }) {
  if (!goal) return "No goal is in force: rules and the mode decide. The difficulty decides only under a goal, or in a rule.";
  const said = goal.quality ? `keep ${percent(goal.quality)} of what the cloud does better` : `at most ${percent(goal.cloud_share)} to the cloud`;
  return `In force: ${said}; expected ${percent(aim.cloud_share)} to the cloud, ${percent(aim.recovered)} of its gain.`;
}

function expected(point, at, { recorded }) {
  const { call_cost: cost, currency, cloud_shares: shares } = recorded;
  return {
    "to the cloud": percent(point.cloud_share),
    "of the cloud's gain kept": percent(point.recovered),
    "difficulty from": point.threshold.toFixed(3),
    "1,000 requests cost": cost == null ? "no prices, or no requests" : money(1000 * cost * point.cloud_share, currency),
    "all in the cloud": cost == null ? null : money(1000 * cost, currency),
    "of the requests recorded": shares ? `${percent(shares[at])} of ${number(recorded.scored)} to the cloud` : "none has a difficulty yet",
  };
}

function gain(curve, marked, aim) {
  const points = curve.map((one) => [one.cloud_share, one.recovered]);
  const dots = [{ kind: "router", at: [marked.cloud_share, marked.recovered], r: 6 }];
  if (aim) dots.push({ kind: "aim", at: [aim.cloud_share, aim.recovered], r: 6 });
  const lines = [{ kind: "random", points: [[0, 0], [1, 1]] }, { kind: "router", points }];
  const label = `${percent(marked.recovered)} of the cloud's gain at ${percent(marked.cloud_share)} to the cloud`;
  const legend = { router: "by difficulty", random: "at random", "dot router": "chosen here", ...(aim ? { "dot aim": "in force" } : {}) };
  return figure(chart(label, linear("requests to the cloud", 0, 1), linear("of the cloud's gain", 0, 1), lines, dots), "Expected, from the outcome tables the score was learned on", legend);
}

function quality(measured, threshold) {
  const rows = measured.map(({ figures, thresholds, quality }) => {
    const at = Math.max(thresholds.filter((one) => one >= threshold).length - 1, 0);
    return [figures.name, percent(at / (thresholds.length - 1)), percent(figures.edge, 1), percent(quality[at], 1), percent(figures.cloud, 1)];
  });
  return table(["table:head", "to the cloud:number", "edge alone:number", "with this goal:number", "cloud alone:number"], rows, { caption: "Right answers, as measured on questions not seen" });
}

function reliability({ figures, bins, error }) {
  const lines = [{ kind: "random", points: [[0, 0], [1, 1]] }, { kind: "router", points: bins.map((one) => [one.said, one.right]) }];
  const dots = bins.map((one) => ({ kind: "router", at: [one.said, one.right] }));
  const label = `${figures.name}: off by ${error.toFixed(3)} on average over ${number(figures.rows)} questions`;
  return h("div", { class: "card" }, figure(chart(label, linear("said", 0, 1), linear("came true", 0, 1), lines, dots), label, {}));
}
