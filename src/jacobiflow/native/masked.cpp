// Chains of masked autoregressive transforms, in both directions, exact to rounding: tiles of rows go through all transforms
// and all their steps without leaving the cache. Rows lie in vector lanes. Units of a layer are in the order of the steps
// before which they can be computed, so that each is computed once.
#include <algorithm>
#include <atomic>
#include <exception>
#include <new>

#include "lanes.h"
#include "team.h"

namespace jacobiflow {

constexpr int block_steps = 32;  // after which what earlier features add to later units comes by one matrix product
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int registers = 24;  // for sums, of 32
#else
constexpr int registers = 12;  // of 16
#endif

enum class Kind : int32_t { linear, activation, sum, add_context, gate_context, extrapolation };

enum class Function : int32_t { identity, relu, leaky_relu, elu, selu, tanh, sigmoid, silu, gelu, gelu_tanh, softplus };

// One value of a network, of earlier ones. Value 0 is the network's input.
struct Operation {
  Kind kind;
  int32_t source, other;        // values
  int32_t units;                // of the value that this gives
  int32_t weight, bias, mask;   // which of the tensors of the call; -1 for none
  int32_t mask_bytes;           // of an entry: of a bool, float or double
  Function function;            // of an activation, or of what a layer gives
  int32_t is_kept;              // whether later steps read it
  double first, second;         // settings of the function
  const int32_t *rows, *known;  // (units): where they are in the weight; (steps): how many each step can read
};

enum class Elementwise : int32_t {
  permutation, affine, soft_clipped_affine, softplus_affine, sigmoid_affine, clamped_affine, log_affine,
  rational_quadratic, rational_linear
};

enum class Ends : int32_t { fixed, free, circular };

// x -> y, feature by feature, with parameters that a masked network gives of the features of earlier steps.
struct Transform {
  Elementwise kind;
  int32_t features, steps, parameters, operation_count;
  int32_t context, context_start;  // how many columns of the network's input are the context, and which is the first
  int32_t first_tensor;            // from which its operations count theirs
  int32_t scale_stride, shift_stride;  // of the two tensors of `affine`: 0 for one number, 1 for one for each feature
  int32_t bins;
  Ends ends;                       // of a spline: the derivatives at its ends
  int32_t is_soft_clipped, has_tails, is_circular;
  int32_t is_reversed;             // whether the chain has its inverse
  double first, second;            // settings of affine transforms
  double low, high, least_width, least_height, least_slope, end_slope, factor, gap, clip;  // of splines
  const Operation* operations;
  const int32_t *order, *starts;   // (features): sorted by step; (steps + 1): where each step starts in it
  const int32_t *input_rows, *input_known;  // as `rows` and `known`, of value 0
};

struct Call {
  const Transform* transforms;
  const void* const* tensors;
  const void *in, *context;
  void *out, *log_det;              // (rows, features); (rows,), or (rows, features) if it is by feature, or null
  uint8_t* failed;                  // (rows): 1 for those that are left to the library
  int64_t rows, in_stride, context_stride;  // strides of 0: the same row for all
  int32_t count, features, context_features, is_inverse, is_by_feature, threads;
};

template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t size) : data_(static_cast<T*>(::operator new(sizeof(T) * (size + 1), alignment))) {}
  Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Buffer(const Buffer&) = delete;
  ~Buffer() { ::operator delete(data_, alignment); }
  T* get() const { return data_; }

 private:
  static constexpr std::align_val_t alignment{64};
  T* data_;
};

// A linear operation, or a context's layer, with its weight as the steps read it: (units, inputs), both in their order.
template <typename T>
struct Packed {
  T *weight = nullptr, *bias = nullptr;
  int inputs = 0;
};

template <typename T>
class Chain {
 public:
  using L = Lanes<T>;
  using Vector = typename L::Vector;

  explicit Chain(const Call& call)
      : call(call), shares_context(call.context_features && has_equal_rows()), packed(operations_before(call.count)) {
    size_t size = 0;
    for_all_operations([&](const Transform& t, const Operation& o, Packed<T>& p) {
      if (o.weight < 0) return;
      p.inputs = o.kind == Kind::linear ? units(t, o.source) : call.context_features;
      work += (int64_t)o.units * p.inputs;
      size += (size_t)o.units * (p.inputs + 1);
    });
    memory.emplace_back(size);
    T* next = memory[0].get();
    for_all_operations([&](const Transform&, const Operation& o, Packed<T>& p) {
      if (o.weight < 0) return;
      p.bias = next;
      p.weight = next + o.units;
      next += (size_t)o.units * (p.inputs + 1);
    });
  }

  int64_t work = 0;  // weights: multiplications and additions for each row

  void pack() {
    std::atomic<const Packed<T>*> free{packed.data()};
    in_threads((int)std::min<int64_t>(call.threads, 1 + work / 200000), [&](int) {
      const Packed<T>* own = free++;
      for_all_operations([&](const Transform& t, const Operation& o, Packed<T>& p) {
        if (&p != own) return;
        if (o.weight >= 0) pack(t, o, p);
        own = free++;
      });
    });
  }

  const Call& call;
  const bool shares_context;
  std::atomic<bool> is_finite{true};

  const Packed<T>& of(int transform, int operation) const { return packed[operations_before(transform) + operation]; }

  static int units(const Transform& t, int value) {
    return value ? t.operations[value - 1].units : t.context + t.features;
  }

  static const int32_t* rows(const Transform& t, int value) { return value ? t.operations[value - 1].rows : t.input_rows; }

  // How many units of a value are known once the features of all steps before `step` are.
  static int known(const Transform& t, int value, int step) {
    return step < 0 ? 0 : (value ? t.operations[value - 1].known : t.input_known)[step];
  }

  // How many steps the forward direction computes together: enough units to fill the registers.
  static int group(const Transform& t) {
    int fewest = t.features * std::max(t.parameters, 1);
    for (int i = 0; i < t.operation_count; i++)
      if (t.operations[i].kind == Kind::linear) fewest = std::min(fewest, t.operations[i].units);
    return std::max(1, std::min(t.steps, 12 * t.steps / std::max(fewest, 1)));
  }

  // `nullptr` for an operation without it.
  template <typename Entry>
  const Entry* tensor(const Transform& t, int tensor) const {
    return tensor < 0 ? nullptr : static_cast<const Entry*>(call.tensors[t.first_tensor + tensor]);
  }

  bool inverts(const Transform& t) const { return call.is_inverse != t.is_reversed; }

  // The first input that a sum reads: a context that all rows share is in the bias.
  int first_input(const Transform& t, const Operation& o) const { return shares_context && !o.source ? t.context : 0; }

 private:
  std::vector<Packed<T>> packed;
  std::vector<Buffer<T>> memory;

  size_t operations_before(int transform) const {
    size_t count = 0;
    for (int i = 0; i < transform; i++) count += call.transforms[i].operation_count;
    return count;
  }

  template <typename Use>
  void for_all_operations(const Use& use) {
    size_t next = 0;
    for (int i = 0; i < call.count; i++)
      for (int j = 0; j < call.transforms[i].operation_count; j++, next++)
        use(call.transforms[i], call.transforms[i].operations[j], packed[next]);
  }

  bool has_equal_rows() const {
    const T* context = static_cast<const T*>(call.context);
    if (call.context_stride)
      for (int64_t row = 1; row < call.rows; row++)
        if (std::memcmp(context, context + row * call.context_stride, sizeof(T) * call.context_features)) return false;
    return true;
  }

  // The library multiplies a weight by its mask: one that is not finite gives NaN there, whatever the mask.
  void check_finite(const T* values, int64_t size) {
    Vector poison{};
    int64_t i = 0;
    for (; i + L::count <= size; i += L::count) poison += L::load(values + i) * T(0);
    T rest = 0;
    for (; i < size; i++) rest += values[i] * T(0);
    for (int lane = 0; lane < L::count; lane++) rest += poison[lane];
    if (rest != 0) is_finite = false;
  }

  void pack(const Transform& t, const Operation& o, const Packed<T>& p) {
    const T *weight = tensor<T>(t, o.weight), *bias = tensor<T>(t, o.bias);
    const uint8_t* mask = tensor<uint8_t>(t, o.mask);
    if (bias) check_finite(bias, o.units);
    const T* shared = shares_context ? static_cast<const T*>(call.context) : nullptr;
    const int32_t* columns = o.kind == Kind::linear ? rows(t, o.source) : nullptr;
    const int length = inverts(t) ? 1 : group(t);
    int step = 0, context = 0;
    if (o.kind == Kind::linear && shared && !o.source) context = t.context;
    for (int unit = 0; unit < o.units; unit++) {
      const int64_t row = (int64_t)o.rows[unit] * p.inputs;
      check_finite(weight + row, p.inputs);  // which brings the row to the cache
      if (unit >= o.known[t.steps - 1]) continue;
      while (unit >= o.known[step]) step++;
      T total = bias ? bias[o.rows[unit]] : 0;
      T* to = p.weight + (int64_t)unit * p.inputs;
      if (!columns) {
        std::memcpy(to, weight + row, sizeof(T) * p.inputs);
        for (int k = 0; shared && k < p.inputs; k++) total += to[k] * shared[k];
      } else {
        const int last = std::min(step / length * length + length, t.steps) - 1, read = known(t, o.source, last);
        if (!mask)
          for (int k = 0; k < read; k++) to[k] = weight[row + columns[k]];
        else if (o.mask_bytes == 1)
          for (int k = 0; k < read; k++) to[k] = mask[row + columns[k]] ? weight[row + columns[k]] : T(0);
        else if (o.mask_bytes == sizeof(float))
          for (int k = 0; k < read; k++)
            to[k] = reinterpret_cast<const float*>(mask)[row + columns[k]] * weight[row + columns[k]];
        else
          for (int k = 0; k < read; k++)
            to[k] = reinterpret_cast<const double*>(mask)[row + columns[k]] * weight[row + columns[k]];
        for (int k = 0; k < context; k++) total += to[k] * shared[columns[k] - t.context_start];
      }
      p.bias[unit] = total;
    }
  }
};

// A tile of `vectors` vectors of rows, and what one thread keeps of it: values are (units, rows).
template <typename T, int vectors>
class Tile {
 public:
  using L = Lanes<T>;
  using Vector = typename L::Vector;
  using Integers = typename L::Integers;
  static constexpr int rows = L::count * vectors, most_units = registers / vectors < 8 ? registers / vectors : 8;

  explicit Tile(const Chain<T>& chain)
      : chain(chain), call(chain.call), features((size_t)call.features * rows), copy((size_t)call.features * rows),
        context((size_t)call.context_features * rows), bins((size_t)2 * most_bins() * rows) {
    for (int i = 0; i < call.count; i++) {
      const Transform& t = call.transforms[i];
      const int length = chain.inverts(t) ? 1 : Chain<T>::group(t);
      resize(sizes, 0, chain.units(t, 0));
      for (int j = 0; j < t.operation_count; j++) {
        const Operation& o = t.operations[j];
        resize(sizes, j + 1, o.is_kept ? o.units : most_new(o, t.steps, length));
        if (chain.inverts(t) && t.steps > block_steps && o.kind == Kind::linear)
          resize(partial_sizes, j, most_new(o, t.steps, block_steps));
      }
    }
    for (size_t size : sizes) values.emplace_back(size * rows);
    for (size_t size : partial_sizes) partials.emplace_back(size * rows);
  }

  // Rows [first, first + count), of which there are at most `rows`.
  void run(int64_t first, int count) {
    const T *in = static_cast<const T*>(call.in), *given = static_cast<const T*>(call.context);
    for (int v = 0; v < vectors; v++) log_det[v] = rest[v] = poison[v] = Vector{};
    transpose(in + first * call.in_stride, call.in_stride, call.features, count, features.get());
    for (int f = 0; f < call.features; f++)
      for (int v = 0; v < vectors; v++) poison[v] += L::load(features.get() + (size_t)f * rows + v * L::count) * T(0);
    if (!chain.shares_context)
      transpose(given + first * call.context_stride, call.context_stride, call.context_features, count, context.get());
    for (int i = 0; i < call.count; i++) {
      index = call.is_inverse ? call.count - 1 - i : i;
      inverts = chain.inverts(call.transforms[index]);
      transform(call.transforms[index]);
    }
    write(first, count);
  }

 private:
  const Chain<T>& chain;
  const Call& call;
  Buffer<T> features, copy, context, bins;
  std::vector<size_t> sizes, partial_sizes;
  std::vector<Buffer<T>> values, partials;
  Vector log_det[vectors], rest[vectors], poison[vectors];  // `rest` is what rounding took from `log_det`
  int index = 0;  // of the transform
  bool inverts = false;

  int most_bins() const {
    int most = 1;
    for (int i = 0; i < call.count; i++) most = std::max(most, call.transforms[i].bins);
    return most;
  }

  static void resize(std::vector<size_t>& all, size_t position, size_t size) {
    if (all.size() <= position) all.resize(position + 1);
    all[position] = std::max(all[position], size);
  }

  static size_t most_new(const Operation& o, int steps, int length) {
    int most = 0;
    for (int step = 0; step < steps; step += length) {
      const int last = std::min(step + length, steps) - 1;
      most = std::max(most, o.known[last] - (step ? o.known[step - 1] : 0));
    }
    return most;
  }

  // (count, columns) to (columns, rows): rows beyond `count` repeat the first.
  static void transpose(const T* from, int64_t stride, int columns, int count, T* to) {
    for (int column = 0; column < columns; column++)
      for (int row = 0; row < rows; row++) to[(size_t)column * rows + row] = from[(row < count ? row : 0) * stride + column];
  }

  void write(int64_t first, int count) {
    T* out = static_cast<T*>(call.out) + first * call.features;
    for (int f = 0; f < call.features; f++) {
      const T* from = features.get() + (size_t)f * rows;
      for (int v = 0; v < vectors; v++) poison[v] += L::load(from + v * L::count) * T(0);
      for (int row = 0; row < count; row++) out[(int64_t)row * call.features + f] = from[row];
    }
    for (int v = 0; v < vectors; v++) poison[v] += log_det[v] * T(0);
    for (int row = 0; row < count; row++) {
      const int v = row / L::count, lane = row % L::count;
      call.failed[first + row] = !(poison[v][lane] == 0);
      if (call.log_det && !call.is_by_feature)
        static_cast<T*>(call.log_det)[first + row] = log_det[v][lane];
    }
    if (call.is_by_feature) {
      T* to = static_cast<T*>(call.log_det) + first * call.features;
      for (int f = 0; f < call.features; f++)
        for (int row = 0; row < count; row++) to[(int64_t)row * call.features + f] = copy.get()[(size_t)f * rows + row];
    }
  }

  void transform(const Transform& t) {
    if (t.kind == Elementwise::permutation)
      permute(t);
    else if (t.kind == Elementwise::affine)
      standardize(t);
    else if (inverts)
      invert(t);
    else
      evaluate(t);
  }

  // Sums over many features lose digits: by Kahan's method they keep them.
  void add(int v, Vector change) {
    const Vector term = change - rest[v], total = log_det[v] + term;
    rest[v] = (total - log_det[v]) - term;
    log_det[v] = total;
  }

  // y_i = x_order[i].
  void permute(const Transform& t) {
    T *from = features.get(), *to = copy.get();
    std::memcpy(to, from, sizeof(T) * t.features * rows);
    for (int f = 0; f < t.features; f++) {
      const int other = t.order[f];
      std::memcpy(from + (size_t)(inverts ? other : f) * rows,
                  to + (size_t)(inverts ? f : other) * rows, sizeof(T) * rows);
    }
  }

  // y = scale x + shift, with one number for all features or one for each.
  void standardize(const Transform& t) {
    const T *scale = chain.template tensor<T>(t, 0), *shift = chain.template tensor<T>(t, 1);
    for (int f = 0; f < call.features; f++) {
      const T a = scale[f * t.scale_stride], b = shift[f * t.shift_stride];
      T* x = features.get() + (size_t)f * rows;
      const Vector change = L::log(L::absolute(L::spread(a)));
      for (int v = 0; v < vectors; v++) {
        const Vector in = L::load(x + v * L::count);
        L::store(x + v * L::count, inverts ? (in - b) / a : in * a + b);
        add(v, inverts ? -change : change);
      }
    }
  }

  bool is_kept(int i, const Transform& t) const { return !i || t.operations[i - 1].is_kept; }

  void start_input(const Transform& t) {
    if (t.context && !chain.shares_context)
      for (int i = 0; i < t.context; i++)
        std::memcpy(values[0].get() + (size_t)i * rows, context.get() + (size_t)(t.input_rows[i] - t.context_start) * rows,
                    sizeof(T) * rows);
  }

  void invert(const Transform& t) {
    start_input(t);
    for (int begin = 0; begin < t.steps; begin += block_steps) {
      const int end = std::min(begin + block_steps, t.steps);
      if (begin) start_sums(t, begin, end);
      for (int step = begin; step < end; step++) {
        compute(t, step, step + 1, begin);
        for (int i = t.starts[step]; i < t.starts[step + 1]; i++) elementwise(t, i, t.starts[step]);
      }
    }
  }

  void evaluate(const Transform& t) {
    start_input(t);
    for (int i = 0; i < t.features; i++)
      std::memcpy(values[0].get() + (size_t)(t.context + i) * rows, features.get() + (size_t)t.order[i] * rows,
                  sizeof(T) * rows);
    const int length = Chain<T>::group(t);
    for (int step = 0; step < t.steps; step += length) {
      const int end = std::min(step + length, t.steps);
      compute(t, step, end, 0);
      for (int i = t.starts[step]; i < t.starts[end]; i++) elementwise(t, i, t.starts[step]);
    }
  }

  // What inputs that are known before step `begin` add to the units of steps [begin, end).
  void start_sums(const Transform& t, int begin, int end) {
    for (int j = 0; j < t.operation_count; j++) {
      const Operation& o = t.operations[j];
      if (o.kind != Kind::linear) continue;
      const Packed<T>& p = chain.of(index, j);
      const int first = chain.known(t, j + 1, begin - 1), last = chain.known(t, j + 1, end - 1);
      const T* bias = p.bias + first;
      multiply(p, first, last, chain.first_input(t, o), chain.known(t, o.source, begin - 1), values[o.source].get(),
               partials[j].get(), [&](int unit, int) { return L::spread(bias[unit]); },
               [](int, Vector sum) { return sum; });
    }
  }

  // The units that the features of steps [step, end) need, of all values. Sums start from what `start_sums` left for `begin`.
  void compute(const Transform& t, int step, int end, int begin) {
    for (int j = 0; j < t.operation_count; j++) {
      const Operation& o = t.operations[j];
      const int first = chain.known(t, j + 1, step - 1), last = chain.known(t, j + 1, end - 1);
      if (first == last) continue;
      T* out = values[j + 1].get() + (o.is_kept ? (size_t)first * rows : 0);
      const T* in = values[o.source].get() + (is_kept(o.source, t) ? (size_t)first * rows : 0);
      const T* other = values[o.other].get() + (is_kept(o.other, t) ? (size_t)first * rows : 0);
      const size_t size = (size_t)(last - first) * rows;
      switch (o.kind) {
        case Kind::linear: {
          const Packed<T>& p = chain.of(index, j);
          const T *bias = p.bias + first, *sums = begin ? partials[j].get() : nullptr;
          const int from = begin ? chain.known(t, o.source, begin - 1) : chain.first_input(t, o);
          const int known = chain.known(t, o.source, end - 1);
          const size_t skipped = begin ? first - chain.known(t, j + 1, begin - 1) : 0;
          multiply(
              p, first, last, from, known, values[o.source].get(), out,
              [&](int unit, int v) {
                return sums ? L::load(sums + (skipped + unit) * rows + v * L::count) : L::spread(bias[unit]);
              },
              [&](int v, Vector sum) {
                const Vector result = function(o, sum);
                if (o.is_kept) poison[v] += result * T(0);
                return result;
              });
          continue;
        }
        case Kind::activation:
          for (size_t i = 0; i < size; i += L::count) L::store(out + i, function(o, L::load(in + i)));
          break;
        case Kind::sum:
          for (size_t i = 0; i < size; i += L::count) L::store(out + i, L::load(other + i) + L::load(in + i));
          break;
        case Kind::extrapolation: {  // value + w (value - other), with w for each unit
          const T* weight = chain.template tensor<T>(t, o.bias);
          for (int unit = first; unit < last; unit++)
            for (int i = 0; i < rows; i += L::count) {
              const size_t at = (size_t)(unit - first) * rows + i;
              const Vector a = L::load(in + at), b = L::load(other + at);
              L::store(out + at, a + (a - b) * weight[o.rows[unit]]);
            }
          break;
        }
        default: with_context(o, chain.of(index, j), first, last, in, out);
      }
      if (o.is_kept)
        for (size_t i = 0; i < size; i += rows)
          for (int v = 0; v < vectors; v++) poison[v] += L::load(out + i + v * L::count) * T(0);
    }
  }

  // A value plus function(layer(context)), or times its sigmoid.
  void with_context(const Operation& o, const Packed<T>& p, int first, int last, const T* in, T* out) {
    for (int unit = first; unit < last; unit++) {
      Vector given[1][vectors];
      for (int v = 0; v < vectors; v++) given[0][v] = L::spread(p.bias[unit]);
      if (!chain.shares_context) add_products(p.weight + (size_t)unit * p.inputs, p.inputs, context.get(), 0, p.inputs, given);
      for (int v = 0; v < vectors; v++) {
        const size_t at = (size_t)(unit - first) * rows + v * L::count;
        const Vector own = L::load(in + at), change = function(o, given[0][v]);
        L::store(out + at, o.kind == Kind::add_context ? own + change : own * L::sigmoid(change));
      }
    }
  }

  static Vector function(const Operation& o, Vector v) {
    if (o.function == Function::identity) return v;
    if (o.function == Function::relu) return v < T(0) ? Vector{} : v;
    return curve(o, v);
  }

  [[gnu::noinline]] static Vector curve(const Operation& o, Vector v) {
    const T a = (T)o.first, b = (T)o.second;
    switch (o.function) {
      case Function::leaky_relu: return v < T(0) ? v * a : v;
      case Function::elu: return v < T(0) ? L::expm1(v) * a : v;
      case Function::selu: return (v < T(0) ? L::expm1(v) * T(1.6732632423543772848) : v) * T(1.0507009873554804934);
      case Function::tanh: return L::tanh(v);
      case Function::sigmoid: return L::sigmoid(v);
      case Function::silu: return v * L::sigmoid(v);
      case Function::gelu: return L::gelu(v);
      case Function::gelu_tanh:
        return v * T(0.5) * (L::tanh((v + v * v * v * T(0.044715)) * T(0.79788456080286535588)) + T(1));
      default: return L::softplus(v, a, b);
    }
  }

  // Units [first, last): finish(vector, start(unit - first, vector) plus the products with inputs [from, to)).
  template <int count = most_units, typename Start, typename Finish>
  void multiply(const Packed<T>& p, int first, int last, int from, int to, const T* in, T* out, const Start& start,
                const Finish& finish, int unit = -1) {
    if (unit < 0) unit = first;
    for (; unit + count <= last; unit += count) {
      Vector sums[count][vectors];
      for (int u = 0; u < count; u++)
        for (int v = 0; v < vectors; v++) sums[u][v] = start(unit + u - first, v);
      add_products(p.weight + (size_t)unit * p.inputs, p.inputs, in, from, to, sums);
      for (int u = 0; u < count; u++)
        for (int v = 0; v < vectors; v++)
          L::store(out + (size_t)(unit + u - first) * rows + v * L::count, finish(v, sums[u][v]));
    }
    if constexpr (count > 1)
      if (unit < last) multiply<count - 1>(p, first, last, from, to, in, out, start, finish, unit);
  }

  // Few sums leave the processor waiting for the last addition: then some inputs have sums of their own.
  template <int count>
  static void add_products(const T* weight, int stride, const T* in, int from, int to, Vector (&sums)[count][vectors]) {
    constexpr int ways = count * vectors >= 8 ? 1 : count * vectors >= 4 ? 2 : 4;
    Vector others[ways][count][vectors] = {};
    int k = from;
    for (; k + ways <= to; k += ways)
      for (int way = 0; way < ways; way++) {
        const T* x = in + (size_t)(k + way) * rows;
        for (int v = 0; v < vectors; v++) {
          const Vector entries = L::load(x + v * L::count);
          for (int u = 0; u < count; u++)
            (way ? others[way] : sums)[u][v] += entries * weight[(size_t)u * stride + k + way];
        }
      }
    for (; k < to; k++)
      for (int v = 0; v < vectors; v++)
        for (int u = 0; u < count; u++)
          sums[u][v] += L::load(in + (size_t)k * rows + v * L::count) * weight[(size_t)u * stride + k];
    for (int way = 1; way < ways; way++)
      for (int u = 0; u < count; u++)
        for (int v = 0; v < vectors; v++) sums[u][v] += others[way][u][v];
  }

  // The i-th feature in the order of the steps, of which `first` is the first whose parameters are there.
  void elementwise(const Transform& t, int i, int first) {
    const T* p = values[t.operation_count].get() + (size_t)(i - first) * t.parameters * rows;
    const size_t feature = (size_t)t.order[i] * rows;
    for (int v = 0; v < vectors; v++) {
      T* at = features.get() + feature + v * L::count;
      Vector change{};
      const Vector in = L::load(at), out = t.kind == Elementwise::rational_quadratic || t.kind == Elementwise::rational_linear
                                               ? spline(t, p + v * L::count, in, v, change)
                                               : scale(t, p + v * L::count, in, change);
      L::store(at, out);
      if (inverts) change = -change;
      add(v, change);
      if (call.is_by_feature) L::store(copy.get() + feature + v * L::count, change);
      if (inverts) {
        L::store(values[0].get() + (size_t)(t.context + i) * rows + v * L::count, out);
        poison[v] += out * T(0);
      }
    }
  }

  // y = exp(log_scale) x + shift; `log_scale` is also the logarithm of the derivative.
  Vector scale(const Transform& t, const T* p, Vector in, Vector& log_scale) const {
    const Vector first = L::load(p), second = L::load(p + rows);
    const T a = (T)t.first, b = (T)t.second;
    Vector shift = first, factor;
    switch (t.kind) {
      case Elementwise::soft_clipped_affine: log_scale = second / (L::absolute(second) * a + T(1)); break;
      case Elementwise::clamped_affine: log_scale = L::smaller(L::larger(second, a), b); break;
      case Elementwise::log_affine:  // x = exp(s) y + u
        log_scale = -first;
        return inverts ? in * L::exp(first) + second : (in - second) * L::exp(-first);
      default:
        shift = second;
        factor = (t.kind == Elementwise::softplus_affine ? L::softplus(first, 1, 20) : L::sigmoid(first + a)) + b;
        log_scale = L::log(factor);
        return inverts ? (in - shift) / factor : in * factor + shift;
    }
    return inverts ? (in - shift) * L::exp(-log_scale) : in * L::exp(log_scale) + shift;
  }

  Vector spline(const Transform& t, const T* p, Vector in, int v, Vector& log_derivative) {
    const int K = t.bins;
    T *widths = bins.get() + v * L::count, *heights = widths + (size_t)K * rows;
    const T low = (T)t.low, size = (T)t.high - low, gap = (T)t.gap;
    const T least_width = (T)t.least_width, least_height = (T)t.least_height;
    const Vector width_sum = exponentials(t, p, widths), height_sum = exponentials(t, p + (size_t)K * rows, heights);
    const Vector to_width = size * (1 - least_width * K) / width_sum, to_height = size * (1 - least_height * K) / height_sum;
    const T* derivatives = p + (size_t)2 * K * rows;
    if (t.is_circular && !inverts) in = L::remainder(in, size) + low;
    const Integers is_in = (in >= low) & (in <= (T)t.high);

    Vector x = L::spread(low), y = x, x0 = x, y0 = x, width{}, height{}, raw0{}, raw1{}, lambda{};
    Integers is_first = ~Integers{}, is_last{};
    for (int k = 0; k < K; k++) {
      const Vector w = L::load(widths + (size_t)k * rows) * to_width + size * least_width;
      const Vector h = L::load(heights + (size_t)k * rows) * to_height + size * least_height;
      const Vector left = derivative(t, derivatives, k), right = derivative(t, derivatives, k + 1);
      if (k == 0) {
        width = w, height = h, raw0 = left, raw1 = right;
        if (K == 1) is_last = ~Integers{};
        if (t.kind == Elementwise::rational_linear) lambda = L::load(p + (size_t)(3 * K - 1) * rows);
      } else {
        const Integers here = in >= (inverts ? y : x) + gap;
        x0 = here ? x : x0, y0 = here ? y : y0, width = here ? w : width, height = here ? h : height;
        raw0 = here ? left : raw0, raw1 = here ? right : raw1;
        is_first &= ~here;
        if (k == K - 1) is_last = here;
        if (t.kind == Elementwise::rational_linear) lambda = here ? L::load(p + (size_t)(3 * K - 1 + k) * rows) : lambda;
      }
      x += w, y += h;
    }
    const Vector d0 = slope(t, raw0, is_first), d1 = slope(t, raw1, is_last), delta = height / width;
    Vector out = t.kind == Elementwise::rational_linear
                     ? linear_piece(lambda, delta, d0, d1, x0, y0, width, height, in, log_derivative)
                     : quadratic_piece(delta, d0, d1, x0, y0, width, height, in, log_derivative);
    log_derivative = is_in ? log_derivative : Vector{};
    if (!t.has_tails) poison[v] = is_in ? poison[v] : L::spread(L::nan);
    out = is_in ? out : in;
    return t.is_circular && inverts ? L::remainder(out, size) + low : out;
  }

  // exp of parameters less their largest, and the sum. Soft-clipped ones are small as they are.
  Vector exponentials(const Transform& t, const T* p, T* out) const {
    const int K = t.bins;
    const T factor = (T)t.factor, clip = T(2) * (T)t.clip;
    Vector most = L::spread(-L::infinity), total{};
    if (t.is_soft_clipped) {
      for (int k = 0; k < K; k++) {
        const Vector raw = L::load(p + (size_t)k * rows), e = L::exp_of_small(raw / (L::absolute(raw) * clip + T(1)));
        L::store(out + (size_t)k * rows, e);
        total += e;
      }
      return total;
    }
    for (int k = 0; k < K; k++) {
      const Vector raw = L::load(p + (size_t)k * rows) * factor;
      most = raw > most ? raw : most;
    }
    for (int k = 0; k < K; k++) {
      const Vector e = L::exp_of_small(L::load(p + (size_t)k * rows) * factor - most);
      L::store(out + (size_t)k * rows, e);
      total += e;
    }
    return total;
  }

  // The parameter of the derivative at knot k of K + 1; the ends may have none.
  Vector derivative(const Transform& t, const T* derivatives, int k) const {
    if (t.ends == Ends::free) return L::load(derivatives + (size_t)k * rows);
    if (t.ends == Ends::circular) return L::load(derivatives + (size_t)(k % t.bins) * rows);
    return k == 0 || k == t.bins ? Vector{} : L::load(derivatives + (size_t)(k - 1) * rows);
  }

  Vector slope(const Transform& t, Vector raw, Integers is_end) const {
    const Vector inner = t.is_soft_clipped ? L::exp(raw / (L::absolute(raw) * (T)t.clip + T(1)))
                                           : L::softplus(raw, 1, 20) + (T)t.least_slope;
    return t.ends == Ends::fixed ? (is_end ? L::spread((T)t.end_slope) : inner) : inner;
  }

  Vector quadratic_piece(Vector delta, Vector d0, Vector d1, Vector x0, Vector y0, Vector width, Vector height, Vector in,
                         Vector& log_derivative) const {
    const Vector bend = d0 + d1 - delta * T(2);
    Vector theta, out;
    if (inverts) {
      const Vector rise = in - y0, b = height * d0 - rise * bend, a = height * (delta - d0) + rise * bend, c = -delta * rise;
      const Vector square = b * b - a * c * T(4);
      theta = c * T(2) / (-b - L::sqrt(L::larger(square, 0)));
      out = theta * width + x0;
    } else {
      theta = (in - x0) / width;
    }
    const Vector rest = T(1) - theta, mixed = theta * rest, denominator = delta + bend * mixed;
    if (!inverts) out = y0 + height * (delta * theta * theta + d0 * mixed) / denominator;
    if (call.log_det)
      log_derivative = L::log(delta * delta * (d1 * theta * theta + delta * mixed * T(2) + d0 * rest * rest) /
                              (denominator * denominator));
    return out;
  }

  // Of two pieces that meet at (x0 + lambda width, middle), each the ratio of linear functions.
  Vector linear_piece(Vector raw, Vector delta, Vector d0, Vector d1, Vector x0, Vector y0, Vector width, Vector height,
                      Vector in, Vector& log_derivative) const {
    const Vector lambda = L::sigmoid(raw) * T(0.95) + T(0.025), rest = T(1) - lambda;
    const Vector wb = L::sqrt(d0 / d1), wc = (lambda * d0 + rest * wb * d1) / delta, y1 = y0 + height;
    const Vector middle = (rest * y0 + lambda * wb * y1) / (rest + lambda * wb);
    Vector theta, out, denominator;
    Integers is_left;
    if (inverts) {
      is_left = in <= middle;
      denominator = is_left ? (wc - T(1)) * in + y0 - wc * middle : (wc - wb) * in + wb * y1 - wc * middle;
      const Vector numerator = is_left ? lambda * (y0 - in) : (wc - lambda * wb) * in + lambda * wb * y1 - wc * middle;
      out = numerator / denominator * width + x0;
    } else {
      theta = (in - x0) / width;
      is_left = theta <= lambda;
      denominator = is_left ? lambda - theta + wc * theta : wc * (T(1) - theta) + wb * (theta - lambda);
      out = (is_left ? y0 * (lambda - theta) + wc * middle * theta
                     : wc * middle * (T(1) - theta) + wb * y1 * (theta - lambda)) / denominator;
    }
    if (call.log_det) {
      const Vector numerator = is_left ? wc * lambda * (middle - y0) : wb * wc * rest * (y1 - middle);
      const Vector square = denominator * denominator;
      log_derivative = inverts ? -L::log(numerator * width / square) : L::log(numerator / (width * square));
    }
    return out;
  }
};

// All rows, in tiles of four vectors; the last tile is of one vector if that is enough. Returns how many rows failed.
template <typename T>
int64_t run(const Call& call) {
  constexpr int rows = Tile<T, 4>::rows;
  if (!call.rows) return 0;
  Chain<T> chain(call);
  const int64_t tiles = (call.rows + rows - 1) / rows, enough = 1 + chain.work * call.rows / 1000000;
  const int threads = (int)std::min<int64_t>({call.threads, tiles, enough});
  chain.pack();
  if (!chain.is_finite) {
    std::memset(call.failed, 1, call.rows);
    std::fill_n(static_cast<T*>(call.out), call.rows * call.features, Lanes<T>::nan);
    return call.rows;
  }
  std::vector<Tile<T, 4>> wide;
  std::vector<Tile<T, 1>> narrow;
  wide.reserve(threads);
  narrow.reserve(threads);
  for (int i = 0; i < threads; i++) {
    if (call.rows > Tile<T, 1>::rows) wide.emplace_back(chain);
    narrow.emplace_back(chain);
  }
  std::atomic<int64_t> next{0};
  in_threads(threads, [&](int rank) {
    for (int64_t first; (first = next.fetch_add(rows)) < call.rows;) {
      const int count = (int)std::min<int64_t>(rows, call.rows - first);
      if (count > Tile<T, 1>::rows)
        wide[rank].run(first, count);
      else
        narrow[rank].run(first, count);
    }
  });
  return std::count(call.failed, call.failed + call.rows, 1);
}

}  // namespace jacobiflow

using namespace jacobiflow;

extern "C" {

int32_t jacobiflow_operation_size() { return sizeof(Operation); }

int32_t jacobiflow_transform_size() { return sizeof(Transform); }

int32_t jacobiflow_call_size() { return sizeof(Call); }

// y of x, or x of y for an inverse. Returns the number of rows that failed, or -1 if out of memory or threads.
int64_t jacobiflow_masked(const Call* call, int32_t is_double) {
  try {
    return is_double ? run<double>(*call) : run<float>(*call);
  } catch (const std::exception&) {
    return -1;
  }
}
}
