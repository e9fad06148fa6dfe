// The form: prompt, seed, and one editor per method ("arm").

const STORE = "diffusion-sharpening.form";
const FIELDS = ["prompt", "seed", "images", "model", "negative", "guidance", "contract", "allowed", "budgets"];
const PREVIEWS = 8;

export const byId = (id) => document.getElementById(id);

/** An element with properties and children; text is never parsed as HTML. */
export function make(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === "class") element.className = value;
    else if (name in element && !name.startsWith("aria")) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export const letter = (index) => String.fromCharCode(65 + (index % 26));

function option(value, text, chosen) {
  return make("option", { value, textContent: text, selected: value === chosen });
}

/** Reads a number input; blank and nonsense are undefined. */
function number(value) {
  const text = String(value ?? "").trim();
  if (text === "" || !Number.isFinite(Number(text))) return undefined;
  return Number(text);
}

export class Form {
  constructor(listing, onChange) {
    this.listing = listing;
    this.onChange = onChange;
    this.arms = [];
    this.count = 0;
    const { models, limits } = listing;
    byId("model").replaceChildren(...models.map((m) => option(m.id, m.id)));
    byId("model-field").hidden = models.length < 2;
    byId("images").max = limits.max_images;
    byId("prompt").maxLength = limits.max_prompt_chars;
    byId("negative").maxLength = limits.max_prompt_chars;
    this.fill(this.stored() ?? this.initial());
    byId("form").addEventListener("input", () => this.changed());
    byId("contract").addEventListener("change", () => this.showContract());
    byId("model").addEventListener("change", () => this.modelChanged());
    byId("dice").addEventListener("click", () => {
      byId("seed").value = Math.floor(Math.random() * 1e6);
      this.changed();
    });
    byId("add").addEventListener("click", () => {
      this.addArm({ method: this.nextMethod() }).querySelector("select").focus();
      this.changed();
    });
  }

  model() {
    const { models } = this.listing;
    return models.find((m) => m.id === byId("model").value) ?? models[0];
  }

  nextMethod() {
    const names = this.listing.methods.map((m) => m.name);
    const used = new Set(this.arms.map((arm) => arm.state.method));
    return names.find((name) => !used.has(name)) ?? names.at(-1);
  }

  initial() {
    const names = this.listing.methods.map((m) => m.name);
    const arms = names.slice(0, 2).map((method) => ({ method }));
    const model = this.listing.models[0];
    return { prompt: model?.example_prompts[0] ?? "", seed: 7, images: 1, model: model?.id, arms };
  }

  stored() {
    try {
      const state = JSON.parse(localStorage.getItem(STORE));
      if (!state || !Array.isArray(state.arms) || typeof state.prompt !== "string") return null;
      const known = new Set(this.listing.methods.map((m) => m.name));
      state.arms = state.arms.filter((arm) => known.has(arm?.method));
      return state.arms.length > 0 ? state : null;
    } catch {
      return null;
    }
  }

  changed() {
    const state = { arms: this.arms.map((arm) => arm.state) };
    for (const name of FIELDS) state[name] = byId(name).value;
    try {
      localStorage.setItem(STORE, JSON.stringify(state));
    } catch {
      // A browser that stores nothing only forgets the form.
    }
    byId("prompt").removeAttribute("aria-invalid");
    byId("prompt-error").hidden = true;
    this.onChange();
  }

  fill(state) {
    for (const name of FIELDS) {
      if (state[name] !== undefined && state[name] !== null) byId(name).value = state[name];
    }
    if (!byId("model").value && this.listing.models[0]) {
      byId("model").value = this.listing.models[0].id;
    }
    if (number(byId("images").value) === undefined) byId("images").value = 1;
    if (number(byId("seed").value) === undefined) byId("seed").value = 7;
    this.showModel();
    this.showContract();
    for (const arm of state.arms) this.addArm(arm);
  }

  /** What a contract is of. */
  showContract() {
    const contract = byId("contract").value;
    byId("allowed-field").hidden = !contract;
    byId("budgets-field").hidden = Boolean(contract);
    byId("allowed-unit").textContent = contract === "equal_f" ? "F an image" : "ms an image";
    if (contract && number(byId("allowed").value) === undefined) {
      byId("allowed").value = contract === "equal_f" ? 400 : 5000;
    }
  }

  /** Fills in every effective value of a generation: one arm, which no contract bounds. */
  use(resolved) {
    const { name, ...params } = resolved.method;
    const known = this.listing.methods.find((m) => m.name === name)?.params ?? {};
    const kept = Object.entries(params).filter(([key, value]) => key in known && value !== null);
    const text = (value) => (Array.isArray(value) ? value.join(", ") : String(value));
    for (const arm of this.arms) arm.element.remove();
    this.arms = [];
    this.fill({
      prompt: resolved.prompt,
      seed: resolved.seed,
      images: resolved.n,
      model: resolved.model,
      negative: resolved.negative_prompt ?? "",
      guidance: resolved.guidance_scale,
      contract: "",
      budgets: "",
      arms: [{
        method: name,
        adapter: resolved.adapter ?? "",
        steps: resolved.steps,
        budget: resolved.budget.f ?? "",
        reward: resolved.reward ?? "",
        params: Object.fromEntries(kept.map(([key, value]) => [key, text(value)])),
      }],
    });
    this.changed();
  }

  showModel() {
    const model = this.model();
    if (!model) return;
    byId("guidance").placeholder = model.default_guidance_scale;
    const millions = (model.unet_parameters / 1e6).toFixed(1);
    byId("model-line").textContent =
      `${model.id} · ${millions} M parameters · ${model.default_width}×${model.default_height} px · ` +
      `${model.sha256.slice(0, 10)}`;
    byId("examples").replaceChildren(
      ...model.example_prompts.slice(0, 6).map((prompt) => {
        const chip = make("button", { type: "button", textContent: prompt });
        chip.addEventListener("click", () => {
          byId("prompt").value = prompt;
          this.changed();
        });
        return chip;
      }),
    );
  }

  modelChanged() {
    this.showModel();
    for (const arm of this.arms) arm.render();
    this.changed();
  }

  addArm(saved) {
    const arm = {
      id: `arm${this.count++}`,
      state: { params: {}, ...saved },
      element: make("li", { class: "arm" }),
    };
    arm.render = () => this.renderArm(arm);
    this.arms.push(arm);
    byId("arms").append(arm.element);
    for (const each of this.arms) each.render();
    return arm.element;
  }

  removeArm(arm) {
    this.arms = this.arms.filter((each) => each !== arm);
    arm.element.remove();
    for (const each of this.arms) each.render();
    byId("add").focus();
    this.changed();
  }

  renderArm(arm) {
    const { state } = arm;
    const mark = letter(this.arms.indexOf(arm));
    const methods = this.listing.methods;
    const method = methods.find((m) => m.name === state.method) ?? methods[0];
    state.method = method.name;
    const model = this.model();

    const choose = make(
      "select",
      { "aria-label": `Method of ${mark}` },
      ...methods.map((m) => option(m.name, m.name, state.method)),
    );
    choose.addEventListener("change", () => {
      state.method = choose.value;
      state.params = {};
      arm.render();
      arm.element.querySelector("select").focus();
      this.changed();
    });
    const remove = make("button", {
      type: "button",
      textContent: "✕",
      "aria-label": `Remove ${mark}`,
      hidden: this.arms.length < 2,
    });
    remove.addEventListener("click", () => this.removeArm(arm));

    const fields = make("div", { class: "arm-fields" });
    const add = (name, text, control, hint) => {
      control.id = `${arm.id}-${name}`;
      if (hint) control.title = hint;
      fields.append(
        make("div", { class: "field" }, make("label", { htmlFor: control.id, textContent: text }), control),
      );
    };
    const input = (holder, key, props) => {
      const control = make("input", { type: "number", value: holder[key] ?? "", ...props });
      control.addEventListener("input", () => {
        holder[key] = control.value;
      });
      return control;
    };
    const select = (holder, key, choices) => {
      const control = make("select", {}, ...choices.map(([v, text]) => option(v, text, holder[key] ?? "")));
      control.addEventListener("change", () => {
        holder[key] = control.value;
        this.changed();
      });
      return control;
    };

    const whole = { min: 1, step: 1, inputMode: "numeric" };
    add("steps", "Steps", input(state, "steps", { ...whole, placeholder: model?.default_steps ?? "" }));
    add("budget", "Budget F", input(state, "budget", { ...whole, placeholder: "no limit" }),
      "U-Net forwards per image");
    for (const [name, schema] of Object.entries(method.params ?? {})) {
      add(`param-${name}`, name.replaceAll("_", " "),
        this.paramControl(state.params, name, schema ?? {}, input, select), schema?.description);
    }
    if (this.listing.rewards.length > 0) {
      const list = this.rewardList(arm);
      const control = input(state, "reward",
        { type: "text", placeholder: "default", autocomplete: "off", spellcheck: false });
      control.setAttribute("list", list.id);
      add("reward", "Reward searched", control,
        "A reward, or several: a:0.75+b:0.25, rank(a+b), normalised(a+b)");
      fields.append(list);
    }
    const adapters = (model?.adapters ?? []).map((name) => [name, name]);
    if (adapters.length > 0) {
      add("adapter", "Adapter", select(state, "adapter", [["", "none"], ...adapters]));
    }
    arm.element.replaceChildren(
      make("div", { class: "arm-head" },
        make("span", { class: "letter", textContent: mark, "aria-hidden": "true" }), choose, remove),
      make("p", { class: "quiet", textContent: method.summary }),
      fields,
    );
  }

  paramControl(params, name, schema, input, select) {
    const fallback = schema.default ?? "";
    if (Array.isArray(schema.enum)) {
      const choices = schema.enum.map((v) => [String(v), String(v)]);
      return select(params, name, [["", `default: ${fallback}`], ...choices]);
    }
    if (schema.type === "boolean") {
      return select(params, name, [["", `default: ${fallback}`], ["true", "yes"], ["false", "no"]]);
    }
    if (schema.type === "integer" || schema.type === "number") {
      return input(params, name, { step: schema.type === "integer" ? 1 : "any", placeholder: fallback });
    }
    return input(params, name, { type: "text", placeholder: fallback });
  }

  /** Suggestions: each reward, and all of them together. */
  rewardList(arm) {
    const names = this.listing.rewards.map((r) => r.name);
    const all = names.join("+");
    const together = names.length > 1 ? [all, `rank(${all})`, `normalised(${all})`] : [];
    return make("datalist", { id: `${arm.id}-rewards` },
      ...[...names, ...together].map((value) => make("option", { value })));
  }

  /** Budgets that every method gets in turn, where the form has some. */
  budgets() {
    if (byId("contract").value) return [];
    const all = byId("budgets").value.split(/[\s,;]+/).map(number);
    return all.filter((f) => f !== undefined && f > 0);
  }

  /** Columns of the results: budgets, or 0 for as many as fit. */
  across(comparison) {
    const budgets = new Set(comparison.arms.map((arm) => arm.label.match(/ · (\d+) F$/)?.[1]));
    return budgets.has(undefined) || budgets.size < 2 ? 0 : budgets.size;
  }

  /** The body of POST /compare; only what was filled in. */
  comparison() {
    const base = {
      prompt: byId("prompt").value,
      seed: number(byId("seed").value) ?? 7,
      n: number(byId("images").value) ?? 1,
      previews: PREVIEWS,
    };
    if (this.model()) base.model = this.model().id;
    if (byId("negative").value.trim()) base.negative_prompt = byId("negative").value;
    const guidance = number(byId("guidance").value);
    if (guidance !== undefined) base.guidance_scale = guidance;
    const budgets = this.budgets();
    const arms = this.arms.flatMap(({ state }) => {
      const arm = this.request(state);
      if (budgets.length === 0) return [arm];
      return budgets.map((budget) => ({ ...arm, budget, label: `${this.name(arm)} · ${budget} F` }));
    });
    const body = { base, arms };
    const contract = byId("contract").value;
    if (contract) {
      body.contract = { [contract]: number(byId("allowed").value) ?? 0 };
      for (const arm of arms) delete arm.budget;
    }
    return body;
  }

  name(arm) {
    return arm.adapter ? `${arm.method.name}@${arm.adapter}` : arm.method.name;
  }

  /** What one arm has of its own. */
  request(state) {
    const method = this.listing.methods.find((m) => m.name === state.method);
    const params = {};
    for (const [name, schema] of Object.entries(method?.params ?? {})) {
      const value = this.paramValue(state.params[name], schema ?? {});
      if (value !== undefined) params[name] = value;
    }
    const arm = { method: { name: state.method, ...params } };
    for (const key of ["steps", "budget"]) {
      const value = number(state[key]);
      if (value !== undefined) arm[key] = value;
    }
    if (state.reward?.trim()) arm.reward = state.reward.trim();
    if (state.adapter && this.model()?.adapters.includes(state.adapter)) arm.adapter = state.adapter;
    return arm;
  }

  paramValue(text, schema) {
    if (text === undefined || String(text).trim() === "") return undefined;
    if (Array.isArray(schema.enum)) return schema.enum.find((v) => String(v) === text);
    if (schema.type === "boolean") return text === "true";
    if (schema.type === "integer" || schema.type === "number") return number(text);
    if (schema.type === "array") return text.split(",").map((v) => number(v) ?? v.trim());
    return text;
  }
}
