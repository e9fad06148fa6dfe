// The scrubber: what each method had found when so much was spent, for all of them at once.

import { imageSource } from "./api.js";
import { byId, make } from "./arms.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 240;
const HEIGHT = 44;

function svg(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const digits = (value) => (Number.isFinite(value) ? value.toFixed(3) : "–");

/** One image of one method with its previews. */
class Track {
  constructor(figure, previews, image, spent) {
    this.figure = figure;
    this.picture = figure.querySelector("img");
    this.final = this.picture.src;
    this.previews = previews;
    this.spent = spent;
    this.scores = image.scores;
    this.trace = make("div", { class: "trace" });
    figure.append(this.trace);
  }

  /** Fetches the previews; who clears the scrubber revokes what `keep` was given. */
  async load(keep) {
    const each = this.previews.filter((preview) => preview.url).map(async (preview) => {
      preview.source = await imageSource(preview.url);
      if (preview.source.startsWith("blob:")) keep(preview.source);
    });
    await Promise.allSettled(each);
  }

  /** Shows what there was at `f`; the image itself from its end on. */
  at(f) {
    const past = this.previews.filter((preview) => preview.f <= f && preview.source);
    const now = f >= this.spent ? null : past.at(-1);
    this.picture.src = now ? now.source : this.final;
    this.figure.classList.toggle("unborn", f < this.spent && !now);
    this.cursor?.setAttribute("x1", this.x(Math.min(f, this.spent)));
    this.cursor?.setAttribute("x2", this.x(Math.min(f, this.spent)));
    const score = now ? now.scores[this.reward] : this.scores[this.reward];
    if (this.told) this.told.textContent = f < this.spent && !now ? "" : digits(score);
  }

  x(f) {
    return 2 + ((WIDTH - 4) * f) / this.most;
  }

  /** Draws the trace of a reward on an axis that all tracks share. */
  draw(reward, most, [low, high]) {
    this.reward = reward;
    this.most = most;
    const points = this.points(reward);
    const y = (score) => HEIGHT - 3 - ((HEIGHT - 6) * (score - low)) / (high - low || 1);
    const line = points.map(([f, score]) => `${this.x(f).toFixed(1)},${y(score).toFixed(1)}`).join(" ");
    this.cursor = svg("line", { class: "cursor", y1: 0, y2: HEIGHT });
    this.told = make("span", { class: "numbers" });
    const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", preserveAspectRatio: "none" },
      svg("polyline", { points: line }), this.cursor);
    drawing.setAttribute("aria-label", points.length < 2 ? `no trace of ${reward}` :
      `${reward} from ${digits(points[0][1])} to ${digits(points.at(-1)[1])}`);
    this.trace.replaceChildren(drawing, this.told);
  }

  points(reward) {
    const all = this.previews.map((preview) => [preview.f, preview.scores[reward]]);
    all.push([this.spent, this.scores[reward]]);
    return all.filter(([, score]) => Number.isFinite(score));
  }
}

export class Scrubber {
  constructor() {
    this.urls = [];
    this.tracks = [];
    byId("scrub").addEventListener("input", () => this.move());
    byId("scrub-reward").addEventListener("change", () => this.draw());
  }

  clear() {
    for (const url of this.urls.splice(0)) URL.revokeObjectURL(url);
    this.tracks = [];
    byId("scrubber").hidden = true;
  }

  /** Takes the finished cards of a comparison. */
  async fill(cards) {
    this.clear();
    const tracks = cards.filter((card) => card.answer).flatMap((card) => {
      const { images, trace, cost } = card.answer;
      const spent = cost.actual.f / images.length;
      return images.map((image, index) => {
        const figure = card.figures[index];
        const previews = trace.filter((entry) => entry.preview && entry.image === index);
        return figure?.querySelector("img") ? new Track(figure, previews.map((e) => ({ ...e.preview })), image, spent) : null;
      }).filter(Boolean);
    });
    if (!tracks.some((track) => track.previews.length > 0)) return;
    this.tracks = tracks;
    const rewards = [...new Set(tracks.flatMap((track) => Object.keys(track.scores)))];
    const searched = cards.map((card) => card.answer?.resolved.reward).find((name) => rewards.includes(name));
    byId("scrub-reward").replaceChildren(...rewards.map((name) => make("option", { value: name, textContent: name })));
    byId("scrub-reward").value = searched ?? rewards[0] ?? "";
    byId("scrub").max = Math.ceil(Math.max(...tracks.map((track) => track.spent)));
    byId("scrub").value = byId("scrub").max;
    this.draw();
    byId("scrubber").hidden = false;
    await Promise.all(tracks.map((track) => track.load((url) => this.urls.push(url))));
    if (this.tracks === tracks) this.move();
  }

  draw() {
    const reward = byId("scrub-reward").value;
    const most = Number(byId("scrub").max);
    const scores = this.tracks.flatMap((track) => track.points(reward).map(([, score]) => score));
    const range = [Math.min(...scores), Math.max(...scores)];
    for (const track of this.tracks) track.draw(reward, most, range);
    this.move();
  }

  move() {
    const f = Number(byId("scrub").value);
    byId("scrub-at").textContent = `${f} F`;
    byId("scrub").setAttribute("aria-valuetext", `${f} U-Net forwards`);
    for (const track of this.tracks) track.at(f);
  }
}
