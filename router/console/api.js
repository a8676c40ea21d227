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

export class Unreached extends Error {}

export function get(path) {
  return asked(path, { headers: credential() });
}

export function post(path, body) {
  const headers = { ...credential(), "content-type": "application/json" };
  return asked(path, { method: "POST", headers, body: JSON.stringify(body) });
}

function credential() {
  const token = sessionStorage.getItem(KEY);
  return token ? { authorization: `Bearer ${token}` } : {};
}

async function asked(path, options) {
  const reply = await fetch(path, options).catch((error) => {
    throw new Unreached("the daemon cannot be reached", { cause: error });
  });
  const body = await reply.json().catch(() => ({}));
  if (!reply.ok) throw new Refused(reply.status, body.error);
  return body;
}
