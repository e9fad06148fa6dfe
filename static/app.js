// The page: lists what the server has, posts one request per arm, one after
// the other so that their seconds can be compared, and shows what comes back.

import { Form, byId, letter } from "./arms.js";
import { Card, clearResults, compare, seconds } from "./results.js";

let form = null;
let running = null;

function say(text, bad = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("bad", bad);
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Fetches JSON; anything but success is thrown as a problem. */
async function call(path, init) {
  let response;
  try {
    response = await fetch(path, init);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw { title: "The server did not answer", detail: "Is it still running?", status: 0 };
  }
  const body = await response.json().catch(() => null);
  if (response.ok && body) return body;
  const problem = {
    title: body?.title ?? `The server answered ${response.status}`,
    detail: body?.detail ?? response.statusText,
    field: body?.field,
    status: response.status,
  };
  const retry = Number(response.headers.get("retry-after"));
  if (retry > 0 && !problem.detail.includes("try again")) {
    problem.detail += ` (try again in ${retry} s)`;
  }
  throw problem;
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
      byId("go").disabled = false;
      say("Ready.");
      return;
    } catch (problem) {
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
    const answer = await call("/generate", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(card.body),
      signal,
    });
    card.done(answer, (performance.now() - began) / 1000);
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
connect();
