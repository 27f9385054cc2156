// Small words for numbers and times, and a model's text as DOM nodes. Never as HTML.

export function make(tag, name = "", text = "") {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== "") element.textContent = text;
  return element;
}

export const count = (number) => number.toLocaleString("en");

export function short(number) {
  return number < 10_000 ? count(number) : `${(number / 1000).toFixed(number < 1e5 ? 1 : 0)}k`;
}

export function bytes(number) {
  const units = ["B", "kB", "MB", "GB"];
  let unit = 0;
  for (; number >= 1000 && unit < units.length - 1; unit += 1) number /= 1000;
  return `${unit && number < 100 ? number.toFixed(1) : Math.round(number)} ${units[unit]}`;
}

export function percent(share) {
  if (share === 0) return "0 %";
  const points = share * 100;
  return points < 0.001 ? "< 0.001 %" : `${Number(points.toPrecision(2))} %`;
}

export function ago(seconds) {
  const scale = [
    [86_400, "d"],
    [3_600, "h"],
    [60, "min"],
  ];
  for (const [length, unit] of scale) {
    if (seconds >= length) return `${Math.floor(seconds / length)} ${unit} ago`;
  }
  return `${Math.max(0, Math.floor(seconds))} s ago`;
}

export function randomHex(length) {
  const random = crypto.getRandomValues(new Uint8Array(length));
  return [...random].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Fenced and inline code become <pre> and <code>; all else stays the text it is.
export function render(element, text) {
  element.replaceChildren();
  text.split(/^```([^\n`]*)\n?/m).forEach((part, index) => {
    // parts: text, language, code, language, text, ... a fence opens and closes
    if (index % 4 === 0) prose(element, part);
    else if (index % 4 === 2) element.append(fenced(part));
  });
}

function fenced(code) {
  const block = make("pre");
  block.tabIndex = 0;
  block.append(make("code", "", code.replace(/\n$/, "")));
  return block;
}

function prose(element, text) {
  if (!text.trim()) return;
  const paragraph = make("p");
  text
    .replace(/^\n+|\s+$/g, "")
    .split(/`([^`\n]+)`/)
    .forEach((part, index) => {
      if (index % 2) paragraph.append(make("code", "", part));
      else paragraph.append(part);
    });
  element.append(paragraph);
}
