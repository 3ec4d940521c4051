"""Class centroids of feature statistics and their exponential moving average (5)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from clusterq import ops
from clusterq.config import Spread
from clusterq.synthesis.losses import ClassStatistics, to_spread


class CentroidBank:
    """One centroid per class: mean and spread of every channel of every semantic layer.

    A class that was never seen has no centroid yet; its first observation becomes the centroid as it is.

    Args:
        num_classes: K.
        dimensions: D, channels of all semantic layers together.
        decay: weight of the old value in the moving average; the paper's beta is 1 - decay.
        device: of the tables.

    Attributes:
        table: [K, 2 D] float32: means, then spreads.
        cluster_size: [K] float32 moving average of the number of samples.
    """

    def __init__(self, num_classes: int, dimensions: int, decay: float, *, device: torch.device | None = None) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}; wanted 0 <= decay < 1")
        self.num_classes = num_classes
        self.dimensions = dimensions
        self.decay = decay
        self.table = torch.zeros(num_classes, 2 * dimensions, device=device)
        self.cluster_size = torch.zeros(num_classes, device=device)
        # One row more than classes: unused slots write there, which keeps every update free of data-dependent shapes.
        self._seen = torch.zeros(num_classes + 1, dtype=torch.bool, device=device)

    @property
    def mean(self) -> Tensor:
        """[K, D] view of the means."""
        return self.table[:, : self.dimensions]

    @property
    def spread(self) -> Tensor:
        """[K, D] view of the standard deviations or variances."""
        return self.table[:, self.dimensions :]

    @property
    def initialised(self) -> Tensor:
        """[K] bool: the class has a centroid."""
        return self._seen[: self.num_classes]

    def lookup(self, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Centroids of `classes` [S] int64, -1 for none: mean [S, D], spread [S, D], exists [S] bool."""
        rows = self.table[classes.clamp(min=0)]
        exists = self._seen[torch.where(classes < 0, self.num_classes, classes)]
        return rows[:, : self.dimensions], rows[:, self.dimensions :], exists & (classes >= 0)

    @torch.no_grad()
    def update_(self, statistics: ClassStatistics) -> None:
        """Move the centroids of the classes seen, in place: `mu <- decay * mu + (1 - decay) * muhat` (5).

        Classes without samples keep their centroid. The statistics are taken without their gradient.
        """
        classes, samples, mean, spread = statistics
        _, _, exists = self.lookup(classes)
        rows = torch.cat([mean.detach(), spread.detach()], 1)
        # The table starts at zero, so a first observation divided by its own weight becomes the centroid itself.
        rows = torch.where(exists[:, None], rows, rows / (1 - self.decay))
        index = torch.where(samples > 0, classes, -1)
        ops.update_centroids_(self.table, self.cluster_size, rows, index, self.decay, weights=samples.float())
        self._seen[torch.where(index < 0, self.num_classes, index)] = True

    def initialise_(
        self, mean: Tensor, var: Tensor, labels: Tensor, correct: Tensor, *, spread: Spread = "std"
    ) -> None:
        """Set the centroids from per-image statistics of images made for every class, replacing what was there.

        A class is formed by the images that the teacher assigns to it, by all of its images where there are none.
        A class without images stays without a centroid.

        Args:
            mean, var: [N, D].
            labels: [N] int64.
            correct: [N] bool, the teacher agrees with the label.
            spread: `"std"` or `"var"`.
        """
        agreed = torch.zeros(self.num_classes, device=labels.device).index_add_(0, labels, correct.float())
        mask = correct | (agreed[labels] == 0)
        count, class_mean, class_var = ops.merge_class_statistics(mean, var, labels, self.num_classes, mask=mask)
        present = count > 0
        rows = torch.cat([class_mean, to_spread(class_var, spread)], 1)
        self.table.copy_(torch.where(present[:, None], rows, 0.0))
        self.cluster_size.copy_(count)
        self._seen[: self.num_classes] = present

    def nearest(self, mean: Tensor, spread: Tensor, *, center: Tensor, scale: Tensor) -> Tensor:
        """Class of the nearest centroid for each image.

        Args:
            mean, spread: [N, D] of single images.
            center, scale: [2 D] normalisation of a table row, `(row - center) * scale`, so that no layer or channel
                outweighs the others by its size.

        Returns:
            [N] int64, squared Euclidean distance, lowest class at a tie; -1 where there is no centroid at all or an
            image has NaN statistics.
        """
        rows = (torch.cat([mean, spread], 1).detach() - center) * scale
        # A NaN centroid never wins.
        table = torch.where(self.initialised[:, None], (self.table - center) * scale, torch.nan)
        index, _ = ops.nearest_centroid(rows, table)
        return index

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the tables."""
        return {"table": self.table.clone(), "cluster_size": self.cluster_size.clone(), "seen": self._seen.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`. Raises ValueError for tables of another shape."""
        own = {"table": self.table, "cluster_size": self.cluster_size, "seen": self._seen}
        for name, tensor in own.items():
            if state[name].shape != tensor.shape:
                raise ValueError(f"{name} has shape {tuple(state[name].shape)}; wanted {tuple(tensor.shape)}")
            tensor.copy_(state[name])
