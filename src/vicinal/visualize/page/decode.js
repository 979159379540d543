// Decodes the data of the page. Arrays are base64 of little-endian numbers, in row-major order.

/**
 * One image, with L levels and m occupied cells.
 * @typedef {Object} View
 * @property {string} title
 * @property {number[][]} level_shapes [L][2], rows and columns of each level
 * @property {(string|null)[]} axis_names [2]; null for the added axis of one-dimensional data
 * @property {Uint32Array} cells [m, 2], row and column
 * @property {?Uint32Array} depths [m], along the axis that is looked along, if there is one
 * @property {?number} dropped_axis the axis that is looked along
 * @property {string[]} all_names [P], of all axes
 * @property {number[]} view [4], corners of the occupied part
 * @property {number[][]} behind [m], ids of the cells drawn as one, at the first of them
 * @property {number[]} firstOf [m], the first of the cells that a cell is drawn as one with
 * @property {Uint8Array} levels [m]
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
 * @property {?Float32Array} windows [n, L, 4], corners in cells of the full shape
 * @property {?string[]} window_sizes [L], such as "5 × 5"
 * @property {Float32Array} positions [n, 2]
 * @property {Float32Array} coordinates [n, P], positions along all axes
 * @property {?Float32Array} sizes [n, P], of the boxes
 * @property {?Uint8Array} levels [n]
 * @property {?Float32Array} boxes [n, 4], corners in cells of the full shape
 * @property {string[]} query_names [n]
 * @property {boolean} has_labels
 * @property {?Float32Array} scores [n]
 * @property {Uint32Array} offsets [n + 1]
 * @property {Uint32Array} cell_ids [M], attended cell of each pair
 * @property {Float32Array} query_max [n], largest weight of each query
 * @property {Uint16Array} weights [M, H], in units of query_max / weight_steps
 * @property {?Float32Array} background [n, L, H], weight on the empty cells of each level
 */

/**
 * Corners of a rectangle, [top, left, bottom, right].
 * @typedef {number[]|Float32Array} Corners
 */

const pageData = JSON.parse(document.getElementById("data").textContent);

/**
 * @param {?string} text base64
 * @param {Function} ArrayType constructor of a typed array
 * @returns {?TypedArray} null for null
 */
function decodeArray(text, ArrayType) {
  if (text === null) return null;
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return new ArrayType(bytes.buffer);
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
  const view = { ...encoded, cells: decodeArray(encoded.cells, Uint32Array) };
  view.depths = decodeArray(encoded.depths, Uint32Array);
  view.levels = decodeArray(encoded.levels, Uint8Array);
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
  windows: decodeArray(encoded.windows, Float32Array),
  positions: decodeArray(encoded.positions, Float32Array),
  coordinates: decodeArray(encoded.coordinates, Float32Array),
  sizes: decodeArray(encoded.sizes, Float32Array),
  levels: decodeArray(encoded.levels, Uint8Array),
  boxes: decodeArray(encoded.boxes, Float32Array),
  scores: decodeArray(encoded.scores, Float32Array),
  offsets: decodeArray(encoded.offsets, Uint32Array),
  cell_ids: decodeArray(encoded.cell_ids, Uint32Array),
  query_max: decodeArray(encoded.query_max, Float32Array),
  weights: decodeArray(encoded.weights, Uint16Array),
  background: decodeArray(encoded.background, Float32Array),
}));

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
 * @param {number} nLevels
 * @param {number} query
 * @param {number} level
 * @returns {?Corners} of the query's window, null if the record has no windows
 */
function queryWindow(record, nLevels, query, level) {
  if (record.windows === null) return null;
  const start = 4 * (query * nLevels + level);
  return record.windows.subarray(start, start + 4);
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
 * @returns {Float32Array} [row, column], in cells of the full shape
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
