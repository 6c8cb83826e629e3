// Shows the race: pictures, clocks, and the winner. The samplers run in worker.js.
const TINT = [191, 88, 0]; // of tokens that are not final yet
const samplers = { exact: "Token by token", sweeps: "Sweeps" };
const $ = (id) => document.getElementById(id), part = (name, selector) => document.querySelector(`#race .${name} ${selector}`);
const isMotionReduced = matchMedia("(prefers-reduced-motion)");
const worker = new Worker("worker.js", { type: "module" });
let id = 0, seed = 0, model, results;

function say(outcome, reason = "") {
  $("outcome").textContent = outcome;
  $("reason").textContent = reason;
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

function show({ name, seconds, calls, block, front, image, isDone }) {
  const { num_tokens: length, orders } = model;
  const isOpen = (place) => !isDone && (orders[block] === "flip" ? length - 1 - place : place) >= front;
  if (isDone || !isMotionReduced.matches) paint(name, image, isOpen);
  part(name, ".seconds").textContent = `${seconds.toFixed(2)} s`;
  part(name, ".calls").textContent = `${calls.toLocaleString("en")} calls`;
  part(name, "progress").value = isDone ? 1 : ((orders.length - 1 - block) * length + front) / (orders.length * length);
}

// The winner, by the seconds on the clocks, and the reason: the number of calls against the time of a call.
function conclude({ exact, sweeps }) {
  const times = Object.entries(samplers).map(([name, text]) => `${text}: ${results[name].seconds.toFixed(2)} s.`);
  const isSweepsFaster = sweeps.seconds < exact.seconds;
  const [one, many] = [exact, sweeps].map(({ seconds, calls }) => (1000 * seconds) / calls);
  const [fewer, longer] = [exact.calls / sweeps.calls, many / one].map((ratio) => ratio.toFixed(1));
  const counts = [sweeps, exact].map(({ calls }) => calls.toLocaleString("en"));
  const difference = exact.image.reduce((most, value, i) => Math.max(most, Math.abs(value - sweeps.image[i])), 0) * 127.5;
  say(
    `${times.join(" ")} ${samplers[isSweepsFaster ? "sweeps" : "exact"]} won here.`,
    `Sweeps made ${counts[0]} calls instead of ${counts[1]}: ${fewer} times fewer. ${isSweepsFaster ? "And" : "But"} a call took ` +
      `${isSweepsFaster ? "only " : ""}${longer} times as long on average, because it computes up to ${sweeps.size} tokens: ` +
      `${many.toFixed(2)} ms instead of ${one.toFixed(2)} ms. The two pictures differ by at most ${difference.toFixed(1)} grey levels of 255.`,
  );
}

const handlers = {
  started: (start) => {
    ({ model } = start);
    window.jacobiflow = results = { latents: start.latents }; // and the pictures, for a check
    say(`${$("class").selectedOptions[0].text}: two samplers, the same noise`);
  },
  turn: (turn) => {
    show(turn);
    if (turn.isDone) results[turn.name] = turn;
    if (results.exact && results.sweeps) conclude(results);
  },
  failed: ({ message }) => say(`This did not work: ${message}. Reload the page to try again.`),
};

function race() {
  worker.postMessage({ id: ++id, label: Number($("class").value), seed });
}

worker.onmessage = ({ data }) => data.id === id && handlers[data.kind](data);
worker.onerror = ({ message }) => handlers.failed({ message: message || "worker.js did not load" });
$("class").addEventListener("change", race);
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  seed++;
  race();
});
say("Fetching the model …");
race();
