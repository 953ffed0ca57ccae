import importlib
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)


def import_scripts(pattern: str) -> list:
    """The scripts at the repository root whose file name matches, as parameters for pytest.mark.parametrize."""
    names = sorted(path.stem for path in ROOT.glob(pattern))
    return [pytest.param(importlib.import_module(name), id=name) for name in names]
