// What the page says where there are no photos to show: what is the matter, and what to do about it.

import { announce, element, find, icon } from "./dom.js";
import { logIn } from "./api.js";
import { copyButton } from "./copying.js";

const button = (label, onclick, kind = "primary") => element(`button.${kind}`, { type: "button", onclick }, label);

/** What stands in place of photos: {icon, title, text, tips, actions: [[label, onclick]], children}, or nothing. */
export function notice(what) {
  const place = find("#notice");
  place.replaceChildren();
  if (what === null) return;
  const { icon: drawing, title, text = "", tips = [], actions = [], children = [] } = what;
  place.append(
    icon(drawing),
    element("h2", {}, title),
    ...(text ? [element("p", {}, text)] : []),
    ...(tips.length ? [element("ul", {}, ...tips.map((tip) => element("li", {}, ...[tip].flat())))] : []),
    ...children,
    ...(actions.length
      ? [
          element(
            "p.actions",
            {},
            ...actions.map(([label, onclick], place) => button(label, onclick, place ? "plain" : "primary")),
          ),
        ]
      : []),
  );
  announce(`${title} ${text}`);
}

/** One line below the field, beside the photos that stay; `null` takes it away. */
export function tell(what) {
  const line = find("#hint");
  line.hidden = what === null;
  if (what === null) return line.replaceChildren();
  const { icon: drawing, title, text = "", actions = [] } = what;
  line.replaceChildren(
    icon(drawing),
    element("span", {}, element("b", {}, title), ` ${text}`),
    ...actions.map(([label, onclick]) => button(label, onclick, "plain")),
  );
  announce(`${title} ${text}`);
}

/** What to say of a Problem that kept a search from being answered. `again` repeats it. */
export function noticeOf(problem, again) {
  const { status, message } = problem;
  const retry = [["Try again", again]];
  if (status === 0) {
    const text = navigator.onLine
      ? "It may have been stopped. This page asks again by itself; or start it with"
      : "This device is offline. As soon as it is back, the search goes on.";
    const children = navigator.onLine ? [command("searchengine serve")] : [];
    return { icon: "cloud", title: "The service cannot be reached.", text, children, actions: retry };
  }
  if (status === 429)
    return {
      icon: "clock",
      title: "Many people are searching right now.",
      text: `Trying again in ${problem.retryAfterSeconds || 1} s.`,
      actions: retry,
    };
  if (status === 503)
    return {
      icon: "clock",
      title: "The photos are not ready yet.",
      text: `${message} This page goes on as soon as they are.`,
      actions: retry,
    };
  if (status === 404) return { icon: "warn", title: "That photo is no longer there.", text: message };
  if (status === 413) return { icon: "warn", title: "That picture is too large.", text: message };
  if (status === 415 || status === 422) return { icon: "warn", title: "That cannot be used.", text: message };
  if (status === 400) return { icon: "info", title: "Not quite:", text: message };
  return { icon: "warn", title: "The search failed.", text: message, actions: retry };
}

/** A form for the access token; `onDone` is called once the service has taken it. */
export function loginNotice(onDone) {
  const input = element("input", { type: "password", name: "token", required: true, autocomplete: "current-password" });
  const wrong = element("p.wrong", { role: "alert" });
  const form = element(
    "form.login",
    {},
    element("label", {}, "Access token", input),
    element("button.primary", { type: "submit" }, "Log in"),
    wrong,
  );
  form.onsubmit = async (event) => {
    event.preventDefault();
    wrong.textContent = "";
    try {
      await logIn(input.value.trim());
      onDone();
    } catch (problem) {
      wrong.textContent = [401, 403].includes(problem.status)
        ? "That is not the token of this service."
        : problem.message;
      input.select();
    }
  };
  notice({
    icon: "lock",
    title: "These photos are private.",
    text: "Whoever started the service has its token (--token, or SEARCHENGINE_TOKEN).",
    children: [form],
  });
  input.focus();
}

/** A command for the terminal, with a button that copies it. */
export const command = (line) =>
  element("p.command", {}, element("code", {}, line), copyButton(line, "Copy the command"));
