// The editor: checked as you type, replayed over recorded decisions, proposed, tried out, put in force.

import { get, post } from "./api.js";
import { h, number, table } from "./dom.js";
import { diff } from "./diff.js";
import { draft } from "./draft.js";
import { why } from "./why.js";

const PAUSE_MS = 300;
const FOLLOWED_S = 5;

export async function policy(page, { run, every }) {
  const text = h("textarea", { spellcheck: "false", "aria-label": "Policy in YAML", "aria-describedby": "verdict", oninput: typed, onscroll: followScroll, onkeydown: shortcut });
  const lines = h("pre", { "aria-hidden": "true" });
  const verdict = h("p", { role: "status", id: "verdict" });
  const problems = h("ul", { class: "problems" });
  const result = h("div", { class: "stack", "aria-live": "polite" });
  const changes = h("div");
  const percent = h("input", { type: "number", min: "1", max: "99", value: "10", required: true, "aria-label": "percent of the conversations" });
  const buttons = {
    replay: h("button", { onclick: () => attempt(replay) }, "Replay"),
    activate: h("button", { class: "main", onclick: () => attempt(activate) }, "Activate"),
    tryOut: h("button", { onclick: () => attempt(tryOut) }, "Try on"),
    rollBack: h("button", { class: "quiet", onclick: () => attempt(rollBack) }, "Roll back"),
    startOver: h("button", { class: "quiet", onclick: () => attempt(startOver) }, "Start over"),
  };
  const inForce = h("p", { class: "faint" });
  let checking = 0;
  let timer;

  page.append(
    inForce,
    h("div", { class: "columns" },
      h("div", {},
        h("div", { class: "editor" }, lines, text),
        verdict,
        problems,
        h("div", { class: "row" }, buttons.replay, buttons.activate, buttons.startOver, buttons.rollBack),
        h("div", { class: "row" }, buttons.tryOut, percent, "% of conversations")),
      h("div", {}, result, changes)),
  );
  refresh(await get("/admin/policy"));
  text.value = draft.text() ?? text.dataset.inForce;
  await check();
  await every(FOLLOWED_S, follow);

  function attempt(work) {
    return run(work, (message) => say(message, "bad"));
  }

  function say(message, kind, ...more) {
    result.replaceChildren(h("p", { class: kind }, message, ...more));
  }

  // Somebody else may put another policy in force meanwhile, and a trial goes on.
  async function follow() {
    const before = text.dataset.inForce;
    refresh(await get("/admin/policy"));
    if (before === text.dataset.inForce) return;
    if (draft.text() == null) text.value = text.dataset.inForce;
    await check();
  }

  function refresh({ current, canary, unavailable }) {
    text.dataset.inForce = current.source;
    const trial = canary ? `; version ${canary.version} on trial with ${number(canary.percent)} % (${canary.failed} of ${canary.ended} failed)` : "";
    inForce.textContent = unavailable ?? `In force: ${current.name}, mode ${current.mode}, ${current.fingerprint}${trial}`;
  }

  function typed() {
    mark([]);
    keep();
    clearTimeout(timer);
    timer = setTimeout(() => run(check), PAUSE_MS);
  }

  function keep() {
    if (text.value === text.dataset.inForce) draft.drop();
    else draft.keep(text.value);
  }

  async function check() {
    const asked = ++checking;
    const found = await post("/admin/policy/check", { source: text.value });
    if (asked !== checking) return;
    verdict.textContent = found.valid ? `Valid: ${found.summary}` : `${found.problems.length} to mend`;
    verdict.className = found.valid ? "good" : "bad";
    problems.replaceChildren(...found.problems.map(problem));
    text.setAttribute("aria-invalid", String(!found.valid));
    mark(found.problems.map((one) => one.line));
    const same = text.value === text.dataset.inForce;
    buttons.replay.disabled = !found.valid;
    buttons.activate.disabled = buttons.tryOut.disabled = !found.valid || same;
    buttons.startOver.disabled = same;
    changes.replaceChildren(h("h2", {}, "Against what is in force"), diff(found.diff));
  }

  function problem({ line, column, field, message }) {
    return h("li", {}, h("button", { onclick: () => jump(line, column) }, `Line ${line}: ${field ? `${field}: ` : ""}${message}`));
  }

  function jump(line, column) {
    const before = text.value.split("\n").slice(0, line - 1).reduce((sum, one) => sum + one.length + 1, 0);
    text.focus();
    text.setSelectionRange(before + column - 1, before + column - 1);
  }

  function mark(wrong) {
    const count = text.value.split("\n").length;
    const numbers = Array.from({ length: count }, (_, index) => index + 1);
    lines.replaceChildren(...numbers.flatMap((line) => [wrong.includes(line) ? h("b", {}, String(line)) : String(line), "\n"]));
    followScroll();
  }

  function followScroll() {
    lines.scrollTop = text.scrollTop;
  }

  function shortcut(event) {
    if (event.key === "s" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      run(check);
    }
  }

  async function replay() {
    say("Deciding the recorded requests again …", "faint");
    const found = await post("/admin/policy/replay", { source: text.value });
    const rules = Object.entries(found.rules).sort(([, a], [, b]) => b - a).map(([name, count]) => [name, number(count)]);
    const moved = found.moved.map((one) => [`${one.from} → ${one.to}`, number(one.count)]);
    result.replaceChildren(
      h("h2", {}, "Replay"),
      h("p", { class: found.leaks ? "bad" : "good" }, `It would ${found.would}.`),
      moved.length ? table(["moved", "requests:number"], moved, { caption: "What moves" }) : "",
      table(["rule:words", "requests:number"], rules, { caption: "Decided by" }),
      h("p", { class: "faint" }, "Each recorded request was decided again; no model was called."),
    );
  }

  async function startOver() {
    draft.drop();
    text.value = text.dataset.inForce;
    await check();
  }

  async function proposed(reason) {
    return (await post("/admin/policy/propose", { source: text.value, why: reason })).version;
  }

  async function activate() {
    const reason = await why("Activate", "It decides every request from now on.");
    if (reason) await done(await post("/admin/policy/activate", { version: await proposed(reason), why: reason }), "In force.");
  }

  async function tryOut() {
    if (!percent.reportValidity()) return;
    const share = Number(percent.value);
    const reason = await why("Try out", `It decides ${share} % of the conversations, and is withdrawn by itself if too many of them fail.`);
    if (!reason) return;
    const version = await proposed(reason);
    await done(await post("/admin/policy/canary", { version, percent: share, why: reason }), "On trial.");
  }

  async function rollBack() {
    const reason = await why("Roll back", "Ends the trial if there is one; else the version before takes over.");
    if (reason) await done(await post("/admin/policy/rollback", { why: reason }), "Rolled back; the editor keeps the text.");
  }

  async function done(overview, said) {
    refresh(overview);
    keep();
    say(`${said} `, "good", h("a", { href: "#decisions" }, "See what it decides"));
    await check();
  }
}
