"""BatchNorm layers that report the statistics of their input, without hooks and without a second read of it.

`replace_batch_norm(model)` turns every BatchNorm of a network into its reporting twin, in place: same module objects,
same parameters, same `state_dict` keys. Outside `StatisticsRecorder.record()` the network behaves as before.

    recorder = replace_batch_norm(teacher.eval())
    with recorder.record() as layers:
        logits = teacher(images)
    loss = F.cross_entropy(logits, labels) + alignment_loss(layers).total
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clusterq.ops.bn_stats import (
    batch_norm_with_instance_statistics,
    instance_statistics,
    merge_class_statistics,
    merge_instance_statistics,
)

__all__ = [
    "LayerStatistics",
    "StatisticsBatchNorm1d",
    "StatisticsBatchNorm2d",
    "StatisticsBatchNorm3d",
    "StatisticsRecorder",
    "replace_batch_norm",
]


class LayerStatistics(NamedTuple):
    """What one BatchNorm layer saw in one call.

    Attributes:
        module: the layer; its `running_mean` [C] and `running_var` [C] are what it remembers (the latter unbiased).
        mean, var: [N, C] instance statistics of the input, biased; float32 (float64 for float64 input), differentiable.
        spatial: values per image and channel.
    """

    module: _BatchNorm
    mean: Tensor
    var: Tensor
    spatial: int

    @property
    def running_mean(self) -> Tensor:
        """[C] of the module."""
        assert self.module.running_mean is not None
        return self.module.running_mean

    @property
    def running_var(self) -> Tensor:
        """[C] of the module."""
        assert self.module.running_var is not None
        return self.module.running_var

    def batch(self, correction: int = 0) -> tuple[Tensor, Tensor]:
        """Batch statistics, mean [C] and var [C]: `merge_instance_statistics`."""
        return merge_instance_statistics(self.mean, self.var, self.spatial, correction)

    def classes(self, labels: Tensor, num_classes: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Class statistics, count [K], mean [K, C] and var [K, C]: `merge_class_statistics`."""
        return merge_class_statistics(self.mean, self.var, labels, num_classes, mask)


class StatisticsRecorder:
    """Collects the statistics that the layers of one network report; made by `replace_batch_norm`.

    Attributes:
        names: module -> name of every reporting layer, in module order (which need not be execution order).
        layers: the list being recorded into, None outside `record()`.
    """

    def __init__(self, names: dict[_BatchNorm, str]) -> None:
        self.names = names
        self.layers: list[LayerStatistics] | None = None

    @contextlib.contextmanager
    def record(self) -> Iterator[list[LayerStatistics]]:
        """Record inside the `with` block; the list it yields gains one entry per BatchNorm call, in execution order.

        A layer called twice has two entries. The recorder lets go of the list at the end of the block, so the graph
        lives no longer than the caller's own reference. Raises RuntimeError when a recording is already under way.
        """
        if self.layers is not None:
            raise RuntimeError("this network is already being recorded; leave the outer record() block first")
        layers: list[LayerStatistics] = []
        self.layers = layers
        try:
            yield layers
        finally:
            self.layers = None


class _Reporting:
    """Mixin before a BatchNorm class: reports to `statistics_recorder` while that is recording."""

    statistics_recorder: StatisticsRecorder | None = None
    # Whether the class's own eval forward is plain BatchNorm, so that the fused op may stand in for it.
    _plain = False

    def forward(self: Any, x: Tensor) -> Any:
        recorder = self.statistics_recorder
        if recorder is None or recorder.layers is None:
            return super().forward(x)  # type: ignore[misc]
        if self._plain and not self.training and self.running_mean is not None:
            self._check_input_dim(x)
            y, mean, var = batch_norm_with_instance_statistics(
                x, self.weight, self.bias, self.running_mean, self.running_var, self.eps
            )
        else:
            mean, var = instance_statistics(x)
            y = super().forward(x)  # type: ignore[misc]
        recorder.layers.append(LayerStatistics(self, mean, var, math.prod(x.shape[2:])))
        return y


class StatisticsBatchNorm1d(_Reporting, nn.BatchNorm1d):
    """`nn.BatchNorm1d` that reports; see `StatisticsBatchNorm2d`."""

    _plain = True


class StatisticsBatchNorm2d(_Reporting, nn.BatchNorm2d):
    """`nn.BatchNorm2d` that reports the instance statistics of its input to a `StatisticsRecorder`.

    In eval mode output and statistics come from one read of the input and their gradients from one pass; in training
    mode the statistics are a read of their own. Parameters that do not require gradients cost none. Works inside
    `torch.compile(fullgraph=True)` with `record()` outside the compiled function.
    """

    _plain = True


class StatisticsBatchNorm3d(_Reporting, nn.BatchNorm3d):
    """`nn.BatchNorm3d` that reports; see `StatisticsBatchNorm2d`."""

    _plain = True


# BatchNorm class -> its reporting twin; subclasses are added when they are first met.
_TWINS: dict[type[Any], type[Any]] = {
    nn.BatchNorm1d: StatisticsBatchNorm1d,
    nn.BatchNorm2d: StatisticsBatchNorm2d,
    nn.BatchNorm3d: StatisticsBatchNorm3d,
}


def _reporting_class(base: type[Any]) -> type[Any]:
    """The reporting twin of a BatchNorm class; a subclass with its own forward keeps it and pays a second read."""
    if base not in _TWINS:
        _TWINS[base] = type(f"Statistics{base.__name__}", (_Reporting, base), {"__doc__": base.__doc__})
    return _TWINS[base]


def replace_batch_norm(model: nn.Module) -> StatisticsRecorder:
    """Make every BatchNorm layer of a network report its input statistics, in place.

    Module objects, parameters, buffers, hooks and `state_dict` keys stay; only the class of each layer changes.
    Subclasses of BatchNorm1d/2d/3d, such as normalisation fused with an activation, and SyncBatchNorm are reached too.
    Calling it again on the same network gives a new recorder and disconnects the former one.

    Args:
        model: the network, or one BatchNorm layer.

    Returns:
        The recorder of this network's layers.

    Raises:
        ValueError: the network has no BatchNorm layer, or one that keeps no running statistics to compare with.
    """
    names = {module: name for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no BatchNorm layer; "
            "data-free synthesis needs the statistics that BatchNorm remembers"
        )
    forgetful = [name for module, name in names.items() if module.running_mean is None or module.running_var is None]
    if forgetful:
        raise ValueError(
            f"BatchNorm layers without running statistics: {', '.join(forgetful)}; wanted track_running_stats"
        )
    recorder = StatisticsRecorder(names)
    layer: Any
    for layer in names:
        if not isinstance(layer, _Reporting):
            layer.__class__ = _reporting_class(type(layer))
        layer.statistics_recorder = recorder
    return recorder
