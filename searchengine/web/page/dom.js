// What every part of the page needs of the DOM.

export const find = (selector, within = document) => within.querySelector(selector);

/** element("a.big", {href: "/", onclick: go}, "text", child); `false` and `null` are left out wherever they stand. */
export function element(what, properties = {}, ...children) {
  const [name, ...classes] = what.split(".");
  const made = document.createElement(name);
  made.classList.add(...classes);
  for (const [key, value] of Object.entries(properties)) {
    if (value === null || value === false) continue;
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== false));
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

/** One of the symbols at the top of index.html. */
export function icon(name) {
  const drawing = document.createElementNS(SVG, "svg");
  drawing.classList.add("icon");
  drawing.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  drawing.append(use);
  return drawing;
}

export function setIcon(button, name) {
  find("use", button).setAttribute("href", `#i-${name}`);
}

export const number = (value) => value.toLocaleString("en");

export const counted = (count, noun) => `${number(count)} ${noun}${count === 1 ? "" : "s"}`;

/** Says something to screen readers without moving the focus. */
export function announce(text) {
  find("#live").textContent = text;
}
