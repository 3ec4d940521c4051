"""Shared fixtures: seeds, poisoned allocations, the evaluation data folder and a network in it."""

import contextlib
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption(
        "--fill",
        action="store_true",
        help="every test as with the fixture `poisoned`",
    )


def pytest_runtest_setup(item):
    root = Path(__file__).resolve().parent.parent
    for marker in item.iter_markers("checkout"):
        absent = [name for name in marker.args if not (root / name).exists()]
        # In a checkout, a file that is absent is a failure.
        if absent and not (root / ".git").exists():
            pytest.skip(f"a test of the checkout: {' and '.join(absent)} not beside tests/")
    compilers = (os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++")
    if item.get_closest_marker("compiler") and not any(name and shutil.which(name) for name in compilers):
        pytest.skip("no C++ compiler")


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """Ctrl-C is heard in tests and their child processes, also in a shell's background, where it is ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@contextlib.contextmanager
def filled_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def poisoned(request):
    """Fresh allocations hold NaN (integers: the largest value), so that an element a kernel forgets to write shows."""
    with contextlib.nullcontext() if request.config.getoption("--fill") else filled_memory():
        yield


@pytest.fixture(autouse=True)
def filled_everywhere(request):
    with filled_memory() if request.config.getoption("--fill") else contextlib.nullcontext():
        yield


@pytest.fixture(scope="session")
def data_dir():
    """The folder named by CLUSTERQ_DATA; tests that need real images or networks skip without it."""
    value = os.environ.get("CLUSTERQ_DATA")
    if not value:
        pytest.skip("CLUSTERQ_DATA is not set: no real images or networks here")
    return Path(value)


@pytest.fixture
def cifar10(data_dir):
    """The data folder's trained ResNet-20 (`LoadedModel`) and the test images of CIFAR-10 (`EvaluationSet`)."""
    from clusterq.data import open_for
    from clusterq.models import load_model

    networks = data_dir / "networks"
    weights = str(networks / "cifar10_resnet20.pt")
    loaded = load_model(f"{networks / 'networks.py'}:resnet20", weights, input_size=32, normalization="imagenet")
    return loaded, open_for(loaded, str(data_dir / "cifar10" / "cifar10_test.npz"))
