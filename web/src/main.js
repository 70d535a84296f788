// The playground: the behaviour of the page's elements, and the state that the browser stores.
import { Output } from "./ansi.js";
import { NoSocket, ServerError, connect, execute, runtimes, usage, verdict } from "./client.js";
import { editor as makeEditor } from "./editor.js";
import { EXAMPLES } from "./examples.js";
import { pack, unpack } from "./share.js";

const $ = (id) => document.getElementById(id);
const BASE = document.baseURI;
/** How much of the output screen readers announce after a run, in characters. */
const MAX_ANNOUNCED = 300;
const NAMES = { c: "C", cpp: "C++", javascript: "JavaScript", bash: "Bash", go: "Go", pivot: "pivot", python: "Python", rust: "Rust" };

/** The browser's local storage, which may be disabled. */
const store = {
  get(key) {
    try {
      return JSON.parse(localStorage.getItem(`coderunner.${key}`));
    } catch {
      return null;
    }
  },
  set(key, value) {
    try {
      localStorage.setItem(`coderunner.${key}`, JSON.stringify(value));
    } catch {
      // The page works without storage, but forgets its state.
    }
  },
};

const output = new Output($("output"));
const editor = makeEditor($("editor"), { change: changed, run });
let language = "";
/** The current run: `{stop()}`, and `{type(text), end()}` while the user can send input. */
let running = null;

// ---- colours

const dark = matchMedia("(prefers-color-scheme: dark)");
function applyTheme() {
  const theme = store.get("theme") ?? (dark.matches ? "dark" : "light");
  document.documentElement.dataset.theme = theme;
  $("theme").setAttribute("aria-pressed", String(theme === "dark"));
}
dark.addEventListener("change", applyTheme);
$("theme").onclick = () => {
  const other = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  // If the choice equals the system's theme, the page follows the system again.
  store.set("theme", (other === "dark") === dark.matches ? null : other);
  applyTheme();
};

// ---- the program

const program = () => ({ language, code: editor.code, stdin: $("stdin").value, args: $("args").value });

function changed() {
  store.set(`draft.${language}`, program());
  store.set("language", language);
  // A link in the address bar no longer belongs to the changed program.
  if (location.hash) history.replaceState(null, "", location.pathname + location.search);
  $("example").value = "";
  summarize();
}

/** Sets the input and arguments. `unfold` opens their section if there are any. */
function setInput({ stdin = "", args = "" }, unfold) {
  $("stdin").value = stdin;
  $("args").value = args;
  if (unfold && (stdin || args)) $("input").open = true;
  summarize();
}

function load(next, unfold = false) {
  language = next.language;
  $("language").value = language;
  setInput(next, unfold);
  editor.load(next.code, language);
  const examples = (EXAMPLES[language] ?? []).map(({ title }, index) => new Option(title, String(index)));
  $("example").replaceChildren(new Option("Examples", ""), ...examples);
  $("example").disabled = examples.length === 0;
  document.title = `${NAMES[language] ?? language} · coderunner playground`;
}

function open(name) {
  load({ ...(EXAMPLES[name]?.[0] ?? { code: "" }), ...store.get(`draft.${name}`), language: name });
}

/** Lists in the section's heading which inputs are set, since the section may be folded. */
function summarize() {
  const parts = [];
  if ($("args").value.trim()) parts.push("arguments");
  if ($("stdin").value) parts.push("standard input");
  if ($("live").checked) parts.push("interactive input");
  $("summary").textContent = parts.join(", ");
}

for (const id of ["stdin", "args"]) $(id).addEventListener("input", changed);
$("live").onchange = () => {
  store.set("live", $("live").checked);
  summarize();
};
$("language").onchange = () => {
  store.set("language", $("language").value);
  if (location.hash) history.replaceState(null, "", location.pathname + location.search);
  open($("language").value);
};
$("example").onchange = () => {
  const index = $("example").value;
  if (index === "") return;
  const example = EXAMPLES[language][Number(index)];
  setInput(example, true);
  // As an edit, so that undo restores the previous program.
  editor.replace(example.code);
  changed();
  $("example").value = index;
};

/** Splits the arguments into words, like a shell: quotes and backslashes are honoured. */
function words(text) {
  const found = text.match(/(?:[^\s'"\\]|\\.|'[^']*'|"(?:[^"\\]|\\.)*"|['"\\])+/gs) ?? [];
  return found.map((word) =>
    word.replace(/'([^']*)'|"((?:[^"\\]|\\.)*)"|\\(.)/gs, (_, single, double, escaped) =>
      single ?? double?.replace(/\\(["\\])/g, "$1") ?? escaped,
    ),
  );
}

// ---- running

/** Output that has arrived but is not drawn yet. It is drawn once per frame. */
let pending = [];
let shown = "";
function draw() {
  const log = $("output");
  const following = log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
  for (const { stage, kind, text } of pending) {
    if (stage !== shown && (stage === "compile" || shown === "compile")) {
      output.section(stage === "compile" ? "Compiler" : "Program");
    }
    shown = stage;
    output.write(text, kind);
  }
  pending = [];
  $("clear").disabled = !log.hasChildNodes();
  if (following) log.scrollTop = log.scrollHeight;
}
function print(stage, kind, text) {
  if (pending.length === 0) requestAnimationFrame(draw);
  pending.push({ stage, kind, text });
}

/** Announces a text to screen readers. */
function announce(text) {
  $("status").textContent = text;
}

function state(look, text, details = "") {
  $("verdict").dataset.verdict = look;
  $("verdict").textContent = text;
  $("usage").textContent = details;
}

function busy(on) {
  // Disabling a focused button would lose the focus, so moves it to the other button.
  const focus = on ? document.activeElement === $("run") && $("stop") : document.activeElement === $("stop") && $("run");
  $("run").disabled = on;
  $("stop").disabled = !on;
  if (focus) focus.focus();
}

async function run() {
  if (running || !language) return;
  const started = performance.now();
  const seconds = () => `${((performance.now() - started) / 1000).toFixed(1)} s`;
  let phase = "Running";
  const clock = setInterval(() => state("busy", phase, seconds()), 100);
  clear();
  $("output").dataset.empty = "";
  state("busy", phase);
  announce(phase);
  const now = { ...program(), args: words($("args").value) };
  const abort = new AbortController();
  running = { stop: () => abort.abort() };
  busy(true);
  const events = {
    data: print,
    queued: (position) => (phase = position ? `Waiting behind ${position}` : "Waiting"),
    stage: (stage) => (phase = stage === "compile" ? "Compiling" : "Running"),
  };
  let answer, failure;
  try {
    answer = await ($("live").checked ? runInteractively : execute)(BASE, now, events, abort.signal);
  } catch (error) {
    failure = error;
  }
  clearInterval(clock);
  running = null;
  busy(false);
  draw();
  if (failure?.name === "AbortError") {
    state("limit", "Stopped", seconds());
    announce("Stopped");
  } else if (failure) {
    const text = failure instanceof ServerError ? failure.message : "The server cannot be reached.";
    state("bad", "Not run");
    output.note(text);
    announce(`Not run. ${text}`);
  } else finish(answer);
  $("clear").disabled = false;
}

/** Runs a program to which the user can send input; without input if there is no WebSocket. */
async function runInteractively(base, now, events, signal) {
  const connection = connect(base, now, events, signal);
  Object.assign(running, connection);
  prompt(true);
  try {
    return await connection.done;
  } catch (error) {
    if (!(error instanceof NoSocket)) throw error;
    output.note("Nothing can be typed: the WebSocket to the server cannot be opened.");
    return execute(base, now, events, signal);
  } finally {
    prompt(false);
  }
}

function prompt(on) {
  const focus = $("prompt").contains(document.activeElement);
  $("prompt").hidden = !on;
  $("line").value = "";
  if (on) $("line").focus();
  else if (focus) $("run").disabled ? $("stop").focus() : $("run").focus();
}

function endInput() {
  running?.end?.();
  prompt(false);
}

$("prompt").onsubmit = (event) => {
  event.preventDefault();
  const line = `${$("line").value}\n`;
  running?.type?.(line);
  print("run", "echo", line);
  $("line").value = "";
};
$("end").onclick = endInput;
$("line").onkeydown = (event) => {
  if (event.key !== "d" || !event.ctrlKey || $("line").value) return;
  event.preventDefault();
  endInput();
};

function finish(answer) {
  const { word, sentence } = verdict(answer);
  const look = word === "ok" ? "ok" : /_limit$|^cancelled$/.test(word) ? "limit" : "bad";
  const details = usage(answer);
  state(look, sentence, details.join(" · "));
  const last = answer.run ?? answer.compile;
  if (last?.message) output.note(last.message);
  if (answer.truncated) output.note("The output was too long: the rest was dropped.");
  if (output.dropped) output.note(`${output.dropped.toLocaleString("en")} more characters are not shown.`);
  const text = $("output").textContent.trim();
  const read = text.length > MAX_ANNOUNCED ? `${text.slice(0, MAX_ANNOUNCED)} …` : text;
  announce(`${sentence}. ${details.join(", ")}. ${text ? `Output: ${read}` : "No output."}`);
  $("output").dataset.empty = "The program printed nothing.";
}

function clear() {
  pending = [];
  shown = "";
  output.clear();
  $("clear").disabled = true;
}

$("run").onclick = run;
$("stop").onclick = () => running?.stop();
$("clear").onclick = () => {
  clear();
  $("output").dataset.empty = "";
  if (!running) state("idle", "Ready");
  $("run").focus();
};
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    run();
  }
});

// ---- links

$("share").onclick = async () => {
  history.replaceState(null, "", await pack(program()));
  let text = "The link is in the address bar.";
  try {
    await navigator.clipboard.writeText(location.href);
    text = "Link copied. It contains the whole program.";
  } catch {
    // Browsers refuse access to the clipboard on pages without HTTPS.
  }
  toast(text);
};

let fading;
function toast(text) {
  announce(text);
  $("toast").textContent = text;
  $("toast").classList.add("shown");
  clearTimeout(fading);
  fading = setTimeout(() => $("toast").classList.remove("shown"), 2500);
}

/** Loads the program of the link in the address bar, if there is one. Returns whether it did. */
async function loadLink() {
  let linked;
  try {
    linked = await unpack(location.hash);
  } catch {
    toast("This link is damaged and contains no program.");
  }
  if (!linked) return false;
  if (![...$("language").options].some(({ value }) => value === linked.language)) {
    toast(`This server does not support ${linked.language || "the language of this link"}.`);
    return false;
  }
  load(linked, true);
  return true;
}
addEventListener("hashchange", loadLink);

// ---- start

async function start() {
  applyTheme();
  $("live").checked = store.get("live") === true;
  if (/Mac|iPhone|iPad/.test(navigator.platform)) $("shortcut").textContent = "⌘ ↵";
  $("output").dataset.empty = "The output of the program appears here.";
  let served;
  try {
    served = await runtimes(BASE);
  } catch (error) {
    state("bad", "No server");
    const text = error instanceof ServerError ? error.message : "The server cannot be reached: reload the page to try again.";
    output.note(text);
    announce(text);
    return;
  }
  const names = [...new Set(served.map((runtime) => runtime.language))];
  $("language").replaceChildren(...names.map((name) => new Option(NAMES[name] ?? name, name)));
  $("language").disabled = names.length === 0;
  if (!(await loadLink())) {
    const last = store.get("language");
    open(names.includes(last) ? last : names[0]);
  }
  $("run").disabled = false;
}
start();
