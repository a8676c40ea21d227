// The administration's API. The credential stays in this tab; a link's fragment may bring it, which no server sees.

const KEY = "causeway.token";

export class Refused extends Error {
  constructor(status, error) {
    super(error?.message ?? `the daemon answered ${status}`);
    this.status = status;
  }
}

export function takeTokenFromLink() {
  const found = /^#token=([\w-]+)$/.exec(location.hash);
  if (!found) return;
  sessionStorage.setItem(KEY, found[1]);
  history.replaceState(null, "", location.pathname + "#now");
}

export const signIn = (token) => sessionStorage.setItem(KEY, token);

export async function get(path) {
  return answered(await fetch(path, { headers: credential() }));
}

export async function post(path, body) {
  const headers = { ...credential(), "content-type": "application/json" };
  return answered(await fetch(path, { method: "POST", headers, body: JSON.stringify(body) }));
}

function credential() {
  const token = sessionStorage.getItem(KEY);
  return token ? { authorization: `Bearer ${token}` } : {};
}

async function answered(reply) {
  const body = await reply.json().catch(() => ({}));
  if (!reply.ok) throw new Refused(reply.status, body.error);
  return body;
}
