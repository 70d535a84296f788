// embed.js on pages of others, on origins of their own.
import assert from "node:assert/strict";
import { mkdirSync } from "node:fs";
import { after, before, test } from "node:test";
import { openPage, startBrowser, startServer, startSite } from "./harness.mjs";

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

/** Runs the block and gives what is under it. */
async function run(page, index) {
  const block = page.locator(".coderunner").nth(index);
  await block.locator("button").click();
  await block.locator(".status[data-look=ok], .status[data-look=bad]").waitFor();
  return { status: await block.locator(".status").textContent(), output: await block.locator(".output").textContent() };
}

test("an mdBook page, with a policy of its own", async () => {
  const site = await startSite("pages/mdbook.html", server.base);
  const page = await openPage(browser, site.url);
  await page.waitForSelector(".coderunner");
  assert.equal(await page.locator(".coderunner").count(), 5);
  // Hidden lines are part of the program, the page's buttons are not.
  const first = await run(page, 0);
  assert.equal(first.output, "first\nhidden\na < b\n");
  assert.match(first.status, /^Finished · /);
  assert.match((await run(page, 1)).output, /from C\n$/);
  const broken = await run(page, 2);
  assert.match(broken.status, /^Did not compile/);
  assert.match(broken.output, /nothing/);
  const hostile = await run(page, 3);
  assert.equal(hostile.output, `<img src=x onerror="window.pwned=1">red\n`);
  assert.equal(await page.evaluate(() => window.pwned), undefined);
  assert.equal(await page.locator(".coderunner .output img").count(), 0);
  // Docusaurus breaks lines by elements alone.
  assert.equal((await run(page, 4)).output, "a\nb\n");
  await page.screenshot({ path: `${shots}mdbook.png`, fullPage: true });
  await page.done();
  site.stop();
});

test("a program can be stopped, and blocks that come later have buttons too", async () => {
  const site = await startSite("../../packaging/embed/index.html", server.base);
  const page = await openPage(browser, site.url);
  await page.waitForSelector(".coderunner");
  assert.equal(await page.locator(".coderunner").count(), 2);
  assert.match((await run(page, 0)).output, /hello from C\n$/);
  assert.equal((await run(page, 1)).output, "1 1\n2 4\n3 9\n");
  await page.emulateMedia({ colorScheme: "dark" });
  await page.screenshot({ path: `${shots}embed-dark.png`, fullPage: true });
  await page.evaluate(() => {
    const pre = document.createElement("pre");
    const code = document.createElement("code");
    code.className = "language-bash";
    code.textContent = "echo begun; sleep 60";
    pre.append(code);
    document.body.append(pre);
  });
  const block = page.locator(".coderunner").nth(2);
  await block.locator("button").click();
  await block.locator("button", { hasText: "Stop" }).click();
  await block.locator(".status", { hasText: "Stopped" }).waitFor();
  await block.locator("button", { hasText: "Run" }).waitFor();
  await page.done();
  site.stop();
});
