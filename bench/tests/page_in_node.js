// Runs the script of a page against the few parts of a browser that it uses, and prints what it drew.
// node page_in_node.js PAGE WIDTH [STEP...]: a step is `choose FILTER VALUE`, `all FILTER`, `every`, `show more`,
// `point ROW` or `click ROW`, as JSON lists.
"use strict";
const fs = require("fs");
const [page, width, ...steps] = process.argv.slice(2);
const text = fs.readFileSync(page, "utf8");
const escape = (value) => String(value).replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
class Element {
  constructor(name, space) {
    Object.assign(this, { name, namespaceURI: space, children: [], parent: null, attributes: {}, listeners: {}, own: "" });
    Object.assign(this, { style: {}, hidden: false, clientWidth: Number(width), offsetWidth: 300, offsetHeight: 200 });
  }
  setAttribute(key, value) { this.attributes[key] = String(value); }
  getAttribute(key) { return this.attributes[key] ?? null; }
  set textContent(value) { this.children = []; this.own = String(value); }
  get textContent() { return this.own + this.children.map((child) => child.textContent).join(""); }
  appendChild(child) { child.parent = this; this.children.push(child); return child; }
  replaceChildren() { this.children = []; this.own = ""; }
  addEventListener(kind, listener) { this.listeners[kind] = listener; }
  get all() { return [this, ...this.children.flatMap((child) => child.all)]; }
  get selectedOptions() { return this.children.filter((child) => child.selected); }
  set selectedIndex(place) { this.children.forEach((child, k) => { child.selected = k === place; }); }
  get value() { return this.attributes.value; }
  contains(other) { return this.all.includes(other); }
  closest() { return "data-row" in this.attributes || "data-cell" in this.attributes ? this : null; }
  get outer() {
    const attributes = Object.entries(this.attributes).map(([key, value]) => ` ${key}="${escape(value)}"`).join("");
    const space = this.name === "svg" ? ' xmlns="http://www.w3.org/2000/svg"' : "";
    return `<${this.name}${space}${attributes}>${escape(this.own)}${this.children.map((c) => c.outer).join("")}</${this.name}>`;
  }
}
const SVG = "http://www.w3.org/2000/svg", HTML = "http://www.w3.org/1999/xhtml";
const ids = {};
for (const [, id] of text.matchAll(/ id="([^"]+)"/g)) ids[id] = new Element("div", HTML);
const block = text.match(/<script type="application\/json" id="data">([^]*?)<\/script>/)[1];
const script = text.match(/<script>([^]*)<\/script><\/body>/)[1];
ids.data.own = block;
ids.every.checked = false;
const listeners = {};
global.document = {
  getElementById: (id) => ids[id] ?? null,
  createElement: (name) => new Element(name, HTML),
  createElementNS: (space, name) => new Element(name, space),
  addEventListener: (kind, listener) => { listeners[kind] = listener; },
};
Object.assign(global, { innerWidth: Number(width), innerHeight: 800, addEventListener: () => {} });
global.IntersectionObserver = class {
  constructor(told) { this.told = told; }
  observe(target) { this.told([{ target, isIntersecting: true }]); }
};
const start = process.cpuUsage();
new Function(script)();
const used = process.cpuUsage(start);
for (const step of steps.map((one) => JSON.parse(one))) {
  const lists = Object.fromEntries(ids.filters.children.filter((child) => child.name === "label")
    .map((child) => [child.own, child.children[0]]));
  if (step[0] === "choose") {
    for (const option of lists[step[1]].children) option.selected = step.slice(2).includes(option.value);
    lists[step[1]].listeners.change();
  } else if (step[0] === "all") {
    ids.filters.children.find((child) => child.textContent === `all of ${step[1]}`).listeners.click();
  } else if (step[0] === "every") {
    ids.every.checked = true;
    ids.every.listeners.change();
  } else if (step[0] === "show more") {
    ids.matrix.children.at(-1).listeners.click();
  } else if (step[0] === "point" || step[0] === "click") {
    const found = Object.values(ids).flatMap((one) => one.all).find((one) => one.attributes["data-row"] === step[1]);
    listeners[step[0] === "point" ? "pointerover" : "click"]({ type: step[0], target: found, clientX: 10, clientY: 10 });
  } else throw new Error(`no such step: ${step[0]}`);
}
const drawn = {};
for (const [id, element] of Object.entries(ids))
  if (id === "matrix" || id.startsWith("picture-") || id === "tip")
    drawn[id] = { text: element.textContent, svg: element.all.filter((one) => one.name === "svg" && one.attributes.role).map((one) => one.outer),
      outer: element.outer };
process.stdout.write(JSON.stringify({ drawn, cpu_s: (used.user + used.system) / 1e6, filters: ids.filters.textContent }));
