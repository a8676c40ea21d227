// What the fleet's cloud sends this device, what is in force of it, and what was refused.

import { get } from "./api.js";
import { card, empty, h, moment, table } from "./dom.js";

const NONE = "This device follows no fleet. With the fleet's public key (fleet_key) and a cloud, it takes the policies that the fleet's administrator has signed.";

export async function fleet(page, { every }) {
  const shown = h("div", { class: "stack" });
  page.append(shown);
  await every(2, async () => {
    const { fleet: found } = await get("/admin/fleet");
    shown.replaceChildren(...(found ? [h("div", { class: "cards charts" }, cloud(found), here(found)), refused(found)] : [empty(NONE)]));
  });
}

function cloud({ connected, offered, seen, answered_at: at }) {
  const pushed = offered && offered > seen ? version(offered) : at ? "nothing newer" : null;
  return card("The fleet's cloud", { good: connected, text: connected ? "connected" : "away" }, {
    "sent last": offered ? version(offered) : null,
    "has for this device": pushed,
    "last answered": at ? moment(at) : "not since the start",
  });
}

function here({ edge, group, offered, seen, using, refused, code, message, stricter }) {
  const state = refused ? { good: false, text: `version ${refused} refused` } : using ? { good: true, text: `version ${using} in force` } : null;
  const why = refused || code ? h("p", { class: refused ? "bad" : "faint" }, `${code}: ${message}`) : null;
  return card("This device", state, {
    name: edge,
    group: group || "none",
    "in force": using ? version(using) : "none of the fleet's",
    "newest taken": seen ? version(seen) : "none",
    "own policy stricter": stricter ? "yes, so refused" : refused || !using || offered > seen ? "not known" : "no",
  }, why);
}

function refused({ refusals }) {
  const rows = refusals.map((one) => [moment(one.at), one.why]);
  return rows.length ? table(["when:head", "what and why:reason"], rows, { caption: "Refused" }) : empty("Nothing that the fleet has signed was refused.");
}

const version = (number) => `version ${number}`;
