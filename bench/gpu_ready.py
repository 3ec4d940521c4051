"""Whether torch sees a GPU and our CUDA library, of the csrc/ of this checkout, serves it; prints what serves each op.

    python bench/gpu_ready.py

Exit status 1 where something is missing: `gpu_check.sh` then builds, or ends.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from clusterq.ops import Backend, backends
from clusterq.ops._build import stale_libraries


def problems(available: bool, rows: Sequence[Backend], stale: Sequence[str]) -> list[str]:
    """What keeps the GPU checks from saying anything."""
    found = [] if available else ["torch sees no CUDA device"]
    found += [f"the {library} library was built from other sources" for library in stale]
    on_gpu = [row for row in rows if row.device == "cuda"]
    found += [f"{row.op} runs on {row.kernel}: {row.missing}" for row in on_gpu if row.kernel != "cuda"]
    return found


def main() -> int:
    available = torch.cuda.is_available()
    if available:
        print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name(), torch.cuda.get_device_capability())
    found = problems(available, backends(), stale_libraries())
    print("\n".join(found) or "every op is served by the CUDA library")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
