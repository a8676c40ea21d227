// Charts as SVG: axes, lines, dots. The table or the sentence beside a chart says the same in words.

import { h, svg } from "./dom.js";

const [WIDTH, HEIGHT] = [520, 320];
const [LEFT, RIGHT, TOP, BOTTOM] = [84, 30, 14, 50];
const TICKS = 5;

export const percent = (share, digits = 0) => (share == null ? "–" : `${(100 * share).toFixed(digits)}\u202f%`);

// An axis places a value between 0 (its low end) and 1, and says what is written where.
export function linear(label, low, high, said = percent) {
  const step = niceStep((high - low) / TICKS || 1);
  const first = Math.floor(low / step + 1e-9);
  const last = Math.max(first + 1, Math.ceil(high / step - 1e-9));
  const ticks = Array.from({ length: last - first + 1 }, (_, at) => (first + at) * step);
  return { label, ticks: ticks.map((value) => [value, said(value)]), place: (value) => (value / step - first) / (last - first) };
}

export function named(label, names) {
  const last = names.length - 1;
  const shown = [...new Set([0, Math.floor(last / 2), last])];
  return { label, ticks: shown.map((at) => [at, names[at]]), place: (at) => (at + 0.5) / names.length };
}

// Lines are {kind, points}, dots {kind, at, r}; a point is [x, y], a kind its classes in the style sheet.
export function chart(label, x, y, lines, dots = []) {
  const inside = (place) => Math.min(Math.max(place, 0), 1);
  const across = (value) => LEFT + inside(x.place(value)) * (WIDTH - LEFT - RIGHT);
  const up = (value) => HEIGHT - BOTTOM - inside(y.place(value)) * (HEIGHT - BOTTOM - TOP);
  const middle = (TOP + HEIGHT - BOTTOM) / 2;
  return svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label },
    ...y.ticks.flatMap(([value, said]) => [
      svg("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: up(value), y2: up(value) }),
      text(LEFT - 6, up(value) + 4, "end", said),
    ]),
    ...x.ticks.map(([value, said]) => text(across(value), HEIGHT - BOTTOM + 18, "middle", said)),
    text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "middle", x.label),
    text(14, middle, "middle", y.label, { transform: `rotate(-90 14 ${middle})` }),
    ...lines.map(({ kind, points }) => svg("path", { class: `line ${kind}`, d: path(points.map(([a, b]) => [across(a), up(b)])) })),
    ...dots.map(({ kind, at, r = 4 }) => svg("circle", { class: `dot ${kind}`, cx: across(at[0]), cy: up(at[1]), r })));
}

export function figure(drawing, caption, legend) {
  const keys = Object.entries(legend).map(([kind, said]) => h("li", {}, h("span", { class: `key ${kind}`, "aria-hidden": "true" }), said));
  return h("figure", {}, drawing, h("figcaption", {}, caption, h("ul", { class: "legend" }, keys)));
}

// One bar, split: parts are [kind, share].
export function meter(...parts) {
  let at = 0;
  const bars = parts.map(([kind, share]) => {
    const bar = svg("rect", { class: `bar ${kind}`, x: at, y: 0, width: 100 * share, height: 8 });
    at += 100 * share;
    return bar;
  });
  return svg("svg", { class: "meter", viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("rect", { class: "ground", x: 0, y: 0, width: 100, height: 8 }), ...bars);
}

function path(points) {
  return points.map(([x, y], at) => `${at ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
}

function text(x, y, anchor, said, more = {}) {
  const element = svg("text", { x, y, "text-anchor": anchor, ...more });
  element.textContent = said;
  return element;
}

function niceStep(width) {
  const power = 10 ** Math.floor(Math.log10(width));
  return [1, 2, 5, 10].map((times) => times * power).find((step) => step >= width * (1 - 1e-9));
}
