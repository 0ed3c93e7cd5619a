// On the start page: searches that find something in this very library, each with its best photo.

import { element, find } from "./dom.js";
import { search, thumbnailOf } from "./api.js";
import { NOTHING, format } from "./address.js";

const SHOWN = 6;
const IDEAS = [
  "people around a dinner table",
  "a dog",
  "a city street at night",
  "snow in the mountains",
  "the sea",
  "a cat on a sofa",
  "flowers",
  "children playing",
  "a birthday cake",
  "a sunset",
  "a train",
  "a plate of food",
  "horses",
  "a receipt",
];

/** Fills the list, once; a library in which nothing of this is found has no examples. */
export async function showExamples(address) {
  const list = find("#examples");
  if (list.ariaBusy) return;
  list.ariaBusy = "true";
  const used = new Set();
  const shown = [];
  for (let start = 0; start < IDEAS.length && shown.length < SHOWN; start += 4) {
    const ideas = IDEAS.slice(start, start + 4);
    const answers = await Promise.all(
      ideas.map((q) => search({ ...NOTHING, q }, { k: 4, threshold: "auto" }).catch(() => ({ hits: [] }))),
    );
    ideas.forEach((q, place) => {
      const hit = answers[place].hits.find(({ id }) => !used.has(id));
      if (!hit || shown.length >= SHOWN) return;
      used.add(hit.id);
      shown.push(example(address, q, hit));
      list.append(shown.at(-1));
    });
  }
  list.ariaBusy = "false";
}

function example(address, q, hit) {
  const image = element("img", {
    src: thumbnailOf(hit.id, 640),
    alt: "",
    loading: "lazy",
    onload: ({ target }) => target.classList.add("loaded"),
  });
  const go = (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    address.change({ ...NOTHING, q });
  };
  return element(
    "li",
    {},
    element("a", { href: format({ ...NOTHING, q }), onclick: go }, image, element("span", {}, q)),
  );
}
