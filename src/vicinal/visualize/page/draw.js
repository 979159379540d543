// Draws the map: one panel per visible level, all with the same zoom.
// "state" is the object of state.js, "panel" an element of its panels.

/**
 * @typedef {{level: number, x: number, y: number, w: number, h: number}} Panel in pixels
 * @typedef {{x: number, y: number, scaleX: number, scaleY: number}} Transform
 *   pixels per cell of the full shape, and the pixel of the map's origin
 * @typedef {number[]} Rectangle [x, y, width, height], in pixels
 */

const canvas = document.getElementById("map");
const HEADING = 22; // pixels above each panel
const DETAILS = 15; // more pixels where the name of a window takes a second line
const GAP = 10; // pixels between panels
const MAX_DOTS = 500; // queries drawn as dots; more would hide the points
const LEAST_SIZE = 1.5; // pixels of a cell; twice as many of an attended one
const BEYOND = 8; // pixels around a panel that its lines may reach into
const CAUSAL_EDGE = 4; // pixels, width of the line along a causal edge
const LARGE_PIXEL = 4096; // pixels of an image pixel that is drawn by itself
const IMAGE_OPACITY = 0.35; // of an intensity image, so that the points below it stay visible

/** @returns {Object} colors of the current color scheme, by role as in palette.py */
function readPalette() {
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(`--${name}`).trim();
  const names = ["surface", "outside", "text", "muted", "point", "dot", "border", "window", "query"];
  const palette = Object.fromEntries(names.map((name) => [name, color(name)]));
  palette.weights = [0, 1, 2, 3].map((i) => parseColor(color(`weight-${i}`)));
  return palette;
}

/**
 * @param {string} hex such as "#0f7c8a"
 * @returns {number[]} [red, green, blue], 0 to 255
 */
function parseColor(hex) {
  return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
}

/**
 * The scale is a square root, which keeps small weights distinguishable.
 * @param {Object} palette
 * @param {number} share of the largest weight, 0 to 1
 * @returns {string} CSS color
 */
function weightColor(palette, share) {
  const value = Math.sqrt(Math.max(0, Math.min(1, share))) * 3;
  const stop = Math.min(2, Math.floor(value));
  const [from, to] = [palette.weights[stop], palette.weights[stop + 1]];
  return `rgb(${from.map((x, i) => Math.round(x + (to[i] - x) * (value - stop))).join(",")})`;
}

/**
 * @param {AttentionRecord} record
 * @returns {number} pixels above each panel
 */
function headingHeight({ windows }) {
  return HEADING + (windows !== null && windows.names.some(([, details]) => details) ? DETAILS : 0);
}

/**
 * Arranges panels in the number of columns that draws a view largest.
 * @param {number[]} levels
 * @param {number[]} size [2], height and width of the view in cells
 * @param {number} heading pixels above each panel
 * @param {number} width of the canvas in pixels
 * @param {number} height of the canvas in pixels
 * @returns {Panel[]}
 */
function arrangePanels(levels, size, heading, width, height) {
  let best = null;
  for (let columns = 1; columns <= levels.length; columns++) {
    const rows = Math.ceil(levels.length / columns);
    const w = (width - GAP * (columns + 1)) / columns;
    const h = (height - (GAP + heading) * rows - GAP) / rows;
    const scale = Math.min(w / size[1], h / size[0]);
    if (best === null || scale > best.scale) best = { columns, w, h, scale };
  }
  return levels.map((level, i) => ({
    level,
    x: GAP + (i % best.columns) * (best.w + GAP),
    y: heading + GAP + Math.floor(i / best.columns) * (best.h + heading + GAP),
    w: Math.max(1, best.w),
    h: Math.max(1, best.h),
  }));
}

/**
 * @param {Object} state
 * @param {number} level
 * @returns {Corners} that a panel shows at zoom 1: the view or, in a close-up, the query's window
 *   and, along causal axes, the level's cell at the query, which may be outside the window
 */
function unzoomedCorners(state, level) {
  const { view, record, query } = state;
  if (!state.closeUp || query === null) return view.view;
  const margin = view.cellSizes[level].map((size) => 3 * size);
  const [row, column] = queryPosition(record, query);
  let corners = queryWindow(record, query, level);
  if (corners !== null) {
    corners = [...corners];
    [row, column].forEach((x, axis) => {
      if (!record.windows.causal[level][axis]) return;
      const size = view.cellSizes[level][axis];
      corners[axis] = Math.min(corners[axis], Math.floor(x / size) * size);
      corners[axis + 2] = Math.max(corners[axis + 2], (Math.floor(x / size) + 1) * size);
    });
  } else {
    const all = [...state.weights.keys()]
      .filter((id) => view.levels[id] === level)
      .map((id) => cellCorners(view, id));
    all.push([row, column, row, column]);
    corners = [Math.min, Math.min, Math.max, Math.max].map((extreme, i) =>
      extreme(...all.map((each) => each[i])),
    );
  }
  const [top, left, bottom, right] = corners;
  return [top - margin[0], left - margin[1], bottom + margin[0], right + margin[1]];
}

/**
 * One-dimensional data is a row of fixed height that zooms and pans horizontally only.
 * @param {Object} state
 * @param {Panel} panel
 * @returns {Transform}
 */
function panelTransform(state, panel) {
  const [top, left, bottom, right] = unzoomedCorners(state, panel.level);
  const isRow = state.view.axis_names[0] === null;
  const fit = panel.w / (right - left);
  const scaleX = (isRow ? fit : Math.min(fit, panel.h / (bottom - top))) * state.zoom;
  const scaleY = isRow ? Math.min(80, 0.7 * panel.h) : scaleX;
  const middle = isRow ? 0.5 : (top + bottom) / 2;
  return {
    scaleX,
    scaleY,
    x: panel.x + panel.w / 2 + state.pan[0] - ((left + right) / 2) * scaleX,
    y: panel.y + panel.h / 2 + (isRow ? 0 : state.pan[1]) - middle * scaleY,
  };
}

/**
 * @param {Object} state
 * @param {number} level
 * @param {Transform} transform
 * @returns {number[]} [height, width] of the level's cells, in pixels
 */
function cellPixels(state, level, transform) {
  const [height, width] = state.view.cellSizes[level];
  return [height * transform.scaleY, width * transform.scaleX];
}

/**
 * @param {Transform} transform
 * @param {Corners} corners in cells of the full shape
 * @returns {Rectangle}
 */
function toPixels(transform, [top, left, bottom, right]) {
  const { x, y, scaleX, scaleY } = transform;
  return [x + left * scaleX, y + top * scaleY, (right - left) * scaleX, (bottom - top) * scaleY];
}

/**
 * @param {Rectangle} rectangle
 * @param {Panel} panel
 * @returns {boolean} whether they overlap
 */
function isVisible([x, y, w, h], panel) {
  return x < panel.x + panel.w && y < panel.y + panel.h && x + w > panel.x && y + h > panel.y;
}

/**
 * Cuts off what lies far outside a panel. A canvas computes in float32, in which the edges of a
 * rectangle of millions of pixels would be off by pixels.
 * @param {Panel} panel
 * @param {Rectangle} rectangle
 * @returns {Rectangle}
 */
function cutOff(panel, [x, y, w, h]) {
  const [left, width] = cutInterval(panel.x, panel.w, x, w);
  const [top, height] = cutInterval(panel.y, panel.h, y, h);
  return [left, top, width, height];
}

/**
 * @param {number} start of a panel along one axis, in pixels
 * @param {number} length of the panel
 * @param {number} x start of what is drawn
 * @param {number} w its length
 * @returns {number[]} start and length of the part within or near the panel
 */
function cutInterval(start, length, x, w) {
  const low = Math.min(Math.max(x, start - BEYOND), start + length + BEYOND);
  const high = Math.max(low, Math.min(x + w, start + length + BEYOND));
  return [low, high - low];
}

/**
 * Draws the visible part of an image.
 * @param {CanvasRenderingContext2D} ctx
 * @param {Panel} panel
 * @param {HTMLImageElement|HTMLCanvasElement} image
 * @param {Rectangle} map where the image lies
 */
function drawImage(ctx, panel, image, [x, y, w, h]) {
  const columns = visibleStrips(panel.x, panel.w, x, w, image.width);
  for (const [row, nRows, top, height] of visibleStrips(panel.y, panel.h, y, h, image.height)) {
    for (const [column, nColumns, left, width] of columns) {
      ctx.drawImage(image, column, row, nColumns, nRows, left, top, width, height);
    }
  }
}

/**
 * The pixels of an image that are visible along one axis, as one strip; very large ones each as a
 * strip of its own that is cut off.
 * @param {number} start of the panel, in pixels
 * @param {number} length of the panel
 * @param {number} x start of the image
 * @param {number} w its length
 * @param {number} n its number of pixels
 * @returns {number[][]} of each strip: its first image pixel, their number, its start and length
 */
function visibleStrips(start, length, x, w, n) {
  const side = w / n;
  const first = Math.max(0, Math.floor((start - x) / side));
  const stop = Math.min(n, Math.ceil((start + length - x) / side));
  if (stop <= first) return [];
  if (side < LARGE_PIXEL) return [[first, stop - first, x + first * side, (stop - first) * side]];
  return Array.from({ length: stop - first }, (_, i) => {
    const edges = [first + i, first + i + 1].map((pixel) => Math.round(x + pixel * side));
    return [first + i, 1, ...cutInterval(start, length, edges[0], edges[1] - edges[0])];
  });
}

/** @param {Object} state */
function drawMap(state) {
  const ratio = window.devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = canvas;
  if (canvas.width !== Math.round(width * ratio)) canvas.width = Math.round(width * ratio);
  if (canvas.height !== Math.round(height * ratio)) canvas.height = Math.round(height * ratio);
  const ctx = canvas.getContext("2d");
  ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
  ctx.clearRect(0, 0, width, height);
  for (const panel of state.panels) drawPanel(ctx, state, panel);
}

/**
 * @param {CanvasRenderingContext2D} ctx
 * @param {Object} state
 * @param {Panel} panel
 */
function drawPanel(ctx, state, panel) {
  const { palette, view, image } = state;
  drawHeading(ctx, state, panel);
  ctx.save();
  ctx.beginPath();
  ctx.rect(panel.x, panel.y, panel.w, panel.h);
  ctx.clip();
  ctx.fillStyle = palette.outside;
  ctx.fillRect(panel.x, panel.y, panel.w, panel.h);
  const transform = panelTransform(state, panel);
  const map = toPixels(transform, [0, 0, ...view.size]);
  ctx.fillStyle = palette.surface;
  ctx.fillRect(...cutOff(panel, map));
  ctx.imageSmoothingEnabled = false;
  if (image && !view.image.is_intensity) drawImage(ctx, panel, image, map);
  drawCells(ctx, state, panel, transform);
  if (image && view.image.is_intensity) {
    ctx.globalAlpha = IMAGE_OPACITY;
    drawImage(ctx, panel, image, map);
    ctx.globalAlpha = 1;
  }
  drawQueries(ctx, state, panel, transform);
  ctx.restore();
  ctx.lineWidth = 1;
  ctx.strokeStyle = palette.border;
  ctx.strokeRect(panel.x + 0.5, panel.y + 0.5, panel.w - 1, panel.h - 1);
}

/**
 * Writes the level, its window and its share of the weight above a panel.
 * @param {CanvasRenderingContext2D} ctx
 * @param {Object} state
 * @param {Panel} panel
 */
function drawHeading(ctx, state, panel) {
  const { record, query } = state;
  ctx.font = "12px system-ui, sans-serif";
  ctx.fillStyle = state.palette.text;
  ctx.textAlign = "left";
  ctx.textBaseline = "bottom";
  const parts = [`level ${panel.level}`];
  const [window, details] = record.windows === null ? ["", ""] : record.windows.names[panel.level];
  if (window) parts.push(window);
  if (query !== null) parts.push(`${formatPercent(state.levelSums[panel.level].weight)} of the weight`);
  const [down, right] = state.view.axis_names;
  parts.push(down === null ? `${right} →` : `${down} ↓ ${right} →`);
  const lines = [parts.join(" · "), ...(details ? [details] : [])];
  lines.reverse().forEach((line, i) => ctx.fillText(line, panel.x, panel.y - 5 - i * DETAILS, panel.w));
}

/**
 * Draws the occupied cells of a level: unattended ones first, then attended ones by weight.
 * @param {CanvasRenderingContext2D} ctx
 * @param {Object} state
 * @param {Panel} panel
 * @param {Transform} transform
 */
function drawCells(ctx, state, panel, transform) {
  const { palette, view, drawnWeights: weights } = state;
  const [height, width] = cellPixels(state, panel.level, transform);
  const line = Math.min(height, width) >= 6 ? 1 : 0; // a gap between large cells only
  const fill = (rectangle, least) => {
    const [x, y, w, h] = cutOff(panel, rectangle);
    ctx.fillRect(x, y, Math.max(least, w - line), Math.max(least, h - line));
  };
  if (line) drawGrid(ctx, state, panel, transform);
  ctx.fillStyle = Math.min(height, width) < LEAST_SIZE ? palette.dot : palette.point;
  ctx.globalAlpha = state.image && !view.image.is_intensity ? 0.5 : 1;
  const attended = [];
  for (const id of view.levelCells[panel.level]) {
    const rectangle = toPixels(transform, cellCorners(view, id));
    if (!isVisible(rectangle, panel)) continue;
    if (weights.has(id)) attended.push([id, rectangle]);
    else fill(rectangle, LEAST_SIZE);
  }
  ctx.globalAlpha = 1;
  for (const [id, rectangle] of attended) {
    ctx.fillStyle = weightColor(palette, weights.get(id) / (state.maxWeight || 1));
    fill(rectangle, 2 * LEAST_SIZE);
  }
  if (state.highlighted !== null && view.levels[state.highlighted] === panel.level) {
    const rectangle = toPixels(transform, cellCorners(view, state.highlighted));
    strokeRectangle(ctx, panel, rectangle, palette.text, 2);
  }
}

/**
 * @param {CanvasRenderingContext2D} ctx
 * @param {Object} state
 * @param {Panel} panel
 * @param {Transform} transform
 */
function drawGrid(ctx, state, panel, transform) {
  const [height, width] = cellPixels(state, panel.level, transform);
  const [right, bottom] = [panel.x + panel.w, panel.y + panel.h];
  const first = (start, origin, step) => origin + Math.ceil((start - origin) / step) * step;
  ctx.strokeStyle = state.palette.point;
  ctx.lineWidth = 0.5;
  ctx.beginPath();
  for (let x = first(panel.x, transform.x, width); x < right; x += width) {
    ctx.moveTo(x - 0.5, panel.y);
    ctx.lineTo(x - 0.5, bottom);
  }
  for (let y = first(panel.y, transform.y, height); y < bottom; y += height) {
    ctx.moveTo(panel.x, y - 0.5);
    ctx.lineTo(right, y - 0.5);
  }
  ctx.stroke();
}

/**
 * Draws all queries as boxes or dots, and the selected one with its window.
 * @param {CanvasRenderingContext2D} ctx
 * @param {Object} state
 * @param {Panel} panel
 * @param {Transform} transform
 */
function drawQueries(ctx, state, panel, transform) {
  const { record, palette } = state;
  const nQueries = record.query_names.length;
  if (record.boxes === null) {
    if (nQueries <= MAX_DOTS) drawDots(ctx, state, panel, transform);
  } else {
    for (let query = 0; query < nQueries; query++) {
      if (query === state.query) continue;
      strokeRectangle(ctx, panel, toPixels(transform, queryBox(record, query)), palette.muted, 1);
    }
  }
  if (state.query !== null) drawSelected(ctx, state, panel, transform);
  if (record.boxes !== null || record.has_labels) drawLabels(ctx, state, panel, transform);
}

/**
 * Draws the window, box and position of the selected query.
 * @param {CanvasRenderingContext2D} ctx
 * @param {Object} state
 * @param {Panel} panel
 * @param {Transform} transform
 */
function drawSelected(ctx, state, panel, transform) {
  const { record, palette, query } = state;
  const corners = queryWindow(record, query, panel.level);
  if (corners !== null) drawWindow(ctx, state, panel, transform);
  const box = queryBox(record, query);
  if (box !== null) strokeRectangle(ctx, panel, toPixels(transform, box), palette.query, 2);
  const [row, column] = queryPosition(record, query);
  const [x, y] = [transform.x + column * transform.scaleX, transform.y + row * transform.scaleY];
  const side = corners === null ? Infinity : (corners[3] - corners[1]) * transform.scaleX;
  // A dot would cover a window of a few pixels, so that gets a ring around it.
  if (side < 16) drawCircle(ctx, x, y, 0.75 * side + 4, { stroke: palette.query, width: 2 });
  else drawCircle(ctx, x, y, 5, { fill: palette.query, stroke: palette.surface, width: 1 });
}

/**
 * Outlines the cells of the selected query's window, and draws a thick line along causal edges.
 * @param {CanvasRenderingContext2D} ctx
 * @param {Object} state
 * @param {Panel} panel
 * @param {Transform} transform
 */
function drawWindow(ctx, state, panel, transform) {
  const { record, view, palette, query } = state;
  const { x, y, scaleX, scaleY } = transform;
  const polygons = windowOutline(view, record, query, panel.level).map((polygon) =>
    polygon.map(([row, column]) => [x + column * scaleX, y + row * scaleY]),
  );
  strokePolygons(ctx, panel, polygons, palette.window, 2);
  for (const edge of causalEdges(record, query, panel.level)) {
    strokeRectangle(ctx, panel, toPixels(transform, edge), palette.window, CAUSAL_EDGE);
  }
}

/**
 * Draws queries without boxes as dots, each in the panel of its level if it has one.
 * @param {CanvasRenderingContext2D} ctx
 * @param {Object} state
 * @param {Panel} panel
 * @param {Transform} transform
 */
function drawDots(ctx, state, panel, transform) {
  const { record, palette } = state;
  const side = Math.min(...cellPixels(state, panel.level, transform));
  const radius = Math.max(1, Math.min(2.5, side / 4));
  const style = { fill: palette.muted, stroke: radius < 2 ? null : palette.surface, width: 1 };
  for (let query = 0; query < record.query_names.length; query++) {
    if (record.levels !== null && record.levels[query] !== panel.level) continue;
    const [row, column] = queryPosition(record, query);
    const x = transform.x + column * transform.scaleX;
    drawCircle(ctx, x, transform.y + row * transform.scaleY, radius, style);
  }
}

/**
 * Labels queries in order of labelOrder, wherever a label overlaps no earlier one.
 * @param {CanvasRenderingContext2D} ctx
 * @param {Object} state
 * @param {Panel} panel
 * @param {Transform} transform
 */
function drawLabels(ctx, state, panel, transform) {
  const { record, palette } = state;
  ctx.font = "11px system-ui, sans-serif";
  ctx.textBaseline = "top";
  const placed = [];
  for (const query of state.labelOrder) {
    const [row, column] = queryPosition(record, query);
    const rectangle = toPixels(transform, queryBox(record, query) || [row, column, row, column]);
    const [x, y, w, h] = rectangle;
    if (x > panel.x + panel.w || y > panel.y + panel.h || x + w < panel.x || y + h < panel.y) {
      continue;
    }
    const name = record.query_names[query];
    const text = name.length > 40 ? `${name.slice(0, 39)}…` : name;
    const width = ctx.measureText(text).width + 6;
    const left = Math.max(panel.x, Math.min(x, panel.x + panel.w - width));
    // Above the box, below it, or inside at its top: the first that lies within the panel.
    const corners = [y - 17, y + h + 2, y + 2]
      .map((top) => [top, left, top + 15, left + width])
      .find(([top, , bottom]) => top >= panel.y && bottom <= panel.y + panel.h);
    if (corners === undefined || placed.some((other) => overlap(corners, other))) continue;
    placed.push(corners);
    ctx.fillStyle = palette.surface;
    ctx.fillRect(left, corners[0], width, 15);
    ctx.fillStyle = query === state.query ? palette.query : palette.text;
    ctx.fillText(text, left + 3, corners[0] + 2);
  }
}

/**
 * @param {Corners} a
 * @param {Corners} b
 * @returns {boolean} whether they overlap
 */
function overlap(a, b) {
  return a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
}

/**
 * @param {CanvasRenderingContext2D} ctx
 * @param {Panel} panel
 * @param {Rectangle} rectangle
 * @param {string} color
 * @param {number} width of the line
 */
function strokeRectangle(ctx, panel, [x, y, w, h], color, width) {
  const corners = [[x, y], [x + w, y], [x + w, y + h], [x, y + h]];
  strokePolygons(ctx, panel, [corners], color, width);
}

/**
 * Strokes polygons whose sides are parallel to the axes, aligned to whole pixels for sharp edges.
 * @param {CanvasRenderingContext2D} ctx
 * @param {Panel} panel
 * @param {number[][][]} polygons each as its vertices [x, y], in pixels
 * @param {string} color
 * @param {number} width of the line
 */
function strokePolygons(ctx, panel, polygons, color, width) {
  const offset = (width % 2) / 2;
  ctx.strokeStyle = color;
  ctx.lineWidth = width;
  ctx.beginPath();
  for (const polygon of polygons) {
    polygon.forEach(([x, y], i) => {
      const left = cutInterval(panel.x, panel.w, x, 0)[0];
      const top = cutInterval(panel.y, panel.h, y, 0)[0];
      const vertex = [Math.round(left) + offset, Math.round(top) + offset];
      if (i) ctx.lineTo(...vertex);
      else ctx.moveTo(...vertex);
    });
    ctx.closePath();
  }
  ctx.stroke();
}

/**
 * @param {CanvasRenderingContext2D} ctx
 * @param {number} x of the center
 * @param {number} y of the center
 * @param {number} radius
 * @param {{fill: ?string, stroke: ?string, width: number}} style colors, null or absent for none
 */
function drawCircle(ctx, x, y, radius, { fill, stroke, width }) {
  ctx.beginPath();
  ctx.arc(x, y, radius, 0, 2 * Math.PI);
  if (fill) {
    ctx.fillStyle = fill;
    ctx.fill();
  }
  if (stroke) {
    ctx.strokeStyle = stroke;
    ctx.lineWidth = width;
    ctx.stroke();
  }
}

/**
 * @param {number} weight 0 to 1
 * @returns {string} such as "12.34 %"
 */
function formatPercent(weight) {
  return `${(100 * weight).toFixed(2)} %`;
}
