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

export async function call(method, path, query = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const response = await send(method, path, query, key);
    if (response.status === 401) {
      await unlock(key);
      continue;
    }
    if (response.ok) return response.json();
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

async function send(method, path, query, key) {
  const url = new URL(path, document.baseURI);
  url.search = new URLSearchParams(query);
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  try {
    return await fetch(url, { method, headers, cache: "no-store" });
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
