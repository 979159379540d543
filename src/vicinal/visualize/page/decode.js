// The data of the page: views of images, each with records of what queries attend to.

function numbers(text, Type) {
  if (text === null) return null;
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return new Type(bytes.buffer);
}

const source = JSON.parse(document.getElementById("data").textContent);
const steps = source.steps;

// Decoded when first shown: what is never looked at takes no time.
function once(decode) {
  const found = new Map();
  return (packed) => {
    if (!found.has(packed)) found.set(packed, decode(packed));
    return found.get(packed);
  };
}

const decodeView = once((packed) => {
  const view = { ...packed, cells: numbers(packed.cells, Uint32Array) };
  view.levels = numbers(packed.levels, Uint8Array);
  view.size = [0, 1].map((axis) => Math.max(...packed.shapes.map((shape) => shape[axis])));
  // How many cells of the full shape a cell of each level is wide.
  view.widths = packed.shapes.map((shape) => shape.map((n, axis) => view.size[axis] / n));
  view.placesOf = packed.shapes.map(() => []);
  view.placeAt = packed.shapes.map(() => new Map());
  view.levels.forEach((level, place) => {
    view.placesOf[level].push(place);
    const [row, column] = cell(view, place);
    view.placeAt[level].set(row * packed.shapes[level][1] + column, place);
  });
  return view;
});

const decodeRecord = once((packed) => ({
  ...packed,
  windows: numbers(packed.windows, Float32Array),
  positions: numbers(packed.positions, Float32Array),
  levels: numbers(packed.levels, Uint8Array),
  boxes: numbers(packed.boxes, Float32Array),
  scores: numbers(packed.scores, Float32Array),
  offsets: numbers(packed.offsets, Uint32Array),
  places: numbers(packed.places, Uint32Array),
  largest: numbers(packed.largest, Float32Array),
  weights: numbers(packed.weights, Uint16Array),
  background: numbers(packed.background, Float32Array),
}));

function cell(view, place) {
  return [view.cells[2 * place], view.cells[2 * place + 1]];
}

// [top, left, bottom, right] of a place, in cells of the full shape.
function square(view, place) {
  const [height, width] = view.widths[view.levels[place]];
  const [row, column] = cell(view, place);
  return [row * height, column * width, (row + 1) * height, (column + 1) * width];
}

function windowOf(record, nLevels, query, level) {
  if (record.windows === null) return null;
  const start = 4 * (query * nLevels + level);
  return record.windows.subarray(start, start + 4);
}

function boxOf(record, query) {
  return record.boxes === null ? null : record.boxes.subarray(4 * query, 4 * query + 4);
}

function positionOf(record, query) {
  return record.positions.subarray(2 * query, 2 * query + 2);
}

// Weights by place, of one head or, for head -1, the mean over all.
function attended(record, query, head) {
  const chosen = head < 0 ? [...Array(record.heads).keys()] : [head];
  const found = new Map();
  for (let pair = record.offsets[query]; pair < record.offsets[query + 1]; pair++) {
    let sum = 0;
    for (const h of chosen) sum += record.weights[pair * record.heads + h];
    found.set(record.places[pair], ((sum / chosen.length) * record.largest[query]) / steps);
  }
  return found;
}

// The share of the empty cells of a level, likewise.
function onEmptyCells(record, nLevels, query, level, head) {
  const start = (query * nLevels + level) * record.heads;
  const heads = record.background.subarray(start, start + record.heads);
  return head < 0 ? heads.reduce((sum, x) => sum + x, 0) / record.heads : heads[head];
}
