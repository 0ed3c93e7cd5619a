// The panel of filters: plain fields, which take effect as they are filled in.

import { find } from "./dom.js";
import { FILTERS } from "./address.js";

const WORDS = {
  after: "from",
  before: "before",
  under: "in",
  camera: "camera",
  near: "near",
  min_side: "from px",
  orientation: "",
  tag: "tag",
};

/** A filter as a chip says it. */
export function chipOf(name, value) {
  if (name === "near") {
    const [latitude, longitude, radius] = value.split(",");
    return `${radius} km around ${latitude}, ${longitude}`;
  }
  if (name === "min_side") return `at least ${value} px`;
  return `${WORDS[name]} ${value}`.trim();
}

export function startFilters(address) {
  const form = find("#filters");
  const toggle = find("#filter");
  const fields = form.elements;

  const open = (opened) => {
    form.hidden = !opened;
    toggle.setAttribute("aria-expanded", opened);
    (opened ? fields.after : toggle).focus();
  };
  toggle.onclick = () => open(form.hidden);
  form.onsubmit = (event) => {
    event.preventDefault();
    open(false);
  };
  form.onkeydown = (event) => {
    if (event.key === "Escape") open(false);
  };
  form.onreset = (event) => {
    event.preventDefault();
    address.change({ filters: {} });
    show({ filters: {} }, true);
  };

  // A pair of coordinates, as maps give it, may be pasted into the first field.
  fields.latitude.onpaste = (event) => {
    const pair = event.clipboardData.getData("text").match(/(-?\d+(?:\.\d+)?)\s*[,; ]\s*(-?\d+(?:\.\d+)?)/);
    if (!pair) return;
    event.preventDefault();
    [, fields.latitude.value, fields.longitude.value] = pair;
    fields.radius.value ||= "10";
    take();
  };

  const take = () => {
    const filters = read(fields);
    if (JSON.stringify(filters) !== JSON.stringify(ordered(address.asked.filters)))
      address.change({ filters }, { typing: true });
  };
  form.oninput = take;

  const show = ({ filters }, force = false) => {
    if (!force && form.contains(document.activeElement) && !form.hidden) return; // never under somebody's fingers
    for (const name of FILTERS) if (name !== "near") fields[name].value = filters[name] ?? "";
    [fields.latitude.value, fields.longitude.value, fields.radius.value] = filters.near?.split(",") ?? ["", "", ""];
  };
  address.onChange((asked) => {
    show(asked);
    toggle.classList.toggle("active", Object.keys(asked.filters).length > 0);
  });
  show(address.asked);
  toggle.classList.toggle("active", Object.keys(address.asked.filters).length > 0);
}

/** What the fields say. A place counts once all three of its numbers are there. */
function read(fields) {
  const filters = {};
  for (const name of FILTERS)
    if (name !== "near" && fields[name].validity.valid && fields[name].value.trim())
      filters[name] = fields[name].value.trim();
  const place = [fields.latitude, fields.longitude, fields.radius].map((field) => field.value.trim().replace(",", "."));
  if (place.every(Boolean)) filters.near = place.join(",");
  return ordered(filters);
}

const ordered = (filters) =>
  Object.fromEntries(FILTERS.filter((name) => filters[name]).map((name) => [name, filters[name]]));
