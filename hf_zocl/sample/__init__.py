"""A small real CLIP and a small real dataset inside the package, so that the examples run without a download."""

from pathlib import Path


NAMES = ("mini-clip", "cifar10-sample")


def sample_path(name: str) -> Path:
    """Return the folder of the embedded model `"mini-clip"` or the embedded dataset `"cifar10-sample"`.

    Raises:
        ValueError: if `name` is not embedded.
    """
    if name not in NAMES:
        raise ValueError(f"no embedded sample is called {name!r}; expected one of {', '.join(map(repr, NAMES))}")
    return Path(__file__).parent / name


def resolve(name_or_path: str) -> str:
    """Return an embedded sample's folder for its name; any other name (a Hub id, a path) is returned unchanged."""
    return str(sample_path(name_or_path)) if name_or_path in NAMES else name_or_path
