"""The processes that share one run: each has its rows of every batch, and all have the same numbers in the end.

Everything random is drawn for the whole batch by every process from the same seeds, so a run does not depend on how
many there are but for the order in which floating-point numbers are added.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Processes:
    """A process group, or this process alone.

    Args:
        group: of `torch.distributed`; None: no other processes, nothing is communicated.

    Attributes:
        group: as given.
        rank: of this process in the group.
        size: number of processes.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Processes:
        # A group belongs to the process and cannot be copied.
        return self

    def rows(self, count: int) -> slice:
        """Which of `count` rows are this process's: parts that differ by one row at most, in the order of the ranks."""
        return self._rows(self.rank, count)

    def _rows(self, rank: int, count: int) -> slice:
        each, more = divmod(count, self.size)
        begin = rank * each + min(rank, more)
        return slice(begin, begin + each + (rank < more))

    def share(self, count: int) -> float:
        """This process's part of `count` rows: what turns a mean over its own rows into its part of the mean of all."""
        rows = self.rows(count)
        return float(rows.stop - rows.start) / count

    @torch.no_grad()
    def gather_(self, x: Tensor) -> None:
        """Fill x [N, ...], of which this process has set its own rows, with those of the others, in place."""
        if self.size == 1:
            return
        longest = self._rows(0, len(x))
        own = x.new_zeros(longest.stop - longest.start, *x.shape[1:])
        rows = self.rows(len(x))
        own[: rows.stop - rows.start] = x[rows]
        every = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(every, own, self.group)
        for rank, part in enumerate(every):
            rows = self._rows(rank, len(x))
            x[rows] = part[: rows.stop - rows.start]

    def add_(self, x: Tensor) -> Tensor:
        """Sum of x over the processes, the same bits in each, in place; returns x. Not differentiable."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def add(self, x: Tensor) -> Tensor:
        """Sum of x over the processes; the gradient of each process's x is the sum of what all compute from it."""
        if self.size == 1:
            return x
        total: Tensor = _Add.apply(x, self)
        return total

    @torch.no_grad()
    def add_gradients_(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add the gradients of all processes, in one collective per dtype; a parameter without one is left out."""
        if self.size == 1:
            return
        gradients: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is not None:
                gradients.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for parts in gradients.values():
            packed = self.add_(torch.cat([part.reshape(-1) for part in parts]))
            for part, total in zip(parts, torch.split(packed, [part.numel() for part in parts]), strict=True):
                part.copy_(total.view_as(part))

    @torch.no_grad()
    def equalise_(self, network: nn.Module) -> None:
        """Give every process the parameters and buffers of the first."""
        if self.size == 1:
            return
        for tensor in [*network.parameters(), *network.buffers()]:
            dist.broadcast(tensor, group=self.group, group_src=0)

    def agree(self, value: int) -> int:
        """The largest of the processes' whole numbers."""
        if self.size == 1:
            return value
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(self.group) == "nccl" else "cpu"
        largest = torch.tensor(value, device=device)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return int(largest)


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, processes: Processes) -> Tensor:
        ctx.processes = processes
        return processes.add_(x.detach().clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.processes.add_(grad.clone(memory_format=torch.contiguous_format)), None


class SharedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the rows of all processes in training; otherwise, and with one process, torch's.

    The mean, then the squares of the distances from it are added up over the processes: two collectives of C numbers in
    each direction, and no difference of large sums. torch's SyncBatchNorm does not run on a CPU.
    """

    processes: Processes

    @staticmethod
    def convert_(module: nn.Module, processes: Processes) -> None:
        """Make every BatchNorm2d inside `module` one of these, its parameters and buffers kept."""
        for child in module.modules():
            if type(child) is nn.BatchNorm2d:
                child.__class__ = SharedBatchNorm2d
                assert isinstance(child, SharedBatchNorm2d)
                child.processes = processes

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W], the rows of this process -> [N, C, H, W]."""
        if not self.training or self.processes.size == 1:
            return super().forward(x)
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        count = self.processes.add_(torch.tensor(float(x.numel() // x.shape[1]), device=x.device))
        mean = self.processes.add(wide.sum((0, 2, 3))) / count
        centered = wide - mean[:, None, None]
        var = self.processes.add(centered.square().sum((0, 2, 3))) / count
        if self.track_running_stats:
            self._remember(mean.detach(), var.detach() * count / (count - 1))
        y = centered * torch.rsqrt(var + self.eps)[:, None, None]
        if self.affine:
            y = y * self.weight[:, None, None] + self.bias[:, None, None]
        return y.to(x.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, var: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(var, momentum)
