"""The processes that share one run: each has its rows of every batch, and all have the same numbers in the end.

Everything random is drawn for the whole batch by every process from the same seeds, so a run does not depend on how
many there are but for the order in which floating-point numbers are added.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clusterq.errors import ClusterQError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_Value = TypeVar("_Value")


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

    def first(self, compute: Callable[[], _Value]) -> _Value:
        """What `compute` gives in the first process, for all, or the error of a user or a file that it ends in there.

        Values travel as pickles between processes that trust each other.
        """
        if self.size == 1:
            return compute()
        parcel: list[Any] = [None, None]
        if self.rank == 0:
            try:
                parcel[0] = compute()
            except (ClusterQError, OSError) as error:
                parcel[1] = error
        dist.broadcast_object_list(parcel, group=self.group, group_src=0)
        value, problem = parcel
        if problem is not None:
            problem.told = self.rank > 0
            raise problem
        return value  # type: ignore[no-any-return]


@contextmanager
def joined(device: str) -> Iterator[tuple[ProcessGroup | None, str]]:
    """The process group of a process that `torchrun` has started, and its device; (None, device) in any other.

    gloo on CPUs and nccl on GPUs, of which each process takes that of its LOCAL_RANK.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield None, device
        return
    if torch.device(device).type == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if torch.device(device).type == "cuda" else "gloo")
    try:
        yield dist.group.WORLD, device
    finally:
        dist.destroy_process_group()


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

    The sums with their count, then the squares of the distances from the mean are added up over the processes: two
    collectives of C numbers in each direction, and no difference of large sums. torch's SyncBatchNorm does not run on a
    CPU.
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
        own = wide.new_full((1,), x.numel() // x.shape[1])
        total = self.processes.add(torch.cat([wide.sum((0, 2, 3)), own]))
        count = total[-1]
        mean = total[:-1] / count
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
