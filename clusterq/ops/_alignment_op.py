"""Schema of the alignment op: losses of merged statistics and their gradients, in one pass over [N, D].

D columns are the channels of all layers side by side. All tensors but labels, mask, known and starts have the dtype of
the statistics, float32 or float64.

    mean, var [N, D]        instance statistics (biased), rows may be strided.
    target_mean,            [D], what the batch is compared with; the second in the form that `floor` asks for.
    target_spread
    columns [3, D]          weight of a column in the batch term; factor on the merged biased variance (1, or
                            M / (M - correction)); weight of a column in the class terms.
    starts [L + 1] int64    first column of every layer, then D. Read only for `squared=False`.
    weight                  of the batch term in the total.
    squared                 True: sum_d w_d ((mean_d - target)^2 + (spread_d - target)^2); False: with the Euclidean
                            norms of each layer, sum_l w_l (||mean_l - target_l|| + ||spread_l - target_l||), w_l that
                            of the layer's first column; the derivative of a norm at 0 is 0.
    floor                   None: variances are compared; a number: sqrt(variance + floor).
    labels [N] int64        class slot of every image, outside [0, slots) for none; None: no classes (slots = 0).
    mask [N] bool           False: the image belongs to no class (it stays in the batch term).
    first                   the first column of the class terms, D' = D - first of them.
    class_mean,             [T, S, D'] targets of T class terms, S = slots; None with T = 0.
    class_spread
    known [S] bool          False: that class has no target and enters no term; None: all have.
    class_weights           T weights of the class terms in the total.
    class_average           True: a class term is the mean over the classes present and known, else the sum.
    merged_count [1 + S],   float64: statistics of the batch (row 0) and of the classes, merged over all processes;
    merged_mean, merged_var None: those of `mean` and `var`. [1 + S, D] both of the latter, biased.

Returns total []; terms [1 + T], unweighted; grad_mean, grad_var [N, D] of the total; count [S] int64; class_mean and
class_spread [S, D'] of the classes (a class without images: 0, and the spread of variance 0). Arithmetic in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clusterq.ops import _alignment_reference as reference
from clusterq.ops._library import register_op


def _fake(mean: Tensor, *arguments: Any) -> reference.Outputs:
    slots, first, class_weights = arguments[10], arguments[11], arguments[15]
    rows = (slots, mean.shape[1] - first)
    return (
        mean.new_empty(()),
        mean.new_empty(1 + len(class_weights)),
        mean.new_empty(mean.shape),
        mean.new_empty(mean.shape),
        mean.new_empty(slots, dtype=torch.int64),
        mean.new_empty(rows),
        mean.new_empty(rows),
    )


alignment_loss = register_op(
    "alignment_loss(Tensor mean, Tensor var, Tensor target_mean, Tensor target_spread, Tensor columns, Tensor starts, "
    "float weight, bool squared, float? floor, Tensor? labels, Tensor? mask, int slots, int first, "
    "Tensor? class_mean, Tensor? class_spread, Tensor? known, float[] class_weights, bool class_average, "
    "Tensor? merged_count, Tensor? merged_mean, Tensor? merged_var) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.alignment_loss,
    fake=_fake,
    triton="alignment:alignment_loss",
)
