"""The digests that a CPU made of the codec and the step on fixed inputs."""

import importlib
import json
from pathlib import Path

import pytest
from digests import digests

pytestmark = pytest.mark.gpu

GOLDEN = Path(__file__).parents[1] / "golden" / "codec.json"


def test_golden_digests(device):
    path = "cuda" if device.type == "cuda" else "c"
    codec, adamw4 = (importlib.import_module(f"sharpscope.kernels.{name}_{path}") for name in ("codec", "adamw4"))
    found, golden = digests(codec, adamw4, device), json.loads(GOLDEN.read_text())
    assert {key for key in golden if found[key] != golden[key]} == set()
    assert found.keys() == golden.keys()
