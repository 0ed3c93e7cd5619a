// The service's answers as values, and its refusals as one class of error.

/** What went wrong. `status` is HTTP's, or 0 where the service could not be reached. */
export class Problem extends Error {
  constructor(status, detail, retryAfterSeconds = 0) {
    super(detail);
    this.status = status;
    this.retryAfterSeconds = retryAfterSeconds;
  }
}

export const PAGE_SIZE = 60;

/** One page of hits: {hits, cursor, matches}. Throws Problem, or AbortError once `signal` says so. */
export function search(asked, { cursor = null, signal, k = PAGE_SIZE, threshold = null } = {}) {
  const fields = new FormData();
  const text = textOf(asked);
  const only = !text && !asked.nots.length && !asked.images.length && asked.likes.length === 1;
  if (text) fields.set("q", text);
  if (!only) for (const id of asked.likes) fields.append("like", id);
  for (const words of asked.nots) fields.append("not", words);
  for (const [name, value] of Object.entries(asked.filters)) fields.set(name, value);
  fields.set("k", k);
  if (threshold) fields.set("threshold", threshold);
  if (cursor) fields.set("cursor", cursor);
  if (!asked.images.length) {
    const path = only ? `api/images/${asked.likes[0]}/similar` : "api/search";
    return ask(`${path}?${new URLSearchParams(fields)}`, { signal });
  }
  for (const image of asked.images) fields.append("image", image.file, image.name);
  return ask("api/search", { method: "POST", body: fields, signal });
}

/** Added texts become terms of a sum (docs/query.md); what is still being typed stands as it is. */
function textOf({ q, texts }) {
  const typed = q.trim();
  if (!texts.length) return typed;
  const quoted = texts.map((text) => `"${text.replace(/["\\]/g, "\\$&")}"`);
  return [...quoted, ...(typed ? [typed] : [])].join(" + ");
}

export const details = (id, signal) => ask(`api/images/${id}/details`, { signal });
export const status = (signal) => ask("api/status", { signal });
export const readiness = (signal) => ask("readyz", { signal });
export const originalOf = (id) => `api/images/${id}`;

const SIZES = [160, 320, 640, 1280, 1920];

/** The smallest thumbnail whose longer side covers `pixels` of the screen. */
export function thumbnailOf(id, pixels) {
  const size = SIZES.find((side) => side >= pixels) ?? SIZES.at(-1);
  return `api/images/${id}/thumbnail?size=${size}`;
}

/** Trades the access token for a cookie. */
export async function logIn(token) {
  const answer = await reach("login", { method: "POST", body: new URLSearchParams({ token }), redirect: "manual" });
  if (answer.type !== "opaqueredirect" && !answer.ok) throw await problemOf(answer);
}

async function ask(path, options) {
  const answer = await reach(path, { headers: { Accept: "application/json" }, ...options });
  if (!answer.ok) throw await problemOf(answer);
  return answer.json();
}

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, "The service cannot be reached.");
  }
}

async function problemOf(answer) {
  const body = await answer.json().catch(() => ({}));
  const wait = Number(answer.headers.get("Retry-After"));
  return new Problem(answer.status, body.detail || body.title || answer.statusText, Number.isFinite(wait) ? wait : 0);
}
