"""Data-free quantization of convolutional networks to 2-8 bits, on fast kernels that are usable on their own.

    import clusterq
    low_bit = clusterq.quantize(network, input_shape=(3, 32, 32), weight_bits=4, activation_bits=4)

`clusterq.ops` holds the differentiable ops, `clusterq.nn` the modules on top of them, `clusterq.ClusterQ` the method
step by step. Importing this package imports torch and nothing heavier.
"""

from clusterq import nn, ops
from clusterq.checkpoint import load, save
from clusterq.config import ClusterQConfig, FinetuneConfig, QuantizationConfig, SynthesisConfig, preset
from clusterq.data import EvaluationResult, evaluate
from clusterq.deploy.onnx import export_onnx
from clusterq.diagnosis import doctor
from clusterq.errors import ClusterQError
from clusterq.method import ClusterQ, Result, quantize
from clusterq.qat import prepare

__version__ = "0.1.0"

__all__ = [
    "ClusterQ",
    "ClusterQConfig",
    "ClusterQError",
    "EvaluationResult",
    "FinetuneConfig",
    "QuantizationConfig",
    "Result",
    "SynthesisConfig",
    "doctor",
    "evaluate",
    "export_onnx",
    "load",
    "nn",
    "ops",
    "prepare",
    "preset",
    "quantize",
    "save",
]
