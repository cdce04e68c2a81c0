"""What an import costs, and which way imports point."""

import subprocess
import sys

import pytest


HEAVY = ("transformers", "peft", "datasets", "accelerate", "huggingface_hub", "evaluate", "matplotlib", "PIL")


@pytest.mark.parametrize("module", ["hf_zocl", "hf_zocl.zo", "hf_zocl.passes"])
def test_the_method_needs_torch_alone(module):
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_found_where_it_lives():
    import hf_zocl

    assert all(getattr(hf_zocl, name).__name__ for name in hf_zocl.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        hf_zocl.Nothing  # noqa: B018
