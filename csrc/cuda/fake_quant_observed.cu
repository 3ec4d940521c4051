// Fake-quantize with the grid of a running range on CUDA, with and without a mask: what an observer does while it does
// not watch, in one launch that also writes scales and zero points.
#include "fake_quant_elementwise.h"

namespace clusterq {

void launch_fake_quantize_from_range(Element element, const void* x, void* y, const Extent& extent,
                                     const GridSource& source, ActivationKind activation, cudaStream_t stream) {
  for_element(element, [&](auto value, auto arithmetic) {
    using T = decltype(value);
    using A = decltype(arithmetic);
    const Forward<T, A, RangeParameters<A>> op{static_cast<const T*>(x), nullptr,
                                               static_cast<T*>(y),       nullptr,
                                               of_range<A>(source),      activation_of<A>(activation)};
    launch_elementwise<false>(op, extent, false, stream);
  });
}

void launch_masked_from_range(Element element, const void* x, void* y, uint8_t* mask, const Extent& extent,
                              const GridSource& source, ActivationKind activation, Rule rule, cudaStream_t stream) {
  for_element(element, [&](auto value, auto arithmetic) {
    using T = decltype(value);
    using A = decltype(arithmetic);
    const Activation<A> bounds = activation_of<A>(activation);
    const MaskedForward<T, A, RangeParameters<A>> op{static_cast<const T*>(x), nullptr, static_cast<T*>(y),    mask,
                                                     of_range<A>(source),      bounds,  to_pass(bounds, rule), rule};
    launch_elementwise<false>(op, extent, false, stream);
  });
}

}  // namespace clusterq
