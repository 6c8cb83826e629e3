// Races the two samplers beside the page, which stays responsive, and reports each turn.
import { Samplers } from "./samplers.js";

const TURN = 16, WARM_UP = 700; // milliseconds
let loading; // the samplers, from the first race on
let current; // the number of the race that is running

async function load() {
  const model = JSON.parse(new TextDecoder().decode(await read("model.json")));
  const names = Object.keys(model.bytes), total = names.reduce((sum, name) => sum + model.bytes[name], 0);
  let loaded = 0;
  const count = (bytes) => postMessage({ kind: "loading", loaded: (loaded += bytes), total });
  const files = await Promise.all(names.map(async (name) => [name, await read(name, count)]));
  const samplers = await Samplers.load(model, Object.fromEntries(files));
  await warmUp(samplers);
  return samplers;
}

// Browsers compile code better after it has run for a while, so the clocks start after that.
async function warmUp(samplers) {
  for (const name of ["original", "jacobiflow"]) {
    const started = performance.now();
    for await (const _ of samplers[name](normalNumbers(0, samplers.prior_scale.length), 0))
      if (performance.now() - started > WARM_UP) break;
  }
}

async function read(name, count = () => {}) {
  const response = await fetch(`model/${name}`);
  if (!response.ok) throw new Error(`model/${name}: ${response.status} ${response.statusText}`);
  const counter = new TransformStream({
    transform(chunk, controller) {
      count(chunk.length);
      controller.enqueue(chunk);
    },
  });
  const stream = response.body.pipeThrough(counter);
  return new Uint8Array(await new Response(name.endsWith(".gz") ? stream.pipeThrough(new DecompressionStream("gzip")) : stream).arrayBuffer());
}

// Standard normal numbers by Box and Muller, from the generator mulberry32.
function normalNumbers(seed, count) {
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

// The sampler whose clock is behind takes the next turn: the two share one thread, and never run at the same time.
async function race({ id, label, seed }) {
  current = id;
  loading ??= load();
  const samplers = await loading;
  const latents = normalNumbers(seed, samplers.prior_scale.length);
  const racers = ["original", "jacobiflow"].map((name) => ({ name, steps: samplers[name](latents, label), seconds: 0, isDone: false }));
  postMessage({ kind: "started", id, model: samplers.model, latents });
  while (current === id && !racers.every(({ isDone }) => isDone)) {
    const waiting = racers.filter(({ isDone }) => !isDone);
    const racer = waiting.reduce((behind, other) => (other.seconds < behind.seconds ? other : behind));
    const picture = await takeTurn(racer, samplers, label);
    const { name, seconds, isDone } = racer;
    postMessage({ kind: "turn", id, name, seconds, isDone, ...picture });
    await new Promise((done) => setTimeout(done)); // lets a message come in
  }
  for (const { steps } of racers) await steps.return(); // frees the loop of a race that is given up
}

async function takeTurn(racer, samplers, label) {
  const started = performance.now();
  let step, elapsed;
  do {
    step = await racer.steps.next();
    elapsed = performance.now() - started;
  } while (!step.done && elapsed < TURN);
  racer.seconds += elapsed / 1000;
  racer.isDone = step.done;
  if (step.done) return { image: await samplers.denoised(step.value, label) };
  const { block, front, x } = step.value;
  return { block, front, image: samplers.permuted(x, block) };
}

onmessage = ({ data }) => race(data).catch(({ message }) => postMessage({ kind: "failed", id: data.id, message }));
