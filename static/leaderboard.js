// The table of votes: strengths with their intervals, and in words what cannot be told.

import { make } from "./arms.js";

const SVG = "http://www.w3.org/2000/svg";

const percent = (value) => `${Math.round(100 * value)}%`;
const share = ({ of, value, low, high }) =>
  (value === null ? "none yet" : `${percent(value)} of ${of} (95%: ${percent(low)} to ${percent(high)})`);

/** An interval as a line with a point, on the group's own axis. */
function bar({ value, low, high }, from, to) {
  const x = (at) => (100 * (at - from)) / (to - from || 1);
  const drawing = document.createElementNS(SVG, "svg");
  drawing.setAttribute("viewBox", "0 0 100 10");
  drawing.setAttribute("preserveAspectRatio", "none");
  drawing.setAttribute("aria-hidden", "true");
  drawing.setAttribute("class", "interval");
  const line = (x1, x2, name) => {
    const element = document.createElementNS(SVG, "line");
    for (const [key, at] of Object.entries({ x1, x2, y1: 5, y2: 5, class: name })) element.setAttribute(key, at);
    drawing.append(element);
  };
  if (low !== null) line(x(low), x(high), "range");
  line(x(value) - 0.6, x(value) + 0.6, "point");
  return drawing;
}

function places([best, worst]) {
  return best === worst ? `${best}` : `${best}–${worst}`;
}

function group(found) {
  const head = make("p", { class: "quiet" },
    `${found.votes} ${found.votes === 1 ? "vote" : "votes"}, ${found.status}. `,
    found.not_identifiable ? `No strengths: ${found.not_identifiable}.` : "");
  if (found.not_identifiable) {
    return [make("h3", { textContent: found.players.join(", ") }), head];
  }
  const ends = found.rows.flatMap(({ strength: s }) => [s.low ?? s.value, s.high ?? s.value]);
  const [from, to] = [Math.min(...ends), Math.max(...ends)];
  const columns = ["Place", "Method", "Votes", "Wins expected", "Strength", ""];
  const rows = found.rows.map((row) => {
    const { value, low, high } = row.strength;
    const interval = low === null ? "too few votes for an interval" : `${low.toFixed(2)} to ${high.toFixed(2)}`;
    return make("tr", {},
      make("td", { textContent: places(row.places) }),
      make("th", { scope: "row", class: "name", textContent: row.player }),
      make("td", { textContent: row.votes }),
      make("td", { textContent: percent(row.expected) }),
      make("td", { textContent: `${value.toFixed(2)} (${interval})` }),
      make("td", { class: "drawn" }, bar(row.strength, from, to)));
  });
  const even = found.versus.filter((versus) => versus.better === null);
  const apart = found.versus.filter((versus) => versus.better !== null);
  const say = (versus) => (versus.better === versus.a ? `${versus.a} above ${versus.b}` : `${versus.b} above ${versus.a}`);
  return [
    head,
    make("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": "Strengths" },
      make("table", { class: "board" },
        make("thead", {}, make("tr", {}, ...columns.map((text) => make("th", { scope: "col", class: text === "Method" ? "name" : "", textContent: text })))),
        make("tbody", {}, ...rows))),
    apart.length > 0 ? make("p", { textContent: `Separated: ${apart.map(say).join("; ")}.` }) : null,
    even.length > 0 ? make("p", { class: "unmet",
      textContent: `Cannot separate: ${even.map((v) => `${v.a} and ${v.b}`).join("; ")}.` }) : null,
  ].filter(Boolean);
}

/** Elements of the whole table. */
export function drawTable(table) {
  if (table.votes === 0) return [make("p", { class: "quiet", textContent: "No votes yet." })];
  const warnings = [];
  if (table.same_separated) {
    warnings.push(`Two images of one method are told apart (the first ${share(table.same)}): these votes find differences where there are none.`);
  }
  if (table.side_bias) warnings.push(`One side is preferred: left ${share(table.left)}.`);
  return [
    ...warnings.map((text) => make("p", { class: "warning", role: "alert", textContent: text })),
    ...table.groups.flatMap(group),
    table.groups.length > 1 ? make("p", { class: "quiet",
      textContent: "Methods of different groups never met, and are not compared." }) : null,
    make("p", { class: "quiet", textContent:
      `${table.votes} votes by ${table.voters} voters on ${table.prompts} prompts, ${table.both_bad} of them “both bad”. ` +
      `Repeated pairs answered alike: ${share(table.consistency)}. Left chosen: ${share(table.left)}. ` +
      `One method against itself, the first chosen: ${share(table.same)}.` }),
  ].filter(Boolean);
}
