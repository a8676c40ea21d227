import { h, svg } from "./dom.js";

const WIDTH = 640;
const HEIGHT = 320;
const LEFT = 44;
const BOTTOM = 36;

// One bar, split by target.
export function shares(counts) {
  const total = Object.values(counts).reduce((sum, count) => sum + count, 0);
  if (!total) return null;
  let at = 0;
  const bars = Object.entries(counts).map(([target, count]) => {
    const width = (count / total) * 300;
    const bar = svg("rect", { class: `bar ${target}`, x: at, y: 0, width, height: 10 });
    at += width;
    return bar;
  });
  const said = Object.entries(counts).map(([target, count]) => `${target} ${count}`).join(", ");
  return h("figure", {}, svg("svg", { viewBox: "0 0 300 10", role: "img", "aria-label": said }, ...bars), h("figcaption", { class: "faint" }, said));
}

// Points of {x, y} from 0 to 1, the line of no knowledge, and one point marked.
export function curve(points, marked, { x, y }) {
  const right = (value) => LEFT + value * (WIDTH - LEFT - 20);
  const up = (value) => HEIGHT - BOTTOM - value * (HEIGHT - BOTTOM - 12);
  const path = points.map((point, index) => `${index ? "L" : "M"}${right(point.x).toFixed(1)} ${up(point.y).toFixed(1)}`).join("");
  const ticks = [0, 0.25, 0.5, 0.75, 1].flatMap((value) => [
    svg("line", { class: "axis", x1: right(0), x2: right(1), y1: up(value), y2: up(value) }),
    label(LEFT - 6, up(value) + 4, "end", `${value * 100}%`),
    label(right(value), HEIGHT - BOTTOM + 16, "middle", `${value * 100}%`),
  ]);
  return svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${y} by ${x}` },
    ...ticks,
    svg("line", { class: "even", x1: right(0), y1: up(0), x2: right(1), y2: up(1) }),
    svg("path", { class: "curve", d: path }),
    svg("circle", { class: "point", cx: right(marked.x), cy: up(marked.y), r: 5 }),
    label(right(0.5), HEIGHT - 4, "middle", x),
    label(LEFT + 6, 22, "start", y));
}

function label(x, y, anchor, text) {
  const element = svg("text", { x, y, "text-anchor": anchor });
  element.textContent = text;
  return element;
}
