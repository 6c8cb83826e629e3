// Compares vector functions and a small recurrence with loops in double precision, and prints OK. It stands alone, to be run
// by other compilers, and for other processors, than those of the tests in Python.
#include <cstdio>
#include <random>

#include "masked.cpp"
#include "tarflow.cpp"

namespace {

using Row = std::vector<double>;
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

struct Linear {
  int outputs, inputs;
  std::vector<float> weight, bias, packed;

  Linear(int outputs, int inputs)
      : outputs(outputs), inputs(inputs), weight(normal(outputs * inputs, 0.5 / std::sqrt(inputs))), bias(normal(rounded_up(outputs))),
        packed((size_t)rounded_up(outputs) * inputs) {
    if (jacobiflow_pack(weight.data(), outputs, inputs, packed.data(), 2)) check("pack", 1, 0);
  }

  Row operator()(const Row& x) const {
    Row out(bias.begin(), bias.begin() + outputs);
    for (int o = 0; o < outputs; o++)
      for (int i = 0; i < inputs; i++) out[o] += (double)weight[o * inputs + i] * x[i];
    return out;
  }
};

struct Norm {
  std::vector<float> weight, bias;

  explicit Norm(int size) : weight(normal(size)), bias(normal(size)) {}

  Row operator()(const Row& x) const {
    const int size = (int)x.size();
    double mean = 0, variance = 0;
    for (double v : x) mean += v / size;
    for (double v : x) variance += (v - mean) * (v - mean) / size;
    Row out(size);
    for (int i = 0; i < size; i++) out[i] = (x[i] - mean) / std::sqrt(variance + 1e-5) * weight[i] + bias[i];
    return out;
  }
};

void add(Row& to, const Row& what) {
  for (size_t i = 0; i < to.size(); i++) to[i] += what[i];
}

double dense_error(int outputs, int inputs, int rows) {
  const Linear linear(outputs, inputs);
  const std::vector<float> x = normal(rows * inputs);
  double most = 0;
  dense(x.data(), inputs, linear.packed.data(), inputs, outputs, rows, {0, rounded_up(outputs)},
        [&](int row, int column, Vector out) {
          const Row expected = linear(Row(x.begin() + row * inputs, x.begin() + (row + 1) * inputs));
          for (int i = 0; i < lanes && column + i < outputs; i++)
            most = std::fmax(most, std::abs(out[i] + linear.bias[column + i] - expected[column + i]));
        });
  return most;
}

// A block of one layer, one sample and three threads.
double tarflow_error() {
  constexpr int tokens = lanes + 4, values = 3, heads = 2, head = 5, channels = heads * head, hidden = 12;
  const Linear in(channels, values), qkv(3 * channels, channels), proj(channels, channels), up(hidden, channels),
      down(channels, hidden), out(2 * values, channels);
  const Norm norm(channels), mlp_norm(channels);
  const std::vector<float> z = normal(tokens * values);
  std::vector<float> position = normal(tokens * channels), x(z.size()), keys_values(3 * (channels + heads * lanes) * 2 * tokens);

  Row expected(z.begin(), z.begin() + values);
  std::vector<Row> keys_and_values;
  for (int t = 0; t + 1 < tokens; t++) {
    Row h(position.begin() + t * channels, position.begin() + (t + 1) * channels);
    for (int c = 0; c < channels; c++)
      for (int v = 0; v < values; v++) h[c] += (double)in.weight[c * values + v] * expected[t * values + v];
    const Row now = qkv(norm(h));
    keys_and_values.push_back(now);
    Row attended(channels);
    for (int first = 0; first < channels; first += head) {
      Row shares;
      double total = 0;
      for (const Row& then : keys_and_values) {
        double logit = 0;
        for (int d = first; d < first + head; d++) logit += now[d] * then[channels + d] / std::sqrt((double)head);
        shares.push_back(std::exp(logit));
        total += shares.back();
      }
      for (int j = 0; j <= t; j++)
        for (int d = first; d < first + head; d++) attended[d] += shares[j] / total * keys_and_values[j][2 * channels + d];
    }
    add(h, proj(attended));
    Row inner = up(mlp_norm(h));
    for (double& v : inner) v = gelu_in_double(v);
    add(h, down(inner));
    const Row last = out(h);
    for (int v = 0; v < values; v++)
      expected.push_back(std::exp(last[v]) * z[(t + 1) * values + v] + last[values + v]);
  }

  const Layer layer{norm.weight.data(),     norm.bias.data(),     qkv.packed.data(),  qkv.bias.data(),
                    proj.packed.data(),     proj.bias.data(),     mlp_norm.weight.data(), mlp_norm.bias.data(),
                    up.packed.data(),       up.bias.data(),       down.packed.data(), down.bias.data()};
  TarFlow flow{};
  flow.z = z.data(), flow.position = position.data(), flow.proj_in = in.packed.data();
  flow.proj_out = out.packed.data(), flow.out_bias = out.bias.data(), flow.layers = &layer;
  flow.x = x.data(), flow.keys_values = keys_values.data();
  flow.samples = flow.networks = flow.depth = flow.scales = flow.teams = 1, flow.threads = 3;
  flow.tokens = flow.stop = tokens, flow.values = values, flow.channels = channels, flow.hidden = hidden, flow.heads = heads;
  if (jacobiflow_tarflow(&flow)) return INFINITY;
  double most = 0, largest = 0;
  for (size_t i = 0; i < x.size(); i++) {
    most = std::fmax(most, std::abs(x[i] - expected[i]));
    largest = std::fmax(largest, std::abs(expected[i]));
  }
  return most / largest;
}

}  // namespace

int main() {
  check("exponential", error_of(exponential, [](double v) { return std::exp(v); }, -87, 88, 0), 1e-6);
  check("exponential of infinities", exponential(spread(-INFINITY))[0] + 1 / exponential(spread(INFINITY))[0], 0);
  check("gelu", error_of(gelu, gelu_in_double, -8, 8, 1), 1e-6);
  if (!std::isnan(exponential(spread(NAN))[0] + gelu(spread(NAN))[0])) check("NaN", NAN, 0);
  for (int outputs : {1, lanes + 1, 2 * panel + 3 * lanes - 1})
    for (int rows : {1, 2, 7}) check("dense", dense_error(outputs, 11, rows), 1e-5);
  check("tarflow", tarflow_error(), 1e-5);
  if (!failed) std::puts("OK");
  return failed;
}
