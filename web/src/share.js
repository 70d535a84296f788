// Encodes a program in a link, as deflated JSON in base64url in the fragment, which browsers do not send to servers.

const KEY = "#program=";
/** Largest unpacked size of a link, in bytes: a malicious small link could unpack to gigabytes. */
const MAX_PROGRAM = 1 << 20;

/** The fragment for a program. @param program `{language, code, stdin, args}` */
export async function pack(program) {
  const bytes = new TextEncoder().encode(JSON.stringify(program));
  const packed = await collect(new Blob([bytes]).stream().pipeThrough(new CompressionStream("deflate-raw")), Infinity);
  let binary = "";
  for (const byte of packed) binary += String.fromCharCode(byte);
  return KEY + btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

/** The program of a fragment, or null if it has none. Throws if the fragment is damaged. */
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
