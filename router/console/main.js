// Which page is shown, who is signed in, and what happens when the daemon cannot be asked.

import { Refused, Unreached, signIn, takeTokenFromLink } from "./api.js";
import { empty, h } from "./dom.js";
import { cache } from "./cache.js";
import { decisions } from "./decisions.js";
import { fleet } from "./fleet.js";
import { goal } from "./goal.js";
import { history } from "./history.js";
import { now } from "./now.js";
import { policy } from "./policy.js";
import { traffic } from "./traffic.js";

const pages = { now, decisions, traffic, cache, policy, goal, history, fleet };
const main = document.querySelector("main");
const connection = document.querySelector("#connection");
const dialog = document.querySelector("#sign-in");
let leave = () => {};

// A page gets where to show itself; `run`, which runs what may fail and says how it went, at the top or, what the daemon refuses,
// by `said`; and `every`, which runs something again and again while the page is shown.
async function open() {
  const name = location.hash.slice(1) in pages ? location.hash.slice(1) : "now";
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  leave();
  const shown = h("div");
  main.replaceChildren(shown);
  const timers = [];
  leave = () => timers.forEach(clearInterval);
  const every = (seconds, work) => {
    if (!shown.isConnected) return null; // left while it was opened
    timers.push(setInterval(() => document.hidden || run(work), seconds * 1000));
    return work();
  };
  document.title = `Causeway: ${name}`;
  if (await run(() => pages[name](shown, { run, every }))) return;
  shown.replaceChildren(empty(connection.textContent), h("div", { class: "row" }, h("button", { onclick: open }, "Try again")));
}

async function run(work, said = null) {
  try {
    await work();
    status("connected", true);
    return true;
  } catch (error) {
    if (!(error instanceof Refused) && !(error instanceof Unreached)) throw error;
    const here = said && error instanceof Refused && error.status !== 401;
    if (here) said(error.message);
    status(here ? "connected" : error.message, here);
    document.body.classList.toggle("stale", error instanceof Unreached);
    if (error.status === 401) askForToken(error);
    return false;
  }
}

function status(text, good) {
  connection.textContent = text;
  connection.className = good ? "good" : "bad";
  document.body.classList.remove("stale");
}

function askForToken(error) {
  if (dialog.open) return;
  leave(); // nothing is asked again until somebody has signed in
  dialog.querySelector(".problem").textContent = sessionStorage.length ? error.message : "";
  dialog.showModal();
}

dialog.addEventListener("close", () => {
  const input = dialog.querySelector("input");
  if (!input.value) return; // closed by Escape
  signIn(input.value);
  input.value = "";
  open();
});
takeTokenFromLink();
addEventListener("hashchange", open);
open();
