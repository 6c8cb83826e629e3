// Compares vector functions and products with double precision, solves a small transformer, and prints OK. It stands alone, to
// be run by other compilers, and for other processors, than those of the tests in Python.
#include <cstdio>
#include <random>

#include "library.cpp"
#define NUMBER float
#include "masked.cpp"
#include "transformer.cpp"
#undef NUMBER
#define NUMBER double
#include "masked.cpp"
#include "transformer.cpp"

namespace {

bool failed = false;
std::mt19937 generator;

void check(const char* name, double error, double bound) {
  if (error <= bound) return;  // a NaN is not
  std::printf("%s: error %g\n", name, error);
  failed = true;
}

std::vector<float> normal(int size, double deviation = 0.5) {
  std::normal_distribution<float> draw(0.0f, (float)deviation);
  std::vector<float> out(size);
  for (float& value : out) value = draw(generator);
  return out;
}

// The largest error of a function of vectors over [first, last], divided by `unit` and the exact value's size.
template <typename Function, typename Exact>
double error_of(Function function, Exact exact, double first, double last, double unit) {
  double most = 0;
  for (int i = 0; i <= 10000; i++) {
    const float v = (float)(first + (last - first) * i / 10000);
    const double expected = exact((double)v), error = std::abs(function(Simd<float>::broadcast(v))[i % float_lanes] - expected);
    most = std::fmax(most, error / (unit + std::abs(expected)));
  }
  return most;
}

double gelu_in_double(double v) { return v * std::erfc(-v / std::sqrt(2.0)) / 2; }

// The largest relative error of elementary functions; infinite if one is wrong at 0, infinity or NaN.
double elementary_error() {
  using S = Simd<float>;
  const auto softplus = [](Vector v) { return S::softplus(v, 1, 20); };
  const auto inverse = [](double v) { return 1 / v; };
  double most = 0;
  for (double scale : {1e-6, 1.0, 80.0})
    for (double error : {error_of(S::tanh, [](double v) { return std::tanh(v); }, -scale, scale, 0),
                         error_of(S::sigmoid, [](double v) { return 1 / (1 + std::exp(-v)); }, -scale, scale, 0),
                         error_of(softplus, [](double v) { return std::log1p(std::exp(v)); }, -scale, scale, 0),
                         error_of(S::exp, [](double v) { return std::exp(v); }, -scale, scale, 0),
                         error_of(S::exp_of_small, [](double v) { return std::exp(v); }, -scale, scale, 0),
                         error_of(S::expm1, [](double v) { return std::expm1(v); }, -scale, scale, 0),
                         error_of(S::reciprocal, inverse, scale / 100, scale, 0)})
      most = std::fmax(most, error);
  const float inf = S::infinity, tiny = 1e-40f;
  const auto value = [](auto function, float v) { return function(Simd<float>::broadcast(v))[0]; };
  bool is_right = value(S::tanh, inf) == 1 && value(S::tanh, -inf) == -1 && value(S::tanh, tiny) == tiny &&
                  value(S::sigmoid, inf) == 1 && value(S::sigmoid, -inf) == 0 && value(softplus, inf) == inf &&
                  value(softplus, -inf) == 0 && value(S::exp, inf) == inf && value(S::exp, -inf) == 0 &&
                  value(S::expm1, -inf) == -1 && value(S::log, inf) == inf && value(S::log, 0) == -inf &&
                  value(S::reciprocal, 0) == inf && value(S::reciprocal, -inf) == 0 && std::isnan(value(softplus, NAN));
  for (auto function : {S::tanh, S::sigmoid, S::exp, S::exp_of_small, S::expm1, S::reciprocal, S::log, S::sqrt, S::abs})
    is_right = is_right && std::isnan(value(function, NAN));
  return is_right ? most : INFINITY;
}

// The bits of a number whose fraction has at most six bits.
uint16_t narrowed(float v, WeightFormat format) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  if (format == WeightFormat::bfloat16) return (uint16_t)(bits >> 16);
  return (uint16_t)((bits >> 16 & 0x8000) | (v == 0 ? 0 : ((bits & 0x7fffffff) - (112u << 23)) >> 13));
}

// A weight in a format, packed or not, whose numbers all formats have.
template <typename T>
struct Linear {
  int outputs, inputs;
  std::vector<T> weight, bias;
  std::vector<char> memory;
  Weight args{};

  Linear(int outputs, int inputs, WeightFormat format, bool is_packed = true)
      : outputs(outputs), inputs(inputs), weight((size_t)outputs * inputs), bias(padded<T>(outputs)),
        memory(sizeof(T) * padded<T>(outputs) * inputs) {
    for (T& value : weight) value = (T)((int)(generator() % 128) - 64) / 1024;
    for (T& value : bias) value = (T)(generator() % 128) / 128;
    const bool is_half = format != WeightFormat::float32 && format != WeightFormat::float64;
    std::vector<uint16_t> halves;
    for (T value : weight) halves.push_back(narrowed((float)value, format));
    const void* values = is_half ? (const void*)halves.data() : weight.data();
    if (!is_packed)
      std::memcpy(memory.data(), values, weight.size() * (is_half ? 2 : sizeof(T)));
    else {
      const WeightCopy copy{{memory.data(), format, 1}, values, outputs, inputs};
      if (jacobiflow_store(&copy, 1, (int32_t)format, 2)) check("store", 1, 0);
    }
    args = {memory.data(), format, is_packed};
  }
};

template <typename T>
double dense_error(int outputs, int inputs, int rows, WeightFormat format, bool is_packed) {
  const Linear<T> linear(outputs, inputs, format, is_packed);
  const std::vector<float> values = normal(rows * inputs);
  const std::vector<T> x(values.begin(), values.end());
  double most = 0;
  dense(x.data(), inputs, linear.args, inputs, outputs, rows, {0, padded<T>(outputs)},
        [&](int row, int column, typename Simd<T>::Vector out) {
          for (int lane = 0; lane < Simd<T>::lanes && column + lane < outputs; lane++) {
            double expected = 0;
            for (int i = 0; i < inputs; i++)
              expected += (double)linear.weight[(column + lane) * inputs + i] * x[row * inputs + i];
            most = std::fmax(most, std::abs(out[lane] - expected));
          }
        });
  return most;
}

// The difference that threads make to a block of one layer, NaN if its result is not finite. Its values are those of 128-bit
// vectors on other processors, which the tests in Python check.
template <typename T>
double transformer_error(WeightFormat format) {
  constexpr int tokens = float_lanes + 4, token_dim = 3, heads = 2, head = 5, width = heads * head, hidden = 12;
  const Linear<T> in(width, token_dim, format), qkv(3 * width, width, format), proj(width, width, format),
      up(hidden, width, format), down(width, hidden, format), out(2 * token_dim, width, format);
  const std::vector<float> numbers = normal(tokens * width, 0.1);
  const std::vector<T> norm(numbers.begin(), numbers.begin() + width), z(numbers.begin(), numbers.begin() + tokens * token_dim),
      position(numbers.begin(), numbers.end());
  LayerArgs<T> layer{};
  layer.norm = layer.norm_bias = layer.mlp_norm = layer.mlp_norm_bias = norm.data();
  layer.qkv = qkv.args, layer.qkv_bias = qkv.bias.data(), layer.proj = proj.args, layer.proj_bias = proj.bias.data();
  layer.up = up.args, layer.up_bias = up.bias.data(), layer.down = down.args, layer.down_bias = down.bias.data();
  double log_det[2] = {};
  std::vector<T> x[2], keys_values(3 * (width + heads * float_lanes) * 2 * tokens);
  for (int i = 0; i < 2; i++) {
    x[i].resize(z.size());
    TransformerArgs<T> args{};
    args.z = z.data(), args.position = position.data(), args.proj_in = in.args;
    args.proj_out = out.args, args.out_bias = out.bias.data(), args.layers = &layer;
    args.x = x[i].data(), args.keys_values = keys_values.data(), args.log_det = &log_det[i];
    args.samples = args.rows_per_sample = args.depth = args.has_scale = args.num_teams = 1, args.num_threads = 1 + 2 * i;
    args.tokens = args.stop = tokens, args.token_dim = token_dim, args.width = width, args.hidden = hidden, args.heads = heads;
    if (jacobiflow_solve_transformer(&args, std::is_same<T, double>::value)) return INFINITY;
  }
  double total = std::abs(log_det[0] - log_det[1]);
  for (size_t i = 0; i < z.size(); i++) total += std::abs(x[0][i] - x[1][i]);
  return total;
}

}  // namespace

int main() {
  check("power of two", error_of(Simd<float>::exp2_of_negative, [](double v) { return std::exp2(v); }, -126, 0, 0), 1e-6);
  check("gelu", error_of(Simd<float>::gelu, gelu_in_double, -8, 8, 1), 1e-6);
  const Vector nan = Simd<float>::broadcast(NAN);
  if (!std::isnan(Simd<float>::exp2_of_negative(nan)[0] + Simd<float>::gelu(nan)[0])) check("NaN", NAN, 0);
  check("logarithm", error_of(Simd<float>::log, [](double v) { return std::log(v); }, 1e-3, 1e3, 1), 1e-6);
  check("elementary functions", elementary_error(), 3e-7);
  using Format = WeightFormat;
  for (Format format : {Format::float32, Format::bfloat16, Format::float16}) {
    for (int rows : {1, 2, 7}) {
      for (int outputs : {1, float_lanes + 1, 5 * float_lanes + 3 * float_lanes * panel_vectors - 1})
        check("dense", dense_error<float>(outputs, 11, rows, format, true), 1e-5);
      check("dense in place", dense_error<float>(float_lanes * 7, float_lanes * 3, rows, format, false), 1e-4);
    }
    check("transformer", transformer_error<float>(format), 1e-6);
  }
  for (bool is_packed : {false, true})
    check("dense in double", dense_error<double>(float_lanes * 7, float_lanes * 3, 7, Format::float64, is_packed), 1e-12);
  check("transformer in double", transformer_error<double>(Format::float64), 1e-12);
  if (!failed) std::puts("OK");
  return failed;
}
