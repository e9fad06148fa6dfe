// The page: its views, and the comparison that is asked for or looked at.

import { call, follow, key, post, setKey } from "./api.js";
import { Form, byId } from "./arms.js";
import { History } from "./history.js";
import { Quality } from "./quality.js";
import { Card, clearResults, compare, seconds } from "./results.js";
import { Scrubber } from "./scrub.js";
import { Vote } from "./vote.js";

/** By name: what is done when one is opened. */
const VIEWS = {
  compare: (id) => (id ? open(id) : undefined),
  history: () => history?.load(),
  vote: () => vote.open(),
  quality: () => quality.open(),
};

let form = null;
let history = null;
/** Of the comparison that is followed. */
let running = null;
/** The id of the comparison that is shown, and of the one whose link is being followed. */
let shown = null;
let opening = null;
/** Whether the form's comparison is being sent. */
let asking = false;
const vote = new Vote();
const quality = new Quality();
const scrubber = new Scrubber();

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

/** Shows the view that the address names. */
function show() {
  const [name, id] = location.hash.slice(1).split("/");
  const view = Object.hasOwn(VIEWS, name) ? name : "compare";
  for (const other of Object.keys(VIEWS)) {
    byId(`${other}-view`).hidden = other !== view;
    if (other === view) byId(`to-${other}`).setAttribute("aria-current", "page");
    else byId(`to-${other}`).removeAttribute("aria-current");
  }
  if (form) VIEWS[view](id);
}

/** Fills the form with what a generation of the history was made with. */
async function useAgain(item) {
  try {
    const { resolved } = await call(`/generations/${encodeURIComponent(item.id)}`);
    form.use(resolved);
  } catch (problem) {
    history.say(told(problem), true);
    return;
  }
  location.hash = "#compare";
  // Now, not with the event: what is hidden takes no focus.
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
      history = new History({ models, methods }, useAgain);
      byId("go").disabled = false;
      say("Ready.");
      show();
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

/** A button that goes away hands its focus on. */
function handOver(from, to) {
  if (document.activeElement === byId(from)) byId(to).focus({ preventScroll: true });
}

/** Makes room for a comparison and gives up the one that is followed; what aborts it. */
function begin(id) {
  running?.abort();
  running = new AbortController();
  shown = id;
  byId("cancel").hidden = false;
  handOver("go", "cancel");
  byId("go").disabled = true;
  byId("progress").hidden = false;
  byId("progress").value = 0;
  byId("elapsed").textContent = "";
  byId("export").hidden = true;
  byId("results").hidden = false;
  byId("results").dataset.state = "running";
  document.body.classList.add("busy");
  clearResults();
  scrubber.clear();
  return running.signal;
}

function end(state) {
  running = null;
  document.body.classList.remove("busy");
  byId("go").disabled = false;
  handOver("cancel", "go");
  byId("cancel").hidden = true;
  byId("progress").hidden = true;
  byId("elapsed").textContent = "";
  byId("results").dataset.state = state;
}

const told = (problem) => (problem.title ? `${problem.title}: ${problem.detail}` : `The page failed: ${problem}`);

/** A problem of the whole comparison, at its field where the form has it. */
function refuse(problem) {
  if (problem.field?.endsWith("prompt")) {
    byId("prompt").setAttribute("aria-invalid", "true");
    byId("prompt-error").textContent = problem.detail;
    byId("prompt-error").hidden = false;
  }
  say(told(problem), true);
}

/** Asks for the comparison of the form. */
async function generate() {
  if (!form || running || asking) return;
  asking = true;
  opening = null;
  const before = shown;
  say("Asking.");
  let asked;
  try {
    asked = await post("/compare", form.comparison(), { Prefer: "respond-async" });
  } catch (problem) {
    refuse(problem);
    return;
  } finally {
    asking = false;
  }
  // A link was followed meanwhile; the history has this one.
  if (opening !== null || shown !== before) return;
  window.history.replaceState(null, "", `#compare/${asked.id}`);
  await watch(asked, true);
}

/** Opens a comparison of the history; of several links the last. */
async function open(id) {
  if (opening === id) return;
  opening = shown === id ? null : id;
  if (opening === null) return;
  let found;
  try {
    found = await call(`/compare/${encodeURIComponent(id)}`);
  } catch (problem) {
    if (opening !== id) return;
    opening = null;
    refuse(problem);
    return;
  }
  if (opening !== id) return;
  opening = null;
  await watch(found, false);
}

/** Lays out a comparison: a card for each arm. */
function lay(comparison, asked) {
  const quote = document.createElement("q");
  quote.textContent = comparison.prompt;
  const terms = contractText(comparison.contract);
  byId("asked").replaceChildren(quote, ` from the noise of seed ${seedOf(comparison)}${terms}`);
  const cards = comparison.arms.map((arm, index) => new Card(arm, index, comparison));
  byId("cards").style.setProperty("--across", form.across(comparison));
  byId("cards").classList.toggle("grid", form.across(comparison) > 0);
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (asked && byId("cards").getBoundingClientRect().top > innerHeight * 0.8) {
    byId("results").scrollIntoView({ behavior: calm ? "auto" : "smooth" });
  }
  return cards;
}

/** Shows a comparison and follows it to its end; `asked`: the form's, whose time is known. */
async function watch(comparison, asked) {
  const signal = begin(comparison.id);
  const start = performance.now();
  const passed = () => (performance.now() - start) / 1000;
  const timer = setInterval(() => {
    if (asked && !signal.aborted) byId("elapsed").textContent = `${passed().toFixed(1)} s`;
  }, 100);
  const address = `/compare/${encodeURIComponent(comparison.id)}`;
  try {
    const cards = lay(comparison, asked);
    const left = cards.filter((card) => ["queued", "running"].includes(card.arm.state));
    byId("progress").max = cards.length;
    byId("progress").value = cards.length - left.length;
    const one = async (card) => {
      try {
        await follow(card.arm.id, signal, (name, data) => {
          if (signal.aborted) return;
          card.tell(name, data);
          if (name === "started") say(`Running ${card.mark}, ${card.arm.label}.`);
        });
      } catch (problem) {
        // It was removed meanwhile, as the comparison will say.
        if (problem.status !== 404) throw problem;
      }
      if (!signal.aborted) byId("progress").value += 1;
    };
    // Two streams at most: a browser has six connections, which Cancel and other tabs need, too.
    const line = async () => {
      while (left.length > 0) await one(left.shift());
    };
    await Promise.all([line(), line()]);
    const ended = await call(address, { signal });
    await Promise.all(cards.map((card, index) => card.done(ended.arms[index])));
    if (signal.aborted) return;
    compare(cards);
    scrubber.fill(cards);
    const failed = cards.filter((card) => card.element.dataset.state !== "done").length;
    const cancelled = ended.arms.some((arm) => arm.state === "cancelled");
    const time = asked && failed === 0 ? ` in ${seconds(passed())}` : "";
    const all = `${cards.length - failed} of ${cards.length} done${time}.`;
    say(cancelled ? "Cancelled." : all, failed > 0 && !cancelled);
    byId("export").href = `${address}/export`;
    byId("export").hidden = Boolean(key()) || cancelled;
    end(cancelled ? "cancelled" : failed > 0 ? "failed" : "done");
  } catch (problem) {
    // Another one is shown now.
    if (signal.aborted) return;
    // The other stream ends, and the link may be tried again.
    running.abort();
    shown = null;
    say(told(problem), true);
    end("failed");
  } finally {
    clearInterval(timer);
  }
}

function seedOf(comparison) {
  const resolved = comparison.arms.map((arm) => arm.result?.resolved.seed);
  return comparison.base.seed ?? resolved.find((seed) => seed !== undefined) ?? "chosen by the server";
}

function contractText(contract) {
  if (contract?.equal_f) return `, each with ${contract.equal_f} F an image`;
  if (contract?.equal_latency_ms) return `, each with ${contract.equal_latency_ms} ms an image`;
  return "";
}

async function cancel() {
  if (!running) return;
  try {
    await call(`/compare/${encodeURIComponent(shown)}`, { method: "DELETE" });
  } catch (problem) {
    // It has ended meanwhile.
    if (problem.status !== 409) refuse(problem);
  }
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
byId("cancel").addEventListener("click", cancel);
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    if (!event.repeat) generate();
  }
});
byId("form").addEventListener("keydown", (event) => {
  // A key that is held down presses once: Generate and Cancel take turns in having the focus.
  if (event.repeat && event.key === "Enter" && event.target !== byId("prompt")) event.preventDefault();
});
byId("pixels").addEventListener("change", (event) => {
  byId("results").classList.toggle("show-pixels", event.target.checked);
});
window.addEventListener("hashchange", show);
show();
connect();
