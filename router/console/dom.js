// Elements are made, never parsed: whatever a reason or a policy holds, it stays text.

export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child != null));
  return element;
}

export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child != null));
  return element;
}

export const chip = (target) => h("span", { class: `chip ${target}` }, target);

export const ms = (seconds) => (seconds == null ? "–" : seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`);

export const number = (value, digits = 0) => (value == null ? "–" : value.toLocaleString("en", { maximumFractionDigits: digits }));

export const money = (amount, currency) =>
  amount == null ? "–" : `${amount.toLocaleString("en", amount && Math.abs(amount) < 1 ? { maximumSignificantDigits: 3 } : { minimumFractionDigits: 2, maximumFractionDigits: 2 })} ${currency}`;

export const clock = (at) => new Date(at * 1000).toLocaleTimeString("en-GB");

export const moment = (at) => new Date(at * 1000).toLocaleString("en-GB");

export function facts(rows) {
  return h("dl", {}, Object.entries(rows).map(([name, value]) => [h("dt", {}, name), h("dd", {}, value ?? "–")]));
}

export function card(title, state, rows, ...rest) {
  const heading = h("h2", {}, title, state ? h("span", { class: `state ${state.good ? "good" : "bad"}` }, ` · ${state.text}`) : null);
  return h("section", { class: "card" }, heading, facts(rows), ...rest);
}

// A column is its name, or "name:kind"; kinds are head, number, date, reason, words, detail, meters and acts. A row is an element
// or its cells; where the screen is narrow it becomes a block that begins with its head.
export function table(columns, rows, { caption, even = false } = {}) {
  const head = h("tr", {}, columns.map((column) => h("th", { scope: "col", class: kind(column) }, name(column))));
  const body = rows.map((one) => (Array.isArray(one) ? row(columns, one) : one));
  const whole = h("table", { class: even ? "even" : null }, caption ? h("caption", {}, caption) : null, h("thead", {}, head), h("tbody", {}, body));
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption ?? "table" }, whole);
}

export function row(columns, cells) {
  return h("tr", {}, cells.map((cell, at) => {
    const label = ["number", "detail"].includes(kind(columns[at])) ? name(columns[at]) : null;
    return h("td", { class: kind(columns[at]), "data-label": label, "data-empty": cell == null || cell === "–" || cell === "" }, cell);
  }));
}

const name = (column) => column.split(":")[0];
const kind = (column) => column.split(":")[1] ?? null;

export const empty = (text) => h("p", { class: "empty" }, text);

export function bytes(size) {
  if (size == null) return "–";
  return size < 1e6 ? `${Math.round(size / 1e3)} kB` : size < 1e9 ? `${(size / 1e6).toFixed(1)} MB` : `${(size / 1e9).toFixed(1)} GB`;
}
