'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const get = id => document.getElementById(id);
const bytes = base64 => Uint8Array.from(atob(base64), c => c.charCodeAt(0));
const palette = bytes(data.palette);
const dark = matchMedia('(prefers-color-scheme: dark)');
const canvas = get('picture'), tip = get('tip');
/** Room above the cells for half a label. */
const TOP = 6;
/** What is drawn, and where; `mark` is the cell that is pointed at. */
let view, mark = null;

/** An f16 without a sign. */
const half = bits => bits >> 10 ? 2 ** ((bits >> 10) - 15) * (1 + (bits & 1023) / 1024) : (bits & 1023) * 2 ** -24;

/** The weights of a layer, decoded when they are first needed. */
function weights(layer) {
  if (typeof layer.weights === 'string') {
    const b = bytes(layer.weights);
    layer.weights = Float32Array.from({ length: b.length / 2 }, (_, i) => half(b[2 * i] | b[2 * i + 1] << 8));
  }
  return layer.weights;
}

/** The place of a weight on the colour scale, from 0 to 1, and the weight at such a place. */
function share(weight) {
  const linear = Math.min(weight / view.max, 1);
  switch (view.scale) {
    case 'sqrt': return Math.sqrt(linear);
    case 'log': return Math.max(0, 1 + Math.log10(linear) / data.decades);
    default: return linear;
  }
}
function weightAt(share) {
  const log = 10 ** ((share - 1) * data.decades);
  return view.max * { linear: share, sqrt: share ** 2, log }[view.scale];
}
/** In the dark, large weights are light. */
const colour = share => 3 * Math.round(255 * (dark.matches ? 1 - share : share));
const number = x => x < 1e-4 && x > 0 ? x.toExponential(1) : String(Number(x.toPrecision(3)));

/** Reads the controls. */
function read() {
  const sequence = data.sequences[get('sequence').value || 0];
  get('layer').max = sequence.layers.length - 1;
  const layer = sequence.layers[get('layer').value];
  get('head').max = layer.heads - 1;
  const head = Number(get('head').value);
  const skip = get('skip').checked && sequence.keys.length > 1 ? 1 : 0;
  const max = Number(get('max').value);
  view = { sequence, layer, head, skip, scale: get('scale').value };
  view.given = max > 0;
  view.max = view.given ? max : data.largest[skip];
  view.rows = sequence.queries.length;
  view.columns = sequence.keys.length - skip;
  get('max').placeholder = number(data.largest[skip]);
  get('title').textContent = sequence.title;
  document.querySelector('output[for=layer]').textContent = layer.name;
  document.querySelector('output[for=head]').textContent = `${head} of 0–${layer.heads - 1}`;
  get('sequence').parentNode.hidden = data.sequences.length < 2;
  get('layer').parentNode.hidden = sequence.layers.length < 2;
  get('head').parentNode.hidden = layer.heads < 2;
}

/** The largest weight of a cell, with its query and key. */
function largest(row, column) {
  const { per, rows, columns, skip, head, layer } = view;
  const all = weights(layer), width = columns + skip;
  let best = { weight: -1 };
  for (let query = row * per; query < Math.min((row + 1) * per, rows); query++) {
    for (let key = column * per + skip; key < Math.min((column + 1) * per, columns) + skip; key++) {
      const weight = all[(head * rows + query) * width + key];
      if (weight > best.weight) best = { weight, query, key };
    }
  }
  return best;
}

/** Places the cells: the whole picture fits the window, where that leaves room for it. */
function arrange(context) {
  const { sequence, rows, columns } = view, ratio = devicePixelRatio;
  const width = get('body').clientWidth;
  const widest = tokens => Math.max(...tokens.slice(0, 2000).map(token => context.measureText(token).width)) + 8;
  view.left = Math.min(widest(sequence.queries), 0.3 * width) + 18;
  view.below = Math.min(widest(sequence.keys), 130) + 20;
  const across = width - view.left - 6, down = Math.max(320, innerHeight - view.below - 150);
  view.per = Math.ceil(Math.max(columns / (across * ratio), rows / (down * ratio), 1));
  [view.cellRows, view.cellColumns] = [rows, columns].map(n => Math.ceil(n / view.per));
  const side = Math.min(40, across / view.cellColumns, down / view.cellRows);
  // One query of many keys is still to be seen.
  view.cell = [Math.max(side, Math.min(20, 48 / view.cellColumns)), Math.max(side, Math.min(20, 48 / view.cellRows))];
  const size = [view.left + view.cellColumns * view.cell[0] + 6, TOP + view.cellRows * view.cell[1] + view.below];
  [canvas.width, canvas.height] = size.map(side => Math.round(side * ratio));
  [canvas.style.width, canvas.style.height] = size.map(side => `${side}px`);
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
}

/** The cells as a picture of one pixel each, kept while only the mark moves. */
let kept = {};
function cellPicture() {
  const { cellRows, cellColumns, sequence, layer, head, skip, scale, max, per } = view;
  const place = [data.sequences.indexOf(sequence), sequence.layers.indexOf(layer), head];
  const what = [...place, skip, scale, max, per, dark.matches].join();
  if (kept.what === what) return kept.cells;
  const cells = document.createElement('canvas');
  [cells.width, cells.height] = [cellColumns, cellRows];
  const pixels = cells.getContext('2d');
  const image = pixels.createImageData(cellColumns, cellRows);
  for (let i = 0; i < cellRows * cellColumns; i++) {
    const at = colour(share(largest(Math.floor(i / cellColumns), i % cellColumns).weight));
    image.data.set([palette[at], palette[at + 1], palette[at + 2], 255], 4 * i);
  }
  pixels.putImageData(image, 0, 0);
  kept = { what, cells };
  return cells;
}

function drawCells(context) {
  const { cellRows, cellColumns, cell, left } = view;
  context.imageSmoothingEnabled = false;
  context.drawImage(cellPicture(), left, TOP, cellColumns * cell[0], cellRows * cell[1]);
  context.strokeRect(left - 0.5, TOP - 0.5, cellColumns * cell[0] + 1, cellRows * cell[1] + 1);
}

/** Every how many-th token has a label: 1, 2, 5, 10, … */
function step(cell) {
  for (let power = 1; ; power *= 10) {
    for (const digit of [1, 2, 5]) if (digit * power * cell >= 13 * view.per) return digit * power;
  }
}

/** Cuts a label to a width. */
function cut(context, text, width) {
  let short = text;
  for (let length = text.length - 1; length > 0 && context.measureText(short).width > width; length--) {
    short = `${text.slice(0, length)}…`;
  }
  return short;
}

function drawLabels(context, ink, accent) {
  const { sequence, cell, left, per, skip, rows, columns, cellRows, cellColumns, below } = view;
  const bottom = TOP + cellRows * cell[1] + 1, marked = mark && largest(...mark);
  const draw = (tokens, from, n, size, chosen, width, place) => {
    const every = step(size), middle = token => (token + 0.5) * size / per;
    for (let token = 0; token < n; token++) {
      const near = chosen !== null && token !== chosen && Math.abs(middle(token) - middle(chosen)) < 13;
      if (token !== chosen && ((token + from) % every || near && size / per < 13)) continue;
      context.fillStyle = token === chosen ? accent : ink;
      context.save();
      place(middle(token));
      context.fillText(cut(context, tokens[token + from], width), 0, 0);
      context.restore();
    }
  };
  [context.textAlign, context.textBaseline] = ['right', 'middle'];
  draw(sequence.queries, 0, rows, cell[1], marked ? marked.query : null, left - 24, y => {
    context.translate(left - 5, TOP + y);
  });
  draw(sequence.keys, skip, columns, cell[0], marked ? marked.key - skip : null, below - 24, x => {
    context.translate(left + x, bottom + 4);
    context.rotate(-Math.PI / 2);
  });
  [context.textAlign, context.fillStyle] = ['center', ink];
  context.fillText('key', left + cellColumns * cell[0] / 2, bottom + below - 10);
  if (cellRows * cell[1] > 40) {
    context.translate(8, TOP + cellRows * cell[1] / 2);
    context.rotate(-Math.PI / 2);
    context.fillText('query', 0, 0);
  }
}

function drawBar() {
  const stops = Array.from({ length: 33 }, (_, i) => colour(i / 32)).map(at => `rgb(${palette.slice(at, at + 3)})`);
  get('bar').style.background = `linear-gradient(to right, ${stops})`;
  const signs = { 0: view.scale === 'log' ? '≤ ' : '', 4: view.given ? '≥ ' : '' };
  get('ends').replaceChildren(...[0, 1, 2, 3, 4].map(i => {
    const end = document.createElement('span');
    end.textContent = (signs[i] || '') + number(weightAt(i / 4));
    return end;
  }));
  const notes = [
    view.per > 1 && `Each cell shows the largest weight of ${Math.min(view.per, view.rows)} × ${view.per} (queries × keys).`,
    'Point at a cell, or focus the picture and use the arrow keys; Page Up and Page Down change the head.',
    'Colours mean the same in all heads and layers. Weights are rounded to 16-bit floats, which keep three digits.',
    view.skip && 'The first key is left out; the other weights are as they were.',
  ];
  get('note').textContent = notes.filter(Boolean).join(' ');
}

/** Says what the marked cell holds, beside it. */
function tell() {
  tip.hidden = !mark;
  if (!mark) return;
  const { sequence, layer, head, cell, left } = view, { weight, query, key } = largest(...mark);
  const named = (tokens, index) => tokens[index] === String(index) ? `${index}` : `${index} “${tokens[index]}”`;
  const lines = [
    `query ${named(sequence.queries, query)} → key ${named(sequence.keys, key)}`,
    `weight ${number(weight)}`,
    layer.name ? `head ${head} · ${layer.name}` : `head ${head}`,
  ];
  tip.replaceChildren(...lines.map(line => Object.assign(document.createElement('div'), { textContent: line })));
  const x = left + (mark[1] + 1) * cell[0] + 10, y = TOP + (mark[0] + 1) * cell[1] + 10;
  const room = get('body').clientWidth - tip.offsetWidth;
  tip.style.left = `${Math.max(0, Math.min(x, room))}px`;
  const above = Math.max(0, y - tip.offsetHeight - cell[1] - 20);
  tip.style.top = `${y + tip.offsetHeight > canvas.clientHeight ? above : y}px`;
}

function draw() {
  read();
  const context = canvas.getContext('2d'), style = getComputedStyle(document.documentElement);
  const [ink, line, accent] = ['--ink', '--line', '--mark'].map(name => style.getPropertyValue(name));
  context.font = '12px system-ui, sans-serif';
  arrange(context);
  if (mark) mark = [Math.min(mark[0], view.cellRows - 1), Math.min(mark[1], view.cellColumns - 1)];
  [context.font, context.strokeStyle] = ['12px system-ui, sans-serif', line];
  drawCells(context);
  if (mark) {
    [context.strokeStyle, context.lineWidth] = [accent, 2];
    const [width, height] = view.cell;
    context.strokeRect(view.left + mark[1] * width - 1, TOP + mark[0] * height - 1, width + 2, height + 2);
  }
  drawLabels(context, ink, accent);
  drawBar();
  tell();
}

/** Marks a cell, or none, and draws when the browser next shows a picture. */
let waiting = false;
function redraw(cell = mark) {
  mark = cell;
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; draw(); });
}

function point(event) {
  const row = Math.floor((event.offsetY - TOP) / view.cell[1]);
  const column = Math.floor((event.offsetX - view.left) / view.cell[0]);
  const inside = row >= 0 && column >= 0 && row < view.cellRows && column < view.cellColumns;
  redraw(inside ? [row, column] : null);
}

function press(event) {
  const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  const turn = { PageUp: -1, PageDown: 1 }[event.key];
  if (move) redraw(mark ? [0, 1].map(i => Math.max(0, mark[i] + move[i])) : [0, 0]);
  else if (turn) { get('head').valueAsNumber += turn; redraw(); }
  else if (event.key === 'Escape') redraw(null);
  else return;
  event.preventDefault();
}

get('sequence').append(...data.sequences.map((sequence, index) => new Option(sequence.title, index)));
get('layer').max = Math.max(...data.sequences.map(sequence => sequence.layers.length)) - 1;
get('layer').value = data.sequences[0].shown;
get('scale').value = data.scale;
get('skip').checked = data.skipFirst;
if (data.max) get('max').value = data.max;
get('controls').addEventListener('input', () => redraw());
canvas.addEventListener('pointermove', point);
canvas.addEventListener('pointerdown', point);
canvas.addEventListener('pointerleave', event => event.pointerType === 'mouse' && redraw(null));
canvas.addEventListener('keydown', press);
addEventListener('resize', () => redraw());
dark.addEventListener('change', () => redraw());
draw();
