// The map: a panel per level, all with the same zoom.

const canvas = document.getElementById("map");
const HEADING = 22; // pixels above each panel
const GAP = 10;

function readPalette() {
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(`--${name}`).trim();
  const names = ["paper", "beyond", "ink", "muted", "cell", "edge", "frame", "query"];
  const palette = Object.fromEntries(names.map((name) => [name, color(name)]));
  palette.weights = [0, 1, 2, 3].map((i) => parseColor(color(`weight-${i}`)));
  return palette;
}

function parseColor(hex) {
  return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
}

// By the square root of the share, or the many small weights would all look the same.
function weightColor(palette, share) {
  const place = Math.sqrt(Math.max(0, Math.min(1, share))) * 3;
  const stop = Math.min(2, Math.floor(place));
  const [from, to] = [palette.weights[stop], palette.weights[stop + 1]];
  return `rgb(${from.map((x, i) => Math.round(x + (to[i] - x) * (place - stop))).join(",")})`;
}

// Panels as large as they get: the number of columns that gives the map the largest scale.
function layOut(levels, size, width, height) {
  let best = null;
  for (let columns = 1; columns <= levels.length; columns++) {
    const rows = Math.ceil(levels.length / columns);
    const w = (width - GAP * (columns + 1)) / columns;
    const h = (height - (GAP + HEADING) * rows - GAP) / rows;
    const scale = Math.min(w / size[1], h / size[0]);
    if (best === null || scale > best.scale) best = { columns, w, h, scale };
  }
  return levels.map((level, i) => ({
    level,
    x: GAP + (i % best.columns) * (best.w + GAP),
    y: HEADING + GAP + Math.floor(i / best.columns) * (best.h + HEADING + GAP),
    w: Math.max(1, best.w),
    h: Math.max(1, best.h),
  }));
}

// What a panel shows before any zoom: the whole map or, close up, the query's window.
function baseArea(scene, level) {
  const whole = [0, 0, ...scene.view.size];
  if (!scene.closeUp || scene.query === null) return whole;
  const reach = scene.view.widths[level].map((width) => 3 * width);
  let area = windowOf(scene.record, scene.view.shapes.length, scene.query, level);
  if (area === null) {
    const squares = [...scene.attended.keys()]
      .filter((place) => scene.view.levels[place] === level)
      .map((place) => square(scene.view, place));
    const [row, column] = positionOf(scene.record, scene.query);
    squares.push([row, column, row, column]);
    area = [Math.min, Math.min, Math.max, Math.max].map((pick, i) =>
      pick(...squares.map((corners) => corners[i])),
    );
  }
  return [area[0] - reach[0], area[1] - reach[1], area[2] + reach[0], area[3] + reach[1]];
}

// From cells of the full shape to pixels: how many along each axis, and where cell (0, 0) is.
// A single row of cells is as high as is good to see.
function transform(scene, panel) {
  const [top, left, bottom, right] = baseArea(scene, panel.level);
  const oneRow = scene.view.axes[0] === null;
  const fit = panel.w / (right - left);
  const across = (oneRow ? fit : Math.min(fit, panel.h / (bottom - top))) * scene.zoom;
  const down = oneRow ? Math.min(80, 0.7 * panel.h) : across;
  const middle = oneRow ? 0.5 : (top + bottom) / 2;
  return {
    across,
    down,
    x: panel.x + panel.w / 2 + scene.shift[0] - ((left + right) / 2) * across,
    y: panel.y + panel.h / 2 + (oneRow ? 0 : scene.shift[1]) - middle * down,
  };
}

function sideInPixels(scene, level, at) {
  const [height, width] = scene.view.widths[level];
  return [height * at.down, width * at.across];
}

function toPixels(at, [top, left, bottom, right]) {
  return [
    at.x + left * at.across,
    at.y + top * at.down,
    (right - left) * at.across,
    (bottom - top) * at.down,
  ];
}

function drawMap(scene) {
  const ratio = window.devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = canvas;
  if (canvas.width !== Math.round(width * ratio)) canvas.width = Math.round(width * ratio);
  if (canvas.height !== Math.round(height * ratio)) canvas.height = Math.round(height * ratio);
  const ctx = canvas.getContext("2d");
  ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
  ctx.clearRect(0, 0, width, height);
  for (const panel of scene.panels) drawPanel(ctx, scene, panel);
}

function drawPanel(ctx, scene, panel) {
  const { palette } = scene;
  drawHeading(ctx, scene, panel);
  ctx.save();
  ctx.beginPath();
  ctx.rect(panel.x, panel.y, panel.w, panel.h);
  ctx.clip();
  ctx.fillStyle = palette.beyond;
  ctx.fillRect(panel.x, panel.y, panel.w, panel.h);
  const at = transform(scene, panel);
  const map = toPixels(at, [0, 0, ...scene.view.size]);
  ctx.fillStyle = palette.paper;
  ctx.fillRect(...map);
  ctx.imageSmoothingEnabled = false;
  if (scene.picture && !scene.view.picture.ink) ctx.drawImage(scene.picture, ...map);
  drawCells(ctx, scene, panel, at);
  if (scene.picture && scene.view.picture.ink) {
    ctx.globalAlpha = 0.35;
    ctx.drawImage(scene.picture, ...map);
    ctx.globalAlpha = 1;
  }
  drawQueries(ctx, scene, panel, at);
  ctx.restore();
  ctx.lineWidth = 1;
  ctx.strokeStyle = palette.edge;
  ctx.strokeRect(panel.x + 0.5, panel.y + 0.5, panel.w - 1, panel.h - 1);
}

function drawHeading(ctx, scene, panel) {
  ctx.font = "12px system-ui, sans-serif";
  ctx.fillStyle = scene.palette.ink;
  ctx.textAlign = "left";
  ctx.textBaseline = "bottom";
  const side = scene.record.sides === null ? "" : ` · window ${scene.record.sides[panel.level]}`;
  const share = scene.query === null ? "" : ` · ${percent(scene.shares[panel.level].weight)} of the weight`;
  ctx.fillText(`level ${panel.level}${side}${share}`, panel.x, panel.y - 5, panel.w);
}

function drawCells(ctx, scene, panel, at) {
  const { palette, view } = scene;
  const [height, width] = sideInPixels(scene, panel.level, at);
  const line = Math.min(height, width) >= 6 ? 1 : 0; // between neighbors, where there is room
  const visible = ([x, y, w, h]) =>
    x < panel.x + panel.w && y < panel.y + panel.h && x + w > panel.x && y + h > panel.y;
  const fill = ([x, y, w, h]) =>
    ctx.fillRect(x, y, Math.max(1, w - line), Math.max(1, h - line));
  if (line) drawGrid(ctx, scene, panel, at);
  ctx.fillStyle = palette.cell;
  ctx.globalAlpha = scene.picture && !view.picture.ink ? 0.5 : 1;
  const seen = [];
  for (const id of view.placesOf[panel.level]) {
    const area = toPixels(at, square(view, id));
    if (!visible(area)) continue;
    if (scene.attended.has(id)) seen.push([id, area]);
    else fill(area);
  }
  ctx.globalAlpha = 1;
  for (const [id, area] of seen) {
    ctx.fillStyle = weightColor(palette, scene.attended.get(id) / (scene.most || 1));
    fill(area);
  }
  if (scene.marked !== null && view.levels[scene.marked] === panel.level) {
    outline(ctx, toPixels(at, square(view, scene.marked)), palette.ink, 2);
  }
}

function drawGrid(ctx, scene, panel, at) {
  const [top, left, width, height] = [panel.y, panel.x, panel.w, panel.h];
  const [down, across] = sideInPixels(scene, panel.level, at);
  ctx.strokeStyle = scene.palette.cell;
  ctx.lineWidth = 0.5;
  ctx.beginPath();
  for (let x = at.x + Math.ceil((left - at.x) / across) * across; x < left + width; x += across) {
    ctx.moveTo(x - 0.5, top);
    ctx.lineTo(x - 0.5, top + height);
  }
  for (let y = at.y + Math.ceil((top - at.y) / down) * down; y < top + height; y += down) {
    ctx.moveTo(left, y - 0.5);
    ctx.lineTo(left + width, y - 0.5);
  }
  ctx.stroke();
}

function drawQueries(ctx, scene, panel, at) {
  const { record, palette } = scene;
  if (record.boxes !== null) {
    for (let query = 0; query < record.names.length; query++) {
      if (query !== scene.query) {
        outline(ctx, toPixels(at, boxOf(record, query)), palette.muted, 1);
      }
    }
  } else if (record.names.length <= 500) {
    drawDots(ctx, scene, panel, at);
  }
  if (scene.query !== null) {
    const area = windowOf(record, scene.view.shapes.length, scene.query, panel.level);
    if (area !== null) outline(ctx, toPixels(at, area), palette.frame, 2);
    const box = boxOf(record, scene.query);
    if (box !== null) outline(ctx, toPixels(at, box), palette.query, 2);
    const [row, column] = positionOf(record, scene.query);
    const [x, y] = [at.x + column * at.across, at.y + row * at.down];
    const side = area === null ? Infinity : (area[3] - area[1]) * at.across;
    if (side < 16) ring(ctx, x, y, 0.75 * side + 4, palette.query);
    else dot(ctx, x, y, 5, palette.query, palette.paper);
  }
  if (record.boxes !== null || record.labelled) drawNames(ctx, scene, panel, at);
}

function drawDots(ctx, scene, panel, at) {
  const { record, palette } = scene;
  const radius = Math.max(1, Math.min(2.5, Math.min(...sideInPixels(scene, panel.level, at)) / 4));
  for (let query = 0; query < record.names.length; query++) {
    if (record.levels !== null && record.levels[query] !== panel.level) continue;
    const [row, column] = positionOf(record, query);
    dot(ctx, at.x + column * at.across, at.y + row * at.down, radius, palette.muted, palette.paper);
  }
}

// Names of the queries, the chosen and the surest first, where no other name stands.
function drawNames(ctx, scene, panel, at) {
  const { record, palette } = scene;
  ctx.font = "11px system-ui, sans-serif";
  ctx.textBaseline = "top";
  const placed = [];
  for (const query of scene.order) {
    const [row, column] = positionOf(record, query);
    const box = boxOf(record, query) || [row, column, row, column];
    const [x, y, w, h] = toPixels(at, box);
    if (x > panel.x + panel.w || y > panel.y + panel.h || x + w < panel.x || y + h < panel.y) {
      continue;
    }
    const name = record.names[query];
    const text = name.length > 40 ? `${name.slice(0, 39)}…` : name;
    const width = ctx.measureText(text).width + 6;
    const left = Math.max(panel.x, Math.min(x, panel.x + panel.w - width));
    const corners = [y - 17, y + h + 2, y + 2].map((top) => [left, top, left + width, top + 15]);
    const area = corners.find(
      ([, top, , bottom]) => top >= panel.y && bottom <= panel.y + panel.h,
    );
    if (area === undefined || placed.some((other) => overlaps(area, other))) continue;
    placed.push(area);
    ctx.fillStyle = palette.paper;
    ctx.fillRect(area[0], area[1], width, 15);
    ctx.fillStyle = query === scene.query ? palette.query : palette.ink;
    ctx.fillText(text, area[0] + 3, area[1] + 2);
  }
}

function overlaps(a, b) {
  return a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
}

function outline(ctx, [x, y, w, h], color, width) {
  const [left, top] = [Math.round(x), Math.round(y)]; // sharp edges
  ctx.strokeStyle = color;
  ctx.lineWidth = width;
  const shift = (width % 2) / 2;
  ctx.strokeRect(left + shift, top + shift, Math.round(x + w) - left, Math.round(y + h) - top);
}

function dot(ctx, x, y, radius, color, edge) {
  ctx.beginPath();
  ctx.arc(x, y, radius, 0, 2 * Math.PI);
  ctx.fillStyle = color;
  ctx.fill();
  if (radius < 2) return;
  ctx.strokeStyle = edge;
  ctx.lineWidth = 1;
  ctx.stroke();
}

// Around what is too small to be seen below a dot.
function ring(ctx, x, y, radius, color) {
  ctx.beginPath();
  ctx.arc(x, y, radius, 0, 2 * Math.PI);
  ctx.strokeStyle = color;
  ctx.lineWidth = 2;
  ctx.stroke();
}

function percent(weight) {
  return `${(100 * weight).toFixed(2)} %`;
}
