'use strict';

const at = id => document.getElementById(id);
const table = document.querySelector('table');
const show = createViewer(at('viewer'));
const blobs = new Map();  // addresses of pictures -> addresses of their copies here
let limit = Infinity, opened = null, latest = 0, timer = 0;

/* Asks the server, and returns its answer or throws what is wrong in one line. */
async function ask(path, body) {
  let answer;
  try {
    answer = await fetch(path, body === undefined ? {} : { method: 'POST', body });
  } catch {
    throw new Error('the server does not answer: has it been ended?');
  }
  const told = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(told.error ?? `the server failed (${answer.status}): see where it was started`);
  return told;
}

/* Does work that newer work may overtake: `current()` then says so, and what it still does is not shown. */
async function work(status, job) {
  clearTimeout(timer);
  const mine = ++latest, current = () => mine === latest;
  at('problem').hidden = true;
  at('busy').hidden = false;
  at('status').textContent = status;
  try {
    await job(current);
  } catch (error) {
    if (!current()) return;
    at('problem').textContent = error.message;
    at('problem').hidden = false;
  }
  if (current()) at('busy').hidden = true;
  if (current() && at('status').textContent === status) at('status').textContent = '';
}

async function load(picture) {
  if (!blobs.has(picture.src)) {
    const answer = await fetch(picture.src);
    if (!answer.ok) throw new Error(`the server failed (${answer.status}): see where it was started`);
    blobs.set(picture.src, URL.createObjectURL(await answer.blob()));
  }
  const src = blobs.get(picture.src), image = new Image();
  image.src = src;
  await image.decode();  // now, so that nothing flickers later
  return { ...picture, from: picture.src, src };
}

function display(pictures) {
  at('drop').hidden = true;
  at('viewer').hidden = false;
  at('legend').hidden = opened.vqz;
  show(pictures);
  fillTable(table, pictures);
  for (const [source, blob] of blobs) {
    if (pictures.some(picture => picture.from === source)) continue;
    URL.revokeObjectURL(blob);
    blobs.delete(source);
  }
}

function open(file) {
  if (file.size > limit) {
    at('problem').textContent = `${file.name} is larger than the limit of ${limit.toLocaleString('en')} bytes`;
    at('problem').hidden = false;
    return;
  }
  work(`Opening ${file.name}`, async current => {
    const told = await ask(`/open?name=${encodeURIComponent(file.name)}`, file).catch(error => {
      throw new Error(`${file.name}: ${error.message}`);
    });
    if (current()) use(told);
  });
}

function use(told) {
  opened = told;
  at('name').textContent = told.name;
  at('notes').replaceChildren(...told.notes.map(note => {
    const line = document.createElement('li');
    line.textContent = note;
    return line;
  }));
  at('settings').disabled = told.vqz;
  at('download').hidden = true;
  render();
}

function settings() {
  const asked = { effort: at('effort').valueAsNumber, tune: at('tune').value, look: at('look').value };
  if (aim() === 'quality') return { ...asked, quality: at('quality').valueAsNumber };
  return { ...asked, size: Math.round(1000 * at('size').valueAsNumber) };
}

const aim = () => document.querySelector('input[name=aim]:checked').value;
const post = (path, asked) => ask(path, JSON.stringify({ number: opened.number, ...asked }));

function render() {
  work(opened.vqz ? 'Decompressing' : 'Compressing', async current => {
    const told = await post('/render', opened.vqz ? {} : settings());
    if (!current()) return;
    const pictures = await Promise.all(told.pictures.map(load));
    if (!current()) return;
    display(pictures);
    if (opened.vqz) return;
    offer(pictures[1].from, told);
    for (const box of document.querySelectorAll('#rivals input:checked')) {
      at('status').textContent = `Looking for the ${box.value} file of this size`;
      const rival = await post('/compare', { rival: box.value });
      if (!current()) return;
      pictures.push(await load(rival));
      if (!current()) return;
      display(pictures);
    }
    at('status').textContent = '';
  });
}

function offer(source, { quality, bytes }) {
  at('download').href = source.replace('.png', '.vqz');
  at('download').download = `${opened.name.replace(/\.[^.]*$/, '')}.vqz`;
  at('download').hidden = false;
  if (aim() === 'size') at('quality').value = quality; else at('size').value = bytes / 1000;
  describe();
}

function describe() {
  at('quality-shown').value = at('quality').value;
  at('effort-shown').value = at('effort').value;
  at('size').disabled = aim() !== 'size';
  at('quality').disabled = aim() !== 'quality';
}

function changed() {
  describe();
  clearTimeout(timer);
  if (opened && !opened.vqz && (aim() === 'quality' || at('size').value)) timer = setTimeout(render, 150);
}

function fill(select, names) { select.replaceChildren(...names.map(name => new Option(name))); }

function addRival(name, index) {
  const line = document.createElement('div'), label = document.createElement('label');
  const box = Object.assign(document.createElement('input'), { type: 'checkbox', value: name, checked: index === 0 });
  line.className = 'line';
  label.append(box, ` Compare with ${name}`);
  line.append(label);
  at('rivals').append(line);
}

document.querySelector('form').addEventListener('submit', event => event.preventDefault());
at('settings').addEventListener('input', changed);
at('file').addEventListener('change', () => {
  if (at('file').files.length) open(at('file').files[0]);
  at('file').value = '';  // so that the same file can be opened again
});
document.addEventListener('dragover', event => {
  event.preventDefault();
  document.body.classList.add('dropping');
});
document.addEventListener('dragleave', event => {
  if (!event.relatedTarget) document.body.classList.remove('dropping');
});
document.addEventListener('drop', event => {
  event.preventDefault();
  document.body.classList.remove('dropping');
  if (event.dataTransfer.files.length) open(event.dataTransfer.files[0]);
});

work('Loading', async current => {
  const told = await ask('/state');
  limit = told.max_bytes;
  fill(at('tune'), told.tunes);
  fill(at('look'), told.looks);
  told.rivals.forEach(addRival);
  describe();
  if (told.opened && current()) use(told.opened);
});
