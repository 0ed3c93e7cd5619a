// A search from the asked-for state to photos on the page: when to ask, what to drop, where matches end.

import { announce, counted, element, find, number } from "./dom.js";
import { readiness, search } from "./api.js";
import { isAsking, keyOf } from "./address.js";
import { loginNotice, notice, noticeOf, tell } from "./notices.js";

const DEBOUNCE_MS = 160;
const UNFINISHED_MS = 600; // an expression that is still being typed is no mistake yet
const MATCH = 0.5; // as in searchengine/hits.py
const COUNTED = 1000; // `matches` is counted among so many
const ONLY_NARROWS = {
  icon: "info",
  title: "This only narrows a search.",
  text: "Describe the photos, or show a picture, too.",
};

export class Results {
  hits = [];
  #cursor = null;
  #matches = 0;
  #tookMs = 0;
  #key = null; // of the search that is shown or on its way
  #timer = 0;
  #retry = 0;
  #resume = null; // what the retry will do
  #running = null; // AbortController of the newest search: an older one is never shown
  #loading = false;
  #end = new IntersectionObserver((seen) => seen.at(-1).isIntersecting && this.more(), { rootMargin: "1200px 0px" });

  /** `onAnswer()` is called after each answer, `onLogIn()` once a token was accepted. */
  constructor(address, grid, { onAnswer, onLogIn }) {
    this.address = address;
    this.grid = grid;
    this.onAnswer = onAnswer;
    this.onLogIn = onLogIn;
    address.onChange((asked, before) => this.#changed(asked, before));
    addEventListener("online", () => this.#retry && this.#resume?.());
    this.#changed(address.asked, null);
  }

  /** The hits on the page: all, or those above the line. */
  get shown() {
    return this.address.asked.rest ? this.hits : this.hits.filter(isMatch);
  }

  /** Asks now, whatever is on its way. */
  again() {
    clearTimeout(this.#timer);
    clearTimeout(this.#retry);
    this.#retry = 0;
    if (isAsking(this.address.asked)) this.#ask();
  }

  /** What Enter does: what was typed is asked for at once. */
  hurry() {
    if (this.#timer) this.again();
  }

  #changed(asked, before) {
    document.body.classList.toggle("landing", !isAsking(asked));
    const key = keyOf(asked);
    if (key === this.#key) {
      if (before?.rest !== asked.rest) this.#render();
      return;
    }
    this.#key = key;
    clearTimeout(this.#timer);
    clearTimeout(this.#retry);
    this.#timer = this.#retry = 0;
    this.#running?.abort();
    if (!isAsking(asked)) return this.#clear();
    const typing =
      before !== null && (asked.q !== before.q || asked.filters !== before.filters) && asked.texts === before.texts;
    if (!typing) return this.again();
    this.#timer = setTimeout(() => this.again(), DEBOUNCE_MS);
  }

  #clear() {
    this.hits = [];
    this.#cursor = null;
    this.grid.show([[], []]);
    find("#summary").replaceChildren();
    find("#line").hidden = true;
    notice(null);
    const { filters, nots } = this.address.asked;
    tell(Object.keys(filters).length + nots.length ? ONLY_NARROWS : null);
    document.title = "searchengine";
  }

  async #ask() {
    this.#timer = 0;
    this.#running?.abort();
    const running = (this.#running = new AbortController());
    const asked = this.address.asked;
    const started = performance.now();
    const slow = setTimeout(() => find("#results").setAttribute("aria-busy", "true"), 200);
    try {
      const answer = await search(asked, { signal: running.signal });
      if (running.signal.aborted) return;
      this.#tookMs = performance.now() - started;
      this.hits = answer.hits;
      this.#cursor = answer.cursor;
      this.#matches = answer.matches;
      notice(null);
      tell(null);
      this.#render();
      if (scrollY > 0) scrollTo({ top: 0 });
      this.onAnswer();
    } catch (problem) {
      if (problem.name === "AbortError" || running.signal.aborted) return;
      this.#failed(problem);
    } finally {
      clearTimeout(slow);
      if (running === this.#running) find("#results").removeAttribute("aria-busy");
    }
  }

  /** The next page, once the end of this one is near. */
  async more() {
    if (!this.#cursor || this.#loading || !(this.address.asked.rest || this.hits.every(isMatch))) return;
    this.#loading = true;
    const running = this.#running;
    try {
      const answer = await search(this.address.asked, { cursor: this.#cursor, signal: running.signal });
      if (running !== this.#running) return;
      // After a commit, ranks may have moved: nothing is shown twice.
      const known = new Set(this.hits.map(({ id }) => id));
      this.hits = [...this.hits, ...answer.hits.filter(({ id }) => !known.has(id))];
      this.#cursor = answer.cursor;
      notice(null);
      this.#render();
    } catch (problem) {
      if (problem.name !== "AbortError" && running === this.#running) this.#failedMore(problem);
    } finally {
      this.#loading = false;
    }
  }

  /** An observer tells where the end is when it starts, and then only when it comes or goes: it may be in sight still. */
  #watchEnd() {
    this.#end.disconnect();
    this.#end.observe(find("#more"));
  }

  #render() {
    const { rest } = this.address.asked;
    const matches = this.hits.filter(isMatch);
    const others = this.hits.filter((hit) => !isMatch(hit));
    this.grid.show([matches, rest ? others : []]);
    const text = this.#headline();
    find("#summary").replaceChildren(element("b", {}, text), ` ${number(Math.max(1, Math.round(this.#tookMs)))} ms`);
    document.title = `${describe(this.address.asked)} – searchengine`;
    this.#drawLine(matches, others, rest);
    if (!this.hits.length) notice(this.#nothingAtAll());
    else if (!matches.length && !rest) notice(this.#noMatch());
    else if (find("#notice").hasChildNodes()) notice(null);
    announce(text);
    this.#watchEnd();
  }

  #headline() {
    if (!this.hits.length) return "Nothing found";
    if (!this.#matches) return this.address.asked.rest ? "No sure match; the nearest photos" : "No sure match";
    return this.#matches >= COUNTED
      ? `${number(COUNTED)} matches or more`
      : counted(this.#matches, "match").replace("matchs", "matches");
  }

  #drawLine(matches, others, rest) {
    const line = find("#line");
    line.hidden = !matches.length || !others.length;
    const show = (shown) => () => this.address.change({ rest: shown });
    line.replaceChildren(
      element(
        "p",
        {},
        element("b", {}, "The matches end here."),
        rest ? " What follows is only similar." : " The other photos are only similar.",
      ),
      element("button.plain", { type: "button", onclick: show(!rest) }, rest ? "Hide the rest" : "Show the rest"),
    );
  }

  #noMatch() {
    const { filters } = this.address.asked;
    const tips = [
      "Say what is in the picture, as in “two people on a bench”, rather than a name or a place.",
      "Fewer details find more; other words may, too.",
    ];
    const actions = [["Show the nearest photos", () => this.address.change({ rest: true })]];
    if (Object.keys(filters).length) actions.push(["Without the filters", () => this.address.change({ filters: {} })]);
    return { icon: "search", title: "Nothing here is surely a match.", tips, actions };
  }

  #nothingAtAll() {
    if (Object.keys(this.address.asked.filters).length) {
      return {
        icon: "filter",
        title: "No photo passes these filters.",
        text: "A photo without a date, place or camera passes no filter that asks for one.",
        actions: [["Without the filters", () => this.address.change({ filters: {} })]],
      };
    }
    return { icon: "search", title: "There are no photos to search.", text: "Index a folder first." };
  }

  #failed(problem) {
    const again = () => this.again();
    this.#cursor = null; // the photos that stay are of another search
    if (problem.status === 401) {
      this.#clear();
      return loginNotice(() => {
        notice(null);
        this.onLogIn();
        this.again();
      });
    }
    const what = noticeOf(problem, again);
    if (this.hits.length && problem.status === 400) this.#retry = setTimeout(() => tell(what), UNFINISHED_MS);
    else if (this.hits.length) tell(what);
    else {
      find("#summary").replaceChildren();
      notice(what);
    }
    this.#retryAfter(problem, again);
  }

  #failedMore(problem) {
    if (problem.status === 401) return this.#failed(problem);
    const next = () => {
      clearTimeout(this.#retry);
      this.#retry = 0;
      notice(null);
      this.more();
    };
    notice(noticeOf(problem, next));
    this.#retryAfter(problem, next);
  }

  #retryAfter({ status, retryAfterSeconds }, resume) {
    if (![0, 429, 503].includes(status)) return;
    clearTimeout(this.#retry);
    this.#resume = resume;
    const wait = status === 429 ? retryAfterSeconds || 1 : 2;
    this.#retry = setTimeout(() => (status === 429 ? resume() : this.#awaitReady()), 1000 * wait);
  }

  /** The service is asked whether it is there and ready before a search is put to it again. */
  async #awaitReady() {
    try {
      await readiness();
    } catch (problem) {
      if (this.#retry && problem.status !== 401) {
        this.#retry = setTimeout(() => this.#awaitReady(), 2000);
        return;
      }
    }
    if (this.#retry) this.#resume();
  }
}

const isMatch = (hit) => hit.relevance >= MATCH;

/** A search in a few words, for the title of the window. */
function describe({ q, texts, nots, likes, images }) {
  const parts = [
    ...texts,
    ...(q.trim() ? [q.trim()] : []),
    ...(likes.length + images.length ? ["photos like this"] : []),
    ...nots.map((text) => `not ${text}`),
  ];
  return parts.join(", ").slice(0, 80);
}
