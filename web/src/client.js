// Talks to a server: a program whose output comes as it is printed, by server-sent events, which also bring answers
// that the server has kept; or by a WebSocket, where it can be typed to.

/** What went wrong with a request, in words for the person before the page. */
export class ServerError extends Error {}

/** The languages that are served: `[{language, version, aliases, runtime}]`, the default one first. */
export async function runtimes(base) {
  const response = await fetch(new URL("api/v2/runtimes", base));
  if (!response.ok) throw new ServerError(await refusal(response));
  return response.json();
}

/** There is no socket: perhaps a proxy lets none through. */
export class NoSocket extends Error {}

const request = ({ language, code, stdin = "", args = [] }) => ({ language, version: "*", files: [{ content: code }], stdin, args });

/**
 * Runs a program by `POST /api/v2/execute`.
 * @param base address of the server
 * @param program `{language, code, stdin, args}`
 * @param events `{data(stage, stream, text)}`, called with what it prints; `{queued(position), stage(name)}` if they are there
 * @param signal an AbortSignal: aborting leaves, and the server ends the run
 * @returns the server's answer
 */
export async function execute(base, program, events, signal) {
  const response = await fetch(new URL("api/v2/execute", base), {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "text/event-stream, application/json" },
    body: JSON.stringify(request(program)),
    signal,
  });
  if (!response.ok) throw new ServerError(await refusal(response));
  if (response.headers.get("Content-Type")?.startsWith("text/event-stream")) return follow(response.body, events);
  // A server that does not tell what happens.
  const answer = await response.json();
  for (const stage of ["compile", "run"]) {
    const outcome = answer[stage];
    if (!outcome) continue;
    // In the order of arrival where both streams were used, else under the name of the one.
    if (outcome.stderr && !outcome.stdout) events.data(stage, "stderr", outcome.stderr);
    else if (outcome.output) events.data(stage, "stdout", outcome.output);
  }
  return answer;
}

/** Hears server-sent events to their end; gives the result. */
async function follow(body, events) {
  const hear = listener(events);
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new TypeError("the answer broke off");
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const field = (name) => block.split("\n").find((line) => line.startsWith(name))?.slice(name.length);
      const data = field("data:");
      if (!data) continue;
      if (field("event:") === "result") return JSON.parse(data);
      hear(JSON.parse(data));
    }
  }
}

/**
 * Runs a program that can be typed to, by a WebSocket.
 * @returns `{done, type(text), end()}`: what became of it, in time; more of its input; the end of that
 */
export function converse(base, program, events, signal) {
  const hear = listener(events);
  const url = new URL("api/v2/connect", base);
  url.protocol = url.protocol.replace("http", "ws");
  let socket;
  const say = (message) => {
    if (socket?.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message));
  };
  const done = new Promise((resolve, reject) => {
    const answer = {};
    let opened = false;
    try {
      socket = new WebSocket(url);
    } catch {
      return reject(new NoSocket());
    }
    signal.addEventListener("abort", () => {
      reject(signal.reason);
      socket.close();
    });
    socket.onopen = () => {
      opened = true;
      say({ type: "init", ...request(program) });
    };
    socket.onmessage = ({ data }) => {
      const told = JSON.parse(data);
      if (told.type === "exit") {
        answer[told.stage] = told;
        answer.truncated ||= told.truncated;
      }
      try {
        hear(told);
      } catch (error) {
        reject(error);
      }
    };
    socket.onclose = ({ code }) => {
      if (code === 4999) resolve(answer);
      else reject(opened ? new TypeError("the conversation broke off") : new NoSocket());
    };
  });
  return { done, type: (data) => say({ type: "data", stream: "stdin", data }), end: () => say({ type: "eof" }) };
}

/** Passes on what the server tells of a run. */
function listener(events) {
  let stage = "run";
  return (told) => {
    if (told.type === "stage") events.stage?.((stage = told.stage));
    else if (told.type === "data") events.data(stage, told.stream, told.data);
    else if (told.type === "queued") events.queued?.(told.position);
    else if (told.type === "error") throw new ServerError(sentence(told.message));
  };
}

const sentence = (message) => message[0].toUpperCase() + message.slice(1);

async function refusal(response) {
  const body = await response.json().catch(() => null);
  return sentence(body?.message ?? `The server answered ${response.status}.`);
}

/** One word for how it ended, and a sentence. */
export function verdict(answer) {
  const stage = answer.run ?? answer.compile ?? {};
  let word = answer.verdict ?? stage.verdict;
  if (!word) {
    const compile = answer.compile;
    if (compile && (compile.code || compile.signal) && !answer.run) word = "compile_error";
    else if (stage.status === "TO") word = "time_limit";
    else if (stage.status === "OL" || stage.status === "EL") word = "output_limit";
    else if (stage.signal) word = "signalled";
    else if (stage.code) word = "runtime_error";
    else word = "ok";
  }
  const sentences = {
    ok: "Finished",
    compile_error: "Did not compile",
    runtime_error: stage.code == null ? "Failed" : `Exit code ${stage.code}`,
    signalled: `Killed by ${stage.signal ?? "a signal"}`,
    time_limit: "Out of time",
    memory_limit: "Out of memory",
    process_limit: "Too many processes",
    output_limit: "Too much output",
    cancelled: "Stopped",
    internal_error: "The server failed",
  };
  const compiling = word.endsWith("_limit") && answer.compile && !answer.run ? " while compiling" : "";
  return { word, sentence: (sentences[word] ?? word) + compiling };
}

/** Time and memory of the stages, in words. */
export function usage(answer) {
  const parts = [];
  const stage = answer.run ?? answer.compile;
  if (answer.run && answer.compile?.wall_time != null) parts.push(`compiled in ${time(answer.compile.wall_time)}`);
  if (stage?.wall_time != null) parts.push(time(stage.wall_time));
  if (stage?.cpu_time != null) parts.push(`${time(stage.cpu_time)} CPU`);
  if (stage?.memory) parts.push(size(stage.memory));
  if (answer.cached) parts.push("from memory");
  return parts;
}

function time(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(ms < 10_000 ? 2 : 1)} s`;
}

function size(bytes) {
  return bytes < 1 << 20 ? `${Math.ceil(bytes / 1024)} KiB` : `${(bytes / (1 << 20)).toFixed(1)} MiB`;
}
