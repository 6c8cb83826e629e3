// The page: its form, pictures and messages; the solver runs in worker.js.
const TOLERANCE = 3e-5; // pictures are then within 1e-3 of the exact inverse's
const TOKENS_PER_THREAD = 16, MOST_THREADS = 8, TINT = [191, 88, 0];
const query = new URLSearchParams(location.search), $ = (id) => document.getElementById(id);
const loops = ["parallel", "sequential"];
let ask, model, threads, results, job = 0;

function say(text, failed = false) {
  $("status").textContent = text;
  $("status").classList.toggle("failed", failed);
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

// Draws tokens in raster order; those for which `open(place)` holds are tinted.
function paint(loop, tokens, open = () => false) {
  const { image_size: side, patch_size: patch, in_channels: channels, token_channels: c } = model;
  const image = new ImageData(new Uint8ClampedArray(4 * side * side).fill(255), side, side);
  tokens.forEach((value, i) => {
    const place = Math.floor(i / c), across = side / patch, pixel = (i % c) % patch ** 2;
    const row = Math.floor(place / across) * patch + Math.floor(pixel / patch);
    const at = row * side + (place % across) * patch + (pixel % patch), level = (value + 1) * 127.5;
    for (let k = Math.floor((i % c) / patch ** 2); k < 3; k += channels)
      image.data[4 * at + k] = open(place) ? TINT[k] + level * 0.25 : level;
  });
  $(loop).querySelector("canvas").getContext("2d").putImageData(image, 0, 0);
}

const show = (loop, name, text) => ($(loop).querySelector(`.${name}`).textContent = text);
function clear(loop) {
  for (const name of ["progress", "calls", "seconds", "certificate"]) show(loop, name, "–");
  $(loop).querySelector("canvas").getContext("2d").reset();
}

// Makes a function that sends the worker a message and waits for its answer; progress on the way is shown.
function connect(worker) {
  let answer;
  const handlers = {
    loading: ({ bytes }) => $("stop").disabled || say(`Fetching the model: ${(bytes / 1e6).toFixed(1)} MB`),
    loaded: () => say("Starting the model …"),
    sweep: ({ block, front, order, tokens }) => {
      const loop = loops[results.done];
      const open = (place) => (order === "identity" ? place : model.num_tokens - 1 - place) >= front;
      matchMedia("(prefers-reduced-motion)").matches || paint(loop, tokens, open);
      show(loop, "progress", `Block ${block}: ${front} of ${model.num_tokens} tokens settled`);
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

function report(loop, result) {
  const { calls, seconds, denoiseSeconds, certificate } = result;
  if (!(certificate <= TOLERANCE)) throw new Error(`the ${loop} loop left |g(x) - x| = ${certificate} at this seed`);
  paint(loop, result.image);
  show(loop, "progress", `Solved, then denoised in ${denoiseSeconds.toFixed(2)} s`);
  show(loop, "calls", calls.toLocaleString("en"));
  show(loop, "seconds", `${seconds.toFixed(2)} s`);
  show(loop, "certificate", certificate.toExponential(1));
  results[loop] = result;
}

async function draw() {
  [$("draw").disabled, $("stop").disabled] = [true, false];
  results = { done: 0, label: Number($("class").value), seed: Number($("seed").value), threads };
  window.jacobiflow = results; // latents, tokens and certificates, for a check
  loops.forEach(clear);
  try {
    model ??= (await ask({ kind: "load", threads })).model;
    results.latents = latents(results.seed, model.num_tokens * model.token_channels);
    for (const loop of loops) {
      say(`Drawing by the ${loop} loop …`);
      const parallel = loop === "parallel", slow = parallel && $("slow").checked;
      const size = parallel ? TOKENS_PER_THREAD * threads : 1;
      report(loop, await ask({ kind: "draw", ...results, size, tolerance: TOLERANCE, slow, id: ++job }));
      results.done++;
    }
    const [parallel, sequential] = loops.map((loop) => results[loop].seconds);
    say(`Done: ${(sequential / parallel).toFixed(2)} times as fast as the sequential loop. Threads: ${threads}.`);
  } catch (error) {
    loops.slice(results.done).forEach(clear);
    say(error ? `This did not work: ${error.message}. Draw tries again.` : "Stopped.", Boolean(error));
  }
  [$("draw").disabled, $("stop").disabled] = [false, true];
}

if (typeof WebAssembly !== "object") say("This browser has no WebAssembly, which the model needs.", true);
else if (!crossOriginIsolated && !query.has("threads") && navigator.serviceWorker && !sessionStorage.isolated) {
  sessionStorage.isolated = "tried"; // once more behind isolate.js, without which there is one thread
  await navigator.serviceWorker.register("isolate.js").then(() => navigator.serviceWorker.ready).catch(() => {});
  location.reload();
} else {
  const cores = navigator.hardwareConcurrency; // on two of them, one thread has the first picture sooner
  threads = Number(query.get("threads")) || (crossOriginIsolated && cores > 2 ? Math.min(cores, MOST_THREADS) : 1);
  const worker = new Worker("worker.js", { type: "module" });
  ask = connect(worker);
  $("form").addEventListener("submit", (event) => (event.preventDefault(), draw()));
  $("stop").addEventListener("click", () => worker.postMessage({ kind: "stop" }));
  $("draw").disabled = false;
  say(`Ready. Threads: ${threads}.`);
}
