#include "../common/dispatch.h"

#include "../../include/pykernels/flash_attention.h"

PYKERNELS_DISPATCH(flash_attention_fwd, FlashAttentionParams)
PYKERNELS_DISPATCH(flash_attention_bwd, FlashAttentionBackwardParams)
PYKERNELS_DISPATCH(flash_attention_decode, FlashAttentionDecodeParams)
PYKERNELS_DISPATCH(flash_attention_append, FlashAttentionAppendParams)
