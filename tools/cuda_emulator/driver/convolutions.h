// Convolutions of images, in three directions, on strided tensors.
#pragma once

#include "products.h"

namespace driver {

// An image tensor: sizes and strides in the order batch, channels, height, width.
struct Images {
    Type type;
    int64_t size[4], stride[4];

    // From the first element to behind the last.
    int64_t extent() const {
        int64_t last = 0;
        for (int i = 0; i < 4; i++) {
            last += (size[i] - 1) * stride[i];
        }
        return last + 1;
    }
    int64_t at(int64_t n, int64_t c, int64_t y, int64_t x) const {
        return n * stride[0] + c * stride[1] + y * stride[2] + x * stride[3];
    }
};

// Packed weights, [out, in, height, width] or, channels last, [out, height, width, in].
struct Filter {
    Type type;
    bool channels_last;
    int64_t out, in, height, width;

    int64_t elements() const {
        return out * in * height * width;
    }
};

struct Window {
    int64_t pad[2], stride[2], dilation[2];
    int64_t groups;
    // A convolution proper turns the filter by half a turn.
    bool turned;
    Reduced reduced;
};

// y = alpha * conv(x, w) + beta * y
void convolve(const Images& x, const void* x_data, const Filter& w, const void* w_data, const Window& window,
              const Images& y, void* y_data, double alpha, double beta);
// dx = alpha * (gradient for x) + beta * dx
void convolve_back(const Filter& w, const void* w_data, const Images& dy, const void* dy_data, const Window& window,
                   const Images& dx, void* dx_data, double alpha, double beta);
// dw = alpha * (gradient for w) + beta * dw
void convolve_weights(const Images& x, const void* x_data, const Images& dy, const void* dy_data, const Window& window,
                      const Filter& dw, void* dw_data, double alpha, double beta);

} // namespace driver
