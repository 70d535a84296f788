// Adds a Run button to the code blocks of a page, by one script tag:
//
//     <script src="https://RUNNER/embed.js" defer></script>
//
// Supports the code blocks of mdBook, Docusaurus and plain HTML, <pre><code class="language-NAME">, in the languages of
// the server. Skips blocks with the class `norun`, `ignore`, `no_run` or `noplayground`.
import { Output } from "./ansi.js";
import { ServerError, execute, runtimes, usage, verdict } from "./client.js";
import css from "./embed.css";

const BASE = new URL(".", document.currentScript.src);
const SKIPPED = ["norun", "ignore", "no_run", "noplayground"];

/** The language of a block, from the nearest element that names one; null if there is none or the block is skipped. */
function languageOf(pre) {
  const elements = [pre.querySelector("code"), pre, pre.parentElement, pre.parentElement?.parentElement];
  for (const element of elements) {
    if (!element) continue;
    if (SKIPPED.some((name) => element.classList.contains(name))) return null;
    const name = [...element.classList].find((name) => /^lang(uage)?-./.test(name));
    // mdBook appends options after commas: language-python,editable
    if (name) {
      const [language, ...options] = name.replace(/^lang(uage)?-/, "").split(",");
      return options.some((option) => SKIPPED.includes(option)) ? null : language.toLowerCase();
    }
  }
  return null;
}

/** The text of a block. Docusaurus breaks lines only by <br> elements. */
function codeOf(pre) {
  const copy = (pre.querySelector("code") ?? pre).cloneNode(true);
  for (const line of copy.querySelectorAll("br")) line.replaceWith("\n");
  copy.querySelectorAll("button, .buttons").forEach((button) => button.remove());
  const text = copy.textContent;
  return text.endsWith("\n") ? text : `${text}\n`;
}

function attach(pre, language) {
  const host = document.createElement("div");
  host.className = "coderunner";
  const root = host.attachShadow({ mode: "open" });
  const sheet = new CSSStyleSheet();
  sheet.replaceSync(css);
  root.adoptedStyleSheets = [sheet];

  const element = (name, properties) => Object.assign(document.createElement(name), properties);
  const bar = element("div", { className: "bar" });
  const button = element("button", { type: "button", textContent: "Run" });
  button.setAttribute("aria-label", `Run this ${language} program`);
  const status = element("span", { className: "status", role: "status" });
  const shown = element("div", { className: "output", hidden: true, tabIndex: 0, role: "region", ariaLabel: "Output" });
  bar.append(button, status);
  root.append(bar, shown);
  const output = new Output(shown);

  let leave = null;
  button.onclick = async () => {
    if (leave) return leave.abort();
    leave = new AbortController();
    button.textContent = "Stop";
    status.textContent = "Running";
    status.dataset.look = "";
    output.clear();
    let at = "run";
    const events = {
      data(stage, kind, text) {
        shown.hidden = false;
        if (stage !== at) output.section(stage === "compile" ? "Compiler" : "Program");
        at = stage;
        output.write(text, kind);
      },
    };
    try {
      const answer = await execute(BASE, { language, code: codeOf(pre) }, events, leave.signal);
      const { word, sentence } = verdict(answer);
      status.textContent = [sentence, ...usage(answer)].join(" · ");
      status.dataset.look = word === "ok" ? "ok" : "bad";
      if (output.dropped || answer.truncated) output.note("The output was too long: the rest is not shown.");
    } catch (error) {
      const stopped = error.name === "AbortError";
      status.dataset.look = stopped ? "" : "bad";
      status.textContent = stopped ? "Stopped" : error instanceof ServerError ? error.message : "The server cannot be reached.";
    }
    leave = null;
    button.textContent = "Run";
  };
  pre.after(host);
}

async function start() {
  let served;
  try {
    served = new Set((await runtimes(BASE)).flatMap(({ language, aliases = [] }) => [language, ...aliases]));
  } catch (error) {
    console.warn("coderunner: no Run buttons:", error.message);
    return;
  }
  const known = new WeakSet();
  const scan = () => {
    for (const pre of document.querySelectorAll("pre")) {
      if (known.has(pre)) continue;
      known.add(pre);
      const language = languageOf(pre);
      if (language && served.has(language)) attach(pre, language);
    }
  };
  scan();
  // Docusaurus changes pages without reloading the document.
  let due = false;
  new MutationObserver(() => {
    if (due) return;
    due = true;
    requestAnimationFrame(() => {
      due = false;
      scan();
    });
  }).observe(document.body, { childList: true, subtree: true });
}

if (document.readyState === "loading") addEventListener("DOMContentLoaded", start);
else start();
