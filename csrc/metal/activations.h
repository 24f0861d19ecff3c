/* activations.h: the words that csrc/functions.h needs, for Metal, whose own exp and tanh may be 4 and 5 units off (MSL specification,
 * section 7.4). */
#ifndef PE_METAL_ACTIVATIONS_H
#define PE_METAL_ACTIVATIONS_H

#include "common.h"

#define PE_FUNCTION static inline

static inline int nearest(float x) { return isnan(x) ? 0 : (int)rint(x); }
static inline float float_of(int bits) { return as_type<float>(bits); }

#include "../functions.h"

#endif
