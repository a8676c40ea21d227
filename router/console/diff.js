import { h } from "./dom.js";

export function diff(text) {
  if (!text) return h("p", { class: "faint" }, "No difference.");
  const lines = text.split("\n").slice(2).map((line) => {
    const tag = line.startsWith("+") ? "ins" : line.startsWith("-") ? "del" : "span";
    return [h(tag, {}, line), "\n"];
  });
  return h("pre", { class: "diff card", tabindex: "0" }, lines);
}
