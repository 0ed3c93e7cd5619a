// What the index holds, and what is being added to it.

import { announce, counted, element, find, number } from "./dom.js";
import { status } from "./api.js";
import { isAsking } from "./address.js";
import { command, loginNotice, notice } from "./notices.js";

const RESTING_MS = 15000;
const INDEXING_MS = 2000;

export class Library {
  #timer = 0;
  #looks = 0;
  #searched = null; // photos in the index when the shown search was answered
  #images = null;

  /** `onNew()` repeats the search that is shown, `onKnown()` is called once the index has answered. */
  constructor(address, { onNew, onKnown }) {
    this.address = address;
    this.onNew = onNew;
    this.onKnown = onKnown;
    document.addEventListener("visibilitychange", () => document.hidden || this.look());
    this.look();
  }

  get hasPhotos() {
    return Boolean(this.#images);
  }

  /** What is on the page now is of the index as it is now. */
  searched() {
    this.#searched = null; // what it is the next look tells, which comes at once
    find("#progress").hidden = true;
    this.#plan(0);
  }

  async look() {
    clearTimeout(this.#timer);
    const look = ++this.#looks;
    let next = RESTING_MS;
    try {
      const known = await status();
      if (look !== this.#looks) return; // a later one is under way, or was quicker
      this.#show(known);
      if (known.indexing) next = INDEXING_MS;
    } catch (problem) {
      if (look !== this.#looks) return;
      if (problem.status === 401 && !isAsking(this.address.asked) && !find("#notice form")) {
        loginNotice(() => {
          notice(null);
          this.look();
        });
      }
    }
    this.#plan(next);
  }

  #plan(delay) {
    clearTimeout(this.#timer);
    if (!document.hidden) this.#timer = setTimeout(() => this.look(), delay);
  }

  #show(known) {
    const first = this.#images === null;
    this.#images = known.images;
    this.#searched ??= known.images;
    find("#library").textContent = [
      counted(known.images, "photo"),
      ...(known.failures ? [`${counted(known.failures, "file")} that could not be used`] : []),
      `model ${known.model}`,
    ].join(" · ");
    find("#count").textContent = `${counted(known.images, "photo")}, and not one needs a tag.`;
    if (!isAsking(this.address.asked)) this.#welcome(known);
    this.#progress(known);
    if (first) this.onKnown();
  }

  #welcome(known) {
    const empty = known.images === 0 && !known.indexing;
    if (empty && !find("#notice").hasChildNodes()) {
      notice({
        icon: "image",
        title: "There are no photos here yet.",
        text: "Index a folder; they appear here as it goes on.",
        children: [command("searchengine index ~/Pictures")],
      });
    } else if (!empty && find("#notice .command")) notice(null);
  }

  #progress({ images, indexing }) {
    const place = find("#progress");
    const news = isAsking(this.address.asked) && images !== this.#searched;
    const wasHidden = place.hidden;
    place.hidden = !indexing && !news;
    if (place.hidden) return place.replaceChildren();
    if (wasHidden) announce(indexing ? "Indexing" : "The photos have changed");
    const text = indexing ? `Indexing · ${progressOf(indexing)}` : "The photos have changed";
    const share = indexing?.scanned
      ? [element("progress", { max: indexing.scanned, value: doneOf(indexing), ariaLabel: "Indexing" })]
      : [];
    place.replaceChildren(
      ...(indexing ? [element("span.spinner")] : []),
      text,
      ...share,
      ...(news ? [element("button.plain", { type: "button", onclick: this.onNew }, "Search again")] : []),
    );
  }
}

// A run knows after its listing how many photos there are; each of them ends as one of these.
const doneOf = (run) =>
  ["added", "updated", "moved", "unchanged", "failed"].reduce((sum, name) => sum + (run[name] ?? 0), 0);
const progressOf = (run) =>
  run.scanned ? `${number(doneOf(run))} of ${counted(run.scanned, "photo")}` : "looking for photos";
