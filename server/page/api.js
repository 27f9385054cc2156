// HTTP to the server, with the API key; asks for the key when the server wants one.

const KEY = "hope.key";

export class ApiError extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

let askForKey = async () => null;
let asking = null;

export function onLocked(ask) {
  askForKey = ask;
}

export async function call(method, path, query = {}, options = {}) {
  return (await answer(method, path, query, options)).json();
}

// A plain link carries no key, so with one the file goes through this tab.
export async function download(path, name) {
  const link = document.createElement("a");
  link.download = name;
  if (sessionStorage.getItem(KEY) === null) {
    link.href = new URL(path, document.baseURI);
    link.click();
    return;
  }
  const file = await (await answer("GET", path, {}, {})).blob();
  link.href = URL.createObjectURL(file);
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

async function answer(method, path, query, options) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const response = await send(method, path, query, key, options);
    if (response.status === 401) {
      await unlock(key);
      continue;
    }
    if (response.ok) return response;
    throw await refusal(response);
  }
}

export function openSocket() {
  const url = new URL("v1/responses", document.baseURI);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  url.hash = "";
  const key = sessionStorage.getItem(KEY);
  return key ? new WebSocket(url, ["hope", `hope-key.${base64url(key)}`]) : new WebSocket(url);
}

async function send(method, path, query, key, { body, version }) {
  const url = new URL(path, document.baseURI);
  url.search = new URLSearchParams(query);
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  if (version) headers["If-Match"] = `"${version}"`;
  try {
    return await fetch(url, { method, headers, body: body && JSON.stringify(body), cache: "no-store" });
  } catch {
    throw new ApiError(0, "unreachable", "The server cannot be reached.");
  }
}

// One question for all requests that were refused together.
async function unlock(refused) {
  if (sessionStorage.getItem(KEY) !== refused) return;
  asking ??= askForKey(refused !== null).finally(() => {
    asking = null;
  });
  sessionStorage.setItem(KEY, await asking);
}

async function refusal(response) {
  try {
    const { error } = await response.json();
    return new ApiError(response.status, error.code, error.message);
  } catch {
    const words = `The server answered with HTTP status ${response.status}.`;
    return new ApiError(response.status, `http_${response.status}`, words);
  }
}

function base64url(text) {
  const bytes = String.fromCharCode(...new TextEncoder().encode(text));
  return btoa(bytes).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}
