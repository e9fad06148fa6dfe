// Quality against cost, from the server's sweeps: a line for each method, with its intervals.

import { call } from "./api.js";
import { byId, make } from "./arms.js";

const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT] = [560, 340];
const EDGE = { left: 52, right: 14, top: 14, bottom: 40 };
/** Told apart by dashes, too: colours repeat. */
const COLOURS = 8;
const DASHES = ["", "6 3", "2 3", "8 3 2 3"];

function svg(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const short = (value) => (value >= 1000 ? `${+(value / 1000).toPrecision(3)}k` : `${+value.toPrecision(3)}`);

/** 1, 2 and 5 times powers of ten within a range. */
function logTicks(low, high) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
    for (const step of [1, 2, 5]) {
      const tick = step * 10 ** power;
      if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
    }
  }
  return ticks;
}

/** Round numbers within a range, and the decimal places that tell them apart. */
function linearTicks(low, high) {
  const rough = (high - low) / 5 || 0.1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((s) => s >= rough);
  const ticks = [];
  for (let n = Math.ceil(low / step); n * step <= high + step / 1e6; n += 1) ticks.push(n * step);
  // A power of ten is not exact: without the small part 0.001 might have four places.
  return { ticks, places: Math.max(0, Math.ceil(-Math.log10(step) - 1e-9)) };
}

export class Quality {
  constructor() {
    this.sweeps = null;
    this.hidden = new Set();
    byId("sweep").addEventListener("change", () => this.choose());
    byId("quality-cost").addEventListener("change", () => this.draw());
  }

  async open() {
    if (this.sweeps) return;
    try {
      const { sweeps } = await call("/sweeps");
      this.sweeps = sweeps.filter((sweep) => sweep.points.length > 0);
    } catch (problem) {
      this.say(`${problem.title}: ${problem.detail}`, true);
      return;
    }
    const most = [...this.sweeps].sort((a, b) => b.points.length - a.points.length)[0];
    byId("sweep").replaceChildren(...this.sweeps.map(({ id }) => make("option", { value: id, textContent: id, selected: id === most?.id })));
    if (this.sweeps.length === 0) this.say("No sweeps here. ds-bench nfe-sweep makes them; the setting “sweeps” says where they are.");
    else this.choose();
  }

  say(text, bad = false) {
    byId("quality-status").textContent = text;
    byId("quality-status").classList.toggle("bad", bad);
  }

  choose() {
    this.sweep = this.sweeps.find((sweep) => sweep.id === byId("sweep").value) ?? this.sweeps[0];
    this.methods = [...new Set(this.sweep.points.map((point) => point.method))];
    this.hidden.clear();
    const { model, reward, held_out: heldOut, prompts, seeds, guidance_scale: guidance } = this.sweep;
    byId("quality-note").textContent = `Model ${model}, guidance ${guidance}, ${prompts} prompts, ${seeds} ` +
      `${seeds === 1 ? "seed" : "seeds"}. Searched: ${reward}; held out: ${heldOut}. Bars are 95% intervals over prompts; ` +
      "points that another one beats at no more cost are pale.";
    byId("quality-legend").replaceChildren(...this.methods.map((method, index) => {
      const box = make("input", { type: "checkbox", checked: true });
      box.addEventListener("change", () => {
        if (box.checked) this.hidden.delete(method);
        else this.hidden.add(method);
        this.draw();
      });
      const swatch = svg("svg", { viewBox: "0 0 24 8", "aria-hidden": "true" },
        svg("line", { x1: 0, x2: 24, y1: 4, y2: 4, class: `line c${index % COLOURS}`, "stroke-dasharray": DASHES[Math.floor(index / COLOURS) % 4] }));
      return make("label", { class: "check" }, box, swatch, make("span", { textContent: method }));
    }));
    this.draw();
  }

  points(reward) {
    const cost = byId("quality-cost").value;
    return this.sweep.points
      .filter((point) => !this.hidden.has(point.method))
      .map((point) => ({ ...point, x: point[cost], ...point.scores[reward] }))
      .filter((point) => point.x > 0 && Number.isFinite(point.mean));
  }

  draw() {
    const rewards = Object.keys(this.sweep.points[0].scores);
    const order = [this.sweep.reward, this.sweep.held_out].filter((name) => rewards.includes(name));
    order.push(...rewards.filter((name) => !order.includes(name)));
    const role = (name) => (name === this.sweep.reward ? "searched" : name === this.sweep.held_out ? "held out" : "");
    byId("plots").replaceChildren(...order.map((name) => this.plot(name, role(name))));
    this.table(order);
    this.say("");
  }

  plot(reward, role) {
    const points = this.points(reward);
    const title = make("figcaption", {}, make("strong", { textContent: reward }), role ? make("span", { class: "badge", textContent: role }) : null);
    const told = make("p", { class: "quiet numbers told", "aria-live": "polite", textContent: "Point at or tab to a point for its numbers." });
    if (points.length === 0) return make("figure", { class: "plot" }, title, make("p", { class: "quiet", textContent: "Nothing to draw." }));
    const xs = points.map((p) => p.x);
    const ys = points.flatMap((p) => [p.low ?? p.mean, p.high ?? p.mean]);
    const [x0, x1] = [Math.min(...xs) * 0.9, Math.max(...xs) * 1.1];
    const [y0, y1] = [Math.min(...ys), Math.max(...ys)];
    const x = (v) => EDGE.left + ((WIDTH - EDGE.left - EDGE.right) * Math.log(v / x0)) / Math.log(x1 / x0);
    const y = (v) => HEIGHT - EDGE.bottom - ((HEIGHT - EDGE.top - EDGE.bottom) * (v - y0)) / (y1 - y0 || 1);
    const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "group", "aria-label": `${reward} against cost` });
    const scale = linearTicks(y0, y1);
    for (const tick of scale.ticks) {
      drawing.append(svg("line", { x1: EDGE.left, x2: WIDTH - EDGE.right, y1: y(tick), y2: y(tick), class: "rule" }),
        svg("text", { x: EDGE.left - 6, y: y(tick) + 4, class: "tick end" }, tick.toFixed(scale.places)));
    }
    const ticks = logTicks(x0, x1);
    for (const tick of ticks.length > 8 ? ticks.filter((t) => /^1/.test(t.toPrecision(1))) : ticks) {
      drawing.append(svg("text", { x: x(tick), y: HEIGHT - EDGE.bottom + 18, class: "tick middle" }, short(tick)));
    }
    const unit = byId("quality-cost").value === "f" ? "U-Net forwards an image (F)" : "seconds an image";
    drawing.append(svg("text", { x: (WIDTH + EDGE.left) / 2, y: HEIGHT - 4, class: "tick middle" }, unit));
    const beaten = (p) => points.some((q) => q !== p && q.x <= p.x && q.mean >= p.mean && (q.x < p.x || q.mean > p.mean));
    for (const [index, method] of this.methods.entries()) {
      const mine = points.filter((p) => p.method === method).sort((a, b) => a.x - b.x);
      const colour = `c${index % COLOURS}`;
      const line = mine.map((p) => `${x(p.x).toFixed(1)},${y(p.mean).toFixed(1)}`).join(" ");
      drawing.append(svg("polyline", { points: line, class: `line ${colour}`, "stroke-dasharray": DASHES[Math.floor(index / COLOURS) % 4] }));
      for (const p of mine) drawing.append(this.dot(p, x(p.x), y, colour, beaten(p), told));
    }
    return make("figure", { class: "plot" }, title, drawing, told, this.verdict(points));
  }

  dot(p, at, y, colour, beaten, told) {
    const text = `${p.method}, ${short(p.x)} ${byId("quality-cost").value === "f" ? "F" : "s"}: ${p.mean.toFixed(3)}` +
      (Number.isFinite(p.low) ? ` [${p.low.toFixed(3)}, ${p.high.toFixed(3)}]` : "") + `, ${p.n} images` +
      (Number.isFinite(p.diff_low) ? `; from plain ${p.diff_mean >= 0 ? "+" : ""}${p.diff_mean.toFixed(3)} [${p.diff_low.toFixed(3)}, ${p.diff_high.toFixed(3)}]` +
        (p.diff_low <= 0 && p.diff_high >= 0 ? ", cannot separate" : "") : "");
    const group = svg("g", { class: `dot ${colour}${beaten ? " beaten" : ""}`, tabindex: 0, role: "img", "aria-label": text });
    if (Number.isFinite(p.low)) group.append(svg("line", { x1: at, x2: at, y1: y(p.low), y2: y(p.high) }));
    group.append(svg("circle", { cx: at, cy: y(p.mean), r: 4 }), svg("circle", { cx: at, cy: y(p.mean), r: 11, class: "target" }));
    for (const event of ["mouseenter", "focus"]) group.addEventListener(event, () => { told.textContent = text; });
    return group;
  }

  /** Which methods cannot be told from the best at the budgets that most of them have. */
  verdict(points) {
    const budgets = [...new Set(points.map((p) => p.budget))].filter((b) => b !== null).sort((a, b) => a - b);
    const lines = budgets.flatMap((budget) => {
      const here = points.filter((p) => p.budget === budget && Number.isFinite(p.low));
      if (here.length < 2) return [];
      const best = here.reduce((a, b) => (b.mean > a.mean ? b : a));
      const even = here.filter((p) => p !== best && p.high >= best.low);
      const others = even.length === here.length - 1 ? "any other" : even.map((p) => p.method).join(", ");
      return [make("li", {}, `${short(budget)} F: ${best.method} ${best.mean.toFixed(3)}` +
        (even.length === 0 ? ", apart from all others" : `; cannot be separated from ${others}`))];
    });
    return make("details", {}, make("summary", { textContent: "Best at each budget" }),
      make("p", { class: "quiet", textContent: "By whether intervals overlap: paired differences can tell more." }),
      make("ul", { class: "lines" }, ...lines));
  }

  table(rewards) {
    const rows = this.sweep.points.filter((point) => !this.hidden.has(point.method)).map((point) =>
      make("tr", {},
        make("th", { scope: "row", class: "name", textContent: point.method }),
        ...[point.f, point.v, point.y, point.seconds?.toFixed(2), point.n].map((v) => make("td", { textContent: v ?? "–" })),
        ...rewards.map((name) => {
          const { mean, low, high } = point.scores[name] ?? {};
          const interval = Number.isFinite(low) ? ` [${low.toFixed(3)}, ${high.toFixed(3)}]` : "";
          return make("td", { textContent: Number.isFinite(mean) ? mean.toFixed(3) + interval : "–" });
        })));
    const head = ["Method", "F", "V", "Y", "Seconds", "Images", ...rewards];
    byId("quality-table").replaceChildren(make("table", {},
      make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col", class: text === "Method" ? "name" : "", textContent: text })))),
      make("tbody", {}, ...rows)));
    byId("quality-numbers").hidden = false;
  }
}
