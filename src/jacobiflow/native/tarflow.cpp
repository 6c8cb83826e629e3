// The recurrence of a block with a causal transformer, token by token: x_t = exp(s(x_<t)) z_t + u(x_<t).
#include <exception>
#include <memory>

#include "boundary.h"
#include "simd.h"

namespace jacobiflow {

// The rows of one team of threads, and their buffers; each thread has a `scratch` buffer.
struct Work {
  const RecurrenceArgs& f;
  Range samples;
  Barrier barrier;
  int rows, stride, head, head_stride, length, size;
  std::vector<float> h, input, qkv, attended, up;  // `input` of a layer with `scale`
  std::vector<std::vector<float>> scratch;  // of each thread: normalised rows, and then logits or outputs

  Work(const RecurrenceArgs& flow, Range of, int threads)
      : f(flow), samples(of), barrier(threads), rows((of.last - of.first) * flow.networks),
        stride(rounded_up(flow.channels)), head(flow.channels / flow.heads), head_stride(rounded_up(head)),
        length(flow.prefix + flow.tokens), size(threads),
        h((size_t)rows * stride), input(is_gated() ? h.size() : 0), qkv((size_t)rows * rounded_up(3 * flow.channels)),
        attended(h.size()), up((size_t)rows * rounded_up((is_gated() ? 2 : 1) * flow.hidden)),
        scratch(threads, std::vector<float>((size_t)rows * stride + stride + rounded_up(length) +
                                            2 * rounded_up(2 * f.values))) {}

  int count() const { return samples.last - samples.first; }
  bool is_gated() const { return f.depth && f.layers[0].scale; }

  // The row of the whole batch that is row r of this team.
  int network_row(int r) const { return r / count() * f.samples + samples.first + r % count(); }

  Range columns(int total, int rank) const { return share(rounded_up(total), rank, size, lanes); }

  // Row r's keys and values of one head, first of the prefix: keys as blocks of `lanes` positions, (blocks, head, lanes);
  // values (positions, head).
  float* keys(int layer, int r, int number) const {
    const int64_t each = (int64_t)head * rounded_up(length) + (int64_t)head_stride * length;
    const int64_t row = (int64_t)layer * f.samples * f.networks + network_row(r);
    return f.keys_values + (row * f.heads + number) * each;
  }

  // Stores the key and the value of one position, row and head.
  void remember(float* keys, int position, const float* key, const float* value) const {
    float* to = keys + (int64_t)(position / lanes) * head * lanes + position % lanes;
    for (int d = 0; d < head; d++) to[d * lanes] = key[d];
    std::memcpy(keys + (int64_t)head * rounded_up(length) + (int64_t)position * head_stride, value, sizeof(float) * head);
  }

  void read_prefix(int rank);
  void embed(int sample, int t);
  void attend(int layer, int r, int number, int t, float* logits);
  void layer(int index, int t, int rank, float* buffer);
  void read_out(int sample, int t, float* buffer);
  void run(int rank);
};

// Stores the keys and values of the prefix, and the output of the last layer for its last position.
void Work::read_prefix(int rank) {
  const Range part = share(rows, rank, size);
  for (int r = part.first; r < part.last; r++) {
    for (int l = 0; l < f.depth; l++)
      for (int number = 0; number < f.heads; number++) {
        const int64_t row = ((int64_t)l * f.samples * f.networks + network_row(r)) * 2, each = (int64_t)f.prefix * head;
        const float* from = f.prefix_keys_values + (row * f.heads + number) * each;
        for (int p = 0; p < f.prefix; p++)
          remember(keys(l, r, number), p, from + p * head, from + f.heads * each + p * head);
      }
    const float* hidden = f.prefix_hidden + (int64_t)network_row(r) * f.channels;
    std::memcpy(h.data() + (int64_t)r * stride, hidden, sizeof(float) * f.channels);
  }
}

// h = W_in x_t + b_in + position_t + context, in each row of the sample.
void Work::embed(int sample, int t) {
  const float* token = f.x + ((int64_t)(samples.first + sample) * f.tokens + t) * f.values;
  for (int n = 0; n < f.networks; n++) {
    const int r = n * count() + sample;
    float* row = h.data() + (int64_t)r * stride;
    const float* position = f.position + (int64_t)t * f.channels;
    std::memcpy(row, position, sizeof(float) * f.channels);
    if (f.context) {
      const float* context = f.context + (int64_t)network_row(r) * f.context_row + (int64_t)t * f.context_token;
      for (int k = 0; k < f.channels; k++) row[k] += context[k];
    }
    dense(token, f.values, f.proj_in, f.values, f.channels, 1, {0, stride},
          [&](int, int column, Vector out) { store(row + column, load(row + column) + out); });
  }
}

// Stores token t's key and value of one row and head, and attends to all tokens up to t: softmax(q K) V.
void Work::attend(int layer, int r, int number, int t, float* logits) {
  float* q = qkv.data() + (int64_t)r * rounded_up(3 * f.channels) + number * head;
  float *key = q + f.channels, *keys = this->keys(layer, r, number);
  const float *value = q + 2 * f.channels, *values = keys + (int64_t)head * rounded_up(length);
  const int last = f.prefix + t;
  if (f.rotation)
    for (float* vector : {q, key})
      for (int d = 0; d < head; d += 2) {
        const float *turn = f.rotation + (int64_t)last * head + d, even = vector[d], odd = vector[d + 1];
        vector[d] = even * turn[0] - odd * turn[1];
        vector[d + 1] = odd * turn[0] + even * turn[1];
      }
  remember(keys, last, key, value);

  // Logits are to the base 2.
  const float scale = 1.44269504f / std::sqrt((float)head) * (f.query_scale ? f.query_scale[network_row(r)] : 1.0f);
  Vector maximum = spread(-INFINITY);
  for (int block = 0; block <= last / lanes; block++) {
    const float* k = keys + (int64_t)block * head * lanes;
    Vector sums[4] = {};
    int d = 0;
    for (; d + 4 <= head; d += 4)
      for (int i = 0; i < 4; i++) sums[i] += q[d + i] * load(k + (d + i) * lanes);
    for (; d < head; d++) sums[0] += q[d] * load(k + d * lanes);
    Vector out = ((sums[0] + sums[1]) + (sums[2] + sums[3])) * scale;
    if (block == last / lanes)
      for (int i = last % lanes + 1; i < lanes; i++) out[i] = -INFINITY;
    maximum = out > maximum ? out : maximum;
    store(logits + block * lanes, out);
  }
  float largest = maximum[0];
  for (int i = 1; i < lanes; i++) largest = maximum[i] > largest ? maximum[i] : largest;
  Vector total{};
  for (int block = 0; block <= last / lanes; block++) {
    const Vector weight = exp2_of_negative(load(logits + block * lanes) - largest);
    store(logits + block * lanes, weight);
    total += weight;
  }
  const float normaliser = 1.0f / sum(total);
  float* out = attended.data() + (int64_t)r * stride + number * head;
  for (int first = 0; first < head; first += 4 * lanes) {
    const int vectors = (head_stride - first) / lanes < 4 ? (head_stride - first) / lanes : 4;
    Vector sums[2][4] = {};
    for (int j = 0; j <= last; j++)
      for (int v = 0; v < vectors; v++)
        sums[j % 2][v] += logits[j] * load(values + (int64_t)j * head_stride + first + v * lanes);
    for (int v = 0; v < vectors; v++) {
      const Vector value = (sums[0][v] + sums[1][v]) * normaliser;
      const int remaining = head - first - v * lanes;
      std::memcpy(out + first + v * lanes, &value, sizeof(float) * (remaining < lanes ? remaining : lanes));
    }
  }
}

// One transformer layer on token t. A thread computes some columns of every row; threads wait for each other between
// steps.
void Work::layer(int index, int t, int rank, float* buffer) {
  const Layer& w = f.layers[index];
  const int qkv_stride = rounded_up(3 * f.channels), up_stride = rounded_up(f.hidden);
  const Range own = columns(f.channels, rank);
  const auto normalise_rows = [&](const float* weight, const float* bias) {
    for (int r = 0; r < rows; r++)
      layer_norm(h.data() + (int64_t)r * stride, f.channels, weight, bias, buffer + (int64_t)r * stride);
  };
  const auto add_to_h = [&](const float* bias) {
    return [this, bias](int r, int column, Vector out) {
      float* to = h.data() + (int64_t)r * stride + column;
      store(to, load(to) + out + load(bias + column));
    };
  };
  // h becomes change(h, other) in each of this thread's entries.
  const auto change_h = [&](const float* other, int other_stride, const auto& change) {
    for (int r = 0; r < rows; r++)
      for (int k = own.first; k < own.last; k += lanes) {
        float* to = h.data() + (int64_t)r * stride + k;
        store(to, change(load(to), load(other + (int64_t)r * other_stride + k), (int64_t)r * stride + k));
      }
    barrier.wait();
  };
  const int64_t token = (int64_t)t * stride;
  if (w.condition) change_h(w.condition + token, 0, [](Vector to, Vector condition, int64_t) { return to + condition; });
  if (w.scale) {
    normalise_rows(w.scale + token, w.shift + token);
    barrier.wait();
    change_h(buffer, stride, [&](Vector to, Vector normalised, int64_t at) {
      store(input.data() + at, to);
      return normalised;
    });
  }
  normalise_rows(w.norm, w.norm_bias);
  dense(buffer, stride, w.qkv, f.channels, 3 * f.channels, rows, columns(3 * f.channels, rank),
        [&](int r, int column, Vector out) {
          store(qkv.data() + (int64_t)r * qkv_stride + column, out + load(w.qkv_bias + column));
        });
  barrier.wait();
  if (w.query_norm) {
    const Range part = share(rows, rank, size);
    for (int r = part.first; r < part.last; r++) {
      float *query = qkv.data() + (int64_t)r * qkv_stride, *key = query + f.channels;
      layer_norm(query, f.channels, w.query_norm, w.query_norm_bias, query);
      layer_norm(key, f.channels, w.key_norm, w.key_norm_bias, key);
    }
    barrier.wait();
  }
  const Range pairs = share(rows * f.heads, rank, size);
  for (int pair = pairs.first; pair < pairs.last; pair++)
    attend(index, pair / f.heads, pair % f.heads, t, buffer + (int64_t)rows * stride);
  barrier.wait();
  dense(attended.data(), stride, w.proj, f.channels, f.channels, rows, own, add_to_h(w.proj_bias));
  barrier.wait();
  normalise_rows(w.mlp_norm, w.mlp_norm_bias);
  dense(buffer, stride, w.up, f.channels, f.hidden, rows, columns(f.hidden, rank), [&](int r, int column, Vector out) {
    store(up.data() + (int64_t)r * up_stride + column, gelu(out + load(w.up_bias + column)));
  });
  barrier.wait();
  dense(up.data(), up_stride, w.down, f.hidden, f.channels, rows, own, add_to_h(w.down_bias));
  barrier.wait();
  if (!w.scale) return;

  const float *gate = w.gate + token, *gated_gate = w.gated_gate + token;
  change_h(gate, 0, [&](Vector to, Vector factor, int64_t at) { return load(input.data() + at) + factor * to; });
  normalise_rows(w.gated_scale + token, w.gated_shift + token);
  const int both = rounded_up(2 * f.hidden);
  dense(buffer, stride, w.gated_up, f.channels, 2 * f.hidden, rows, columns(2 * f.hidden, rank),
        [&](int r, int column, Vector out) { store(up.data() + (int64_t)r * both + column, out); });
  barrier.wait();
  for (int r = 0; r < rows; r++) {
    float* values = up.data() + (int64_t)r * both;
    const Range part = share(f.hidden, rank, size, lanes);
    for (int k = part.first; k < part.last; k += lanes) {
      const int count = part.last - k < lanes ? part.last - k : lanes;
      Vector value{}, gates{};
      std::memcpy(&value, values + k, sizeof(float) * count);
      std::memcpy(&gates, values + f.hidden + k, sizeof(float) * count);
      value *= silu(gates);
      std::memcpy(values + k, &value, sizeof(float) * count);
    }
  }
  barrier.wait();
  dense(up.data(), both, w.gated_down, f.hidden, f.channels, rows, own, [&](int r, int column, Vector out) {
    float* to = h.data() + (int64_t)r * stride + column;
    store(to, load(to) + load(gated_gate + column) * out);
  });
  barrier.wait();
}

// x_t of a sample from the network's output for the position before, with guidance if the sample has two rows.
void Work::read_out(int sample, int t, float* buffer) {
  const int outputs = f.values * (f.scales + 1), width = rounded_up(outputs);
  float* normalised = buffer + 2 * width;
  for (int n = 0; n < f.networks; n++) {
    const float* row = h.data() + (int64_t)(n * count() + sample) * stride;
    float* out = buffer + n * width;
    if (f.final_norm) {
      rms_norm(row, f.channels, f.final_norm, normalised);
      row = normalised;
    }
    dense(row, stride, f.proj_out, f.channels, outputs, 1, {0, width},
          [&](int, int column, Vector sums) { store(out + column, sums + load(f.out_bias + column)); });
    if (f.soft_clip) {
      for (int k = 0; k < outputs; k++) out[k] = f.soft_clip * std::tanh(out[k] / f.soft_clip);
      for (int c = 0; c < f.values; c++) out[c] = std::log(std::log1p(std::exp(out[c] + 0.541324855f)));
    }
  }
  const int64_t first = ((int64_t)(samples.first + sample) * f.tokens + t) * f.values;
  for (int c = 0; c < f.values; c++) {
    float scale = f.scales ? buffer[c] : 0.0f, shift = buffer[f.scales * f.values + c];
    if (f.networks == 2 && f.by_density) {
      const float other_scale = f.scales ? buffer[width + c] : 0.0f, other_shift = buffer[width + f.scales * f.values + c];
      const float ratio = scale < other_scale ? std::exp(2.0f * (scale - other_scale)) : 1.0f, w = f.weight_scale[t];
      const float precision = 1.0f + w * (1.0f - ratio);
      shift = ((1.0f + w) * shift - w * ratio * other_shift) / precision;
      scale -= 0.5f * std::log(precision);
    } else if (f.networks == 2) {
      if (f.scales) scale += f.weight_scale[t] * (scale - buffer[width + c]);
      shift += f.weight_shift[t] * (shift - buffer[width + f.scales * f.values + c]);
    }
    f.x[first + c] = std::exp(scale) * f.z[first + c] + shift;
    f.log_det[samples.first + sample] += scale;
  }
}

void Work::run(int rank) {
  float* buffer = scratch[rank].data();
  const Range part = share(count(), rank, size);
  const auto enter = [&](int t) {
    for (int s = part.first; s < part.last; s++) embed(s, t);
    barrier.wait();
  };
  int t = f.start;
  if (t == 0 && f.prefix) {
    read_prefix(rank);
    barrier.wait();
    for (int s = part.first; s < part.last; s++) read_out(s, 0, buffer + (int64_t)rows * stride);
    t = 1;
  } else if (t == 0) {  // entry 0 has nothing before it
    for (int s = part.first; s < part.last; s++) {
      const int64_t first = (int64_t)(samples.first + s) * f.tokens * f.values;
      std::memcpy(f.x + first, f.z + first, sizeof(float) * f.values);
    }
    t = 1;
  }
  if (t < f.stop) enter(t - 1);
  for (; t < f.stop; t++) {
    for (int l = 0; l < f.depth; l++) layer(l, t - 1, rank, buffer);
    for (int s = part.first; s < part.last; s++) read_out(s, t, buffer + (int64_t)rows * stride);
    if (t + 1 < f.stop) enter(t);
  }
}

}  // namespace jacobiflow

using namespace jacobiflow;

extern "C" {

int32_t jacobiflow_lanes() { return lanes; }

void jacobiflow_use_openmp(const OpenMP* functions) { openmp = *functions; }

// Packs the panels of a weight.
int32_t jacobiflow_pack(const float* weight, int32_t outputs, int32_t inputs, float* packed, int32_t threads) {
  const int panels = (outputs + panel - 1) / panel;
  try {
    in_threads(threads < panels ? threads : panels, [&](int rank) {
      for (int i = rank; i < panels; i += threads) pack(weight, outputs, inputs, i * panel, packed);
    });
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

// Solves entries [start, stop) of x, after earlier calls with the same `keys_values` solved those before. Returns 0, or 1
// if out of memory or threads: then x is unchanged.
int32_t jacobiflow_tarflow(const RecurrenceArgs* flow) {
  const int per_team = flow->threads / flow->teams;
  try {
    std::vector<std::unique_ptr<Work>> works;
    for (int team = 0; team < flow->teams; team++)
      works.push_back(std::make_unique<Work>(*flow, share(flow->samples, team, flow->teams), per_team));
    in_threads(per_team * flow->teams, [&](int number) { works[number / per_team]->run(number % per_team); });
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}
}
