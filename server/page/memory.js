// The panel on the right: a session's memory at work.

import { ago, bytes, count, make, percent, short } from "./text.js";

const POINTS = 60;
const NEWS = 6;
const SVG = "http://www.w3.org/2000/svg";
const element = (id) => document.getElementById(id);

// What a session was like after each turn, as far as this tab has seen it.
export class History {
  constructor(session) {
    this.key = `hope.history.${session}`;
    this.points = JSON.parse(sessionStorage.getItem(this.key) ?? "[]");
    this.news = [];
  }

  remember(session) {
    const movement = Object.fromEntries(session.levels.map((level) => [level.name, level.movement]));
    const point = { version: session.version, surprise: session.surprise, movement };
    if (this.points.at(-1)?.version === session.version) this.points.pop();
    if (this.points.at(-1)?.version > session.version) this.points = [];
    this.points = [...this.points, point].slice(-POINTS);
    sessionStorage.setItem(this.key, JSON.stringify(this.points));
  }

  hear(news) {
    this.news = [news, ...this.news].slice(0, NEWS);
  }

  forget() {
    sessionStorage.removeItem(this.key);
  }

  surprises() {
    return this.points.map((point) => point.surprise).filter((value) => value !== null);
  }

  movements(level) {
    return this.points.map((point) => point.movement[level] ?? 0);
  }
}

export class MemoryPanel {
  #session = null;
  #levels = new Map();
  #versions = new Versions();

  // `goBack` and `fork` are called with the version that was chosen.
  constructor({ goBack, fork }) {
    this.#versions.goBack = goBack;
    this.#versions.fork = fork;
    setInterval(() => this.#tellTimes(), 1000);
  }

  show(session, history) {
    const other = session?.id !== this.#session?.id;
    this.#session = session;
    element("memory-facts").hidden = !session;
    element("memory-empty").hidden = Boolean(session);
    element("frozen").hidden = !session || (session.learning && !session.frozen);
    element("frozen").textContent = session?.frozen ? "frozen" : "learning is off";
    element("freeze").checked = session?.frozen ?? false;
    this.#showNews(history);
    if (!session) {
      this.#arrange([]);
      return;
    }
    put("fact-version", count(session.version), !other);
    put("fact-tokens", short(session.tokens), !other);
    put("fact-turns", count(session.turns));
    put("fact-bytes", bytes(session.bytes));
    put("surprise", session.surprise === null ? "–" : session.surprise.toFixed(2));
    spark(element("surprise-spark"), history.surprises(), "Surprise of the latest replies");
    this.#arrange(session.levels.map((level) => level.name));
    const furthest = Math.max(0.01, ...session.levels.map((level) => level.movement));
    for (const level of session.levels) {
      this.#levels.get(level.name).show(level, furthest, history.movements(level.name));
    }
    this.#tellTimes();
    this.introduce(session);
    element("foot").append(fingerprint(session.fingerprint));
  }

  // The versions that are kept; `busy` while a turn runs, whose end would be a surprise.
  showVersions(session, versions, busy) {
    this.#versions.show(session, versions, busy);
    element("freeze").disabled = busy;
  }

  // Which model this is, and how safe what it learns.
  introduce({ model, durability }) {
    const facts = [model, durability && `durability: ${durability}`].filter(Boolean);
    element("foot").replaceChildren(...facts.map((fact) => make("span", "", fact)));
  }

  // News of a consolidation: the level lights up at once, its numbers follow.
  flash(news) {
    this.#levels.get(news.level)?.flash(news.type === "hope:consolidation.completed");
  }

  #arrange(names) {
    if (names.join() === [...this.#levels.keys()].join()) return;
    this.#levels = new Map(names.map((name) => [name, new LevelCard(name)]));
    element("levels").replaceChildren(...[...this.#levels.values()].map((card) => card.element));
  }

  #showNews(history) {
    element("news-section").hidden = !history?.news.length;
    element("news").replaceChildren(...(history?.news ?? []).map(newsLine));
  }

  #tellTimes() {
    for (const level of this.#session?.levels ?? []) this.#levels.get(level.name).tellTime(level);
    this.#versions.tellTimes();
  }
}

class Versions {
  #rows = new Map(); // version -> its row
  #session = null;

  show(session, versions, busy) {
    if (session?.id !== this.#session) this.#rows.clear();
    this.#session = session?.id;
    const rows = versions.map((version) => {
      const row = this.#rows.get(version.version) ?? this.#row(version);
      const now = version.version === session.version;
      row.back.hidden = now;
      row.back.disabled = busy || session.frozen;
      row.back.title = session.frozen ? "a frozen memory does not change; unfreeze it first" : "";
      row.now.hidden = !now;
      return [version.version, row];
    });
    this.#rows = new Map(rows);
    const items = [...this.#rows.values()].map((row) => row.element);
    const shown = element("versions");
    // rows that stay are left where they are, and with them the focus
    const asMany = items.length === shown.children.length;
    if (!asMany || items.some((item, index) => shown.children[index] !== item)) {
      const focus = document.activeElement;
      shown.replaceChildren(...items);
      if (shown.contains(focus)) focus.focus();
    }
    this.tellTimes();
  }

  tellTimes() {
    for (const { when, at } of this.#rows.values()) when.textContent = ago(Date.now() / 1000 - at);
  }

  #row({ version, created_at: at, tokens, turns }) {
    const item = make("li", "version");
    const head = make("strong", "", count(version));
    const when = make("span", "soft");
    const size = `${short(tokens)} tokens · ${count(turns)} turn${turns === 1 ? "" : "s"}`;
    const now = make("span", "tag now", "now");
    const back = act("Go back", `Go back to version ${version}`, () => this.goBack(version));
    const fork = act("Fork", `Fork version ${version}`, () => this.fork(version));
    const words = make("div", "version-words");
    words.append(head, when, make("span", "soft size", size));
    item.append(words, now, back, fork);
    return { element: item, when, at, now, back };
  }
}

function act(words, label, work) {
  const button = make("button", "quiet small", words);
  button.type = "button";
  button.setAttribute("aria-label", label);
  button.addEventListener("click", work);
  return button;
}

class LevelCard {
  constructor(name) {
    this.element = make("li", "level");
    const head = make("div", "level-head");
    this.due = make("span", "tag");
    this.chunk = make("span", "soft");
    head.append(make("strong", "", name), this.due, this.chunk);
    const track = make("div", "track");
    this.bar = make("div", "fill");
    track.append(this.bar);
    this.moved = make("span", "moved");
    const movement = make("div", "movement");
    movement.append(track, this.moved);
    this.spark = document.createElementNS(SVG, "svg");
    this.spark.setAttribute("class", "spark small");
    this.spark.setAttribute("viewBox", "0 0 100 28");
    this.spark.setAttribute("preserveAspectRatio", "none");
    this.spark.setAttribute("role", "img");
    this.updates = make("span", "soft");
    this.loss = make("span", "soft");
    this.when = make("span", "soft when");
    const foot = make("div", "level-foot");
    foot.append(this.updates, this.loss, this.when);
    this.element.append(head, movement, this.spark, foot);
    this.element.addEventListener("animationend", () => {
      this.element.classList.remove("learned", "rejected");
    });
  }

  show(level, furthest, movements) {
    this.updates.textContent = `${count(level.updates)} update${level.updates === 1 ? "" : "s"}`;
    this.chunk.textContent = `every ${count(level.chunk)} tokens`;
    this.due.textContent = level.due ? `${level.due} due` : "";
    this.due.hidden = !level.due;
    this.bar.style.width = `${(100 * level.movement) / furthest}%`;
    this.moved.textContent = `moved ${percent(level.movement)}`;
    this.loss.textContent = level.last_loss === null ? "" : `loss ${level.last_loss.toFixed(2)}`;
    spark(this.spark, movements, `Movement of ${level.name} over the latest turns`);
  }

  tellTime(level) {
    this.when.textContent =
      level.last_at === null
        ? "not consolidated yet"
        : `last ${ago(Date.now() / 1000 - level.last_at)}, at token ${count(level.last_position)}`;
  }

  flash(learned) {
    this.element.classList.remove("learned", "rejected");
    void this.element.offsetWidth; // lets the animation start anew
    this.element.classList.add(learned ? "learned" : "rejected");
  }
}

function put(id, text, blink = false) {
  const place = element(id);
  if (blink && place.textContent !== text) {
    place.classList.remove("changed");
    void place.offsetWidth;
    place.classList.add("changed");
  }
  place.textContent = text;
}

function fingerprint(text) {
  const hash = text.slice(text.lastIndexOf("@") + 1);
  const mark = make("span", "mono", hash.slice(0, 12));
  mark.title = `fingerprint of the model: ${text}`;
  return mark;
}

function newsLine(news) {
  const line = make("li");
  const learned = news.type === "hope:consolidation.completed";
  const loss = news.loss === null ? "" : `, loss ${news.loss.toFixed(2)}`;
  const words = `at token ${count(news.position)}${loss}, ${Math.round(news.duration_ms)} ms`;
  line.append(
    make("strong", learned ? "" : "bad", news.level),
    learned ? " " : ` ${news.outcome} `,
    make("span", "soft", words),
  );
  return line;
}

function spark(svg, values, label) {
  const flat = new Set(values).size < 2;
  svg.toggleAttribute("hidden", flat);
  svg.replaceChildren();
  if (flat) return;
  const low = Math.min(...values);
  const span = Math.max(...values) - low;
  const points = values.map((value, index) => [
    (100 * index) / (values.length - 1),
    25 - (22 * (value - low)) / span,
  ]);
  const text = points.map(([x, y]) => `${x.toFixed(2)},${y.toFixed(2)}`).join(" ");
  svg.append(shape("polygon", `0,28 ${text} 100,28`), shape("polyline", text));
  svg.setAttribute("aria-label", `${label}: from ${values[0]} to ${values.at(-1)}`);
}

function shape(kind, points) {
  const drawn = document.createElementNS(SVG, kind);
  drawn.setAttribute("points", points);
  return drawn;
}
