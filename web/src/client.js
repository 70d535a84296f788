// The client of the server's API. Runs a program by server-sent events, which also deliver cached results, or by a
// WebSocket, over which the user can send input.

/** A request failed; the message is for the user. */
export class ServerError extends Error {}

/** The languages of the server: `[{language, version, aliases, runtime}]`, the default one first. */
export async function runtimes(base) {
  const response = await fetch(new URL("api/v2/runtimes", base));
  if (!response.ok) throw new ServerError(await errorMessage(response));
  return response.json();
}

/** The WebSocket cannot be opened; a proxy may block it. */
export class NoSocket extends Error {}

const request = ({ language, code, stdin = "", args = [] }) => ({ language, version: "*", files: [{ content: code }], stdin, args });

/**
 * Runs a program by `POST /api/v2/execute`.
 * @param base address of the server
 * @param program `{language, code, stdin, args}`
 * @param events callbacks: `{data(stage, stream, text)}` for output, and optionally `{queued(position), stage(name)}`
 * @param signal an AbortSignal: aborting closes the connection, and the server ends the run
 * @returns the server's answer
 */
export async function execute(base, program, events, signal) {
  const response = await fetch(new URL("api/v2/execute", base), {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "text/event-stream, application/json" },
    body: JSON.stringify(request(program)),
    signal,
  });
  if (!response.ok) throw new ServerError(await errorMessage(response));
  if (response.headers.get("Content-Type")?.startsWith("text/event-stream")) return readEvents(response.body, events);
  // This server does not support server-sent events.
  const answer = await response.json();
  for (const stage of ["compile", "run"]) {
    const outcome = answer[stage];
    if (!outcome) continue;
    // `output` has both streams in the order of arrival. If only stderr was used, it is shown as stderr.
    if (outcome.stderr && !outcome.stdout) events.data(stage, "stderr", outcome.stderr);
    else if (outcome.output) events.data(stage, "stdout", outcome.output);
  }
  return answer;
}

/** Reads server-sent events to their end and returns the result. */
async function readEvents(body, events) {
  const dispatch = dispatcher(events);
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new TypeError("the connection was closed before the result");
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const field = (name) => block.split("\n").find((line) => line.startsWith(name))?.slice(name.length);
      const data = field("data:");
      if (!data) continue;
      if (field("event:") === "result") return JSON.parse(data);
      dispatch(JSON.parse(data));
    }
  }
}

/**
 * Runs a program by a WebSocket, over which the user can send input.
 * @returns `{done, type(text), end()}`: a promise of the result; a function to send input; a function to end the input
 */
export function connect(base, program, events, signal) {
  const dispatch = dispatcher(events);
  const url = new URL("api/v2/connect", base);
  url.protocol = url.protocol.replace("http", "ws");
  let socket;
  const send = (message) => {
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
      send({ type: "init", ...request(program) });
    };
    socket.onmessage = ({ data }) => {
      const message = JSON.parse(data);
      if (message.type === "exit") {
        answer[message.stage] = message;
        answer.truncated ||= message.truncated;
      }
      try {
        dispatch(message);
      } catch (error) {
        reject(error);
      }
    };
    socket.onclose = ({ code }) => {
      if (code === 4999) resolve(answer);
      else reject(opened ? new TypeError("the connection was closed before the result") : new NoSocket());
    };
  });
  return { done, type: (data) => send({ type: "data", stream: "stdin", data }), end: () => send({ type: "eof" }) };
}

/** Returns a function that calls the callback for each message of the server, and throws for an error message. */
function dispatcher(events) {
  let stage = "run";
  return (message) => {
    if (message.type === "stage") events.stage?.((stage = message.stage));
    else if (message.type === "data") events.data(stage, message.stream, message.data);
    else if (message.type === "queued") events.queued?.(message.position);
    else if (message.type === "error") throw new ServerError(sentence(message.message));
  };
}

const sentence = (message) => message[0].toUpperCase() + message.slice(1);

/** The message of an error response. */
async function errorMessage(response) {
  const body = await response.json().catch(() => null);
  return sentence(body?.message ?? `The server answered ${response.status}.`);
}

/** The verdict of a run, as a word and as a sentence. */
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

/** Time and memory of the stages, as texts. */
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
