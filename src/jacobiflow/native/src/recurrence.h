// The recurrence of a block with a causal transformer, token by token: x_t = exp(s(x_<t)) z_t + u(x_<t).
#pragma once

#include <memory>

#include "weights.h"

namespace jacobiflow {

template <typename T>
void layer_norm(const T* x, int size, const T* weight, const T* bias, T* out) {
  using L = Lanes<T>;
  typename L::Vector part{};
  const int whole = size / L::count * L::count;
  for (int k = 0; k < whole; k += L::count) part += L::load(x + k);
  T mean = L::sum(part);
  for (int k = whole; k < size; k++) mean += x[k];
  mean /= size;
  part = typename L::Vector{};
  for (int k = 0; k < whole; k += L::count) part += (L::load(x + k) - mean) * (L::load(x + k) - mean);
  T variance = L::sum(part);
  for (int k = whole; k < size; k++) variance += (x[k] - mean) * (x[k] - mean);
  const T scale = 1 / std::sqrt(variance / size + T(1e-5));
  for (int k = 0; k < whole; k += L::count)
    L::store(out + k, (L::load(x + k) - mean) * scale * L::load(weight + k) + L::load(bias + k));
  for (int k = whole; k < size; k++) out[k] = (x[k] - mean) * scale * weight[k] + bias[k];
}

template <typename T>
void rms_norm(const T* x, int size, const T* weight, T* out) {
  using L = Lanes<T>;
  typename L::Vector part{};
  const int whole = size / L::count * L::count;
  for (int k = 0; k < whole; k += L::count) part += L::load(x + k) * L::load(x + k);
  T squares = L::sum(part);
  for (int k = whole; k < size; k++) squares += x[k] * x[k];
  const T scale = 1 / std::sqrt(squares / size + T(1e-6));
  for (int k = 0; k < whole; k += L::count) L::store(out + k, L::load(x + k) * scale * L::load(weight + k));
  for (int k = whole; k < size; k++) out[k] = x[k] * scale * weight[k];
}

// The rows of one team of threads, and their buffers; each thread has a `scratch` buffer.
template <typename T>
struct TeamWorkspace {
  using L = Lanes<T>;
  using Vector = typename L::Vector;
  static constexpr int count = L::count;

  const RecurrenceArgs<T>& f;
  Range samples;
  Barrier barrier;
  int rows, stride, head, head_stride, length, size;
  std::vector<T> h, input, qkv, attended, up;  // `input` of a layer with `scale`
  std::vector<std::vector<T>> scratch;  // of each thread: normalised rows, and then logits or outputs

  TeamWorkspace(const RecurrenceArgs<T>& flow, Range of, int threads)
      : f(flow), samples(of), barrier(threads), rows((of.last - of.first) * flow.networks),
        stride(padded<T>(flow.channels)), head(flow.channels / flow.heads), head_stride(padded<T>(head)),
        length(flow.prefix + flow.tokens), size(threads),
        h((size_t)rows * stride), input(is_gated() ? h.size() : 0), qkv((size_t)rows * padded<T>(3 * flow.channels)),
        attended(h.size()), up((size_t)rows * padded<T>((is_gated() ? 2 : 1) * flow.hidden)),
        scratch(threads, std::vector<T>((size_t)rows * stride + stride + padded<T>(length) +
                                            2 * padded<T>(2 * f.values))) {}

  int num_samples() const { return samples.last - samples.first; }
  bool is_gated() const { return f.depth && f.layers[0].scale; }

  // The row of the whole batch that is row r of this team.
  int network_row(int r) const { return r / num_samples() * f.samples + samples.first + r % num_samples(); }

  Range columns(int total, int rank) const { return share(padded<T>(total), rank, size, count); }

  // Row r's keys and values of one head, first of the prefix: keys as blocks of `count` positions, (blocks, head, count);
  // values (positions, head).
  T* keys(int layer, int r, int number) const {
    const int64_t each = (int64_t)head * padded<T>(length) + (int64_t)head_stride * length;
    const int64_t row = (int64_t)layer * f.samples * f.networks + network_row(r);
    return f.keys_values + (row * f.heads + number) * each;
  }

  // Stores the key and the value of one position, row and head.
  void remember(T* keys, int position, const T* key, const T* value) const {
    T* to = keys + (int64_t)(position / count) * head * count + position % count;
    for (int d = 0; d < head; d++) to[d * count] = key[d];
    std::memcpy(keys + (int64_t)head * padded<T>(length) + (int64_t)position * head_stride, value, sizeof(T) * head);
  }

  void read_prefix(int rank);
  void embed(int sample, int t);
  void attend(int layer, int r, int number, int t, T* logits);
  void layer(int index, int t, int rank, T* buffer);
  void read_out(int sample, int t, T* buffer);
  void run(int rank);
};

// Stores the keys and values of the prefix, and the output of the last layer for its last position.
template <typename T>
void TeamWorkspace<T>::read_prefix(int rank) {
  const Range part = share(rows, rank, size);
  for (int r = part.first; r < part.last; r++) {
    for (int l = 0; l < f.depth; l++)
      for (int number = 0; number < f.heads; number++) {
        const int64_t row = ((int64_t)l * f.samples * f.networks + network_row(r)) * 2, each = (int64_t)f.prefix * head;
        const T* from = f.prefix_keys_values + (row * f.heads + number) * each;
        for (int p = 0; p < f.prefix; p++)
          remember(keys(l, r, number), p, from + p * head, from + f.heads * each + p * head);
      }
    const T* hidden = f.prefix_hidden + (int64_t)network_row(r) * f.channels;
    std::memcpy(h.data() + (int64_t)r * stride, hidden, sizeof(T) * f.channels);
  }
}

// h = W_in x_t + b_in + position_t + context, in each row of the sample.
template <typename T>
void TeamWorkspace<T>::embed(int sample, int t) {
  const T* token = f.x + ((int64_t)(samples.first + sample) * f.tokens + t) * f.values;
  for (int n = 0; n < f.networks; n++) {
    const int r = n * num_samples() + sample;
    T* row = h.data() + (int64_t)r * stride;
    const T* position = f.position + (int64_t)t * f.channels;
    std::memcpy(row, position, sizeof(T) * f.channels);
    if (f.context) {
      const T* context = f.context + (int64_t)network_row(r) * f.context_row + (int64_t)t * f.context_token;
      for (int k = 0; k < f.channels; k++) row[k] += context[k];
    }
    dense(token, f.values, f.proj_in, f.values, f.channels, 1, {0, stride},
          [&](int, int column, Vector out) { L::store(row + column, L::load(row + column) + out); });
  }
}

// Stores token t's key and value of one row and head, and attends to all tokens up to t: softmax(q K) V.
template <typename T>
void TeamWorkspace<T>::attend(int layer, int r, int number, int t, T* logits) {
  T* q = qkv.data() + (int64_t)r * padded<T>(3 * f.channels) + number * head;
  T *key = q + f.channels, *keys = this->keys(layer, r, number);
  const T *value = q + 2 * f.channels, *values = keys + (int64_t)head * padded<T>(length);
  const int last = f.prefix + t;
  if (f.rotation)
    for (T* vector : {q, key})
      for (int d = 0; d < head; d += 2) {
        const T *turn = f.rotation + (int64_t)last * head + d, even = vector[d], odd = vector[d + 1];
        vector[d] = even * turn[0] - odd * turn[1];
        vector[d + 1] = odd * turn[0] + even * turn[1];
      }
  remember(keys, last, key, value);

  // Logits are to the base 2.
  const T scale = T(1.44269504088896340736) / std::sqrt((T)head) * (f.query_scale ? f.query_scale[network_row(r)] : T(1));
  Vector maximum = L::spread(-L::infinity);
  for (int block = 0; block <= last / count; block++) {
    const T* k = keys + (int64_t)block * head * count;
    Vector sums[4] = {};
    int d = 0;
    for (; d + 4 <= head; d += 4)
      for (int i = 0; i < 4; i++) sums[i] += q[d + i] * L::load(k + (d + i) * count);
    for (; d < head; d++) sums[0] += q[d] * L::load(k + d * count);
    Vector out = ((sums[0] + sums[1]) + (sums[2] + sums[3])) * scale;
    if (block == last / count)
      for (int i = last % count + 1; i < count; i++) out[i] = -L::infinity;
    maximum = out > maximum ? out : maximum;
    L::store(logits + block * count, out);
  }
  T largest = maximum[0];
  for (int i = 1; i < count; i++) largest = maximum[i] > largest ? maximum[i] : largest;
  Vector total{};
  for (int block = 0; block <= last / count; block++) {
    const Vector weight = L::exp2_of_negative(L::load(logits + block * count) - largest);
    L::store(logits + block * count, weight);
    total += weight;
  }
  const T normaliser = T(1) / L::sum(total);
  T* out = attended.data() + (int64_t)r * stride + number * head;
  for (int first = 0; first < head; first += 4 * count) {
    const int vectors = (head_stride - first) / count < 4 ? (head_stride - first) / count : 4;
    Vector sums[2][4] = {};
    for (int j = 0; j <= last; j++)
      for (int v = 0; v < vectors; v++)
        sums[j % 2][v] += logits[j] * L::load(values + (int64_t)j * head_stride + first + v * count);
    for (int v = 0; v < vectors; v++) {
      const Vector value = (sums[0][v] + sums[1][v]) * normaliser;
      const int remaining = head - first - v * count;
      std::memcpy(out + first + v * count, &value, sizeof(T) * (remaining < count ? remaining : count));
    }
  }
}

// One transformer layer on token t. A thread computes some columns of every row; threads wait for each other between
// steps.
template <typename T>
void TeamWorkspace<T>::layer(int index, int t, int rank, T* buffer) {
  const LayerArgs<T>& w = f.layers[index];
  const int qkv_stride = padded<T>(3 * f.channels), up_stride = padded<T>(f.hidden);
  const Range own = columns(f.channels, rank);
  const auto normalise_rows = [&](const T* weight, const T* bias) {
    for (int r = 0; r < rows; r++)
      layer_norm(h.data() + (int64_t)r * stride, f.channels, weight, bias, buffer + (int64_t)r * stride);
  };
  const auto add_to_h = [&](const T* bias) {
    return [this, bias](int r, int column, Vector out) {
      T* to = h.data() + (int64_t)r * stride + column;
      L::store(to, L::load(to) + out + L::load(bias + column));
    };
  };
  // h becomes change(h, other) in each of this thread's entries.
  const auto change_h = [&](const T* other, int other_stride, const auto& change) {
    for (int r = 0; r < rows; r++)
      for (int k = own.first; k < own.last; k += count) {
        T* to = h.data() + (int64_t)r * stride + k;
        L::store(to, change(L::load(to), L::load(other + (int64_t)r * other_stride + k), (int64_t)r * stride + k));
      }
    barrier.wait();
  };
  const int64_t token = (int64_t)t * stride;
  if (w.condition) change_h(w.condition + token, 0, [](Vector to, Vector condition, int64_t) { return to + condition; });
  if (w.scale) {
    normalise_rows(w.scale + token, w.shift + token);
    barrier.wait();
    change_h(buffer, stride, [&](Vector to, Vector normalised, int64_t at) {
      L::store(input.data() + at, to);
      return normalised;
    });
  }
  normalise_rows(w.norm, w.norm_bias);
  dense(buffer, stride, w.qkv, f.channels, 3 * f.channels, rows, columns(3 * f.channels, rank),
        [&](int r, int column, Vector out) {
          L::store(qkv.data() + (int64_t)r * qkv_stride + column, out + L::load(w.qkv_bias + column));
        });
  barrier.wait();
  if (w.query_norm) {
    const Range part = share(rows, rank, size);
    for (int r = part.first; r < part.last; r++) {
      T *query = qkv.data() + (int64_t)r * qkv_stride, *key = query + f.channels;
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
    L::store(up.data() + (int64_t)r * up_stride + column, L::gelu(out + L::load(w.up_bias + column)));
  });
  barrier.wait();
  dense(up.data(), up_stride, w.down, f.hidden, f.channels, rows, own, add_to_h(w.down_bias));
  barrier.wait();
  if (!w.scale) return;

  const T *gate = w.gate + token, *gated_gate = w.gated_gate + token;
  change_h(gate, 0, [&](Vector to, Vector factor, int64_t at) { return L::load(input.data() + at) + factor * to; });
  normalise_rows(w.gated_scale + token, w.gated_shift + token);
  const int both = padded<T>(2 * f.hidden);
  dense(buffer, stride, w.gated_up, f.channels, 2 * f.hidden, rows, columns(2 * f.hidden, rank),
        [&](int r, int column, Vector out) { L::store(up.data() + (int64_t)r * both + column, out); });
  barrier.wait();
  for (int r = 0; r < rows; r++) {
    T* values = up.data() + (int64_t)r * both;
    const Range part = share(f.hidden, rank, size, count);
    for (int k = part.first; k < part.last; k += count) {
      const int rest = std::min(part.last - k, count);
      Vector value{}, gates{};
      std::memcpy(&value, values + k, sizeof(T) * rest);
      std::memcpy(&gates, values + f.hidden + k, sizeof(T) * rest);
      value *= L::silu(gates);
      std::memcpy(values + k, &value, sizeof(T) * rest);
    }
  }
  barrier.wait();
  dense(up.data(), both, w.gated_down, f.hidden, f.channels, rows, own, [&](int r, int column, Vector out) {
    T* to = h.data() + (int64_t)r * stride + column;
    L::store(to, L::load(to) + L::load(gated_gate + column) * out);
  });
  barrier.wait();
}

// x_t of a sample from the network's output for the position before, with guidance if the sample has two rows.
template <typename T>
void TeamWorkspace<T>::read_out(int sample, int t, T* buffer) {
  const int outputs = f.values * (f.scales + 1), width = padded<T>(outputs);
  T* normalised = buffer + 2 * width;
  for (int n = 0; n < f.networks; n++) {
    const T* row = h.data() + (int64_t)(n * num_samples() + sample) * stride;
    T* out = buffer + n * width;
    if (f.final_norm) {
      rms_norm(row, f.channels, f.final_norm, normalised);
      row = normalised;
    }
    dense(row, stride, f.proj_out, f.channels, outputs, 1, {0, width},
          [&](int, int column, Vector sums) { L::store(out + column, sums + L::load(f.out_bias + column)); });
    if (const T clip = (T)f.soft_clip) {
      for (int k = 0; k < outputs; k++) out[k] = clip * std::tanh(out[k] / clip);
      for (int c = 0; c < f.values; c++) out[c] = std::log(std::log1p(std::exp(out[c] + T(0.54132485461291810898))));
    }
  }
  const int64_t first = ((int64_t)(samples.first + sample) * f.tokens + t) * f.values;
  for (int c = 0; c < f.values; c++) {
    T scale = f.scales ? buffer[c] : T(0), shift = buffer[f.scales * f.values + c];
    if (f.networks == 2 && f.by_density) {
      const T other_scale = f.scales ? buffer[width + c] : T(0), other_shift = buffer[width + f.scales * f.values + c];
      const T ratio = scale < other_scale ? std::exp(T(2) * (scale - other_scale)) : T(1), w = f.weight_scale[t];
      const T precision = T(1) + w * (T(1) - ratio);
      shift = ((T(1) + w) * shift - w * ratio * other_shift) / precision;
      scale -= T(0.5) * std::log(precision);
    } else if (f.networks == 2) {
      if (f.scales) scale += f.weight_scale[t] * (scale - buffer[width + c]);
      shift += f.weight_shift[t] * (shift - buffer[width + f.scales * f.values + c]);
    }
    f.x[first + c] = std::exp(scale) * f.z[first + c] + shift;
    f.log_det[samples.first + sample] += scale;
  }
}

template <typename T>
void TeamWorkspace<T>::run(int rank) {
  T* buffer = scratch[rank].data();
  const Range part = share(num_samples(), rank, size);
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
      std::memcpy(f.x + first, f.z + first, sizeof(T) * f.values);
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

// Solves entries [start, stop) of x, after earlier calls with the same `keys_values` solved those before.
template <typename T>
void solve_recurrence(const RecurrenceArgs<T>& flow) {
  const int per_team = flow.threads / flow.teams;
  std::vector<std::unique_ptr<TeamWorkspace<T>>> teams;
  for (int team = 0; team < flow.teams; team++)
    teams.push_back(std::make_unique<TeamWorkspace<T>>(flow, share(flow.samples, team, flow.teams), per_team));
  in_threads(per_team * flow.teams, [&](int number) { teams[number / per_team]->run(number % per_team); });
}

}  // namespace jacobiflow
