// The page's script: keeps the drawing, requests its prediction while it is drawn, and shows the results and the API.
"use strict";

const byId = (id) => document.getElementById(id);

/** Return a new element with attributes and children; strings become text, never markup. */
function element(name, attributes = {}, ...children) {
  const isSvg = ["svg", "path", "circle", "line", "text"].includes(name);
  const made = isSvg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** Return a fraction as a percentage; "100 %" only if it is exactly 1. */
function percent(fraction, digits = 1) {
  const text = fixed(100 * fraction, digits);
  return text === (100 * fraction).toFixed(digits) ? `${text} %` : `> ${text} %`;
}

/** Return a number as text with some decimals; "100.00" only if it is exactly 100, not for 99.999. */
function fixed(value, digits) {
  return (value < 100 ? Math.min(value, 100 - 10 ** -digits) : value).toFixed(digits);
}

// The task: name and classes of the data set, width and height of its images, the preparation of pictures ("digit", for
// which one can draw, or "resize"), and the commands that run the stages.
const TASK = JSON.parse(document.body.dataset.task);
const CAN_DRAW = TASK.preparation === "digit";
const SIZE = TASK.size.join(" × ");
document.body.dataset.preparation = TASK.preparation;
byId("size").textContent = SIZE;
if (!CAN_DRAW) byId("name").textContent = TASK.name;

// The drawing ---------------------------------------------------------------------------------------------------------
//
// Coordinates and lengths are fractions of the canvas, 0 to 1, so that they stay valid when its size changes. A new
// stroke or picture makes a new drawing; `history` has the earlier ones, for undo.

const EMPTY = { strokes: [], picture: null }; // a stroke is a list of points [x, y]; a picture is { url, image, name }
const PEN = 0.03; // width of the pen on the canvas
const SENT_SIDE = 80; // pixels of a digit's longer side in the picture that is sent
const SENT_PEN = 0.14; // width of its pen, as a fraction of that side: gives as much ink as MNIST has on average
const MIN_SIZE = 0.03; // strokes smaller than this are a dot, not a digit: nothing is requested
const MAX_PICTURE_BYTES = 20_000_000; // the service's limit
const MAX_UNDO = 50; // drawings, each of which may have a picture in it

let drawing = EMPTY;
let history = [];
let stroke = null; // the one that is being drawn
let cursor = null; // the pen that the keyboard moves, { x, y, down }, once it is in use

const canvas = byId("canvas");
const context = canvas.getContext("2d");
if (!CAN_DRAW) { // it shows the picture only
  for (const name of ["tabindex", "aria-roledescription", "aria-describedby"]) canvas.removeAttribute(name);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", "The picture");
}

const isEmpty = () => !drawing.strokes.length && !drawing.picture;
const isPredictable = () => Boolean(drawing.picture) || measure(drawing.strokes).size >= MIN_SIZE;

function change(next) {
  history = [...history, drawing].slice(-MAX_UNDO);
  drawing = next;
  show();
}

function undo() {
  if (history.length) drawing = history.pop();
  if (cursor) cursor.down = false;
  show();
}

function clear() {
  if (!isEmpty()) change(EMPTY);
  if (cursor) cursor.down = false;
}

function beginStroke(point) {
  stroke = [point];
  change({ strokes: [...drawing.strokes, stroke], picture: null });
}

/** Add points to the current stroke. */
function extend(points) {
  if (!drawing.strokes.includes(stroke)) return; // it was undone or cleared
  stroke.push(...points);
  show();
}

/** Draw strokes on a canvas, smoothed: as curves through the midpoints between their points. */
function trace(target, strokes, place) {
  target.lineCap = target.lineJoin = "round";
  for (const stroke of strokes) {
    const points = stroke.map(place);
    target.beginPath();
    target.moveTo(...points[0]);
    for (let i = 1; i < points.length - 1; i++) {
      const [x, y] = points[i];
      target.quadraticCurveTo(x, y, (x + points[i + 1][0]) / 2, (y + points[i + 1][1]) / 2);
    }
    target.lineTo(...points.at(-1));
    target.stroke();
  }
}

/**
 * Return the centre, width and height of the strokes' bounding box, and the size of a digit, -1 without strokes: there
 * may be several side by side, each as long as the box is high, or as its longest stroke.
 */
function measure(strokes) {
  const bounds = (values) => values.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [1, 0]);
  const ends = (points, axis) => bounds(points.map((point) => point[axis]));
  const length = ([low, high]) => high - low;
  const [across, down] = [ends(strokes.flat(), 0), ends(strokes.flat(), 1)];
  const size = Math.max(length(down), ...strokes.map((points) => length(ends(points, 0))));
  return { x: (across[0] + across[1]) / 2, y: (down[0] + down[1]) / 2, width: length(across), height: length(down), size };
}

/** Return the strokes as a data URL for the service: black on white, the pen width relative to the digit's size. */
function renderStrokes(strokes) {
  const { x, y, width, height, size } = measure(strokes);
  const scale = (SENT_SIDE * (1 - SENT_PEN)) / size;
  const [across, down] = [width, height].map((length) => Math.ceil(0.5 * SENT_SIDE + scale * length)); // with a margin
  const picture = element("canvas", { width: across, height: down });
  const target = picture.getContext("2d");
  target.fillStyle = "white";
  target.fillRect(0, 0, across, down);
  target.lineWidth = SENT_PEN * SENT_SIDE;
  trace(target, strokes, (p) => [across / 2 + scale * (p[0] - x), down / 2 + scale * (p[1] - y)]);
  return picture.toDataURL("image/png");
}

/** Redraw the canvas. */
function paint() {
  const side = Math.round(canvas.clientWidth * devicePixelRatio);
  if (!side) return;
  if (canvas.width !== side) canvas.width = canvas.height = side;
  context.clearRect(0, 0, side, side);
  const colors = getComputedStyle(canvas);
  context.strokeStyle = colors.getPropertyValue("--ink");
  context.lineWidth = PEN * side;
  if (drawing.picture?.image) {
    const { width, height } = drawing.picture.image;
    const scale = side / Math.max(width, height);
    const [w, h] = [width * scale, height * scale];
    context.drawImage(drawing.picture.image, (side - w) / 2, (side - h) / 2, w, h);
  } else if (drawing.picture) {
    context.fillStyle = colors.getPropertyValue("--ink");
    context.font = `${side / 22}px system-ui`;
    context.textAlign = "center";
    context.fillText(drawing.picture.name, side / 2, side / 2, side * 0.9);
  }
  trace(context, drawing.strokes, ([x, y]) => [x * side, y * side]);
  if (cursor && document.activeElement === canvas) paintCursor(side, colors);
}

/** Draw the keyboard's pen: a ring, filled while the pen is down. */
function paintCursor(side, colors) {
  context.strokeStyle = context.fillStyle = colors.getPropertyValue("--accent");
  context.lineWidth = side / 200;
  context.beginPath();
  context.arc(cursor.x * side, cursor.y * side, (PEN * side) / 1.5, 0, 2 * Math.PI);
  if (cursor.down) context.fill();
  else context.stroke();
}

/** Show the current drawing, and request its prediction. */
function show() {
  byId("hint").hidden = !isEmpty() || cursor !== null;
  byId("undo").disabled = !history.length;
  byId("clear").disabled = isEmpty();
  paint();
  ask();
}

// Pointer: mouse, finger, pen -----------------------------------------------------------------------------------------

let pointer = null; // the id of the pointer that draws; a second finger is ignored

function place(event) {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
}

canvas.addEventListener("pointerdown", (event) => {
  if (!CAN_DRAW || pointer !== null || event.button !== 0) return;
  pointer = event.pointerId;
  canvas.setPointerCapture(pointer);
  cursor = null;
  beginStroke(place(event));
});

canvas.addEventListener("pointermove", (event) => {
  if (event.pointerId !== pointer) return;
  const events = event.getCoalescedEvents?.() ?? [];
  extend((events.length ? events : [event]).map(place));
});

for (const name of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(name, (event) => {
    if (event.pointerId === pointer) pointer = null;
  });
}

// Keyboard ------------------------------------------------------------------------------------------------------------

const STEP = 0.04; // by which an arrow key moves the pen
const arrows = new Set(); // the arrow keys held down

canvas.addEventListener("keydown", (event) => {
  const isArrow = event.key.startsWith("Arrow");
  if (event.ctrlKey || event.metaKey || event.altKey || !(isArrow || event.key === " ")) return;
  event.preventDefault();
  cursor ??= { x: 0.5, y: 0.5, down: false };
  if (isArrow) {
    arrows.add(event.key);
    movePen(event.shiftKey ? STEP / 4 : STEP);
  } else if (!event.repeat) {
    putPen();
  }
});

canvas.addEventListener("keyup", (event) => arrows.delete(event.key));
canvas.addEventListener("focus", paint);
canvas.addEventListener("blur", () => {
  arrows.clear();
  paint();
});

function movePen(step) {
  const along = (less, more) => (arrows.has(more) - arrows.has(less)) * step;
  const inside = (value) => Math.min(1, Math.max(0, value));
  cursor.x = inside(cursor.x + along("ArrowLeft", "ArrowRight"));
  cursor.y = inside(cursor.y + along("ArrowUp", "ArrowDown"));
  if (cursor.down) extend([[cursor.x, cursor.y]]);
  else show();
}

function putPen() {
  cursor.down = !cursor.down;
  if (cursor.down) beginStroke([cursor.x, cursor.y]);
  else show();
  announce(cursor.down ? "Pen down" : "Pen up");
}

document.addEventListener("keydown", (event) => {
  if (byId("draw").hidden || pointer !== null) return;
  if ((event.ctrlKey || event.metaKey) && !event.shiftKey && event.key.toLowerCase() === "z") undo();
  else if (event.key === "Backspace") undo();
  else if (event.key === "Delete" || event.key === "Escape") clear();
  else return;
  event.preventDefault();
});

byId("undo").addEventListener("click", undo);
byId("clear").addEventListener("click", clear);

// Pictures: chosen, dropped, pasted -----------------------------------------------------------------------------------

let loads = 0; // counts the pictures given

async function loadPicture(file) {
  if (!file || view() === "docs") return;
  const load = ++loads;
  if (file.size > MAX_PICTURE_BYTES) {
    showProblem(`${file.name} is larger than ${MAX_PICTURE_BYTES / 1e6} MB. Choose a smaller picture.`);
    return;
  }
  const url = await new Promise((done) => {
    const reader = new FileReader();
    // One media type for all: the file's own may be missing, or unknown to the service, which looks at the content.
    reader.onload = () => done(reader.result.replace(/^data:[^,]*/, "data:application/octet-stream;base64"));
    reader.onerror = () => done(null);
    reader.readAsDataURL(file);
  });
  if (!url) {
    showProblem(`${file.name} cannot be read. Choose a picture.`);
    return;
  }
  // The service may read a format that the browser cannot show, such as TIFF; then the file's name is shown instead.
  const image = await createImageBitmap(file).catch(() => null);
  if (load !== loads) return; // another one was given meanwhile
  location.hash = "#draw";
  cursor = null;
  change({ strokes: [], picture: { url, image, name: file.name } });
}

byId("file").addEventListener("change", (event) => {
  loadPicture(event.target.files[0]);
  event.target.value = ""; // so that choosing the same file again is a change
});
document.addEventListener("paste", (event) => loadPicture(event.clipboardData.files[0]));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", () => document.body.classList.remove("dropping"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  loadPicture(event.dataTransfer.files[0]);
});

// Predictions ---------------------------------------------------------------------------------------------------------
//
// There is one request at a time; if the drawing changes meanwhile, another one follows. So the prediction of the final
// drawing takes two requests at most, of a few milliseconds each.

let hasModel = true;
let asking = false;
let version = 0; // counts the changes of the drawing
let retry = null; // a timer

/** Request predictions until the latest one is that of the current drawing. */
async function ask() {
  version += 1;
  if (!isPredictable()) showAnswer(null);
  if (asking || !hasModel) return; // without a model, the notice says how to get one
  asking = true;
  try {
    for (let asked = -1; asked !== version && isPredictable(); ) {
      await new Promise(requestAnimationFrame); // at most one request per frame
      asked = version;
      if (isPredictable()) await askOnce();
    }
  } finally {
    asking = false;
  }
}

async function askOnce() {
  const { picture, strokes } = drawing;
  const { output, problem, retrySeconds } = await request(picture ? picture.url : renderStrokes(strokes));
  if (!isPredictable()) return; // it was cleared meanwhile
  if (output) showAnswer(output);
  else showProblem(problem);
  clearTimeout(retry);
  if (retrySeconds) retry = setTimeout(() => isPredictable() && ask(), 1000 * retrySeconds);
}

/** Return the service's { output }, or { problem, retrySeconds }; retrySeconds is 0 if trying again will not help. */
async function request(image) {
  try {
    const response = await fetch("predictions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ input: { image } }),
    });
    const { output, detail } = await response.json();
    if (response.ok) return { output };
    return { problem: detail, retrySeconds: Number(response.headers.get("Retry-After")) };
  } catch {
    return { problem: "The service does not respond. Trying again.", retrySeconds: 2 };
  }
}

/** Show a prediction, the service's output; null clears it. */
function showAnswer(output) {
  const { probabilities = [], confidence = "none", image } = output ?? {};
  const digits = output?.digits ?? [output ?? {}]; // those of other data sets have one class
  const name = digits.map(({ prediction }) => TASK.classes[prediction] ?? "?").join("");
  const isUnlike = output && !["sure", "unsure"].includes(confidence);
  byId("answer").dataset.confidence = isUnlike ? "unlike" : confidence;
  byId("digit").textContent = output ? name : "–";
  byId("digit").style.setProperty("--length", name.length);
  const text = verdict(confidence, probabilities, digits.length);
  byId("verdict").textContent = text;
  const largest = probabilities.indexOf(Math.max(...probabilities)); // -1 without any
  bars.forEach(({ row, bar, cell }, i) => {
    row.className = i === largest ? "largest" : "";
    bar.style.setProperty("--share", probabilities[i] ?? 0);
    cell.textContent = output ? percent(probabilities[i]) : "";
  });
  byId("seen").hidden = !image;
  byId("unseen").hidden = Boolean(image);
  if (image) byId("seen").src = image;
  byId("seen").alt = image ? `${CAN_DRAW ? "The drawing" : "The picture"}, scaled to ${SIZE} pixels` : "";
  announce(output ? `${name === "?" ? "" : `${name}. `}${text}` : "", 600);
}

/** Return a sentence on how sure a prediction is; of several digits, on the least sure one. */
function verdict(confidence, probabilities, count) {
  if (confidence === "none") return CAN_DRAW ? "Nothing drawn yet" : "No picture yet";
  if (confidence === "sure") return `Sure: ${percent(Math.max(...probabilities))}${count > 1 ? " each, or more" : ""}`;
  if (confidence !== "unsure") {
    const subject = count > 1 ? "A part of this" : "This";
    return CAN_DRAW ? `${subject} does not look like a digit` : "This is unlike the images the network was trained on";
  }
  const order = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]);
  return `Not sure: ${TASK.classes[order[0]]} or ${TASK.classes[order[1]]}`;
}

/** Show why there is no prediction. */
function showProblem(problem) {
  showAnswer(null);
  byId("verdict").textContent = problem;
  announce(problem);
}

let announcement = null; // a timer

/** Have screen readers read a text, unless another one replaces it within the delay, in milliseconds. */
function announce(text, delay = 0) {
  clearTimeout(announcement);
  announcement = setTimeout(() => (byId("announcer").textContent = text), delay);
}

const bars = TASK.classes.map((name) => {
  const [bar, cell] = [element("i"), element("td")];
  const row = element("tr", {}, element("th", { scope: "row", title: name }, name));
  row.append(element("td", { "aria-hidden": "true" }, element("div", { class: "bar" }, bar)), cell);
  byId("bars").append(row);
  return { row, bar, cell };
});
showAnswer(null);

// Results -------------------------------------------------------------------------------------------------------------

let shownResults = "";

async function updateResults() {
  const text = await get("results", (response) => response.text());
  if (!text || text === shownResults) return; // rebuilding the view would reset scrolling and selection
  shownResults = text;
  const { model, training, evaluation, predictions, mistakes } = JSON.parse(text);
  byId("results-content").replaceChildren(
    showTraining(training),
    showTiles(model, training, evaluation),
    element("div", { class: "grid" }, ...showCurves(training)),
    element("div", { class: "grid" }, showMatrix(evaluation), showMistakes(mistakes, evaluation)),
    showPredictions(predictions),
  );
}

function card(title, ...children) {
  return element("div", { class: "card" }, element("h2", {}, title), ...children);
}

const note = (text) => element("p", {}, text);

function duration(seconds) {
  return seconds < 90 ? `${Math.round(seconds)} s` : `${Math.round(seconds / 60)} min`;
}

/** Show the progress of an unfinished training. */
function showTraining(training) {
  if (!training || training.state === "finished") return "";
  const bar = element("i");
  bar.style.setProperty("--share", training.progress);
  const epoch = Math.min(training.epochs, training.history.length + 1);
  const speed = Math.round(training.images_per_second).toLocaleString("en");
  const left = training.seconds_left === null ? "" : `, about ${duration(training.seconds_left)} left`;
  const running = `Epoch ${epoch} of ${training.epochs}, ${speed} images/s${left}`;
  const stopped = `Stopped. Resume with: ${TASK.commands.train}`;
  return card(
    `Training: ${percent(training.progress, 0)}`,
    element("div", { class: "bar progress", role: "progressbar", "aria-label": "Training",
                     "aria-valuenow": Math.floor(100 * training.progress) }, bar),
    note(training.state === "running" ? running : stopped),
  );
}

function showTiles(model, training, evaluation) {
  const tiles = element("dl", { class: "tiles" });
  const add = (name, value, small) =>
    tiles.append(element("div", {}, element("dt", {}, name), element("dd", small ? { class: "small" } : {}, value)));
  if (evaluation) {
    add("Accuracy on the test images", `${fixed(evaluation.accuracy, 2)} %`);
    add("Test loss", evaluation.loss.toFixed(4));
  }
  if (training?.state === "finished") add("Training", `${training.epochs} epochs, ${duration(training.seconds)}`);
  if (model) {
    add("Model published", new Date(model.date).toLocaleString([], { dateStyle: "medium", timeStyle: "short" }));
    add("Model sha256", model.sha256, true);
  }
  if (evaluation && !evaluation.of_this_model) {
    add("Note", "The evaluation is of another model than the one served", true);
  }
  return tiles.children.length ? tiles : note(`No results yet. Train with: ${TASK.commands.train}`);
}

function showCurves(training) {
  const history = training?.history ?? [];
  if (!history.length) return [card("Curves", note("The curves appear after the first epoch."))];
  const epochs = history.map((line) => line.epoch);
  const column = (name) => history.map((line) => line[name]);
  const accuracies = column("validation_accuracy");
  const last = `${fixed(accuracies.at(-1), 2)} % after epoch ${epochs.at(-1)}`;
  return [
    card("Loss (negative log-likelihood)",
         plot("Loss by epoch", epochs, [column("train_loss"), column("validation_loss")], 3),
         element("ul", { class: "key" }, element("li", { class: "first" }, "— training (augmented)"),
                 element("li", { class: "second" }, "- - validation"))),
    card("Validation accuracy (percent)",
         plot("Validation accuracy by epoch", epochs, [accuracies], 2),
         element("ul", { class: "key" }, element("li", { class: "first" }, last))),
  ];
}

/** Return a plot of one or two series by epoch. */
function plot(label, epochs, series, digits) {
  const [width, height, left, bottom] = [420, 200, 52, 24];
  const logarithmic = series.length > 1; // the two losses, which are many times larger in the first epochs
  const scaled = (value) => (logarithmic ? Math.log(Math.max(value, 1e-9)) : value);
  const all = series.flat().map(scaled);
  const [low, high] = [Math.min(...all), Math.max(...all)];
  const x = (i) => left + 8 + ((width - left - 20) * i) / Math.max(1, epochs.length - 1);
  const y = (value) => 10 + (height - bottom - 20) * (1 - (scaled(value) - low) / (high - low || 1));
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  for (let i = 0; i <= 4; i++) {
    const level = low + ((high - low) * i) / 4;
    const value = logarithmic ? Math.exp(level) : level;
    svg.append(element("line", { class: "grid-line", x1: left, x2: width, y1: y(value), y2: y(value) }),
               element("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, fixed(value, digits)));
  }
  const every = Math.ceil(epochs.length / 10);
  svg.append(element("text", { x: left - 6, y: height - 4, "text-anchor": "end" }, "epoch"));
  epochs.forEach((epoch, i) => {
    if (i % every) return;
    svg.append(element("text", { x: x(i), y: height - 4, "text-anchor": "middle" }, String(epoch)));
  });
  series.forEach((values, number) => {
    const name = ["first", "second"][number];
    const points = values.map((value, i) => `${x(i)},${y(value)}`);
    svg.append(element("path", { class: `line ${name}`, d: `M${points.join("L")}` }));
    values.forEach((value, i) => svg.append(element("circle", { class: name, cx: x(i), cy: y(value), r: 2.5 })));
  });
  return svg;
}

function showMatrix(evaluation) {
  const title = "Confusion matrix";
  if (!evaluation) return card(title, note(`No evaluation yet. Start with: ${TASK.commands.evaluate}`));
  const matrix = evaluation.confusion_matrix;
  const largest = Math.max(1, ...matrix.flatMap((row, i) => row.filter((_, j) => i !== j)));
  const head = element("tr", {}, element("td"), ...TASK.classes.map((name) => element("th", { scope: "col" }, name)));
  const rows = matrix.map((row, i) =>
    element("tr", {}, element("th", { scope: "row" }, TASK.classes[i]), ...row.map((count, j) => {
      const cell = element("td", i === j ? { class: "right" } : {}, count ? String(count) : "");
      if (i !== j) cell.style.setProperty("--share", 0.5 * (count / largest));
      return cell;
    })));
  const caption = element("caption", {}, "Rows: true class. Columns: predicted class. Stronger colour: more mistakes.");
  const body = element("tbody", {}, ...rows);
  const table = element("table", { class: "matrix" }, caption, element("thead", {}, head), body);
  // On a narrow screen the table scrolls, which must work by keyboard too.
  return card(title, element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": title }, table));
}

function showMistakes(mistakes, evaluation) {
  if (!mistakes || !evaluation) return card("Mistakes", note("The mistakes appear after the evaluation."));
  return card("Mistakes", element("img", { src: mistakes, alt: "The model's most confident mistakes" }));
}

function showPredictions(predictions) {
  if (!predictions) return card("Predictions", note(`No predictions yet. Start with: ${TASK.commands.infer}`));
  const items = predictions.samples.map(({ index, prediction, truth, probability, picture }) => {
    const predicted = `predicted ${TASK.classes[prediction]} (${percent(probability)})`;
    const text = `Test image ${index}: ${predicted}, true class ${TASK.classes[truth]}`;
    return element("li", {}, picture ? element("img", { src: picture, alt: text }) : note(text));
  });
  const old = predictions.of_this_model ? null : note("The predictions are of another model than the one served.");
  return card("Predictions of test images", old, element("ul", { class: "samples" }, ...items));
}

// API -----------------------------------------------------------------------------------------------------------------

async function showDocs() {
  const api = await get("openapi.json", (response) => response.json());
  if (!api) {
    byId("docs-content").replaceChildren(note("The service does not respond. Reload the page."));
    return;
  }
  const { info, paths } = api;
  const endpoints = Object.entries(paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, operation]) => showEndpoint(method, path, operation)));
  const example = `(printf '{"input": {"image": "data:image/png;base64,'; base64 -w0 picture.png; printf '"}}') |
  curl -H 'Content-Type: application/json' --data-binary @- ${new URL("predictions", location)}`;
  byId("docs-content").replaceChildren(
    note(info.description),
    element("pre", {}, example),
    element("p", {}, "Full description: ", element("a", { href: "openapi.json" }, "openapi.json")),
    ...endpoints,
  );
}

function showEndpoint(method, path, { description, responses }) {
  const statuses = Object.entries(responses).map(([status, { description }]) =>
    status === "200" ? status : `${status} (${description.replace(/\.$/, "")})`);
  return element("div", { class: "card endpoint" },
    element("h2", {}, element("b", {}, `${method.toUpperCase()} `), path),
    note(description),
    note(`Responses: ${statuses.join(", ")}`));
}

// Views ---------------------------------------------------------------------------------------------------------------

const TITLES = { draw: CAN_DRAW ? "Draw a digit" : "Predict a picture", results: "Results", docs: "API" };

function view() {
  if (location.pathname.endsWith("/docs")) return "docs";
  return location.hash === "#results" ? "results" : "draw";
}

function showView(focus) {
  for (const name of Object.keys(TITLES)) byId(name).hidden = name !== view();
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === view()) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = TITLES[view()];
  if (focus) byId(`${view()}-title`).focus();
  if (view() === "docs") showDocs();
  update();
  paint();
}

/** Return what read() makes of the response to a GET request, or null if it fails. */
async function get(path, read) {
  return fetch(path).then((response) => (response.ok ? read(response) : null)).catch(() => null);
}

/** Update what the page shows of the service's state, and the results if they are visible. */
async function update() {
  const health = await get("health-check", (response) => response.json());
  byId("notice").hidden = health?.status === "READY" && !health.setup.logs;
  const problem = health ? health.setup.logs || "The service is busy." : "The service does not respond. Is it running?";
  byId("notice").textContent = problem;
  const modelIsNew = health?.model && !hasModel;
  hasModel = Boolean(health?.model);
  if (modelIsNew) ask();
  if (health?.model) {
    const { sha256, accuracy } = health.model;
    const text = accuracy === null ? "not evaluated yet" : `${fixed(accuracy, 2)} % accuracy on the test images`;
    byId("model").textContent = `Model ${sha256.slice(0, 12)}: ${text}`;
  }
  if (view() === "results") await updateResults();
}

addEventListener("hashchange", () => showView(true));
addEventListener("resize", paint);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);

/** Update every two seconds while the page is visible. */
async function keepUpdating() {
  if (!document.hidden) await update();
  setTimeout(keepUpdating, 2000);
}

showView(false);
setTimeout(keepUpdating, 2000);
