// The playground, as a person with a browser uses it, before the real server and real containers.
import assert from "node:assert/strict";
import { mkdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { after, before, test } from "node:test";
import { eventually, openPage, startBrowser, startServer } from "./harness.mjs";

/** The most that the first load may take, in bytes as they travel. */
const FIRST_LOAD = 250_000;
/** The most that the answer to Run may take for a program whose answer is kept, in ms. */
const CACHED = 50;

const shots = new URL("../shots/", import.meta.url).pathname;
let server, browser;

before(async () => {
  mkdirSync(shots, { recursive: true });
  server = await startServer();
  browser = await startBrowser();
});
after(async () => {
  await browser?.close();
  await server?.stop();
});

const ready = (page) => page.waitForSelector("#run:not([disabled])");

async function open(options, fragment = "") {
  const page = await openPage(browser, server.base + fragment, options);
  await ready(page);
  return page;
}

async function write(page, language, code) {
  await page.selectOption("#language", language);
  await page.click(".cm-content");
  await page.keyboard.press("Control+a");
  await page.keyboard.insertText(code);
}

/** Waits for the end of a run; gives its verdict. */
async function ended(page) {
  await page.waitForSelector('#verdict:not([data-verdict="busy"]):not([data-verdict="idle"])');
  await ready(page);
  return page.textContent("#verdict");
}

async function run(page, language, code) {
  await write(page, language, code);
  await page.click("#run");
  return ended(page);
}

const output = (page) => page.textContent("#output");

test("the first load is small, from this server alone, and kept", async () => {
  const page = await openPage(browser, "about:blank");
  const cdp = await page.context().newCDPSession(page);
  await cdp.send("Network.enable");
  let bytes = 0;
  cdp.on("Network.loadingFinished", ({ encodedDataLength }) => (bytes += encodedDataLength));
  await page.goto(server.base);
  await ready(page);
  await page.waitForLoadState("networkidle");
  console.log(`first load: ${bytes} bytes, ${page.requests.length - 1} requests`);
  assert.ok(bytes > 50_000 && bytes < FIRST_LOAD, `${bytes} bytes`);
  for (const url of page.requests.slice(1)) assert.ok(url.startsWith(server.base), url);
  bytes = 0;
  await page.reload();
  await ready(page);
  assert.ok(bytes < 10_000, `${bytes} bytes when it was there before`);
  await page.done();
});

test("Run shows what the program printed, the verdict, time and memory", async () => {
  const page = await open();
  assert.equal(await run(page, "python", 'print("hello from", "python")'), "Finished");
  assert.equal(await output(page), "hello from python\n");
  assert.match(await page.textContent("#usage"), /\d m?s .*\d ms CPU.*\d [KM]iB/);
  assert.equal(await run(page, "c", '#include <stdio.h>\nint main(void) { puts("hello from C"); return 3; }'), "Exit code 3");
  assert.match(await output(page), /hello from C\n/);
  assert.equal(await run(page, "bash", "echo one; echo two >&2; kill -SEGV $$"), "Killed by SIGSEGV");
  assert.match(await output(page), /two/);
  await page.done();
});

test("a program that does not compile shows the compiler's words", async () => {
  const page = await open();
  assert.equal(await run(page, "c", "int main(void) { return nothing; }"), "Did not compile");
  assert.match(await output(page), /^Compiler.*nothing/s);
  await page.screenshot({ path: `${shots}compile-error.png` });
  await page.done();
});

test("standard input and arguments reach the program", async () => {
  const page = await open();
  await write(page, "bash", 'read -r line; printf "<%s>" "$line" "$@"');
  await page.click("summary");
  await page.fill("#stdin", "from the box\nunread");
  await page.fill("#args", `one 'two three' "four \\" five" a\\ b ''`);
  await page.click("#run");
  assert.equal(await ended(page), "Finished");
  assert.equal(await output(page), `<from the box><one><two three><four " five><a b><>`);
  assert.equal(await page.textContent("#summary"), "arguments, standard input");
  await page.done();
});

test("output is shown as it is printed", async () => {
  const page = await open();
  await write(page, "bash", "echo first; sleep 3; echo last");
  await page.click("#run");
  await eventually("the first line", async () => (await output(page)) === "first\n");
  assert.equal(await page.getAttribute("#verdict", "data-verdict"), "busy");
  assert.equal(await ended(page), "Finished");
  assert.equal(await output(page), "first\nlast\n");
  await page.done();
});

test("a program can be typed to while it runs", async () => {
  const page = await open();
  await write(page, "bash", 'read -r a; read -r b; echo "hello $a and $b"; cat; printf "\\033[32mend"');
  await page.click("summary");
  await page.fill("#stdin", "the box\n");
  await page.check("#live");
  await page.keyboard.press("Control+Enter");
  await page.waitForSelector("#line:focus");
  await page.keyboard.type("<b>me</b>");
  await page.keyboard.press("Enter");
  await eventually("its answer", async () => (await output(page)).includes("hello the box and <b>me</b>\n"));
  await page.keyboard.type("more");
  await page.keyboard.press("Enter");
  await eventually("what cat says", async () => (await output(page)).endsWith("more\nmore\n"));
  await page.screenshot({ path: `${shots}typing.png` });
  await page.setViewportSize({ width: 360, height: 740 });
  await page.screenshot({ path: `${shots}typing-phone.png`, fullPage: true });
  await page.keyboard.press("Control+d");
  assert.equal(await ended(page), "Finished");
  assert.equal(await page.textContent("#output .fg2"), "end");
  assert.ok(await page.isHidden("#prompt"));
  // Remembered; and Stop works here too.
  await page.reload();
  await ready(page);
  await page.click("#run");
  await page.waitForSelector("#prompt:not([hidden])");
  await page.click("#stop");
  assert.equal(await ended(page), "Stopped");
  await page.done();
});

test("where no socket comes through, the program is run all the same", async () => {
  const page = await open();
  await page.evaluate(() => {
    const Socket = WebSocket;
    window.WebSocket = class extends Socket {
      constructor() {
        super(new URL("/nothing", location.href.replace("http", "ws")));
      }
    };
  });
  await write(page, "bash", "cat");
  await page.click("summary");
  await page.fill("#stdin", "from the box");
  await page.check("#live");
  await page.click("#run");
  assert.equal(await ended(page), "Finished");
  assert.match(await output(page), /Nothing can be typed.*from the box/s);
  // The browser itself reports the refused socket.
  page.faults.splice(0, page.faults.length, ...page.faults.filter((fault) => !fault.includes("WebSocket connection")));
  await page.done();
});

test("Stop ends a run", async () => {
  const page = await open();
  await write(page, "python", 'import time\nfor n in range(1000):\n    print("tick", n)\n    time.sleep(0.1)\n');
  await page.click("#run");
  await page.waitForSelector('#verdict[data-verdict="busy"]');
  assert.ok(await page.isDisabled("#run"));
  await page.click("#stop");
  assert.equal(await ended(page), "Stopped");
  // The place is free again.
  assert.equal(await run(page, "python", "print(1)"), "Finished");
  await page.done();
});

test("a program whose answer is kept answers at once", async () => {
  const page = await open();
  await run(page, "python", `print("kept")`);
  const times = [];
  for (let i = 0; i < 20; i++) {
    times.push(
      await page.evaluate(async () => {
        const started = performance.now();
        document.getElementById("run").click();
        await new Promise((resolve) => {
          const wait = () => (document.getElementById("verdict").dataset.verdict === "ok" ? resolve() : setTimeout(wait, 0));
          wait();
        });
        return performance.now() - started;
      }),
    );
    await ready(page);
  }
  assert.match(await page.textContent("#usage"), /from memory$/);
  times.sort((a, b) => a - b);
  console.log(`cached: ${times[0].toFixed(1)} ms at best, ${times[10].toFixed(1)} ms in the middle`);
  // The best of twenty: others use this machine too.
  assert.ok(times[0] < CACHED, `${times[0]} ms`);
  await page.done();
});

test("the draft of each language is remembered", async () => {
  const page = await open();
  await write(page, "python", "# my draft");
  await write(page, "bash", "# another");
  await page.click("summary");
  await page.fill("#stdin", "typed");
  await page.reload();
  await ready(page);
  assert.equal(await page.inputValue("#language"), "bash");
  assert.equal(await page.textContent(".cm-line"), "# another");
  assert.equal(await page.inputValue("#stdin"), "typed");
  await page.selectOption("#language", "python");
  assert.equal(await page.textContent(".cm-line"), "# my draft");
  assert.equal(await page.inputValue("#stdin"), "");
  // An example takes its place, and undo brings it back.
  await page.selectOption("#example", { label: "Hello" });
  assert.equal(await page.textContent(".cm-line"), 'print("hello")');
  await page.focus(".cm-content");
  await page.keyboard.press("Control+z");
  assert.equal(await page.textContent(".cm-line"), "# my draft");
  await page.done();
});

test("examples of every language run", async () => {
  const page = await open();
  for (const language of ["c", "python", "bash"]) {
    await page.selectOption("#language", language);
    const titles = await page.locator("#example option").allTextContents();
    assert.ok(titles.length > 2);
    for (const title of titles.slice(1)) {
      await page.selectOption("#example", { label: title });
      await page.click("#run");
      assert.equal(await ended(page), "Finished", `${language}: ${title}`);
      assert.notEqual(await output(page), "");
    }
  }
  await page.done();
});

test("a link holds the program, and nothing of it reaches the server", async () => {
  const page = await open({ permissions: ["clipboard-read", "clipboard-write"] });
  await write(page, "bash", `cat; echo "$1" # ${"ünï ".repeat(50)}`);
  await page.click("summary");
  await page.fill("#stdin", "in\n");
  await page.fill("#args", "arg");
  await page.click("#share");
  await page.waitForSelector("#toast.shown");
  const link = await page.evaluate(() => navigator.clipboard.readText());
  assert.equal(link, page.url());
  assert.match(link, /#program=[A-Za-z0-9_-]+$/);
  // Changed, the program is no longer that of the link.
  await page.fill("#args", "other");
  assert.equal(await page.evaluate(() => location.hash), "");
  await page.done();

  const other = await openPage(browser, link);
  await ready(other);
  assert.equal(await other.inputValue("#language"), "bash");
  await other.click("#run");
  assert.equal(await ended(other), "Finished");
  assert.equal(await output(other), "in\narg\n");
  assert.ok(other.requests.slice(1).every((url) => !url.includes("program")));
  await other.done();
});

test("damaged links and those that unpack to too much are refused", async () => {
  const bomb = await (await open()).evaluate(async () => {
    const bytes = new Blob([`{"language":"bash","code":"${"a".repeat(1 << 26)}"}`]);
    const packed = await new Response(bytes.stream().pipeThrough(new CompressionStream("deflate-raw"))).arrayBuffer();
    let text = "";
    for (const byte of new Uint8Array(packed)) text += String.fromCharCode(byte);
    return btoa(text).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
  });
  for (const fragment of ["#program=%%%", "#program=AAAA", `#program=${bomb}`]) {
    const page = await openPage(browser, server.base + fragment);
    await ready(page);
    await page.waitForSelector("#toast.shown");
    assert.match(await page.textContent("#toast"), /damaged/);
    assert.equal(await run(page, "bash", "echo still here"), "Finished");
    await page.done();
  }
});

test("what a hostile program prints is text", async () => {
  const page = await open();
  const printed = [
    `<img src=x onerror="window.pwned=1"><script>window.pwned=1</script><a href="javascript:pwned=1">x</a>`,
    "\\033]0;title\\007", "\\033]8;;http://example.org\\033\\\\link\\033]8;;\\033\\\\", "\\033[2J\\033[H\\033[?1049h\\033[6n",
    "\\033[31mred\\033[0m", "\\033[38;2;1;2;3mtrue\\033[m", "\\033P$q\\033\\\\", "\\033]0;never ended", "\\nafter\\n",
    "\\xe2\\x80\\xaeturned", "\\001\\010\\377", "\\033[999999999999999999999999999999999999999999999999999999999999999999mlong",
  ];
  assert.equal(await run(page, "bash", `printf '${printed.join("").replaceAll("'", "'\\''")}'`), "Finished");
  const text = await output(page);
  assert.ok(text.startsWith(`<img src=x onerror="window.pwned=1"><script>`), text);
  assert.ok(text.includes(`x</a>linkredtrue\nafter\n<U+202E>turned\u2401\u2408\ufffd`), JSON.stringify(text));
  assert.ok(!/[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]/.test(text), JSON.stringify(text));
  assert.equal(await page.locator("#output img, #output script, #output a").count(), 0);
  assert.equal(await page.evaluate(() => window.pwned), undefined);
  assert.match(await page.title(), /playground/);
  assert.equal(await page.textContent("#output .fg1"), "red");
  await page.screenshot({ path: `${shots}hostile.png` });
  await page.done();
});

test("endless output is bounded, on the page too", async () => {
  const page = await open();
  const code = "import sys\nfor n in range(10**9):\n    sys.stdout.write('\\033[3%dm%d' % (n % 8, n))\n";
  assert.match(await run(page, "python", code), /^(Too much output|Out of time)$/);
  const { nodes, length } = await page.evaluate(() => {
    const output = document.getElementById("output");
    return { nodes: output.querySelectorAll("*").length, length: output.textContent.length };
  });
  assert.ok(nodes > 100 && nodes < 5_000, `${nodes} elements`);
  assert.ok(length < 1_100_000, `${length} characters`);
  assert.match(await output(page), /too long/);
  await page.done();
});

test("everything works by keyboard, and the focus can be seen", async () => {
  const page = await open();
  const focus = () =>
    page.evaluate(() => {
      let element = document.activeElement;
      const { outlineStyle, outlineWidth } = getComputedStyle(element);
      const seen = element.id === "editor" || (outlineStyle !== "none" && parseFloat(outlineWidth) >= 2);
      return { id: element.id || element.tagName, seen };
    });
  const order = [];
  for (let i = 0; i < 12; i++) {
    await page.keyboard.press("Tab");
    const { id, seen } = await focus();
    assert.ok(seen, `the focus on ${id} cannot be seen`);
    order.push(id);
    // Tab indents in the editor, until Escape.
    if (id === "editor") await page.keyboard.press("Escape");
    if (id === "output") break;
  }
  assert.deepEqual(order, ["language", "example", "share", "theme", "run", "editor", "SUMMARY", "output"]);

  await page.focus("#language");
  await page.keyboard.type("Bash");
  assert.equal(await page.inputValue("#language"), "bash");
  await page.focus(".cm-content");
  await page.keyboard.press("Control+a");
  await page.keyboard.insertText("echo by keyboard; sleep 60");
  await page.keyboard.press("Control+Enter");
  await page.waitForSelector('#verdict[data-verdict="busy"]');
  await page.focus("#stop");
  await page.keyboard.press("Enter");
  assert.equal(await ended(page), "Stopped");
  assert.equal((await focus()).id, "run");
  await page.focus(".cm-content");
  await page.keyboard.press("Control+a");
  await page.keyboard.insertText("echo again");
  await page.keyboard.press("Escape");
  await page.keyboard.press("Tab");
  await page.keyboard.press("Enter");
  assert.ok(await page.isVisible("#stdin"));
  await page.keyboard.press("Control+Enter");
  assert.equal(await ended(page), "Finished");
  // What a screen reader is told.
  assert.match(await page.textContent("#status"), /^Finished\. .*Output: again$/);
  await page.done();
});

const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

for (const colorScheme of ["light", "dark"]) {
  for (const [size, viewport] of [["desk", { width: 1280, height: 760 }], ["phone", { width: 360, height: 740 }]]) {
    test(`it is legible and fits: ${colorScheme}, ${size}`, async () => {
      const page = await open({ colorScheme, viewport, hasTouch: size === "phone" });
      assert.equal(await page.evaluate(() => document.documentElement.dataset.theme), colorScheme);
      await page.selectOption("#language", "python");
      await page.selectOption("#example", { label: "Colours" });
      await page.click("#run");
      await ended(page);
      await page.screenshot({ path: `${shots}${colorScheme}-${size}.png`, fullPage: true });
      await run(page, "python", "import sys\nprint('so far')\nprint('a warning', file=sys.stderr)\nclass A:\n    def f(self, x: int = 1): return f'{x}' # note\nA().g()\n");
      await page.click("summary");
      await page.screenshot({ path: `${shots}${colorScheme}-${size}-failed.png`, fullPage: true });
      const width = await page.evaluate(() => document.documentElement.scrollWidth);
      assert.ok(width <= viewport.width, `${width} wide`);
      await page.evaluate(axe);
      const { violations } = await page.evaluate(() => axe.run());
      assert.deepEqual(violations.map(({ id, nodes }) => `${id}: ${nodes.map(({ html }) => html).join(" ")}`), []);
      await page.done();
    });
  }
}

for (const colorScheme of ["light", "dark"]) {
  test(`the description of the API is legible and fits: ${colorScheme}`, async () => {
    const page = await openPage(browser, `${server.base}docs`, { colorScheme, viewport: { width: 360, height: 740 } });
    await page.screenshot({ path: `${shots}docs-${colorScheme}-phone.png` });
    const width = await page.evaluate(() => document.documentElement.scrollWidth);
    assert.ok(width <= 360, `${width} wide`);
    await page.setViewportSize({ width: 1280, height: 760 });
    await page.click("summary");
    await page.screenshot({ path: `${shots}docs-${colorScheme}.png` });
    await page.evaluate(axe);
    const { violations } = await page.evaluate(() => axe.run());
    assert.deepEqual(violations.map(({ id, nodes }) => `${id}: ${nodes.map(({ html }) => html).join(" ")}`), []);
    assert.ok(page.requests.every((url) => url.startsWith(server.base)), page.requests.join(" "));
    await page.done();
  });
}

test("the toggle changes the colours, and is remembered", async () => {
  const page = await open({ colorScheme: "light" });
  const theme = () => page.evaluate(() => document.documentElement.dataset.theme);
  await page.click("#theme");
  assert.equal(await theme(), "dark");
  assert.equal(await page.getAttribute("#theme", "aria-pressed"), "true");
  await page.reload();
  await ready(page);
  assert.equal(await theme(), "dark");
  await page.click("#theme");
  assert.equal(await theme(), "light");
  // Back at the system's choice, which is followed.
  await page.emulateMedia({ colorScheme: "dark" });
  await eventually("the system's colours", async () => (await theme()) === "dark");
  await page.done();
});

test("a server that is gone is said to be", async () => {
  const page = await open();
  await page.route("**/api/v2/execute", (route) => route.abort());
  await page.click("#run");
  await page.waitForSelector('#verdict[data-verdict="bad"]');
  assert.match(await output(page), /cannot be reached/);
  // The browser itself reports the refused request.
  page.faults.splice(0, page.faults.length, ...page.faults.filter((fault) => !fault.includes("ERR_FAILED")));
  await page.unroute("**/api/v2/execute");
  await page.click("#run");
  assert.equal(await ended(page), "Finished");
  await page.done();
});
