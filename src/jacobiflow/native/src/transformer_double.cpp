#include "transformer.h"

namespace jacobiflow {

template void solve_transformer<double>(const TransformerArgs<double>&);

}  // namespace jacobiflow
