// Chains of masked autoregressive transforms in both directions, exact to rounding. A tile of rows goes through all
// transforms and all their steps without leaving the cache; a row is a vector lane. Units of a layer are sorted by the
// first step that can compute them, so that each is computed once.
#include <algorithm>
#include <atomic>
#include <exception>
#include <new>

#include "boundary.h"
#include "lanes.h"

namespace jacobiflow {

constexpr int block_steps = 32;  // steps after which one matrix product adds all earlier features to later units
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int registers = 24;  // of 32, for sums
#else
constexpr int registers = 12;  // of 16
#endif

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

// The weight (units, inputs) of a layer, both sorted by step.
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

  explicit Chain(const ChainArgs& call)
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

  int64_t work = 0;  // multiplications for each row

  void pack() {
    std::atomic<size_t> next{0};
    in_threads((int)std::min<int64_t>(call.threads, 1 + work / 200000), [&](int) {
      size_t task = next++, index = 0;
      for_all_operations([&](const Transform& t, const Operation& o, Packed<T>& p) {
        if (index++ != task) return;
        if (o.weight >= 0) pack(t, o, p);
        task = next++;
      });
    });
  }

  const ChainArgs& call;
  const bool shares_context;
  std::atomic<bool> is_finite{true};

  const Packed<T>& of(int transform, int operation) const { return packed[operations_before(transform) + operation]; }

  static int units(const Transform& t, int value) {
    return value ? t.operations[value - 1].units : t.context + t.features;
  }

  static const int32_t* rows(const Transform& t, int value) { return value ? t.operations[value - 1].rows : t.input_rows; }

  // The number of units of a value that can be computed once the features before `step` are solved.
  static int ready(const Transform& t, int value, int step) {
    return step < 0 ? 0 : (value ? t.operations[value - 1].ready : t.input_ready)[step];
  }

  // The number of steps that the forward direction computes together: enough units to fill the registers.
  static int group(const Transform& t) {
    int fewest = t.features * std::max(t.parameters, 1);
    for (int i = 0; i < t.operation_count; i++)
      if (t.operations[i].kind == Kind::linear) fewest = std::min(fewest, t.operations[i].units);
    return std::max(1, std::min(t.steps, 12 * t.steps / std::max(fewest, 1)));
  }

  // Null if the operation has none.
  const T* tensor(const Transform& t, int tensor) const {
    return tensor < 0 ? nullptr : static_cast<const T*>(call.tensors[t.first_tensor + tensor]);
  }

  bool inverts(const Transform& t) const { return call.is_inverse != t.is_reversed; }

  // The first input of a sum: the bias already has a context that all rows share.
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

  // The libraries multiply weights by masks, so a weight that is not finite gives NaN even if it is masked.
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
    const T *weight = tensor(t, o.weight), *bias = tensor(t, o.bias);
    if (bias) check_finite(bias, o.units);
    const T* shared = shares_context ? static_cast<const T*>(call.context) : nullptr;
    const int32_t* columns = o.kind == Kind::linear ? rows(t, o.source) : nullptr;
    const int length = inverts(t) ? 1 : group(t);
    int step = 0, context = 0;
    if (o.kind == Kind::linear && shared && !o.source) context = t.context;
    for (int unit = 0; unit < o.units; unit++) {
      const int64_t row = (int64_t)o.rows[unit] * p.inputs;
      check_finite(weight + row, p.inputs);
      if (unit >= o.ready[t.steps - 1]) continue;
      while (unit >= o.ready[step]) step++;
      T total = bias ? bias[o.rows[unit]] : 0;
      T* to = p.weight + (int64_t)unit * p.inputs;
      if (!columns) {
        std::memcpy(to, weight + row, sizeof(T) * p.inputs);
        for (int k = 0; shared && k < p.inputs; k++) total += to[k] * shared[k];
      } else {
        const int last = std::min(step / length * length + length, t.steps) - 1, read = ready(t, o.source, last);
        if (!o.mask)
          for (int k = 0; k < read; k++) to[k] = weight[row + columns[k]];
        else
          for (int k = 0; k < read; k++) to[k] = o.mask[row + columns[k]] ? weight[row + columns[k]] : T(0);
        for (int k = 0; k < context; k++) total += to[k] * shared[columns[k] - t.context_start];
      }
      p.bias[unit] = total;
    }
  }
};

// One thread's memory for a tile of `vectors` vectors of rows. Values are (units, rows).
template <typename T, int vectors>
class Tile {
 public:
  using L = Lanes<T>;
  using Vector = typename L::Vector;
  using Integers = typename L::Integers;
  static constexpr int rows = L::count * vectors, max_units = registers / vectors < 8 ? registers / vectors : 8;

  explicit Tile(const Chain<T>& chain)
      : chain(chain), call(chain.call), features((size_t)call.features * rows), copy((size_t)call.features * rows),
        context((size_t)call.context_features * rows), bins((size_t)2 * max_bins() * rows) {
    for (int i = 0; i < call.count; i++) {
      const Transform& t = call.transforms[i];
      const int length = chain.inverts(t) ? 1 : Chain<T>::group(t);
      resize(sizes, 0, chain.units(t, 0));
      for (int j = 0; j < t.operation_count; j++) {
        const Operation& o = t.operations[j];
        resize(sizes, j + 1, o.is_kept ? o.units : max_new(o, t.steps, length));
        if (chain.inverts(t) && t.steps > block_steps && o.kind == Kind::linear)
          resize(partial_sizes, j, max_new(o, t.steps, block_steps));
      }
    }
    for (size_t size : sizes) values.emplace_back(size * rows);
    for (size_t size : partial_sizes) partials.emplace_back(size * rows);
  }

  // Computes rows [first, first + count); count is at most `rows`.
  void run(int64_t first, int count) {
    const T *in = static_cast<const T*>(call.input), *contexts = static_cast<const T*>(call.context);
    for (int v = 0; v < vectors; v++) log_det[v] = rounding[v] = poison[v] = Vector{};
    transpose(in + first * call.in_stride, call.in_stride, call.features, count, features.get());
    for (int f = 0; f < call.features; f++)
      for (int v = 0; v < vectors; v++) poison[v] += L::load(features.get() + (size_t)f * rows + v * L::count) * T(0);
    if (!chain.shares_context)
      transpose(contexts + first * call.context_stride, call.context_stride, call.context_features, count, context.get());
    for (int i = 0; i < call.count; i++) {
      index = call.is_inverse ? call.count - 1 - i : i;
      inverts = chain.inverts(call.transforms[index]);
      transform(call.transforms[index]);
    }
    write(first, count);
  }

 private:
  const Chain<T>& chain;
  const ChainArgs& call;
  Buffer<T> features, copy, context, bins;
  std::vector<size_t> sizes, partial_sizes;
  std::vector<Buffer<T>> values, partials;
  Vector log_det[vectors], rounding[vectors];
  Vector poison[vectors];  // NaN in lanes that were not finite, else 0
  int index = 0;           // of the transform
  bool inverts = false;

  int max_bins() const {
    int most = 1;
    for (int i = 0; i < call.count; i++) most = std::max(most, call.transforms[i].bins);
    return most;
  }

  static void resize(std::vector<size_t>& all, size_t position, size_t size) {
    if (all.size() <= position) all.resize(position + 1);
    all[position] = std::max(all[position], size);
  }

  static size_t max_new(const Operation& o, int steps, int length) {
    int most = 0;
    for (int step = 0; step < steps; step += length) {
      const int last = std::min(step + length, steps) - 1;
      most = std::max(most, o.ready[last] - (step ? o.ready[step - 1] : 0));
    }
    return most;
  }

  // Copies (count, columns) to (columns, rows); rows beyond `count` repeat the first.
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
      affine(t);
    else if (inverts)
      invert(t);
    else
      evaluate(t);
  }

  // Adds to the log-determinant by Kahan's method, as sums over many features lose digits.
  void add(int v, Vector change) {
    const Vector term = change - rounding[v], total = log_det[v] + term;
    rounding[v] = (total - log_det[v]) - term;
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

  // y = scale x + shift.
  void affine(const Transform& t) {
    const T *scale = chain.tensor(t, 0), *shift = chain.tensor(t, 1);
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

  void set_context(const Transform& t) {
    if (t.context && !chain.shares_context)
      for (int i = 0; i < t.context; i++)
        std::memcpy(values[0].get() + (size_t)i * rows, context.get() + (size_t)(t.input_rows[i] - t.context_start) * rows,
                    sizeof(T) * rows);
  }

  void invert(const Transform& t) {
    set_context(t);
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
    set_context(t);
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

  // Sums what the inputs ready before step `begin` add to the units of steps [begin, end).
  void start_sums(const Transform& t, int begin, int end) {
    for (int j = 0; j < t.operation_count; j++) {
      const Operation& o = t.operations[j];
      if (o.kind != Kind::linear) continue;
      const Packed<T>& p = chain.of(index, j);
      const int first = chain.ready(t, j + 1, begin - 1), last = chain.ready(t, j + 1, end - 1);
      const T* bias = p.bias + first;
      multiply(p, first, last, chain.first_input(t, o), chain.ready(t, o.source, begin - 1), values[o.source].get(),
               partials[j].get(), [&](int unit, int) { return L::spread(bias[unit]); },
               [](int, Vector sum) { return sum; });
    }
  }

  // Computes the units of all values that steps [step, end) need. Sums start from those of `start_sums` at `begin`.
  void compute(const Transform& t, int step, int end, int begin) {
    for (int j = 0; j < t.operation_count; j++) {
      const Operation& o = t.operations[j];
      const int first = chain.ready(t, j + 1, step - 1), last = chain.ready(t, j + 1, end - 1);
      if (first == last) continue;
      const auto units_of = [&](int value) { return values[value].get() + (is_kept(value, t) ? (size_t)first * rows : 0); };
      T* out = units_of(j + 1);
      const size_t size = (size_t)(last - first) * rows;
      switch (o.kind) {
        case Kind::linear: {
          const Packed<T>& p = chain.of(index, j);
          const T *bias = p.bias + first, *sums = begin ? partials[j].get() : nullptr;
          const int from = begin ? chain.ready(t, o.source, begin - 1) : chain.first_input(t, o);
          const int ready = chain.ready(t, o.source, end - 1);
          const size_t skipped = begin ? first - chain.ready(t, j + 1, begin - 1) : 0;
          multiply(
              p, first, last, from, ready, values[o.source].get(), out,
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
          for (size_t i = 0; i < size; i += L::count) L::store(out + i, function(o, L::load(units_of(o.source) + i)));
          break;
        case Kind::sum: {
          const T *in = units_of(o.source), *other = units_of(o.other);
          for (size_t i = 0; i < size; i += L::count) L::store(out + i, L::load(other + i) + L::load(in + i));
          break;
        }
        case Kind::extrapolation: {  // value + w (value - other), with a w for each unit
          const T *weight = chain.tensor(t, o.bias), *in = units_of(o.source), *other = units_of(o.other);
          for (int unit = first; unit < last; unit++)
            for (int i = 0; i < rows; i += L::count) {
              const size_t at = (size_t)(unit - first) * rows + i;
              const Vector a = L::load(in + at), b = L::load(other + at);
              L::store(out + at, a + (a - b) * weight[o.rows[unit]]);
            }
          break;
        }
        default: with_context(o, chain.of(index, j), first, last, units_of(o.source), out);
      }
      if (o.is_kept)
        for (size_t i = 0; i < size; i += rows)
          for (int v = 0; v < vectors; v++) poison[v] += L::load(out + i + v * L::count) * T(0);
    }
  }

  // Adds function(layer(context)) to a value, or multiplies the value by its sigmoid.
  void with_context(const Operation& o, const Packed<T>& p, int first, int last, const T* in, T* out) {
    for (int unit = first; unit < last; unit++) {
      Vector sums[1][vectors];
      for (int v = 0; v < vectors; v++) sums[0][v] = L::spread(p.bias[unit]);
      if (!chain.shares_context) add_products(p.weight + (size_t)unit * p.inputs, p.inputs, context.get(), 0, p.inputs, sums);
      for (int v = 0; v < vectors; v++) {
        const size_t at = (size_t)(unit - first) * rows + v * L::count;
        const Vector value = L::load(in + at), change = function(o, sums[0][v]);
        L::store(out + at, o.kind == Kind::add_context ? value + change : value * L::sigmoid(change));
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

  // Computes units [first, last): finish(vector, start(unit - first, vector) + products with inputs [from, to)).
  template <int count = max_units, typename Start, typename Finish>
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

  // With few sums the processor waits for each addition, so some inputs have separate sums.
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

  // Transforms the i-th feature in the order of the steps; parameters start at those of the `first`.
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
      case Elementwise::clamped_affine: log_scale = L::min(L::max(second, a), b); break;
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
    const T min_width = (T)t.min_width, min_height = (T)t.min_height;
    const Vector width_sum = exponentials(t, p, widths), height_sum = exponentials(t, p + (size_t)K * rows, heights);
    const Vector to_width = size * (1 - min_width * K) / width_sum, to_height = size * (1 - min_height * K) / height_sum;
    const T* derivatives = p + (size_t)2 * K * rows;
    if (t.is_circular && !inverts) in = L::remainder(in, size) + low;
    const Integers is_in = (in >= low) & (in <= (T)t.high);

    Vector x = L::spread(low), y = x, x0 = x, y0 = x, width{}, height{}, raw0{}, raw1{}, lambda{};
    Integers is_first = ~Integers{}, is_last{};
    for (int k = 0; k < K; k++) {
      const Vector w = L::load(widths + (size_t)k * rows) * to_width + size * min_width;
      const Vector h = L::load(heights + (size_t)k * rows) * to_height + size * min_height;
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

  // exp(parameter - the largest one), and the sum. Soft-clipped parameters are small, so nothing is subtracted.
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

  // The parameter of the derivative at knot k of K + 1; 0 if an end has none.
  Vector derivative(const Transform& t, const T* derivatives, int k) const {
    if (t.ends == Ends::free) return L::load(derivatives + (size_t)k * rows);
    if (t.ends == Ends::circular) return L::load(derivatives + (size_t)(k % t.bins) * rows);
    return k == 0 || k == t.bins ? Vector{} : L::load(derivatives + (size_t)(k - 1) * rows);
  }

  Vector slope(const Transform& t, Vector raw, Integers is_end) const {
    const Vector inner = t.is_soft_clipped ? L::exp(raw / (L::absolute(raw) * (T)t.clip + T(1)))
                                           : L::softplus(raw, 1, 20) + (T)t.min_slope;
    return t.ends == Ends::fixed ? (is_end ? L::spread((T)t.end_slope) : inner) : inner;
  }

  Vector quadratic_piece(Vector delta, Vector d0, Vector d1, Vector x0, Vector y0, Vector width, Vector height, Vector in,
                         Vector& log_derivative) const {
    const Vector bend = d0 + d1 - delta * T(2);
    Vector theta, out;
    if (inverts) {
      const Vector rise = in - y0, b = height * d0 - rise * bend, a = height * (delta - d0) + rise * bend, c = -delta * rise;
      const Vector square = b * b - a * c * T(4);
      theta = c * T(2) / (-b - L::sqrt(L::max(square, 0)));
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

  // Two ratios of linear functions that meet at (x0 + lambda width, middle).
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

// Computes all rows in tiles of four vectors, or of one for the last if that is enough; returns the number that failed.
template <typename T>
int64_t run(const ChainArgs& call) {
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

// Returns the number of rows that failed, or -1 if out of memory or threads.
int64_t jacobiflow_masked(const ChainArgs* call, int32_t is_double) {
  try {
    return is_double ? run<double>(*call) : run<float>(*call);
  } catch (const std::exception&) {
    return -1;
  }
}
}
