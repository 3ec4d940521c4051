"""Codebook of VQ-VAE, learned by moving averages: a drop-in for the one of vector-quantize-pytorch.

    codebook = EMACodebook(dim=64, codebook_size=512, decay=0.99)
    quantized, index, loss = codebook.quantize(latents)  # [b, n, 64]: straight-through, and the commitment loss

    vq = vector_quantize_pytorch.VectorQuantize(dim=64, codebook_size=512)
    vq._codebook = EMACodebook.from_codebook(vq._codebook)  # same state_dict, same results

Every training step (van den Oord et al. 2017, appendix A.1), with d = decay, e = eps, n_k and s_k the number and the
sum of the rows nearest to entry k: `N_k <- d N_k + (1 - d) n_k`, `S_k <- d S_k + (1 - d) s_k`,
`c_k <- S_k / ((N_k + e) / (T + K e) T)` with `T = sum_k N_k`. Then entries with N_k below a threshold are revived.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clusterq.nn._revival import offer_rows
from clusterq.ops import _centroids_ops as op
from clusterq.ops._checks import FLOATING, check_integer, check_number, check_precision, check_tensor
from clusterq.ops.centroids import Precision
from clusterq.ops.kmeans import plus_plus_start

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["EMACodebook", "commitment_loss", "straight_through"]


def straight_through(x: Tensor, quantized: Tensor) -> Tensor:
    """`quantized` in value, x in gradient: what the decoder gets. Both of one shape; the result has the dtype of x."""
    return x + (quantized.to(x.dtype) - x).detach()


def commitment_loss(x: Tensor, quantized: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of `(x - quantized)^2`, which pulls the encoder's outputs to their entries; gradient for x alone.

    Args:
        x, quantized: [..., n, D].
        mask: bool, broadcastable to [..., n]: rows that count; with none of them the loss is 0.
    """
    quantized = quantized.detach().to(x.dtype)
    if mask is None:
        return functional.mse_loss(x, quantized)
    rows = mask.expand(x.shape[:-1])
    squares = torch.where(rows[..., None], x - quantized, 0).square()
    return squares.sum() / (rows.sum() * x.shape[-1]).clamp(min=1)


class EMACodebook(nn.Module):
    """Entries that follow the moving average of the rows nearest to them.

    State, calls and results are those of `Codebook` in vector-quantize-pytorch (1.32; `EuclideanCodebook` in older
    ones) without random sampling of entries, and checkpoints go both ways. It differs in this:

    - The nearest entry is the one a float64 search finds, and no matrix of N * codebook_size distances exists: the
      third result of `forward` is None. VectorQuantize's cross-entropy and diversity losses, which need it, fail.
    - Dead entries (`cluster_size` below `threshold_ema_dead_code` after a step) are revived without waiting for the
      device. Each becomes a row of the batch, `embed_avg` and `cluster_size` with it; a row revives one entry at most,
      so with fewer rows than dead entries some wait, as there. The rows are drawn with torch's generator of the
      device (`torch.manual_seed`), one from each of as many equal parts of the batch as there are dead entries. In
      a process group every process offers rows for its share of the entries that may be dead, in the same all_reduce
      as the sums; all then take the same.
    - `kmeans_init` starts from k-means++ instead of random rows (in a process group: from those of the first process),
      and works for several codebooks in a process group too.
    - A row with a NaN gets index -1, NaN for its quantized values, and takes no part in the averages. An entry that is
      nearest to a row with an infinity (which mixed precision may produce) takes no rows in this step.
    - The state stays in float32 through `.half()`, `.bfloat16()` and `.double()`: averages with a decay near 1 would
      stand still in 16 bits. Rows may have any floating dtype; float64 is searched in float32.

    Works under `torch.compile(fullgraph=True)` and autocast. With `kmeans_init` the first call must not be compiled.

    Args:
        dim: D.
        codebook_size: K.
        num_codebooks: H, codebooks of as many heads.
        kmeans_init: set the entries by k-means on the first batch.
        kmeans_iters: its iterations.
        decay: weight of the old averages.
        eps: Laplace smoothing of the sizes.
        threshold_ema_dead_code: 0 revives none.
        reset_cluster_size: `cluster_size` of a revived entry; None for the threshold.
        use_ddp: all processes of the group hold parts of one batch; one all_reduce per step.
        ema_update: False keeps the entries where they are (usage is still tracked while dead ones are revived).
        manual_ema_update: the averages move in every step, the entries only when `update_ema()` is called.
        precision, deterministic: as in `clusterq.ops.assign_and_update_`.
        process_group: None for the default one.

    Attributes:
        embed: [H, K, D] float32 entries.
        embed_avg: [H, K, D] float32, S.
        cluster_size: [H, K] float32, N.
        initted: bool [], whether the entries have been set.
    """

    embed: Tensor
    embed_avg: Tensor
    cluster_size: Tensor
    initted: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_codebooks: int = 1,
        *,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        decay: float = 0.8,
        eps: float = 1e-5,
        threshold_ema_dead_code: float = 2,
        reset_cluster_size: float | None = None,
        use_ddp: bool = False,
        ema_update: bool = True,
        manual_ema_update: bool = False,
        precision: Precision = "exact",
        deterministic: bool = True,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_integer("dim", dim, 1)
        check_integer("codebook_size", codebook_size, 1)
        check_integer("num_codebooks", num_codebooks, 1)
        check_integer("kmeans_iters", kmeans_iters, 1)
        check_number("decay", decay, 0, 1)
        check_number("eps", eps, 0)
        check_number("threshold_ema_dead_code", threshold_ema_dead_code, 0)
        if reset_cluster_size is None:
            reset_cluster_size = threshold_ema_dead_code
        check_number("reset_cluster_size", reset_cluster_size, 0)
        check_precision(precision)
        self.dim, self.codebook_size, self.num_codebooks = dim, codebook_size, num_codebooks
        self.kmeans_iters = kmeans_iters
        self.decay, self.eps = float(decay), float(eps)
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self.has_dead_code_replacement = threshold_ema_dead_code > 0
        self.reset_cluster_size = reset_cluster_size
        self.use_ddp, self.process_group = use_ddp, process_group
        self.ema_update, self.manual_ema_update = ema_update, manual_ema_update
        self.precision: Precision = precision
        self.deterministic = deterministic
        embed = torch.zeros(num_codebooks, codebook_size, dim, dtype=torch.float32)
        if not kmeans_init:
            nn.init.kaiming_uniform_(embed)
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", torch.ones(num_codebooks, codebook_size, dtype=torch.float32))
        self.register_buffer("embed_avg", embed.clone())
        self.register_buffer("embed", embed)
        # `initted` on the host, where reading it does not wait for the device.
        self._ready = not kmeans_init

    @classmethod
    def from_codebook(cls, codebook: nn.Module, **options: Any) -> EMACodebook:
        """The twin of a `Codebook` of vector-quantize-pytorch: its settings, its state, its device.

        `options` (`precision`, `deterministic`, `process_group`) go to the constructor. Raises ValueError for a
        codebook with an option that has no counterpart here: learned entries, cosine similarity, affine parameters, a
        bridge, stochastic sampling.
        """
        theirs: Any = codebook
        names = ("learnable_codebook", "use_cosine_sim", "affine_param", "vq_bridge")
        unlike = [name for name in names if getattr(theirs, name, None)]
        sampling = getattr(theirs.gumbel_sample, "keywords", {})
        unlike += [name for name in ("stochastic", "straight_through") if sampling.get(name)]
        if unlike:
            raise ValueError(f"codebook has {', '.join(unlike)}; EMACodebook has no counterpart of it")
        averages = ("decay", "eps", "ema_update", "manual_ema_update", "use_ddp")
        others = ("kmeans_iters", "threshold_ema_dead_code", "reset_cluster_size")
        settings = {name: getattr(theirs, name) for name in (*averages, *others)}
        own = cls(theirs.embed.shape[-1], theirs.codebook_size, theirs.num_codebooks, **settings, **options)
        own.to(theirs.embed.device).load_state_dict(theirs.state_dict())
        return own.train(theirs.training)

    def forward(
        self,
        x: Tensor,
        sample_codebook_temp: float | None = None,
        mask: Tensor | None = None,
        freeze_codebook: bool = False,
        codebook_transform_fn: Callable[..., Any] | None = None,
        ema_update_weight: Tensor | Callable[..., Any] | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
        topk: int | None = None,
        update_usage: bool = True,
    ) -> tuple[Tensor, Tensor, None]:
        """Entries nearest to the rows; in training mode the codebook then moves.

        Args:
            x: [n, D] or [b, n, D] for one codebook, [H, b, ..., n, D] in general; a floating dtype.
            sample_codebook_temp: has no effect, as there without stochastic sampling.
            mask: bool [b, n] or [n]: rows that the codebook learns from. With x [1, b * heads, n, D] it holds for all
                heads.
            freeze_codebook: True: nothing moves, as in eval mode.
            codebook_transform_fn, ema_update_weight, accum_ema_update, topk: not supported; wanted as they are.
            ema_update: overrides that of the constructor.
            update_usage: False: nothing moves.

        Returns:
            quantized, float32, shape of x, without gradient; index, int64, shape of x without D; None.

        Raises:
            TypeError, ValueError: an argument that does not fit or is not supported.
            RuntimeError: compiled before `kmeans_init` has set the entries.
        """
        refused = {
            "codebook_transform_fn": codebook_transform_fn,
            "ema_update_weight": ema_update_weight,
            "accum_ema_update": accum_ema_update or None,
            "topk": topk,
        }
        for name, value in refused.items():
            if value is not None:
                raise ValueError(f"{name} is given; EMACodebook does not support it")
        rows = self._rows(x)
        weights = self._weights(mask, x, rows)
        with torch.no_grad():
            if not self._ready:
                self.init_embed_(rows, None if weights is None else weights > 0)
            move = self.ema_update if ema_update is None else ema_update
            tracked = move or self.has_dead_code_replacement
            if self.training and update_usage and not freeze_codebook and tracked:
                index, distance, sums = op.assign_and_sum(rows, self.embed, weights, self.precision, self.deterministic)
                quantized = self._entries(index)
                self._update(rows, torch.isfinite(distance), weights, sums, move)
            else:
                index, _ = op.nearest_centroid(rows, self.embed, self.precision)
                quantized = self._entries(index)
        return quantized.view(x.shape), index.view(x.shape[:-1]), None

    def quantize(
        self, x: Tensor, mask: Tensor | None = None, commitment_weight: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `VectorQuantize(rotation_trick=False)` returns for the same x [b, n, D]; x may have several heads, too.

        Returns:
            quantized in the dtype of x: straight-through in training mode, the entries in eval mode; 0 where masked.
            index: int64, shape of x without D; -1 where masked.
            loss: `commitment_weight * commitment_loss` in training mode, else 0.
        """
        quantized, index, _ = self(x, mask=mask)
        out, loss = quantized.to(x.dtype), x.new_zeros(())
        if self.training:
            out = straight_through(x, quantized)
            loss = commitment_loss(x, quantized, mask) * commitment_weight
        if mask is not None:
            out, index = torch.where(mask[..., None], out, 0), torch.where(mask, index, -1)
        return out, index, loss

    @torch.no_grad()
    def init_embed_(self, data: Tensor, mask: Tensor | None = None) -> None:
        """Sets entries and averages by k-means on data [H, N, D], unless they are set already.

        Args:
            mask: bool [H, N], rows that count.

        Raises:
            RuntimeError: called from compiled code.
            ValueError: no row is finite and counts.
        """
        if self._ready:
            return
        if torch.compiler.is_compiling():
            raise RuntimeError("the entries are not set yet: call the codebook once before torch.compile")
        self._ready = bool(self.initted)
        if self._ready:
            return
        usable = torch.isfinite(data).all(-1)
        weights = (usable if mask is None else usable & mask).float()
        means = plus_plus_start(data, weights, self.codebook_size, None).float()
        if self.use_ddp:
            torch.distributed.broadcast(means, group=self.process_group, group_src=0)
        if not bool(torch.isfinite(means).all()):
            raise ValueError("x has no row to start k-means from: all have a NaN, an infinity or are masked")
        count = means.new_zeros(means.shape[:-1])
        for _ in range(self.kmeans_iters):
            _, _, sums = op.assign_and_sum(data, means, weights, self.precision, self.deterministic)
            if self.use_ddp:
                torch.distributed.all_reduce(sums, group=self.process_group)
            count = sums[..., -1:]
            means = torch.where(count > 0, sums[..., :-1] / count, means).float()
        self.embed_avg.copy_(means * count)
        self.cluster_size.copy_(count.squeeze(-1))
        self.embed.copy_(means)
        self.update_ema()
        self.initted.fill_(True)
        self._ready = True

    @torch.no_grad()
    def update_ema(self) -> None:
        """Sets the entries to the averages; for `manual_ema_update`."""
        nothing = self.embed.new_zeros((*self.cluster_size.shape, self.dim + 1), dtype=torch.float64)
        op.move_centroids_(self.embed, self.cluster_size, self.embed_avg, nothing, 1.0, "codebook", self.eps)

    @torch.no_grad()
    def update_indices(self, x: Tensor, embed_ind: Tensor, mask: Tensor | None = None) -> None:
        """The move of a training step for rows whose entries are known.

        Args:
            x, mask: as in `forward`.
            embed_ind: int64, shape of x without D; rows with -1 are left out.
        """
        rows = self._rows(x)
        weights = self._weights(mask, x, rows)
        if not self.ema_update and not self.has_dead_code_replacement:
            return
        index = embed_ind.reshape(rows.shape[:2])
        sums = op.centroid_sums(rows, index, weights, self.codebook_size, self.deterministic)
        usable = (index >= 0) & torch.isfinite(rows).all(-1)
        self._update(rows, usable, weights, sums, self.ema_update)

    update_ema_indices = update_indices

    @torch.no_grad()
    def expire_codes_(self, batch_samples: Tensor, seq_mask: Tensor | None = None) -> None:
        """Revives dead entries by rows of `batch_samples` (as x in `forward`) in training mode.

        Args:
            seq_mask: bool [H, N] over the flattened rows: those that may be taken.
        """
        if not self.has_dead_code_replacement or not self.training:
            return
        rows = self._rows(batch_samples)
        usable = torch.isfinite(rows).all(-1)
        dead = self.cluster_size < self.threshold_ema_dead_code
        offers = self._offers(rows, usable if seq_mask is None else usable & seq_mask, dead)
        if self.use_ddp:
            torch.distributed.all_reduce(offers, group=self.process_group)
        self._revive(dead, offers)

    @staticmethod
    def transform_input(x: Tensor) -> Tensor:
        """x: VectorQuantize asks for this."""
        return x

    def _rows(self, x: Tensor) -> Tensor:
        """[H, N, D] without gradient, float32 if x is float64."""
        check_tensor("x", x, FLOATING)
        rows = x.detach() if x.dim() > 3 else x.detach().unsqueeze(0)
        if x.dim() < 2 or rows.shape[0] != self.num_codebooks or rows.shape[-1] != self.dim:
            wanted = f"[{self.num_codebooks}, b, n, {self.dim}]"
            if self.num_codebooks == 1:
                wanted = f"[n, {self.dim}], [b, n, {self.dim}] or {wanted}"
            raise ValueError(f"x has shape {tuple(x.shape)}; wanted {wanted}")
        rows = rows.flatten(1, -2)
        return rows.float() if rows.dtype == torch.float64 else rows

    def _weights(self, mask: Tensor | None, x: Tensor, rows: Tensor) -> Tensor | None:
        """[H, N] float32, 0 where masked; `rows` are those of x."""
        if mask is None:
            return None
        check_tensor("mask", mask, (torch.bool,))
        count = rows.shape[1]
        heads = count // max(1, mask.numel())
        # n: the last dimension of rows, or several of them
        lengths = [math.prod(x.shape[first:-1]) for first in range(x.dim() - 1)]
        if mask.dim() not in (1, 2) or heads * mask.numel() != count or mask.shape[-1] not in lengths:
            raise ValueError(f"mask has shape {tuple(mask.shape)}; wanted [b, n] or [n], with rows for {count} of x")
        heads_apart = mask.unsqueeze(-2).expand(*mask.shape[:-1], heads, mask.shape[-1])
        return heads_apart.reshape(1, count).expand(rows.shape[0], count).float()

    def _entries(self, index: Tensor) -> Tensor:
        """Entries [H, N, D] by index [H, N]; NaN for -1."""
        table = self.embed.flatten(0, 1)
        table = torch.cat([table, table.new_full((1, self.dim), math.nan)])
        first = torch.arange(self.num_codebooks, device=index.device)[:, None] * self.codebook_size
        return functional.embedding(torch.where(index < 0, table.shape[0] - 1, index + first), table)

    def _update(self, rows: Tensor, usable: Tensor, weights: Tensor | None, sums: Tensor, move: bool) -> None:
        """Moves averages and entries by sums [H, K, D + 1]; rows that are `usable` [H, N] may revive an entry."""
        revive = self.has_dead_code_replacement
        offers = None
        if weights is not None:
            usable = usable & (weights > 0)
        sums = torch.where(torch.isfinite(sums).all(-1, keepdim=True), sums, 0)
        if self.use_ddp:
            packed = sums
            if revive:
                # As many as the step can leave dead, whatever other processes add.
                doubtful = self.decay * self.cluster_size.double() < self.threshold_ema_dead_code
                packed = torch.cat([sums, self._offers(rows, usable, doubtful)], -1)
            torch.distributed.all_reduce(packed, group=self.process_group)
            sums, offers = packed[..., : self.dim + 1].contiguous(), packed[..., self.dim + 1 :]
        entries = self.embed if move and not self.manual_ema_update else self.embed.clone()
        op.move_centroids_(entries, self.cluster_size, self.embed_avg, sums, self.decay, "codebook", self.eps)
        if revive:
            dead = self.cluster_size < self.threshold_ema_dead_code
            self._revive(dead, self._offers(rows, usable, dead) if offers is None else offers)

    def _offers(self, rows: Tensor, usable: Tensor, wanted: Tensor) -> Tensor:
        turn, processes = 0, 1
        if self.use_ddp:
            turn = torch.distributed.get_rank(self.process_group)
            processes = torch.distributed.get_world_size(self.process_group)
        return offer_rows(rows, usable, wanted, turn, processes)

    def _revive(self, dead: Tensor, offers: Tensor) -> None:
        revived = dead & (offers[..., -1] > 0)
        rows = offers[..., :-1].to(self.embed.dtype)
        self.embed.copy_(torch.where(revived[..., None], rows, self.embed))
        self.embed_avg.copy_(torch.where(revived[..., None], rows * self.reset_cluster_size, self.embed_avg))
        self.cluster_size.copy_(torch.where(revived, self.reset_cluster_size, self.cluster_size))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EMACodebook:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._ready = not self.initted.is_meta and bool(self.initted)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, codebook_size={self.codebook_size}, num_codebooks={self.num_codebooks}, "
            f"decay={self.decay}, eps={self.eps}, threshold_ema_dead_code={self.threshold_ema_dead_code}"
        )
