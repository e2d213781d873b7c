// What was spent, by day and model: a chart for the eye, a table for everyone.

import * as api from "./api.js";
import { compact, costOf, dayName, h, icon, money, number, requestNote, svg } from "./dom.js";

const COLOURS = 8;
const PERIODS = [["7d", "7 days"], ["30d", "30 days"], ["90d", "90 days"]];
const MEASURES = {
  cost: { label: "Cost", of: (row) => Number(row.cost ?? 0), show: money, tell: (rows) => costOf(sumOf(rows)) },
  tokens: { label: "Tokens", of: (row) => (row.prompt_tokens ?? 0) + (row.completion_tokens ?? 0), show: compact },
  calls: { label: "Calls", of: (row) => row.calls, show: number },
};

/** What several rows cost together; null, if of none it is known. */
function sumOf(rows) {
  const known = rows.filter(({ cost }) => cost !== null && cost !== undefined);
  return {
    cost: known.length ? known.reduce((sum, { cost }) => sum + Number(cost), 0) : null,
    unpriced: rows.reduce((sum, { unpriced }) => sum + (unpriced ?? 0), 0),
  };
}

let period = "30d";
let measure = null; // null: cost, if anything had one

export function usageView() {
  const body = h("div", { class: "usage-body" });
  const view = h("section", { class: "usage", "aria-label": "Usage" }, body);
  load(body);
  return view;
}

async function load(body) {
  body.setAttribute("aria-busy", "true");
  try {
    draw(body, await api.get(`/usage?since=${period}`));
  } catch (error) {
    if (error.status === 401) return;
    body.replaceChildren(
      h("p", { class: "notice error", role: "alert" }, icon("warning"), h("span", {}, error.message, requestNote(error)), h("button", { type: "button", class: "text-button", onclick: () => load(body) }, "Try again")),
    );
  } finally {
    body.removeAttribute("aria-busy");
  }
}

function choice(label, options, chosen, choose) {
  return h(
    "div",
    { class: "segments", role: "group", "aria-label": label },
    options.map(([value, words]) =>
      h("button", { type: "button", "aria-pressed": String(value === chosen), "data-value": value, onclick: () => choose(value) }, words),
    ),
  );
}

function draw(body, usage) {
  const rows = usage.days;
  const shown = measure ?? (rows.some((row) => Number(row.cost) > 0) ? "cost" : "tokens");
  const redraw = (focus) => {
    draw(body, usage);
    body.querySelector(`[data-value="${focus}"]`)?.focus();
  };
  const models = [...new Set(rows.map((row) => row.model))].sort();
  const chart = h("div", { class: "chart" });
  body.replaceChildren(
    h(
      "div",
      { class: "usage-bar" },
      choice("Period", PERIODS, period, async (value) => {
        period = value;
        await load(body);
        body.querySelector(`[data-value="${value}"]`)?.focus();
      }),
      choice("Measure", Object.entries(MEASURES).map(([name, { label }]) => [name, label]), shown, (value) => {
        measure = value;
        redraw(value);
      }),
    ),
    cards(usage),
    budget(usage.budget),
    ...(rows.length ? [chart, legend(models), table(rows)] : [h("p", { class: "empty" }, "Nothing was asked in this time.")]),
  );
  if (rows.length) follow(chart, rows, models, MEASURES[shown]);
}

function cards({ total }) {
  const card = (label, value, note) => h("div", { class: "card" }, h("dt", {}, label), h("dd", {}, value, note ? h("small", {}, note) : null));
  const tokens = (total.prompt_tokens ?? 0) + (total.completion_tokens ?? 0);
  return h(
    "dl",
    { class: "cards" },
    card("Cost", costOf(total), total.unpriced ? `${number(total.unpriced)} ${total.unpriced === 1 ? "call" : "calls"} without a known price` : ""),
    card("Tokens", number(tokens), `${number(total.prompt_tokens ?? 0)} prompt · ${number(total.completion_tokens ?? 0)} completion`),
    card("Calls", number(total.calls ?? 0), total.interrupted ? `${number(total.interrupted)} interrupted` : ""),
  );
}

function budget(given) {
  if (!given || given.limit_usd === null) return "";
  const [limit, spent] = [Number(given.limit_usd), Number(given.spent_usd ?? 0)];
  const words = `${money(spent)} of ${money(limit)} this ${given.period ?? "period"}`;
  return h("div", { class: "budget" }, h("span", {}, "Budget"), h("meter", { min: "0", max: limit, high: limit * 0.8, value: spent, "aria-label": `Budget: ${words}` }), h("span", {}, words));
}

function legend(models) {
  return h("ul", { class: "legend", "aria-label": "Models" }, models.map((model, index) => h("li", {}, h("i", { class: `swatch s${index % COLOURS}`, "aria-hidden": "true" }), model ?? "unknown")));
}

/** Draw the chart as wide as it is, and again when that changes. */
function follow(chart, rows, models, kind) {
  let width = 0;
  new ResizeObserver(([{ contentRect }]) => {
    if (Math.round(contentRect.width) === width || !contentRect.width) return;
    width = Math.round(contentRect.width);
    chart.replaceChildren(bars(rows, models, kind, width));
  }).observe(chart);
}

/** Every day from the first of the period to today, also those on which nothing was asked. */
function everyDay(rows) {
  const last = new Date(`${new Date().toISOString().slice(0, 10)}T00:00:00Z`).getTime();
  const days = [];
  for (let back = Number.parseInt(period, 10) - 1; back >= 0; back -= 1) days.push(new Date(last - back * 86_400_000).toISOString().slice(0, 10));
  const known = rows.map((row) => row.day.slice(0, 10));
  return [...new Set([...days, ...known])].sort();
}

/** Round steps on the axis: 1, 2 or 5 times a power of ten. */
function stepOf(top, whole) {
  const rough = top / 4 || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  return whole ? Math.max(1, step) : step;
}

function bars(rows, models, kind, width) {
  const days = everyDay(rows);
  const height = 240;
  const [left, right, top, bottom] = [72, 8, 10, 24];
  const sums = new Map(days.map((day) => [day, 0]));
  for (const row of rows) sums.set(row.day.slice(0, 10), sums.get(row.day.slice(0, 10)) + kind.of(row));
  const most = Math.max(...sums.values());
  const step = stepOf(most, kind !== MEASURES.cost);
  const ceiling = Math.max(step, Math.ceil(most / step - 1e-9) * step);
  const slot = (width - left - right) / days.length;
  const bar = Math.max(2, Math.min(36, slot * 0.7));
  const y = (value) => top + (height - top - bottom) * (1 - value / ceiling);
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `${kind.label} by day and model; the figures are in the table below` });
  for (let value = 0; value <= ceiling + step / 2; value += step) {
    drawing.append(
      svg("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }),
      svg("text", { class: "tick", x: left - 8, y: y(value) + 4, "text-anchor": "end" }, kind.show(value)),
    );
  }
  const every = Math.max(1, Math.ceil(64 / slot));
  days.forEach((day, index) => {
    const x = left + slot * index + (slot - bar) / 2;
    const ofDay = rows.filter((row) => row.day.slice(0, 10) === day);
    const told = (some) => (kind.tell && some.length ? kind.tell(some) : kind.show(some.reduce((sum, row) => sum + kind.of(row), 0)));
    const group = svg("g", { class: "day" }, svg("title", {}, [`${dayName(day)}: ${told(ofDay)}`, ...ofDay.map((row) => `${row.model ?? "unknown"}: ${told([row])}`)].join("\n")));
    group.append(svg("rect", { class: "hover", x: left + slot * index, y: top, width: slot, height: height - top - bottom }));
    let base = 0;
    models.forEach((model, colour) => {
      const value = ofDay.filter((row) => row.model === model).reduce((sum, row) => sum + kind.of(row), 0);
      if (!value) return;
      group.append(svg("rect", { class: `piece s${colour % COLOURS}`, x, y: y(base + value), width: bar, height: Math.max(1, y(base) - y(base + value)), rx: Math.min(3, bar / 4) }));
      base += value;
    });
    drawing.append(group);
    if ((days.length - 1 - index) % every === 0) drawing.append(svg("text", { class: "tick", x: Math.min(x + bar / 2, width - right - 16), y: height - 6, "text-anchor": "middle" }, dayName(day)));
  });
  return drawing;
}

function table(rows) {
  const head = ["Day", "Model", "Calls", "Prompt tokens", "Completion tokens", "Cost"];
  const sorted = [...rows].sort((one, other) => other.day.localeCompare(one.day) || String(one.model).localeCompare(String(other.model)));
  return h(
    "div",
    { class: "table", tabindex: "0", role: "region", "aria-label": "Usage by day and model" },
    h(
      "table",
      { class: "usage-table" },
      h("caption", { class: "offscreen" }, "Usage by day and model"),
      h("thead", {}, h("tr", {}, head.map((name, index) => h("th", { scope: "col", class: index > 1 ? "right" : null }, name)))),
      h(
        "tbody",
        {},
        sorted.map((row) =>
          h(
            "tr",
            {},
            h("td", {}, dayName(row.day)),
            h("td", {}, row.model ?? "unknown"),
            h("td", { class: "right" }, number(row.calls)),
            h("td", { class: "right" }, number(row.prompt_tokens ?? 0)),
            h("td", { class: "right" }, number(row.completion_tokens ?? 0)),
            h("td", { class: "right" }, costOf(row)),
          ),
        ),
      ),
    ),
  );
}
