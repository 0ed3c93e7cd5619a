// Text to the clipboard.

import { announce, element, icon, setIcon } from "./dom.js";

export function copyButton(text, label) {
  const button = element("button.round", { type: "button", title: label }, icon("copy"));
  button.setAttribute("aria-label", label);
  button.onclick = async () => {
    await copy(text, button);
    setIcon(button, "check");
    announce("Copied");
    setTimeout(() => setIcon(button, "copy"), 1500);
  };
  return button;
}

async function copy(text, button) {
  // Browsers lend the clipboard only to pages from https and from this machine; elsewhere there is the old way.
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const field = element("textarea.unseen", { value: text, readOnly: true });
  button.after(field); // inside an open dialog nothing outside of it can be selected
  field.select();
  document.execCommand("copy");
  field.remove();
  button.focus();
}
