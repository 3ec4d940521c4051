"""Where bfloat16 pays: mixed precision that is switched on by the device it runs on."""

from __future__ import annotations

import torch

from clusterq.config import Autocast


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies matrices in bfloat16 by instructions of its own.

    CPUs: AVX512_BF16 or AMX; others convert back and forth and are slower than in float32. CUDA: from compute
    capability 8.0 on. Other devices: no.
    """
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def autocasts(device: torch.device, autocast: Autocast) -> bool:
    """What a setting comes to on a device: on, off, or with `"auto"` on where `has_bfloat16`."""
    return has_bfloat16(device) if autocast == "auto" else bool(autocast)


def bfloat16_autocast(device: torch.device, autocast: Autocast) -> torch.autocast:
    """bfloat16 autocast on a device, where it `autocasts`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocasts(device, autocast))
