// Tests a running server with the published client piston-client, used as in its documentation.
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [server, modules] = process.argv.slice(2);
const resolved = createRequire(`${modules}/`).resolve("piston-client");
const { piston } = await import(pathToFileURL(resolved));
const client = piston({ server });

const runtimes = await client.runtimes();
assert.deepEqual(runtimes.map((runtime) => runtime.language), ["python", "c"]);

let answer = await client.execute("python", "import sys; print(sys.argv[1:])");
assert.equal(answer.run.stdout, "['1', '2', '3']\n", JSON.stringify(answer));
assert.deepEqual([answer.language, answer.version, answer.run.code], ["python", "3.0.0", 0]);

answer = await client.execute({
  language: "python",
  version: "3.x",
  files: [{ name: "my_cool_code.py", content: "print(input())" }],
  stdin: "typed",
  args: [],
  runTimeout: 25000,
});
assert.equal(answer.run.output, "typed\n", JSON.stringify(answer));

answer = await client.execute("c", "int main(void) { return x; }");
assert.notEqual(answer.compile.code, 0);
assert.equal(answer.run, undefined);

answer = await client.execute("cobol", "");
assert.match(answer.message, /runtime is unknown/);
console.log("piston-client: all checks passed");
