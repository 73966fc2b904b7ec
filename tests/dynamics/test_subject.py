import sys

import pytest
import torch
from sharpscope.dynamics.subject import find, made_by, subject
from torch import nn

MODULE = """
import torch
from torch import nn
import {helper}

WIDTH = 3

def make_model():
    torch.manual_seed(0)
    return nn.Linear(4, {helper}.OUTPUTS)

def make_data():
    torch.manual_seed(1)
    return [(torch.randn(5, 4), torch.randn(5, 2)), (torch.randn(3, 4), torch.randn(3, 2))]

def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()

def criterion(prediction, target):
    return (prediction - target).abs().mean()

def needs_argument(x):
    return x

class Nested:
    value = 7
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Name of a module that lies in the current folder."""
    (tmp_path / "subject_helper.py").write_text("OUTPUTS = 2\n")
    (tmp_path / "subject_module.py").write_text(MODULE.format(helper="subject_helper"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield "subject_module"
    for name in ("subject_module", "subject_helper"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("place", ["subject_module", "subject_module.py"])
def test_an_objective_from_names(module, place):
    objective = subject(f"{place}:make_model", f"{place}:make_data", criterion="MSELoss")
    model, batches = find(f"{place}:make_model")(), find(f"{place}:make_data")()
    x, y = (torch.cat([batch[i] for batch in batches]) for i in range(2))
    expected = float(nn.functional.mse_loss(model(x), y).detach())
    assert objective.loss() == pytest.approx(expected, rel=1e-6)
    assert subject(f"{place}:make_model", f"{place}:make_data", loss=f"{place}:loss").loss() == pytest.approx(
        expected, rel=1e-6
    )
    own = subject(f"{place}:make_model", f"{place}:make_data", criterion=f"{place}:criterion")
    assert own.loss() == pytest.approx(float((model(x) - y).abs().mean().detach()), rel=1e-6)


def test_objects_are_used_as_they_are():
    model = nn.Linear(2, 1)
    data = (torch.randn(3, 2), torch.randn(3, 1))
    assert subject(model, data, criterion=nn.MSELoss()).model is model
    assert subject(lambda: model, lambda: data, loss=lambda m, b: m(b[0]).sum() / 3).model is model


def test_attributes_of_attributes_are_found(module):
    assert find(f"{module}:Nested.value") == 7
    assert find("torch.nn:Linear") is nn.Linear


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_colon", "write package.module:name"),
        (":name", "write package.module:name"),
        ("no.such_module_here:make", "no module 'no.such_module_here'"),
        ("missing.py:make", "no file .*missing.py"),
        ("torch.nn:Linaer", "torch.nn has no 'Linaer'; near it: 'Linear'"),
    ],
)
def test_names_of_nothing(module, name, message):
    with pytest.raises(ValueError, match=message):
        find(name)


def test_a_module_whose_own_import_fails_says_which(module, tmp_path):
    (tmp_path / "subject_broken.py").write_text("import not_installed_anywhere\n")
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        find("subject_broken:make")


def test_criterion_or_loss_but_not_both(module):
    model, data = nn.Linear(2, 1), (torch.randn(3, 2), torch.randn(3, 1))
    with pytest.raises(ValueError, match="given: neither"):
        subject(model, data)
    with pytest.raises(ValueError, match="given: both"):
        subject(model, data, criterion="MSELoss", loss=lambda m, b: m(b[0]).mean())
    with pytest.raises(ValueError, match=r"`criterion` is 'MSEloss'.*near: 'MSELoss'"):
        subject(model, data, criterion="MSEloss")


def test_what_does_not_make_a_model_is_refused(module):
    with pytest.raises(TypeError, match="gives a int; it must be an nn.Module"):
        subject(f"{module}:WIDTH", (torch.ones(1),), loss=lambda m, b: b)
    with pytest.raises(ValueError, match="`model` .*needs_argument' cannot be called without arguments"):
        made_by(f"{module}:needs_argument", "model")
