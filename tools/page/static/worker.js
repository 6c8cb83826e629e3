// Runs the solver beside the page, which stays responsive, and sends it messages.
const SHOW_EVERY = 40; // milliseconds
const solvers = {}; // by device
let current; // the number of the job that is running

async function read(name, onBytes) {
  const response = await fetch(`model/${name}`);
  if (!response.ok) throw new Error(`model/${name}: ${response.status} ${response.statusText}`);
  const parts = [], reader = response.body.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    parts.push(part.value);
    onBytes(part.value.length);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

async function load({ device, threads }) {
  let bytes = 0;
  const { Solver } = await import("./solver.js"); // and so the runtime, which the page needs for a picture only
  const runtime = Solver.start(device, threads);
  const onBytes = (more) => postMessage({ kind: "loading", bytes: (bytes += more) });
  const model = JSON.parse(new TextDecoder().decode(await read("model.json", onBytes)));
  const names = [model.weights, ...model.blocks, model.denoise];
  const files = Object.fromEntries(await Promise.all(names.map(async (name) => [name, await read(name, onBytes)])));
  postMessage({ kind: "loaded" });
  solvers[device] = await Solver.load(await runtime, device, model, files);
  postMessage({ kind: "ready", model });
}

async function draw({ device, latents, label, size, tolerance, id }) {
  const solver = solvers[device];
  let shown = 0, pauses = 0; // milliseconds
  current = id;
  const onSweep = async ({ block, x }, front) => {
    const started = performance.now();
    if (started - shown < SHOW_EVERY) return;
    postMessage({ kind: "sweep", block, front, order: solver.orders[block], tokens: solver.permuted(x, block) });
    await new Promise((done) => setTimeout(done)); // lets a message come in
    if (current !== id) throw new Error("stopped");
    shown = performance.now();
    pauses += shown - started; // the picture's time is not the solver's
  };
  const started = performance.now();
  const solution = await solver.solve(latents, label, size, tolerance, onSweep);
  const solved = performance.now();
  let seconds = (solved - started - pauses) / 1000;
  if (size === 1) seconds -= solution.certifySeconds; // exact by construction: measured, but not at its cost
  const image = await solver.denoiseTokens(solution.tokens, label);
  postMessage({ kind: "image", ...solution, image, seconds, denoiseSeconds: (performance.now() - solved) / 1000 });
}

const stop = async () => (current = undefined);
const fail = ({ message }) => postMessage({ kind: message === "stopped" ? "stopped" : "failed", message });
onmessage = ({ data }) => ({ load, draw, stop })[data.kind](data).catch(fail);
navigator.gpu?.requestAdapter().then((adapter) => adapter && postMessage({ kind: "gpu" }));
