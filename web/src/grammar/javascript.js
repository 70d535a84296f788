export { javascriptLanguage } from "@codemirror/lang-javascript";
