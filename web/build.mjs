// Builds web/dist/ from web/src/. With --check writes nothing, and fails if dist/ differs from the build.
import { build } from "esbuild";
import { createHash } from "node:crypto";
import { mkdir, readFile, readdir, rm, writeFile } from "node:fs/promises";
import { basename, extname } from "node:path";
import { fileURLToPath } from "node:url";
import { gunzipSync, gzipSync } from "node:zlib";

process.chdir(fileURLToPath(new URL(".", import.meta.url)));
const check = process.argv.includes("--check");

const TYPES = {
  ".css": "text/css; charset=utf-8",
  ".html": "text/html; charset=utf-8",
  ".js": "text/javascript; charset=utf-8",
  ".svg": "image/svg+xml",
};

const common = { bundle: true, minify: true, write: false, legalComments: "none", charset: "utf8", target: "es2022" };

// Bundles the style sheet of embed.js, with its imports, as text into the script.
const sheets = {
  name: "sheets",
  setup({ onLoad }) {
    onLoad({ filter: /embed\.css$/ }, async ({ path }) => {
      const { outputFiles } = await build({ ...common, entryPoints: [path] });
      return { contents: outputFiles[0].text, loader: "text" };
    });
  },
};

// The content of a file with a hash in its name never changes, so browsers may cache it forever.
const page = await build({
  ...common,
  entryPoints: { playground: "src/main.js", style: "src/playground.css" },
  format: "esm",
  splitting: true,
  outdir: "dist",
  entryNames: "[name]-[hash]",
  chunkNames: "[name]-[hash]",
  metafile: true,
});
const embed = await build({ ...common, entryPoints: ["src/embed.js"], format: "iife", plugins: [sheets], outdir: "dist" });

const assets = new Map();
for (const { path, contents } of [...page.outputFiles, ...embed.outputFiles]) assets.set(basename(path), Buffer.from(contents));
assets.set("playground.svg", await readFile("src/playground.svg"));

const named = (beginning, ending) => [...assets.keys()].find((name) => name.startsWith(beginning) && name.endsWith(ending));
const script = named("playground-", ".js");
const chunks = page.metafile.outputs[`dist/${script}`].imports
  .filter(({ kind }) => kind === "import-statement")
  .map(({ path }) => `<link rel="modulepreload" href="${basename(path)}">`);
const html = (await readFile("src/index.html", "utf8"))
  .replace("playground.css", named("style-", ".css"))
  .replace('<script src="playground.js"', `${chunks.join("\n")}\n<script src="${script}"`);
assets.set("playground.html", Buffer.from(html));

// The list of assets, as Rust source that the server includes.
const names = [...assets.keys()].sort();
const rust = names.map((name) => {
  const kept = /-[A-Z0-9]{8}\.\w+$/.test(name);
  return `    Asset {
        name: "${name}",
        content_type: "${TYPES[extname(name)]}",
        immutable: ${kept},
        plain: include_bytes!("${name}"),
        gzip: include_bytes!("${name}.gz"),
    },
`;
});
const list = `// Made by web/build.mjs.\n&[\n${rust.join("")}]\n`;

// With these checksums `make lint` detects, without Node, that dist/ is older than the sources.
const files = (await readdir("src", { recursive: true })).filter((name) => extname(name)).sort();
const sum = async (name) => createHash("sha256").update(await readFile(name)).digest("hex");
let sums = "";
for (const name of [...files.map((name) => `src/${name}`), "build.mjs", "package-lock.json"]) sums += `${await sum(name)}  ${name}\n`;

const wanted = new Map([["assets.rs", Buffer.from(list)], ["sources.sha256", Buffer.from(sums)]]);
for (const name of names) {
  wanted.set(name, assets.get(name));
  wanted.set(`${name}.gz`, gzipSync(assets.get(name), { level: 9 }));
}

// Compares uncompressed contents, since compressed bytes differ between versions of zlib.
const same = (name, a, b) => (name.endsWith(".gz") ? gunzipSync(a).equals(gunzipSync(b)) : a.equals(b));
await mkdir("dist", { recursive: true });
const stale = (await readdir("dist")).filter((name) => !wanted.has(name));
if (!check) for (const name of stale) await rm(`dist/${name}`);
for (const [name, bytes] of wanted) {
  const stored = await readFile(`dist/${name}`).catch(() => null);
  if (stored && same(name, stored, bytes)) continue;
  stale.push(name);
  if (!check) await writeFile(`dist/${name}`, bytes);
}
if (check && stale.length) {
  console.error(`web/dist differs from the build of web/src (${stale.join(", ")}): run make web, and commit web/dist`);
  process.exit(1);
}
if (!check) for (const name of names) console.log(`${name.padEnd(28)} ${wanted.get(`${name}.gz`).length} bytes compressed`);
