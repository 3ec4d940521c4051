"""Padding "same" as TensorFlow has it: the odd row and column of zeros lie behind the image, not before it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class SamePadConv2d(nn.Conv2d):
    """`nn.Conv2d` with so many zeros around [N, C, H, W] that ceil(H / stride) x ceil(W / stride) results come out.

    `padding` plays no part. Of the `total` zeros along a side, `total // 2` lie before the image, the rest behind it:
    tf.nn.convolution, "SAME".
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        pads: list[int] = []
        for side in (1, 0):
            size, stride = input.shape[2 + side], self.stride[side]
            reach = self.dilation[side] * (self.kernel_size[side] - 1) + 1
            total = max((-(-size // stride) - 1) * stride + reach - size, 0)
            pads += [total // 2, total - total // 2]
        x = functional.pad(input, pads)
        return functional.conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)
