// The history: what was generated here, searched, used again, forgotten.

import { call, imageSource } from "./api.js";
import { byId, make } from "./arms.js";

const PAGE = 24;
const STATES = ["completed", "queued", "running", "failed", "cancelled"];

const when = (ms) => new Date(ms).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });

function describe(item) {
  const parts = [item.method.name];
  if (item.adapter) parts.push(`adapter ${item.adapter}`);
  parts.push(`${item.actual?.f ?? item.planned.f} F`, `seed ${item.seed}`);
  return parts.join(" · ");
}

export class History {
  /** `use` gets a generation's request, to ask for it again. */
  constructor(methods, use) {
    this.use = use;
    this.next = null;
    this.turn = 0;
    const choices = (names, all) => ["", ...names].map((name) => make("option", { value: name, textContent: name || all }));
    byId("history-method").replaceChildren(...choices(methods.map((m) => m.name), "every method"));
    byId("history-state").replaceChildren(...choices(STATES, "every state"));
    byId("history-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.load();
    });
    for (const id of ["history-method", "history-state"]) {
      byId(id).addEventListener("change", () => this.load());
    }
    byId("history-more").addEventListener("click", () => this.append());
  }

  /** Shows the first page. */
  load() {
    this.turn += 1;
    this.next = null;
    byId("history-list").replaceChildren();
    return this.append();
  }

  async append() {
    const query = new URLSearchParams({ limit: PAGE });
    for (const [name, id] of [["q", "history-q"], ["method", "history-method"], ["state", "history-state"]]) {
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
      const forget = make("button", { type: "button", textContent: "Forget" });
      forget.setAttribute("aria-label", `Forget ${item.prompt}`);
      forget.addEventListener("click", () => this.forget(item, element));
      actions.append(forget);
    }
    element.append(
      make("div", { class: "past-images" }, ...images.slice(0, 4).map((image) => this.image(item, image))),
      make("p", { class: "past-prompt", textContent: item.prompt }),
      make("p", { class: "quiet numbers", textContent: describe(item) }),
      make("p", { class: "quiet numbers" },
        make("span", { class: `state ${item.state}`, textContent: item.state }), ` ${when(item.created_ms)}`),
      actions,
    );
    return element;
  }

  image(item, image) {
    const picture = make("img", { alt: `${item.prompt}, by ${item.method.name}`, loading: "lazy" });
    imageSource(image.url).then(
      (source) => { picture.src = source; },
      () => picture.replaceWith(make("span", { class: "quiet", textContent: "not readable" })),
    );
    return picture;
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
