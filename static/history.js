// The history: what was generated and compared here, searched, used again, forgotten.

import { call, imageSource, key } from "./api.js";
import { byId, make } from "./arms.js";

const PAGE = 24;
const STATES = ["completed", "queued", "running", "failed", "cancelled"];
const FILTERS = { q: "history-q", model: "history-model", adapter: "history-adapter", method: "history-method", state: "history-state" };

const when = (ms) => new Date(ms).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });

function describe(item) {
  const parts = [item.method.name];
  if (item.adapter) parts.push(`adapter ${item.adapter}`);
  parts.push(`${item.actual?.f ?? item.planned.f} F`, `seed ${item.seed}`);
  return parts.join(" · ");
}

export class History {
  /** `use` gets a generation as it is listed, to ask for it again. */
  constructor({ models, methods }, use) {
    this.use = use;
    this.next = null;
    this.turn = 0;
    this.urls = [];
    const fill = (id, names, all) => byId(id).replaceChildren(
      ...["", ...names].map((name) => make("option", { value: name, textContent: name || all })));
    const adapters = new Set(models.flatMap((m) => m.adapters));
    fill("history-model", models.map((m) => m.id), "every model");
    byId("history-model-field").hidden = models.length < 2;
    fill("history-adapter", adapters, "any or none");
    fill("history-method", methods.map((m) => m.name), "every method");
    fill("history-state", STATES, "every state");
    byId("history-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.load();
    });
    for (const id of Object.values(FILTERS).slice(1)) byId(id).addEventListener("change", () => this.load());
    byId("history-more").addEventListener("click", () => this.append());
    byId("history-list").addEventListener("keydown", (event) => {
      // A key that is held down answers once.
      if (event.repeat && event.key === "Enter") event.preventDefault();
    });
  }

  /** Shows the first page. */
  load() {
    this.turn += 1;
    this.next = null;
    for (const url of this.urls.splice(0)) URL.revokeObjectURL(url);
    byId("history-list").replaceChildren();
    this.comparisons();
    return this.append();
  }

  async append() {
    const query = new URLSearchParams({ limit: PAGE });
    for (const [name, id] of Object.entries(FILTERS)) {
      if (byId(id).value.trim()) query.set(name, byId(id).value.trim());
    }
    if (this.next) query.set("before", this.next);
    const turn = this.turn;
    try {
      const { generations, next } = await call(`/generations?${query}`);
      // Another search has begun meanwhile.
      if (turn !== this.turn) return;
      this.next = next;
      byId("history-list").append(...generations.map((item) => this.card(item)));
      byId("history-more").hidden = !next;
      this.say(byId("history-list").children.length === 0 ? "Nothing here yet." : "");
    } catch (problem) {
      this.say(`${problem.title}: ${problem.detail}`, true);
    }
  }

  /** The newest comparisons with these words. */
  async comparisons() {
    const query = new URLSearchParams({ limit: PAGE });
    if (byId("history-q").value.trim()) query.set("q", byId("history-q").value.trim());
    const turn = this.turn;
    try {
      const { comparisons } = await call(`/compare?${query}`);
      if (turn !== this.turn) return;
      byId("comparison-list").replaceChildren(...comparisons.map((item) =>
        make("li", {}, make("a", { href: `#compare/${item.id}`, textContent: item.prompt }),
          make("span", { class: "quiet", textContent: ` ${item.arms.map((arm) => arm.label).join(", ")} · ${when(item.created_ms)}` }))));
      byId("past-comparisons").hidden = comparisons.length === 0;
    } catch {
      // What the list of generations says is enough.
      byId("past-comparisons").hidden = true;
    }
  }

  say(text, bad = false) {
    byId("history-status").textContent = text;
    byId("history-status").classList.toggle("bad", bad);
  }

  card(item) {
    const element = make("li", { class: "past" });
    const images = (item.images ?? []).filter((image) => image.url);
    const again = make("button", { type: "button", textContent: "Use again" });
    again.addEventListener("click", () => this.use(item));
    const actions = make("div", { class: "past-actions" }, again);
    if (STATES.indexOf(item.state) !== 1 && item.state !== "running") {
      const forget = make("button", { type: "button" });
      let sure = false;
      const ask = (again) => {
        sure = again;
        forget.textContent = again ? "Really?" : "Forget";
        forget.setAttribute("aria-label", again ? `Really forget ${item.prompt}?` : `Forget ${item.prompt}`);
      };
      ask(false);
      forget.addEventListener("click", (event) => {
        // Asked once more: what is forgotten is gone. The rest of a double click is no answer.
        if (!sure) ask(true);
        else if (event.detail < 2) this.forget(item, element);
      });
      forget.addEventListener("blur", () => ask(false));
      actions.append(forget);
    }
    element.append(
      make("div", { class: "past-images" }, ...images.slice(0, 4).map((image) => this.image(item, image))),
      make("p", { class: "past-prompt", textContent: item.prompt }),
      make("p", { class: "quiet numbers", textContent: describe(item) }),
      make("p", { class: "quiet numbers" },
        make("span", { class: `state ${item.state}`, textContent: item.state }), ` ${when(item.created_ms)}`),
      actions,
      this.details(item),
    );
    return element;
  }

  image(item, image) {
    const picture = make("img", { alt: `${item.prompt}, by ${item.method.name}`, loading: "lazy" });
    imageSource(image.url).then(
      (source) => {
        if (source.startsWith("blob:")) this.urls.push(source);
        picture.src = source;
      },
      () => picture.replaceWith(make("span", { class: "quiet", textContent: "not readable" })),
    );
    return picture;
  }

  /** Everything that is known of it, fetched when it is opened. */
  details(item) {
    const text = make("pre", { tabIndex: 0 });
    const element = make("details", {}, make("summary", { textContent: "Details" }), text);
    element.addEventListener("toggle", async () => {
      if (!element.open || text.textContent) return;
      try {
        const { request, resolved, result, problem } = await call(`/generations/${item.id}`);
        text.textContent = JSON.stringify({ id: item.id, request, resolved, cost: result?.cost, problem }, null, 1);
        if (result && !key()) {
          element.append(make("a", { href: `/generations/${item.id}/bundle`, download: `${item.id}.tar`, textContent: "bundle to run again" }));
        }
      } catch (problem) {
        text.textContent = `${problem.title}: ${problem.detail}`;
      }
    });
    return element;
  }

  async forget(item, element) {
    try {
      await call(`/history/${item.id}`, { method: "DELETE" });
      const next = element.nextElementSibling ?? element.previousElementSibling;
      element.remove();
      (next?.querySelector("button") ?? byId("history-q")).focus();
    } catch (problem) {
      this.say(`${problem.title}: ${problem.detail}`, true);
    }
  }
}
