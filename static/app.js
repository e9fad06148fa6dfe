// The page: lists what the server has, posts one request per arm, one after
// the other so that their seconds can be compared, and shows what comes back.

import { call, generate as ask, key, setKey } from "./api.js";
import { Form, byId, letter } from "./arms.js";
import { History } from "./history.js";
import { Card, clearResults, compare, seconds } from "./results.js";

let form = null;
let history = null;
let running = null;

function say(text, bad = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("bad", bad);
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Asks for the key that the server wants; resolves when there is one to try. */
function askForKey(detail) {
  const dialog = byId("key-dialog");
  byId("key-error").textContent = key() ? detail : "";
  byId("key-error").hidden = !key();
  byId("key").value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      setKey(byId("key").value.trim());
      resolve();
    }, { once: true });
  });
}

/** Shows one view; the address says which. */
function show() {
  const view = location.hash === "#history" ? "history" : "compare";
  for (const name of ["compare", "history"]) {
    byId(`${name}-view`).hidden = name !== view;
    if (name === view) byId(`to-${name}`).setAttribute("aria-current", "page");
    else byId(`to-${name}`).removeAttribute("aria-current");
  }
  if (view === "history") history?.load();
}

/** Fills the form with what was asked for before. */
function useAgain(item) {
  form.use(item);
  location.hash = "#compare";
  show();
  byId("prompt").focus();
}

async function connect() {
  for (;;) {
    try {
      const [{ models, limits }, { methods }, { rewards }] = await Promise.all(
        ["/models", "/methods", "/rewards"].map((path) => call(path)),
      );
      if (models.length === 0 || methods.length === 0) {
        say("The server has no model.", true);
        return;
      }
      form = new Form({ models, limits, methods, rewards }, () => {});
      history = new History(methods, useAgain);
      show();
      byId("go").disabled = false;
      say("Ready.");
      return;
    } catch (problem) {
      if (problem.status === 401) {
        await askForKey(problem.detail);
        continue;
      }
      say(`${problem.title}: ${problem.detail}`, problem.status !== 503);
      await pause(1500);
    }
  }
}

function begin() {
  running = new AbortController();
  byId("go").disabled = true;
  byId("cancel").hidden = false;
  byId("progress").hidden = false;
  byId("results").hidden = false;
  byId("results").dataset.state = "running";
  document.body.classList.add("busy");
  clearResults();
}

function end(state) {
  running = null;
  document.body.classList.remove("busy");
  byId("go").disabled = false;
  byId("cancel").hidden = true;
  byId("progress").hidden = true;
  byId("elapsed").textContent = "";
  byId("results").dataset.state = state;
}

/** Runs one arm; true unless it failed. */
async function runArm(card, signal, start) {
  const began = performance.now();
  card.state("running");
  const timer = setInterval(() => {
    const now = performance.now();
    card.tick((now - began) / 1000);
    byId("elapsed").textContent = `${((now - start) / 1000).toFixed(1)} s`;
  }, 100);
  try {
    const answer = await ask(card.body, signal, (name, data) => card.tell(name, data));
    await card.done(answer, (performance.now() - began) / 1000);
    return true;
  } catch (problem) {
    if (signal.aborted) throw problem;
    card.failed(problem.title ? problem : { title: "The page failed", detail: String(problem) });
    if (problem.field === "prompt") {
      byId("prompt").setAttribute("aria-invalid", "true");
      byId("prompt-error").textContent = problem.detail;
      byId("prompt-error").hidden = false;
    }
    return false;
  } finally {
    clearInterval(timer);
  }
}

async function generate() {
  if (!form || running) return;
  begin();
  const { signal } = running;
  const start = performance.now();
  const bodies = form.requests();
  const shared = bodies[0];
  const quote = document.createElement("q");
  quote.textContent = shared.prompt;
  byId("asked").replaceChildren(quote, ` from the noise of seed ${shared.seed}`);
  const cards = bodies.map((body, index) => new Card(body, index));
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (byId("cards").getBoundingClientRect().top > innerHeight * 0.8) {
    byId("results").scrollIntoView({ behavior: calm ? "auto" : "smooth" });
  }
  byId("progress").max = cards.length;
  byId("progress").value = 0;
  let failed = 0;
  try {
    for (const [index, card] of cards.entries()) {
      const name = `${letter(index)}, ${card.body.method.name}`;
      say(`Running ${name}: ${index + 1} of ${cards.length}.`);
      if (!(await runArm(card, signal, start))) failed += 1;
      byId("progress").value = index + 1;
      compare(cards);
    }
    const time = seconds((performance.now() - start) / 1000);
    const ok = cards.length - failed;
    say(failed > 0 ? `${failed} of ${cards.length} failed.` : `${ok} of ${cards.length} done in ${time}.`, failed > 0);
    end(failed > 0 ? "failed" : "done");
  } catch (error) {
    for (const card of cards) {
      if (!["done", "failed"].includes(card.element.dataset.state)) card.cancelled();
    }
    say(signal.aborted ? "Cancelled." : `The page failed: ${error}`, !signal.aborted);
    end("cancelled");
  }
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
byId("cancel").addEventListener("click", () => {
  running?.abort();
  byId("go").focus();
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    generate();
  }
});
byId("pixels").addEventListener("change", (event) => {
  byId("results").classList.toggle("show-pixels", event.target.checked);
});
window.addEventListener("hashchange", show);
show();
connect();
