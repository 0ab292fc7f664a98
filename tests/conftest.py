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
    if not os.environ.get(variable):
        pytest.skip(f"needs {what}: set {variable} to their folder")
    return pathlib.Path(os.environ[variable])


@pytest.fixture
def data_dir():
    return folder("QRD_DATA", "real data (original/ and paths/)")


@pytest.fixture
def models_dir():
    return folder("QRD_MODELS", "real models (smollm2/, gemma3/ and minilm/)")
