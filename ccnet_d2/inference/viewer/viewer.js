"use strict";

const element = (id) => document.getElementById(id);
const state = { gallery: null, image: null, pixel: null, request: 0, grid: null };

function say(text, isError = false) {
  element("status").textContent = text;
  element("status").classList.toggle("error", isError);
}

async function ask(path, values = {}, options = {}) {
  const answer = await fetch(`/api/${path}?${new URLSearchParams(values)}`, options);
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.error);
  return content;
}

function fill(select, entries, chosen) {
  select.replaceChildren(...entries.map(([value, text]) => new Option(text, value, false, value === chosen)));
}

function models() {
  return ["model-0", "model-1"].map((id) => element(id).value).filter((value) => value !== "").map(Number);
}

function make(tag, className = "", text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

/* A picture with a caption. Clicking it chooses the pixel; `shares` (if any) are told while hovering. */
function panel(title, source, map = null) {
  const figure = make("figure");
  const caption = make("figcaption");
  const hover = make("span", "hover");
  caption.append(make("span", "", title), hover);
  const frame = make("div", state.image.width < 400 ? "frame small" : "frame");
  const picture = make("img");
  picture.src = source;
  picture.alt = title;
  picture.draggable = false;
  frame.append(picture, make("div", "mark"));
  frame.addEventListener("click", (event) => choose(...pixelAt(frame, event)));
  frame.addEventListener("pointermove", (event) => {
    const [x, y] = pixelAt(frame, event);
    hover.textContent = `${x}, ${y}` + (map ? ` · ${percent(shareAt(map, x, y))}` : "");
  });
  frame.addEventListener("pointerleave", () => { hover.textContent = ""; });
  figure.append(caption, frame);
  return figure;
}

function pixelAt(frame, event) {
  const box = frame.getBoundingClientRect();
  const place = (value, length, size) => Math.min(Math.max(Math.floor((value / length) * size), 0), size - 1);
  return [
    place(event.clientX - box.left, box.width, state.image.width),
    place(event.clientY - box.top, box.height, state.image.height),
  ];
}

function shareAt(map, x, y) {
  const row = Math.min(Math.floor(((y + 0.5) / state.image.height) * map.extent[0]), map.grid[0] - 1);
  const column = Math.min(Math.floor(((x + 0.5) / state.image.width) * map.extent[1]), map.grid[1] - 1);
  return map.shares[row * map.grid[1] + column];
}

function percent(share) {
  return share === 0 ? "0 %" : `${(100 * share).toPrecision(2)} %`;
}

function floats(text) {
  return new Float32Array(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);
}

function showMarks() {
  for (const mark of document.querySelectorAll(".mark")) {
    mark.style.display = state.pixel ? "block" : "none";
    if (!state.pixel) continue;
    mark.style.left = `${((state.pixel[0] + 0.5) / state.image.width) * 100}%`;
    mark.style.top = `${((state.pixel[1] + 0.5) / state.image.height) * 100}%`;
  }
}

/* The classes of a prediction, below it: colour, name and share of the pixels. */
async function showClasses(figure, number) {
  const image = state.image.id;
  const legend = make("ul", "legend");
  figure.append(legend);
  try {
    const classes = await ask("classes", { image, model: number });
    legend.replaceChildren(...classes.map((one) => {
      const entry = make("li", "", one.name);
      const swatch = make("i");
      swatch.style.background = `rgb(${one.color.join(" ")})`;
      entry.prepend(swatch);
      entry.append(make("span", "", percent(one.share)));
      return entry;
    }));
  } catch (error) {
    if (image === state.image.id) say(error.message, true);
  }
}

/* The rows as they are before a pixel is chosen: image and prediction of each model. */
function row(number) {
  const model = state.gallery.models[number];
  const section = make("section", "row");
  section.dataset.model = number;
  section.append(make("h2", "", model.name + (model.recurrence ? `, trained with R = ${model.recurrence}` : "")));
  const panels = make("div", "panels");
  const prediction = panel("prediction", `/api/prediction?image=${state.image.id}&model=${number}`);
  panels.append(panel("image", `/api/image?image=${state.image.id}`), prediction);
  showClasses(prediction, number);
  section.append(panels);
  return section;
}

async function showMaps(section) {
  const number = Number(section.dataset.model);
  const panels = section.querySelector(".panels");
  const keep = [...panels.children].slice(0, 2);
  if (!state.gallery.models[number].recurrence) {
    panels.replaceChildren(...keep, make("p", "note", "This model has no criss-cross attention."));
    return null;
  }
  const request = state.request;
  const [x, y] = state.pixel;
  const recurrence = element("recurrence").value;
  const found = await ask("attention", { image: state.image.id, model: number, x, y, recurrence });
  if (request !== state.request) return null; // another click came first
  state.grid = found;
  panels.replaceChildren(...keep, ...found.maps.map((map, loop) => panel(
    `R = ${loop + 1} (largest ${percent(map.largest)})`,
    `data:image/png;base64,${map.picture}`,
    { shares: floats(map.shares), grid: found.grid, extent: found.extent },
  )));
  return found;
}

async function look() {
  if (!state.pixel) return;
  state.request += 1;
  showMarks();
  document.body.classList.add("busy");
  const request = state.request;
  try {
    const found = (await Promise.all([...document.querySelectorAll(".row")].map(showMaps))).filter(Boolean);
    if (request !== state.request) return;
    showMarks();
    const cells = found.map((one) => `cell ${[...one.cell].reverse().join(", ")} of ${[...one.grid].reverse().join("×")}`);
    say(`pixel ${state.pixel.join(", ")} · ${[...new Set(cells)].join("; ")}`);
  } catch (error) {
    if (request === state.request) say(error.message, true);
  } finally {
    if (request === state.request) document.body.classList.remove("busy");
  }
}

function choose(x, y) {
  state.pixel = [x, y];
  return look();
}

function restart() {
  const chosen = Number(element("image").value);
  const next = state.gallery.images.find((image) => image.id === chosen);
  if (!next) {
    say("Open an image to begin.");
    return;
  }
  if (state.image !== next) state.pixel = null;
  state.image = next;
  state.request += 1; // what is still being computed belongs to what was shown before
  document.body.classList.remove("busy");
  document.body.style.setProperty("--panel", next.width > 1.4 * next.height ? "400px" : "300px");
  element("rows").replaceChildren(...models().map(row));
  if (state.pixel) look();
  else say("Click a pixel.");
}

async function upload(file) {
  const most = state.gallery?.most_bytes;
  if (file.size > most) { // not sent: it would be refused before it has arrived, which breaks the connection
    say(`${file.name} is larger than ${most / 2 ** 20} MiB.`, true);
    return;
  }
  say(`Opening ${file.name} …`);
  try {
    const image = await ask("image", { name: file.name }, { method: "POST", body: file });
    state.gallery = await ask("gallery");
    fill(element("image"), state.gallery.images.map((one) => [String(one.id), one.name]), String(image.id));
    restart();
  } catch (error) {
    say(error.message, true);
  }
}

function move(event) {
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const step = steps[event.key];
  const typing = /^(select|input)$/i.test(document.activeElement.tagName);
  const shortcut = event.altKey || event.ctrlKey || event.metaKey || event.shiftKey; // the browser's own
  if (!step || !state.pixel || !state.grid || typing || shortcut) return;
  event.preventDefault();
  const sides = [state.image.width, state.image.height];
  const cells = [state.grid.extent[1], state.grid.extent[0]];
  choose(...state.pixel.map((value, axis) => {
    const moved = Math.round(value + step[axis] * (sides[axis] / cells[axis]));
    return Math.min(Math.max(moved, 0), sides[axis] - 1);
  }));
}

async function start() {
  element("controls").addEventListener("submit", (event) => event.preventDefault());
  try {
    state.gallery = await ask("gallery");
  } catch (error) {
    say(error.message, true);
    return;
  }
  const names = state.gallery.models.map((model, index) => [String(index), model.name]);
  fill(element("image"), state.gallery.images.map((image) => [String(image.id), image.name]));
  fill(element("model-0"), names, "0");
  fill(element("model-1"), [["", "—"], ...names], names.length > 1 ? "1" : "");
  element("recurrence").max = state.gallery.most_loops;
  element("recurrence").value = Math.max(...state.gallery.models.map((model) => model.recurrence));
  for (const id of ["image", "model-0", "model-1"]) element(id).addEventListener("change", restart);
  element("recurrence").addEventListener("change", look);
  element("file").addEventListener("change", (event) => {
    if (event.target.files.length) upload(event.target.files[0]);
    event.target.value = "";
  });
  document.addEventListener("keydown", move);
  document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("drop"); });
  document.addEventListener("dragleave", () => document.body.classList.remove("drop"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("drop");
    if (event.dataTransfer.files.length) upload(event.dataTransfer.files[0]);
  });
  restart();
}

start();
