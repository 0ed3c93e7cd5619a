// What is asked for, kept in the address: the back button works, and a link shows the same to someone else.
// Pictures from the user's disk are the exception: they live only as long as the page.

const LISTS = { text: "texts", not: "nots", like: "likes" };
export const FILTERS = ["after", "before", "under", "camera", "near", "min_side", "orientation", "tag"];

export const NOTHING = Object.freeze({
  q: "",
  texts: [],
  nots: [],
  likes: [],
  images: [],
  filters: {},
  rest: false,
  photo: null,
});

/** The asked-for state that a query string stands for. */
export function parse(search) {
  const parameters = new URLSearchParams(search);
  const asked = { ...NOTHING, q: parameters.get("q") ?? "", filters: {}, rest: parameters.has("rest") };
  for (const [parameter, key] of Object.entries(LISTS)) asked[key] = parameters.getAll(parameter).filter(Boolean);
  asked.likes = asked.likes.filter(isId).map(Number);
  for (const name of FILTERS) if (parameters.get(name)) asked.filters[name] = parameters.get(name);
  if (asked.filters.near?.split(",").length !== 3) delete asked.filters.near;
  if (isId(parameters.get("photo"))) asked.photo = Number(parameters.get("photo"));
  return asked;
}

const isId = (text) => /^\d{1,15}$/.test(text ?? "");

/** The query string of an asked-for state, "?" included; "./" where nothing is asked. */
export function format(asked) {
  const parameters = new URLSearchParams();
  if (asked.q) parameters.set("q", asked.q);
  for (const [parameter, key] of Object.entries(LISTS))
    for (const value of asked[key]) parameters.append(parameter, value);
  for (const name of FILTERS) if (asked.filters[name]) parameters.set(name, asked.filters[name]);
  if (asked.rest) parameters.set("rest", "1");
  if (asked.photo !== null) parameters.set("photo", asked.photo);
  return parameters.size ? `?${parameters}` : "./";
}

/** Is there anything to look for? Filters and exclusions alone only narrow. */
export const isAsking = (asked) =>
  Boolean(asked.q.trim() || asked.texts.length || asked.likes.length || asked.images.length);

/** Two states with the same key have the same answer. */
export const keyOf = ({ rest: _rest, photo: _photo, ...asked }) =>
  JSON.stringify([asked, asked.images.map((image) => image.key)]);

const wordsOf = (asked) => keyOf({ ...asked, filters: {} });

/** The current state, and its way into and out of the browser's history. */
export class Address {
  #listeners = [];
  #pictures = new Map(); // key -> {key, file, url, name}: history can only hold the keys
  #typing = false;

  constructor() {
    this.asked = this.#read();
    addEventListener("popstate", () => {
      this.#typing = false;
      this.#set(this.#read());
    });
  }

  /** `listener(asked, before)` is called whenever what is asked for changes. */
  onChange(listener) {
    this.#listeners.push(listener);
  }

  /**
   * Changes part of the state. `typing`: consecutive changes are one step of the history, of which `settled` is the
   * last; `replace`: no step at all.
   */
  change(part, { replace = false, typing = false, settled = false } = {}) {
    const asked = { ...this.asked, ...part };
    if (wordsOf(asked) !== wordsOf(this.asked)) asked.rest = part.rest ?? false; // another search has a line of its own
    const here = history.state ?? {};
    const state = {
      images: asked.images.map((image) => image.key),
      opened: asked.photo !== null && (here.opened || !replace),
    };
    const inPlace = replace || ((typing || settled) && this.#typing);
    history[inPlace ? "replaceState" : "pushState"](state, "", format(asked));
    this.#typing = typing || (replace && this.#typing);
    this.#set(asked);
  }

  /** What is typed from now on is another step of the history. */
  settle() {
    this.#typing = false;
  }

  /** A picture that the user gave, to be put among `images`. */
  picture(file) {
    const picture = {
      key: crypto.getRandomValues(new Uint32Array(2)).join("-"),
      file,
      url: URL.createObjectURL(file),
      name: file.name || "picture",
    };
    this.#pictures.set(picture.key, picture);
    return picture;
  }

  /** Leaves the lightbox: a step back if it was a step forward to get there. */
  closePhoto() {
    if (history.state?.opened) history.back();
    else this.change({ photo: null }, { replace: true });
  }

  #read() {
    const images = (history.state?.images ?? []).map((key) => this.#pictures.get(key)).filter(Boolean);
    return { ...parse(location.search), images };
  }

  #set(asked) {
    const before = this.asked;
    this.asked = asked;
    for (const listener of this.#listeners) listener(asked, before);
  }
}
