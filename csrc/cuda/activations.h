/* activations.h: the words that csrc/functions.h needs, for cards and the emulator. */
#ifndef PE_CUDA_ACTIVATIONS_H
#define PE_CUDA_ACTIVATIONS_H

#include <math.h> /* fma, fabs, .. of floats, without a namespace */

#include "cuda.h"

#define PE_FUNCTION __device__ __forceinline__

namespace pe {

PE_FUNCTION int nearest(float x) { return __float2int_rn(x); }
PE_FUNCTION float float_of(int bits) { return __int_as_float(bits); }

#include "../functions.h"

static_assert(int(ACT_SILU) == PE_UNARY_KIND_SILU && int(ACT_SOFTPLUS) == PE_UNARY_KIND_SOFTPLUS, "the choices of `unary`");

} // namespace pe

#endif
