// One block is a fixed point x = g(x), solved by a front that moves along its tokens; see docs/solvers.md.
const RUNTIMES = {
  cpu: { folder: "ort/", file: "ort.wasm.min.mjs", provider: "wasm" },
  gpu: { folder: "ort-webgpu/", file: "ort.webgpu.min.mjs", provider: "webgpu" },
};
const range = (start, stop) => BigInt64Array.from({ length: stop - start }, (_, i) => BigInt(start + i));

export class Solver {
  // Loads the runtime while the model is fetched: its refusal of an empty model shows that it is loaded.
  static async start(device, threads) {
    const { folder, file } = RUNTIMES[device], ort = await import(`./${folder}${file}`);
    ort.env.wasm.numThreads = threads;
    ort.env.wasm.wasmPaths = new URL(folder, import.meta.url).href;
    await ort.InferenceSession.create(new Uint8Array()).catch(() => {});
    return ort;
  }

  // `files` are the bytes of the exported model's files, by name.
  static async load(ort, device, model, files) {
    const externalData = [{ path: model.weights, data: files[model.weights] }];
    const open = (name, graphOptimizationLevel, provider) => {
      const options = { externalData, graphOptimizationLevel, executionProviders: [provider], logSeverityLevel: 3 };
      return ort.InferenceSession.create(files[name], options);
    };
    const sessions = [], tensor = (type, data, dims) => new ort.Tensor(type, data, dims);
    for (const name of model.blocks) sessions.push(await open(name, "all", RUNTIMES[device].provider));
    const denoiser = await open(model.denoise, "disabled", "wasm"); // it runs once, and a GPU may lack its float16
    return Object.assign(new Solver(), model, { denoiser, sessions, tensor });
  }

  // Computes g of entries [first, stop) of x from the keys of the tokens before first - 1, and stores those of the tokens
  // that it reads.
  async evaluate(state, first, stop) {
    const { tensor, token_channels: c, keys_per_token: s, guidance } = this;
    const { block, x, z, keys, label, cost } = state;
    const count = stop - first;
    const weights = [guidance.log_scale, guidance.shift].flatMap((all) => all.slice(first, stop));
    const feeds = {
      x: tensor("float32", x.subarray((first - 1) * c, (stop - 1) * c), [count, c]),
      z: tensor("float32", z.subarray(first * c, stop * c), [count, c]),
      places: tensor("int64", range(first - 1, stop - 1), [count]),
      cache: tensor("float32", keys.subarray(0, (first - 1) * s), [first - 1, s]),
      cache_places: tensor("int64", range(0, first - 1), [first - 1]),
      logit_scale: tensor("float32", Float32Array.from(this.logit_scale), [2]),
      labels: tensor("int64", BigInt64Array.of(BigInt(label), BigInt(this.num_classes)), [2]),
      guidance: tensor("float32", Float32Array.from(weights), [2, count, 1]),
    };
    const out = await this.sessions[block].run(feeds);
    cost.calls++;
    keys.set(out.keys.data, (first - 1) * s);
    return out.g.data;
  }

  // Sweeps of `size` tokens behind the front until all are final; a size of 1 is the exact loop.
  async sweep(state, size, tolerance, onSweep) {
    const { num_tokens: length, token_channels: c } = this;
    const { x, z } = state;
    for (let front = 1; front < length; ) {
      const stop = Math.min(front + size, length);
      const g = await this.evaluate(state, front, stop);
      let settled = 0;
      for (let i = 0, leading = true; i < g.length; i += c) {
        let change = 0;
        for (let k = i; k < i + c; k++) {
          const at = front * c + k;
          change = Math.max(change, Math.abs(g[k] - x[at])); // NaN where g overflows: the token starts anew
          x[at] = Number.isFinite(g[k]) ? g[k] : z[at];
        }
        if ((leading &&= change <= tolerance)) settled++;
      }
      front += Math.min(settled + 1, stop - front); // the next one was computed from final tokens
      await onSweep(state, front);
    }
  }

  // Measures the residual, the largest |g(x) - x|, by a pass over all tokens that uses only the solution.
  async certify(state) {
    const started = performance.now(), c = this.token_channels;
    const g = await this.evaluate(state, 1, this.num_tokens); // entry 0 is solved; no keys come before entry 1
    state.cost.certifySeconds += (performance.now() - started) / 1000;
    return g.reduce((most, value, i) => Math.max(most, Math.abs(value - state.x[c + i])), 0);
  }

  // Solves a block. If it misses the tolerance, it is resumed to half of it, and then solved token by token.
  async solveBlock(state, size, tolerance, onSweep) {
    for (const [tokens, closer] of [[size, tolerance], [size, tolerance / 2], [1, 0]]) {
      await this.sweep(state, tokens, closer, onSweep);
      state.residual = await this.certify(state);
      if (state.residual <= tolerance) return;
    }
  }

  // Solves all blocks, last block first: the tokens of `latents` under `label`, in raster order, and their cost.
  async solve(latents, label, size, tolerance, onSweep) {
    let tokens = latents.map((value, i) => value * this.prior_scale[i]), residual = 0;
    const cost = { calls: 0, certifySeconds: 0 };
    for (let block = this.sessions.length - 1; block >= 0; block--) {
      const z = this.permuted(tokens, block);
      const keys = new Float32Array(this.num_tokens * this.keys_per_token);
      const state = { block, z, x: z.slice(), keys, label, cost };
      await this.solveBlock(state, size, tolerance, onSweep);
      tokens = this.permuted(state.x, block);
      residual = Math.max(residual, state.residual);
    }
    return { tokens, residual, ...cost };
  }

  // Changes raster order to the causal order of a block, and back.
  permuted(tokens, block) {
    const c = this.token_channels, flipped = this.orders[block] === "flip";
    return tokens.map((value, i) => (flipped ? tokens[tokens.length - c - i + 2 * (i % c)] : value));
  }

  // Takes one score step: x + sigma^2 grad log p(x | label).
  async denoiseTokens(tokens, label) {
    const x = this.tensor("float32", tokens, [this.num_tokens, this.token_channels]);
    const result = await this.denoiser.run({ x, label: this.tensor("int64", BigInt64Array.of(BigInt(label)), [1]) });
    return result.denoised.data.slice();
  }
}
