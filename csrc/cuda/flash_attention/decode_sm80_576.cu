#include "decode_sm80.cuh"

PYKERNELS_DEFINE_DECODE_SM80(576)
