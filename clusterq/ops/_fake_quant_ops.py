"""The fake-quantize ops, defined; the autograd Functions on top of them: `_fake_quant_autograd.py`."""

from __future__ import annotations

from clusterq.ops import _fake_quant_mask_reference as mask_reference
from clusterq.ops import _fake_quant_reference as reference
from clusterq.ops._library import register_op

fake_quantize_op = register_op(
    "fake_quantize(Tensor x, Tensor scale, Tensor zero_point, int quant_min, int quant_max, int? axis, str activation)"
    " -> Tensor",
    reference=reference.fake_quantize,
    fake=reference.fake_like,
    triton="fake_quant:fake_quantize",
)
backward_op = register_op(
    "fake_quantize_backward(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, int quant_min, int quant_max,"
    " int? axis, str activation) -> Tensor",
    reference=reference.fake_quantize_backward,
    fake=reference.fake_backward,
    triton="fake_quant:fake_quantize_backward",
)
learned_backward_op = register_op(
    "fake_quantize_learned_backward(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, int quant_min,"
    " int quant_max, int? axis, str activation) -> (Tensor, Tensor, Tensor)",
    reference=reference.fake_quantize_learned_backward,
    fake=reference.fake_learned_backward,
    triton="fake_quant:fake_quantize_learned_backward",
)
quantize_op = register_op(
    "quantize(Tensor x, Tensor scale, Tensor zero_point, int quant_min, int quant_max, int? axis) -> Tensor",
    reference=reference.quantize,
    fake=reference.fake_codes,
    triton="fake_quant:quantize",
)
dequantize_op = register_op(
    "dequantize(Tensor codes, Tensor scale, Tensor zero_point, int? axis, ScalarType dtype) -> Tensor",
    reference=reference.dequantize,
    fake=reference.fake_dequantize,
    triton="fake_quant:dequantize",
)
weight_op = register_op(
    "fake_quantize_weight(Tensor w, int quant_min, int quant_max, int axis, bool symmetric)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference.fake_quantize_weight,
    fake=reference.fake_weight,
    triton="fake_quant:fake_quantize_weight",
)
observe_op = register_op(
    "observe_fake_quantize(Tensor x, Tensor(a!) running_min, Tensor(b!) running_max, int quant_min, int quant_max,"
    " float momentum, bool observe, bool symmetric, int? axis, str activation) -> (Tensor, Tensor, Tensor)",
    reference=reference.observe_fake_quantize,
    fake=reference.fake_observe,
    triton="fake_quant:observe_fake_quantize",
)
masked_op = register_op(
    "fake_quantize_masked(Tensor x, Tensor scale, Tensor zero_point, int quant_min, int quant_max, int? axis,"
    " str activation, str rule) -> (Tensor, Tensor)",
    reference=mask_reference.fake_quantize_masked,
    fake=mask_reference.fake_masked,
    triton="fake_quant_mask:fake_quantize_masked",
)
masked_backward_op = register_op(
    "fake_quantize_masked_backward(Tensor grad, Tensor mask, SymInt[] stride) -> Tensor",
    reference=mask_reference.fake_quantize_masked_backward,
    fake=mask_reference.fake_masked_backward,
    triton="fake_quant_mask:fake_quantize_masked_backward",
)
observe_masked_op = register_op(
    "observe_fake_quantize_masked(Tensor x, Tensor(a!) running_min, Tensor(b!) running_max, int quant_min,"
    " int quant_max, float momentum, bool observe, bool symmetric, int? axis, str activation, str rule)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=mask_reference.observe_fake_quantize_masked,
    fake=mask_reference.fake_observe_masked,
    triton="fake_quant_mask:observe_fake_quantize_masked",
)
delayed_op = register_op(
    "delayed_fake_quantize(Tensor x, Tensor(a!) running_min, Tensor(b!) running_max, int quant_min, int quant_max,"
    " float momentum, bool symmetric, int? axis, str activation, str rule) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=mask_reference.delayed_fake_quantize,
    fake=mask_reference.fake_delayed,
    triton="fake_quant_mask:delayed_fake_quantize",
)
weights_op = register_op(
    "fake_quantize_weights(Tensor[] weights, int quant_min, int quant_max, int axis, bool symmetric)"
    " -> (Tensor[], Tensor, Tensor)",
    reference=reference.fake_quantize_weights,
    fake=reference.fake_weights,
    triton="fake_quant:fake_quantize_weights",
)
range_op = register_op(
    "finite_range(Tensor x, int? axis, str activation) -> (Tensor, Tensor)",
    reference=reference.finite_range,
    fake=reference.fake_range,
    triton="fake_quant:finite_range",
)
error_op = register_op(
    "quantization_error(Tensor x, Tensor scales, Tensor zero_points, int quant_min, int quant_max, int? axis)"
    " -> Tensor",
    reference=reference.quantization_error,
    fake=reference.fake_error,
    triton="fake_quant:quantization_error",
)
