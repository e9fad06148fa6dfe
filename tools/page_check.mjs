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
const axe = require("axe-core");

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
  const child = spawn(program, ["--listen", "127.0.0.1:0", "--models", models, "--data", join(profile, "data"),
    "--sweeps", join(root, "docs", "results")], {
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

/** Nothing that the rules of WCAG find serious. */
async function accessible(page, what) {
  await page.evaluate(axe.source);
  const { violations } = await page.evaluate(() => globalThis.axe.run(document, { resultTypes: ["violations"] }));
  const serious = violations.filter(({ impact }) => ["serious", "critical"].includes(impact));
  const say = ({ id, help, nodes }) => `${id}: ${help}: ${nodes.slice(0, 3).map((node) => node.html).join(" ")}`;
  assert.deepEqual(serious.map(say), [], `${what} is accessible`);
}

async function narrow(page, what) {
  const over = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
  assert.ok(over <= 0, `${what} is ${over} px too wide`);
}

/** All methods go back together, and forward to their images. */
async function scrub(page, out, name) {
  const images = page.locator("#cards figure img");
  const sources = () => images.evaluateAll((all) => all.map((image) => image.src));
  const finals = await sources();
  await page.locator("#scrub").focus();
  await page.keyboard.press("Home");
  assert.ok((await page.locator("#cards figure.unborn").count()) > 0, "nothing is there at the beginning");
  const most = Number(await page.getAttribute("#scrub", "max"));
  await page.locator("#scrub").fill(String(Math.floor(most / 2)));
  await page.waitForFunction((before) => [...document.querySelectorAll("#cards figure img")].some((i, n) => i.src !== before[n]), finals);
  for (const image of await images.all()) await image.evaluate((e) => e.decode());
  await page.screenshot({ path: join(out, `${name}-scrub.png`), fullPage: true });
  await page.keyboard.press("End");
  assert.deepEqual(await sources(), finals, "the end has the images");
  assert.ok((await page.locator("#cards .trace polyline").count()) > 0, "rewards are drawn");
}

/** The same image of every method, one key away. */
async function zoom(page, out, name) {
  await page.locator("#cards .look").first().click();
  const first = await page.getAttribute("#zoom-image", "src");
  await page.keyboard.press("ArrowRight");
  assert.notEqual(await page.getAttribute("#zoom-image", "src"), first, "another method is shown");
  await page.keyboard.press("ArrowLeft");
  assert.equal(await page.getAttribute("#zoom-image", "src"), first);
  await page.keyboard.press("+");
  await page.screenshot({ path: join(out, `${name}-zoom.png`) });
  await page.keyboard.press("Escape");
  await page.locator("#zoom:visible").waitFor({ state: "detached" }).catch(() => {});
}

const focused = (page) => page.evaluate(() => document.activeElement.id);

function post(url, path, body) {
  return fetch(`${url}${path}`, {
    method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body),
  });
}

/** More arms than a browser has connections: Cancel still reaches the server. */
async function cancelMany(page) {
  while ((await page.locator("#arms > li").count()) < 7) await page.click("#add");
  for (const method of await page.getByLabel(/^Method of /).all()) await method.selectOption("plain");
  for (const steps of await page.getByLabel("Steps", { exact: true }).all()) await steps.fill("500");
  await page.click("#go");
  await page.locator('#cards [data-state="running"]').first().waitFor();
  await page.click("#cancel");
  await page.locator('#results[data-state="cancelled"]').waitFor();
  assert.equal(await page.locator('#cards [data-state="cancelled"]').count(), 7, "no method waits for another's end");
}

/** A comparison of which an arm was forgotten shows the other one. */
async function forgotten(page, url, name) {
  const base = { prompt: `a blue ring and ${name}`, seed: 3, steps: 3 };
  const answer = await post(url, "/compare", { base, arms: [{}, { method: "best-of-n" }] });
  assert.equal(answer.status, 200);
  const { id } = await answer.json();
  const gone = await fetch(`${url}/history/${id}.0`, { method: "DELETE" });
  assert.equal(gone.status, 204);
  await page.evaluate((to) => { location.hash = to; }, `#compare/${id}`);
  await page.getByText("1 of 2 done.").waitFor();
  assert.match(await page.locator("#cards article").first().textContent(), /was removed/);
  assert.equal(await page.locator("#cards figure img").count(), 1, "the other method has its image");
}

/** A link that leads nowhere is said and leaves the form usable; a double click asks once. */
async function linksAndClicks(page, url, name) {
  await page.evaluate(() => { location.hash = "#compare/nothing"; });
  await page.getByText("there is no comparison nothing").waitFor();
  const prompt = `a red circle and ${name} ${Date.now()}`;
  await page.fill("#prompt", prompt);
  // A slow answer, so that the second click comes before it.
  await page.route("**/compare", async (route) => {
    await new Promise((next) => setTimeout(next, 300));
    await route.continue();
  });
  await page.dblclick("#go");
  await page.locator('#results[data-state="done"]').waitFor();
  await page.unroute("**/compare");
  const { comparisons } = await (await fetch(`${url}/compare?q=${encodeURIComponent(prompt)}`)).json();
  assert.equal(comparisons.length, 1, "a double click asks once");
}

async function groups(url) {
  return (await (await fetch(`${url}/leaderboard`)).json()).groups;
}

/** Votes of other people until both methods have won once: their table has rows, and separates nothing. */
async function others(url, name, player) {
  const drawn = async () => (await groups(url)).some(({ players, rows }) => rows.length > 0 && players.some(player));
  for (let i = 0; !(await drawn()); i += 1) {
    assert.ok(i < 60, "votes for both sides make a table");
    const ballot = await post(url, "/ballots", { voter: `${name}-${i}` });
    assert.equal(ballot.status, 201, "everybody finds something to vote on");
    const { token } = await ballot.json();
    const vote = await post(url, "/votes", { token, choice: "left" });
    assert.equal(vote.status, 201, await vote.text());
  }
}

/** A comparison at equal cost, votes on it by keyboard, and the table. */
async function vote(page, url, out, name) {
  // Methods of its own, which nobody has voted on.
  const guidance_rescale = ((await groups(url)).length + 1) / 100;
  const body = {
    base: { prompt: `a red circle and ${name}`, seed: 3, n: 2, steps: 3 },
    arms: [{ guidance_rescale }, { guidance_rescale, method: { name: "best-of-n" } }],
    contract: { equal_f: 12 },
  };
  const answer = await post(url, "/compare", body);
  assert.equal(answer.status, 200, await answer.text());
  await page.click("#to-vote");
  await page.locator("#ballot:visible").waitFor();
  for (const side of ["left", "right"]) await page.locator(`#vote-${side}`).evaluate((e) => e.decode());
  assert.doesNotMatch(await page.textContent("#ballot"), /plain|best-of-n/, "nothing says who made what");
  await page.screenshot({ path: join(out, `${name}-ballot.png`), fullPage: true });
  await accessible(page, "the ballot");
  for (const key of ["1", "3"]) {
    await page.locator("#vote-title").click();
    await page.keyboard.press(key);
    await page.locator("#vote-next:visible").waitFor();
    assert.match(await page.textContent("#ballot"), /plain|best-of-n/, "who made it is told");
    await page.screenshot({ path: join(out, `${name}-vote.png`), fullPage: true });
    await page.keyboard.press("Enter");
    await Promise.race([page.locator("#vote-next:visible").waitFor({ state: "detached" }), page.waitForTimeout(300)]);
    if (!(await page.locator("#ballot").isVisible())) break;
  }
  assert.match(await page.textContent("#leaderboard"), /votes/);
  await others(url, name, (player) => player.includes(guidance_rescale));
  await page.reload();
  await page.locator("#leaderboard tbody tr:visible").first().waitFor();
  assert.match(await page.textContent("#leaderboard"), /Cannot separate/, "few votes separate nothing");
  await page.screenshot({ path: join(out, `${name}-leaderboard.png`), fullPage: true });
  await accessible(page, "the leaderboard");
  await narrow(page, "voting");
}

/** The sweeps that are shipped. */
async function quality(page, out, name) {
  await page.click("#to-quality");
  await page.locator("#plots .dot").first().waitFor();
  await page.locator("#plots .dot").first().focus();
  assert.match(await page.locator("#plots .told").first().textContent(), /images/, "a point has its numbers");
  const points = await page.locator("#plots .dot").count();
  await page.locator("#quality-legend input").first().uncheck();
  assert.ok((await page.locator("#plots .dot").count()) < points, "a method can be left out");
  await page.locator("#quality-legend input").first().check();
  await page.screenshot({ path: join(out, `${name}-quality.png`), fullPage: true });
  await accessible(page, "quality");
  await narrow(page, "quality");
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
  const images = page.locator("#cards figure img");
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

  await scrub(page, out, name);
  await zoom(page, out, name);
  await accessible(page, "results");

  // Cancelling gives the rest up and the page is usable again.
  for (const steps of await page.getByLabel("Steps", { exact: true }).all()) await steps.fill("500");
  await page.click("#go");
  await page.locator('#cards [data-state="running"]').waitFor();
  await page.screenshot({ path: join(out, `${name}-running.png`), fullPage: true });
  await page.click("#cancel");
  await page.locator('#results[data-state="cancelled"]').waitFor();
  await page.getByText("Cancelled.").waitFor();
  assert.ok(await page.isEnabled("#go"), "one can generate again");
  assert.equal(await focused(page), "go", "Generate has the focus of Cancel");
  await cancelMany(page);
  await page.selectOption("#contract", "equal_f");

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
  await accessible(page, "history");
  const before = await past.count();
  // Asked by a double click, it still waits for its answer.
  await past.first().getByText("Forget").dblclick();
  await past.first().getByText("Really?").click();
  await page.waitForFunction((n) => document.querySelectorAll("#history-list > li").length < n, before);
  await past.first().getByText("Use again").click();
  await page.locator("#compare-view:visible").waitFor();
  assert.equal(await page.locator("#arms > li").count(), 1, "one arm is used again");
  assert.equal(await page.getByLabel("Steps", { exact: true }).inputValue(), "4", "with its steps");
  assert.equal(await page.inputValue("#contract"), "", "and no contract");
  assert.equal(await focused(page), "prompt");

  await forgotten(page, url, name);
  await vote(page, url, out, name);
  await quality(page, out, name);

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
  await linksAndClicks(page, url, name);
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
