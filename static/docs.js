// The API's page: every route of /openapi.json with what it takes and answers.

import { byId, make } from "./arms.js";

const ORDER = ["generations", "comparisons", "history", "server"];
const METHODS = ["get", "post", "put", "delete"];

/** A schema's name, or what it is made of. */
function type(schema) {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  const several = schema.oneOf ?? schema.anyOf ?? schema.allOf;
  if (several) return several.map(type).filter((text) => text !== "null").join(" or ");
  if (schema.enum) return schema.enum.join(", ");
  const kinds = [schema.type].flat().filter((kind) => kind && kind !== "null");
  if (kinds[0] === "array") return `list of ${type(schema.items) || "anything"}`;
  return kinds.join(" or ");
}

const table = (head, rows) =>
  make("div", { class: "scroll" }, make("table", {},
    make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col", textContent: text })))),
    make("tbody", {}, ...rows.map((cells) => make("tr", {}, ...cells.map((cell) => make("td", { textContent: cell })))))));

function operation(path, method, about) {
  const parts = [];
  const parameters = (about.parameters ?? []).map((p) =>
    [p.name, p.in, type(p.schema), p.required ? "yes" : "", p.description ?? ""]);
  if (parameters.length > 0) parts.push(table(["name", "in", "type", "required", ""], parameters));
  const body = Object.values(about.requestBody?.content ?? {}).map((c) => type(c.schema)).join(" or ");
  if (body) parts.push(make("p", { textContent: `Body: ${body}. ${about.requestBody.description ?? ""}` }));
  const responses = Object.entries(about.responses ?? {}).map(([status, answer]) =>
    [status, Object.entries(answer.content ?? {}).map(([media, c]) => `${media} ${type(c.schema)}`).join(", "), answer.description ?? ""]);
  parts.push(table(["status", "answer", ""], responses));
  return make("details", { class: "operation" },
    make("summary", {},
      make("span", { class: "verb", textContent: method.toUpperCase() }),
      make("code", { textContent: path }),
      make("span", { class: "quiet", textContent: about.summary ?? "" })),
    ...parts);
}

function schema(name, about) {
  const required = new Set(about.required ?? []);
  const rows = Object.entries(about.properties ?? {}).map(([field, of]) =>
    [field, type(of), required.has(field) ? "yes" : "", of.description ?? ""]);
  const text = make("p", { class: "quiet", textContent: about.description ?? "" });
  const shape = rows.length > 0 ? table(["field", "type", "required", ""], rows) : make("p", { textContent: type(about) });
  return make("details", { class: "operation" },
    make("summary", {}, make("code", { textContent: name })), text, shape);
}

async function show() {
  const answer = await fetch("/openapi.json");
  const { info, paths, components } = await answer.json();
  byId("about").textContent = info.description;
  const groups = new Map(ORDER.map((tag) => [tag, []]));
  for (const [path, methods] of Object.entries(paths)) {
    for (const method of METHODS) {
      const about = methods[method];
      if (about) groups.get(about.tags?.[0] ?? "server")?.push(operation(path, method, about));
    }
  }
  byId("routes").replaceChildren(...[...groups].map(([tag, entries]) =>
    make("section", {}, make("h2", { textContent: tag[0].toUpperCase() + tag.slice(1) }), ...entries)));
  byId("schemas").replaceChildren(make("h2", { textContent: "Types" }),
    ...Object.entries(components.schemas).map(([name, about]) => schema(name, about)));
}

show().catch((error) => {
  byId("about").textContent = `The description could not be read: ${error}`;
});
