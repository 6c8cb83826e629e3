// Runs the solver beside the page, which stays responsive, and tells it what happens.
import { Solver } from "./solver.js";

const SHOW_EVERY = 40; // milliseconds
let solver, drawing;

async function read(name, arrived) {
  const response = await fetch(`model/${name}`);
  if (!response.ok) throw new Error(`model/${name}: ${response.status} ${response.statusText}`);
  const parts = [], reader = response.body.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    parts.push(part.value);
    arrived(part.value.length);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

async function load({ threads }) {
  let bytes = 0, started = Solver.start(threads);
  const arrived = (more) => postMessage({ kind: "loading", bytes: (bytes += more) });
  const model = JSON.parse(new TextDecoder().decode(await read("model.json", arrived)));
  const names = [model.weights, ...model.blocks, ...(model.denoise ? [model.denoise] : [])];
  const files = Object.fromEntries(await Promise.all(names.map(async (name) => [name, await read(name, arrived)])));
  postMessage({ kind: "arrived" });
  solver = await started.then(() => Solver.load(model, files));
  postMessage({ kind: "ready", model });
}

async function draw({ latents, label, size, tolerance, slow, id }) {
  let shown = 0, waited = 0;
  drawing = id;
  const swept = async ({ block, x }, front) => {
    const from = performance.now();
    if (!slow && from - shown < SHOW_EVERY) return;
    postMessage({ kind: "swept", block, front, order: solver.orders[block], tokens: solver.permuted(x, block) });
    await new Promise((done) => setTimeout(done, slow ? SHOW_EVERY : 0)); // lets a message come in
    if (drawing !== id) throw new Error("stopped");
    shown = performance.now();
    waited += shown - from; // what the picture takes is not the solver's
  };
  const started = performance.now();
  const solved = await solver.solve(latents, label, size, tolerance, swept);
  let seconds = (performance.now() - started - waited) / 1000;
  if (size === 1) seconds -= solved.certifySeconds; // exact by construction: measured, but not at its cost
  const from = performance.now();
  const denoised = await solver.denoised(solved.tokens, label);
  postMessage({ kind: "drawn", ...solved, denoised, seconds, denoiseSeconds: (performance.now() - from) / 1000 });
}

const stop = async () => (drawing = undefined);
const failed = ({ message }) => postMessage({ kind: message === "stopped" ? "stopped" : "failed", message });
onmessage = ({ data }) => ({ load, draw, stop })[data.kind](data).catch(failed);
