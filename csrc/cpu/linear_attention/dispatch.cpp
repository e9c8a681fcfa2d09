#include "../common/dispatch.h"

#include "../../include/pykernels/linear_attention.h"

PYKERNELS_DISPATCH(linear_attention_fwd, LinearAttentionParams)
PYKERNELS_DISPATCH(linear_attention_bwd, LinearAttentionBackwardParams)
PYKERNELS_DISPATCH(linear_attention_step, LinearAttentionStepParams)
