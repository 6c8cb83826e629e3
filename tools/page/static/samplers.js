// The original sampler, by ONNX Runtime Web, and jacobiflow's, in WebAssembly: both solve x = g(x) block by block, last block first.
import * as ort from "./ort/ort.wasm.min.mjs";

const tensor = (type, data, dims) => new ort.Tensor(type, data, dims);

export class Samplers {
  // `files` are the bytes of the files that model.json names, by name. All blocks have the same two graphs.
  static async load(model, files) {
    ort.env.wasm.numThreads = 1;
    ort.env.wasm.wasmPaths = new URL("ort/", import.meta.url).href;
    ort.env.wasm.wasmBinary = files[model.runtime];
    const open = (graph, weights) => {
      const options = { executionProviders: ["wasm"], logSeverityLevel: 3 };
      return ort.InferenceSession.create(files[graph], { ...options, externalData: [{ path: "weights", data: files[weights] }] });
    };
    const steps = [], gradients = [];
    for (const weights of model.weights) {
      steps.push(await open(model.step, weights));
      gradients.push(await open(model.gradient, weights));
    }
    const native = await Native.load(files[model.native], model, model.weights.map((weights) => files[weights]));
    return Object.assign(new Samplers(), model, { model, steps, gradients, native });
  }

  // Both samplers solve all blocks for the tokens of `latents` under `label`, in raster order. They yield the block, its
  // tokens x, and the number of tokens that are final.
  original = (latents, label) => this.solve(latents, (block, z) => this.solveByCalls(block, z, label));
  jacobiflow = (latents, label) => this.solve(latents, (block, z) => this.native.solve(block, z, label));

  async *solve(latents, solveBlock) {
    let tokens = latents.map((value, i) => value * this.prior_scale[i]);
    for (let block = this.steps.length - 1; block >= 0; block--) {
      let x;
      for await (const state of solveBlock(block, this.permuted(tokens, block))) {
        ({ x } = state);
        yield { block, ...state };
      }
      tokens = this.permuted(x, block);
    }
    return tokens;
  }

  // Calls the network for one token after another. It reads the keys and values of the tokens before, which earlier calls gave.
  async *solveByCalls(block, z, label) {
    const { num_tokens: length, token_dim: c, keys_per_token: s } = this;
    const x = z.slice(), keys = new Float32Array(length * s);
    for (let t = 1; t < length; t++) {
      const out = await this.steps[block].run({
        x: tensor("float32", x.subarray((t - 1) * c, t * c), [1, c]),
        z: tensor("float32", z.subarray(t * c, (t + 1) * c), [1, c]),
        cache: tensor("float32", keys.subarray(0, (t - 1) * s), [t - 1, s]),
        label: tensor("int64", BigInt64Array.of(BigInt(label)), [1]),
      });
      keys.set(out.keys.data, (t - 1) * s);
      x.set(out.y.data, t * c);
      yield { x, front: t + 1 };
    }
  }

  // Changes raster order to the causal order of a block, and back.
  permuted(tokens, block) {
    const c = this.token_dim, flipped = this.orders[block] === "flip";
    return tokens.map((value, i) => (flipped ? tokens[tokens.length - c - i + 2 * (i % c)] : value));
  }

  // Takes one score step: x + sigma^2 grad log p(x | label).
  async denoised(tokens, label) {
    const dims = [this.num_tokens, this.token_dim], inputs = [];
    const differentiate = (block, x, dz) => this.gradients[block].run({
      x: tensor("float32", x, dims), dz: tensor("float32", dz, dims), label: tensor("int64", BigInt64Array.of(BigInt(label)), [1]),
    });
    let x = tokens;
    for (const block of this.gradients.keys()) {
      inputs.push(this.permuted(x, block));
      x = this.permuted((await differentiate(block, inputs[block], x)).z.data, block);
    }
    let gradient = x.map((value, i) => -value / this.prior_scale[i] ** 2);
    for (const block of [...this.gradients.keys()].reverse()) {
      const { dx } = await differentiate(block, inputs[block], this.permuted(gradient, block));
      gradient = this.permuted(dx.data, block);
    }
    return tokens.map((value, i) => value + this.noise_std ** 2 * gradient[i]);
  }
}

// jacobiflow's own C++, compiled from tools/page/native.cpp.
class Native {
  static async load(bytes, model, blocks) {
    const system = new Proxy({}, { get: () => () => 0 }); // C++ names functions of files and clocks, and calls none
    const { instance } = await WebAssembly.instantiate(bytes, { wasi_snapshot_preview1: system });
    const native = Object.assign(new Native(), { functions: instance.exports, model });
    instance.exports._initialize();
    native.sizes = native.store(Int32Array.from(model.native_sizes));
    native.guidance = native.store(Float32Array.from(model.guidance));
    native.queryScale = native.store(Float32Array.of(1, 1 / model.attn_temperature));
    native.blocks = blocks.map((block) => native.store(decode(block, model.shapes)));
    [native.z, native.x] = [0, 1].map(() => native.store(new Float32Array(model.num_tokens * model.token_dim)));
    return native;
  }

  view(address, { length, constructor: Numbers }) {
    return new Numbers(this.functions.memory.buffer, address, length);
  }

  store(numbers) {
    const address = this.functions.allocate(numbers.byteLength);
    this.view(address, numbers).set(numbers);
    return address;
  }

  // Solves a block token by token, in calls of a row of the picture's tokens, after which the page may draw.
  *solve(block, z, label) {
    const { functions, model: { num_tokens: length }, sizes, blocks, guidance, queryScale } = this;
    this.view(this.z, z).set(z);
    this.view(this.x, z).set(z);
    const loop = functions.begin(sizes, blocks[block], guidance, queryScale, label, this.z, this.x);
    try {
      for (let stop = 0; stop < length; ) {
        stop = Math.min(stop + Math.sqrt(length), length);
        functions.solve(loop, stop);
        yield { x: this.view(this.x, z).slice(), front: stop };
      }
    } finally {
      functions.end(loop);
    }
  }
}

// Returns the parameters of a block: a matrix is stored as integers, and a step for each row.
function decode(bytes, shapes) {
  const parameters = [];
  let at = 0;
  const floats = (count) => new Float32Array(bytes.slice(at, (at += 4 * count)).buffer);
  for (const [rows, columns] of shapes) {
    if (columns) {
      const multiples = new Int8Array(bytes.slice(at, (at += rows * columns)).buffer), steps = floats(rows);
      multiples.forEach((multiple, i) => parameters.push(Math.fround(multiple * steps[Math.floor(i / columns)])));
    } else parameters.push(...floats(rows));
  }
  return Float32Array.from(parameters);
}
