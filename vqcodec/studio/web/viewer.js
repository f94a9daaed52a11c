'use strict';

/* Makes a viewer in an element: one picture left of a handle, another right of it, on top of each other.
 *
 * Coordinates are CSS pixels of the stage. `scale` is CSS pixels for one pixel of the picture; at 100 % that pixel is
 * one of the screen. `x` and `y` say where the picture's top left corner is, `split` which share of the stage lies left
 * of the handle.
 *
 * Returns show(pictures): each has a name, src, width and height in pixels (the same for all), and figures. The names
 * that were chosen are shown if they are among the new ones; else the first picture is left and the second right.
 */
function createViewer(root) {
  const MOST = 64;  // screen pixels for a pixel of the picture
  root.innerHTML = `
    <div class="tools">
      <label>Left <select class="left"></select></label>
      <label>Right <select class="right"></select></label>
      <div class="zoom">
        <button type="button" class="out" title="Zoom out (-)" aria-label="Zoom out">&minus;</button>
        <output></output>
        <button type="button" class="in" title="Zoom in (+)" aria-label="Zoom in">+</button>
        <button type="button" class="fit" title="The whole picture (0)">Fit</button>
        <button type="button" class="actual" title="A pixel of the picture is a pixel of the screen (1)">1:1</button>
      </div>
    </div>
    <div class="stage" tabindex="0" role="group" aria-label="Two pictures on top of each other">
      <div class="side"><img alt="" draggable="false"></div>
      <div class="side"><img alt="" draggable="false"></div>
      <span class="name left"></span><span class="name right"></span>
      <div class="handle" role="slider" tabindex="0" aria-label="Boundary between left and right"
        aria-valuemin="0" aria-valuemax="100"></div>
    </div>
    <p class="hint">Drag the line to compare, the picture to move it. The wheel, two fingers, + and &minus; zoom; 0 shows
      the whole picture, 1 its pixels. Arrow keys move the line, with Shift the picture.</p>`;
  const find = selector => root.querySelector(selector);
  const stage = find('.stage'), handle = find('.handle'), readout = find('output');
  const selects = [find('select.left'), find('select.right')], names = [find('.name.left'), find('.name.right')];
  const sides = [...root.querySelectorAll('.side')], images = [...root.querySelectorAll('.stage img')];
  const chosen = [];  // names
  let pictures = [], width = 1, height = 1, scale = 1, x = 0, y = 0, split = 0.5, fitted = true;

  const unit = () => 1 / window.devicePixelRatio;
  function fitScale() {
    const largest = Math.min(stage.clientWidth / width, stage.clientHeight / height);
    return largest < unit() ? largest : Math.min(Math.floor(largest / unit()), 8) * unit();
  }

  function place(at, picture, available) {  // inside the stage, in its middle where it is smaller
    const room = available - picture;
    return Math.round((room > 0 ? room / 2 : Math.min(0, Math.max(room, at))) / unit()) * unit();
  }

  function draw() {
    if (fitted) scale = fitScale();
    x = place(x, width * scale, stage.clientWidth);
    y = place(y, height * scale, stage.clientHeight);
    for (const image of images) image.style.transform = `translate(${x}px, ${y}px) scale(${scale})`;
    stage.classList.toggle('magnified', scale > unit() * 1.001);
    readout.textContent = `${Math.round(100 * scale / unit())} %`;
    const percent = 100 * split;
    sides[0].style.clipPath = `inset(0 ${100 - percent}% 0 0)`;
    sides[1].style.clipPath = `inset(0 0 0 ${percent}%)`;
    handle.style.left = `${percent}%`;
    handle.setAttribute('aria-valuenow', Math.round(percent));
  }

  function setSplit(share) {
    split = Math.min(1, Math.max(0, share));
    draw();
  }

  function zoom(factor, centreX = stage.clientWidth / 2, centreY = stage.clientHeight / 2) {
    const least = Math.min(fitScale(), unit()), before = scale;
    scale = Math.min(Math.max(scale * factor, least), Math.max(MOST * unit(), least));
    x = centreX - (centreX - x) * scale / before;
    y = centreY - (centreY - y) * scale / before;
    fitted = false;
    draw();
  }

  function fit() { fitted = true; draw(); }
  const zoomIn = () => zoom(1.25), zoomOut = () => zoom(0.8), actual = () => zoom(unit() / scale);
  function pan(right, down) { x += right; y += down; draw(); }

  // The pointers that are down: one moves the handle or the picture, two move and zoom it.
  const pointers = new Map();
  let splitting = false;

  function point(event) {
    const box = stage.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  function spread() {  // the middle of the pointers, and how far two are apart
    const points = [...pointers.values()], [a, b] = points;
    if (!b) return { x: a[0], y: a[1], distance: 1 };
    return { x: (a[0] + b[0]) / 2, y: (a[1] + b[1]) / 2, distance: Math.hypot(a[0] - b[0], a[1] - b[1]) || 1 };
  }

  stage.addEventListener('pointerdown', event => {
    if (event.button !== 0 || pointers.size === 2) return;
    splitting = event.target === handle && pointers.size === 0;
    pointers.set(event.pointerId, point(event));
    stage.setPointerCapture(event.pointerId);
  });
  stage.addEventListener('pointermove', event => {
    if (!pointers.has(event.pointerId)) return;
    const before = spread();
    pointers.set(event.pointerId, point(event));
    const after = spread();
    if (splitting) return setSplit(after.x / stage.clientWidth);
    x += after.x - before.x;
    y += after.y - before.y;
    if (pointers.size === 2) zoom(after.distance / before.distance, after.x, after.y); else draw();
  });
  for (const end of ['pointerup', 'pointercancel']) {
    stage.addEventListener(end, event => pointers.delete(event.pointerId));
  }
  stage.addEventListener('wheel', event => {
    event.preventDefault();
    const lines = event.deltaMode === WheelEvent.DOM_DELTA_LINE ? 16 : 1;
    zoom(Math.exp(-event.deltaY * lines * (event.ctrlKey ? 0.01 : 0.002)), ...point(event));
  }, { passive: false });
  stage.addEventListener('dblclick', event => {
    if (event.target !== handle) fitted ? zoom(unit() / scale, ...point(event)) : fit();
  });

  const keys = {
    ArrowLeft: () => setSplit(split - 0.02), ArrowRight: () => setSplit(split + 0.02),
    Home: () => setSplit(0), End: () => setSplit(1),
    '+': zoomIn, '=': zoomIn, '-': zoomOut, 0: fit, 1: actual,
  };
  const shifted = {
    ...keys,
    ArrowLeft: () => pan(60, 0), ArrowRight: () => pan(-60, 0), ArrowUp: () => pan(0, 60), ArrowDown: () => pan(0, -60),
  };
  stage.addEventListener('keydown', event => {
    const action = (event.shiftKey ? shifted : keys)[event.key];
    if (!action || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    action();
  });
  for (const [name, action] of Object.entries({ out: zoomOut, in: zoomIn, fit, actual })) {
    find(`button.${name}`).addEventListener('click', action);
  }
  new ResizeObserver(draw).observe(stage);

  function choose(side) {
    const picture = pictures[selects[side].selectedIndex];
    if (images[side].src !== picture.src) images[side].src = picture.src;
    images[side].alt = names[side].textContent = names[side].title = picture.name;
  }
  selects.forEach((select, side) => select.addEventListener('change', () => {
    chosen[side] = select.value;
    choose(side);
  }));

  return function show(list) {
    const resized = list[0].width !== width || list[0].height !== height;
    pictures = list;
    ({ width, height } = list[0]);
    selects.forEach((select, side) => {
      select.replaceChildren(...list.map(picture => new Option(picture.name)));
      const kept = list.findIndex(picture => picture.name === chosen[side]);
      select.selectedIndex = kept >= 0 ? kept : Math.min(side, list.length - 1);
      images[side].style.width = `${width}px`;
      images[side].style.height = `${height}px`;
      choose(side);
    });
    if (resized) fitted = true;
    draw();
  };
}

/* Fills a table with the names and figures of pictures, a column for each figure that any of them has. */
function fillTable(table, pictures) {
  const columns = [...new Set(pictures.flatMap(picture => Object.keys(picture.figures)))];
  const row = (tag, texts) => {
    const line = document.createElement('tr');
    for (const text of texts) line.appendChild(document.createElement(tag)).textContent = text;
    return line;
  };
  const body = pictures.map(picture => row('td', [picture.name, ...columns.map(c => picture.figures[c] ?? '')]));
  table.replaceChildren(row('th', ['Picture', ...columns]), ...body);
}
