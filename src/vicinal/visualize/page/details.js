// The texts, tables and lists beside the map.

const MAX_ROWS = 200; // of the table of points

/** Shows the selected query: its name, position, weight by level and largest weights. */
function showDetails() {
  const { record, query } = state;
  element("query").value = query === null ? "" : query;
  for (const id of ["scale", "points-heading"]) element(id).hidden = query === null;
  element("level-sums").replaceChildren();
  element("points").replaceChildren();
  element("points-note").textContent = "";
  if (query === null) {
    element("name").textContent = "No query selected";
    element("where").textContent = `Click a ${record.boxes === null ? "point" : "box"} on the map`;
    return;
  }
  element("name").textContent = record.query_names[query];
  element("where").textContent = describeQuery(query);
  showLevelSums();
  const ticks = [0, state.maxWeight / 4, state.maxWeight]; // the scale is a square root
  ["min", "middle", "max"].forEach((name, i) => {
    element(`scale-${name}`).textContent = formatPercent(ticks[i]);
  });
  showPoints();
}

/**
 * @param {number} query
 * @returns {string} its number, position, level and size of its box
 */
function describeQuery(query) {
  const { record, view } = state;
  const dim = view.all_names.length;
  const ofQuery = (values) => values.subarray(dim * query, dim * (query + 1));
  const position = ofQuery(record.coordinates);
  const coordinates = view.all_names.map((name, i) => `${name} ${position[i].toFixed(1)}`);
  const parts = [`query ${query}`, coordinates.join(", ")];
  if (record.levels !== null) parts.push(`level ${record.levels[query]}`);
  if (record.sizes !== null) {
    const sides = [...ofQuery(record.sizes)].map((side) => side.toFixed(1));
    parts.push(`box ${sides.join(" × ")}`);
  }
  return parts.join("; ");
}

/** @returns {number[]} the drawn axes; [1] for one-dimensional data */
function shownAxes() {
  return state.view.axis_names[0] === null ? [1] : [0, 1];
}

/** Fills the table of points and weight by level. */
function showLevelSums() {
  const { record, view, query, head } = state;
  const hasBackground = record.background !== null;
  const heading = ["level", "cells", "weight", ...(hasBackground ? ["empty cells"] : [])];
  const nLevels = view.level_shapes.length;
  const rows = state.levelSums.map(({ cells, weight }, level) => {
    const texts = [level, cells, formatPercent(weight)];
    if (hasBackground) {
      texts.push(formatPercent(backgroundWeight(record, nLevels, query, level, head)));
    }
    return tableRow(texts);
  });
  fillTable(element("level-sums"), heading, rows);
}

/** Fills the table of points in visible levels, by decreasing weight. */
function showPoints() {
  const { view } = state;
  const sorted = [...state.weights]
    .filter(([id]) => state.visibleLevels.has(view.levels[id]))
    .sort((a, b) => b[1] - a[1]);
  const rows = sorted.slice(0, MAX_ROWS).map(([id, weight]) => {
    const cell = cellCoordinates(view, id);
    const row = tableRow([view.levels[id], ...cell, formatPercent(weight)]);
    Object.assign(row.dataset, { level: view.levels[id], cell: cell.join(","), weight });
    row.onmouseenter = () => highlight(id);
    row.onmouseleave = () => highlight(null);
    return row;
  });
  const heading = ["level", ...view.all_names, "weight"];
  fillTable(element("points"), heading, rows);
  const hidden = sorted.length - rows.length;
  if (hidden > 0) element("points-note").textContent = `and ${hidden} more`;
  if (!sorted.length) element("points-note").textContent = "No attended points in the visible levels.";
}

/** @param {?number} id of the cell to outline on the map */
function highlight(id) {
  state.highlighted = id;
  redraw();
}

/** @param {string} text below the map */
function setStatus(text) {
  element("status").textContent = text;
}

// ------------------------------------------------------------------------------- DOM elements

/**
 * @param {string} tag
 * @param {string|number} text inserted as text, never as HTML, since names are arbitrary
 * @returns {HTMLElement}
 */
function createElement(tag, text) {
  const created = document.createElement(tag);
  created.textContent = text;
  return created;
}

/**
 * @param {(string|number)[]} texts one per column
 * @param {string} tag "td" or "th"
 * @returns {HTMLTableRowElement}
 */
function tableRow(texts, tag = "td") {
  const row = document.createElement("tr");
  row.append(...texts.map((text) => createElement(tag, text)));
  return row;
}

/**
 * @param {HTMLTableElement} table
 * @param {string[]} heading
 * @param {HTMLTableRowElement[]} rows
 */
function fillTable(table, heading, rows) {
  const head = document.createElement("thead");
  const body = document.createElement("tbody");
  head.append(tableRow(heading, "th"));
  body.append(...rows);
  table.replaceChildren(head, body);
}

/**
 * @param {HTMLSelectElement} select
 * @param {string[]} names of its options
 */
function fillSelect(select, names) {
  select.replaceChildren(...names.map((name) => createElement("option", name)));
}

/** Makes a check box for each level of the view. */
function fillLevels() {
  const labels = state.view.level_shapes.map((_, level) => {
    const box = document.createElement("input");
    box.type = "checkbox";
    box.value = level;
    box.checked = state.visibleLevels.has(level);
    box.onchange = () => setLevel(level, box.checked);
    const label = document.createElement("label");
    label.append(box, String(level));
    return label;
  });
  element("levels").replaceChildren(createElement("legend", "Levels"), ...labels);
}
