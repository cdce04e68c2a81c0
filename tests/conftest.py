"""Shared fixtures: nothing here reaches the network."""

import gc
import os
from pathlib import Path

import pytest
import torch


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_finish():
    """Leave what is imported by now out of every later collection: each training ends with a full one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real datasets beside the checkout; tests that need it skip where it is not there."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the shared datasets are not on this machine")
    return SHARED_DATA


@pytest.fixture(scope="module")
def quick_pictures():
    """No run of the module draws its accuracy matrix."""
    from tests.helpers import draw_quickly  # once the environment is what it has to be

    with pytest.MonkeyPatch.context() as patch:
        draw_quickly(patch)
        yield
