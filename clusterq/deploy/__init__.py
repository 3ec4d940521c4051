"""Quantized networks for other runtimes, and clusterq's ops inside other libraries.

Each module needs its library and says so where it is missing.

- `clusterq.deploy.onnx`: ONNX files, public as `clusterq.export_onnx`.
- `clusterq.deploy.packed`: codes at their true width with scales and the rest as plain tensors (`save_packed`,
  `load_packed`).
- `clusterq.deploy.plain`: the network in PyTorch's own layers and operators (`convert`).
- `clusterq.deploy.run_integer`: networks of scheme deploy in integers, see `clusterq.deploy.integer`.
- `clusterq.deploy.torchao`: fake-quantize modules for torchao's PT2E flow and its `quantize_` QAT.
- `clusterq.deploy.brevitas`: the tensor quantizer of Brevitas's layers.

For torch.ao.quantization see `clusterq.nn.fake_quantize`.
"""

from clusterq.deploy.integer import run_integer
from clusterq.deploy.packed import PackedNetwork, load_packed, save_packed
from clusterq.deploy.plain import convert

__all__ = ["PackedNetwork", "convert", "load_packed", "run_integer", "save_packed"]
