// What is said of a photo, in words.

export const nameOf = (path) =>
  path
    .replace(/[/\\]+$/, "")
    .split(/[/\\]/)
    .at(-1) || path;
export const folderOf = (path) => path.slice(0, Math.max(path.lastIndexOf("/"), path.lastIndexOf("\\"))) || "/";
export const percent = (share) => `${Math.round(share * 100)}%`;

/** "2024-05-31T18:30:00" as people write it. Times in photos know no zone, so they are shown as they are. */
export function dateOf(moment, options = { dateStyle: "medium" }) {
  const when = new Date(`${moment.slice(0, 19)}Z`);
  return Number.isNaN(when.getTime()) ? moment : when.toLocaleString("en-GB", { ...options, timeZone: "UTC" });
}

export const captionOf = (hit) => [nameOf(hit.path), ...(hit.taken_at ? [dateOf(hit.taken_at)] : [])].join(" · ");

export const labelOf = (hit) => `${hit.rank}: ${captionOf(hit)}, ${percent(hit.relevance)} sure`;

export function sizeOf(bytes) {
  const power = Math.min(Math.floor(Math.log2(Math.max(bytes, 1)) / 10), 4);
  const size = (bytes / 2 ** (10 * power)).toLocaleString("en", { maximumSignificantDigits: 3 });
  return `${size} ${["bytes", "KiB", "MiB", "GiB", "TiB"][power]}`;
}
