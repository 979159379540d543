// Decodes the data of the page. Arrays are pairs of a type and base64 of little-endian numbers, in
// row-major order. Python chooses the narrowest type that holds the numbers exactly.

/** @typedef {TypedArray} Integers of a type that holds them all, Uint8Array to Float64Array */
/** @typedef {Float32Array|Float64Array} Numbers of a type that holds them all exactly */

/**
 * One image, with L levels and m occupied cells.
 * @typedef {Object} View
 * @property {string} title
 * @property {number[][]} level_shapes [L][2], rows and columns of each level
 * @property {(string|null)[]} axis_names [2]; null for the added axis of one-dimensional data
 * @property {Integers} cells [m, 2], row and column
 * @property {?Integers} depths [m], along the axis that is looked along, if there is one
 * @property {?number} dropped_axis the axis that is looked along
 * @property {string[]} all_names [P], of all axes
 * @property {number[]} view [4], corners of what is shown at zoom 1
 * @property {number[][]} behind [m], ids of the cells drawn as one, at the first of them
 * @property {number[]} firstOf [m], the first of the cells that a cell is drawn as one with
 * @property {Integers} levels [m]
 * @property {?{url: string, is_intensity: boolean}} image
 * @property {Object[]} records encoded records, see decodeRecord
 * @property {number[]} size [2], the full shape
 * @property {number[][]} cellSizes [L][2], extent of a level's cells, in cells of the full shape
 * @property {number[][]} levelCells [L], ids of the drawn cells of each level
 * @property {Map<string, number>[]} cellIds [L], from "row,column" to the id
 */

/**
 * Attention of n queries with H heads; query i has the pairs offsets[i] to offsets[i + 1].
 * @typedef {Object} AttentionRecord
 * @property {string} name
 * @property {number} n_heads
 * @property {?Windows} windows
 * @property {Numbers} positions [n, 2]
 * @property {Numbers} coordinates [n, P], positions along all axes
 * @property {?Numbers} sizes [n, P], of the boxes
 * @property {?Integers} levels [n]
 * @property {?Numbers} boxes [n, 4], corners in cells of the full shape
 * @property {string[]} query_names [n]
 * @property {boolean} has_labels
 * @property {?Numbers} scores [n]
 * @property {Integers} offsets [n + 1]
 * @property {Integers} cell_ids [M], attended cell of each pair
 * @property {Numbers} query_max [n], largest weight of each query
 * @property {Integers} weights [M, H], in units of query_max / weight_steps
 * @property {?Numbers} background [n, L, H], weight on the empty cells of each level
 */

/**
 * The windows of n queries. Their outline is the same for all queries of a level, and counted in
 * cells of the level from the low corner of the window's bounding box.
 * @typedef {Object} Windows
 * @property {Numbers} corners [n, L, 4], of the bounding boxes, in cells of the full shape
 * @property {Vertex[][][]} outlines [L], polygons around the cells; none: no window
 * @property {boolean[][]} causal [L][2], whether the high side of the box is a causal edge
 * @property {string[][]} names [L][2], such as "window 5 × 5" and "dilation 2"; "" for no details
 */

/**
 * @typedef {number[]} Vertex [row, column]
 */

/**
 * Corners of a rectangle, [top, left, bottom, right].
 * @typedef {number[]|Numbers} Corners
 */

const pageData = JSON.parse(document.getElementById("data").textContent);

const ARRAY_TYPES = {
  Uint8: Uint8Array, Uint16: Uint16Array, Uint32: Uint32Array,
  Float32: Float32Array, Float64: Float64Array,
};

/**
 * @param {?string[]} encoded name of the type and base64
 * @returns {?TypedArray} null for null
 */
function decodeArray(encoded) {
  if (encoded === null) return null;
  const [type, text] = encoded;
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return new ARRAY_TYPES[type](bytes.buffer);
}

/**
 * Caches a function of one object, so that only what is shown is decoded, and only once.
 * @param {function(Object): Object} compute
 * @returns {function(Object): Object}
 */
function memoize(compute) {
  const cache = new Map();
  return (argument) => {
    if (!cache.has(argument)) cache.set(argument, compute(argument));
    return cache.get(argument);
  };
}

/** @type {function(Object): View} */
const decodeView = memoize((encoded) => {
  const shapes = encoded.level_shapes;
  const view = { ...encoded, cells: decodeArray(encoded.cells) };
  view.depths = decodeArray(encoded.depths);
  view.levels = decodeArray(encoded.levels);
  [view.firstOf, view.behind] = [[], []];
  view.size = [0, 1].map((axis) => Math.max(...shapes.map((shape) => shape[axis])));
  view.cellSizes = shapes.map((shape) => shape.map((n, axis) => view.size[axis] / n));
  view.levelCells = shapes.map(() => []);
  view.cellIds = shapes.map(() => new Map());
  view.levels.forEach((level, id) => {
    const key = cellAt(view, id).join();
    if (!view.cellIds[level].has(key)) {
      view.cellIds[level].set(key, id);
      view.levelCells[level].push(id);
      view.behind[id] = [];
    }
    view.firstOf[id] = view.cellIds[level].get(key);
    view.behind[view.firstOf[id]].push(id);
  });
  return view;
});

/** @type {function(Object): AttentionRecord} */
const decodeRecord = memoize((encoded) => ({
  ...encoded,
  windows: encoded.windows && {
    ...encoded.windows, corners: decodeArray(encoded.windows.corners),
  },
  positions: decodeArray(encoded.positions),
  coordinates: decodeArray(encoded.coordinates),
  sizes: decodeArray(encoded.sizes),
  levels: decodeArray(encoded.levels),
  boxes: decodeArray(encoded.boxes),
  scores: decodeArray(encoded.scores),
  offsets: decodeArray(encoded.offsets),
  cell_ids: decodeArray(encoded.cell_ids),
  query_max: decodeArray(encoded.query_max),
  weights: decodeArray(encoded.weights),
  background: decodeArray(encoded.background),
}));

/**
 * @param {View} view
 * @returns {number[]} [height, width] of what is shown at zoom 1, in cells of the full shape
 */
function viewExtent(view) {
  const [top, left, bottom, right] = view.view;
  return [bottom - top, right - left];
}

/**
 * @param {View} view
 * @param {number} id of a cell
 * @returns {number[]} [row, column], in cells of its level
 */
function cellAt(view, id) {
  return [view.cells[2 * id], view.cells[2 * id + 1]];
}

/**
 * @param {View} view
 * @param {number} id of a cell
 * @returns {number[]} [P], its coordinates along all axes
 */
function cellCoordinates(view, id) {
  const drawn = cellAt(view, id).slice(view.axis_names[0] === null ? 1 : 0);
  if (view.dropped_axis !== null) drawn.splice(view.dropped_axis, 0, view.depths[id]);
  return drawn;
}

/**
 * @param {View} view
 * @param {number} id of a cell
 * @returns {Corners} in cells of the full shape
 */
function cellCorners(view, id) {
  const [height, width] = view.cellSizes[view.levels[id]];
  const [row, column] = cellAt(view, id);
  return [row * height, column * width, (row + 1) * height, (column + 1) * width];
}

/**
 * @param {AttentionRecord} record
 * @param {number} query
 * @param {number} level
 * @returns {?Corners} of the bounding box of the query's window, null if it has none on the level
 */
function queryWindow({ windows }, query, level) {
  if (windows === null || !windows.outlines[level].length) return null;
  const start = 4 * (query * windows.outlines.length + level);
  return windows.corners.subarray(start, start + 4);
}

/**
 * @param {View} view
 * @param {AttentionRecord} record
 * @param {number} query with a window on the level
 * @param {number} level
 * @returns {Vertex[][]} polygons around the cells of the window, in cells of the full shape
 */
function windowOutline(view, record, query, level) {
  const low = queryWindow(record, query, level);
  const toMap = (vertex) => vertex.map((x, axis) => low[axis] + x * view.cellSizes[level][axis]);
  return record.windows.outlines[level].map((polygon) => polygon.map(toMap));
}

/**
 * @param {AttentionRecord} record
 * @param {number} query
 * @param {number} level
 * @returns {Corners[]} of the lines at the end of the last complete cell, one per causal axis
 */
function causalEdges(record, query, level) {
  const corners = queryWindow(record, query, level);
  const causal = [0, 1].filter((axis) => record.windows.causal[level][axis]);
  return causal.map((axis) => corners.map((x, i) => (i === axis ? corners[axis + 2] : x)));
}

/**
 * @param {AttentionRecord} record
 * @param {number} query
 * @returns {?Corners} null if the record has no boxes
 */
function queryBox(record, query) {
  return record.boxes === null ? null : record.boxes.subarray(4 * query, 4 * query + 4);
}

/**
 * @param {AttentionRecord} record
 * @param {number} query
 * @returns {Numbers} [row, column], in cells of the full shape
 */
function queryPosition(record, query) {
  return record.positions.subarray(2 * query, 2 * query + 2);
}

/**
 * @param {AttentionRecord} record
 * @param {number} query
 * @param {number} head -1 for the mean over the heads
 * @returns {Map<number, number>} from the id of each attended cell to its weight
 */
function queryWeights(record, query, head) {
  const heads = head < 0 ? [...Array(record.n_heads).keys()] : [head];
  const unit = record.query_max[query] / pageData.weight_steps / heads.length;
  const weights = new Map();
  for (let pair = record.offsets[query]; pair < record.offsets[query + 1]; pair++) {
    let sum = 0;
    for (const h of heads) sum += record.weights[pair * record.n_heads + h];
    weights.set(record.cell_ids[pair], sum * unit);
  }
  return weights;
}

/**
 * @param {AttentionRecord} record with a background
 * @param {number} nLevels
 * @param {number} query
 * @param {number} level
 * @param {number} head -1 for the mean over the heads
 * @returns {number} weight on the level's empty cells
 */
function backgroundWeight(record, nLevels, query, level, head) {
  const start = (query * nLevels + level) * record.n_heads;
  const heads = record.background.subarray(start, start + record.n_heads);
  return head < 0 ? heads.reduce((sum, x) => sum + x, 0) / record.n_heads : heads[head];
}
