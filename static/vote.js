// Blind votes: two images, four answers, and who it was.

import { call, imageSource, key, post } from "./api.js";
import { byId, make } from "./arms.js";
import { drawTable } from "./leaderboard.js";

const VOTER = "diffusion-sharpening.voter";
const KEYS = { 1: "left", ArrowLeft: "left", 2: "right", ArrowRight: "right", 3: "tie", 4: "both-bad" };

/** Who votes here, where the server has no keys. */
function voter() {
  if (key()) return {};
  let name = null;
  try {
    name = localStorage.getItem(VOTER);
    if (!name) {
      const random = crypto.getRandomValues(new Uint8Array(8));
      name = `web-${[...random].map((byte) => byte.toString(16).padStart(2, "0")).join("")}`;
      localStorage.setItem(VOTER, name);
    }
  } catch {
    // A browser that stores nothing votes as its address.
  }
  return name ? { voter: name } : {};
}

export class Vote {
  constructor() {
    this.ballot = null;
    this.voted = false;
    this.busy = false;
    for (const button of document.querySelectorAll("[data-choice]")) {
      button.addEventListener("click", () => this.cast(button.dataset.choice));
    }
    byId("vote-next").addEventListener("click", () => this.next());
    byId("to-vote").addEventListener("click", () => {
      // The address stays: nothing else tries again where there was no ballot.
      if (!byId("vote-view").hidden && !this.ballot) this.open();
    });
    byId("table-contract").addEventListener("change", () => this.table());
    document.addEventListener("keydown", (event) => this.key(event));
  }

  key(event) {
    if (byId("vote-view").hidden || !this.ballot || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("a, input, textarea, select, #leaderboard")) return;
    if (event.repeat) {
      // A key that is held down answers once, also where it presses a button.
      if (event.key === "Enter") event.preventDefault();
      return;
    }
    if (this.voted && event.key === "Enter" && event.target.tagName !== "BUTTON") {
      event.preventDefault();
      this.next();
    } else if (!this.voted && event.key in KEYS) {
      event.preventDefault();
      this.cast(KEYS[event.key]);
    }
  }

  async open() {
    const waits = this.ballot && !this.voted;
    if (waits) this.focus();
    await Promise.all([waits ? undefined : this.next(), this.table()]);
  }

  /** Keys vote on the ballot: it gets the focus of what goes away, or has led here. */
  focus() {
    const from = [byId("vote-next"), byId("to-vote")];
    if (from.includes(document.activeElement)) byId("ballot").focus({ preventScroll: true });
  }

  say(text, bad = false) {
    byId("vote-status").textContent = text;
    byId("vote-status").classList.toggle("bad", bad);
  }

  none(text, bad = false) {
    this.ballot = null;
    byId("ballot").hidden = true;
    this.say(text, bad);
  }

  /** The next ballot. */
  async next() {
    if (this.busy) return;
    this.busy = true;
    try {
      const ballot = await post("/ballots", voter());
      if (!ballot) {
        this.none("There is nothing that you have not voted on. Compare methods that may spend the same, then come back.");
        return;
      }
      const sources = await Promise.all([ballot.left, ballot.right].map(imageSource));
      this.show(ballot, sources);
      this.say("");
    } catch (problem) {
      this.none(`${problem.title}: ${problem.detail}`, true);
    } finally {
      this.busy = false;
    }
  }

  show(ballot, sources) {
    for (const url of this.sources ?? []) if (url.startsWith("blob:")) URL.revokeObjectURL(url);
    this.sources = sources;
    this.ballot = ballot;
    this.voted = false;
    byId("vote-prompt").textContent = ballot.prompt;
    byId("vote-contract").textContent = ballot.contract.replace("equal_f:", "F ≤ ").replace("equal_latency_ms:", "ms ≤ ");
    for (const [index, side] of ["left", "right"].entries()) {
      byId(`vote-${side}`).src = sources[index];
      byId(`vote-${side}`).alt = `${side === "left" ? "Left" : "Right"} image: ${ballot.prompt}`;
      byId(`vote-${side}-told`).replaceChildren(side === "left" ? "Left" : "Right");
      byId(`vote-${side}`).closest("figure").classList.remove("chosen");
    }
    for (const button of document.querySelectorAll("[data-choice]")) {
      button.disabled = false;
      button.classList.remove("chosen");
    }
    byId("ballot").hidden = false;
    this.focus();
    byId("vote-next").hidden = true;
  }

  async cast(choice) {
    if (this.busy || this.voted || !this.ballot) return;
    this.busy = true;
    try {
      const shown = await post("/votes", { token: this.ballot.token, choice });
      this.reveal(shown);
      await this.table();
    } catch (problem) {
      this.say(`${problem.title}: ${problem.detail}`, true);
      if ([409, 410, 422].includes(problem.status)) this.voted = true;
      byId("vote-next").hidden = !this.voted;
    } finally {
      this.busy = false;
    }
  }

  reveal(shown) {
    this.voted = true;
    for (const button of document.querySelectorAll("[data-choice]")) {
      button.disabled = true;
      button.classList.toggle("chosen", button.dataset.choice === shown.choice);
    }
    for (const side of ["left", "right"]) {
      const { player, cost, images, scores } = shown[side];
      const parts = cost ? [`${+(cost.f / images).toFixed(1)} F`, `${+(cost.v / images).toFixed(1)} V`] : [];
      for (const [name, value] of Object.entries(scores ?? {})) {
        if (Number.isFinite(value)) parts.push(`${name} ${value.toFixed(3)}`);
      }
      byId(`vote-${side}-told`).replaceChildren(
        make("strong", { textContent: player }), make("span", { class: "numbers", textContent: parts.join(" · ") }));
      byId(`vote-${side}`).closest("figure").classList.toggle("chosen", shown.choice === side);
    }
    const same = shown.left.player === shown.right.player;
    const verdict = { left: `You chose ${shown.left.player}.`, right: `You chose ${shown.right.player}.` };
    this.say(same ? `Both are by ${shown.left.player}: a check.` :
      verdict[shown.choice] ?? `${shown.left.player} on the left, ${shown.right.player} on the right.`);
    byId("vote-next").hidden = false;
    byId("vote-next").focus();
  }

  async table() {
    const chosen = byId("table-contract").value;
    try {
      const table = await call(`/leaderboard${chosen ? `?contract=${encodeURIComponent(chosen)}` : ""}`);
      const contracts = ["", ...table.contracts];
      byId("table-contract").replaceChildren(...contracts.map((value) =>
        make("option", { value, textContent: value || "any, each pair its own", selected: value === chosen })));
      byId("leaderboard").replaceChildren(...drawTable(table));
    } catch (problem) {
      byId("leaderboard").replaceChildren(make("p", { class: "error", textContent: `${problem.title}: ${problem.detail}` }));
    }
  }
}
