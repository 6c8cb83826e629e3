#include "masked.h"

namespace jacobiflow {

template int64_t evaluate<double>(const ChainArgs&);
template void differentiate<double>(const GradientArgs&);

}  // namespace jacobiflow
