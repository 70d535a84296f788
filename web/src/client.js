// Talks to a server: one program, run once, by a plain request, whose answer may come from the server's memory.

/** What went wrong with a request, in words for the person before the page. */
export class ServerError extends Error {}

/** The languages that are served: `[{language, version, aliases, runtime}]`, the default one first. */
export async function runtimes(base) {
  const response = await fetch(new URL("api/v2/runtimes", base));
  if (!response.ok) throw new ServerError(await refusal(response));
  return response.json();
}

/**
 * Runs a program by `POST /api/v2/execute`.
 * @param base address of the server
 * @param program `{language, code, stdin, args}`
 * @param events `{data(stage, stream, text)}`, called with what it printed
 * @param signal an AbortSignal: aborting leaves, and the server ends the run
 * @returns the server's answer
 */
export async function execute(base, program, events, signal) {
  const { language, code, stdin = "", args = [] } = program;
  const response = await fetch(new URL("api/v2/execute", base), {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ language, version: "*", files: [{ content: code }], stdin, args }),
    signal,
  });
  if (!response.ok) throw new ServerError(await refusal(response));
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

async function refusal(response) {
  const body = await response.json().catch(() => null);
  const message = body?.message ?? `The server answered ${response.status}.`;
  return message[0].toUpperCase() + message.slice(1);
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
