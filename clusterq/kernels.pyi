# Typed face of the top-level folder kernels/, which setup maps to clusterq.kernels and type checkers cannot find.
import torch
from torch import Tensor

class fake_quant:
    @staticmethod
    def fake_quantize(
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        quant_min: int,
        quant_max: int,
        axis: int | None,
        activation: str,
    ) -> Tensor: ...
    @staticmethod
    def fake_quantize_backward(
        grad: Tensor,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        quant_min: int,
        quant_max: int,
        axis: int | None,
        activation: str,
    ) -> Tensor: ...
    @staticmethod
    def fake_quantize_learned_backward(
        grad: Tensor,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        quant_min: int,
        quant_max: int,
        axis: int | None,
        activation: str,
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    @staticmethod
    def quantize(
        x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None
    ) -> Tensor: ...
    @staticmethod
    def dequantize(
        codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, dtype: torch.dtype
    ) -> Tensor: ...
    @staticmethod
    def fake_quantize_weight(
        w: Tensor, quant_min: int, quant_max: int, axis: int, symmetric: bool
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    @staticmethod
    def observe_fake_quantize(
        x: Tensor,
        running_min: Tensor,
        running_max: Tensor,
        quant_min: int,
        quant_max: int,
        momentum: float,
        observe: bool,
        symmetric: bool,
        axis: int | None,
        activation: str,
    ) -> tuple[Tensor, Tensor, Tensor]: ...
