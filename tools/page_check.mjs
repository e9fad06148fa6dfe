// The browser check behind tools/page_check.sh; see there.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdirSync, mkdtempSync, rmSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { createInterface } from "node:readline";
import { parseArgs } from "node:util";

const require = createRequire(join(process.env.PLAYWRIGHT_DIR, "package.json"));
const { chromium } = require("playwright-core");

const { values: options } = parseArgs({
  options: {
    out: { type: "string", default: "page-check" },
    url: { type: "string" },
    timeout: { type: "string", default: "300" },
  },
});
const limit = Number(options.timeout) * 1000;
const out = resolve(options.out);
mkdirSync(out, { recursive: true });

const profile = mkdtempSync(join(tmpdir(), "page-check-"));

/** Starts ds-serve on a free port; its first line says which. */
async function startServer() {
  const root = process.env.REPOSITORY;
  const program = process.env.DS_SERVE ?? join(root, "target", "release", "ds-serve");
  const models = process.env.DS_MODELS ?? join(root, "models");
  const child = spawn(program, ["--listen", "127.0.0.1:0", "--models", models, "--data", join(profile, "data")], {
    stdio: ["ignore", "pipe", "inherit"],
  });
  const ended = new Promise((_, reject) => {
    child.on("error", reject);
    child.on("exit", (code) => reject(new Error(`${program} ended with status ${code}`)));
  });
  ended.catch(() => {});
  const listening = (async () => {
    for await (const line of createInterface({ input: child.stdout })) {
      const url = line.match(/^listening on (http:\S+)$/)?.[1];
      if (url) return url;
    }
    return ended;
  })();
  return { child, url: await Promise.race([listening, ended]), ended };
}

async function untilReady(url, ended) {
  const end = Date.now() + limit;
  while (Date.now() < end) {
    const answer = await Promise.race([fetch(`${url}/readyz`).catch(() => null), ended].filter(Boolean));
    if (answer?.ok) return;
    await new Promise((next) => setTimeout(next, 250));
  }
  throw new Error(`${url} was not ready within ${limit / 1000} s`);
}

async function check(browser, url, width, scheme) {
  const name = `${width}-${scheme}`;
  const context = await browser.newContext({
    viewport: { width, height: width < 600 ? 812 : 900 },
    colorScheme: scheme,
    reducedMotion: "reduce",
  });
  const page = await context.newPage();
  const complaints = [];
  page.on("console", (message) => {
    if (["error", "warning"].includes(message.type())) complaints.push(message.text());
  });
  page.on("pageerror", (error) => complaints.push(String(error)));
  page.on("request", (request) => {
    if (!request.url().startsWith(url) && !request.url().startsWith("blob:")) {
      complaints.push(`asks elsewhere: ${request.url()}`);
    }
  });
  page.setDefaultTimeout(limit);

  await page.goto(url);
  await page.locator("#go:enabled").waitFor();
  await page.locator("#examples button").first().click();
  assert.notEqual(await page.inputValue("#prompt"), "", "the example fills the prompt");
  const arms = await page.locator("#arms > li").count();
  for (const steps of await page.getByLabel("Steps", { exact: true }).all()) await steps.fill("4");
  await page.screenshot({ path: join(out, `${name}-form.png`), fullPage: true });

  // By keyboard, as someone without a mouse would.
  await page.locator("#prompt").focus();
  await page.keyboard.press("Control+Enter");
  await page.locator('#results[data-state="done"], #results[data-state="failed"]').waitFor();
  const errors = await page.locator("#cards .error").allTextContents();
  assert.deepEqual(errors, [], "no method fails");
  const images = page.locator("#cards img");
  assert.ok((await images.count()) >= arms, "each method has an image");
  for (const image of await images.all()) {
    const [pixels, shown, alt] = await image.evaluate((e) => [e.naturalWidth, e.clientWidth, e.alt]);
    assert.ok(pixels > 0, "the image decodes");
    assert.ok(shown >= 100, `the image is shown ${shown} px wide`);
    assert.ok(alt.length > 0, "the image has a text");
  }
  const totals = await page.locator("#cards tbody tr:first-child td:last-child").allTextContents();
  assert.ok(totals.every((f) => Number(f) > 0), `each method spends: ${totals}`);
  assert.ok((await page.locator("#cards .scores dt").count()) > 0, "there are scores");
  assert.match(await page.textContent("#status"), /done in/);
  const overflow = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
  assert.ok(overflow <= 0, `the page is ${overflow} px too wide`);
  await page.screenshot({ path: join(out, `${name}-results.png`), fullPage: true });

  // Cancelling gives the rest up and the page is usable again.
  for (const steps of await page.getByLabel("Steps", { exact: true }).all()) await steps.fill("500");
  await page.click("#go");
  await page.locator('#cards [data-state="running"]').waitFor();
  await page.screenshot({ path: join(out, `${name}-running.png`), fullPage: true });
  await page.click("#cancel");
  await page.locator('#results[data-state="cancelled"]').waitFor();
  assert.equal(await page.textContent("#status"), "Cancelled.");
  assert.ok(await page.isEnabled("#go"), "one can generate again");

  // The history has what was made, finds it by its words, and uses it again.
  await page.click("#to-history");
  const past = page.locator("#history-list > li");
  await past.first().waitFor();
  assert.ok((await past.count()) >= arms, "the history has each method");
  await past.locator("img").first().evaluate((e) => e.decode());
  await page.fill("#history-q", "no such words");
  await page.keyboard.press("Enter");
  await page.getByText("Nothing here yet.").waitFor();
  await page.fill("#history-q", "");
  await page.selectOption("#history-state", "completed");
  await past.first().waitFor();
  const wide = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
  assert.ok(wide <= 0, `the history is ${wide} px too wide`);
  await page.screenshot({ path: join(out, `${name}-history.png`), fullPage: true });
  const before = await past.count();
  await past.first().getByText("Forget").click();
  await page.waitForFunction((n) => document.querySelectorAll("#history-list > li").length < n, before);
  await past.first().getByText("Use again").click();
  await page.locator("#compare-view:visible").waitFor();
  assert.equal(await page.locator("#arms > li").count(), 1, "one arm is used again");

  // The API's page shows every route.
  await page.goto(`${url}/docs`);
  await page.locator("#routes details").nth(15).waitFor();
  await page.locator("#routes details").first().click();
  await page.screenshot({ path: join(out, `${name}-api.png`) });
  await page.goto(url);
  await page.locator("#go:enabled").waitFor();

  // The form is remembered.
  const prompt = await page.inputValue("#prompt");
  await page.reload();
  await page.locator("#go:enabled").waitFor();
  assert.equal(await page.inputValue("#prompt"), prompt, "the form is remembered");
  assert.deepEqual(complaints, [], "the console is quiet");

  // Refusals are shown; from here on the browser logs failed requests itself.
  await page.fill("#prompt", " ");
  await page.click("#go");
  await page.locator("#prompt-error:visible").waitFor();
  assert.match(await page.textContent("#prompt-error"), /prompt/);
  await context.close();
  console.log(`page_check: ${name} ok, ${arms} methods, ${totals.join(" and ")} F`);
}

let server = null;
let browser = null;
try {
  if (!options.url) server = await startServer();
  const url = (options.url ?? server.url).replace(/\/$/, "");
  await untilReady(url, server?.ended);
  browser = await chromium.launch({
    executablePath: process.env.CHROMIUM,
    headless: true,
    args: [
      "--no-sandbox",
      "--disable-gpu",
      "--disable-quic",
      "--disable-dev-shm-usage",
      "--no-first-run",
      "--disable-background-networking",
      "--disable-component-update",
      "--disable-sync",
    ],
    env: { ...process.env, HOME: profile },
  });
  for (const [width, scheme] of [[1280, "light"], [1280, "dark"], [375, "light"], [375, "dark"]]) {
    await check(browser, url, width, scheme);
  }
} catch (error) {
  console.error(`page_check: ${error.stack ?? error}`);
  process.exitCode = 1;
} finally {
  await browser?.close();
  server?.child.kill("SIGTERM");
  rmSync(profile, { recursive: true, force: true });
}
