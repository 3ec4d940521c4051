"""The alignment loss on a GPU through Triton: two launches, three with norms, whatever the number of layers.

The function takes the arguments of its op, in schema order. Launches go to the current stream; nothing waits for the
device.
"""

import torch
import triton

from . import _alignment_jit as jit

__all__ = ["alignment_loss"]

# Columns of a program that merges a group, images and columns of one that writes gradients.
_COLUMNS, _IMAGES = 32, 64
_TILE = {"BLOCK_N": 16, "BLOCK_D": 64}
_MOST_TERMS = 4


def _rows(t):
    """t [N, D] with unit stride in its rows, and their distance."""
    if t.stride(1) != 1 and t.shape[1] > 1:
        t = t.contiguous()
    return t, t.stride(0)


def _bytes(t, other):
    return other if t is None else t.contiguous().view(torch.uint8)


def alignment_loss(
    mean, var, target_mean, target_spread, columns, starts, weight, squared, floor, labels, mask, slots, first,
    class_mean, class_spread, known, class_weights, class_average, merged_count, merged_mean, merged_var,
):  # fmt: skip
    terms = len(class_weights) if labels is not None and class_mean is not None and class_spread is not None else 0
    if terms > _MOST_TERMS:
        raise ValueError(f"class_weights has {terms} elements; wanted at most {_MOST_TERMS}")
    merged = merged_count is not None and merged_mean is not None and merged_var is not None
    if labels is None and slots > 0 and not merged:
        raise ValueError(f"slots is {slots} without labels; wanted 0")
    images, wide = mean.shape
    real, device = mean.dtype, mean.device
    (mean, mean_step), (var, var_step) = _rows(mean), _rows(var)
    columns = columns.contiguous()
    optional = (
        mean if labels is None else labels.contiguous(), _bytes(mask, mean),
        *(mean if t is None else t.contiguous() for t in (class_mean, class_spread)), _bytes(known, mean),
    )  # fmt: skip
    given = [t.contiguous() if merged else mean for t in (merged_count, merged_mean, merged_var)]

    total, outputs = mean.new_empty(()), mean.new_empty(1 + len(class_weights))
    grad_mean, grad_var = (torch.empty((images, wide), dtype=real, device=device) for _ in range(2))
    count = torch.empty(slots, dtype=torch.int64, device=device)
    own_mean, own_spread = (torch.empty((slots, wide - first), dtype=real, device=device) for _ in range(2))

    tiles = max(triton.cdiv(wide, _COLUMNS), 1)
    layers = 0 if squared else starts.numel() - 1
    losses = tiles if squared else layers
    sizes = (4 * (1 + slots) * wide, 1 + slots, tiles * (1 + terms * slots), layers)
    work, counts, partial, norms = torch.empty(sum(sizes), dtype=torch.float64, device=device).split(sizes)
    taus = (*class_weights[:terms], *(0.0,) * _MOST_TERMS)[:_MOST_TERMS]
    flags = {"MASKED": mask is not None, "KNOWN": known is not None, "TERMS": terms}
    with torch.cuda.device_of(mean):
        jit.groups_kernel[((1 + slots) * tiles,)](
            work, counts, partial, count, own_mean, own_spread, mean, var, target_mean.contiguous(),
            target_spread.contiguous(), columns, *optional, *given, images, wide, slots, first, tiles, mean_step,
            var_step, weight, 0.0 if floor is None else floor, *taus, SQUARED=squared, ROOT=floor is not None,
            SLOTS=slots > 0, MERGED=merged, BLOCK_N=_IMAGES, BLOCK_D=_COLUMNS, **flags, num_warps=4,
        )  # fmt: skip
        if not squared and layers > 0:
            jit.norms_kernel[(layers,)](
                work, counts, norms, columns, starts.contiguous(), wide, slots, weight, BLOCK=256, num_warps=4
            )
        grid = max(triton.cdiv(images, _TILE["BLOCK_N"]) * triton.cdiv(wide, _TILE["BLOCK_D"]), 1)
        jit.gradients_kernel[(grid,)](
            total, outputs, grad_mean, grad_var, work, counts, partial, partial if squared else norms, mean,
            *optional[:2], optional[4], images, wide, slots, first, tiles, losses, mean_step, weight, *taus,
            AVERAGE=class_average, **_TILE, **flags, num_warps=4,
        )  # fmt: skip
    return total, outputs, grad_mean, grad_var, count, own_mean, own_spread
