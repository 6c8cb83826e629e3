// Transformers for numbers of one type: a build compiles this file with NUMBER=float, and with NUMBER=double.
#include "transformer.h"

template void jacobiflow::solve_transformer<NUMBER>(const TransformerArgs<NUMBER>&);
