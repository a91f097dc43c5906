"use strict";
// Draws the pictures of the page from the figures in it, narrows them by the filters, and shows the record under the
// pointer. It fetches nothing, sets text only as text, and draws a picture when it comes into view.
const data = JSON.parse(document.getElementById("data").textContent);
const MOST_POINTS = 2000, MOST_LINES = 20, MOST_PANELS = 4, MOST_LINES_OF_MATRIX = 200;
const reader = (column) =>
  Array.isArray(column) ? (k) => column[k] : (k) => (column.codes[k] < 0 ? null : column.levels[column.codes[k]]);
const readers = (table) => Object.fromEntries(Object.entries(table).map(([name, column]) => [name, reader(column)]));
const cells = readers(data.cells), rows = readers(data.rows);
const ofCell = (k, name) => (cells[name] ? cells[name](k) : null);
const ofRow = (k, name) => (rows[name] ? rows[name](k) : ofCell(rows.cell(k), name));
const count = (n) => Array.from({ length: n }, (_, k) => k);
const allCells = count(data.number_of_cells), allRows = count(data.number_of_rows);
// Filter to the values that are chosen; absent where everything is.
const chosen = new Map(Object.entries(data.chosen).map(([name, value]) => [name, new Set([value])]));
const matches = (name, value) => chosen.get(name)?.has(value) ?? true;
const keepsCell = (k) => data.filters.every((name) => !cells[name] || matches(name, cells[name](k)));
const keepsRow = (k) => data.filters.every((name) => matches(name, ofRow(k, name)));
// The fastest of each framework stand for all, unless competitors were asked for.
const everyCompetitor = () =>
  document.getElementById("every").checked || data.filters.some((name) => rows[name] && chosen.has(name));

function element(parent, name, attributes = {}, text = null) {
  const made = name === "svg" || parent?.namespaceURI?.endsWith("svg")
    ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  parent?.appendChild(made);
  return made;
}

// --- numbers and axes ---

const PREFIXES = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""], [1e-3, "m"], [1e-6, "u"], [1e-9, "n"]];
function short(value, unit) {
  const [size, prefix] = PREFIXES.find(([least]) => value >= least * 0.9999 || (!unit && least === 1)) ?? [1, ""];
  return `${Number((value / size).toPrecision(3))}${prefix || unit ? " " : ""}${prefix}${unit}`.trim();
}

// Round numbers between two ends, so far apart that their texts have room.
function ticks(low, high, most) {
  const from = Math.floor(Math.log10(low)), to = Math.ceil(Math.log10(high));
  for (const [factors, step] of [[[1, 2, 5], 1], [[1, 3], 1], [[1], 1], [[1], 2], [[1], 3], [[1], 6]]) {
    const found = count(to - from + 1).filter((k) => (from + k) % step === 0)
      .flatMap((k) => factors.map((factor) => factor * 10 ** (from + k)))
      .filter((value) => value >= low * 0.999 && value <= high * 1.001);
    if (found.length <= most && found.length > 1) return found;
  }
  return [low, high];
}
function scale(values, from, to) {
  const low = Math.min(...values) / 1.3, high = Math.max(...values) * 1.3;
  const place = (value) => from + ((to - from) * Math.log(value / low)) / Math.log(high / low);
  return Object.assign(place, { low, high });
}

// Shapes beside colours, for readers who cannot tell the colours apart.
const SHAPES = [
  (x, y, r) => `M${x - r},${y}a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0Z`,
  (x, y, r) => `M${x},${y - 1.3 * r}L${x + 1.3 * r},${y + r}H${x - 1.3 * r}Z`,
  (x, y, r) => `M${x - r},${y - r}h${2 * r}v${2 * r}h${-2 * r}Z`,
  (x, y, r) => `M${x},${y - 1.4 * r}L${x + 1.4 * r},${y}L${x},${y + 1.4 * r}L${x - 1.4 * r},${y}Z`,
];
const FRAMEWORKS = ["torch", "jax"];
function mark(svg, kind, x, y, attributes) {
  const place = [x, y].map((value) => Math.round(value * 10) / 10);
  return element(svg, "path", { d: SHAPES[kind % SHAPES.length](...place, 4), ...attributes });
}
function legend(figure, names) {
  const line = element(figure, "p", { class: "legend" });
  names.forEach((name, k) => {
    const svg = element(element(line, "span"), "svg", { width: 14, height: 14, "aria-hidden": "true" });
    mark(svg, k, 7, 7, { class: `mark c${k}` });
    element(line, "span", {}, `${name} `);
  });
}

// --- pictures ---

function grouped(items, names) {
  const found = new Map();
  for (const item of items) {
    const key = JSON.stringify(names.map((name) => ofRow(item, name)));
    found.has(key) ? found.get(key).push(item) : found.set(key, [item]);
  }
  return [...found.values()];
}
function panels(picture) {
  const every = picture.every || everyCompetitor(), needed = [picture.x, picture.y].filter(Boolean).map((axis) => axis.column);
  const found = allRows.filter((k) => (every || data.places.includes(ofRow(k, "place"))) && keepsRow(k)
    && needed.every((name) => ofRow(k, name) > 0));
  const differing = data.panel.filter((name) => new Set(found.map((k) => ofRow(k, name))).size > 1);
  return grouped(found, data.panel).map((group) => ({
    group, title: differing.map((name) => ofRow(group[0], name) ?? "no optimizer").join(", "),
  }));
}
function frame(parent, title, width, height) {
  return element(parent, "svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
}
function axes(svg, x, y, box, pictureX, pictureY) {
  for (const value of ticks(x.low, x.high, (box.right - box.left) / 58)) {
    element(svg, "line", { class: "grid", x1: x(value), x2: x(value), y1: box.top, y2: box.bottom });
    element(svg, "text", { x: x(value), y: box.bottom + 15, "text-anchor": "middle" }, short(value, pictureX.unit));
  }
  element(svg, "text", { class: "axis", x: (box.left + box.right) / 2, y: box.bottom + 33, "text-anchor": "middle" },
    pictureX.title);
  if (!y) return;
  for (const value of ticks(y.low, y.high, (box.bottom - box.top) / 28)) {
    element(svg, "line", { class: "grid", x1: box.left, x2: box.right, y1: y(value), y2: y(value) });
    element(svg, "text", { x: box.left - 5, y: y(value) + 4, "text-anchor": "end" }, short(value, pictureY.unit));
  }
  element(svg, "text", { class: "axis", x: 4, y: box.top - 8 }, pictureY.title);
}

function scatter(parent, picture, { group, title }, width) {
  const height = 300, box = { left: 52, right: width - 12, top: 24, bottom: height - 42 };
  const shown = group.slice(0, MOST_POINTS), at = (name) => shown.map((k) => ofRow(k, name)).filter((v) => v > 0);
  const roofs = picture.roofs.filter((roof) => ["machine", "precision"].every((name) =>
    roof[name] === ofRow(group[0], name)));
  const heights = [picture.y.column, picture.low, picture.high].filter(Boolean).flatMap(at);
  const x = scale(at(picture.x.column), box.left, box.right);
  const y = scale([...heights, ...roofs.map((roof) => roof.at[2][1])], box.bottom, box.top);
  const svg = frame(parent, `${picture.title}, ${title}: ${picture.y.title} over ${picture.x.title}`, width, height);
  axes(svg, x, y, box, picture.x, picture.y);
  // Cut where the panel ends, for a roof's corners may lie outside.
  const clip = element(svg, "svg", { x: box.left, y: box.top, width: box.right - box.left, height: box.bottom - box.top });
  const taken = [], leaders = [];
  for (const roof of roofs) {
    const corners = roof.at.map(([a, b]) => [x(a), y(b)]), line = roof.roof === "measured" ? "roof" : "roof dashed";
    element(clip, "polyline", { class: line, points: corners.map(([a, b]) => `${a - box.left},${b - box.top}`).join(" ") });
    for (const [[a, b], [c, d]] of [corners.slice(0, 2), corners.slice(1)])
      taken.push(...count(60).map((k) => k / 59).map((t) => [a + t * (c - a) - 3, b + t * (d - b) - 2, a + t * (c - a) + 3, b + t * (d - b) + 2]));
  }
  for (const line of picture.joined.length ? grouped(shown, picture.joined) : []) {
    const corners = line.map((k) => [x(ofRow(k, picture.x.column)), y(ofRow(k, picture.y.column))]);
    const points = corners.sort((a, b) => a[0] - b[0]).map(([a, b]) => `${a.toFixed(1)},${b.toFixed(1)}`).join(" ");
    const kind = FRAMEWORKS.indexOf(ofRow(line[0], "framework"));
    if (line.length > 1) element(svg, "polyline", { class: `joined c${kind}`, points });
  }
  for (const k of shown) {
    const a = x(ofRow(k, picture.x.column)), b = y(ofRow(k, picture.y.column));
    const kind = Math.max(0, FRAMEWORKS.indexOf(ofRow(k, "framework"))), leads = ofRow(k, "place") === data.places[0];
    const [low, high] = [picture.low, picture.high].map((name) => (name ? ofRow(k, name) : null));
    if (low > 0 && high > 0) element(svg, "line", { class: `bar c${kind}`, x1: a, x2: a, y1: y(low), y2: y(high) });
    mark(svg, kind, a, b, { class: `mark c${kind} ${leads ? "" : "open"}`, "data-row": k });
    taken.push([a - 4, b - 4, a + 4, b + 4]);
    if (leads && picture.label) leaders.push([a, b, String(ofRow(k, picture.label))]);
  }
  const named = new Set();
  for (const [a, b, text] of leaders) {
    if (named.has(text)) continue;
    const long = 6.4 * text.length;
    for (const [left, top] of [[a + 7, b - 6], [a - 7 - long, b - 6], [a - long / 2, b - 20], [a - long / 2, b + 7]]) {
      const area = [left, top, left + long, top + 13];
      if (area[0] < box.left || area[2] > box.right || area[1] < box.top || area[3] > box.bottom) continue;
      if (taken.some((other) => area[0] < other[2] && area[2] > other[0] && area[1] < other[3] && area[3] > other[1]))
        continue;
      element(svg, "text", { class: "name", x: left, y: top + 11 }, text);
      taken.push(area);
      named.add(text);
      break;
    }
  }
  return group.length - shown.length;
}

function lines(parent, picture, { group, title }, width) {
  const shown = group.slice(0, MOST_LINES), names = Object.keys(picture.marks), step = 38;
  const box = { left: 8, right: width - 12, top: 4, bottom: 10 + step * shown.length };
  const values = shown.flatMap((k) => names.map((name) => ofRow(k, name))).filter((value) => value > 0);
  const x = scale(values, box.left + 6, box.right - 6);
  const svg = frame(parent, `${picture.title}, ${title}: ${picture.x.title}`, width, box.bottom + 42);
  axes(svg, x, null, box, picture.x, null);
  shown.forEach((k, line) => {
    const y = box.top + step * line + 29, most = Math.floor((width - 20) / 6.6);
    const note = picture.note ? ofRow(k, picture.note) : null;
    const text = [`${ofRow(k, "workload")}: ${ofRow(k, "label")}`, note].filter(Boolean).join("; ");
    element(svg, "text", { x: box.left, y: y - 11, class: "name" }, text.length > most ? `${text.slice(0, most - 3)}...` : text);
    element(svg, "line", { class: "grid", x1: box.left, x2: box.right, y1: y, y2: y });
    names.forEach((name, kind) => {
      if (ofRow(k, name) > 0) mark(svg, kind, x(ofRow(k, name)), y, { class: `mark c${kind}`, "data-row": k });
    });
  });
  return group.length - shown.length;
}

function drawPicture(figure, picture) {
  figure.replaceChildren();
  element(figure, "figcaption", {}, picture.title);
  const found = panels(picture);
  if (!found.length) return void element(figure, "p", { class: "note" }, "Nothing is left by the filters.");
  legend(figure, picture.y ? FRAMEWORKS : Object.values(picture.marks));
  if (picture.y) element(figure, "p", { class: "note" }, "Filled: first, or tied for the first place."
    + (picture.roofs.length ? " Line: measured roof; dashed: data sheet." : ""));
  const grid = element(figure, "div", { class: "panels" }), room = Math.max(280, (figure.clientWidth || 340) - 2);
  const side = found.length > 1 && room >= 680 ? Math.floor(room / 2) - 10 : Math.min(room, 820);
  let left = 0;
  for (const panel of found.slice(0, MOST_PANELS)) {
    const holder = element(grid, "div");
    if (panel.title) element(holder, "h3", {}, panel.title);
    left += (picture.y ? scatter : lines)(holder, picture, panel, side);
  }
  const more = [left && `${left} more competitors`, found.length > MOST_PANELS && `${found.length - MOST_PANELS} more panels`];
  if (more.some(Boolean)) element(figure, "p", { class: "note" }, `${more.filter(Boolean).join(", ")}: narrow the filters.`);
}

// --- who wins where ---

function drawWinners(holder, most = MOST_LINES_OF_MATRIX) {
  holder.replaceChildren();
  const table = element(element(holder, "div", { class: "scroll" }), "table"), lines = new Map();
  const columns = [...new Set(allCells.filter(keepsCell).map((k) => ofCell(k, "column")))];
  for (const k of allCells.filter(keepsCell)) {
    const line = ofCell(k, "line");
    lines.has(line) ? lines.get(line).push(k) : lines.set(line, [k]);
  }
  const head = element(table, "tr");
  for (const name of ["workload", ...columns]) element(head, "th", { scope: "col" }, name);
  for (const line of [...lines.values()].slice(0, most)) {
    const row = element(table, "tr"), first = element(row, "th", { scope: "row" }, ofCell(line[0], "workload"));
    element(first, "small", {}, ofCell(line[0], "sizes"));
    for (const name of columns) {
      const k = line.find((one) => ofCell(one, "column") === name);
      if (k === undefined) { element(row, "td", {}, "-"); continue; }
      const cell = element(row, "td", { class: ofCell(k, "lead"), "data-cell": k }, ofCell(k, "leaders"));
      element(cell, "small", {}, ofCell(k, "frameworks"));
    }
  }
  if (lines.size > most)
    element(holder, "button", { type: "button" }, `${lines.size - most} more workloads: show more`)
      .addEventListener("click", () => drawWinners(holder, 2 * most));
}

// --- filters ---

function drawFilter(holder, name) {
  const read = rows[name] ?? cells[name], values = [...new Set((rows[name] ? allRows : allCells).map(read))];
  const label = element(holder, "label", {}, name), list = element(label, "select", { multiple: "", size: 4 });
  for (const value of values) element(list, "option", { value }, value).selected = chosen.get(name)?.has(value) ?? false;
  const set = () => {
    const wanted = [...list.selectedOptions].map((option) => option.value);
    wanted.length ? chosen.set(name, new Set(wanted)) : chosen.delete(name);
    changed();
  };
  list.addEventListener("change", set);
  element(holder, "button", { type: "button" }, `all of ${name}`).addEventListener("click", () => {
    list.selectedIndex = -1;
    set();
  });
}

// --- the record under the pointer ---

const tip = document.getElementById("tip");
function showRecord(event) {
  const found = event.target.closest?.("[data-row],[data-cell]");
  if (!found) return void (tip.hidden = true);
  const row = found.getAttribute("data-row"), cell = row === null ? found.getAttribute("data-cell") : rows.cell(row);
  tip.replaceChildren();
  element(tip, "b", {}, row === null ? ofCell(cell, "workload") : `${ofRow(row, "label")}, ${ofCell(cell, "workload")}`);
  const table = element(tip, "table"), named = row === null ? [] : Object.keys(rows).filter((name) => name !== "cell");
  for (const name of [...named, ...Object.keys(cells)]) {
    const value = named.includes(name) ? ofRow(row, name) : ofCell(cell, name);
    if (value === null || value === "") continue;
    const line = element(table, "tr");
    element(line, "th", {}, name);
    element(line, "td", {}, value);
  }
  tip.hidden = false;
  const left = Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8);
  const top = Math.min(event.clientY + 12, innerHeight - tip.offsetHeight - 8);
  Object.assign(tip.style, { left: `${Math.max(4, left)}px`, top: `${Math.max(4, top)}px` });
}
for (const kind of ["pointerover", "click"]) document.addEventListener(kind, showRecord);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });

// --- drawing what is in view ---

const drawings = [[document.getElementById("matrix"), drawWinners]];
for (const picture of data.pictures)
  drawings.push([document.getElementById(`picture-${picture.name}`), (figure) => drawPicture(figure, picture)]);
const stale = new Set(drawings.map(([figure]) => figure)), seen = new Set();
function draw() {
  for (const [figure, make] of drawings)
    if (seen.has(figure) && stale.delete(figure)) make(figure);
}
function changed() {
  for (const [figure] of drawings) stale.add(figure);
  draw();
}
for (const name of data.filters) drawFilter(document.getElementById("filters"), name);
document.getElementById("every").addEventListener("change", changed);
const watch = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) isIntersecting ? seen.add(target) : seen.delete(target);
  draw();
}, { rootMargin: "400px" });
for (const [figure] of drawings) watch.observe(figure);
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; changed(); } });
addEventListener("beforeprint", () => { for (const [figure] of drawings) seen.add(figure); draw(); });
