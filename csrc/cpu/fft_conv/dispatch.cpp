#include "../common/dispatch.h"

#include "../../include/pykernels/fft_conv.h"

PYKERNELS_DISPATCH_VECTORS(fft_conv_fwd, FFTConvParams)
PYKERNELS_DISPATCH_VECTORS(fft_conv_bwd, FFTConvBackwardParams)
PYKERNELS_DISPATCH_VECTORS(fft_conv_spectrum, FFTConvSpectrumParams)
PYKERNELS_DISPATCH_VECTORS(fft_conv_step, FFTConvStepParams)
