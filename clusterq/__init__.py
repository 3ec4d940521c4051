"""Data-free quantization of convolutional networks to 2-8 bits, on fast kernels that are usable on their own."""

__version__ = "0.1.0"
