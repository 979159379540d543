// What is shown, and how it changes.

const ROWS = 200; // of the table of points
const element = (id) => document.getElementById(id);
const scene = {
  view: null, record: null, query: null, head: -1, visible: new Set(), closeUp: false,
  zoom: 1, shift: [0, 0], marked: null, picture: null, palette: readPalette(),
  attended: new Map(), most: 0, shares: [], order: [], panels: [],
};

// --------------------------------------------------------------------------------- changes

function showView(index) {
  scene.view = decodeView(source.views[index]);
  scene.visible = new Set(scene.view.shapes.keys());
  fillSelect(element("record"), scene.view.records.map((record) => record.name));
  element("record-label").hidden = scene.view.records.length < 2;
  fillLevels();
  element("picture-label").hidden = scene.view.picture === null;
  loadPicture();
  showRecord(0);
}

// The query stays where the records are of the same queries, as those of two layers are.
function showRecord(index) {
  const before = scene.record;
  scene.record = decodeRecord(scene.view.records[index]);
  const n = scene.record.names.length;
  const same = before !== null && before.names.length === n &&
    before.positions.every((x, i) => x === scene.record.positions[i]);
  element("query").max = Math.max(0, n - 1);
  if (scene.head >= scene.record.heads) scene.head = -1;
  const heads = [...Array(scene.record.heads).keys()].map((head) => `head ${head}`);
  fillSelect(element("head"), [`mean of ${scene.record.heads}`, ...heads]);
  element("head").selectedIndex = scene.head + 1;
  const { scores } = scene.record;
  scene.order = [...Array(n).keys()];
  if (scores !== null) scene.order.sort((a, b) => scores[b] - scores[a]);
  choose(same ? scene.query : null);
  say(n ? `${n} queries to click` : "no queries here");
}

function choose(query) {
  scene.query = query;
  scene.marked = null;
  if (query !== null) {
    scene.order = [query, ...scene.order.filter((other) => other !== query)];
  }
  update();
}

function step(by) {
  const n = scene.record.names.length;
  if (!n) return;
  choose(scene.query === null ? (by > 0 ? 0 : n - 1) : (scene.query + by + n) % n);
  bringIntoSight();
}

function bringIntoSight() {
  if (scene.closeUp) return;
  const panel = scene.panels[0];
  if (panel === undefined) return;
  const at = transform(scene, panel);
  const [row, column] = positionOf(scene.record, scene.query);
  const [x, y] = [at.x + column * at.across, at.y + row * at.down];
  if (x < panel.x || y < panel.y || x > panel.x + panel.w || y > panel.y + panel.h) {
    move(panel.x + panel.w / 2 - x, panel.y + panel.h / 2 - y);
  }
}

function setHead(head) {
  const n = scene.record.heads + 1;
  scene.head = ((head + 1 + n) % n) - 1;
  element("head").selectedIndex = scene.head + 1;
  update();
}

function setLevel(level, visible) {
  if (level >= scene.view.shapes.length) return;
  if (visible) scene.visible.add(level);
  else if (scene.visible.size > 1) scene.visible.delete(level);
  for (const box of element("levels").querySelectorAll("input")) {
    box.checked = scene.visible.has(Number(box.value));
  }
  update();
}

function setCloseUp(closeUp) {
  scene.closeUp = closeUp;
  element("close-up").checked = closeUp;
  if (closeUp && scene.query === null) say("choose a query to look at closely");
  [scene.zoom, scene.shift] = [1, [0, 0]];
  redraw();
}

function move(dx, dy) {
  scene.shift = [scene.shift[0] + dx, scene.shift[1] + dy];
  redraw();
}

// Zooms by a factor, with what lies `from` a panel's middle staying where it is.
function zoomBy(factor, from = [0, 0]) {
  const zoom = Math.min(400, Math.max(0.5, scene.zoom * factor));
  const ratio = zoom / scene.zoom;
  scene.shift = scene.shift.map((shift, i) => from[i] - (from[i] - shift) * ratio);
  scene.zoom = zoom;
  redraw();
}

function reset() {
  scene.visible = new Set(scene.view.shapes.keys());
  scene.head = -1;
  element("head").selectedIndex = 0;
  fillLevels();
  setCloseUp(false);
  choose(null);
  say("");
}

function loadPicture() {
  scene.picture = null;
  const { view } = scene;
  if (view.picture === null || !element("picture").checked) return redraw();
  const image = new Image();
  image.onload = () => {
    if (scene.view !== view || !element("picture").checked) return;
    scene.picture = view.picture.ink ? tinted(image, scene.palette.ink) : image;
    redraw();
  };
  image.src = view.picture.url;
}

function tinted(image, color) {
  const copy = document.createElement("canvas");
  [copy.width, copy.height] = [image.width, image.height];
  const ctx = copy.getContext("2d");
  ctx.drawImage(image, 0, 0);
  ctx.globalCompositeOperation = "source-in";
  ctx.fillStyle = color;
  ctx.fillRect(0, 0, copy.width, copy.height);
  return copy;
}

// ------------------------------------------------------------------------------ what is seen

let pending = false;
function redraw() {
  if (pending) return;
  pending = true;
  requestAnimationFrame(() => {
    pending = false;
    lay();
    drawMap(scene);
  });
}

function lay() {
  const levels = [...scene.visible].sort((a, b) => a - b);
  scene.panels = layOut(levels, scene.view.size, canvas.clientWidth, canvas.clientHeight);
}

function update() {
  const { view, record, query, head } = scene;
  scene.attended = query === null ? new Map() : attended(record, query, head);
  scene.shares = view.shapes.map(() => ({ points: 0, weight: 0 }));
  scene.most = 0;
  for (const [id, weight] of scene.attended) {
    const share = scene.shares[view.levels[id]];
    share.points += 1;
    share.weight += weight;
    scene.most = Math.max(scene.most, weight);
  }
  showQuery();
  lay();
  redraw();
}

function showQuery() {
  const { record, query } = scene;
  element("query").value = query === null ? "" : query;
  for (const id of ["scale", "heaviest"]) element(id).hidden = query === null;
  element("shares").replaceChildren();
  element("points").replaceChildren();
  element("more").textContent = "";
  if (query === null) {
    element("name").textContent = "Click a query";
    element("where").textContent =
      record.boxes === null ? "a point of the map" : "a box on the map";
    return;
  }
  element("name").textContent = record.names[query];
  element("where").textContent = whereIs(query);
  showShares();
  const ticks = [0, scene.most / 4, scene.most]; // the middle of a scale of square roots
  ["none", "half", "most"].forEach((name, i) => {
    element(`scale-${name}`).textContent = percent(ticks[i]);
  });
  showPoints();
}

function whereIs(query) {
  const { record, view } = scene;
  const named = (values) =>
    view.axes
      .map((axis, i) => (axis === null ? null : `${axis} = ${values[i].toFixed(1)}`))
      .filter((text) => text !== null)
      .join(", ");
  const parts = [`query ${query} at ${named(positionOf(record, query))}`];
  if (record.levels !== null) parts.push(`level ${record.levels[query]}`);
  const box = boxOf(record, query);
  if (box !== null) {
    const sides = [box[2] - box[0], box[3] - box[1]].filter((_, i) => view.axes[i] !== null);
    parts.push(`box ${sides.map((side) => side.toFixed(1)).join(" × ")}`);
  }
  return parts.join("; ");
}

function showShares() {
  const { record, view, query, head } = scene;
  const empty = record.background !== null;
  const heading = ["level", "points", "weight", ...(empty ? ["on empty"] : [])];
  const rows = scene.shares.map(({ points, weight }, level) => {
    const cells = [level, points, percent(weight)];
    if (empty) cells.push(percent(onEmptyCells(record, view.shapes.length, query, level, head)));
    return tableRow(cells);
  });
  fillTable(element("shares"), heading, rows);
}

function showPoints() {
  const { view } = scene;
  const heaviest = [...scene.attended]
    .filter(([id]) => scene.visible.has(view.levels[id]))
    .sort((a, b) => b[1] - a[1]);
  const shown = view.axes.map((axis, i) => i).filter((i) => view.axes[i] !== null);
  const rows = heaviest.slice(0, ROWS).map(([id, weight]) => {
    const at = cell(view, id);
    const row = tableRow([view.levels[id], ...shown.map((i) => at[i]), percent(weight)]);
    Object.assign(row.dataset, { level: view.levels[id], cell: at.join(","), weight });
    row.onmouseenter = () => mark(id);
    row.onmouseleave = () => mark(null);
    return row;
  });
  fillTable(element("points"), ["level", ...shown.map((i) => view.axes[i]), "weight"], rows);
  const hidden = heaviest.length - rows.length;
  if (hidden > 0) element("more").textContent = `and ${hidden} more`;
  if (!heaviest.length) element("more").textContent = "none: nothing is near it";
}

function mark(id) {
  scene.marked = id;
  redraw();
}

function say(text) {
  element("status").textContent = text;
}

// -------------------------------------------------------------------------------- the document

function make(tag, content) {
  const made = document.createElement(tag);
  made.textContent = content; // never as HTML: names may hold anything
  return made;
}

function tableRow(cells, tag = "td") {
  const row = document.createElement("tr");
  row.append(...cells.map((content) => make(tag, content)));
  return row;
}

function fillTable(table, heading, rows) {
  const head = document.createElement("thead");
  const body = document.createElement("tbody");
  head.append(tableRow(heading, "th"));
  body.append(...rows);
  table.replaceChildren(head, body);
}

function fillSelect(select, names) {
  select.replaceChildren(...names.map((name) => make("option", name)));
}

function fillLevels() {
  const labels = scene.view.shapes.map((_, level) => {
    const box = document.createElement("input");
    box.type = "checkbox";
    box.value = level;
    box.checked = scene.visible.has(level);
    box.onchange = () => setLevel(level, box.checked);
    const label = document.createElement("label");
    label.append(box, String(level));
    return label;
  });
  element("levels").replaceChildren(make("legend", "Levels"), ...labels);
}

// ------------------------------------------------------------------------------------- the mouse

function panelAt(x, y) {
  return scene.panels.find(
    (panel) =>
      x >= panel.x && y >= panel.y && x < panel.x + panel.w && y < panel.y + panel.h,
  );
}

// The smallest box that holds the place, or, clicked again, the next larger; else the nearest point.
function queryAt(panel, x, y) {
  const { record } = scene;
  const at = transform(scene, panel);
  const [row, column] = [(y - at.y) / at.down, (x - at.x) / at.across];
  const all = [...record.names.keys()];
  if (record.boxes !== null) {
    const area = (query) => {
      const [top, left, bottom, right] = boxOf(record, query);
      return (bottom - top) * (right - left);
    };
    const holding = all
      .filter((query) => {
        const [top, left, bottom, right] = boxOf(record, query);
        return row >= top && row <= bottom && column >= left && column <= right;
      })
      .sort((a, b) => area(a) - area(b));
    if (!holding.length) return null;
    return holding[(holding.indexOf(scene.query) + 1) % holding.length];
  }
  const reach = Math.max(12, 0.75 * Math.max(...sideInPixels(scene, panel.level, at)));
  const nearest = (queries) => {
    const distance = (query) => {
      const [r, c] = positionOf(record, query);
      return Math.hypot((r - row) * at.down, (c - column) * at.across);
    };
    const best = queries.reduce((a, b) => (distance(b) < distance(a) ? b : a), queries[0]);
    return best !== undefined && distance(best) <= reach ? best : null;
  };
  if (record.levels === null) return nearest(all);
  return nearest(all.filter((query) => record.levels[query] === panel.level)) ?? nearest(all);
}

function describePlace(x, y) {
  const panel = panelAt(x, y);
  if (panel === undefined) return "";
  const { view } = scene;
  const at = transform(scene, panel);
  const [height, width] = sideInPixels(scene, panel.level, at);
  const row = Math.floor((y - at.y) / height);
  const column = Math.floor((x - at.x) / width);
  const [rows, columns] = view.shapes[panel.level];
  if (row < 0 || column < 0 || row >= rows || column >= columns) return "beyond the map";
  const names = [row, column]
    .map((value, i) => (view.axes[i] === null ? null : `${view.axes[i]} ${value}`))
    .filter((text) => text !== null);
  const id = view.placeAt[panel.level].get(row * columns + column);
  const what = id === undefined ? "no point"
    : scene.attended.has(id) ? `weight ${percent(scene.attended.get(id))}`
    : scene.query === null ? "a point" : "a point not attended to";
  return `level ${panel.level}, ${names.join(", ")}: ${what}`;
}

let held = null;
canvas.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  held = { x: event.offsetX, y: event.offsetY, moved: false };
  canvas.setPointerCapture(event.pointerId);
});
canvas.addEventListener("pointermove", (event) => {
  const [x, y] = [event.offsetX, event.offsetY];
  if (held === null) return say(describePlace(x, y));
  if (!held.moved && Math.hypot(x - held.x, y - held.y) < 4) return;
  move(x - held.x, y - held.y);
  held = { x, y, moved: true };
});
canvas.addEventListener("pointerup", (event) => {
  const clicked = held !== null && !held.moved;
  held = null;
  const panel = panelAt(event.offsetX, event.offsetY);
  if (!clicked || panel === undefined) return;
  const query = queryAt(panel, event.offsetX, event.offsetY);
  if (query === null) say("no query here");
  else choose(query);
});
canvas.addEventListener("pointercancel", () => { held = null; });
canvas.addEventListener("pointerleave", () => { if (held === null) say(""); });
canvas.addEventListener("wheel", (event) => {
  const panel = panelAt(event.offsetX, event.offsetY);
  if (panel === undefined) return;
  event.preventDefault();
  const from = [event.offsetX - panel.x - panel.w / 2, event.offsetY - panel.y - panel.h / 2];
  const lines = event.deltaMode === 1 ? 16 : 1;
  zoomBy(Math.exp(-0.0015 * event.deltaY * lines), from);
}, { passive: false });

// ---------------------------------------------------------------------------------- the keyboard

const STEP = 60; // pixels
const MOVES = { ArrowLeft: [STEP, 0], ArrowRight: [-STEP, 0], ArrowUp: [0, STEP], ArrowDown: [0, -STEP] };
const KEYS = {
  ArrowLeft: () => step(-1),
  ArrowRight: () => step(1),
  "+": () => zoomBy(1.5),
  "=": () => zoomBy(1.5),
  "-": () => zoomBy(1 / 1.5),
  h: () => setHead(scene.head + 1),
  H: () => setHead(scene.head - 1),
  c: () => setCloseUp(!scene.closeUp),
  r: reset,
};
for (let level = 0; level < 10; level++) {
  KEYS[level] = () => setLevel(level, !scene.visible.has(level));
}
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("select, input:not([type=checkbox])")) return;
  const moves = event.shiftKey && MOVES[event.key];
  if (!moves && !KEYS[event.key]) return;
  event.preventDefault();
  if (moves) move(...moves);
  else KEYS[event.key]();
});

// -------------------------------------------------------------------------------------- controls

element("view").onchange = (event) => showView(event.target.selectedIndex);
element("record").onchange = (event) => showRecord(event.target.selectedIndex);
element("head").onchange = (event) => setHead(event.target.selectedIndex - 1);
element("close-up").onchange = (event) => setCloseUp(event.target.checked);
element("picture").onchange = loadPicture;
element("reset").onclick = reset;
element("query").onchange = (event) => {
  const query = Number(event.target.value);
  const known = event.target.value !== "" && scene.record.names[query] !== undefined;
  choose(known ? query : null);
  if (known) bringIntoSight();
};
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  scene.palette = readPalette();
  loadPicture();
});
new ResizeObserver(redraw).observe(canvas);

// Where the middle of a cell is on the page, for scripts.
window.pixelOf = (level, row, column) => {
  lay();
  const panel = scene.panels.find((candidate) => candidate.level === level);
  const at = transform(scene, panel);
  const [height, width] = sideInPixels(scene, level, at);
  const corner = canvas.getBoundingClientRect();
  return [corner.x + at.x + (column + 0.5) * width, corner.y + at.y + (row + 0.5) * height];
};

fillSelect(element("view"), source.views.map((view) => view.title));
element("view-label").hidden = source.views.length < 2;
showView(0);
