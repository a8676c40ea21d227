// Versions and acts: who did what, when and why, and whether the record is as it was written.

import { get, post } from "./api.js";
import { h, moment, number, table } from "./dom.js";
import { diff } from "./diff.js";
import { why } from "./why.js";

export async function history(page, { run }) {
  const chain = h("p");
  const shown = h("div");
  const acts = h("div");
  const versions = h("div");
  page.append(chain, h("h2", {}, "Versions"), versions, shown, h("h2", {}, "Acts"), acts);
  await load();

  async function load(overview) {
    const found = overview ?? (await get("/admin/policy"));
    chain.textContent = found.unavailable ?? (found.broken_at ? `The record was changed at act ${found.broken_at}.` : "The record is whole: every act is signed and follows the one before.");
    chain.className = found.unavailable || found.broken_at ? "bad" : "good";
    versions.replaceChildren(table(["", "when", "who", "why", "fingerprint", ""], found.versions.map((one) => version(one, found.current))));
    acts.replaceChildren(table(["", "when", "who", "what", "version", "why"], found.acts.map(act)));
  }

  function version(one, current) {
    const buttons = [
      h("button", { class: "quiet", onclick: () => run(() => compare(one.number)) }, "Compare"),
      " ",
      h("button", { class: "quiet", onclick: () => run(() => edit(one.number)) }, "Edit"),
      " ",
      h("button", { disabled: one.number === current.version, onclick: () => run(() => activate(one.number)) }, "Activate"),
    ];
    const state = one.number === current.version ? h("span", { class: "good" }, " in force") : null;
    return h("tr", {}, h("td", {}, String(one.number), state), h("td", {}, moment(one.at)), h("td", {}, one.who), h("td", { class: "reason" }, one.why),
      h("td", {}, h("code", {}, one.fingerprint)), h("td", { class: "acts" }, buttons));
  }

  async function compare(number) {
    const found = await get(`/admin/policy/versions/${number}`);
    shown.replaceChildren(h("h2", {}, `Version ${number} against what is in force`), diff(found.diff));
  }

  async function edit(number) {
    sessionStorage.setItem("causeway.version-to-edit", (await get(`/admin/policy/versions/${number}`)).source);
    location.hash = "#policy";
  }

  async function activate(number) {
    const reason = await why(`Activate version ${number}`, "It decides every request from now on.");
    if (reason) await load(await post("/admin/policy/activate", { version: number, why: reason }));
  }
}

function act(one) {
  const what = one.action.replace("_", " ") + (one.percent ? ` ${number(one.percent)} %` : "");
  return h("tr", {}, h("td", {}, String(one.number)), h("td", {}, moment(one.at)), h("td", {}, one.who), h("td", {}, what),
    h("td", {}, one.version ? String(one.version) : "built-in"), h("td", { class: "reason" }, one.why));
}
