// The form, its pictures and messages; the solver runs in worker.js.
import { paint } from "./picture.js";

const MOST_THREADS = 8;
const query = new URLSearchParams(location.search), $ = (id) => document.getElementById(id);
const cell = (loop, name) => document.querySelector(`#results .${loop}${name}`);
const names = { sweeps: "by sweeps", exact: "token by token" };
const models = {}, megabytes = { cpu: 21, gpu: 34 }; // by device
let ask, model, threads, results, loop, job = 0;

// The status is read aloud, the progress is not.
function say(status, failed = false) {
  $("status").textContent = status;
  $("status").classList.toggle("live-failed", failed);
  $("progress").textContent = "";
}

// Standard normal numbers by Box and Muller, from the generator mulberry32.
function latents(seed, count) {
  let state = seed >>> 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
  const normal = () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
  return Float32Array.from({ length: count }, normal);
}

function draw(tokens, isOpen) {
  paint(cell(loop, " canvas"), model, tokens.map((value) => (value + 1) * 127.5), isOpen);
}

function clear(loop) {
  for (const name of [".calls", ".seconds", ".residual"]) cell(loop, name).textContent = "–";
  cell(loop, " canvas").getContext("2d").reset();
}

// Makes a function that sends the worker a message and waits for its answer; progress on the way is shown.
function connect(worker) {
  let answer;
  const handlers = {
    gpu: () => ($("device").options[1].disabled = false),
    loading: ({ bytes }) => ($("progress").textContent = `${(bytes / 1e6).toFixed(1)} MB`),
    loaded: () => say("Starting the model …"),
    sweep: ({ block, front, order, tokens }) => {
      const isOpen = (place) => (order === "identity" ? place : model.num_tokens - 1 - place) >= front;
      matchMedia("(prefers-reduced-motion)").matches || draw(tokens, isOpen);
      const blocks = model.orders.length;
      $("progress").textContent = `Block ${blocks - block} of ${blocks}: ${front} of ${model.num_tokens} tokens are final`;
    },
    failed: (error) => answer.reject(error),
    stopped: () => answer.reject(),
  };
  worker.onmessage = ({ data }) => (handlers[data.kind] ?? answer.resolve)(data);
  worker.onerror = ({ message }) => answer?.reject({ message: message || "worker.js did not load" });
  return (message) => {
    worker.postMessage(message);
    return new Promise((resolve, reject) => (answer = { resolve, reject }));
  };
}

function report(result) {
  const { calls, seconds, residual } = result;
  if (!(residual <= model.tolerance)) throw new Error(`${names[loop]}, |g(x) - x| = ${residual} at this seed`);
  draw(result.image);
  cell(loop, ".calls").textContent = calls.toLocaleString("en");
  cell(loop, ".seconds").textContent = seconds.toFixed(2);
  cell(loop, ".residual").textContent = residual.toExponential(1);
  results[loop] = result;
}

// The largest difference of the two pictures, in grey levels of 255.
function difference({ image }, { image: other }) {
  return image.reduce((most, value, i) => Math.max(most, Math.abs(value - other[i])), 0) * 127.5;
}

function showDownload() {
  const device = $("device").value;
  $("draw").textContent = models[device] ? "Draw" : `Draw (fetches ${megabytes[device]} MB)`;
}

async function run() {
  [$("draw").disabled, $("stop").disabled] = [true, false];
  const device = $("device").value;
  results = { device, label: Number($("class").value), seed: Number($("seed").value), threads };
  window.jacobiflow = results; // latents, tokens and residuals, for a check
  Object.keys(names).forEach(clear);
  try {
    say("Fetching the model …");
    model = models[device] ??= (await ask({ kind: "load", device, threads })).model;
    showDownload();
    results.latents = latents(results.seed, model.num_tokens * model.token_channels);
    const windowSize = device === "gpu" ? model.num_tokens : model.window * threads;
    for (loop of $("exact").checked ? ["sweeps", "exact"] : ["sweeps"]) {
      say(`Drawing ${names[loop]} …`);
      const size = loop === "sweeps" ? windowSize : 1;
      report(await ask({ kind: "draw", ...results, size, tolerance: model.tolerance, id: ++job }));
    }
    const { sweeps, exact } = results, apart = exact && difference(sweeps, exact).toFixed(2);
    say(`Done with windows of ${windowSize} tokens. ${exact ? `The pictures differ by at most ${apart} grey levels of 255.` : ""}`);
  } catch (error) {
    Object.keys(names).forEach((name) => results[name] ?? clear(name));
    say(error ? `This did not work: ${error.message}. Draw tries again.` : "Stopped.", Boolean(error));
  }
  [$("draw").disabled, $("stop").disabled] = [false, true];
}

// Threads need isolate.js, which stops the site's search, so they are only used by a page that asks for them.
const most = Math.min(navigator.hardwareConcurrency, MOST_THREADS), wanted = Number(query.get("threads")) || 1;
if (typeof WebAssembly !== "object") say("This browser has no WebAssembly, which the model needs.", true);
else if (wanted > 1 && !crossOriginIsolated && navigator.serviceWorker && !sessionStorage.isolated) {
  sessionStorage.isolated = "tried"; // once more behind isolate.js
  await navigator.serviceWorker.register("isolate.js").then(() => navigator.serviceWorker.ready).catch(() => {});
  location.reload();
} else {
  threads = crossOriginIsolated ? wanted : 1;
  const worker = new Worker("worker.js", { type: "module" });
  ask = connect(worker);
  $("form").addEventListener("submit", (event) => (event.preventDefault(), run()));
  $("stop").addEventListener("click", () => worker.postMessage({ kind: "stop" }));
  $("threads").hidden = wanted > 1 || most < 2 || !navigator.serviceWorker;
  $("threads").querySelector("a").href = `?threads=${most}#run-it-yourself`;
  $("device").addEventListener("change", showDownload);
  $("draw").disabled = false;
  say("Ready.");
}
