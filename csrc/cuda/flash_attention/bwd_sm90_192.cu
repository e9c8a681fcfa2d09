#include "bwd_sm90_wide.cuh"

PYKERNELS_DEFINE_BWD_SM90(192, flash_attention_bwd_wide_sm90_kernel, WideBackwardConfigSm90)
