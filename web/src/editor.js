// The editor: CodeMirror in a shadow tree, where its styles are adopted style sheets, which the content security policy
// allows.
import { EditorState, Compartment } from "@codemirror/state";
import {
  EditorView, keymap, lineNumbers, highlightActiveLine, highlightActiveLineGutter, highlightSpecialChars, drawSelection,
} from "@codemirror/view";
import { defaultKeymap, history, historyKeymap, indentMore, indentLess } from "@codemirror/commands";
import { bracketMatching, HighlightStyle, indentOnInput, indentUnit, StreamLanguage, syntaxHighlighting } from "@codemirror/language";
import { shell } from "@codemirror/legacy-modes/mode/shell";
import { tags } from "@lezer/highlight";
import { pivot } from "./pivot.js";

/** Grammars. The large ones are loaded on demand. */
const GRAMMARS = {
  bash: async () => StreamLanguage.define(shell),
  c: async () => (await import("./grammar/cpp.js")).cppLanguage,
  cpp: async () => (await import("./grammar/cpp.js")).cppLanguage,
  go: async () => (await import("./grammar/go.js")).goLanguage,
  javascript: async () => (await import("./grammar/javascript.js")).javascriptLanguage,
  pivot: async () => pivot,
  python: async () => (await import("./grammar/python.js")).pythonLanguage,
  rust: async () => (await import("./grammar/rust.js")).rustLanguage,
};

const colours = HighlightStyle.define([
  { tag: [tags.keyword, tags.modifier, tags.controlKeyword, tags.operatorKeyword], color: "var(--code-keyword)" },
  { tag: [tags.string, tags.special(tags.string), tags.regexp, tags.character], color: "var(--code-string)" },
  { tag: [tags.number, tags.bool, tags.atom, tags.null, tags.self], color: "var(--code-number)" },
  { tag: [tags.comment, tags.docComment], color: "var(--code-comment)", fontStyle: "italic" },
  { tag: [tags.typeName, tags.className, tags.namespace], color: "var(--code-type)" },
  { tag: [tags.function(tags.variableName), tags.function(tags.propertyName), tags.macroName, tags.standard(tags.variableName)], color: "var(--code-function)" },
  { tag: [tags.meta, tags.processingInstruction, tags.annotation], color: "var(--code-meta)" },
  { tag: [tags.operator, tags.punctuation, tags.bracket], color: "var(--code-operator)" },
  { tag: tags.escape, color: "var(--code-number)" },
  { tag: tags.invalid, color: "var(--bad)" },
]);

const look = EditorView.theme({
  "&": { height: "100%", fontSize: "var(--code-size)", color: "var(--text)", backgroundColor: "transparent" },
  "&.cm-focused": { outline: "none" },
  ".cm-scroller": { fontFamily: "var(--mono)", lineHeight: "1.6", overflow: "auto" },
  ".cm-content": { padding: "12px 0", caretColor: "var(--accent)" },
  ".cm-line": { padding: "0 16px 0 8px" },
  ".cm-gutters": { backgroundColor: "var(--panel)", color: "var(--faint)", border: "none", paddingLeft: "8px" },
  ".cm-activeLineGutter": { backgroundColor: "transparent", color: "var(--text)" },
  ".cm-activeLine": { backgroundColor: "var(--line)" },
  ".cm-cursor": { borderLeftColor: "var(--accent)", borderLeftWidth: "2px" },
  ".cm-selectionBackground, &.cm-focused > .cm-scroller > .cm-selectionLayer .cm-selectionBackground": {
    backgroundColor: "var(--selection)",
  },
  "&.cm-focused .cm-matchingBracket": { backgroundColor: "var(--selection)", outline: "none" },
});

/** Tab indents. After Escape it moves the focus out of the editor, so that keyboard users are not trapped in it. */
function tabs() {
  let leave = false;
  const unless = (command) => (view) => {
    if (leave) return false;
    return command(view);
  };
  return [
    EditorView.domEventHandlers({
      keydown(event) {
        if (event.key === "Escape") leave = true;
        else if (event.key !== "Tab" && event.key !== "Shift") leave = false;
        return false;
      },
      blur() {
        leave = false;
      },
    }),
    keymap.of([{ key: "Tab", run: unless(indentMore), shift: unless(indentLess) }]),
  ];
}

/** Handles typing over a selection: Chromium would keep its colours in a style attribute, which the policy forbids. */
const typing = EditorView.domEventHandlers({
  beforeinput(event, view) {
    if (event.inputType !== "insertText" || event.data == null || view.composing || view.state.selection.main.empty) return false;
    view.dispatch(view.state.replaceSelection(event.data), { userEvent: "input.type", scrollIntoView: true });
    event.preventDefault();
    return true;
  },
});

/**
 * Makes an editor.
 * @param host the element that contains the editor
 * @param on callbacks: `{change(), run()}`
 */
export function editor(host, on) {
  const root = host.attachShadow({ mode: "open", delegatesFocus: true });
  const language = new Compartment();
  const extensions = [
    keymap.of([{ key: "Mod-Enter", run: () => (on.run(), true), preventDefault: true }]),
    tabs(),
    typing,
    lineNumbers(), highlightActiveLineGutter(), highlightActiveLine(), highlightSpecialChars(), drawSelection(),
    history(), indentOnInput(), bracketMatching(), indentUnit.of("    "),
    syntaxHighlighting(colours), look,
    keymap.of([...defaultKeymap, ...historyKeymap]),
    language.of([]),
    EditorView.contentAttributes.of({ tabindex: "0", "aria-label": host.getAttribute("aria-label"), autocapitalize: "off", spellcheck: "false" }),
    EditorView.updateListener.of((update) => {
      if (update.docChanged) on.change();
    }),
  ];
  const view = new EditorView({ root, parent: root });
  let loads = 0;
  return {
    get code() {
      return view.state.doc.toString();
    },
    /** Loads another program, with an undo history of its own. */
    async load(code, name) {
      const state = EditorState.create({ doc: code, extensions });
      view.setState(state);
      const latest = ++loads;
      // If the grammar cannot be loaded, the program stays plain text.
      const grammar = await GRAMMARS[name]?.().catch(() => null);
      if (grammar && latest === loads) view.dispatch({ effects: language.reconfigure(grammar) });
    },
    /** Replaces the text, as if the user had typed it. */
    replace(code) {
      view.dispatch({ changes: { from: 0, to: view.state.doc.length, insert: code }, selection: { anchor: 0 }, scrollIntoView: true });
    },
    focus() {
      view.focus();
    },
  };
}
