// The page's parts, put together.

import { find, setIcon } from "./dom.js";
import { Address, NOTHING, format, isAsking } from "./address.js";
import { startField } from "./field.js";
import { startFilters } from "./filters.js";
import { Grid } from "./grid.js";
import { Library } from "./library.js";
import { Lightbox } from "./lightbox.js";
import { Results } from "./results.js";
import { showExamples } from "./examples.js";

const address = new Address();
const grid = new Grid([find("#matches"), find("#rest")], {
  onOpen: (photo) => address.change({ photo }),
  onSimilar: (id) => address.change({ ...NOTHING, likes: [id], filters: address.asked.filters }),
  linkOf: (photo) => format({ ...address.asked, photo }),
});
const welcome = () => {
  if (!isAsking(address.asked) && library?.hasPhotos) showExamples(address);
};
let library = null;
let lightbox = null;
const results = new Results(address, grid, {
  onAnswer: () => {
    library?.searched();
    lightbox?.refresh();
  },
  onLogIn: () => library.look(),
});
startField(address, { onEnter: () => results.hurry(), onDown: () => grid.focus() });
startFilters(address);
lightbox = new Lightbox(address, results, grid);
const onKnown = () => {
  welcome();
  lightbox.refresh();
};
library = new Library(address, { onNew: () => results.again(), onKnown });
address.onChange(welcome);

find(".brand").onclick = (event) => {
  if (event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  address.change(NOTHING);
  find("#q").focus();
};

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || find("#lightbox").open) return;
  const writing = event.target.matches("input, select, textarea");
  if (event.key === "/" && !writing) {
    event.preventDefault();
    find("#q").focus();
    find("#q").select();
  } else if (event.key === "Escape" && !writing) find("#q").focus();
});

// Light, dark, or as the system has it: one button, which says what it will do.
const THEMES = { auto: "as the system", light: "light", dark: "dark" };
const theme = find("#theme");
const showTheme = () => {
  const now = document.documentElement.dataset.theme ?? "auto";
  setIcon(theme, now);
  theme.title = `Colours: ${THEMES[now]}`;
  theme.setAttribute("aria-label", `Colours: ${THEMES[now]}. Change`);
};
theme.onclick = () => {
  const names = Object.keys(THEMES);
  const next = names[(names.indexOf(document.documentElement.dataset.theme ?? "auto") + 1) % names.length];
  document.documentElement.dataset.theme = next;
  localStorage.setItem("theme", next);
  showTheme();
};
showTheme();

if (document.body.classList.contains("landing") && matchMedia("(pointer: fine)").matches) find("#q").focus();
