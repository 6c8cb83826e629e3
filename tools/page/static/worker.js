// Races the exact loop against sweeps beside the page, which stays responsive, and reports each turn.
import { Solver } from "./solver.js";

const TURN = 16, WARM_UP = 1000; // milliseconds
const loading = load();
let current; // the number of the race that is running

async function load() {
  const model = JSON.parse(new TextDecoder().decode(await read("model.json")));
  const names = [model.step, model.gradient, ...model.weights];
  const files = await Promise.all(names.map(async (name) => [name, await read(name)]));
  const solver = await Solver.load(model, Object.fromEntries(files));
  await warmUp(solver);
  return solver;
}

// Browsers compile code better after it has run for a while, so the clocks start after that.
async function warmUp(solver) {
  const started = performance.now();
  for await (const _ of solver.solve(normalNumbers(0, solver.prior_scale.length), 0, 1))
    if (performance.now() - started > WARM_UP) return;
}

async function read(name) {
  const response = await fetch(`model/${name}`);
  if (!response.ok) throw new Error(`model/${name}: ${response.status} ${response.statusText}`);
  const stream = name.endsWith(".gz") ? response.body.pipeThrough(new DecompressionStream("gzip")) : response.body;
  return new Uint8Array(await new Response(stream).arrayBuffer());
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
  const solver = await loading;
  const latents = normalNumbers(seed, solver.prior_scale.length);
  const racers = Object.entries({ exact: 1, sweeps: solver.window }).map(([name, size]) => {
    return { name, size, solve: solver.solve(latents, label, size), seconds: 0, calls: 0, isDone: false };
  });
  postMessage({ kind: "started", id, model: solver.model, latents });
  while (current === id && !racers.every(({ isDone }) => isDone)) {
    const waiting = racers.filter(({ isDone }) => !isDone);
    const racer = waiting.reduce((behind, other) => (other.seconds < behind.seconds ? other : behind));
    const picture = await takeTurn(racer, solver, label);
    const { name, size, seconds, calls, isDone } = racer;
    postMessage({ kind: "turn", id, name, size, seconds, calls, isDone, ...picture });
    await new Promise((done) => setTimeout(done)); // lets a message come in
  }
}

async function takeTurn(racer, solver, label) {
  const started = performance.now();
  let step, elapsed;
  do {
    step = await racer.solve.next();
    if (!step.done) racer.calls++;
    elapsed = performance.now() - started;
  } while (!step.done && elapsed < TURN);
  racer.seconds += elapsed / 1000;
  racer.isDone = step.done;
  if (step.done) return { image: await solver.denoised(step.value, label) };
  const { block, front, x } = step.value;
  return { block, front, image: solver.permuted(x, block) };
}

onmessage = ({ data }) => race(data).catch(({ message }) => postMessage({ kind: "failed", id: data.id, message }));
