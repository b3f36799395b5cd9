"use strict";
// Names and file names come from anywhere: they get into the page as text and values alone, never as HTML.
const byId = (id) => document.getElementById(id);
const about = JSON.parse(byId("about").textContent);
const fields = new Map([...document.querySelectorAll("input.name")].map((field) => [Number(field.dataset.cluster), field]));
const names = new Map(Object.entries(about.names).map(([cluster, name]) => [Number(cluster), name]));
let unsaved = false, kept = true;

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function say(text, bad = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("bad", bad);
}

// ---- Names. `plain` is that of iic_dist/prediction/names.py.

const plain = (name) => name.normalize("NFC").replace(/[\s\u0000-\u001f\u007f-\u009f\ufeff]+/g, " ").trim();

function rename(cluster, name) {
  if (plain(name)) names.set(cluster, plain(name));
  else names.delete(cluster);
}

function clustersOf(name) {
  return [...names].filter(([, other]) => other === name).map(([cluster]) => cluster).sort((a, b) => a - b);
}

function link(cluster, text = String(cluster)) {
  return fields.has(cluster) ? element("a", { href: `#cluster-${cluster}` }, text) : text;
}

function show() {
  const named = [...fields.keys()].filter((cluster) => names.has(cluster));
  const different = new Set(named.map((cluster) => names.get(cluster))).size;
  byId("count").textContent = `${named.length} of ${fields.size} named` +
    (different < named.length ? `, ${different} ${different === 1 ? "name" : "names"}` : "");
  for (const label of document.querySelectorAll("[data-name-of]"))
    label.textContent = names.get(Number(label.dataset.nameOf)) ?? "";
  for (const note of document.querySelectorAll("[data-note-of]")) {
    const cluster = Number(note.dataset.noteOf);
    const others = names.has(cluster) ? clustersOf(names.get(cluster)).filter((other) => other !== cluster) : [];
    note.replaceChildren(others.length === 1 ? "The same name as cluster " : "The same name as clusters ",
      ...others.flatMap((other, i) => [i ? ", " : "", link(other)]), ": with these names they become one.");
    note.hidden = !others.length;
  }
}

// Some browsers keep nothing for pages of a disk, or forbid even to ask.
function keep() {
  unsaved = true;
  try {
    localStorage.setItem(`iic_dist names ${about.key}`, JSON.stringify([...names]));
    kept = true;
  } catch {
    kept = false;
  }
}

function recall() {
  try {
    const stored = JSON.parse(localStorage.getItem(`iic_dist names ${about.key}`));
    if (!stored) return;
    names.clear();
    for (const [cluster, name] of stored) rename(Number(cluster), String(name));
    say("Names are those that you gave here before.");
  } catch {
    // Nothing kept, or not by this page.
  }
}

function fill() {
  for (const [cluster, field] of fields) field.value = names.get(cluster) ?? "";
}

document.addEventListener("input", ({ target }) => {
  if (!target.matches("input.name")) return;
  rename(Number(target.dataset.cluster), target.value);
  keep();
  show();
  say(kept ? "" : "This browser keeps no names for this page: save them before you close it.", !kept);
});

// ---- names.csv, as RFC 4180 has it.

const quoted = (cell) => (/[",\r\n]/.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell);

function table(text) {
  const rows = [[]];
  const cell = /("(?:[^"]|"")*"|[^",\r\n]*)(,|\r\n|[\r\n]|$)/y;
  while (cell.lastIndex < text.length) {
    const found = cell.exec(text);
    if (!found) throw new Error(`record ${rows.length} is not CSV`);
    const [, value, end] = found;
    rows.at(-1).push(value.startsWith('"') ? value.slice(1, -1).replaceAll('""', '"') : value);
    if (end !== ",") rows.push([]);
  }
  return rows.filter((row) => row.some((value) => value.trim()));
}

function read(bytes) {
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    throw new Error("it is not UTF-8");
  }
  const [header = [], ...rows] = table(text);
  const columns = ["cluster", "name"].map((column) => header.findIndex((cell) => cell.trim() === column));
  if (columns.includes(-1)) throw new Error(`its first line must be cluster,name, and is ${header.join(",").slice(0, 60)}`);
  const found = new Map();
  for (const row of rows) {
    const number = (row[columns[0]] ?? "").trim();
    if (!/^[0-9]{1,9}$/.test(number) || Number(number) >= about.clusters)
      throw new Error(`there is no cluster ${number.slice(0, 60)}; they are 0 to ${about.clusters - 1}`);
    if (found.has(Number(number))) throw new Error(`cluster ${Number(number)} is named twice`);
    found.set(Number(number), row[columns[1]] ?? "");
  }
  return found;
}

byId("save").addEventListener("click", () => {
  if (!names.size) return say("No cluster has a name yet: type one beside its number.", true);
  const rows = [...names].sort(([a], [b]) => a - b);
  const text = [["cluster", "name"], ...rows].map((row) => row.map((cell) => quoted(String(cell))).join(",") + "\r\n").join("");
  const address = URL.createObjectURL(new Blob([text], { type: "text/csv;charset=utf-8" }));
  element("a", { href: address, download: "names.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
  unsaved = false;
  say("Saved as names.csv; python -m iic_dist.predict takes it with --names names.csv.");
});

byId("load").addEventListener("change", async ({ target }) => {
  const [file] = target.files;
  if (!file) return;
  try {
    const found = read(await file.arrayBuffer());
    for (const [cluster, name] of found) rename(cluster, name);
    fill();
    keep();
    unsaved = false;
    show();
    say(`${found.size} ${found.size === 1 ? "name" : "names"} loaded from ${file.name}.`);
  } catch (error) {
    say(`${file.name} was not loaded: ${error.message}.`, true);
  }
  target.value = ""; // so that the same file can be chosen again
});

addEventListener("beforeunload", (event) => {
  if (unsaved && !kept) event.preventDefault();
});

// ---- The nearest images of one that is chosen, in a strip below its row.

let surroundings, opened;

function picture(place) {
  const button = document.querySelector(`.picture[data-place="${place}"]`);
  if (button) {
    const image = button.firstElementChild;
    const cluster = Number(button.closest("section").dataset.cluster);
    return { source: image.src, path: image.title, cluster, small: image.classList.contains("small") };
  }
  const [source, path, cluster, , small] = surroundings.further[place - surroundings.nearest.length];
  return { source, path, cluster, small };
}

function nearestFigure(place, cosine, cluster) {
  const { source, path, cluster: own, small } = picture(place);
  const image = element("img", { src: source, alt: path, title: path, width: 96, height: 96, className: small ? "small" : "" });
  const label = names.has(own) ? `${own} ${names.get(own)}` : `cluster ${own}`;
  const home = element("a", { href: `#cluster-${own}`, className: own === cluster ? "" : "other", title: label }, label);
  return element("figure", {}, image, element("figcaption", {}, `${cosine.toFixed(2)} `, home));
}

function explain(exact, count) {
  const all = `all ${surroundings.images.toLocaleString("en")} images`;
  if (!count) return "There is no other image.";
  const how = "by the features of the network; the number is the cosine, and then comes the cluster";
  if (exact === count) return `The nearest of ${all}, ${how}.`;
  if (!exact) return `The nearest of the images on this page, ${how}.`;
  return `The first ${exact} are the nearest of ${all}, the paler ones the nearest of those on this page, ${how}.`;
}

function close() {
  if (!opened) return;
  byId("strip").remove();
  opened.setAttribute("aria-expanded", "false");
  opened = undefined;
}

function open(button) {
  surroundings ??= JSON.parse(byId("surroundings").textContent);
  const { path, cluster } = picture(button.dataset.place);
  const numbers = surroundings.nearest[button.dataset.place], exact = surroundings.exact[button.dataset.place];
  const shut = element("button", { type: "button", className: "close" }, "Close");
  shut.addEventListener("click", () => { const from = opened; close(); from.focus(); });
  const list = element("ul", { className: "grid" });
  for (let i = 0; i < numbers.length; i += 2)
    list.append(element("li", { className: i / 2 < exact || !exact ? "" : "rest" }, nearestFigure(numbers[i], numbers[i + 1], cluster)));
  const title = element("h4", { id: "strip-title" }, `Nearest to ${path}`);
  const strip = element("div", {}, element("div", { className: "top" }, title, shut),
    element("p", {}, explain(exact, numbers.length / 2)), list);
  strip.setAttribute("role", "region");
  strip.setAttribute("aria-labelledby", "strip-title");
  button.closest("li").after(element("li", { className: "strip", id: "strip" }, strip));
  button.setAttribute("aria-expanded", "true");
  opened = button;
  strip.scrollIntoView({ block: "nearest" });
}

document.addEventListener("click", ({ target }) => {
  const button = target.closest(".picture");
  if (!button) return;
  const again = button === opened;
  close();
  if (!again) open(button);
});

// ---- Keys: Enter in a name goes on to the next one, arrows go from image to image, Escape closes the strip.

function focusable(grid, button) {
  for (const other of grid.querySelectorAll(".picture")) other.tabIndex = other === button ? 0 : -1;
}

function goal(key, buttons, from) {
  const columns = buttons.filter((button) => button.offsetTop === buttons[0].offsetTop).length;
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns };
  if (key in steps) return buttons[from + steps[key]];
  return { Home: buttons[0], End: buttons.at(-1) }[key];
}

document.addEventListener("keydown", (event) => {
  const { key, target } = event;
  if (key === "Escape" && opened) {
    const from = opened;
    close();
    from.focus();
  } else if (key === "Enter" && target.matches("input.name")) {
    const all = [...fields.values()];
    (all[all.indexOf(target) + 1] ?? byId("save")).focus();
    event.preventDefault(); // else the same key would press "Save names"
  } else if (target.matches(".picture")) {
    const buttons = [...target.closest(".grid").querySelectorAll(".picture")];
    const next = goal(key, buttons, buttons.indexOf(target));
    if (!next) return;
    event.preventDefault();
    focusable(target.closest(".grid"), next);
    next.focus();
  }
});

document.addEventListener("focusin", ({ target }) => {
  if (target.matches(".picture")) focusable(target.closest(".grid"), target);
});

for (const grid of document.querySelectorAll(".grid")) focusable(grid, grid.querySelector(".picture"));
recall();
fill();
show();
