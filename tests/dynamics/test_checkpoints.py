"""Checkpoints of every usual shape give the model its own weights; anything else gives a reason."""

import collections
import os

import pytest
import safetensors.torch
import torch
from sharpscope.dynamics.checkpoints import (
    CheckpointError,
    checkpoint_files,
    read_checkpoint,
    step_in_name,
    weights_in,
)
from torch import nn


class Tied(nn.Module):
    """Embedding and output share one matrix, as in language models."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(collections.OrderedDict(first=nn.Linear(3, 4), norm=nn.BatchNorm1d(4), last=nn.Linear(4, 2)))


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def state():
    torch.manual_seed(1)
    return {
        name: torch.randn_like(t) if t.is_floating_point() else t + 7 for name, t in make_model().state_dict().items()
    }


def touch(*files):
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def same(weights, state):
    return weights.tensors.keys() == state.keys() and all(torch.equal(weights.tensors[n], state[n]) for n in state)


# Finding


def test_a_folder_is_read_in_natural_order_without_foreign_files(tmp_path):
    names = ["step-10.pt", "step-9.pt", "step-100.safetensors", "notes.txt", ".step-11.pt.tmp", "a.ckpt"]
    touch(*(tmp_path / name for name in names))
    found = [file.name for file in checkpoint_files(tmp_path)]
    assert found == ["a.ckpt", "step-9.pt", "step-10.pt", "step-100.safetensors"]


def test_a_glob_is_read_in_natural_order(tmp_path):
    touch(*(tmp_path / run / f"{i}.pth" for run in ("run2", "run10") for i in (2, 11)))
    found = [str(file.relative_to(tmp_path)) for file in checkpoint_files(f"{tmp_path}/run*/*.pth")]
    assert found == ["run2/2.pth", "run2/11.pth", "run10/2.pth", "run10/11.pth"]


def test_folders_of_trainers_hold_one_model_each(tmp_path):
    for step in (500, 1000):
        touch(*(tmp_path / f"checkpoint-{step}" / name for name in ("optimizer.pt", "model.safetensors")))
    touch(tmp_path / "arrays" / "vectors.safetensors")
    expected = [tmp_path / f"checkpoint-{step}" / "model.safetensors" for step in (500, 1000)]
    assert checkpoint_files(tmp_path) == expected
    assert checkpoint_files(f"{tmp_path}/checkpoint-*") == expected
    assert [step_in_name(file) for file in expected] == [500, 1000]


def test_a_run_folder_stands_for_its_checkpoints(tmp_path):
    touch(tmp_path / "checkpoints" / "step-00000003.pt", tmp_path / "trajectory.sqlite")
    assert checkpoint_files(tmp_path) == [tmp_path / "checkpoints" / "step-00000003.pt"]
    assert checkpoint_files(tmp_path / "checkpoints" / "step-00000003.pt") == checkpoint_files(tmp_path)


def test_nothing_found_names_what_is_near(tmp_path):
    touch(tmp_path / "checkpoints" / "notes.txt")
    with pytest.raises(ValueError, match=r"holds no file \*.pt, \*.pth"):
        checkpoint_files(tmp_path)
    with pytest.raises(ValueError, match=r"matches no file; near it in .*'checkpoints'"):
        checkpoint_files(tmp_path / "chekpoints")


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-00000120.pt", 120),
        ("resnet50_step3000.pt", 3000),
        ("iter_12-v2.ckpt", 12),
        ("epoch=3-steps=900.ckpt", 900),
        ("model-2-17.bin", 17),
        ("final.pt", None),
    ],
)
def test_step_in_name(tmp_path, name, step):
    assert step_in_name(tmp_path / name) == step


# Reading


@pytest.mark.parametrize("key", ["step", "global_step", "iteration"])
@pytest.mark.parametrize("value", [40, torch.tensor(40)])
def test_the_file_says_its_step(tmp_path, state, key, value):
    torch.save({"model": state, key: value}, tmp_path / "a.pt")
    content, step = read_checkpoint(tmp_path / "a.pt")
    assert step == 40
    assert content["model"].keys() == state.keys()


def test_safetensors_say_their_step_in_the_metadata(tmp_path, model, state):
    safetensors.torch.save_file(state, tmp_path / "a.safetensors", metadata={"step": "40"})
    content, step = read_checkpoint(tmp_path / "a.safetensors")
    assert step == 40
    assert same(weights_in(content, model), state)


@pytest.mark.parametrize("said", [True, 1.5, "late", torch.zeros(2)])
def test_what_is_no_step_is_not_taken_for_one(tmp_path, state, said):
    torch.save({"model": state, "step": said}, tmp_path / "a.pt")
    assert read_checkpoint(tmp_path / "a.pt")[1] is None


class Evil:
    def __reduce__(self):
        return os.system, ("exit 1",)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    torch.save({"model": Evil()}, tmp_path / "a.pt")
    with pytest.raises(
        CheckpointError, match=r"refused by torch.load\(weights_only=True\): it is damaged or holds a posix.system"
    ):
        read_checkpoint(tmp_path / "a.pt")


def test_a_whole_model_is_refused_by_name(tmp_path, model):
    torch.save(model, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"holds a torch.nn.modules.* save model.state_dict"):
        read_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 100, b"corrupt", None])
def test_a_damaged_file_gives_a_reason(tmp_path, state, suffix, content):
    file = tmp_path / f"a{suffix}"
    if content is None:  # cut short, as by a full disk
        save = torch.save if suffix == ".pt" else safetensors.torch.save_file
        save(state, file)
        content = file.read_bytes()[: file.stat().st_size // 2]
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot be read|refused"):
        read_checkpoint(file)


def test_a_missing_file_gives_a_reason(tmp_path):
    with pytest.raises(CheckpointError, match="FileNotFoundError"):
        read_checkpoint(tmp_path / "a.pt")


# Weights among the content


def wrappers():
    def prefixed(prefix):
        return lambda state: {prefix + name: t for name, t in state.items()}

    return {
        "plain": lambda s: s,
        "model": lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "epoch": 3},
        "state_dict": lambda s: {"state_dict": s, "hyper_parameters": {"lr": 0.1}},
        "model_state_dict": lambda s: {"model_state_dict": s, "loss": torch.tensor(0.5)},
        "unknown entry": lambda s: {"theta": s, "moments": {name: t for name, t in list(s.items())[:2]}},
        "nested": lambda s: {"trainer": {"inner": {"net": s}}},
        "model before average": lambda s: {"ema": {n: t + 1 for n, t in s.items()}, "model": s},
        "DDP": prefixed("module."),
        "compiled": prefixed("_orig_mod."),
        "both": prefixed("module._orig_mod."),
        "Lightning": lambda s: {"state_dict": prefixed("net.")(s), "global_step": 3},
        "compiled inside": lambda s: {name.replace("first.", "first._orig_mod."): t for name, t in s.items()},
        "extra state": lambda s: s | {"first._extra_state": {"scale": 1.0}},
    }


@pytest.mark.parametrize("shape", wrappers())
def test_weights_are_found_in_every_usual_shape(model, state, shape):
    weights = weights_in(wrappers()[shape](state), model)
    assert same(weights, state)
    assert weights.fingerprint == weights_in(state, make_model()).fingerprint


def test_names_of_a_compiled_part_of_the_model_are_its_own(state):
    model = make_model()
    model.first = torch.compile(model.first)  # type: ignore[assignment]
    assert weights_in(state, model).tensors.keys() == model.state_dict().keys()


def test_key_chooses_the_entry(model, state):
    other = {name: t + 1 for name, t in state.items()}
    content = {"model": state, "averaged": {"ema": other}, "odd.name": other}
    assert same(weights_in(content, model, "averaged.ema"), other)
    assert same(weights_in(content, model, "odd.name"), other)
    with pytest.raises(CheckpointError, match=r"`key` is 'averaged.emma', but 'emma' is not in it; near it: 'ema'"):
        weights_in(content, model, "averaged.emma")
    with pytest.raises(CheckpointError, match="its entry 'averaged' holds no state dict"):
        weights_in(content, model, "averaged")


def test_two_entries_that_fit_need_a_choice(model, state):
    with pytest.raises(CheckpointError, match=r"\['student', 'teacher'\] all fit this model; choose .*`key`"):
        weights_in({"student": state, "teacher": state}, model)


@pytest.mark.parametrize("content", [{}, torch.zeros(3), [1, 2], {"a": 1, "b": {"c": "text"}}, None])
def test_no_weights_at_all(model, content):
    with pytest.raises(CheckpointError, match="it holds no state dict"):
        weights_in(content, model)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.pop("last.bias"), "lacks 1 of the model's 9 tensors, first 'last.bias'"),
        (lambda s: s.update({"last.biass": s.pop("last.bias")}), r"first 'last.bias' \(near it: 'last.biass'\)"),
        (lambda s: s.update(extra=torch.zeros(1)), "it has 1 that the model has not, first 'extra'"),
        (lambda s: s.update({"first.weight": torch.zeros(4, 5)}), r"'first.weight' has shape \[4, 5\].*has \[4, 3\]"),
        (lambda s: s.update({"first.bias": torch.zeros(4).int()}), "'first.bias' is torch.int32; .* torch.float32"),
    ],
)
def test_another_models_checkpoint_is_refused(model, state, change, reason):
    change(state)
    with pytest.raises(CheckpointError, match=f"not a checkpoint of this model: .*{reason}.*use the model that wrote"):
        weights_in({"model": state}, model)


def test_tied_weights_may_be_stored_once(tmp_path):
    model = Tied()
    safetensors.torch.save_model(model, str(tmp_path / "a.safetensors"))
    content, _ = read_checkpoint(tmp_path / "a.safetensors")
    assert len(content) == 1
    assert weights_in(content, model).fingerprint == weights_in(model.state_dict(), model).fingerprint


def test_tied_weights_that_differ_are_refused():
    state = {name: tensor.clone() for name, tensor in Tied().state_dict().items()}
    state["head.weight"] += 1
    with pytest.raises(CheckpointError, match="are one tensor in the model and differ"):
        weights_in(state, Tied())


@pytest.mark.parametrize("change", [lambda t: t + 1e-7, lambda t: t.double(), lambda t: t.neg()])
def test_the_fingerprint_tells_contents_apart(model, state, change):
    before = weights_in(state, model).fingerprint
    again = {name: t.clone() for name, t in reversed(state.items())}
    assert weights_in(again, model).fingerprint == before
    state["last.bias"] = change(state["last.bias"])
    assert weights_in(state, model).fingerprint != before


def test_the_fingerprint_covers_every_type():
    model = nn.Module()
    for i, dtype in enumerate((torch.bfloat16, torch.float16, torch.bool, torch.int8, torch.complex64)):
        model.register_buffer(f"b{i}", torch.ones(2, dtype=dtype))
    model.register_buffer("empty", torch.ones(0))
    model.register_buffer("scalar", torch.tensor(1.0))
    before = weights_in(model.state_dict(), model).fingerprint
    for buffer in model.buffers():
        if buffer.numel():
            kept = buffer.clone()
            buffer.zero_()
            assert weights_in(model.state_dict(), model).fingerprint != before
            buffer.copy_(kept)
    assert weights_in(model.state_dict(), model).fingerprint == before
