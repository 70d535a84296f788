// The pivot language for the editor: enough of its grammar for syntax highlighting.
import { StreamLanguage } from "@codemirror/language";

const words = (text) => new Set(text.split(" "));
const KEYWORDS = words(
  "as async await break const continue else extern fn for gc if impl in is let macro match pub return struct trait type use var where while yield",
);
const TYPES = words("i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 bool char void string Self");
const ATOMS = words("true false None self");

export const pivot = StreamLanguage.define({
  name: "pivot",
  startState: () => ({ comment: 0, string: null }),
  token(stream, state) {
    if (state.string) return inString(stream, state);
    if (stream.eatSpace()) return null;
    if (stream.match("//")) {
      stream.skipToEnd();
      return "comment";
    }
    const char = stream.peek();
    if (char === '"' || char === "`") {
      state.string = stream.next();
      return inString(stream, state);
    }
    if (stream.match(/^'(\\.|[^\\'])'/)) return "string";
    if (stream.match(/^0[xXbBoO][0-9a-fA-F_]+/) || stream.match(/^\d[\d_]*(\.\d+)?([eE][+-]?\d+)?/)) return "number";
    if (stream.match(/^#\[[^\]]*\]/)) return "meta";
    if (stream.match(/^[A-Za-z_]\w*/)) {
      const word = stream.current();
      if (stream.peek() === "!" && stream.string[stream.pos + 1] !== "=") {
        stream.next();
        return "macroName";
      }
      if (KEYWORDS.has(word)) return "keyword";
      if (TYPES.has(word) || /^[A-Z]/.test(word)) return "typeName";
      if (ATOMS.has(word)) return "atom";
      if (stream.match(/^\s*\(/, false)) return "variableName.function";
      return "variableName";
    }
    if (stream.match(/^[-+*/%=<>!&|^~?]+/)) return "operator";
    stream.next();
    return null;
  },
  languageData: {
    commentTokens: { line: "//" },
    closeBrackets: { brackets: ["(", "[", "{", '"', "`"] },
    indentOnInput: /^\s*\}$/,
  },
  indent(_state, textAfter, context) {
    const line = context.lineAt(context.pos, -1);
    const base = /^\s*/.exec(line.text)[0].length;
    const opens = /[{([]\s*(\/\/.*)?$/.test(line.text);
    const closes = /^\s*[})\]]/.test(textAfter);
    return Math.max(0, base + (opens ? context.unit : 0) - (closes ? context.unit : 0));
  },
});

function inString(stream, state) {
  for (let char; (char = stream.next()); ) {
    if (char === "\\") stream.next();
    else if (char === state.string) {
      state.string = null;
      break;
    }
  }
  return "string";
}
