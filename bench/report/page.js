"use strict";
// Draws the figures of the page when they come into view, narrowed by filters. Fetches nothing, sets text only as text.
const data = JSON.parse(document.getElementById("data").textContent);
const MOST_POINTS = 2000, MOST_LINES = 20, MOST_PANELS = 4, MOST_WORKLOADS = 200;
const reader = (column) =>
  Array.isArray(column) ? (k) => column[k] : (k) => (column.codes[k] < 0 ? null : column.levels[column.codes[k]]);
const readers = (table) => Object.fromEntries(Object.entries(table).map(([name, column]) => [name, reader(column)]));
const cells = readers(data.cells), rows = readers(data.rows);
const ofCell = (k, name) => cells[name]?.(k) ?? null;
const ofRow = (k, name) => (rows[name] ? rows[name](k) : ofCell(rows.cell(k), name));
const count = (n) => [...Array(n).keys()], allCells = count(data.number_of_cells), allRows = count(data.number_of_rows);
// Filter to the values that are chosen, or absent.
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
const line = (svg, kind, x1, y1, x2, y2) => element(svg, "line", { class: kind, x1, y1, x2, y2 });
const write = (svg, kind, x, y, anchor, text) => element(svg, "text", { class: kind, x, y, "text-anchor": anchor }, text);
const path = (svg, kind, points) =>
  element(svg, "polyline", { class: kind, points: points.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ") });

function grouped(items, key) {
  const found = new Map();
  for (const item of items) found.has(key(item)) ? found.get(key(item)).push(item) : found.set(key(item), [item]);
  return [...found.values()];
}
const alike = (names) => (k) => JSON.stringify(names.map((name) => ofRow(k, name)));

// --- numbers, axes and marks ---
const PREFIXES = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""], [1e-3, "m"], [1e-6, "u"], [1e-9, "n"]];
function short(value, unit) {
  const [size, prefix] = PREFIXES.find(([least]) => value >= least * 0.9999 || (!unit && least === 1)) ?? [1, ""];
  return `${Number((value / size).toPrecision(3))} ${prefix}${unit}`.trim();
}
// Round numbers between two ends, so few that their texts have room.
function ticks({ low, high, least, largest }, most) {
  const from = Math.floor(Math.log10(low)), powers = count(Math.ceil(Math.log10(high)) - from + 1).map((k) => from + k);
  for (const [factors, step] of [[[1, 2, 5], 1], [[1, 3], 1], [[1], 1], [[1], 2], [[1], 3], [[1], 6]]) {
    const all = powers.filter((power) => power % step === 0).flatMap((power) => factors.map((f) => f * 10 ** power));
    const found = all.filter((value) => value >= low * 0.999 && value <= high * 1.001);
    if (found.length <= most && found.length > 1) return found;
  }
  return [...new Set([least, largest])];
}
function scale(values, from, to) {
  const least = Math.min(...values), largest = Math.max(...values), low = least / 1.3, high = largest * 1.3;
  const place = (value) => from + ((to - from) * Math.log(value / low)) / Math.log(high / low);
  return Object.assign(place, { low, high, least, largest });
}
function axes(svg, box, picture, x, y) {
  for (const value of ticks(x, (box.right - box.left) / 58)) {
    line(svg, "grid", x(value), box.top, x(value), box.bottom);
    write(svg, "", x(value), box.bottom + 15, "middle", short(value, picture.x.unit));
  }
  write(svg, "axis", (box.left + box.right) / 2, box.bottom + 33, "middle", picture.x.title);
  for (const value of y ? ticks(y, (box.bottom - box.top) / 28) : []) {
    line(svg, "grid", box.left, y(value), box.right, y(value));
    write(svg, "", box.left - 5, y(value) + 4, "end", short(value, picture.y.unit));
  }
  if (y) write(svg, "axis", 4, box.top - 8, "start", picture.y.title);
}
// Shapes beside colours, for readers who cannot tell the colours apart.
const SHAPES = [
  (x, y) => `M${x - 4},${y}a4,4 0 1,0 8,0a4,4 0 1,0 -8,0Z`, (x, y) => `M${x},${y - 5}L${x + 5},${y + 4}H${x - 5}Z`,
  (x, y) => `M${x - 4},${y - 4}h8v8h-8Z`, (x, y) => `M${x},${y - 6}l6,6l-6,6l-6,-6Z`,
];
const FRAMEWORKS = ["torch", "jax"], frameworkOf = (k) => Math.max(0, FRAMEWORKS.indexOf(ofRow(k, "framework")));
function mark(svg, kind, x, y, open, row) {
  const d = SHAPES[kind](Math.round(x * 10) / 10, Math.round(y * 10) / 10);
  element(svg, "path", { d, class: `mark c${kind} ${open ? "open" : ""}`, ...(row === null ? {} : { "data-row": row }) });
}

// --- pictures ---
function scatter(parent, picture, group, title, width) {
  const box = { left: 52, right: width - 12, top: 24, bottom: 258 }, shown = group.slice(0, MOST_POINTS);
  const at = (name) => shown.map((k) => ofRow(k, name)).filter((value) => value > 0);
  const roofs = picture.roofs.filter((roof) => ["machine", "precision"].every((n) => roof[n] === ofRow(group[0], n)));
  const heights = [picture.y.column, picture.low, picture.high].filter(Boolean).flatMap(at);
  const x = scale(at(picture.x.column), box.left, box.right);
  const y = scale([...heights, ...roofs.map((roof) => roof.at[2][1])], box.bottom, box.top);
  const label = `${picture.title}, ${title}: ${picture.y.title} over ${picture.x.title}`;
  const svg = element(parent, "svg", { width, height: 300, viewBox: `0 0 ${width} 300`, role: "img", "aria-label": label });
  axes(svg, box, picture, x, y);
  const taken = [], leaders = [], point = (k) => [x(ofRow(k, picture.x.column)), y(ofRow(k, picture.y.column))];
  // Cut where the panel ends, for a roof's corners may lie outside.
  const area = { x: box.left, y: box.top, width: box.right - box.left, height: box.bottom - box.top };
  const clip = element(svg, "svg", { ...area, viewBox: Object.values(area).join(" ") });
  for (const roof of roofs) {
    const corners = roof.at.map(([a, b]) => [x(a), y(b)]);
    path(clip, roof.roof === "measured" ? "roof" : "roof dashed", corners);
    for (const [[a, b], [c, d]] of [corners.slice(0, 2), corners.slice(1)])
      for (const t of count(61)) taken.push([a + (t / 60) * (c - a), b + (t / 60) * (d - b), 3, 2]);
  }
  for (const joined of picture.joined.length ? grouped(shown, alike(picture.joined)) : [])
    if (joined.length > 1) path(svg, `joined c${frameworkOf(joined[0])}`, joined.map(point).sort((a, b) => a[0] - b[0]));
  for (const k of shown) {
    const [a, b] = point(k), leads = ofRow(k, "place") === data.places[0];
    const [low, high] = [picture.low, picture.high].map((name) => (name ? ofRow(k, name) : null));
    if (low > 0 && high > 0) line(svg, `c${frameworkOf(k)}`, a, y(low), a, y(high));
    mark(svg, frameworkOf(k), a, b, !leads, k);
    taken.push([a, b, 4, 4]);
    if (leads && picture.label) leaders.push([a, b, String(ofRow(k, picture.label))]);
  }
  // Each label where nothing is yet: its centre and half of its sides are compared with those of everything drawn.
  const named = new Set();
  for (const [a, b, text] of leaders) {
    if (named.has(text)) continue;
    const half = 3.2 * text.length, fits = ([u, v]) => u - half >= box.left && u + half <= box.right && v - 7 >= box.top
      && v + 7 <= box.bottom && !taken.some(([c, d, w, h]) => Math.abs(u - c) < half + w && Math.abs(v - d) < 7 + h);
    const beside = [[a + 7 + half, b, "start", a + 7], [a - 7 - half, b, "end", a - 7]];
    const place = [...beside, [a, b - 13, "middle", a], [a, b + 14, "middle", a]].find(fits);
    if (!place) continue;
    write(svg, "name", place[3], place[1] + 4, place[2], text);
    taken.push([place[0], place[1], half, 7]);
    named.add(text);
  }
  return group.length - shown.length;
}

function list(parent, picture, group, title, width) {
  const shown = group.slice(0, MOST_LINES), names = Object.keys(picture.marks), most = Math.floor((width - 20) / 6.4);
  // On a phone what a note says has a line of its own.
  const step = picture.note && width < 500 ? 52 : 38, height = 52 + step * shown.length;
  const box = { left: 8, right: width - 12, top: 4, bottom: height - 42 };
  const values = shown.flatMap((k) => names.map((name) => ofRow(k, name))).filter((value) => value > 0);
  const x = scale(values, box.left + 6, box.right - 6), label = `${picture.title}, ${title}: ${picture.x.title}`;
  const svg = element(parent, "svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  axes(svg, box, picture, x, null);
  shown.forEach((k, place) => {
    const y = box.top + step * (place + 1) - 9, note = picture.note ? ofRow(k, picture.note) ?? "" : "";
    const text = `${ofRow(k, "workload")}: ${ofRow(k, "label")}`, all = step === 38 && note ? `${text}; ${note}` : text;
    write(svg, "name", box.left, y + 27 - step, "start", all.length > most ? `${all.slice(0, most - 3)}...` : all);
    if (step !== 38) write(svg, "name", box.left, y - 11, "start", note);
    line(svg, "grid", box.left, y, box.right, y);
    names.forEach((name, kind) => { if (ofRow(k, name) > 0) mark(svg, kind, x(ofRow(k, name)), y, false, k); });
  });
  return group.length - shown.length;
}

function drawPicture(figure, picture) {
  figure.replaceChildren();
  element(figure, "figcaption", {}, picture.title);
  const every = picture.every || everyCompetitor(), needed = [picture.x, picture.y].filter(Boolean);
  const found = allRows.filter((k) => (every || data.places.includes(ofRow(k, "place"))) && keepsRow(k)
    && needed.every((axis) => ofRow(k, axis.column) > 0));
  const groups = grouped(found, alike(data.panel));
  const differing = data.panel.filter((name) => new Set(found.map((k) => ofRow(k, name))).size > 1);
  if (!found.length) return void element(figure, "p", { class: "note" }, "Nothing is left by the filters.");
  const legend = element(figure, "p", { class: "legend" });
  (picture.y ? FRAMEWORKS : Object.values(picture.marks)).forEach((name, kind) => {
    const entry = element(legend, "span"), size = { width: 14, height: 14, "aria-hidden": "true" };
    mark(element(entry, "svg", size), kind, 7, 7, false, null), element(entry, "span", {}, ` ${name}`);
  });
  if (picture.y) element(legend, "span", { class: "note" }, "filled: first, or tied for the first place");
  if (picture.roofs.length) element(legend, "span", { class: "note" }, "line: measured roof; dashed: data sheet");
  const grid = element(figure, "div", { class: "panels" }), room = Math.max(280, (figure.clientWidth || 340) - 2);
  const width = groups.length > 1 && room >= 680 ? Math.floor(room / 2) - 10 : Math.min(room, 820);
  let left = 0;
  for (const group of groups.slice(0, MOST_PANELS)) {
    const holder = element(grid, "div"), title = differing.map((name) => ofRow(group[0], name) ?? "no optimizer").join(", ");
    element(holder, "h3", { style: `max-width: ${width}px` }, title);
    left += (picture.y ? scatter : list)(holder, picture, group, title, width);
  }
  const rest = [[left, "more competitors"], [groups.length - MOST_PANELS, "more panels"]].filter(([more]) => more > 0);
  if (rest.length) element(figure, "p", { class: "note" }, `${rest.map((one) => one.join(" ")).join(", ")}: use the filters.`);
}

// --- who wins where ---
function drawWinners(holder, most = MOST_WORKLOADS) {
  holder.replaceChildren();
  const table = element(element(holder, "div", { class: "scroll" }), "table"), found = allCells.filter(keepsCell);
  const columns = [...new Set(found.map(cells.column))], lines = grouped(found, cells.line), head = element(table, "tr");
  for (const name of ["workload", ...columns]) element(head, "th", { scope: "col" }, name);
  for (const its of lines.slice(0, most)) {
    const row = element(table, "tr"), first = element(row, "th", { scope: "row" }, ofCell(its[0], "workload"));
    element(first, "small", {}, ofCell(its[0], "sizes").replaceAll("->", "→"));
    for (const name of columns) {
      const k = its.find((one) => cells.column(one) === name), there = k !== undefined;
      const cell = element(row, "td", there ? { class: ofCell(k, "lead"), "data-cell": k } : {}, there ? ofCell(k, "leaders") : "-");
      if (there) element(cell, "small", {}, ofCell(k, "frameworks"));
    }
  }
  if (lines.length <= most) return;
  const more = element(holder, "button", { type: "button" }, `${lines.length - most} more workloads: show more`);
  more.addEventListener("click", () => drawWinners(holder, 2 * most));
}

// --- filters, and the record under the pointer ---
function drawFilter(holder, name) {
  const values = [...new Set(rows[name] ? allRows.map(rows[name]) : allCells.map(cells[name]))];
  const label = element(holder, "label", {}, name), list = element(label, "select", { multiple: "", size: 4 });
  for (const value of values) element(list, "option", { value }, value).selected = chosen.get(name)?.has(value) ?? false;
  const set = () => {
    const wanted = [...list.selectedOptions].map((option) => option.value);
    void (wanted.length ? chosen.set(name, new Set(wanted)) : chosen.delete(name)), changed();
  };
  list.addEventListener("change", set);
  const every = element(holder, "button", { type: "button" }, `all of ${name}`);
  every.addEventListener("click", () => { list.selectedIndex = -1; set(); });
}
const tip = document.getElementById("tip");
// A click keeps the record, so that a long one can be scrolled.
function showRecord(event) {
  if (tip.className && (event.type !== "click" || tip.contains(event.target))) return;
  const found = event.target.closest?.("[data-row],[data-cell]");
  tip.className = found && event.type === "click" ? "kept" : "";
  tip.hidden = !found;
  if (!found) return;
  tip.replaceChildren();
  const row = found.getAttribute("data-row"), cell = row === null ? found.getAttribute("data-cell") : rows.cell(row);
  element(tip, "b", {}, [row === null ? "" : ofRow(row, "label"), ofCell(cell, "workload")].filter(Boolean).join(", "));
  const table = element(tip, "table"), named = row === null ? [] : Object.keys(rows).filter((name) => name !== "cell");
  for (const name of [...named, ...Object.keys(cells)]) {
    const value = named.includes(name) ? ofRow(row, name) : ofCell(cell, name), entry = document.createElement("tr");
    for (const [tag, text] of [["th", name], ["td", value]]) element(entry, tag, {}, text);
    if (value !== null && value !== "") table.appendChild(entry);
  }
  const inside = (at, size, room) => `${Math.max(4, Math.min(at + 12, room - size - 8))}px`;
  tip.style.left = inside(event.clientX, tip.offsetWidth, innerWidth);
  tip.style.top = inside(event.clientY, tip.offsetHeight, innerHeight);
}
for (const kind of ["pointerover", "click"]) document.addEventListener(kind, showRecord);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true, tip.className = ""; });

// --- drawing what is in view ---
const drawer = (picture) => [document.getElementById(`picture-${picture.name}`), (figure) => drawPicture(figure, picture)];
const drawings = new Map([[document.getElementById("matrix"), drawWinners], ...data.pictures.map(drawer)]);
const stale = new Set(drawings.keys()), seen = new Set();
const draw = () => drawings.forEach((make, figure) => { if (seen.has(figure) && stale.delete(figure)) make(figure); });
const changed = () => { for (const figure of drawings.keys()) stale.add(figure); draw(); };
for (const name of data.filters) drawFilter(document.getElementById("filters"), name);
document.getElementById("every").addEventListener("change", changed);
const look = (entries) => entries.forEach((one) => seen[one.isIntersecting ? "add" : "delete"](one.target)) ?? draw();
const watch = new IntersectionObserver(look, { rootMargin: "400px" });
for (const figure of drawings.keys()) watch.observe(figure);
let wide = innerWidth;
addEventListener("resize", () => { if (innerWidth !== wide) wide = innerWidth, changed(); });
addEventListener("beforeprint", () => { for (const figure of drawings.keys()) seen.add(figure); draw(); });
