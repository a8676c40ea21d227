// Versions and acts: who did what, when and why, and whether the record is as it was written.

import { get, post } from "./api.js";
import { empty, h, moment, number, table } from "./dom.js";
import { diff } from "./diff.js";
import { draft } from "./draft.js";
import { why } from "./why.js";

const VERSIONS = ["version:detail", "when", "who:words", "why:reason", "fingerprint:detail", ":acts"];
const VERSIONLESS = ["refuse", "lost"];
const ACTS = ["act:detail", "when", "who:words", "what", "version:detail", "why:reason"];

export async function history(page, { run }) {
  const chain = h("p");
  const shown = h("div");
  const acts = h("div");
  const versions = h("div");
  page.append(chain, h("h2", {}, "Versions"), versions, shown, h("h2", {}, "Acts"), acts);
  await load();

  function attempt(work) {
    return run(work, (message) => shown.replaceChildren(h("p", { class: "bad", role: "alert" }, message)));
  }

  async function load(overview) {
    const found = overview ?? (await get("/admin/policy"));
    const problem = found.unavailable ?? unsound(found);
    chain.textContent = problem ?? "The record is whole: every act is signed and follows the one before.";
    chain.className = problem ? "bad" : "good";
    versions.replaceChildren(listed(VERSIONS, found.versions.map((one) => version(one, found.current)), "No version was proposed here yet."));
    acts.replaceChildren(listed(ACTS, found.acts.map(act), "Nobody has done anything yet."));
  }

  function version(one, current) {
    const buttons = [
      h("button", { class: "quiet", onclick: () => attempt(() => compare(one.number)) }, "Compare"),
      " ",
      h("button", { class: "quiet", onclick: () => attempt(() => edit(one.number)) }, "Edit"),
      " ",
      h("button", { disabled: one.number === current.version, onclick: () => attempt(() => activate(one.number)) }, "Activate"),
    ];
    const state = one.number === current.version ? h("span", { class: "good" }, " in force") : null;
    return [[String(one.number), state], moment(one.at), one.who, one.why, h("code", {}, one.fingerprint), buttons];
  }

  async function compare(number) {
    const found = await get(`/admin/policy/versions/${number}`);
    shown.replaceChildren(h("h2", {}, `Version ${number} against what is in force`), diff(found.diff));
  }

  async function edit(number) {
    draft.keep((await get(`/admin/policy/versions/${number}`)).source);
    location.hash = "#policy";
  }

  async function activate(number) {
    const reason = await why(`Activate version ${number}`, "It decides every request from now on.");
    if (reason) await load(await post("/admin/policy/activate", { version: number, why: reason }));
  }
}

function unsound({ broken_at: at, acts }) {
  if (at) return `The record was changed at act ${at}. No policy of a fleet is taken until policies.db is moved out of the state folder.`;
  const lost = acts.find((one) => one.action === "lost");
  return lost ? `Acts before number ${lost.number} are gone: ${lost.why}.` : null;
}

const listed = (columns, rows, none) => (rows.length ? table(columns, rows) : empty(none));

function act(one) {
  const what = one.action.replaceAll("_", " ") + (one.percent ? ` ${number(one.percent)} %` : "");
  return [String(one.number), moment(one.at), one.who, what, VERSIONLESS.includes(one.action) ? "–" : one.version ? String(one.version) : "built-in", one.why];
}
