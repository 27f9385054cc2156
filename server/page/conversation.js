// One session's talk: what was said before, and the reply that is arriving.

import { call } from "./api.js";
import { count, make, randomHex, render } from "./text.js";

const LAST_PAGES = 50;

export class Conversation extends EventTarget {
  #ended = 0; // turns

  constructor(name, line) {
    super();
    this.name = name;
    this.line = line;
    this.turn = null;
    this.loaded = false;
    this.fresh = false; // the next message begins a new conversation
    this.element = make("ol", "log");
    this.element.setAttribute("role", "log");
    this.element.setAttribute("aria-label", `Talk with ${name}`);
  }

  get replying() {
    return this.turn !== null;
  }

  // --- what was said before ---

  async load() {
    let items;
    let ended;
    do {
      ended = this.#ended;
      items = await this.#transcript();
    } while (ended !== this.#ended); // what ended meanwhile may not be in it
    this.begin();
    const shown = [...items.map(toMessage), ...(this.turn?.shown ?? [])];
    this.element.replaceChildren(...(shown.length ? shown : [welcome(this.name)]));
    this.#scroll(true);
  }

  begin() {
    if (!this.loaded) this.element.replaceChildren(welcome(this.name));
    this.loaded = true;
  }

  async #transcript() {
    const path = `v1/conversations/${encodeURIComponent(this.name)}/items`;
    const items = [];
    let query = {};
    for (let pages = 0; pages < LAST_PAGES; pages += 1) {
      const page = await call("GET", path, query).catch(absent);
      items.push(...page.data);
      if (!page.has_more || page.last_id === query.after) break;
      query = { after: page.last_id };
    }
    return items;
  }

  // --- a turn ---

  say(text, mode, turns) {
    this.element.querySelector(".welcome")?.remove();
    const reply = message("assistant", "");
    const body = reply.querySelector(".body");
    reply.dataset.streaming = "";
    this.element.setAttribute("aria-busy", "true");
    const begun = this.fresh && turns > 0 ? [make("li", "begun", "a new conversation")] : [];
    const shown = [...begun, message("user", text), reply];
    this.element.append(...shown);
    const id = `turn_${randomHex(16)}`;
    this.turn = { id, said: text, mode, turns, shown, reply, body, text: "", drawing: false };
    this.line.send({
      type: "response.create",
      event_id: id,
      stream_id: id,
      turn_id: id,
      conversation: this.name,
      input: text,
      include: ["hope:memory"],
      memory: this.fresh ? { mode, window: "fresh" } : { mode },
    });
    this.#scroll(true);
    this.#changed();
  }

  stop() {
    if (!this.turn || this.turn.stopping) return;
    this.turn.stopping = true;
    this.line.send({
      type: "response.cancel",
      event_id: `${this.turn.id}.cancel`,
      stream_id: this.turn.id,
    });
    this.#changed();
  }

  hear(event) {
    switch (event.type) {
      case "response.output_text.delta":
        this.turn.text += event.delta;
        this.#draw();
        break;
      case "response.completed":
      case "response.incomplete":
        this.#finish(event.response);
        break;
      case "response.failed":
        this.#fail(event.response.error?.message ?? "The server could not finish the turn.");
        break;
      case "error":
        if (event.event_id && event.event_id !== this.turn.id) break; // a cancel came too late
        this.#fail(event.error.message);
        break;
      default:
        break;
    }
  }

  // The line was lost: only the session itself knows what became of the turn.
  lose() {
    const turn = this.#end();
    turn.reply.append(make("p", "meta bad", "the connection was lost; not known yet if it was kept"));
    this.#scroll();
    this.dispatchEvent(new CustomEvent("lost", { detail: turn }));
  }

  #finish(response) {
    const turn = this.turn;
    const whole = response.output.flatMap((item) => item.content).map((part) => part.text);
    turn.text = whole.join("") || turn.text;
    if (response.memory?.outcome === "committed") this.fresh = false;
    turn.reply.append(make("p", "meta", fate(response)));
    this.#end();
    this.#scroll();
    this.dispatchEvent(new CustomEvent("kept", { detail: response }));
  }

  #fail(words) {
    const turn = this.#end();
    if (!turn.text) turn.body.remove();
    turn.reply.classList.add("failed");
    turn.reply.append(make("p", "meta bad", `${words} Nothing of this turn was kept.`));
    this.#scroll();
    this.dispatchEvent(new CustomEvent("failed", { detail: turn }));
  }

  #end() {
    const turn = this.turn;
    this.turn = null;
    this.#ended += 1;
    render(turn.body, turn.text);
    delete turn.reply.dataset.streaming;
    this.element.setAttribute("aria-busy", "false");
    this.#changed();
    return turn;
  }

  #draw() {
    const turn = this.turn;
    if (turn.drawing) return;
    turn.drawing = true;
    requestAnimationFrame(() => {
      turn.drawing = false;
      if (turn !== this.turn) return;
      render(turn.body, turn.text);
      this.#scroll();
    });
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }

  // Follows the reply, unless the reader has scrolled up to read.
  #scroll(force = false) {
    const view = this.element.parentElement;
    if (!view) return;
    const below = view.scrollHeight - view.scrollTop - view.clientHeight;
    if (force || below < 120) view.scrollTop = view.scrollHeight;
  }
}

const absent = (error) => {
  if (error.status === 404) return { data: [], has_more: false };
  throw error;
};

function toMessage(item) {
  const text = item.content.map((part) => part.text).join("");
  const shown = message(item.role, text);
  if (item.status === "incomplete") shown.append(make("p", "meta", "cut short"));
  return shown;
}

function message(role, text) {
  const shown = make("li", `message ${role}`);
  const who = { user: "You", assistant: "Reply" }[role] ?? role;
  shown.append(make("span", role === "user" || role === "assistant" ? "unseen" : "who", who));
  const body = make("div", "body");
  if (role === "assistant") render(body, text);
  else body.append(make("p", "", text));
  shown.append(body);
  return shown;
}

function welcome(name) {
  const words = make("li", "welcome");
  words.append(
    make("p", "", `${name} has not been told anything yet.`),
    make("p", "soft", "What you say here goes into its memory, and it goes on knowing it."),
  );
  return words;
}

function fate({ usage, memory, incomplete_details: cut }) {
  const parts = [];
  const kept = memory?.outcome === "committed";
  if (cut?.reason === "cancelled") {
    parts.push(kept ? "stopped; what was said is kept" : "stopped; nothing of it was kept");
  }
  if (cut?.reason === "max_output_tokens") parts.push("cut at the longest length");
  if (memory?.replayed) parts.push("answered before, not learned again");
  if (kept) parts.push(`version ${count(memory.committed_version)}`);
  else if (memory) parts.push(memory.outcome.replace("_", " "));
  if (usage) parts.push(`${count(usage.input_tokens)} + ${count(usage.output_tokens)} tokens`);
  if (typeof memory?.surprise === "number") parts.push(`surprise ${memory.surprise.toFixed(2)}`);
  if (memory?.consolidated_levels.length) {
    parts.push(`consolidated ${memory.consolidated_levels.join(", ")}`);
  }
  return parts.join(" · ");
}
