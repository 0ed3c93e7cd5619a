// The photos in justified rows, with blurred placeholders; arrow keys walk over them.

import { element, find, icon } from "./dom.js";
import { PAGE_SIZE, thumbnailOf } from "./api.js";
import { captionOf, labelOf, nameOf, percent } from "./captions.js";

const AHEAD_PX = 700; // photos this far below the screen are loaded already
const WIDEST = 3; // panoramas and strips are cropped to these shapes
const NARROWEST = 0.5;
const RETRIES_MS = [3000, 12000, 48000]; // the service may have been stopped, or had too much to do

export const aspectOf = ({ width, height }) => Math.min(Math.max(width / height || 1, NARROWEST), WIDEST);

const LOWEST = 0.6; // rows, as shares of the height that is aimed at
const HIGHEST = 1.8;
const UNFILLED = 9; // what a row that cannot fill the width costs: more than any that can

/** The height to aim at, in pixels. */
export const heightFor = (width) => Math.min(Math.max(width / 5, 132), 250);

/**
 * Rows of photos that fill `width`, as near to `height` as they can be together: [{width, height}] for the `aspects` in
 * their order. The breaks with the least sum of squared deviations (in logarithms) are found as Knuth and Plass find
 * those of a paragraph. Only what would be too high, such as a single photo, fills less.
 */
export function justify(aspects, { width, height, gap }) {
  const ends = [{ cost: 0 }]; // the best way to lay out the photos before each place: its cost, and its last row
  for (let end = 1; end <= aspects.length; end++) {
    let sum = 0;
    for (let start = end - 1; start >= 0; start--) {
      sum += aspects[start];
      const filled = (width - gap * (end - start - 1)) / sum;
      if (filled < LOWEST * height && start < end - 1) break;
      const cost = ends[start].cost + Math.log(filled / height) ** 2 + (filled > HIGHEST * height ? UNFILLED : 0);
      if (!(ends[end]?.cost <= cost)) ends[end] = { cost, start, height: Math.min(filled, HIGHEST * height) };
    }
  }
  const rows = [];
  for (let end = aspects.length; end > 0; end = ends[end].start) rows.unshift({ ...ends[end], end });
  // Rounded down to the pixel fractions that browsers lay out by, so that a row never breaks.
  return rows.flatMap((row) =>
    aspects
      .slice(row.start, row.end)
      .map((aspect) => ({ width: Math.floor(aspect * row.height * 64) / 64, height: Math.round(row.height) })),
  );
}

export class Grid {
  #tiles = new Map(); // id -> li: a photo that stays while one types keeps its loaded image
  #described = new WeakMap(); // li -> the hit that it tells of: with ten thousand tiles, only new ones cost time
  #laidOut = new WeakMap(); // first li of a page of hits -> what the page was laid out for
  #link = null; // of no photo in particular: it tells one search from another
  #visible = new IntersectionObserver((entries) => this.#load(entries), { rootMargin: `${AHEAD_PX}px 0px` });
  #current = null;

  /** `lists` are the two <ul>: matches, and the rest. `linkOf(id)` is a photo's address. */
  constructor(lists, { onOpen, onSimilar, linkOf }) {
    this.lists = lists;
    this.onOpen = onOpen;
    this.onSimilar = onSimilar;
    this.linkOf = linkOf;
    for (const list of lists) {
      list.addEventListener("click", (event) => this.#clicked(event));
      list.addEventListener("keydown", (event) => this.#pressed(event));
      list.addEventListener("focusin", (event) => this.#setCurrent(event.target.closest("li")));
      list.addEventListener("dragstart", (event) =>
        event.dataTransfer.setData("application/x-photo", event.target.closest("li").dataset.id),
      );
    }
    let width = 0;
    new ResizeObserver(([entry]) => {
      if (entry.contentRect.width !== width) this.layOut();
      width = entry.contentRect.width;
    }).observe(lists[0].parentElement);
  }

  /** Shows the hits of each list, best first. */
  show(sections) {
    const kept = new Map();
    const link = this.linkOf(0);
    sections.forEach((hits, section) => {
      const list = this.lists[section];
      let here = list.firstElementChild;
      for (const hit of hits) {
        const tile = this.#tiles.get(hit.id) ?? this.#tile(hit);
        if (this.#described.get(tile) !== hit || link !== this.#link) describe(tile, hit, this.linkOf(hit.id));
        this.#described.set(tile, hit);
        kept.set(hit.id, tile);
        if (tile === here) here = here.nextElementSibling;
        else list.insertBefore(tile, here);
      }
      while (here) {
        const surplus = here;
        here = here.nextElementSibling;
        surplus.remove();
      }
      list.hidden = hits.length === 0;
    });
    this.#link = link;
    for (const [id, tile] of this.#tiles) if (!kept.has(id)) this.#visible.unobserve(tile);
    this.#tiles = kept;
    if (!this.#current?.isConnected) this.#setCurrent(this.#all()[0] ?? null);
    this.layOut();
  }

  layOut() {
    const width = this.lists[0].parentElement.clientWidth;
    const gap = width < 600 ? 4 : 8;
    const height = heightFor(width);
    for (const list of this.lists) {
      // Each page of hits has rows of its own, so what has been seen stays where it is when the next page comes.
      for (const together of pagesOf([...list.children])) {
        const made = [width, ...together.map((tile) => tile.dataset.id)].join();
        if (this.#laidOut.get(together[0]) === made) continue;
        this.#laidOut.set(together[0], made);
        justify(
          together.map((tile) => Number(tile.dataset.aspect)),
          { width, height, gap },
        ).forEach((box, place) => {
          together[place].style.width = `${box.width}px`;
          together[place].style.height = `${box.height}px`;
        });
      }
    }
  }

  focus(id = null) {
    const tile = (id !== null && this.#tiles.get(id)) || this.#current;
    if (!tile) return false;
    find("a", tile).focus();
    tile.scrollIntoView({ block: "nearest" });
    return true;
  }

  /** The photo's picture on the page, if it is there: the lightbox grows out of it. */
  pictureOf(id) {
    const tile = this.#tiles.get(id);
    return tile ? (find("img.loaded", tile) ?? find("img", tile)) : null;
  }

  #all() {
    return this.lists.flatMap((list) => [...list.children]);
  }

  #tile(hit) {
    const small = element("img.small", { alt: "", decoding: "async" });
    const full = element("img.full", { alt: "", decoding: "async" });
    const similar = element(
      "button.similar",
      { type: "button", tabIndex: -1, title: "More like this" },
      icon("similar"),
    );
    const tile = element("li", {}, element("a", { tabIndex: -1 }, small, full, element("span.caption")), similar);
    tile.dataset.id = hit.id;
    tile.dataset.aspect = aspectOf(hit);
    similar.setAttribute("aria-label", `More like ${nameOf(hit.path)}`);
    const waits = [...RETRIES_MS];
    full.onload = () => {
      full.classList.add("loaded");
      tile.classList.remove("gone");
    };
    full.ontransitionend = () => small.remove(); // what is blurred below it need not be drawn any more
    full.onerror = () => {
      tile.classList.add("gone");
      if (waits.length) setTimeout(() => this.#tiles.get(hit.id) === tile && this.#visible.observe(tile), waits.shift());
    };
    this.#visible.observe(tile);
    return tile;
  }

  /** First a small image, which is blurred; once it is there, the sharp one. */
  #load(entries) {
    for (const { target: tile, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      this.#visible.unobserve(tile);
      const id = tile.dataset.id;
      const [small, full] = tile.querySelectorAll("img");
      small.onload = small.onerror = () => {
        const side = Math.max(tile.clientWidth, tile.clientHeight * Math.min(tile.dataset.aspect, 1));
        full.src = thumbnailOf(id, side * Math.min(devicePixelRatio, 2));
      };
      small.src = thumbnailOf(id, 160);
    }
  }

  #clicked(event) {
    const tile = event.target.closest("li");
    if (!tile || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    (event.target.closest(".similar") ? this.onSimilar : this.onOpen)(Number(tile.dataset.id));
  }

  #pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const tiles = this.#all();
    const here = tiles.indexOf(event.target.closest("li"));
    const next = {
      ArrowRight: () => here + 1,
      ArrowLeft: () => here - 1,
      ArrowDown: () => across(tiles, here, 1),
      ArrowUp: () => across(tiles, here, -1),
      Home: () => 0,
      End: () => tiles.length - 1,
    }[event.key]?.();
    if (next === undefined) return;
    event.preventDefault();
    if (next < 0) find("#q").focus();
    else this.focus(Number((tiles[next] ?? tiles[here]).dataset.id));
  }

  #setCurrent(tile) {
    if (this.#current) find("a", this.#current).tabIndex = -1;
    this.#current = tile;
    if (tile) find("a", tile).tabIndex = 0;
  }
}

function pagesOf(tiles) {
  const pages = [];
  for (const tile of tiles) {
    if (pages.at(-1)?.[0].dataset.page === tile.dataset.page) pages.at(-1).push(tile);
    else pages.push([tile]);
  }
  return pages;
}

function describe(tile, hit, link) {
  tile.dataset.page = Math.floor((hit.rank - 1) / PAGE_SIZE);
  const open = find("a", tile);
  open.href = link;
  open.setAttribute("aria-label", labelOf(hit));
  find(".caption", tile).replaceChildren(element("b", {}, percent(hit.relevance)), ` ${captionOf(hit)}`);
}

/** The place of the photo one row further (`step` 1) or back (-1) that lies nearest across; -1 above the first row. */
function across(tiles, here, step) {
  const box = tiles[here].getBoundingClientRect();
  const middle = box.left + box.width / 2;
  let best = -1;
  let row = null;
  for (let place = here + step; tiles[place]; place += step) {
    const other = tiles[place].getBoundingClientRect();
    if (other.top === box.top) continue;
    if (row !== null && other.top !== row) break;
    row = other.top;
    const off = (tile) => Math.abs(tile.left + tile.width / 2 - middle);
    if (best < 0 || off(other) < off(tiles[best].getBoundingClientRect())) best = place;
  }
  return best < 0 && step > 0 ? tiles.length - 1 : best;
}
