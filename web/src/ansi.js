// Shows the output of a program as text nodes and spans. Applies colours and styles (SGR), drops every other escape
// sequence, and shows other control characters as symbols. Never parses output as HTML.

/** Most characters shown of one output. Further ones are only counted. */
const MAX_TEXT = 1 << 20;
/** Most changes of style. Further text is plain. */
const MAX_SPANS = 4000;
/** Longest parameters of a control sequence, and longest unterminated string (OSC, DCS …), in characters. */
const MAX_SEQUENCE = 64;
const MAX_STRING = 4096;

const ESC = 0x1b, BEL = 0x07;
const PLAIN = () => ({ fg: null, bg: null, bold: false, dim: false, italic: false, underline: false, strike: false, inverse: false });

export class Output {
  /** @param {HTMLElement} element the parent of the text */
  constructor(element) {
    this.element = element;
    this.clear();
  }

  clear() {
    this.element.replaceChildren();
    this.block = this.element;
    this.text = 0;
    this.dropped = 0;
    this.spans = 0;
    this.last = null;
    this.newline = true;
    this.#reset();
  }

  #reset() {
    this.state = "text";
    this.sequence = "";
    this.carriage = false;
    this.style = PLAIN();
  }

  /** Starts a section with a heading; later text goes there. */
  section(title) {
    const heading = document.createElement("div");
    heading.className = "section";
    heading.textContent = title;
    this.element.append(heading);
    this.last = null;
    this.newline = true;
    this.#reset();
  }

  /** Adds a message of the page, not of the program. */
  note(text) {
    const line = document.createElement("div");
    line.className = "note";
    line.textContent = text;
    this.element.append(line);
    this.last = null;
    this.newline = true;
  }

  /** @param {string} chunk @param {string} kind class of the stream: stdout, stderr or echo */
  write(chunk, kind) {
    if (this.text >= MAX_TEXT) {
      this.dropped += chunk.length;
      return;
    }
    if (this.text + chunk.length > MAX_TEXT) {
      const kept = MAX_TEXT - this.text;
      this.dropped += chunk.length - kept;
      chunk = chunk.slice(0, kept);
    }
    this.text += chunk.length;
    let plain = "";
    const flush = () => {
      if (plain) this.#append(plain, kind);
      plain = "";
    };
    for (let i = 0; i < chunk.length; i++) {
      const char = chunk[i], code = chunk.charCodeAt(i);
      switch (this.state) {
        case "text":
          if (this.carriage) {
            this.carriage = false;
            // A program that redraws a line after a carriage return starts a new line here.
            if (code !== 0x0a) plain += "\n";
          }
          if (code === ESC) this.state = "escape";
          else if (code === 0x9b) this.#begin("csi");
          else if (code === 0x90 || code === 0x98 || (code >= 0x9d && code <= 0x9f)) this.#begin("string");
          else if (code === 0x0d) this.carriage = true;
          else plain += visible(char, code);
          break;
        case "escape":
          if (char === "[") this.#begin("csi");
          else if ("]PX^_".includes(char)) this.#begin("string");
          else if (code < 0x20 || code > 0x7e) {
            this.state = "text";
            i--;
          } else if (code >= 0x30) this.state = "text";
          break;
        case "csi":
          if (code >= 0x40 && code <= 0x7e) {
            if (char === "m" && /^[0-9;:]*$/.test(this.sequence)) {
              flush();
              this.#sgr(this.sequence);
            }
            this.state = "text";
          } else if (code < 0x20 || code > 0x3f || this.sequence.length >= MAX_SEQUENCE) {
            this.state = "text";
            i--;
          } else this.sequence += char;
          break;
        case "string":
          // An unterminated string must not swallow the following output.
          if (code === BEL || code === 0x9c || this.sequence.length >= MAX_STRING) this.state = "text";
          else if (code === ESC) this.state = "escape";
          else if (code === 0x0a) {
            this.state = "text";
            i--;
          } else this.sequence += char;
          break;
      }
    }
    flush();
  }

  #begin(state) {
    this.state = state;
    this.sequence = "";
  }

  #append(text, kind) {
    this.newline = text.endsWith("\n");
    const look = looks(this.style, kind);
    if (this.last && (this.last.look === look.key || this.spans >= MAX_SPANS)) {
      this.last.node.appendData(text);
      return;
    }
    const span = document.createElement("span");
    if (this.spans < MAX_SPANS) {
      span.className = look.classes;
      // Through the object model, since the page's content security policy forbids style attributes.
      if (look.color) span.style.color = look.color;
      if (look.background) span.style.backgroundColor = look.background;
    }
    const node = document.createTextNode(text);
    span.append(node);
    this.element.append(span);
    this.spans++;
    this.last = { look: look.key, node };
  }

  #sgr(sequence) {
    const style = this.style;
    const codes = sequence.split(";");
    for (let i = 0; i < codes.length; i++) {
      const [first, ...parts] = codes[i].split(":");
      const n = Number(first || 0);
      if (n === 38 || n === 48) {
        let colour;
        if (parts.length) {
          colour = extended(parts[0], parts.slice(parts.length > 4 ? 2 : 1));
        } else {
          const taken = codes[i + 1] === "5" ? 1 : 3;
          colour = extended(codes[i + 1], codes.slice(i + 2, i + 2 + taken));
          i += 1 + taken;
        }
        style[n === 38 ? "fg" : "bg"] = colour;
      } else if (n === 0) this.style = Object.assign(style, PLAIN());
      else if (n === 1) style.bold = true;
      else if (n === 2) style.dim = true;
      else if (n === 3) style.italic = true;
      else if (n === 4 || n === 21) style.underline = parts[0] !== "0";
      else if (n === 7) style.inverse = true;
      else if (n === 9) style.strike = true;
      else if (n === 22) style.bold = style.dim = false;
      else if (n === 23) style.italic = false;
      else if (n === 24) style.underline = false;
      else if (n === 27) style.inverse = false;
      else if (n === 29) style.strike = false;
      else if (n >= 30 && n <= 37) style.fg = n - 30;
      else if (n === 39) style.fg = null;
      else if (n >= 40 && n <= 47) style.bg = n - 40;
      else if (n === 49) style.bg = null;
      else if (n >= 90 && n <= 97) style.fg = n - 82;
      else if (n >= 100 && n <= 107) style.bg = n - 92;
    }
  }
}

/** The text shown for a character: a symbol for control characters, the code point for those that change the direction. */
function visible(char, code) {
  if (code === 0x0a || code === 0x09) return char;
  if (code < 0x20) return String.fromCharCode(0x2400 + code);
  if (code === 0x7f) return "\u2421";
  if (code >= 0x80 && code < 0xa0) return "\ufffd";
  if ((code >= 0x202a && code <= 0x202e) || (code >= 0x2066 && code <= 0x2069)) {
    return `<U+${code.toString(16).toUpperCase()}>`;
  }
  return char;
}

/** A colour of the 256-colour palette, as a number below 16 or as CSS, or a true colour; null if it is invalid. */
function extended(mode, parts) {
  const values = parts.map((part) => Number(part || 0));
  if (values.some((value) => !(value >= 0 && value <= 255))) return null;
  if (mode === "2" && values.length >= 3) return `rgb(${values.slice(0, 3).join(" ")})`;
  if (mode !== "5" || values.length < 1) return null;
  const n = values[0];
  if (n < 16) return n;
  if (n >= 232) return `rgb(${Array(3).fill(8 + (n - 232) * 10).join(" ")})`;
  const level = (v) => (v === 0 ? 0 : 55 + v * 40);
  const c = n - 16;
  return `rgb(${level(Math.floor(c / 36))} ${level(Math.floor(c / 6) % 6)} ${level(c % 6)})`;
}

function looks(style, kind) {
  const classes = [kind];
  let color = null, background = null;
  if (typeof style.fg === "number") classes.push(`fg${style.fg}`);
  else color = style.fg;
  if (typeof style.bg === "number") classes.push(`bg${style.bg}`);
  else background = style.bg;
  for (const name of ["bold", "dim", "italic", "underline", "strike", "inverse"]) {
    if (style[name]) classes.push(name);
  }
  const joined = classes.join(" ");
  return { classes: joined, color, background, key: `${joined}|${color}|${background}` };
}
