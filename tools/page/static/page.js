// Shows the race: pictures, clocks, and the result. The samplers run in worker.js.
const TINT = [191, 88, 0]; // of tokens that are not final yet
const $ = (id) => document.getElementById(id), part = (name, selector) => document.querySelector(`#race .${name} ${selector}`);
const button = document.querySelector("#form button");
const isMotionReduced = matchMedia("(prefers-reduced-motion)");
const worker = new Worker("worker.js", { type: "module" });
let id = 0, seed = 0, model, results;

function say(outcome, result = "") {
  $("outcome").textContent = outcome;
  $("result").textContent = result;
}

function paint(name, image, isOpen) {
  const { image_size: side, patch_size: patch, in_channels: channels, token_dim: c } = model;
  const pixels = new ImageData(new Uint8ClampedArray(4 * side * side).fill(255), side, side);
  image.forEach((value, i) => {
    const level = (value + 1) * 127.5;
    const place = Math.floor(i / c), across = side / patch, pixel = (i % c) % patch ** 2;
    const row = Math.floor(place / across) * patch + Math.floor(pixel / patch);
    const at = row * side + (place % across) * patch + (pixel % patch);
    for (let k = Math.floor((i % c) / patch ** 2); k < 3; k += channels)
      pixels.data[4 * at + k] = isOpen(place) ? TINT[k] + level * 0.25 : level;
  });
  part(name, "canvas").getContext("2d").putImageData(pixels, 0, 0);
}

function show({ name, seconds, block, front, image, isDone }) {
  const { num_tokens: length, orders } = model;
  const isOpen = (place) => !isDone && (orders[block] === "flip" ? length - 1 - place : place) >= front;
  if (isDone || !isMotionReduced.matches) paint(name, image, isOpen);
  part(name, ".seconds").textContent = `${seconds.toFixed(2)} s`;
  part(name, "progress").value = isDone ? 1 : ((orders.length - 1 - block) * length + front) / (orders.length * length);
}

// The ratio of the seconds on the clocks, which the bars show at last, and how far the pictures differ.
function conclude({ original, jacobiflow }) {
  const [fast, slow] = [original, jacobiflow].sort((a, b) => a.seconds - b.seconds);
  const names = { original: "The original", jacobiflow: "jacobiflow" };
  for (const { name, seconds } of [fast, slow]) {
    const bar = part(name, "progress");
    [bar.value, bar.ariaLabel] = [seconds / slow.seconds, `Time of ${names[name]}, as a share of the slower one`];
  }
  const difference = 127.5 * original.image.reduce((most, value, i) => Math.max(most, Math.abs(value - jacobiflow.image[i])), 0);
  say(
    `${names[fast.name]} was ${(slow.seconds / fast.seconds).toFixed(1)} times faster here.`,
    `Original: ${original.seconds.toFixed(2)} s. jacobiflow: ${jacobiflow.seconds.toFixed(2)} s. Same picture: no pixel ` +
      `differs by more than ${difference.toPrecision(1)} of 255 grey levels.`,
  );
}

const handlers = {
  loading: ({ loaded, total }) => {
    const [part, all] = [loaded, total].map((bytes) => (bytes / 1e6).toFixed(1));
    $("loading").value = loaded / total;
    say(loaded < total ? `Loading the model: ${part} of ${all} MB` : "Starting both samplers …");
  },
  started: (start) => {
    ({ model } = start);
    window.jacobiflow = results = { latents: start.latents }; // and the pictures, for a check
    $("loading").style.visibility = $("still").style.visibility = "hidden";
    $("race").style.visibility = "visible";
    [button.textContent, button.disabled] = ["Draw another", false];
    say(`${$("class").selectedOptions[0].text}: drawing it twice …`);
  },
  turn: (turn) => {
    show(turn);
    if (turn.isDone) results[turn.name] = turn;
    if (results.original && results.jacobiflow) conclude(results);
  },
  failed: ({ message }) => {
    worker.terminate(); // it may still report what it loads
    say(`This did not work: ${message}. Reload the page to try again.`);
  },
};

function race() {
  if (!id) {
    $("loading").style.visibility = "visible";
    button.disabled = true;
    say("Loading the model …");
  }
  worker.postMessage({ id: ++id, label: Number($("class").value), seed });
}

worker.onmessage = ({ data }) => (data.kind === "loading" || data.id === id) && handlers[data.kind](data);
worker.onerror = ({ message }) => handlers.failed({ message: message || "worker.js did not load" });
$("class").addEventListener("change", () => id && race());
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (id) seed++;
  race();
});
button.disabled = false;
say("Which of the two is faster?");
