"""bfloat16 where the device has instructions for it."""

import pytest
import torch

from clusterq.precision import bfloat16_autocast, has_bfloat16

CPU = torch.device("cpu")


@pytest.mark.parametrize(("avx", "amx"), [(False, False), (True, False), (False, True)])
def test_auto_follows_the_processor(monkeypatch, avx, amx):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert has_bfloat16(CPU) == (avx or amx)
    layer = torch.nn.Linear(3, 2)
    for setting, expected in (("auto", avx or amx), (True, True), (False, False)):
        with bfloat16_autocast(CPU, setting):
            assert (layer(torch.zeros(1, 3)).dtype == torch.bfloat16) == expected


def test_other_devices_have_none():
    assert not has_bfloat16(torch.device("meta"))
