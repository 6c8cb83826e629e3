// The recurrence of a TarFlow block, token by token: x_t = exp(s(x_<t)) z_t + u(x_<t), by a causal transformer.
#include <exception>
#include <memory>

#include "simd.h"

namespace jacobiflow {

struct Layer {
  const float *norm, *norm_bias, *qkv, *qkv_bias, *proj, *proj_bias;
  const float *mlp_norm, *mlp_norm_bias, *up, *up_bias, *down, *down_bias;
};

// z and x are (samples, tokens, values). The network has `networks` rows per sample: first those with labels, of all
// samples, then the unconditional ones. A `*_bias` is as long as the packed columns of its weight. `keys_values` is the
// memory of `attend`, and lives as long as calls go on with the same x.
struct TarFlow {
  const float *z, *position, *classes, *query_scale, *proj_in, *proj_out, *out_bias, *weight_scale, *weight_shift;
  const Layer* layers;
  float *x, *keys_values;
  int32_t samples, networks, tokens, values, channels, hidden, heads, depth, scales, threads, teams, start, stop;
};

// The rows of one team of threads, and their buffers; each thread has a `scratch` buffer.
struct Work {
  const TarFlow& f;
  Range samples;
  Barrier barrier;
  int rows, stride, head, head_stride, size;
  std::vector<float> h, qkv, attended, up;
  std::vector<std::vector<float>> scratch;  // of each thread: normalised rows, and then logits or outputs

  Work(const TarFlow& flow, Range of, int threads)
      : f(flow), samples(of), barrier(threads), rows((of.last - of.first) * flow.networks),
        stride(rounded_up(flow.channels)), head(flow.channels / flow.heads), head_stride(rounded_up(head)), size(threads),
        h((size_t)rows * stride), qkv((size_t)rows * rounded_up(3 * flow.channels)), attended((size_t)rows * stride),
        up((size_t)rows * rounded_up(flow.hidden)),
        scratch(threads, std::vector<float>((size_t)rows * stride + rounded_up(f.tokens) + 2 * rounded_up(2 * f.values))) {}

  int count() const { return samples.last - samples.first; }

  // The row of the whole batch that is row r of this team.
  int network_row(int r) const { return r / count() * f.samples + samples.first + r % count(); }

  Range columns(int total, int rank) const { return share(rounded_up(total), rank, size, lanes); }

  // Row r's keys and values of one head: keys as blocks of `lanes` tokens, (blocks, head, lanes); values (tokens, head).
  float* keys(int layer, int r, int number) const {
    const int64_t each = (int64_t)head * rounded_up(f.tokens) + (int64_t)head_stride * f.tokens;
    const int64_t row = (int64_t)layer * f.samples * f.networks + network_row(r);
    return f.keys_values + (row * f.heads + number) * each;
  }

  void embed(int sample, int t);
  void attend(int layer, int r, int number, int t, float* logits);
  void layer(int index, int t, int rank, float* buffer);
  void read_out(int sample, int t, float* buffer);
  void run(int rank);
};

// h = W_in x_t + b_in + position_t + class, in each row of the sample.
void Work::embed(int sample, int t) {
  const float* token = f.x + ((int64_t)(samples.first + sample) * f.tokens + t) * f.values;
  for (int n = 0; n < f.networks; n++) {
    const int r = n * count() + sample;
    float* row = h.data() + (int64_t)r * stride;
    const float* position = f.position + (int64_t)t * f.channels;
    std::memcpy(row, position, sizeof(float) * f.channels);
    if (f.classes) {
      const float* label = f.classes + (int64_t)network_row(r) * f.channels;
      for (int k = 0; k < f.channels; k++) row[k] += label[k];
    }
    dense(token, f.values, f.proj_in, f.values, f.channels, 1, {0, stride},
          [&](int, int column, Vector out) { store(row + column, load(row + column) + out); });
  }
}

// Stores token t's key and value of one row and head, and attends to all tokens up to t: softmax(q K) V.
void Work::attend(int layer, int r, int number, int t, float* logits) {
  const float* q = qkv.data() + (int64_t)r * rounded_up(3 * f.channels) + number * head;
  const float *new_key = q + f.channels, *new_value = q + 2 * f.channels;
  float *keys = this->keys(layer, r, number), *values = keys + (int64_t)head * rounded_up(f.tokens);
  float* key = keys + (int64_t)(t / lanes) * head * lanes + t % lanes;
  for (int d = 0; d < head; d++) key[d * lanes] = new_key[d];
  std::memcpy(values + (int64_t)t * head_stride, new_value, sizeof(float) * head);

  // Logits are to the base 2.
  const float scale = 1.44269504f / std::sqrt((float)head) * (f.query_scale ? f.query_scale[network_row(r)] : 1.0f);
  Vector maximum = spread(-INFINITY);
  for (int block = 0; block <= t / lanes; block++) {
    const float* k = keys + (int64_t)block * head * lanes;
    Vector sums[4] = {};
    int d = 0;
    for (; d + 4 <= head; d += 4)
      for (int i = 0; i < 4; i++) sums[i] += q[d + i] * load(k + (d + i) * lanes);
    for (; d < head; d++) sums[0] += q[d] * load(k + d * lanes);
    Vector out = ((sums[0] + sums[1]) + (sums[2] + sums[3])) * scale;
    if (block == t / lanes)
      for (int i = t % lanes + 1; i < lanes; i++) out[i] = -INFINITY;
    maximum = out > maximum ? out : maximum;
    store(logits + block * lanes, out);
  }
  float largest = maximum[0];
  for (int i = 1; i < lanes; i++) largest = maximum[i] > largest ? maximum[i] : largest;
  Vector total{};
  for (int block = 0; block <= t / lanes; block++) {
    const Vector weight = exp2_of_negative(load(logits + block * lanes) - largest);
    store(logits + block * lanes, weight);
    total += weight;
  }
  const float normaliser = 1.0f / sum(total);
  float* out = attended.data() + (int64_t)r * stride + number * head;
  for (int first = 0; first < head; first += 4 * lanes) {
    const int vectors = (head_stride - first) / lanes < 4 ? (head_stride - first) / lanes : 4;
    Vector sums[2][4] = {};
    for (int j = 0; j <= t; j++)
      for (int v = 0; v < vectors; v++)
        sums[j % 2][v] += logits[j] * load(values + (int64_t)j * head_stride + first + v * lanes);
    for (int v = 0; v < vectors; v++) {
      const Vector value = (sums[0][v] + sums[1][v]) * normaliser;
      const int remaining = head - first - v * lanes;
      std::memcpy(out + first + v * lanes, &value, sizeof(float) * (remaining < lanes ? remaining : lanes));
    }
  }
}

// One transformer layer on token t: attention and a perceptron, each added to its input. A thread computes some columns
// of every row; threads wait for each other between steps.
void Work::layer(int index, int t, int rank, float* buffer) {
  const Layer& w = f.layers[index];
  const int qkv_stride = rounded_up(3 * f.channels), up_stride = rounded_up(f.hidden);
  const auto add_to_h = [&](const float* bias) {
    return [this, bias](int r, int column, Vector out) {
      float* to = h.data() + (int64_t)r * stride + column;
      store(to, load(to) + out + load(bias + column));
    };
  };
  for (int r = 0; r < rows; r++)
    layer_norm(h.data() + (int64_t)r * stride, f.channels, w.norm, w.norm_bias, buffer + (int64_t)r * stride);
  dense(buffer, stride, w.qkv, f.channels, 3 * f.channels, rows, columns(3 * f.channels, rank),
        [&](int r, int column, Vector out) {
          store(qkv.data() + (int64_t)r * qkv_stride + column, out + load(w.qkv_bias + column));
        });
  barrier.wait();
  const Range pairs = share(rows * f.heads, rank, size);
  for (int pair = pairs.first; pair < pairs.last; pair++)
    attend(index, pair / f.heads, pair % f.heads, t, buffer + (int64_t)rows * stride);
  barrier.wait();
  dense(attended.data(), stride, w.proj, f.channels, f.channels, rows, columns(f.channels, rank),
        add_to_h(w.proj_bias));
  barrier.wait();
  for (int r = 0; r < rows; r++)
    layer_norm(h.data() + (int64_t)r * stride, f.channels, w.mlp_norm, w.mlp_norm_bias, buffer + (int64_t)r * stride);
  dense(buffer, stride, w.up, f.channels, f.hidden, rows, columns(f.hidden, rank), [&](int r, int column, Vector out) {
    store(up.data() + (int64_t)r * up_stride + column, gelu(out + load(w.up_bias + column)));
  });
  barrier.wait();
  dense(up.data(), up_stride, w.down, f.hidden, f.channels, rows, columns(f.channels, rank), add_to_h(w.down_bias));
  barrier.wait();
}

// x_t of a sample from the network's output for token t-1, with guidance if the sample has two rows.
void Work::read_out(int sample, int t, float* buffer) {
  const int outputs = f.values * (f.scales + 1), width = rounded_up(outputs);
  for (int n = 0; n < f.networks; n++)
    dense(h.data() + (int64_t)(n * count() + sample) * stride, stride, f.proj_out, f.channels, outputs, 1, {0, width},
          [&](int, int column, Vector out) { store(buffer + n * width + column, out + load(f.out_bias + column)); });
  const int64_t first = ((int64_t)(samples.first + sample) * f.tokens + t) * f.values;
  for (int c = 0; c < f.values; c++) {
    float scale = f.scales ? buffer[c] : 0.0f, shift = buffer[f.scales * f.values + c];
    if (f.networks == 2) {
      if (f.scales) scale += f.weight_scale[t] * (scale - buffer[width + c]);
      shift += f.weight_shift[t] * (shift - buffer[width + f.scales * f.values + c]);
    }
    f.x[first + c] = std::exp(scale) * f.z[first + c] + shift;
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
  if (t == 0) {  // entry 0 has no token before it
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
int32_t jacobiflow_tarflow(const TarFlow* flow) {
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
