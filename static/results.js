// Result cards: images with scores and cost, and the summary table.

import { imageSource, key, pngSource } from "./api.js";
import { byId, letter, make } from "./arms.js";
import { open } from "./zoom.js";

const urls = [];

export function clearResults() {
  for (const url of urls.splice(0)) URL.revokeObjectURL(url);
  byId("cards").replaceChildren();
  byId("summary").hidden = true;
}

const digits = (value) => {
  if (!Number.isFinite(value)) return "–";
  return Math.abs(value) >= 100 ? value.toFixed(1) : value.toFixed(3);
};

export const seconds = (value) =>
  Number.isFinite(value) ? `${value < 10 ? value.toFixed(2) : value.toFixed(1)} s` : "–";

/** The same grey noise in every card of a seed: what all arms start from. */
function noise(seed) {
  const canvas = make("canvas", { class: "noise", width: 32, height: 32, "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  const data = context.createImageData(32, 32);
  let state = (seed ^ 0x9e3779b9) >>> 0;
  for (let i = 0; i < data.data.length; i += 4) {
    state = (Math.imul(state ^ (state >>> 15), 0x2c1b3c6d) + 0x7f4a7c15) >>> 0;
    data.data.fill(60 + (state >>> 24) * 0.6, i, i + 3);
    data.data[i + 3] = 255;
  }
  context.putImageData(data, 0, 0);
  return canvas;
}

export class Card {
  /** `arm`: of a comparison as the server describes it. */
  constructor(arm, index, comparison) {
    this.arm = arm;
    this.comparison = comparison;
    this.mark = letter(index);
    this.figures = [];
    const planned = arm.planned ? `${arm.planned.f} F planned` : "";
    const about = arm.planned_seconds ? `, about ${seconds(arm.planned_seconds)}` : "";
    this.settings = make("p", { class: "settings", textContent: planned + about });
    this.main = make("div", { class: "images" }, noise(comparison.base.seed ?? 0));
    this.note = make("p", { class: "quiet numbers", textContent: "waiting" });
    this.element = make(
      "article",
      { class: "card", "aria-label": `${this.mark}: ${arm.label}` },
      make("header", {},
        make("span", { class: "letter", textContent: this.mark, "aria-hidden": "true" }),
        make("div", {}, make("h3", { textContent: arm.label }), this.settings)),
      this.main,
      this.note,
    );
    this.state("waiting");
    byId("cards").append(this.element);
  }

  state(name) {
    this.element.dataset.state = name;
  }

  /** An event of the generation: how far it is, and what it looks like. */
  tell(name, data) {
    if (name === "queued" && data.ahead?.position > 0) this.note.textContent = `${data.ahead.position} before it`;
    if (name === "started") {
      this.state("running");
      this.note.textContent = "running";
    }
    if (name === "step") {
      this.note.textContent = `${data.spent.f} of ${data.planned.f} F`;
      this.element.style.setProperty("--done", data.spent.f / Math.max(1, data.planned.f));
    }
    if (name === "preview" && data.preview.data) this.preview(data.preview);
    if (name === "completed") this.note.textContent = "done";
  }

  preview({ data, f }) {
    const source = pngSource(data);
    const old = this.main.querySelector("img");
    const image = make("img", { src: source, alt: `Estimate after ${f} F`, class: "estimate" });
    this.main.replaceChildren(image);
    if (old) URL.revokeObjectURL(old.src);
    urls.push(source);
  }

  failed(title, detail, state = "failed") {
    this.state(state);
    this.note.replaceWith(make("div", { class: state === "unmet" ? "unmet" : "error" },
      make("strong", { textContent: title }), make("p", { textContent: detail })));
  }

  /** What the arm has come to. */
  async done(arm) {
    this.arm = arm;
    if (arm.unmet) return this.failed("Cannot meet the contract", arm.unmet, "unmet");
    if (arm.state === "cancelled") {
      this.state("cancelled");
      this.note.textContent = "cancelled";
      return undefined;
    }
    const answer = arm.result;
    if (!answer) return this.failed(arm.problem?.title ?? arm.state, arm.problem?.detail ?? "Its result was removed.");
    const count = answer.images.length;
    const sources = await Promise.all(answer.images.map((image) => (image.url ? imageSource(image.url) : null)));
    this.state("done");
    this.answer = answer;
    this.main.style.setProperty("--columns", count < 2 ? 1 : 2);
    this.figures = answer.images.map((image, i) => this.figure(image, sources[i], i, count));
    this.main.replaceChildren(...this.figures);
    this.settings.textContent = this.resolved();
    this.scores = make("dl", { class: "scores" });
    this.note.replaceWith(this.scores, this.cost(), ...this.claims(), this.more());
    return undefined;
  }

  resolved() {
    const { method, steps, reward, adapter } = this.answer.resolved;
    const { name, ...params } = method;
    const short = Object.entries(params).filter(([key, v]) => key !== "steps" && typeof v !== "object");
    const parts = short.map(([key, value]) => `${key.replaceAll("_", " ")} ${value}`);
    parts.unshift(`${steps} steps`);
    if (reward && !("reward" in params)) parts.push(`searches ${reward}`);
    if (adapter) parts.push(`adapter ${adapter}`);
    return parts.join(" · ");
  }

  figure(image, url, index, count) {
    if (!url) return make("p", { class: "error", textContent: "The server could not store this image." });
    if (url.startsWith("blob:")) urls.push(url);
    const of = count > 1 ? ` (image ${index + 1} of ${count})` : "";
    const alt = `${this.answer.resolved.prompt}, generated by ${this.arm.label}${of}`;
    const { width, height, prompt } = this.answer.resolved;
    const name = `${prompt.replace(/[^a-z0-9]+/gi, "-").slice(0, 40)}-${image.seed}-${this.mark}.${image.format}`;
    const save = make("a", { href: url, download: name, textContent: "save" });
    save.setAttribute("aria-label", `Save image ${this.mark}${of}`);
    const look = make("button", { type: "button", class: "look" }, make("img", { src: url, alt, width, height }));
    look.setAttribute("aria-label", `Zoom ${this.mark}${of}: ${alt}`);
    look.addEventListener("click", () => zoomed(this, index));
    return make("figure", {},
      look,
      make("figcaption", {}, make("span", { textContent: `seed ${image.seed}` }), save));
  }

  /** The image that is shown. */
  picture(index) {
    return this.figures[index]?.querySelector("img");
  }

  /** The mean over the images that were scored, by reward. */
  means() {
    const sums = new Map();
    for (const { scores } of this.answer.images) {
      for (const [name, value] of Object.entries(scores)) {
        const entry = sums.get(name) ?? { sum: 0, count: 0 };
        if (value !== null) {
          entry.sum += value;
          entry.count += 1;
        }
        sums.set(name, entry);
      }
    }
    return new Map([...sums].map(([name, { sum, count }]) => [name, count > 0 ? sum / count : NaN]));
  }

  /** Drawn again whenever another arm is done: differences and the best change. */
  showScores(reference, best) {
    const searched = this.answer.resolved.reward;
    this.scores.replaceChildren(
      ...[...this.means()].map(([name, mean]) => {
        const first = reference?.get(name);
        const differs = reference && Number.isFinite(mean) && Number.isFinite(first);
        const delta = differs ? mean - first : NaN;
        const sign = delta >= 0 ? "+" : "−";
        const label = make("dt", { textContent: name });
        if (name === searched) label.append(make("span", { class: "badge", textContent: "searched" }));
        const value = make("dd", { class: "value", textContent: Number.isFinite(mean) ? digits(mean) : "failed" });
        const change = make("dd", {
          class: "delta",
          textContent: !differs ? "" : delta === 0 ? "same" : `${sign}${digits(Math.abs(delta))}`,
          title: differs ? "against A" : "",
        });
        return make("div", { class: best.get(name) === this ? "best" : "" }, label, value, change);
      }),
    );
  }

  cost() {
    const { planned, actual } = this.answer.cost;
    const rows = [["F", "f"], ["V", "v"], ["Y", "y"], ["L", "l"]]
      .filter(([, unit]) => unit in planned || unit in actual)
      .map(([name, unit]) =>
        make("tr", { class: planned[unit] === actual[unit] ? "" : "off" },
          make("th", { scope: "row", textContent: name }),
          make("td", { textContent: planned[unit] ?? 0 }),
          make("td", { textContent: actual[unit] ?? 0 })));
    const stages = Object.entries(actual.seconds ?? {}).filter(([, s]) => Number.isFinite(s) && s > 0);
    const bar = make("div", { class: "stages", "aria-hidden": "true" },
      ...stages.map(([name, share]) => {
        const part = make("span", { title: `${name} ${seconds(share)}` });
        part.style.setProperty("--share", share / this.spentSeconds());
        return part;
      }));
    const list = stages.map(([name, share]) => `${name.replaceAll("_", " ")} ${seconds(share)}`).join(" · ");
    const unused = Object.entries(this.arm.unused ?? {}).map(([unit, left]) =>
      make("tr", {},
        make("th", { scope: "row", textContent: "unused" }), make("td", {}),
        make("td", { textContent: unit === "ms" ? `${left.toFixed(0)} ms` : `${left} ${unit.toUpperCase()}` })));
    const head = ["cost", "planned", "actual"].map((text) => make("th", { scope: "col", textContent: text }));
    rows.push(make("tr", {},
      make("th", { scope: "row", textContent: "time" }), make("td", { textContent: "" }),
      make("td", { textContent: seconds(this.spentSeconds()) })), ...unused);
    return make("div", {},
      make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows)),
      bar, make("p", { class: "stage-list", textContent: list }));
  }

  spentSeconds() {
    const all = Object.values(this.answer.cost.actual.seconds ?? {}).filter(Number.isFinite);
    return all.length > 0 ? all.reduce((a, b) => a + b, 0) : NaN;
  }

  /** The judge's verdict on each claim of the caption, where the trace has one. */
  claims() {
    const entries = this.answer.trace.filter((entry) => Array.isArray(entry?.claims)).slice(0, 8);
    return entries.map((entry) =>
      make("ul", { class: "claims", "aria-label": "Claims of the prompt" },
        ...entry.claims.map((claim) => {
          const holds = Boolean(claim.holds);
          const score = Number.isFinite(claim.score) ? claim.score.toFixed(2) : "";
          return make("li", {},
            make("span", { class: holds ? "yes" : "no", role: "img", textContent: holds ? "✓" : "✗",
              "aria-label": holds ? "holds" : "does not hold" }),
            make("span", { textContent: claim.claim ?? claim.text ?? "" }),
            make("span", { class: "quiet numbers", textContent: score }));
        })));
  }

  more() {
    const { id, resolved, model, trace } = this.answer;
    const text = JSON.stringify({ id, model, resolved, trace }, null, 1);
    const bundle = key() ? null : make("a", { href: `/generations/${id}/bundle`, download: `${id}.tar`, textContent: "bundle to run again" });
    return make("details", {},
      make("summary", { textContent: "Every value and the trace" }),
      bundle,
      make("pre", { textContent: text, tabIndex: 0 }));
  }
}

let all = [];

/** Opens an image large, with the same image of the other methods. */
function zoomed(card, index) {
  const cards = all.filter((other) => other.picture(index));
  const images = cards.map((other) => ({ picture: other.picture(index), title: `${other.mark} · ${other.arm.label}` }));
  open(images, cards.indexOf(card));
}

/** Marks the best of each reward and fills in the summary. */
export function compare(cards) {
  all = cards;
  const done = cards.filter((card) => card.answer);
  const means = new Map(done.map((card) => [card, card.means()]));
  const names = [...new Set([...means.values()].flatMap((m) => [...m.keys()]))];
  const best = new Map();
  for (const name of names) {
    const ranked = done.filter((card) => Number.isFinite(means.get(card).get(name)));
    ranked.sort((a, b) => means.get(b).get(name) - means.get(a).get(name));
    const [first, second] = ranked;
    if (second && means.get(first).get(name) > means.get(second).get(name)) best.set(name, first);
  }
  const reference = cards[0].answer ? means.get(cards[0]) : undefined;
  for (const card of done) card.showScores(card === cards[0] ? undefined : reference, best);
  if (done.length < 2) return;
  const head = ["", "Method", "F", "V", "Y", "Seconds", ...names];
  const rows = done.map((card) => {
    const { actual } = card.answer.cost;
    const cells = [actual.f, actual.v, actual.y, seconds(card.spentSeconds())];
    return make("tr", {},
      make("td", { textContent: card.mark }),
      make("th", { scope: "row", class: "name", textContent: card.arm.label }),
      ...cells.map((text) => make("td", { textContent: text })),
      ...names.map((name) =>
        make("td", {
          class: best.get(name) === card ? "best" : "",
          textContent: digits(means.get(card).get(name) ?? NaN),
        })));
  });
  byId("summary").replaceChildren(make("table", {},
    make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col", class: text === "Method" ? "name" : "", textContent: text })))),
    make("tbody", {}, ...rows)));
  byId("summary").hidden = false;
}
