"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

// Model text reaches the page through this function and `text`, and only as textContent.
function el(tag, name = "", text = "") {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== "") made.textContent = visible(String(text));
  return made;
}

function visible(text) {
  return text.replace(/\r\n/g, "\n").replace(/[\u0000-\u0008\u000b-\u001f\u007f]/g, (char) =>
    char === "\u007f" ? "\u2421" : String.fromCharCode(0x2400 + char.charCodeAt(0)));
}

function text(name, value, more, cited = [], invented = []) {
  const box = document.createDocumentFragment();
  const shown = el("div", "text " + name);
  shown.dir = "auto";
  if (value.length > 1000) shown.tabIndex = 0; // it may need to be scrolled
  shown.append(marked(visible(value), cited, invented));
  box.append(shown);
  if (more) box.append(el("p", "more", `… ${more.toLocaleString("en")} more characters in the artefact`));
  return box;
}

function marked(value, cited, invented) {
  const kinds = new Map([...cited.map((id) => [id, "cited"]), ...invented.map((id) => [id, "invented"])]);
  kinds.delete("");
  const out = document.createDocumentFragment();
  const ids = [...kinds.keys()].sort((a, b) => b.length - a.length);
  const pattern = ids.map((id) => id.replace(/[.*+?^${}()|[\]\\\/-]/g, "\\$&")).join("|");
  let done = 0;
  if (ids.length) {
    for (const found of value.matchAll(new RegExp(`(?<![\\w-])(?:${pattern})(?![\\w])`, "g"))) {
      const mark = el("mark", kinds.get(found[0]), found[0]);
      mark.title = kinds.get(found[0]) === "cited" ? "a clause of the specification" : "no such clause in the specification";
      out.append(value.slice(done, found.index), mark);
      done = found.index + found[0].length;
    }
  }
  out.append(value.slice(done));
  return out;
}

function number(value) {
  if (value === null || value === undefined) return "unscored";
  return Number.isInteger(value) ? String(value) : Number(value).toPrecision(3);
}

function fill(select, options) {
  for (const [value, label, group] of options) {
    let into = select;
    if (group) {
      into = [...select.children].find((child) => child.label === group);
      if (!into) { into = document.createElement("optgroup"); into.label = group; select.append(into); }
    }
    const option = el("option", "", label);
    option.value = value;
    into.append(option);
  }
}

const unique = (values) => [...new Set(values)].filter((value) => value !== "").sort();
const any = [["", "any"]];
const named = (values) => any.concat(values.map((value) => [value, value]));
const has = (query, ...values) => values.some((value) => value.toLowerCase().includes(query));

// The sample browser.
const scored = (prompts) => unique(prompts.flatMap((prompt) => Object.values(prompt.rows).flat()).flatMap((row) => Object.keys(row.scores)));

function outcomes(names) {
  const made = [
    ["right", "as expected", "answer", (row) => row.outcome === "right"],
    ["wrong", "not as expected", "answer", (row) => row.outcome === "wrong"],
    ["unscored", "could not be scored", "answer", (row) => row.outcome === "unscored"],
    ["malformed", "malformed thought", "form", (row) => row.malformed !== ""],
    ["cut", "cut by the token budget", "form", (row) => row.finish === "length"],
    ["cited", "cites clauses that exist", "citations", (row) => row.cited.length > 0 && row.invented.length === 0],
    ["invented", "cites a clause that does not exist", "citations", (row) => row.invented.length > 0],
    ["silent", "cites no clause", "citations", (row) => row.cited.length + row.invented.length === 0],
  ];
  for (const name of names) {
    const value = (row) => row.scores[name];
    made.push([`high:${name}`, `${name} ≥ 0.5`, name, (row) => typeof value(row) === "number" && value(row) >= 0.5]);
    made.push([`low:${name}`, `${name} < 0.5`, name, (row) => typeof value(row) === "number" && value(row) < 0.5]);
    made.push([`none:${name}`, `${name} unscored`, name, (row) => Object.hasOwn(row.unscored, name)]);
  }
  return made;
}

function differ(prompt, arms, name) {
  const scores = arms.map((arm) => (prompt.rows[arm] || []).map((row) => row.scores[name]).filter((score) => typeof score === "number"));
  return new Set(scores.filter((some) => some.length).map((some) => some.sort().join())).size > 1;
}

function sampleCard(arm, row) {
  const card = el("article", "card");
  const head = el("h3", "", arm);
  if (row.outcome === "right") head.append(el("span", "chip high", "✓ as expected"));
  if (row.outcome === "wrong") head.append(el("span", "chip low", "✗ not as expected"));
  if (row.outcome === "unscored") head.append(el("span", "chip", "could not be scored"));
  if (row.malformed) head.append(el("span", "chip fault", `malformed: ${row.malformed}`));
  if (row.finish === "length") head.append(el("span", "chip fault", "cut by the token budget"));
  card.append(head);
  card.append(el("h4", "", "Thought"), text("thought", row.thought || "(none)", row.more.thought, row.cited, row.invented));
  card.append(el("h4", "", "Answer"), text("answer", row.answer || "(none)", row.more.answer));
  const chips = el("div", "chips");
  for (const id of row.cited.filter((id) => !row.invented.includes(id))) chips.append(el("span", "chip cited", `✓ ${id}`));
  for (const id of row.invented) chips.append(el("span", "chip invented", `✗ ${id} does not exist`));
  for (const [name, score] of Object.entries(row.scores)) {
    if (typeof score !== "number") continue;
    chips.append(el("span", "chip" + (score >= 0.5 ? " high" : " low"), `${name} ${number(score)}`));
  }
  for (const [name, why] of Object.entries(row.unscored)) chips.append(el("span", "chip", `${name} unscored: ${why}`));
  if (chips.children.length) card.append(chips);
  return card;
}

function startSamples({ arms, prompts }) {
  if (!prompts.length) return;
  const fields = ["arm", "beside", "category", "expected", "outcome", "differ", "query"];
  const names = scored(prompts), tests = outcomes(names);
  let shown = [], at = 0;
  fill($("s-arm"), named(arms));
  fill($("s-beside"), [["", "all arms"], ["-", "no other"], ...arms.map((arm) => [arm, arm])]);
  fill($("s-category"), named(unique(prompts.map((p) => p.category))));
  fill($("s-expected"), named(unique(prompts.map((p) => p.expected))));
  fill($("s-outcome"), any.concat(tests));
  fill($("s-differ"), named(names));

  function sides() {
    const arm = $("s-arm").value, beside = $("s-beside").value;
    return arm && beside ? arms.filter((name) => name === arm || name === beside) : arms;
  }

  function passes(prompt) {
    const [arm, , category, expected, outcome, name, query] = fields.map((field) => $("s-" + field).value);
    if ((category && prompt.category !== category) || (expected && prompt.expected !== expected)) return false;
    if (name && !differ(prompt, sides(), name)) return false;
    const test = (tests.find((one) => one[0] === outcome) || [])[3];
    const wanted = query.trim().toLowerCase();
    const rows = arm ? prompt.rows[arm] || [] : Object.values(prompt.rows).flat();
    return rows.some((row) => (!test || test(row, prompt)) && (!wanted || has(wanted, prompt.prompt, row.thought, row.answer, prompt.id)));
  }

  function filter(wanted) {
    $("s-beside").disabled = !$("s-arm").value;
    shown = prompts.filter(passes);
    at = Math.max(0, shown.findIndex((prompt) => prompt.id === wanted));
    $("s-list").replaceChildren(...shown.map((prompt, place) => {
      const item = el("li");
      item.id = `s-item-${place}`;
      item.role = "option";
      item.append(el("span", "", prompt.prompt.slice(0, 200) || "(empty prompt)"));
      item.append(el("small", "", [prompt.category, prompt.expected].filter(Boolean).join(" · ")));
      item.addEventListener("click", () => show(place));
      return item;
    }));
    show(at);
  }

  function show(place) {
    at = Math.min(Math.max(place, 0), Math.max(shown.length - 1, 0));
    const prompt = shown[at], list = $("s-list");
    $("s-count").textContent = shown.length ? `${at + 1} of ${shown.length}` : "no sample matches";
    $("s-back").disabled = at === 0;
    $("s-next").disabled = at >= shown.length - 1;
    list.querySelectorAll("[aria-selected=true]").forEach((item) => item.setAttribute("aria-selected", "false"));
    $("s-detail").replaceChildren(...(prompt ? detail(prompt) : []));
    if (!prompt) return list.removeAttribute("aria-activedescendant");
    const item = list.children[at];
    item.setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", item.id);
    if (item.offsetTop < list.scrollTop + list.offsetTop) list.scrollTop = item.offsetTop - list.offsetTop;
    const below = item.offsetTop - list.offsetTop + item.offsetHeight - list.clientHeight;
    if (below > list.scrollTop) list.scrollTop = below;
  }

  function detail(prompt) {
    const about = el("div", "chips");
    for (const value of [prompt.category, prompt.expected && `expected: ${prompt.expected}`, prompt.kind, prompt.id]) {
      if (value) about.append(el("span", "chip", value));
    }
    const cards = el("div", "cards");
    for (const name of sides()) cards.append(...(prompt.rows[name] || []).map((row) => sampleCard(name, row)));
    return [text("prompt", prompt.prompt || "(empty prompt)", prompt.more.prompt), about, cards];
  }

  function remember() {
    const state = fields.map((field) => [field, $("s-" + field).value]).filter((pair) => pair[1]);
    history.replaceState(null, "", "#samples" + (state.length ? "?" + new URLSearchParams(state) : ""));
  }

  function recall() {
    const [place, query] = location.hash.split(/\?(.*)/s);
    if (place !== "#samples" || !query) return;
    for (const [field, value] of new URLSearchParams(query)) {
      if (fields.includes(field)) $("s-" + field).value = value;
    }
    for (const field of fields) if ($("s-" + field).selectedIndex === -1) $("s-" + field).selectedIndex = 0;
    $("samples").scrollIntoView({ behavior: "instant" });
  }

  const changed = () => { filter((shown[at] || {}).id); remember(); };
  for (const field of fields) $("s-" + field).addEventListener("input", changed);
  $("s-form").addEventListener("submit", (event) => event.preventDefault());
  $("s-back").addEventListener("click", () => show(at - 1));
  $("s-next").addEventListener("click", () => show(at + 1));
  $("s-list").addEventListener("keydown", (event) => {
    const moves = { ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + 10, PageUp: at - 10, Home: 0, End: shown.length - 1 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(moves[event.key]);
  });
  $("samples-ui").hidden = false;
  recall();
  filter();
}

// Rollouts over training.
function rolloutCard(row) {
  const card = el("article", "card");
  const head = el("h3", "", "reward" in row ? `reward ${number(row.reward)}` : "rollout");
  if (row.unscored) head.append(el("span", "chip", `unscored: ${row.unscored}`));
  if (typeof row.advantage === "number") {
    const side = row.advantage > 0 ? " high" : row.advantage < 0 ? " low" : "";
    head.append(el("span", "chip" + side, `advantage ${row.advantage > 0 ? "+" : ""}${number(row.advantage)}`));
  }
  if (typeof row.kl_nats === "number") head.append(el("span", "chip", `KL to the start ${number(row.kl_nats)} nats`));
  card.append(head, el("h4", "", "Thought"), text("thought", row.thought || "(none)", row.more.thought));
  card.append(el("h4", "", "Answer"), text("answer", row.answer || "(none)", row.more.answer));
  return card;
}

function startRollouts(stages) {
  if (!stages.length) return;
  fill($("r-stage"), stages.map((one) => [one.stage, one.stage]));
  $("r-stage").value = stages.at(-1).stage;
  const chosen = () => stages.find((one) => one.stage === $("r-stage").value);

  function start() {
    const { steps, rows } = chosen();
    $("r-category").replaceChildren();
    fill($("r-category"), named(unique(rows.flat().map((row) => row.category))));
    $("r-step").max = steps.length - 1;
    $("r-step").value = 0;
    show();
  }

  function show() {
    const { steps, rows } = chosen();
    const place = Number($("r-step").value);
    const category = $("r-category").value, query = $("r-query").value.trim().toLowerCase();
    const wanted = rows[place].filter((row) => (!category || row.category === category)
      && (!query || has(query, row.prompt, row.thought, row.answer)));
    const groups = new Map();
    for (const row of wanted) groups.set(row.prompt, [...(groups.get(row.prompt) || []), row]);
    $("r-step-shown").textContent = steps[place];
    $("r-step").setAttribute("aria-valuetext", `step ${steps[place]}`);
    $("r-count").textContent = `step ${steps[place]}: ${wanted.length} of ${rows[place].length} rollouts`;
    $("r-detail").replaceChildren(...[...groups.values()].flatMap((group) => {
      const about = el("div", "chips"), cards = el("div", "cards");
      if (group[0].category) about.append(el("span", "chip", group[0].category));
      cards.append(...group.map(rolloutCard));
      return [text("prompt", group[0].prompt, group[0].more.prompt), about, cards];
    }));
  }

  $("r-stage").addEventListener("input", start);
  for (const id of ["r-step", "r-category", "r-query"]) $(id).addEventListener("input", show);
  $("r-form").addEventListener("submit", (event) => event.preventDefault());
  $("rollouts-ui").hidden = false;
  start();
}

// The value under the pointer of a training curve.
function startCurve(figure) {
  const { x, y, ends: [from, to] } = data.curves[Number(figure.dataset.curve)];
  const svg = figure.querySelector("svg"), out = figure.querySelector("output");
  const last = out.textContent;
  const cursor = document.createElementNS(svg.namespaceURI, "path");
  cursor.setAttribute("class", "cursor");
  svg.append(cursor);
  svg.addEventListener("pointermove", (event) => {
    if (!x.length) return;
    const box = svg.getBoundingClientRect();
    const step = from + (event.clientX - box.left) / box.width * (to - from);
    let near = 0;
    for (let i = 1; i < x.length; i++) if (Math.abs(x[i] - step) < Math.abs(x[near] - step)) near = i;
    out.textContent = `step ${x[near]}: ${Number(y[near]).toPrecision(4)}`;
    const across = (x[near] - from) / ((to - from) || 1) * 240;
    cursor.setAttribute("d", `M${across} 0V100`);
  });
  svg.addEventListener("pointerleave", () => { out.textContent = last; cursor.removeAttribute("d"); });
}

startSamples(data.samples);
startRollouts(data.rollouts);
document.querySelectorAll("[data-curve]").forEach(startCurve);
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
