// A BatchNorm of fixed statistics as a scale and a shift of each channel.
#pragma once

#include <math.h>

#include "runtime/kernels.h"

namespace {

using sparsify::ConvolutionCall;

inline float norm_scale(const ConvolutionCall &call, int64_t channel) {
    const float weight = call.norm_weight ? call.norm_weight[channel] : 1.0f;
    return weight / sqrtf(call.norm_variance[channel] + float(call.norm_eps));
}

// With the bias that was added before the norm.
inline float norm_shift(const ConvolutionCall &call, int64_t channel, float bias, float scale) {
    return (call.norm_bias ? call.norm_bias[channel] : 0.0f) + (bias - call.norm_mean[channel]) * scale;
}

}  // namespace
