// A server under test and a browser before it. Every wait has a deadline, generous enough for a busy machine.
import assert from "node:assert/strict";
import { execFileSync, spawn } from "node:child_process";
import { readFileSync } from "node:fs";
import { createServer } from "node:http";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";

/** How long anything may take that should take a moment, in ms. */
export const PATIENCE = 90_000;

const path = (relative) => fileURLToPath(new URL(relative, import.meta.url));

/** Starts a server; resolves once all its languages are ready. */
export async function startServer(env = {}) {
  const executable = process.env.CODERUNNER_TEST_EXE;
  assert.ok(executable, "CODERUNNER_TEST_EXE names no executable: call make test-web");
  const instance = `web-${process.pid}`;
  const child = spawn(path("serve"), [executable, instance], {
    env: { ...process.env, CODERUNNER_CONTAINERS: "6", NO_COLOR: "1", ...env },
    stdio: ["ignore", "ignore", "pipe"],
  });
  let log = "";
  const exited = new Promise((resolve) => child.on("exit", (code, signal) => resolve(code ?? signal)));
  const address = await new Promise((resolve, reject) => {
    const late = setTimeout(() => reject(new Error(`the server does not listen:\n${log}`)), PATIENCE);
    child.stderr.on("data", (chunk) => {
      log += chunk;
      const found = /listening.*?(127\.0\.0\.1:\d+)/.exec(log.replace(/\x1b\[[0-9;]*m/g, ""));
      if (found) {
        clearTimeout(late);
        resolve(found[1]);
      }
    });
    exited.then((status) => reject(new Error(`the server ended with ${status}:\n${log}`)));
  });
  const base = `http://${address}/`;
  await eventually("every language is ready", async () => {
    const { languages } = await (await fetch(`${base}readyz`)).json();
    return Object.values(languages).every(({ ready }) => ready);
  });
  return {
    base,
    log: () => log,
    async stop() {
      child.kill("SIGTERM");
      assert.equal(await exited, 0, log);
      const label = `label=io.coderunner.instance=${instance}`;
      const left = execFileSync(path("../../packaging/dev/as-user"), ["podman", "ps", "--all", "--quiet", "--filter", label]);
      assert.equal(left.toString(), "", "containers are left");
    },
  };
}

/** A page of somebody else's, on an origin of its own: `RUNNER` in it is the server's address. */
export async function startSite(file, base) {
  const text = readFileSync(path(file), "utf8").replaceAll("RUNNER", base.slice(0, -1)).replaceAll("http://127.0.0.1:8080", base.slice(0, -1));
  const site = createServer((_, response) => {
    response.setHeader("Content-Type", "text/html; charset=utf-8");
    response.end(text);
  });
  await new Promise((resolve) => site.listen(0, "127.0.0.1", resolve));
  return { url: `http://127.0.0.1:${site.address().port}/`, stop: () => site.close() };
}

export function startBrowser() {
  return chromium.launch({
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    args: [
      "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
      "--disable-component-update", "--disable-sync",
    ],
  });
}

/** A page in a profile of its own; what is against the policy, and every error, is in `faults`. */
export async function openPage(browser, url, options = {}) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 760 }, ...options });
  context.setDefaultTimeout(PATIENCE);
  const page = await context.newPage();
  const faults = [];
  const requests = [];
  page.on("pageerror", (error) => faults.push(String(error)));
  page.on("console", (message) => {
    if (["error", "warning"].includes(message.type())) faults.push(message.text());
  });
  page.on("request", (request) => requests.push(request.url()));
  await page.addInitScript(() => {
    addEventListener("securitypolicyviolation", (event) => console.error(`policy: ${event.violatedDirective} ${event.blockedURI} ${event.sample}`));
  });
  await page.goto(url);
  return Object.assign(page, {
    faults,
    requests,
    async done() {
      assert.deepEqual(faults, []);
      await context.close();
    },
  });
}

/** Asks until it is so. */
export async function eventually(what, holds) {
  const deadline = Date.now() + PATIENCE;
  for (;;) {
    if (await holds().catch(() => false)) return;
    assert.ok(Date.now() < deadline, `not in time: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}
