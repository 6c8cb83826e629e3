// The inverse of a block with a causal transformer, token by token: x_t = exp(s(x_<t)) z_t + u(x_<t).
#pragma once

#include <memory>

#include "attention.h"
#include "norms.h"

namespace jacobiflow {

// Solves the samples of one team of threads, and holds their buffers. A row of the network has `stride` numbers.
template <typename T>
struct TeamWorkspace {
  using S = Simd<T>;
  using Vector = typename S::Vector;
  static constexpr int lanes = S::lanes;

  const TransformerArgs<T>& args;
  Range samples;
  Barrier barrier;
  int rows, stride, head_size, num_threads;
  KeyValueCache<T> cache;
  std::vector<T> h, input, qkv, attended, up;  // `input` of a layer with `scale`
  std::vector<std::vector<T>> scratch;         // of each thread: normalised rows, then logits or outputs

  TeamWorkspace(const TransformerArgs<T>& args, Range samples, int num_threads)
      : args(args), samples(samples), barrier(num_threads), rows(num_samples() * args.rows_per_sample),
        stride(padded<T>(args.width)), head_size(args.width / args.heads), num_threads(num_threads),
        cache(args.keys_values, args.samples * args.rows_per_sample, args.heads, head_size, length()),
        h((size_t)rows * stride), input(is_gated() ? h.size() : 0), qkv((size_t)rows * padded<T>(3 * args.width)),
        attended(h.size()), up((size_t)rows * padded<T>((is_gated() ? 2 : 1) * args.hidden)),
        scratch(num_threads,
                std::vector<T>(h.size() + stride + padded<T>(length()) + 2 * padded<T>(2 * args.token_dim))) {}

  int num_samples() const { return samples.last - samples.first; }
  int length() const { return args.prefix_length + args.tokens; }
  bool is_gated() const { return args.depth && args.layers[0].scale; }

  // Returns the row of the whole batch that is row r of this team.
  int network_row(int r) const { return r / num_samples() * args.samples + samples.first + r % num_samples(); }

  Range columns(int total, int rank) const { return partition(padded<T>(total), rank, num_threads, lanes); }

  void read_prefix(int rank);
  void embed(int sample, int t);
  void attend(int layer, int r, int head, int t, T* logits);
  void layer(int index, int t, int rank, T* buffer);
  void gated_perceptron(const LayerArgs<T>& w, int t, int rank, T* buffer);
  void read_out(int sample, int t, T* buffer);
  void run(int rank);
  void normalise_rows(const T* weight, const T* bias, T* out) const;
  template <typename Change>
  void change_h(int rank, const T* other, int other_stride, const Change& change);
};

// Writes the layer norm of all rows of h. Each thread computes all rows, so that it need not wait for the others.
template <typename T>
void TeamWorkspace<T>::normalise_rows(const T* weight, const T* bias, T* out) const {
  for (int r = 0; r < rows; r++)
    layer_norm(h.data() + (int64_t)r * stride, args.width, weight, bias, out + (int64_t)r * stride);
}

// Replaces h by change(h, other, offset of the entry), with some columns for each thread.
template <typename T>
template <typename Change>
void TeamWorkspace<T>::change_h(int rank, const T* other, int other_stride, const Change& change) {
  const Range own = columns(args.width, rank);
  for (int r = 0; r < rows; r++)
    for (int k = own.first; k < own.last; k += lanes) {
      const int64_t offset = (int64_t)r * stride + k;
      T* to = h.data() + offset;
      S::store(to, change(S::load(to), S::load(other + (int64_t)r * other_stride + k), offset));
    }
  barrier.wait();
}

// Stores the keys and values of the prefix, and the output of the last layer for its last position.
template <typename T>
void TeamWorkspace<T>::read_prefix(int rank) {
  const Range own = partition(rows, rank, num_threads);
  const int64_t size = (int64_t)args.prefix_length * head_size;  // of one head's keys
  for (int r = own.first; r < own.last; r++) {
    for (int l = 0; l < args.depth; l++)
      for (int head = 0; head < args.heads; head++) {
        const int64_t row = ((int64_t)l * args.samples * args.rows_per_sample + network_row(r)) * 2;
        const T *keys = args.prefix_keys_values + (row * args.heads + head) * size, *values = keys + args.heads * size;
        for (int p = 0; p < args.prefix_length; p++)
          cache.store(l, network_row(r), head, p, keys + p * head_size, values + p * head_size);
      }
    const T* hidden = args.prefix_hidden + (int64_t)network_row(r) * args.width;
    std::memcpy(h.data() + (int64_t)r * stride, hidden, sizeof(T) * args.width);
  }
}

// Sets h = proj_in x_t + position_t + context in each row of the sample.
template <typename T>
void TeamWorkspace<T>::embed(int sample, int t) {
  const T* token = args.x + ((int64_t)(samples.first + sample) * args.tokens + t) * args.token_dim;
  for (int n = 0; n < args.rows_per_sample; n++) {
    const int r = n * num_samples() + sample;
    T* row = h.data() + (int64_t)r * stride;
    std::memcpy(row, args.position + (int64_t)t * args.width, sizeof(T) * args.width);
    if (args.context) {
      const T* context = args.context + (int64_t)network_row(r) * args.context_row_stride;
      for (int k = 0; k < args.width; k++) row[k] += context[(int64_t)t * args.context_token_stride + k];
    }
    dense(token, args.token_dim, args.proj_in, args.token_dim, args.width, 1, {0, stride},
          [&](int, int column, Vector out) { S::store(row + column, S::load(row + column) + out); });
  }
}

// Stores token t's key and value of one row and head, and attends to all tokens up to t.
template <typename T>
void TeamWorkspace<T>::attend(int layer, int r, int head, int t, T* logits) {
  T *query = qkv.data() + (int64_t)r * padded<T>(3 * args.width) + head * head_size, *key = query + args.width;
  const int position = args.prefix_length + t, row = network_row(r);
  if (args.rotation)
    for (T* vector : {query, key}) rotate(vector, head_size, args.rotation + (int64_t)position * head_size);
  cache.store(layer, row, head, position, key, query + 2 * args.width);
  const T scale = (args.query_scale ? args.query_scale[row] : T(1)) / std::sqrt((T)head_size);
  cache.attend(layer, row, head, position, query, scale, logits, attended.data() + (int64_t)r * stride + head * head_size);
}

// Runs one layer on token t. A thread computes some columns of every row; threads wait for each other between steps.
template <typename T>
void TeamWorkspace<T>::layer(int index, int t, int rank, T* buffer) {
  const LayerArgs<T>& w = args.layers[index];
  const int qkv_stride = padded<T>(3 * args.width), up_stride = padded<T>(args.hidden);
  const Range own = columns(args.width, rank);
  const int64_t token = (int64_t)t * stride;
  const auto add_to_h = [&](const T* bias) {
    return [this, bias](int r, int column, Vector out) {
      T* to = h.data() + (int64_t)r * stride + column;
      S::store(to, S::load(to) + out + S::load(bias + column));
    };
  };
  if (w.condition)
    change_h(rank, w.condition + token, 0, [](Vector to, Vector condition, int64_t) { return to + condition; });
  if (w.scale) {
    normalise_rows(w.scale + token, w.shift + token, buffer);
    barrier.wait();
    change_h(rank, buffer, stride, [&](Vector to, Vector normalised, int64_t offset) {
      S::store(input.data() + offset, to);
      return normalised;
    });
  }
  normalise_rows(w.norm, w.norm_bias, buffer);
  dense(buffer, stride, w.qkv, args.width, 3 * args.width, rows, columns(3 * args.width, rank),
        [&](int r, int column, Vector out) {
          S::store(qkv.data() + (int64_t)r * qkv_stride + column, out + S::load(w.qkv_bias + column));
        });
  barrier.wait();
  if (w.query_norm) {
    const Range own_rows = partition(rows, rank, num_threads);
    for (int r = own_rows.first; r < own_rows.last; r++) {
      T *query = qkv.data() + (int64_t)r * qkv_stride, *key = query + args.width;
      layer_norm(query, args.width, w.query_norm, w.query_norm_bias, query);
      layer_norm(key, args.width, w.key_norm, w.key_norm_bias, key);
    }
    barrier.wait();
  }
  const Range pairs = partition(rows * args.heads, rank, num_threads);
  for (int pair = pairs.first; pair < pairs.last; pair++)
    attend(index, pair / args.heads, pair % args.heads, t, buffer + (int64_t)rows * stride);
  barrier.wait();
  dense(attended.data(), stride, w.proj, args.width, args.width, rows, own, add_to_h(w.proj_bias));
  barrier.wait();
  normalise_rows(w.mlp_norm, w.mlp_norm_bias, buffer);
  dense(buffer, stride, w.up, args.width, args.hidden, rows, columns(args.hidden, rank),
        [&](int r, int column, Vector out) {
          S::store(up.data() + (int64_t)r * up_stride + column, S::gelu(out + S::load(w.up_bias + column)));
        });
  barrier.wait();
  dense(up.data(), up_stride, w.down, args.hidden, args.width, rows, own, add_to_h(w.down_bias));
  barrier.wait();
  if (w.scale) gated_perceptron(w, t, rank, buffer);
}

// Ends a layer of Prose: h = input + gate * h, and then h += gated_gate * down(value * silu(gates)).
template <typename T>
void TeamWorkspace<T>::gated_perceptron(const LayerArgs<T>& w, int t, int rank, T* buffer) {
  const int64_t token = (int64_t)t * stride;
  change_h(rank, w.gate + token, 0,
           [&](Vector to, Vector gate, int64_t offset) { return S::load(input.data() + offset) + gate * to; });
  normalise_rows(w.gated_scale + token, w.gated_shift + token, buffer);
  const int up_stride = padded<T>(2 * args.hidden);
  dense(buffer, stride, w.gated_up, args.width, 2 * args.hidden, rows, columns(2 * args.hidden, rank),
        [&](int r, int column, Vector out) { S::store(up.data() + (int64_t)r * up_stride + column, out); });
  barrier.wait();
  const Range own = partition(args.hidden, rank, num_threads, lanes);
  for (int r = 0; r < rows; r++) {
    T* values = up.data() + (int64_t)r * up_stride;
    for (int k = own.first; k < own.last; k += lanes) {
      const int size = sizeof(T) * std::min(own.last - k, lanes);
      Vector value{}, gates{};
      std::memcpy(&value, values + k, size);
      std::memcpy(&gates, values + args.hidden + k, size);
      value *= S::silu(gates);
      std::memcpy(values + k, &value, size);
    }
  }
  barrier.wait();
  const T* gate = w.gated_gate + token;
  dense(up.data(), up_stride, w.gated_down, args.hidden, args.width, rows, columns(args.width, rank),
        [&](int r, int column, Vector out) {
          T* to = h.data() + (int64_t)r * stride + column;
          S::store(to, S::load(to) + S::load(gate + column) * out);
        });
  barrier.wait();
}

// Solves x_t of a sample from the network's output at the position before, with guidance if the sample has two rows.
template <typename T>
void TeamWorkspace<T>::read_out(int sample, int t, T* buffer) {
  const int outputs = args.token_dim * (args.has_scale + 1), out_stride = padded<T>(outputs);
  T* normalised = buffer + 2 * out_stride;
  for (int n = 0; n < args.rows_per_sample; n++) {
    const T* row = h.data() + (int64_t)(n * num_samples() + sample) * stride;
    T* out = buffer + n * out_stride;
    if (args.final_norm) {
      rms_norm(row, args.width, args.final_norm, normalised);
      row = normalised;
    }
    dense(row, stride, args.proj_out, args.width, outputs, 1, {0, out_stride},
          [&](int, int column, Vector sums) { S::store(out + column, sums + S::load(args.out_bias + column)); });
    if (const T clip = (T)args.soft_clip) {
      for (int k = 0; k < outputs; k++) out[k] = clip * std::tanh(out[k] / clip);
      for (int c = 0; c < args.token_dim; c++) {
        const T scale = out[c] + T(0.54132485461291810898);
        out[c] = std::log(scale > T(40) ? scale : std::log1p(std::exp(scale)));  // softplus; the exponential could overflow
      }
    }
  }
  const T *scales = buffer, *shifts = buffer + args.has_scale * args.token_dim;
  const int64_t first = ((int64_t)(samples.first + sample) * args.tokens + t) * args.token_dim;
  for (int c = 0; c < args.token_dim; c++) {
    T scale = args.has_scale ? scales[c] : T(0), shift = shifts[c];
    if (args.rows_per_sample == 2) {
      const T other_scale = args.has_scale ? scales[out_stride + c] : T(0), other_shift = shifts[out_stride + c];
      const T w = args.guidance_scale[t];
      if (args.is_by_density) {
        const T ratio = scale < other_scale ? std::exp(T(2) * (scale - other_scale)) : T(1);
        const T precision = T(1) + w * (T(1) - ratio);
        shift = ((T(1) + w) * shift - w * ratio * other_shift) / precision;
        scale -= T(0.5) * std::log(precision);
      } else {
        scale += w * (scale - other_scale);
        shift += args.guidance_shift[t] * (shift - other_shift);
      }
    }
    args.x[first + c] = std::exp(scale) * args.z[first + c] + shift;
    args.log_det[samples.first + sample] += scale;
  }
}

// Solves tokens [start, stop) of some samples of the team.
template <typename T>
void TeamWorkspace<T>::run(int rank) {
  T* buffer = scratch[rank].data();
  const Range own = partition(num_samples(), rank, num_threads);
  const auto embed_own = [&](int t) {
    for (int s = own.first; s < own.last; s++) embed(s, t);
    barrier.wait();
  };
  int t = args.start;
  if (t == 0 && args.prefix_length) {
    read_prefix(rank);
    barrier.wait();
    for (int s = own.first; s < own.last; s++) read_out(s, 0, buffer + (int64_t)rows * stride);
    t = 1;
  } else if (t == 0) {  // entry 0 has nothing before it
    for (int s = own.first; s < own.last; s++) {
      const int64_t first = (int64_t)(samples.first + s) * args.tokens * args.token_dim;
      std::memcpy(args.x + first, args.z + first, sizeof(T) * args.token_dim);
    }
    t = 1;
  }
  if (t < args.stop) embed_own(t - 1);
  for (; t < args.stop; t++) {
    for (int l = 0; l < args.depth; l++) layer(l, t - 1, rank, buffer);
    for (int s = own.first; s < own.last; s++) read_out(s, t, buffer + (int64_t)rows * stride);
    if (t + 1 < args.stop) embed_own(t);
  }
}

// Solves tokens [start, stop) of x. Earlier calls with the same `keys_values` have solved those before.
template <typename T>
void solve_transformer(const TransformerArgs<T>& args) {
  const int per_team = args.num_threads / args.num_teams;
  std::vector<std::unique_ptr<TeamWorkspace<T>>> teams;
  for (int team = 0; team < args.num_teams; team++)
    teams.push_back(std::make_unique<TeamWorkspace<T>>(args, partition(args.samples, team, args.num_teams), per_team));
  in_threads(per_team * args.num_teams, [&](int number) { teams[number / per_team]->run(number % per_team); });
}

}  // namespace jacobiflow
