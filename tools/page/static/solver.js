// One block is a fixed point x = g(x), solved by a front that moves along its tokens; see docs/solvers.md.
import * as ort from "./ort/ort.wasm.min.mjs";

ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = new URL("ort/", import.meta.url).href;

const tensor = (type, data, dims) => new ort.Tensor(type, data, dims);

export class Solver {
  // `files` are the bytes of the exported model's files, by name. All blocks have the same two graphs.
  static async load(model, files) {
    const open = (graph, weights) => {
      const options = { executionProviders: ["wasm"], logSeverityLevel: 3 };
      return ort.InferenceSession.create(files[graph], { ...options, externalData: [{ path: "weights", data: files[weights] }] });
    };
    const steps = [], gradients = [];
    for (const weights of model.weights) {
      steps.push(await open(model.step, weights));
      gradients.push(await open(model.gradient, weights));
    }
    return Object.assign(new Solver(), model, { model, steps, gradients });
  }

  // Computes g of entries [first, stop) of x from the keys of the tokens before first - 1, and stores those of the tokens
  // that it reads.
  async evaluate(state, first, stop) {
    const { token_dim: c, keys_per_token: s } = this;
    const { block, x, z, keys, label } = state;
    const count = stop - first;
    const out = await this.steps[block].run({
      x: tensor("float32", x.subarray((first - 1) * c, (stop - 1) * c), [count, c]),
      z: tensor("float32", z.subarray(first * c, stop * c), [count, c]),
      cache: tensor("float32", keys.subarray(0, (first - 1) * s), [first - 1, s]),
      label: tensor("int64", BigInt64Array.of(BigInt(label)), [1]),
    });
    keys.set(out.keys.data, (first - 1) * s);
    return out.g.data;
  }

  // Sweeps `size` tokens behind the front until all are final. Yields after each network call.
  async *sweep(state, size, tolerance) {
    const { num_tokens: length, token_dim: c } = this;
    const { x, z } = state;
    for (state.front = 1; state.front < length; ) {
      const stop = Math.min(state.front + size, length);
      const g = await this.evaluate(state, state.front, stop);
      let settled = 0;
      for (let i = 0, leading = true; i < g.length; i += c) {
        let change = 0;
        for (let k = i; k < i + c; k++) {
          const at = state.front * c + k;
          change = Math.max(change, Math.abs(g[k] - x[at])); // NaN where g overflows: the token starts anew
          x[at] = Number.isFinite(g[k]) ? g[k] : z[at];
        }
        if ((leading &&= change <= tolerance)) settled++;
      }
      state.front += Math.min(settled + 1, stop - state.front); // the next one was computed from final tokens
      yield state;
    }
  }

  // Measures the residual, the largest |g(x) - x|, by a pass over all tokens that uses only the solution.
  async residual(state) {
    const g = await this.evaluate(state, 1, this.num_tokens); // entry 0 is solved; no keys come before entry 1
    return g.reduce((most, value, i) => Math.max(most, Math.abs(value - state.x[this.token_dim + i])), 0);
  }

  // Solves a block by sweeps. If it misses the tolerance, it is resumed to half of it, and then solved token by token.
  async *sweepToTolerance(state, size) {
    for (const tolerance of [this.tolerance, this.tolerance / 2]) {
      yield* this.sweep(state, size, tolerance);
      const residual = await this.residual(state);
      yield state;
      if (residual <= this.tolerance) return;
    }
    yield* this.sweep(state, 1);
  }

  // Solves all blocks, last block first, for the tokens of `latents` under `label` in raster order. Yields the state of a
  // block after each network call. Windows of one token are the exact loop, which needs no certificate.
  async *solve(latents, label, size) {
    let tokens = latents.map((value, i) => value * this.prior_scale[i]);
    for (let block = this.steps.length - 1; block >= 0; block--) {
      const z = this.permuted(tokens, block);
      const keys = new Float32Array(this.num_tokens * this.keys_per_token);
      const state = { block, z, x: z.slice(), keys, label, front: 1 };
      yield* size === 1 ? this.sweep(state, 1) : this.sweepToTolerance(state, size);
      tokens = this.permuted(state.x, block);
    }
    return tokens;
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
