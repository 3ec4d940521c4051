"""Bits of weights and activations as one word, such as `W4A8`."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from clusterq.config import QuantizationConfig


@dataclass(frozen=True)
class Width:
    """Bits of weights and activations, written `W4A8`."""

    weight_bits: int
    activation_bits: int

    def __str__(self) -> str:
        return f"W{self.weight_bits}A{self.activation_bits}"

    @staticmethod
    def parse(text: str) -> Width:
        """Inverse of `str`. Raises ValueError for anything but WxAy with x and y from 2 to 8."""
        match = re.fullmatch(r"[Ww]([2-8])[Aa]([2-8])", text)
        if match is None:
            raise ValueError(f"--bits {text!r}: wanted WxAy with x and y from 2 to 8, such as W4A4")
        return Width(int(match[1]), int(match[2]))

    def of(self, quantization: QuantizationConfig) -> QuantizationConfig:
        """The same settings at this width."""
        return replace(quantization, weight_bits=self.weight_bits, activation_bits=self.activation_bits)
