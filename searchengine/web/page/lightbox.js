// One photo, large, with what is known of it.

import { element, find, icon } from "./dom.js";
import { details, originalOf, thumbnailOf } from "./api.js";
import { aspectOf } from "./grid.js";
import { dateOf, folderOf, nameOf, percent, sizeOf } from "./captions.js";
import { copyButton } from "./copying.js";
import { NOTHING } from "./address.js";

const SWIPE_PX = 50;
const NEARBY_KM = 5;

export class Lightbox {
  #dialog = find("#lightbox");
  #photo = null; // the id that is shown
  #asking = null;

  constructor(address, results, grid) {
    this.address = address;
    this.results = results;
    this.grid = grid;
    const dialog = this.#dialog;
    dialog.oncancel = (event) => {
      event.preventDefault();
      this.address.closePhoto();
    };
    // Not of the dialog: a button that the last photo disabled has lost the focus to the page.
    addEventListener("keydown", (event) => {
      if (!dialog.open || event.ctrlKey || event.metaKey || event.altKey) return;
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step) this.#go(step);
    });
    find(".close", dialog).onclick = () => this.address.closePhoto();
    find(".previous", dialog).onclick = () => this.#go(-1);
    find(".next", dialog).onclick = () => this.#go(1);
    find(".picture", dialog).onclick = (event) => event.target === event.currentTarget && this.address.closePhoto();
    this.#takeSwipes(find(".stage", dialog));
    address.onChange(() => this.#follow());
    this.#follow();
  }

  /** Called when the service has answered: a photo may have neighbours now, or be shown at last. */
  refresh() {
    if (this.#photo === null) this.#follow();
    else this.#neighbours();
  }

  /** Makes way for the form that asks for the token, until `refresh`. */
  #withdraw() {
    this.#photo = null;
    this.#dialog.close();
    find("#notice input")?.focus();
  }

  #follow() {
    const { photo } = this.address.asked;
    if (photo === this.#photo) return;
    const before = this.#photo;
    this.#photo = photo;
    if (photo === null) {
      this.#asking?.abort();
      this.#dialog.close();
      this.grid.focus(before);
      return;
    }
    if (!this.#dialog.open) this.#dialog.showModal();
    this.#showPhoto(photo);
    this.#neighbours();
  }

  #place() {
    return this.results.shown.findIndex((hit) => hit.id === this.#photo);
  }

  #neighbours() {
    const { shown } = this.results;
    const place = this.#place();
    find(".previous", this.#dialog).disabled = place <= 0;
    find(".next", this.#dialog).disabled = place < 0 || place === shown.length - 1;
    if (place >= shown.length - 5)
      this.results.more().then(() => this.#photo !== null && place === this.#place() && this.#nextAppeared(place));
  }

  #nextAppeared(place) {
    find(".next", this.#dialog).disabled = place < 0 || place === this.results.shown.length - 1;
  }

  #go(step) {
    const place = this.#place();
    const hit = place < 0 ? null : this.results.shown[place + step];
    if (hit) this.address.change({ photo: hit.id }, { replace: true });
  }

  async #showPhoto(id) {
    this.#asking?.abort();
    const { signal } = (this.#asking = new AbortController());
    const hit = this.results.hits.find((other) => other.id === id) ?? null;
    this.#paint(id, hit);
    this.#tell(id, hit, null);
    try {
      const known = await details(id, signal);
      if (!signal.aborted) this.#tell(id, hit, known);
    } catch (problem) {
      if (problem.name === "AbortError" || signal.aborted) return;
      if (problem.status === 401) return this.#withdraw();
      this.#tell(id, hit, null, problem);
    }
    for (const step of [1, -1]) {
      const next = this.results.shown[this.#place() + step];
      if (next && this.#place() >= 0) new Image().src = thumbnailOf(next.id, this.#pixels());
    }
  }

  #pixels() {
    return Math.max(innerWidth, innerHeight) * Math.min(devicePixelRatio, 2);
  }

  /** The image of the grid, blurred, until the large one is there. */
  #paint(id, hit) {
    const small = element("img.small", { src: this.grid.pictureOf(id)?.src || thumbnailOf(id, 160), alt: "" });
    const full = element("img.full", {
      src: thumbnailOf(id, this.#pixels()),
      alt: hit ? nameOf(hit.path) : `photo ${id}`,
    });
    const frame = element("div.frame", {}, small, full);
    const fit = (width, height) => {
      frame.style.aspectRatio = `${width} / ${height}`;
      frame.style.setProperty("--aspect", width / height);
    };
    fit(hit?.width ?? 3, hit?.height ?? 2);
    full.onload = () => {
      if (!hit) fit(full.naturalWidth, full.naturalHeight);
      full.classList.add("loaded");
    };
    full.onerror = () =>
      frame.replaceWith(
        element(
          "p.gone",
          {},
          "This photo cannot be read now. Its disk may be away, or it was moved or deleted since it was indexed.",
        ),
      );
    find(".picture", this.#dialog).replaceChildren(frame);
  }

  #tell(id, hit, known, problem = null) {
    const about = known ?? hit;
    const name = about ? nameOf(about.path) : `Photo ${id}`;
    const actions = element(
      "p.actions",
      {},
      element(
        "button.primary",
        { type: "button", onclick: () => this.#similar(id) },
        icon("similar"),
        "More like this",
      ),
      element("button.plain", { type: "button", onclick: () => this.#add(id) }, icon("plus"), "Add to the search"),
      element("a.plain", { href: originalOf(id), target: "_blank", rel: "noopener" }, icon("open"), "Original"),
    );
    const facts = element("dl");
    const fact = (term, ...said) => facts.append(element("dt", {}, term), element("dd", {}, ...said));
    const narrow = (label, filters) =>
      element(
        "button.link",
        { type: "button", onclick: () => this.#narrow(filters), title: "Only such photos" },
        label,
      );
    if (hit) fact("Match", `${percent(hit.relevance)} sure · rank ${hit.rank} · score ${hit.score.toFixed(3)}`);
    if (about?.taken_at) fact("Taken", dateOf(about.taken_at, { dateStyle: "full", timeStyle: "short" }));
    if (about)
      fact("Size", [`${about.width} × ${about.height}`, ...(known ? [sizeOf(known.size_bytes)] : [])].join(" · "));
    if (known?.camera) fact("Camera", narrow(known.camera, { camera: known.camera }));
    if (known?.latitude != null)
      fact(
        "Place",
        narrow(`${known.latitude.toFixed(4)}, ${known.longitude.toFixed(4)}`, {
          near: `${known.latitude.toFixed(5)},${known.longitude.toFixed(5)},${NEARBY_KM}`,
        }),
      );
    if (known?.tags?.length)
      fact("Tags", ...known.tags.flatMap((tag, place) => [place ? ", " : "", narrow(tag, { tag })]));
    if (about) fact("Folder", narrow(folderOf(about.path), { under: folderOf(about.path) }));
    if (about)
      fact("Path", element("span.path", {}, element("code", {}, about.path), copyButton(about.path, "Copy the path")));
    const wrong = problem && element("p.wrong", {}, problem.message);
    find(".facts", this.#dialog).replaceChildren(element("h2", {}, name), actions, facts, ...(wrong ? [wrong] : []));
    this.#dialog.setAttribute("aria-label", name);
  }

  #similar(id) {
    this.address.change({ ...NOTHING, likes: [id] });
    scrollTo({ top: 0 });
  }

  #add(id) {
    this.address.change({ likes: [...new Set([...this.address.asked.likes, id])], photo: null });
  }

  #narrow(filters) {
    const { asked } = this.address;
    this.address.change({ filters: { ...asked.filters, ...filters }, photo: null });
  }

  #takeSwipes(stage) {
    let start = null;
    stage.ontouchstart = ({ touches }) => (start = touches.length === 1 ? touches[0] : null);
    stage.ontouchend = ({ changedTouches: [end] }) => {
      if (!start || visualViewport.scale > 1) return;
      const [right, down] = [end.clientX - start.clientX, end.clientY - start.clientY];
      if (Math.abs(right) > SWIPE_PX && Math.abs(right) > 2 * Math.abs(down)) this.#go(right < 0 ? 1 : -1);
      else if (down > 2 * SWIPE_PX && down > 2 * Math.abs(right)) this.address.closePhoto();
    };
  }
}
