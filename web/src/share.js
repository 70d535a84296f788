// A program in a link: JSON, deflated, base64url, in the fragment, which no browser sends to a server.

const KEY = "#program=";
/** Most that a link may unpack to, in bytes: a small link can be made to unpack to gigabytes. */
const MAX_PROGRAM = 1 << 20;

/** @param program `{language, code, stdin, args}` */
export async function pack(program) {
  const bytes = new TextEncoder().encode(JSON.stringify(program));
  const packed = await collect(new Blob([bytes]).stream().pipeThrough(new CompressionStream("deflate-raw")), Infinity);
  let binary = "";
  for (const byte of packed) binary += String.fromCharCode(byte);
  return KEY + btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

/** The program of a fragment; null if it holds none. Throws on one that is damaged. */
export async function unpack(fragment) {
  if (!fragment.startsWith(KEY)) return null;
  const binary = atob(fragment.slice(KEY.length).replaceAll("-", "+").replaceAll("_", "/"));
  const packed = Uint8Array.from(binary, (char) => char.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  const program = JSON.parse(new TextDecoder().decode(await collect(stream, MAX_PROGRAM)));
  const text = (value) => (typeof value === "string" ? value : "");
  return { language: text(program.language), code: text(program.code), stdin: text(program.stdin), args: text(program.args) };
}

async function collect(stream, most) {
  const chunks = [];
  let length = 0;
  for (const reader = stream.getReader(); ; ) {
    const { value, done } = await reader.read();
    if (done) break;
    length += value.length;
    if (length > most) {
      await reader.cancel();
      throw new RangeError("too large");
    }
    chunks.push(value);
  }
  const all = new Uint8Array(length);
  let at = 0;
  for (const chunk of chunks) {
    all.set(chunk, at);
    at += chunk.length;
  }
  return all;
}
