// The search field: the text that is typed, and beside it, as chips, all else that the search consists of.

import { announce, element, find, icon } from "./dom.js";
import { keyOf } from "./address.js";
import { thumbnailOf } from "./api.js";
import { chipOf } from "./filters.js";
import { tell } from "./notices.js";

export function startField(address, { onEnter, onDown }) {
  const form = find("#field");
  const input = find("#q");
  const chips = find("#chips");
  const file = find("#file");

  const commit = (list) => {
    const text = input.value.trim();
    if (!text) return;
    address.change({ q: "", [list]: [...new Set([...address.asked[list], text])] }, { settled: true });
    input.focus();
  };
  find("#add").onclick = () => commit("texts");
  find("#not").onclick = () => commit("nots");
  find("#upload").onclick = () => file.click();
  file.onchange = () => {
    addFiles(address, file.files);
    file.value = "";
  };

  input.oninput = () => address.change({ q: input.value }, { typing: true });
  input.onkeydown = (event) => {
    if (event.isComposing) return; // the keys belong to the input method
    if (event.key === "Enter" && event.altKey) commit("nots");
    else if (event.key === "Enter" && event.shiftKey) commit("texts");
    else if (event.key === "ArrowDown" && onDown()) event.preventDefault();
    else if (event.key === "Backspace" && !input.value) chips.lastElementChild?.querySelector("button").click();
    else if (event.key === "Escape" && !input.value) input.blur();
    else return;
    if (event.key === "Enter") event.preventDefault();
  };
  form.onsubmit = (event) => {
    event.preventDefault();
    address.settle();
    onEnter();
    if (matchMedia("(pointer: coarse)").matches) input.blur(); // puts the keyboard of a phone away
  };
  form.onclick = (event) => {
    if (event.target === form || event.target === chips) input.focus();
  };

  let drawn = null;
  const show = (asked) => {
    if (input.value !== asked.q) input.value = asked.q;
    find("#add").hidden = find("#not").hidden = !asked.q.trim();
    const parts = keyOf({ ...asked, q: "" });
    if (parts !== drawn) chips.replaceChildren(...chipsOf(asked, address)); // not anew with every letter
    drawn = parts;
    const some = chips.children.length > 0;
    chips.hidden = !some;
    input.placeholder = some ? "and …" : "Describe the photos";
  };
  address.onChange(show);
  show(address.asked);
  takeDropsAndPastes(address);
}

function chipsOf(asked, address) {
  const without = (list, value) => () => address.change({ [list]: asked[list].filter((other) => other !== value) });
  return [
    ...asked.images.map((image) =>
      chip(
        `picture ${image.name}`,
        [element("img", { src: image.url, alt: "" }), "this picture"],
        without("images", image),
      ),
    ),
    ...asked.likes.map((id) =>
      chip(`photo ${id}`, [element("img", { src: thumbnailOf(id, 160), alt: "", onerror: ({ target }) => target.remove() }), "like this"], without("likes", id)),
    ),
    ...asked.texts.map((text) => chip(text, [text], without("texts", text))),
    ...asked.nots.map((text) =>
      chip(`not ${text}`, [element("b", {}, "not"), text], without("nots", text), ".without"),
    ),
    ...Object.entries(asked.filters).map(([name, value]) => {
      const { [name]: _removed, ...filters } = asked.filters;
      return chip(
        `filter ${chipOf(name, value)}`,
        [icon("filter"), chipOf(name, value)],
        () => address.change({ filters }),
        ".narrowing",
      );
    }),
  ];
}

function chip(name, content, onRemove, kind = "") {
  const remove = element("button", { type: "button", title: "Remove" }, icon("close"));
  remove.setAttribute("aria-label", `Remove ${name}`);
  remove.onclick = () => {
    onRemove();
    find("#q").focus();
  };
  return element(`li.chip${kind}`, {}, element("span", {}, ...content), remove);
}

/** Puts the pictures among `files` into the search. What is no picture is told, not sent. */
function addFiles(address, files) {
  const pictures = [...files].filter(
    (file) => file.type.startsWith("image/") || /\.(heic|heif|avif|jxl)$/i.test(file.name),
  );
  if (!pictures.length) {
    tell({
      icon: "warn",
      title: "That is no picture.",
      text: "Drop or paste an image: JPEG, PNG, WebP, HEIC and others.",
    });
    return;
  }
  address.change({ images: [...address.asked.images, ...pictures.map((file) => address.picture(file))], photo: null });
  announce("Searching by the picture");
}

function takeDropsAndPastes(address) {
  const overlay = find("#drop");
  const carries = ({ dataTransfer: { types } }) => types.includes("Files") || types.includes("application/x-photo");
  let depth = 0; // dragenter and dragleave come for every element that is crossed
  const over = (by) => {
    depth = Math.max(0, by === 0 ? 0 : depth + by);
    overlay.hidden = depth === 0;
  };
  addEventListener("dragenter", (event) => carries(event) && over(1));
  addEventListener("dragleave", (event) => carries(event) && over(-1));
  addEventListener("dragover", (event) => carries(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    if (!carries(event)) return;
    event.preventDefault();
    over(0);
    const id = Number(event.dataTransfer.getData("application/x-photo"));
    if (id) address.change({ likes: [...new Set([...address.asked.likes, id])] });
    else addFiles(address, event.dataTransfer.files);
  });
  addEventListener("paste", (event) => {
    if (!event.clipboardData.files.length) return;
    event.preventDefault();
    addFiles(address, event.clipboardData.files);
  });
}
