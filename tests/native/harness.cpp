// Compares vector functions and products with double precision, runs a small recurrence, and prints OK. It stands alone, to
// be run by other compilers, and for other processors, than those of the tests in Python.
#include <cstdio>
#include <random>

#include "boundary.cpp"
#include "masked.cpp"
#include "masked_double.cpp"
#include "masked_float.cpp"
#include "tarflow.cpp"

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

struct Linear {
  int outputs, inputs;
  std::vector<float> weight, bias, packed;

  Linear(int outputs, int inputs)
      : outputs(outputs), inputs(inputs), weight(normal(outputs * inputs, 0.5 / std::sqrt(inputs))),
        bias(normal(rounded_up(outputs))), packed((size_t)rounded_up(outputs) * inputs) {
    if (jacobiflow_pack(weight.data(), outputs, inputs, packed.data(), 2)) check("pack", 1, 0);
  }
};

double dense_error(int outputs, int inputs, int rows) {
  const Linear linear(outputs, inputs);
  const std::vector<float> x = normal(rows * inputs);
  double most = 0;
  dense(x.data(), inputs, linear.packed.data(), inputs, outputs, rows, {0, rounded_up(outputs)},
        [&](int row, int column, Vector out) {
          for (int lane = 0; lane < lanes && column + lane < outputs; lane++) {
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
double tarflow_error() {
  constexpr int tokens = lanes + 4, values = 3, heads = 2, head = 5, channels = heads * head, hidden = 12;
  const Linear in(channels, values), qkv(3 * channels, channels), proj(channels, channels), up(hidden, channels),
      down(channels, hidden), out(2 * values, channels);
  const std::vector<float> norm = normal(channels), z = normal(tokens * values), position = normal(tokens * channels);
  const Layer layer{norm.data(),        norm.data(),     qkv.packed.data(),  qkv.bias.data(),
                    proj.packed.data(), proj.bias.data(), norm.data(),        norm.data(),
                    up.packed.data(),   up.bias.data(),  down.packed.data(), down.bias.data()};
  double log_det[2] = {};
  std::vector<float> x[2], keys_values(3 * (channels + heads * lanes) * 2 * tokens);
  for (int i = 0; i < 2; i++) {
    x[i].resize(z.size());
    RecurrenceArgs flow{};
    flow.z = z.data(), flow.position = position.data(), flow.proj_in = in.packed.data();
    flow.proj_out = out.packed.data(), flow.out_bias = out.bias.data(), flow.layers = &layer;
    flow.x = x[i].data(), flow.keys_values = keys_values.data(), flow.log_det = &log_det[i];
    flow.samples = flow.networks = flow.depth = flow.scales = flow.teams = 1, flow.threads = 1 + 2 * i;
    flow.tokens = flow.stop = tokens, flow.values = values, flow.channels = channels, flow.hidden = hidden, flow.heads = heads;
    if (jacobiflow_tarflow(&flow)) return INFINITY;
  }
  double total = std::abs(log_det[0] - log_det[1]);
  for (size_t i = 0; i < z.size(); i++) total += std::abs(x[0][i] - x[1][i]);
  return total;
}

}  // namespace

int main() {
  check("power of two", error_of(exp2_of_negative, [](double v) { return std::exp2(v); }, -126, 0, 0), 1e-6);
  check("gelu", error_of(gelu, gelu_in_double, -8, 8, 1), 1e-6);
  if (!std::isnan(exp2_of_negative(spread(NAN))[0] + gelu(spread(NAN))[0])) check("NaN", NAN, 0);
  check("logarithm", error_of(Lanes<float>::log, [](double v) { return std::log(v); }, 1e-3, 1e3, 1), 1e-6);
  check("elementary functions", elementary_error(), 3e-7);
  for (int outputs : {1, lanes + 1, 2 * panel + 3 * lanes - 1})
    for (int rows : {1, 2, 7}) check("dense", dense_error(outputs, 11, rows), 1e-5);
  check("tarflow", tarflow_error(), 1e-6);
  if (!failed) std::puts("OK");
  return failed;
}
