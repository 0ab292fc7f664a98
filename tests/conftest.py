"""What all tests share: the import path, one thread, the folders with real data and models."""
import os
import pathlib
import sys

import pytest
import torch

HERE = pathlib.Path(__file__).resolve().parent
for part in (HERE.parent, HERE / "bench", HERE / "experiments"):
    sys.path.insert(0, str(part))

torch.set_num_threads(1)  # the same sums in every process


def folder(variable, what):
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"needs {what}: set {variable} to their folder")
    return pathlib.Path(path)


@pytest.fixture
def data_dir():
    """Folder with original/ and paths/: published data sets and real teacher paths."""
    return folder("QRD_DATA", "real data")


@pytest.fixture
def models_dir():
    """Folder with smollm2/, gemma3/ and minilm/: small pretrained models."""
    return folder("QRD_MODELS", "real models")
