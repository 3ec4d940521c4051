// Fake-quantize on CUDA: forward and clipped backward. Formulas: numerics.h; compiled with --fmad=false. Bytes per
// element of float32: forward 8, backward 12, each input read once and each output written once; one launch.
#include "fake_quant_elementwise.h"

namespace clusterq {
namespace {

template <typename T, typename A>
struct Backward {
  using In = T;
  using Out = T;
  using Ready = Gate<A>;
  static constexpr bool kGrad = true, kMask = false, kDivides = Parameters<A>::kDivides;
  const T *x, *grad;
  T* out;
  uint8_t* mask;
  Parameters<A> source;
  Activation<A> activation;
  Pass<A> pass;

  __device__ __forceinline__ void publish(int64_t) const {}
  __device__ __forceinline__ Ready ready(int64_t channel) const {
    return {to_steps(source.grid(channel), activation), pass};
  }
  __device__ __forceinline__ T value(T v, T upstream, const Ready& gate, bool&) const {
    const A x = widen(v);
    return passes(x, round_even(x * gate.steps.inverse), gate.steps, gate.pass, false) ? upstream : Narrow<T>::of(A(0));
  }
};

}  // namespace

void launch_fake_quantize(Element element, const void* x, void* y, const Extent& extent, const GridSource& source,
                          ActivationKind activation, bool reverse, cudaStream_t stream) {
  for_element(element, [&](auto value, auto arithmetic) {
    using T = decltype(value);
    using A = decltype(arithmetic);
    const Forward<T, A, Parameters<A>> op{
        static_cast<const T*>(x), nullptr, static_cast<T*>(y), nullptr, given<A>(source), activation_of<A>(activation)};
    launch_elementwise(op, extent, reverse, stream);
  });
}

void launch_fake_quantize_backward(Element element, const void* grad, const void* x, void* grad_x, const Extent& extent,
                                   const GridSource& source, ActivationKind activation, cudaStream_t stream) {
  for_element(element, [&](auto value, auto arithmetic) {
    using T = decltype(value);
    using A = decltype(arithmetic);
    const Activation<A> bounds = activation_of<A>(activation);
    const Backward<T, A> op{static_cast<const T*>(x),
                            static_cast<const T*>(grad),
                            static_cast<T*>(grad_x),
                            nullptr,
                            given<A>(source),
                            bounds,
                            to_pass(bounds, Rule::kCodes)};
    launch_elementwise(op, extent, false, stream);
  });
}

}  // namespace clusterq
