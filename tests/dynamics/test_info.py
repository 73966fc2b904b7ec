import platform

import torch
from sharpscope.dynamics.info import info


def test_versions_are_those_in_use():
    found = {fact.name: fact.found for fact in info() if fact.kind == "version"}
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert "missing" not in found.values()


def test_what_is_absent_says_what_it_would_add():
    for fact in info():
        assert fact.found
        if fact.found in ("not installed", "missing"):
            assert fact.meaning


def test_devices_say_what_runs_there():
    devices = {fact.name: fact for fact in info() if fact.kind == "device"}
    assert str(torch.get_num_threads()) in devices["cpu"].meaning
    if not torch.cuda.is_available():
        assert "everything runs on the CPU" in devices["cuda"].meaning
    else:
        assert torch.cuda.get_device_name(0) in devices["cuda:0"].found


def test_data_of_every_workload_is_listed():
    assert {fact.name for fact in info() if fact.kind == "data"} == {"digits", "Fashion-MNIST", "text"}
