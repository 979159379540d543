// Mouse, keyboard and controls. Runs last: at its end the page shows its first view.

// ------------------------------------------------------------------------------------ mouse

/**
 * @param {number} x on the canvas, in pixels
 * @param {number} y on the canvas, in pixels
 * @returns {Panel|undefined}
 */
function panelAt(x, y) {
  return state.panels.find(
    (panel) =>
      x >= panel.x && y >= panel.y && x < panel.x + panel.w && y < panel.y + panel.h,
  );
}

/**
 * @param {Panel} panel
 * @param {number} x on the canvas, in pixels
 * @param {number} y on the canvas, in pixels
 * @returns {?number} the query to select on a click, null for none
 */
function queryAt(panel, x, y) {
  const { record } = state;
  const transform = panelTransform(state, panel);
  if (record.boxes !== null) {
    return nextBoxAt((y - transform.y) / transform.scaleY, (x - transform.x) / transform.scaleX);
  }
  const all = [...record.query_names.keys()];
  const nearest = (queries) => nearestQuery(queries, panel, transform, x, y);
  if (record.levels === null) return nearest(all);
  return nearest(all.filter((query) => record.levels[query] === panel.level)) ?? nearest(all);
}

/**
 * Repeated clicks cycle through overlapping boxes, from the smallest to the largest.
 * @param {number} row in cells of the full shape
 * @param {number} column in cells of the full shape
 * @returns {?number} the smallest box at a position, or the one after the selected query's
 */
function nextBoxAt(row, column) {
  const { record } = state;
  const area = (query) => {
    const [top, left, bottom, right] = queryBox(record, query);
    return (bottom - top) * (right - left);
  };
  const hits = [...record.query_names.keys()]
    .filter((query) => {
      const [top, left, bottom, right] = queryBox(record, query);
      return row >= top && row <= bottom && column >= left && column <= right;
    })
    .sort((a, b) => area(a) - area(b));
  if (!hits.length) return null;
  return hits[(hits.indexOf(state.query) + 1) % hits.length];
}

/**
 * @param {number[]} queries to choose from
 * @param {Panel} panel
 * @param {Transform} transform
 * @param {number} x on the canvas, in pixels
 * @param {number} y on the canvas, in pixels
 * @returns {?number} the nearest query, null if none is within about a cell
 */
function nearestQuery(queries, panel, transform, x, y) {
  const reach = Math.max(12, 0.75 * Math.max(...cellPixels(state, panel.level, transform)));
  let [nearest, least] = [null, Infinity];
  for (const query of queries) {
    const [row, column] = queryPosition(state.record, query);
    const dx = transform.x + column * transform.scaleX - x;
    const dy = transform.y + row * transform.scaleY - y;
    const distance = Math.hypot(dx, dy);
    if (distance < least) [nearest, least] = [query, distance];
  }
  return least <= reach ? nearest : null;
}

/**
 * @param {number} x on the canvas, in pixels
 * @param {number} y on the canvas, in pixels
 * @returns {string} the cell there and its weight, for the status line
 */
function describePixel(x, y) {
  const panel = panelAt(x, y);
  if (panel === undefined) return "";
  const { view, drawnWeights: weights } = state;
  const transform = panelTransform(state, panel);
  const [height, width] = cellPixels(state, panel.level, transform);
  const cell = [Math.floor((y - transform.y) / height), Math.floor((x - transform.x) / width)];
  const shape = view.level_shapes[panel.level];
  if (cell.some((index, i) => index < 0 || index >= shape[i])) return "outside the map";
  const names = shownAxes().map((i) => `${view.axis_names[i]} ${cell[i]}`);
  const id = view.cellIds[panel.level].get(cell.join());
  const content = id === undefined ? "no point"
    : weights.has(id) ? `weight ${formatPercent(weights.get(id))}`
    : state.query === null ? "a point" : "a point without weight";
  if (id !== undefined && view.depths !== null) {
    const depths = view.behind[id].map((other) => view.depths[other]);
    const shown = depths.length > 6 ? `${depths[0]} to ${depths.at(-1)}` : depths.join(", ");
    names.push(`${view.all_names[view.dropped_axis]} ${shown}`);
  }
  return `level ${panel.level}, ${names.join(", ")}: ${content}`;
}

let drag = null; // {x, y, moved} between pointerdown and pointerup
canvas.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  drag = { x: event.offsetX, y: event.offsetY, moved: false };
  canvas.setPointerCapture(event.pointerId);
});
canvas.addEventListener("pointermove", (event) => {
  const [x, y] = [event.offsetX, event.offsetY];
  if (drag === null) return setStatus(describePixel(x, y));
  if (!drag.moved && Math.hypot(x - drag.x, y - drag.y) < 4) return; // still a click
  panBy(x - drag.x, y - drag.y);
  drag = { x, y, moved: true };
});
canvas.addEventListener("pointerup", (event) => {
  const clicked = drag !== null && !drag.moved;
  drag = null;
  const panel = panelAt(event.offsetX, event.offsetY);
  if (!clicked || panel === undefined) return;
  const query = queryAt(panel, event.offsetX, event.offsetY);
  if (query === null) setStatus("no query at this position");
  else selectQuery(query);
});
canvas.addEventListener("pointercancel", () => { drag = null; });
canvas.addEventListener("pointerleave", () => { if (drag === null) setStatus(""); });
canvas.addEventListener("wheel", (event) => {
  const panel = panelAt(event.offsetX, event.offsetY);
  if (panel === undefined) return;
  event.preventDefault();
  const fixed = [event.offsetX - panel.x - panel.w / 2, event.offsetY - panel.y - panel.h / 2];
  const pixels = event.deltaY * (event.deltaMode === WheelEvent.DOM_DELTA_LINE ? 16 : 1);
  zoomBy(Math.exp(-0.0015 * pixels), fixed);
}, { passive: false });

// --------------------------------------------------------------------------------- keyboard

const STEP = 60; // pixels
const PAN_KEYS = {
  ArrowLeft: [STEP, 0], ArrowRight: [-STEP, 0], ArrowUp: [0, STEP], ArrowDown: [0, -STEP],
};
const KEYS = {
  ArrowLeft: () => stepQuery(-1),
  ArrowRight: () => stepQuery(1),
  "+": () => zoomBy(1.5),
  "=": () => zoomBy(1.5),
  "-": () => zoomBy(1 / 1.5),
  h: () => setHead(state.head + 1),
  H: () => setHead(state.head - 1),
  c: () => setCloseUp(!state.closeUp),
  r: reset,
};
for (let level = 0; level < 10; level++) {
  KEYS[level] = () => setLevel(level, !state.visibleLevels.has(level));
}
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("select, input:not([type=checkbox])")) return;
  const pan = event.shiftKey && PAN_KEYS[event.key];
  if (!pan && !KEYS[event.key]) return;
  event.preventDefault();
  if (pan) panBy(...pan);
  else KEYS[event.key]();
});

// --------------------------------------------------------------------------------- controls

element("view").onchange = (event) => showView(event.target.selectedIndex);
element("record").onchange = (event) => showRecord(event.target.selectedIndex);
element("head").onchange = (event) => setHead(event.target.selectedIndex - 1);
element("close-up").onchange = (event) => setCloseUp(event.target.checked);
element("image").onchange = loadImage;
element("reset").onclick = reset;
element("query").onchange = (event) => {
  const query = Number(event.target.value);
  const exists = event.target.value !== "" && state.record.query_names[query] !== undefined;
  selectQuery(exists ? query : null);
  if (exists) panToQuery();
};
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  state.palette = readPalette();
  loadImage();
});
new ResizeObserver(redraw).observe(canvas);

/**
 * For scripts that control the page.
 * @param {number} level
 * @param {number} row in cells of the level
 * @param {number} column in cells of the level
 * @returns {number[]} [x, y] of the center of a cell, in pixels of the viewport
 */
window.cellToViewport = (level, row, column) => {
  updatePanels();
  const panel = state.panels.find((candidate) => candidate.level === level);
  const transform = panelTransform(state, panel);
  const [height, width] = cellPixels(state, level, transform);
  const origin = canvas.getBoundingClientRect();
  return [
    origin.x + transform.x + (column + 0.5) * width,
    origin.y + transform.y + (row + 0.5) * height,
  ];
};

fillSelect(element("view"), pageData.views.map((view) => view.title));
element("view-label").hidden = pageData.views.length < 2;
showView(0);
