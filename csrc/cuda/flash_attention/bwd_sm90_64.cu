#include "bwd_sm90.cuh"

PYKERNELS_DEFINE_BWD_SM90(64, flash_attention_bwd_sm90_kernel, BackwardConfigSm90)
