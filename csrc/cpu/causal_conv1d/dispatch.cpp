#include "../common/dispatch.h"

#include "../../include/pykernels/causal_conv1d.h"

PYKERNELS_DISPATCH_VECTORS(causal_conv1d_fwd, CausalConv1dParams)
PYKERNELS_DISPATCH_VECTORS(causal_conv1d_bwd, CausalConv1dBackwardParams)
PYKERNELS_DISPATCH_VECTORS(causal_conv1d_step, CausalConv1dStepParams)
