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

class bn_stats:
    @staticmethod
    def instance_statistics(x: Tensor) -> tuple[Tensor, Tensor]: ...
    @staticmethod
    def instance_statistics_list(xs: list[Tensor]) -> tuple[Tensor, Tensor]: ...
    @staticmethod
    def batch_norm_statistics(x: Tensor, correction: int, weights: Tensor | None) -> tuple[Tensor, Tensor]: ...
    @staticmethod
    def class_statistics(
        x: Tensor, labels: Tensor, num_classes: int, weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
    @staticmethod
    def batch_norm_instance_statistics(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    @staticmethod
    def batch_norm_batch_statistics(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    @staticmethod
    def statistics_backward(
        x: Tensor,
        center: Tensor,
        grad_mean: Tensor | None,
        grad_var: Tensor | None,
        mean_factor: float,
        var_factor: float,
    ) -> Tensor: ...
    @staticmethod
    def statistics_backward_list(
        xs: list[Tensor], center: Tensor, grad_mean: Tensor | None, grad_var: Tensor | None
    ) -> list[Tensor]: ...
    @staticmethod
    def batch_norm_statistics_backward(
        grad: Tensor,
        x: Tensor,
        weight: Tensor | None,
        running_var: Tensor,
        eps: float,
        center: Tensor,
        grad_mean: Tensor | None,
        grad_var: Tensor | None,
        mean_factor: float,
        var_factor: float,
    ) -> Tensor: ...
    @staticmethod
    def batch_norm_parameter_backward(
        grad: Tensor, x: Tensor, running_mean: Tensor, running_var: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]: ...

class alignment:
    @staticmethod
    def alignment_loss(
        mean: Tensor,
        var: Tensor,
        target_mean: Tensor,
        target_spread: Tensor,
        columns: Tensor,
        starts: Tensor,
        weight: float,
        squared: bool,
        floor: float | None,
        labels: Tensor | None,
        mask: Tensor | None,
        slots: int,
        first: int,
        class_mean: Tensor | None,
        class_spread: Tensor | None,
        known: Tensor | None,
        class_weights: list[float],
        class_average: bool,
        merged_count: Tensor | None,
        merged_mean: Tensor | None,
        merged_var: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]: ...

class centroids:
    @staticmethod
    def nearest_centroid(x: Tensor, centroids: Tensor, precision: str) -> tuple[Tensor, Tensor]: ...
    @staticmethod
    def two_nearest_centroids(x: Tensor, centroids: Tensor, precision: str) -> tuple[Tensor, Tensor]: ...
    @staticmethod
    def undecided_rows(x: Tensor, centroids: Tensor) -> Tensor: ...
    @staticmethod
    def nearest_centroid_backward(
        grad: Tensor, x: Tensor, centroids: Tensor, index: Tensor
    ) -> tuple[Tensor, Tensor]: ...
    @staticmethod
    def centroid_sums(
        x: Tensor, index: Tensor, weights: Tensor | None, clusters: int, deterministic: bool
    ) -> Tensor: ...
    @staticmethod
    def assign_and_sum(
        x: Tensor, centroids: Tensor, weights: Tensor | None, precision: str, deterministic: bool
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    @staticmethod
    def move_centroids_(
        centroids: Tensor,
        cluster_size: Tensor,
        running_sum: Tensor | None,
        sums: Tensor,
        decay: float,
        update_mode: str,
        smoothing: float,
    ) -> None: ...
