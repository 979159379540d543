// The state of the page, and the actions that change it.

const element = (id) => document.getElementById(id);

/** What is shown. Everything below "weights" is computed from the rest by the functions here. */
const state = {
  view: null, // View
  record: null, // AttentionRecord
  query: null, // selected query, or null
  head: -1, // -1 for the mean over the heads
  visibleLevels: new Set(),
  closeUp: false, // panels show the query's windows instead of the part of the map
  zoom: 1,
  pan: [0, 0], // pixels, x and y
  highlighted: null, // id of the cell below the mouse in the table, or null
  image: null, // HTMLImageElement or HTMLCanvasElement
  palette: readPalette(),
  weights: new Map(), // of the selected query, by cell id
  drawnWeights: new Map(), // sums over the cells that are drawn as one, by the id of the first
  maxWeight: 0,
  levelSums: [], // {cells, weight} of each level
  labelOrder: [], // queries in the order in which they get a label
  panels: [],
};

// ------------------------------------------------------------------ image, record and query

/** @param {number} index of the view to show */
function showView(index) {
  state.view = decodeView(pageData.views[index]);
  state.visibleLevels = new Set(state.view.level_shapes.keys());
  fillSelect(element("record"), state.view.records.map((record) => record.name));
  element("record-label").hidden = state.view.records.length < 2;
  fillLevels();
  element("image-label").hidden = state.view.image === null;
  loadImage();
  showRecord(0);
}

/**
 * Keeps the selected query if both records have the same queries, as those of two layers do.
 * @param {number} index of the record to show
 */
function showRecord(index) {
  const previous = state.record;
  const record = decodeRecord(state.view.records[index]);
  state.record = record;
  const n = record.query_names.length;
  const sameQueries = previous !== null && previous.query_names.length === n &&
    previous.positions.every((x, i) => x === record.positions[i]);
  element("query").max = Math.max(0, n - 1);
  if (state.head >= record.n_heads) state.head = -1;
  const heads = [...Array(record.n_heads).keys()].map((head) => `head ${head}`);
  fillSelect(element("head"), [`mean of ${record.n_heads} heads`, ...heads]);
  element("head").selectedIndex = state.head + 1;
  state.labelOrder = [...Array(n).keys()];
  if (record.scores !== null) {
    state.labelOrder.sort((a, b) => record.scores[b] - record.scores[a]);
  }
  selectQuery(sameQueries ? state.query : null);
  setStatus(n ? `${n} queries` : "no queries");
}

/** @param {?number} query null to select none */
function selectQuery(query) {
  state.query = query;
  state.highlighted = null;
  if (query !== null) {
    state.labelOrder = [query, ...state.labelOrder.filter((other) => other !== query)];
  }
  update();
}

/** @param {number} step 1 for the next query, -1 for the previous one */
function stepQuery(step) {
  const n = state.record.query_names.length;
  if (!n) return;
  const none = step > 0 ? 0 : n - 1;
  selectQuery(state.query === null ? none : (state.query + step + n) % n);
  panToQuery();
}

/** Pans the map if the selected query is outside the first panel. */
function panToQuery() {
  if (state.closeUp || !state.panels.length) return;
  const [panel] = state.panels;
  const transform = panelTransform(state, panel);
  const [row, column] = queryPosition(state.record, state.query);
  const [x, y] = [transform.x + column * transform.scaleX, transform.y + row * transform.scaleY];
  if (x < panel.x || y < panel.y || x > panel.x + panel.w || y > panel.y + panel.h) {
    panBy(panel.x + panel.w / 2 - x, panel.y + panel.h / 2 - y);
  }
}

// ---------------------------------------------------------------------------- what is shown of it

/** @param {number} head -1 for the mean; one past either end wraps around */
function setHead(head) {
  const n = state.record.n_heads + 1;
  state.head = ((head + 1 + n) % n) - 1;
  element("head").selectedIndex = state.head + 1;
  update();
}

/**
 * Shows or hides a level; the last visible one stays.
 * @param {number} level
 * @param {boolean} visible
 */
function setLevel(level, visible) {
  if (level >= state.view.level_shapes.length) return;
  if (visible) state.visibleLevels.add(level);
  else if (state.visibleLevels.size > 1) state.visibleLevels.delete(level);
  for (const box of element("levels").querySelectorAll("input")) {
    box.checked = state.visibleLevels.has(Number(box.value));
  }
  update();
}

/** @param {boolean} closeUp */
function setCloseUp(closeUp) {
  state.closeUp = closeUp;
  element("close-up").checked = closeUp;
  if (closeUp && state.query === null) setStatus("select a query for a close-up");
  [state.zoom, state.pan] = [1, [0, 0]];
  redraw();
}

/**
 * @param {number} dx in pixels
 * @param {number} dy in pixels
 */
function panBy(dx, dy) {
  state.pan = [state.pan[0] + dx, state.pan[1] + dy];
  redraw();
}

/**
 * @param {View} view
 * @returns {number[]} from half the zoom of the whole map to one cell that fills a panel, or more
 */
function zoomLimits(view) {
  const extent = viewExtent(view);
  const shares = extent.map((length, axis) => length / view.size[axis]);
  return [0.5 * Math.min(1, ...shares), Math.max(400, ...extent)];
}

/**
 * @param {number} factor
 * @param {number[]} fixed [x, y] from the middle of a panel, the pixel that keeps its place
 */
function zoomBy(factor, fixed = [0, 0]) {
  const [least, most] = zoomLimits(state.view);
  const zoom = Math.min(most, Math.max(least, state.zoom * factor));
  const ratio = zoom / state.zoom;
  state.pan = state.pan.map((pan, i) => fixed[i] - (fixed[i] - pan) * ratio);
  state.zoom = zoom;
  redraw();
}

/** Selects no query, shows all levels and what the page showed first. */
function reset() {
  state.visibleLevels = new Set(state.view.level_shapes.keys());
  state.head = -1;
  element("head").selectedIndex = 0;
  fillLevels();
  setCloseUp(false);
  selectQuery(null);
  setStatus("");
}

/** Loads the view's image, unless it has none or the image is switched off. */
function loadImage() {
  state.image = null;
  const { view } = state;
  if (view.image === null || !element("image").checked) return redraw();
  const image = new Image();
  image.onload = () => {
    if (state.view !== view || !element("image").checked) return;
    state.image = view.image.is_intensity ? tintImage(image, state.palette.text) : image;
    redraw();
  };
  image.src = view.image.url;
}

/**
 * @param {HTMLImageElement} image
 * @param {string} color
 * @returns {HTMLCanvasElement} the image with its opacity and one color
 */
function tintImage(image, color) {
  const tinted = document.createElement("canvas");
  [tinted.width, tinted.height] = [image.width, image.height];
  const ctx = tinted.getContext("2d");
  ctx.drawImage(image, 0, 0);
  ctx.globalCompositeOperation = "source-in";
  ctx.fillStyle = color;
  ctx.fillRect(0, 0, tinted.width, tinted.height);
  return tinted;
}

// ---------------------------------------------------------------------------------- drawing

let frameRequested = false;

/** Draws the map in the next animation frame, once for any number of calls. */
function redraw() {
  if (frameRequested) return;
  frameRequested = true;
  requestAnimationFrame(() => {
    frameRequested = false;
    updatePanels();
    drawMap(state);
  });
}

/** Arranges the panels in the current size of the canvas. */
function updatePanels() {
  const levels = [...state.visibleLevels].sort((a, b) => a - b);
  const extent = viewExtent(state.view);
  const size = [canvas.clientWidth, canvas.clientHeight];
  state.panels = arrangePanels(levels, extent, headingHeight(state.record), ...size);
}

/** Recomputes the weights of the selected query and shows them. */
function update() {
  const { view, record, query, head } = state;
  state.weights = query === null ? new Map() : queryWeights(record, query, head);
  state.levelSums = view.level_shapes.map(() => ({ cells: 0, weight: 0 }));
  state.drawnWeights = new Map();
  state.maxWeight = 0;
  for (const [id, weight] of state.weights) {
    const sums = state.levelSums[view.levels[id]];
    sums.cells += 1;
    sums.weight += weight;
    const sum = (state.drawnWeights.get(view.firstOf[id]) || 0) + weight;
    state.drawnWeights.set(view.firstOf[id], sum);
    state.maxWeight = Math.max(state.maxWeight, sum);
  }
  showDetails();
  updatePanels();
  redraw();
}
