"""Triton kernels of ClusterQ, one module per op family: tensors in, tensors out, nothing of ClusterQ imported.

The folder `kernels/` of the source tree is installed as `clusterq.kernels`; `clusterq.ops` imports the modules on first
use.
"""

if __name__ != "clusterq.kernels":
    raise ImportError(
        f"the folder kernels/ was imported as {__name__!r}; it is part of the clusterq package: "
        "`pip install -e .` and use `import clusterq.kernels`"
    )
