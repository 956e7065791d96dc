// The page's table and the window in which a crystal is looked at. What comes from a file is only ever put in as text.

const data = JSON.parse(document.getElementById("data").textContent);
const {columns, rows, views, neighbours, elements} = data;
const by = id => document.getElementById(id);
const [ID, FORMULA, STATUS] = [0, 1, 2]; // of a row's cells
const known = new Set(Object.values(elements).map(([symbol]) => symbol));
const isNumber = kind => kind === "number" || kind === "relaxed";
const good = new Set(["stable", "valid", "metastable", "duplicate"]);

/** A chemical formula with its numbers as subscripts. */
function formula(text) {
  const parts = document.createElement("span");
  for (const part of (text || "").split(/(\d+)/)) {
    if (!/^\d/.test(part)) { parts.append(part); continue; }
    const sub = document.createElement("sub");
    sub.textContent = part;
    parts.append(sub);
  }
  return parts;
}

function make(tag, text, style) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (style) element.className = style;
  return element;
}

const tone = status => good.has(status) ? status : "bad";

// ---- the table: all rows are searched and sorted, those in sight are drawn

const ROW = 36; // height of a row, px, as the style sheet has it
const table = {column: null, descending: false, chosen: rows.map((_, i) => i), active: 0};
const texts = [], atoms = [];
const text = i => texts[i] ??= rows[i].join(" ").toLowerCase();
const symbols = i => atoms[i] ??= new Set((rows[i][FORMULA] || "").match(/[A-Z][a-z]?/g));
const collator = new Intl.Collator("en", {numeric: true});

/** Words that are symbols of elements ask for these elements; others are looked for as they stand. */
function choose() {
  const words = by("filter").value.split(/\s+/).filter(Boolean), status = by("status").value;
  const wanted = words.filter(word => known.has(word));
  const sought = words.filter(word => !known.has(word)).map(word => word.toLowerCase());
  const chosen = [];
  rows.forEach((row, i) => {
    if ((!status || row[STATUS] === status) && wanted.every(s => symbols(i).has(s)) && sought.every(w => text(i).includes(w)))
      chosen.push(i);
  });
  const {column, descending} = table;
  if (column !== null) {
    const number = isNumber(columns[column][1]), missing = v => v === null || v === "";
    chosen.sort((i, j) => {
      const [a, b] = [rows[i][column], rows[j][column]];
      // Rows without a value come last whichever way the table is sorted.
      if (missing(a) || missing(b)) return missing(a) - missing(b) || i - j;
      const way = number ? a - b : collator.compare(a, b);
      return (descending ? -way : way) || i - j;
    });
  }
  Object.assign(table, {chosen, active: 0});
  by("found").textContent = `${chosen.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
  by("nothing").hidden = chosen.length > 0;
  head.forEach((th, k) => th.ariaSort = k === column ? (descending ? "descending" : "ascending") : null);
  by("rows").scrollTop = 0;
  drawRows();
}

function drawRows() {
  const pane = by("rows"), {chosen} = table;
  const first = Math.max(Math.floor(pane.scrollTop / ROW) - 6, 0);
  const last = Math.min(first + Math.ceil(pane.clientHeight / ROW) + 12, chosen.length);
  const focused = document.activeElement?.closest?.("#body tr")?.dataset.place;
  const gap = height => { const tr = make("tr"); tr.style.height = `${height}px`; tr.ariaHidden = "true"; return tr; };
  const drawn = chosen.slice(first, last).map((i, k) => drawRow(i, first + k));
  by("body").replaceChildren(gap(first * ROW), ...drawn, gap((chosen.length - last) * ROW));
  by("table").ariaRowCount = chosen.length + 1;
  if (focused !== undefined) by("body").querySelector(`[data-place="${focused}"] button`)?.focus({preventScroll: true});
}

function drawRow(i, place) {
  const tr = make("tr");
  tr.dataset.place = place;
  tr.ariaRowIndex = place + 2;
  rows[i].forEach((value, k) => {
    const [, kind, digits] = columns[k], td = make("td", undefined, isNumber(kind) ? "right" : kind);
    if (kind === "formula") {
      const button = make("button");
      button.type = "button";
      button.tabIndex = place === table.active ? 0 : -1;
      button.ariaLabel = `Look at ${rows[i][ID]}, ${value || "no crystal"}`;
      button.append(value ? formula(value) : "—");
      td.append(button);
    } else if (kind === "status") {
      td.append(make("span", value, `chip ${tone(value)}`));
    } else {
      td.textContent = value === null ? "" : isNumber(kind) ? value.toFixed(digits).replace("-", "−") : value;
      if (!isNumber(kind)) td.title = value ?? "";
    }
    tr.append(td);
  });
  return tr;
}

const head = columns.map(([name, kind], k) => {
  const th = make("th", undefined, isNumber(kind) ? "right" : kind), button = make("button", name);
  button.type = "button";
  button.onclick = () => {
    Object.assign(table, {descending: table.column === k && !table.descending, column: k});
    choose();
  };
  th.scope = "col";
  th.append(button);
  by("head").append(th);
  return th;
});

const counts = new Map();
for (const row of rows) counts.set(row[STATUS], (counts.get(row[STATUS]) || 0) + 1);
for (const [status, count] of [...counts].sort((p, q) => q[1] - p[1])) {
  const option = make("option", `${status} (${count.toLocaleString("en")})`);
  option.value = status;
  by("status").append(option);
}

by("filter").oninput = choose;
by("status").onchange = choose;
by("rows").addEventListener("scroll", drawRows, {passive: true});
new ResizeObserver(drawRows).observe(by("rows"));
by("body").onclick = event => {
  const tr = event.target.closest("tr[data-place]");
  if (tr) { table.active = +tr.dataset.place; look(table.chosen, table.active); }
};
by("body").onkeydown = event => {
  const far = Math.floor(by("rows").clientHeight / ROW) - 1;
  const steps = {ArrowDown: 1, ArrowUp: -1, PageDown: far, PageUp: -far, Home: -Infinity, End: Infinity};
  if (event.key in steps) { event.preventDefault(); walk(steps[event.key]); }
};

/** Moves the focus by rows, and scrolls to where it is. */
function walk(step) {
  table.active = Math.min(Math.max(table.active + step, 0), table.chosen.length - 1);
  const pane = by("rows"), top = table.active * ROW, height = pane.clientHeight - 2 * ROW;
  if (top < pane.scrollTop) pane.scrollTop = top;
  if (top > pane.scrollTop + height) pane.scrollTop = top - height;
  drawRows();
  by("body").querySelector(`[data-place="${table.active}"] button`)?.focus({preventScroll: true});
}

for (const cell of document.querySelectorAll("[data-element]")) cell.onclick = () => {
  const field = by("filter");
  if (!field.value.split(/\s+/).includes(cell.dataset.element)) field.value = `${field.value} ${cell.dataset.element}`.trim();
  choose();
  by("attempts").scrollIntoView({behavior: "smooth"});
};

// ---- the window: a crystal, sampled or relaxed, and the nearest one of the training set beside it

const crystals = new Crystals(data.structures), camera = new Camera();
const panes = ["own", "other"].map(name => {
  const pane = by(name), part = style => pane.querySelector(`.${style}`);
  return {pane, part, view: new View(part("canvas"), camera, elements), crystal: null};
});
const viewer = by("viewer");
let looked = {order: [], place: 0}, relaxed = true, cells = 1;

for (const figure of document.querySelectorAll("button[data-row]")) figure.onclick = () => {
  const all = [...document.querySelectorAll("button[data-row]")].map(f => +f.dataset.row);
  look(all, all.indexOf(+figure.dataset.row));
};

/** Opens the window on the crystal at `place` of `order`, through which the window then leads. */
function look(order, place) {
  looked = {order, place};
  showRow(order[place]);
  if (!viewer.open) { camera.reset(); viewer.showModal(); panes[0].part("canvas").focus(); }
}

function showRow(i) {
  const row = rows[i], [sampled, end, near] = views[i], neighbour = neighbours[i];
  by("name").replaceChildren(row[FORMULA] ? formula(row[FORMULA]) : "No crystal");
  by("fate").replaceChildren(make("span", row[STATUS], `chip ${tone(row[STATUS])}`));
  by("about").textContent = row[row.length - 1];
  by("which").textContent = `no. ${row[ID]}`;
  by("place").textContent = `${(looked.place + 1).toLocaleString("en")} of ${looked.order.length.toLocaleString("en")}`;
  by("previous").disabled = looked.place === 0;
  by("next").disabled = looked.place + 1 >= looked.order.length;
  const [own, other] = panes, showsEnd = relaxed && end >= 0;
  by("states").hidden = end < 0;
  by("sampled").ariaPressed = !showsEnd;
  by("relaxed").ariaPressed = showsEnd;
  own.part("title").textContent = end < 0 ? "As sampled" : "";
  const facts = columns.slice(STATUS + 1, -1).map(([name, kind, digits], k) => {
    const other = kind === "relaxed" ? !showsEnd && "relaxed" : name !== "atoms" && showsEnd && "as sampled";
    return [other ? `${name} (${other})` : name, kind, digits, row[STATUS + 1 + k]];
  });
  if (data.trained && !data.nearest && !neighbour && row[FORMULA]) facts.push(["training set", "text", 0, "no crystal of it matches"]);
  fill(own, showsEnd ? end : sampled, `${row[FORMULA]}-${row[ID]}${showsEnd ? "-relaxed" : ""}`, facts,
    row[FORMULA] ? "This crystal is not in the page: it holds as many as keep it quick. structures.parquet has it." : "There is no crystal to draw.");
  // Without fingerprints of the training set only a crystal that is the same is known.
  other.pane.hidden = !(data.nearest || neighbour);
  if (!other.pane.hidden) {
    const [id, same, structure, composition] = neighbour || [];
    const distance = x => x === null || x === undefined ? "–" : x.toFixed(3);
    other.part("title").textContent = data.nearest ? "Nearest training crystal" : "The same crystal in the training set";
    fill(other, near, `training-${id}`, [
      ["id", "text", 0, id ?? null],
      ["likeness", "text", 0, id === undefined ? null : same ? "the same crystal (StructureMatcher)" : "most like it by fingerprint; no match"],
      ["nearest fingerprints", "text", 0, structure === undefined || structure === null ? null
        : `structure at ${distance(structure)}, composition at ${distance(composition)}; each of its own crystal`],
    ], id === undefined ? "No training crystal matches this one." : "Its atoms are not in this page.");
  }
}

/** Puts a crystal, or why there is none, and what is known of it into a pane. */
function fill(pane, index, name, facts, otherwise) {
  const crystal = pane.crystal = index >= 0 ? crystals.read(index) : null;
  pane.name = name;
  pane.part("none").textContent = crystal ? "" : otherwise;
  pane.part("canvas").hidden = pane.part("save").hidden = !crystal;
  pane.part("canvas").ariaLabel = crystal ? `${name}: a crystal in three dimensions. Arrow keys turn it, plus and minus zoom, 0 resets.` : "";
  pane.view.show(crystal, cells);
  const list = facts.filter(([, , , value]) => value !== null && value !== "");
  if (crystal) {
    const shown = values => values.map(x => x.toFixed(2)).join("  ");
    list.push(["a b c, Å", "text", 0, shown(crystal.lengths)], ["α β γ, °", "text", 0, shown(crystal.angles)],
      ["volume, Å³", "number", 1, volume(lattice(crystal))]);
  }
  pane.part("facts").replaceChildren(...list.flatMap(([heading, kind, digits, value]) =>
    [make("dt", heading), make("dd", isNumber(kind) ? value.toFixed(digits).replace("-", "−") : value)]));
  const tally = new Map();
  for (const z of crystal ? crystal.species : []) tally.set(z, (tally.get(z) || 0) + 1);
  pane.part("key").replaceChildren(...[...tally].map(([z, count]) => {
    const item = make("li"), dot = make("i");
    dot.style.background = elements[z][1];
    item.append(dot, make("b", elements[z][0]), ` ${count}`);
    return item;
  }));
}

const step = ahead => {
  looked.place = Math.min(Math.max(looked.place + ahead, 0), looked.order.length - 1);
  showRow(looked.order[looked.place]);
};
by("previous").onclick = () => step(-1);
by("next").onclick = () => step(1);
by("close").onclick = () => viewer.close();
viewer.onclick = event => { if (event.target === viewer) viewer.close(); };
viewer.onkeydown = event => {
  if (event.key === "PageDown") { event.preventDefault(); step(1); }
  if (event.key === "PageUp") { event.preventDefault(); step(-1); }
};
for (const state of ["sampled", "relaxed"]) by(state).onclick = () => {
  relaxed = state === "relaxed";
  showRow(looked.order[looked.place]);
};
by("cells").onclick = () => {
  cells = 3 - cells;
  by("cells").ariaPressed = cells === 2;
  for (const pane of panes) pane.view.show(pane.crystal, cells);
};
for (const pane of panes) pane.part("save").onclick = () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([toCif(pane.crystal, pane.name, elements)], {type: "chemical/x-cif"}));
  link.download = `${pane.name.replace(/[^\w.-]/g, "_")}.cif`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
};
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => camera.changed());
choose();
