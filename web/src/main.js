// The playground: the page's elements, what they do, and what is remembered.
import { Output } from "./ansi.js";
import { NoSocket, ServerError, converse, execute, runtimes, usage, verdict } from "./client.js";
import { editor as makeEditor } from "./editor.js";
import { EXAMPLES } from "./examples.js";
import { pack, unpack } from "./share.js";

const $ = (id) => document.getElementById(id);
const BASE = document.baseURI;
/** How much of the output is read out at the end, in characters. */
const READ_OUT = 300;
const NAMES = { c: "C", cpp: "C++", javascript: "JavaScript", bash: "Bash", go: "Go", pivot: "pivot", python: "Python", rust: "Rust" };

/** What the browser keeps; it may refuse. */
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
      // Without it the page works, it only forgets.
    }
  },
};

const output = new Output($("output"));
const editor = makeEditor($("editor"), { change: changed, run });
let language = "";
/** The run that is going on: `{stop()}`, and `{type(text), end()}` while it can be typed to. */
let running = null;

// ---- colours

const dark = matchMedia("(prefers-color-scheme: dark)");
function paint() {
  const theme = store.get("theme") ?? (dark.matches ? "dark" : "light");
  document.documentElement.dataset.theme = theme;
  $("theme").setAttribute("aria-pressed", String(theme === "dark"));
}
dark.addEventListener("change", paint);
$("theme").onclick = () => {
  const other = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  // Back at the system's choice, it is followed again.
  store.set("theme", (other === "dark") === dark.matches ? null : other);
  paint();
};

// ---- the program

const program = () => ({ language, code: editor.code, stdin: $("stdin").value, args: $("args").value });

function changed() {
  store.set(`draft.${language}`, program());
  store.set("language", language);
  // A link in the address bar would no longer be that of this program.
  if (location.hash) history.replaceState(null, "", location.pathname + location.search);
  $("example").value = "";
  summarize();
}

/** What a program is given; unfolded where asked for and there is something. */
function give({ stdin = "", args = "" }, unfold) {
  $("stdin").value = stdin;
  $("args").value = args;
  if (unfold && (stdin || args)) $("input").open = true;
  summarize();
}

function load(next, unfold = false) {
  language = next.language;
  $("language").value = language;
  give(next, unfold);
  editor.load(next.code, language);
  const examples = (EXAMPLES[language] ?? []).map(({ title }, index) => new Option(title, String(index)));
  $("example").replaceChildren(new Option("Examples", ""), ...examples);
  $("example").disabled = examples.length === 0;
  document.title = `${NAMES[language] ?? language} · coderunner playground`;
}

function open(name) {
  load({ ...(EXAMPLES[name]?.[0] ?? { code: "" }), ...store.get(`draft.${name}`), language: name });
}

/** What is folded away is told by its heading. */
function summarize() {
  const parts = [];
  if ($("args").value.trim()) parts.push("arguments");
  if ($("stdin").value) parts.push("standard input");
  if ($("live").checked) parts.push("typed while it runs");
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
  give(example, true);
  // Undo brings back what was there.
  editor.replace(example.code);
  changed();
  $("example").value = index;
};

/** Words of the arguments; quotes keep them together. */
function words(text) {
  const found = text.match(/(?:[^\s'"\\]|\\.|'[^']*'|"(?:[^"\\]|\\.)*"|['"\\])+/gs) ?? [];
  return found.map((word) =>
    word.replace(/'([^']*)'|"((?:[^"\\]|\\.)*)"|\\(.)/gs, (_, single, double, escaped) =>
      single ?? double?.replace(/\\(["\\])/g, "$1") ?? escaped,
    ),
  );
}

// ---- running

/** What has arrived and is not drawn yet: once a frame is often enough. */
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

function say(text) {
  $("status").textContent = text;
}

function state(look, text, details = "") {
  $("verdict").dataset.verdict = look;
  $("verdict").textContent = text;
  $("usage").textContent = details;
}

function busy(on) {
  // The focus is not lost with the button that it was on.
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
  say(phase);
  const now = { ...program(), args: words($("args").value) };
  const leave = new AbortController();
  running = { stop: () => leave.abort() };
  busy(true);
  const events = {
    data: print,
    queued: (position) => (phase = position ? `Waiting behind ${position}` : "Waiting"),
    stage: (stage) => (phase = stage === "compile" ? "Compiling" : "Running"),
  };
  let answer, failure;
  try {
    answer = await ($("live").checked ? talk : execute)(BASE, now, events, leave.signal);
  } catch (error) {
    failure = error;
  }
  clearInterval(clock);
  running = null;
  busy(false);
  draw();
  if (failure?.name === "AbortError") {
    state("limit", "Stopped", seconds());
    say("Stopped");
  } else if (failure) {
    const text = failure instanceof ServerError ? failure.message : "The server cannot be reached.";
    state("bad", "Not run");
    output.note(text);
    say(`Not run. ${text}`);
  } else finish(answer);
  $("clear").disabled = false;
}

/** A run that is typed to; where there is no socket, a plain one. */
async function talk(base, now, events, signal) {
  const conversation = converse(base, now, events, signal);
  Object.assign(running, conversation);
  prompt(true);
  try {
    return await conversation.done;
  } catch (error) {
    if (!(error instanceof NoSocket)) throw error;
    output.note("Nothing can be typed: no WebSocket comes through to the server.");
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
  const read = text.length > READ_OUT ? `${text.slice(0, READ_OUT)} …` : text;
  say(`${sentence}. ${details.join(", ")}. ${text ? `Output: ${read}` : "No output."}`);
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
    text = "Link copied. It holds the whole program.";
  } catch {
    // Only secure pages may write to the clipboard.
  }
  toast(text);
};

let fading;
function toast(text) {
  say(text);
  $("toast").textContent = text;
  $("toast").classList.add("shown");
  clearTimeout(fading);
  fading = setTimeout(() => $("toast").classList.remove("shown"), 2500);
}

/** Shows the program of the address bar's link, if there is one. */
async function follow() {
  let linked;
  try {
    linked = await unpack(location.hash);
  } catch {
    toast("This link is damaged: it holds no program.");
  }
  if (!linked) return false;
  if (![...$("language").options].some(({ value }) => value === linked.language)) {
    toast(`${linked.language || "Its language"} is not served here.`);
    return false;
  }
  load(linked, true);
  return true;
}
addEventListener("hashchange", follow);

// ---- start

async function start() {
  paint();
  $("live").checked = store.get("live") === true;
  if (/Mac|iPhone|iPad/.test(navigator.platform)) $("shortcut").textContent = "⌘ ↵";
  $("output").dataset.empty = "Run shows here what the program prints.";
  let served;
  try {
    served = await runtimes(BASE);
  } catch (error) {
    state("bad", "No server");
    const text = error instanceof ServerError ? error.message : "The server cannot be reached: reload the page to try again.";
    output.note(text);
    say(text);
    return;
  }
  const names = [...new Set(served.map((runtime) => runtime.language))];
  $("language").replaceChildren(...names.map((name) => new Option(NAMES[name] ?? name, name)));
  $("language").disabled = names.length === 0;
  if (!(await follow())) {
    const last = store.get("language");
    open(names.includes(last) ? last : names[0]);
  }
  $("run").disabled = false;
}
start();
