// What the learned difficulty should bring for each share of requests sent to the cloud, and the goal to write for it.

import { get } from "./api.js";
import { facts, h } from "./dom.js";
import { curve } from "./charts.js";

export async function difficulty(page) {
  const { curve: points, goal } = await get("/admin/difficulty");
  const chosen = goal?.cloud_share ?? points.find((point) => point.recovered >= (goal?.quality ?? 2))?.cloud_share ?? 0.3;
  const slider = h("input", { type: "range", min: "0", max: String(points.length - 1), value: String(Math.round(chosen * (points.length - 1))), class: "grow", "aria-label": "Share to the cloud", oninput: show });
  const chart = h("div", { class: "card" });
  const said = h("section", { class: "card" });
  page.append(
    h("p", { class: "faint" }, "From the outcome tables the score was learned on. Dashed: choosing at random."),
    h("div", { class: "columns" }, chart, h("div", {}, h("div", { class: "row" }, "fewer", slider, "more to the cloud"), said)),
  );
  show();

  function show() {
    const point = points[Number(slider.value)];
    const percent = (value) => `${Math.round(value * 100)} %`;
    chart.replaceChildren(curve(points.map((one) => ({ x: one.cloud_share, y: one.recovered })), { x: point.cloud_share, y: point.recovered },
      { x: "share of requests to the cloud", y: "part of what the cloud does better that is kept" }));
    said.replaceChildren(
      facts({ "to the cloud": percent(point.cloud_share), "of the cloud's gain kept": percent(point.recovered), "difficulty from": point.threshold.toFixed(3) }),
      h("pre", { class: "diff" }, `goal:\n  cloud_share: ${point.cloud_share.toFixed(2)}`),
      h("p", { class: "faint" }, goal ? `In force: ${JSON.stringify(goal)}` : "No goal is in force."),
    );
  }
}
