// Compares vector functions and products with double precision, runs a small recurrence, and prints OK. It stands alone, to
// be run by other compilers, and for other processors, than those of the tests in Python.
#include <cstdio>
#include <random>

#include "boundary.cpp"
#include "masked.cpp"
#include "masked_double.cpp"
#include "masked_float.cpp"
#include "recurrence.cpp"
#include "recurrence_double.cpp"
#include "recurrence_float.cpp"

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
template <typename Activation, typename Exact>
double error_of(Activation function, Exact exact, double first, double last, double unit) {
  double most = 0;
  for (int i = 0; i <= 10000; i++) {
    const float v = (float)(first + (last - first) * i / 10000);
    const double expected = exact((double)v), error = std::abs(function(spread(v))[i % lanes] - expected);
    most = std::fmax(most, error / (unit + std::abs(expected)));
  }
  return most;
}

double gelu_in_double(double v) { return v * std::erfc(-v / std::sqrt(2.0)) / 2; }

// The largest relative error of elementary functions; infinite if one is wrong at 0, infinity or NaN.
double elementary_error() {
  using L = Lanes<float>;
  const auto softplus = [](Vector v) { return L::softplus(v, 1, 20); };
  const auto inverse = [](double v) { return 1 / v; };
  double most = 0;
  for (double scale : {1e-6, 1.0, 80.0})
    for (double error : {error_of(L::tanh, [](double v) { return std::tanh(v); }, -scale, scale, 0),
                         error_of(L::sigmoid, [](double v) { return 1 / (1 + std::exp(-v)); }, -scale, scale, 0),
                         error_of(softplus, [](double v) { return std::log1p(std::exp(v)); }, -scale, scale, 0),
                         error_of(L::exp, [](double v) { return std::exp(v); }, -scale, scale, 0),
                         error_of(L::exp_of_small, [](double v) { return std::exp(v); }, -scale, scale, 0),
                         error_of(L::expm1, [](double v) { return std::expm1(v); }, -scale, scale, 0),
                         error_of(L::reciprocal, inverse, scale / 100, scale, 0)})
      most = std::fmax(most, error);
  const float inf = L::infinity, tiny = 1e-40f;
  const auto value = [](auto function, float v) { return function(spread(v))[0]; };
  bool is_right = value(L::tanh, inf) == 1 && value(L::tanh, -inf) == -1 && value(L::tanh, tiny) == tiny &&
                  value(L::sigmoid, inf) == 1 && value(L::sigmoid, -inf) == 0 && value(softplus, inf) == inf &&
                  value(softplus, -inf) == 0 && value(L::exp, inf) == inf && value(L::exp, -inf) == 0 &&
                  value(L::expm1, -inf) == -1 && value(L::log, inf) == inf && value(L::log, 0) == -inf &&
                  value(L::reciprocal, 0) == inf && value(L::reciprocal, -inf) == 0 && std::isnan(value(softplus, NAN));
  for (auto function : {L::tanh, L::sigmoid, L::exp, L::exp_of_small, L::expm1, L::reciprocal, L::log, L::sqrt, L::absolute})
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
  std::vector<float> scales;
  std::vector<char> memory;
  Weight args{};

  Linear(int outputs, int inputs, WeightFormat format, bool is_packed = true)
      : outputs(outputs), inputs(inputs), weight((size_t)outputs * inputs), bias(padded<T>(outputs)),
        scales(padded<float>(outputs), 1 / 1024.0f), memory(sizeof(T) * padded<T>(outputs) * inputs) {
    for (T& value : weight) value = (T)((int)(generator() % 128) - 64) / 1024;
    for (T& value : bias) value = (T)(generator() % 128) / 128;
    const bool is_half = format != WeightFormat::float32 && format != WeightFormat::float64;
    std::vector<uint16_t> halves;
    for (T value : weight)
      halves.push_back(format == WeightFormat::int16 ? (uint16_t)(int)(value * 1024) : narrowed((float)value, format));
    const void* values = is_half ? (const void*)halves.data() : weight.data();
    if (!is_packed)
      std::memcpy(memory.data(), values, weight.size() * (is_half ? 2 : sizeof(T)));
    else if (jacobiflow_pack(values, outputs, inputs, (int32_t)format, memory.data(), 2))
      check("pack", 1, 0);
    args = {memory.data(), format == WeightFormat::int16 ? scales.data() : nullptr, format, is_packed};
  }
};

template <typename T>
double dense_error(int outputs, int inputs, int rows, WeightFormat format, bool is_packed) {
  const Linear<T> linear(outputs, inputs, format, is_packed);
  const std::vector<float> values = normal(rows * inputs);
  const std::vector<T> x(values.begin(), values.end());
  double most = 0;
  dense(x.data(), inputs, linear.args, inputs, outputs, rows, {0, padded<T>(outputs)},
        [&](int row, int column, typename Lanes<T>::Vector out) {
          for (int lane = 0; lane < Lanes<T>::count && column + lane < outputs; lane++) {
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
double recurrence_error(WeightFormat format) {
  constexpr int tokens = lanes + 4, values = 3, heads = 2, head = 5, channels = heads * head, hidden = 12;
  const Linear<T> in(channels, values, format), qkv(3 * channels, channels, format), proj(channels, channels, format),
      up(hidden, channels, format), down(channels, hidden, format), out(2 * values, channels, format);
  const std::vector<float> numbers = normal(tokens * channels, 0.1);
  const std::vector<T> norm(numbers.begin(), numbers.begin() + channels), z(numbers.begin(), numbers.begin() + tokens * values),
      position(numbers.begin(), numbers.end());
  LayerArgs<T> layer{};
  layer.norm = layer.norm_bias = layer.mlp_norm = layer.mlp_norm_bias = norm.data();
  layer.qkv = qkv.args, layer.qkv_bias = qkv.bias.data(), layer.proj = proj.args, layer.proj_bias = proj.bias.data();
  layer.up = up.args, layer.up_bias = up.bias.data(), layer.down = down.args, layer.down_bias = down.bias.data();
  double log_det[2] = {};
  std::vector<T> x[2], keys_values(3 * (channels + heads * lanes) * 2 * tokens);
  for (int i = 0; i < 2; i++) {
    x[i].resize(z.size());
    RecurrenceArgs<T> flow{};
    flow.z = z.data(), flow.position = position.data(), flow.proj_in = in.args;
    flow.proj_out = out.args, flow.out_bias = out.bias.data(), flow.layers = &layer;
    flow.x = x[i].data(), flow.keys_values = keys_values.data(), flow.log_det = &log_det[i];
    flow.samples = flow.networks = flow.depth = flow.scales = flow.teams = 1, flow.threads = 1 + 2 * i;
    flow.tokens = flow.stop = tokens, flow.values = values, flow.channels = channels, flow.hidden = hidden, flow.heads = heads;
    if (jacobiflow_recurrence(&flow, std::is_same<T, double>::value)) return INFINITY;
  }
  double total = std::abs(log_det[0] - log_det[1]);
  for (size_t i = 0; i < z.size(); i++) total += std::abs(x[0][i] - x[1][i]);
  return total;
}

}  // namespace

int main() {
  check("power of two", error_of(exp2_of_negative, [](double v) { return std::exp2(v); }, -126, 0, 0), 1e-6);
  check("gelu", error_of(Lanes<float>::gelu, gelu_in_double, -8, 8, 1), 1e-6);
  if (!std::isnan(exp2_of_negative(spread(NAN))[0] + Lanes<float>::gelu(spread(NAN))[0])) check("NaN", NAN, 0);
  check("logarithm", error_of(Lanes<float>::log, [](double v) { return std::log(v); }, 1e-3, 1e3, 1), 1e-6);
  check("elementary functions", elementary_error(), 3e-7);
  using Format = WeightFormat;
  for (Format format : {Format::float32, Format::bfloat16, Format::float16, Format::int16}) {
    for (int rows : {1, 2, 7}) {
      for (int outputs : {1, lanes + 1, 5 * lanes + 3 * lanes * panel_vectors - 1})
        check("dense", dense_error<float>(outputs, 11, rows, format, true), 1e-5);
      check("dense in place", dense_error<float>(lanes * 7, lanes * 3, rows, format, false), 1e-4);
    }
    check("recurrence", recurrence_error<float>(format), 1e-6);
  }
  for (bool is_packed : {false, true})
    check("dense in double", dense_error<double>(lanes * 7, lanes * 3, 7, Format::float64, is_packed), 1e-12);
  check("recurrence in double", recurrence_error<double>(Format::float64), 1e-12);
  if (!failed) std::puts("OK");
  return failed;
}
