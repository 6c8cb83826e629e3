// Chains for numbers of one type: a build compiles this file with NUMBER=float, and with NUMBER=double.
#include "masked.h"

template int64_t jacobiflow::evaluate<NUMBER>(const ChainArgs&);
template void jacobiflow::differentiate<NUMBER>(const GradientArgs&);
