// Puts the page together: the list of sessions, the talk in the middle, the memory beside it.

import { ApiError, call, download, onLocked } from "./api.js";
import { Conversation } from "./conversation.js";
import { Line } from "./line.js";
import { History, MemoryPanel } from "./memory.js";
import { count, make, randomHex, short } from "./text.js";

const element = (id) => document.getElementById(id);
const line = new Line();
const panel = new MemoryPanel({ goBack, fork });
const conversations = new Map(); // name -> Conversation
const histories = new Map(); // name -> History
const standing = new Map(); // name -> the session as the server last told it
const kept = new Map(); // name -> its kept versions, the newest first
let current = null; // the Conversation in view
let nextPage = null;

// --- sessions -----------------------------------------------------------------------------------

async function listSessions() {
  const page = await call("GET", "v1/sessions", { limit: 50 });
  standing.clear();
  takePage(page);
}

function takePage(page) {
  for (const session of page.data) standing.set(session.id, session);
  nextPage = page.has_more ? page.next_cursor : null;
  showSessions();
}

function showSessions() {
  const known = [...standing.values()].sort((a, b) => b.updated_at - a.updated_at);
  const items = known.map((session) => sessionItem(session.id, session));
  const fresh = [...conversations.values()]
    .filter((talk) => !standing.has(talk.name) && (talk === current || talk.replying))
    .map((talk) => sessionItem(talk.name, null));
  element("session-list").replaceChildren(...fresh, ...items);
  element("more-sessions").hidden = nextPage === null;
}

function sessionItem(name, session) {
  const item = make("li");
  const open = make("button", "session");
  open.type = "button";
  const facts = session ? `version ${session.version} · ${short(session.tokens)} tokens` : "new";
  open.append(make("span", "name", name), make("span", "soft", facts));
  if (name === current?.name) open.setAttribute("aria-current", "true");
  if (conversations.get(name)?.replying) open.append(make("span", "pulse"));
  open.addEventListener("click", () => openSession(name));
  item.append(open);
  if (session) {
    const remove = make("button", "icon remove", "×");
    remove.type = "button";
    remove.setAttribute("aria-label", `Forget ${name}`);
    remove.addEventListener("click", () => forget(session));
    item.append(remove);
  }
  return item;
}

async function openSession(name) {
  closeDrawers();
  current = conversation(name);
  history.replaceState(null, "", `#${encodeURIComponent(name)}`);
  document.title = `${name} · HOPE`;
  element("title").textContent = name;
  element("logs").replaceChildren(current.element);
  showSessions();
  showComposer();
  showMemory();
  say("");
  const opened = current;
  await attempt(async () => {
    if (isNew(name)) opened.begin();
    if (!opened.loaded) await opened.load();
    if (!isNew(name)) await refresh(name);
  });
  const view = element("logs");
  if (opened === current) view.scrollTop = view.scrollHeight;
  if (matchMedia("(hover: hover)").matches) element("text").focus();
}

const isNew = (name) => nextPage === null && !standing.has(name);

function conversation(name) {
  if (conversations.has(name)) return conversations.get(name);
  const made = new Conversation(name, line);
  conversations.set(name, made);
  made.addEventListener("change", () => {
    showComposer();
    showSessions();
    if (made === current) showVersions();
  });
  made.addEventListener("kept", ({ detail }) => {
    const committed = detail.memory?.outcome === "committed";
    if (committed || !isNew(name)) attempt(() => refresh(name));
    const recovered = detail.memory?.recovered;
    if (recovered && made === current) say(`The memory had to be recovered: ${recovered}.`);
  });
  made.addEventListener("failed", ({ detail }) => giveBack(made, detail.said));
  made.addEventListener("lost", ({ detail }) => {
    made.lostTurn = detail;
  });
  return made;
}

async function forget(session) {
  element("delete-words").textContent =
    `${session.id} and the ${short(session.tokens)} tokens it learned from will be gone. ` +
    "This cannot be undone.";
  if ((await ask("delete-dialog")) !== "yes") return;
  await attempt(async () => {
    await call("DELETE", `v1/sessions/${encodeURIComponent(session.id)}`);
    clearTimeout(soon.get(session.id));
    recall(session.id).forget();
    for (const known of [conversations, histories, standing, kept]) known.delete(session.id);
    if (current?.name === session.id) await openSession(firstName());
    else showSessions();
  });
}

// A name is not free again after its session was forgotten, so a fresh one is drawn.
const firstName = () => standing.keys().next().value ?? `session-${randomHex(2)}`;

// --- memory -------------------------------------------------------------------------------------

function recall(name) {
  if (!histories.has(name)) histories.set(name, new History(name));
  return histories.get(name);
}

async function refresh(name) {
  try {
    const session = await call("GET", `v1/sessions/${encodeURIComponent(name)}`);
    standing.set(name, session);
    recall(name).remember(session);
    if (current?.name === name) await listVersions(session);
  } catch (error) {
    if (error.status !== 404) throw error;
    standing.delete(name);
    kept.delete(name);
  }
  showSessions();
  if (current?.name === name) showMemory();
}

async function listVersions({ id, version }) {
  if (kept.get(id)?.[0]?.version === version) return;
  const list = await call("GET", `v1/sessions/${encodeURIComponent(id)}/versions`);
  kept.set(id, list.data);
}

function showMemory() {
  panel.show(standing.get(current.name) ?? null, recall(current.name));
  showVersions();
}

function showVersions() {
  const session = standing.get(current.name) ?? null;
  panel.showVersions(session, session ? (kept.get(session.id) ?? []) : [], current.replying);
}

// Does something to the session in view; what it becomes is shown, or why it does not.
async function act(name, options, words) {
  const talk = current;
  await attempt(async () => {
    const path = `v1/sessions/${encodeURIComponent(talk.name)}/${name}`;
    const session = await call("POST", path, {}, options);
    if (name === "rollback") await talk.load();
    await refresh(talk.name);
    if (talk === current) say(words(session));
  });
  if (talk === current) showMemory();
  closeDrawers(); // the words are behind them
}

function goBack(version) {
  const now = standing.get(current.name).version;
  const words = ({ version: made }) =>
    `Went back to version ${count(version)}, which is version ${count(made)} now. ` +
    `To undo it, go back to version ${count(now)}.`;
  act("rollback", { body: { version }, version: now }, words);
}

function freeze(frozen) {
  const words = () =>
    frozen
      ? "Frozen: what you say is answered from the memory, and not learned."
      : "What you say is learned again.";
  act(frozen ? "freeze" : "unfreeze", {}, words);
}

async function fork(version) {
  const talk = current;
  element("fork-words").textContent =
    `A new session that knows what ${talk.name} knew at version ${count(version)}. ` +
    "The two share nothing from then on.";
  element("fork-name").value = `${talk.name}-${randomHex(1)}`;
  if ((await ask("fork-dialog")) !== "yes") return;
  const id = element("fork-name").value.trim();
  await attempt(async () => {
    const path = `v1/sessions/${encodeURIComponent(talk.name)}/fork`;
    const session = await call("POST", path, {}, { body: { id, version } });
    standing.set(session.id, session);
    await openSession(session.id);
    say(`This is a fork of ${talk.name} at version ${count(version)}.`);
  });
}

function exportSession() {
  const { id, version } = standing.get(current.name);
  const path = `v1/sessions/${encodeURIComponent(id)}/export`;
  closeDrawers();
  attempt(() => download(path, `${id}.${version}.safetensors`));
}

const soon = new Map();

function refreshSoon(name) {
  clearTimeout(soon.get(name));
  soon.set(
    name,
    setTimeout(() => attempt(() => refresh(name)), 150),
  );
}

function hearOfMemory(event) {
  const name = event.conversation;
  if (event.type.startsWith("hope:consolidation.")) {
    recall(name).hear(event);
    if (name === current?.name) {
      showMemory();
      panel.flash(event);
    }
  }
  const committed = event.type === "hope:memory.committed"; // only then is a new session there
  if (committed || !isNew(name)) refreshSoon(name);
}

// --- talking ------------------------------------------------------------------------------------

function send() {
  const box = element("text");
  const text = box.value.trim();
  if (!text || !current || current.replying) return;
  if (!line.open) {
    say("Not connected; your words stay here until the server is back.");
    line.dial();
    return;
  }
  say("");
  box.value = "";
  grow();
  current.say(text, element("mode").value, standing.get(current.name)?.turns ?? 0);
}

function giveBack(talk, said) {
  const box = element("text");
  if (talk === current && !box.value) box.value = said;
  grow();
}

// After a lost line the session itself tells whether the turn was kept.
async function settle(talk) {
  const { said, turns, mode } = talk.lostTurn;
  talk.lostTurn = null;
  await refresh(talk.name);
  await talk.load();
  const kept = (standing.get(talk.name)?.turns ?? 0) > turns;
  if (kept) say("Connected again; the turn was kept.");
  else if (mode !== "read_write") say("Connected again.");
  else say("Connected again; the turn was not kept, your words are back below.");
  if (!kept) giveBack(talk, said);
}

function showComposer() {
  const replying = current?.replying ?? false;
  element("send").hidden = replying;
  element("stop").hidden = !replying;
  element("stop").disabled = current?.turn?.stopping ?? false;
  element("stop").textContent = current?.turn?.stopping ? "Stopping" : "Stop";
  element("fresh").checked = current?.fresh ?? false;
}

function grow() {
  const box = element("text");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
}

function say(words) {
  element("notice").textContent = words;
  element("notice").hidden = !words;
}

async function attempt(work) {
  try {
    await work();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status !== 0) say(error.message); // the line tells when nobody answers
  }
}

// --- the line -----------------------------------------------------------------------------------

line.addEventListener("state", ({ detail }) => {
  element("line").textContent = detail.words;
  element("line").dataset.state = detail.state;
  if (detail.state === "open") attempt(welcomeBack);
});

line.addEventListener("refused", ({ detail }) => say(detail));

line.addEventListener("hear", ({ detail: event }) => {
  if (event.type === "hope:memory.committed" || event.type.startsWith("hope:consolidation.")) {
    hearOfMemory(event);
    return;
  }
  const id = event.stream_id ?? event.event_id;
  const talk = [...conversations.values()].find(({ turn }) => turn && turn.id === id);
  if (talk) talk.hear(event);
  else if (event.type === "error" && !id) say(event.error.message);
});

line.addEventListener("lost", () => {
  for (const talk of conversations.values()) if (talk.replying) talk.lose();
});

async function welcomeBack() {
  await listSessions();
  await call("GET", "health/ready").then(
    (health) => panel.introduce(health),
    () => {}, // not ready: a turn will tell why
  );
  const lost = [...conversations.values()].filter((talk) => talk.lostTurn);
  if (!current) await openSession(decodeURIComponent(location.hash.slice(1)) || firstName());
  else if (!current.loaded) await current.load();
  for (const talk of lost) await settle(talk);
  if (!isNew(current.name)) await refresh(current.name);
}

// --- dialogs and drawers ------------------------------------------------------------------------

function ask(id) {
  const dialog = element(id);
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true });
  });
}

onLocked(async (wasWrong) => {
  element("key-words").textContent = wasWrong
    ? "The server does not know that key. Try another."
    : "It is kept in this tab until you close it.";
  while ((await ask("key-dialog")) !== "yes");
  const key = element("key").value;
  element("key").value = "";
  return key;
});

async function beginSession() {
  closeDrawers();
  element("new-name").value = "";
  if ((await ask("new-dialog")) !== "yes") return;
  const name = element("new-name").value.trim();
  if (name) await openSession(name);
}

function openDrawer(button) {
  const drawer = element(button.dataset.drawer);
  drawer.classList.add("open");
  element("scrim").hidden = false;
  button.setAttribute("aria-expanded", "true");
  drawer.querySelector(".close").focus();
}

// Returns whether there was one to close.
function closeDrawers() {
  const drawer = document.querySelector(".panel.open");
  if (!drawer) return false;
  drawer.classList.remove("open");
  element("scrim").hidden = true;
  const button = document.querySelector(`[data-drawer="${drawer.id}"]`);
  button.setAttribute("aria-expanded", "false");
  button.focus();
  return true;
}

element("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
element("text").addEventListener("input", grow);
element("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (!closeDrawers()) current?.stop();
});
element("stop").addEventListener("click", () => current?.stop());
element("fresh").addEventListener("change", ({ target }) => {
  if (current) current.fresh = target.checked;
});
element("freeze").addEventListener("change", ({ target }) => freeze(target.checked));
element("export").addEventListener("click", exportSession);
element("new-session").addEventListener("click", beginSession);
element("more-sessions").addEventListener("click", () =>
  attempt(async () => takePage(await call("GET", "v1/sessions", { limit: 50, cursor: nextPage }))),
);
element("scrim").addEventListener("click", closeDrawers);
for (const button of document.querySelectorAll("[data-drawer]")) {
  button.addEventListener("click", () => openDrawer(button));
}
for (const button of document.querySelectorAll(".close")) {
  button.addEventListener("click", closeDrawers);
}
for (const button of document.querySelectorAll("[data-close]")) {
  button.addEventListener("click", () => button.closest("dialog").close(""));
}
addEventListener("hashchange", () => {
  const name = decodeURIComponent(location.hash.slice(1));
  if (name && name !== current?.name) openSession(name);
});

line.dial();
