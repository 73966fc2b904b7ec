import json

import pytest
import torch
from sharpscope.dynamics import run_folder
from sharpscope.dynamics.training import TrainingDiverged, train
from sharpscope.dynamics.training_options import TrainingOptions
from sharpscope.dynamics.trajectory import Trajectory
from sharpscope.dynamics.workloads import workload
from torch import nn

SMALL = {
    "num_examples": 60,
    "steps": 24,
    "every": 6,
    "measure": ["loss", "gradient_norm", "sharpness:tol=1e-2", "stability_threshold"],
    "checkpoint_every": 5,
    "progress": False,
    "threads": 1,
}
DENSITY = "density:every=7,num_steps=6,num_probes=2"


def table(folder):
    """Everything but the costs, to the last bit."""
    with Trajectory.open(folder, mode="r") as trajectory:
        return trajectory.to_pandas(costs=False)


def same(a, b):
    return a.to_csv() == b.to_csv() and a.equals(b)


def final_state(folder):
    return torch.load(max((folder / "checkpoints").glob("*.pt")), weights_only=True)


def same_state(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run of the main job on 60 digits."""
    return train(out=tmp_path_factory.mktemp("run") / "run", **SMALL | {"measure": [*SMALL["measure"], DENSITY]})


def test_it_is_gradient_descent(finished):
    job = workload("digits-mlp", num_examples=60)
    parameters = list(job.model.parameters())
    losses = []
    for _ in range(24):
        loss = 0.5 * (job.model(job.train.inputs) - job.train.targets).square().sum(1).mean()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p -= 0.2 * g
    with finished.trajectory() as trajectory:
        recorded = trajectory.series("loss")
    assert recorded.steps.tolist() == [0, 6, 12, 18, 24]
    assert recorded.values[:4].tolist() == pytest.approx(losses[::6], rel=1e-5)
    for p, q in zip(parameters, finished.workload.model.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5)


def test_without_arguments_it_is_the_main_job():
    options = TrainingOptions.resolve({})
    assert (options.workload, options.optimizer, options.batch_size) == ("digits-mlp", "SGD", "full")
    assert options.optimizer_options == {"lr": 0.2}
    assert {"loss", "sharpness", "stability_threshold"} <= set(options.measure)


@pytest.mark.slow
def test_the_main_job_reaches_the_edge_of_stability_and_stays(tmp_path):
    result = train(measure=["sharpness", "stability_threshold"], out=tmp_path / "run", progress=False)
    assert result.edge is not None
    assert result.edge.start < 1 / 3
    # Cohen et al., 2021: gradient descent hovers just above 2/η.
    assert abs(result.edge.mean - 1) < 0.05
    with result.trajectory() as trajectory:
        assert trajectory.to_pandas()["converged"].all()


def test_the_trajectory_has_what_was_asked_for(finished):
    with finished.trajectory() as trajectory:
        expected = {"loss", "gradient_norm", "sharpness", "stability_threshold", "density"}
        assert set(trajectory.quantities()) == expected
        assert set(trajectory.series("stability_threshold").values) == {2 / 0.2}
        assert trajectory.provenance["optimizer"]["lr"] == 0.2
        # The loss is quadratic in the last bias with the identity as its Hessian.
        assert trajectory.series("sharpness").values.min() >= 1 - 1e-3


def test_the_folder_is_complete(finished):
    options = json.loads((finished.folder / "run.json").read_text())["options"]
    assert options["optimizer_options"] == {"lr": 0.2}
    names = sorted(path.name for path in (finished.folder / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}.pt" for step in (0, 5, 10, 15, 20, 24)]
    state = final_state(finished.folder)
    assert same_state(state["model"], dict(finished.workload.model.state_dict()))


def test_the_summary_names_the_edge(finished):
    lines = dict(finished.summary())
    assert lines["optimizer"] == "SGD lr=0.2"
    assert finished.edge is not None
    assert lines["sharpness / threshold"].startswith(f"{finished.edge.start:.2f} at the start")
    with finished.trajectory() as trajectory:
        ratios = trajectory.series("sharpness").values / 10
    assert finished.edge.mean == pytest.approx(ratios[-2:].mean())  # steps 18 and 24 of 24


def test_the_callers_random_stream_and_threads_are_left_alone(tmp_path):
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    train(out=tmp_path / "run", **SMALL | {"threads": 2, "measure": "loss"})
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


class Stop(Exception):
    pass


def interrupted(monkeypatch, folder, step, **options):
    """A run that dies like one that is killed: at its optimizer's `step`-th step, without any clean-up of ours."""
    from sharpscope.dynamics import training

    run_step = training._Run._step

    def step_or_die(self, number, *rest):
        if number == step:
            raise Stop
        run_step(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "_step", step_or_die)
        with pytest.raises(Stop):
            train(out=folder, **options)


@pytest.mark.parametrize(
    "options",
    [
        SMALL | {"measure": ["loss", "sharpness", DENSITY]},
        SMALL | {"optimizer": "SGD", "momentum": 0.9, "lr": 0.05, "measure": ["sharpness:2", "update_curvature:3"]},
        SMALL
        | {
            "workload": "digits-cnn",
            "optimizer": "adamw",
            "batch_size": 7,
            "num_measured": 20,
            "measure": ["sharpness"],
        },
        SMALL | {"optimizer": "LBFGS", "optimizer_options": {"max_iter": 3, "lr": 0.1}, "measure": "sharpness"},
        SMALL | {"optimizer": "Muon", "measure": "sharpness"},
    ],
    ids=["main job", "momentum", "AdamW on BatchNorm", "LBFGS", "Muon"],
)
def test_a_run_that_stopped_ends_like_one_left_alone(tmp_path, monkeypatch, options):
    train(out=tmp_path / "whole", **options)
    interrupted(monkeypatch, tmp_path / "cut", 13, **options)
    before = table(tmp_path / "cut")
    interrupted(monkeypatch, tmp_path / "cut", 21, resume=True, **options)
    result = train(out=tmp_path / "cut", resume=True, progress=False)  # the run knows its options
    assert result.resumed_at == 20
    assert same(table(tmp_path / "whole"), table(tmp_path / "cut"))
    whole, cut = final_state(tmp_path / "whole"), final_state(tmp_path / "cut")
    for part in ("model", "optimizer", "rng"):
        assert same_state(whole[part], cut[part])
    after = table(tmp_path / "cut")
    assert len(before.merge(after, how="inner")) == len(before)


def test_a_run_that_died_before_its_first_checkpoint_begins_again(tmp_path, monkeypatch):
    train(out=tmp_path / "whole", **SMALL)
    interrupted(monkeypatch, tmp_path / "cut", 9, **SMALL)
    for path in (tmp_path / "cut" / "checkpoints").iterdir():
        path.unlink()
    train(out=tmp_path / "cut", resume=True, progress=False)
    assert same(table(tmp_path / "whole"), table(tmp_path / "cut"))


@pytest.mark.parametrize("left", [[], [".run.json.123.tmp"]])
def test_resume_begins_where_nothing_was_written_yet(tmp_path, left):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in left:
        (folder / name).write_text("half")
    result = train(out=folder, resume=True, **SMALL | {"measure": "loss"})
    assert result.resumed_at is None
    assert not list(folder.glob(".*.tmp"))


def test_resuming_a_finished_run_changes_nothing(finished):
    before = table(finished.folder)
    again = train(out=finished.folder, resume=True, progress=False)
    assert again.resumed_at == 24
    assert same(before, table(finished.folder))
    assert again.edge == finished.edge


def test_resuming_with_other_options_is_refused(finished):
    with pytest.raises(ValueError, match=r"other options: .*'lr': 0.2.*'lr': 0.1.*; seed 0 -> 3"):
        train(out=finished.folder, resume=True, lr=0.1, seed=3)
    # The same options, spelt out or differently, are no change.
    train(out=finished.folder, resume=True, lr=0.2, optimizer="sgd", batch_size="full", progress=False)


def test_an_existing_run_is_kept_unless_asked_otherwise(tmp_path):
    options = SMALL | {"measure": "loss", "steps": 4}
    train(out=tmp_path / "run", **options)
    with pytest.raises(ValueError, match=r"already holds a run.*--resume.*--overwrite"):
        train(out=tmp_path / "run", **options)
    train(out=tmp_path / "run", overwrite=True, **options | {"steps": 2})
    assert table(tmp_path / "run")["step"].max() == 2
    with pytest.raises(ValueError, match="both True"):
        train(out=tmp_path / "run", overwrite=True, resume=True)


def test_a_folder_of_something_else_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(ValueError, match=r"not empty and no run of sharpscope \(it holds thesis.tex"):
            train(out=tmp_path, **SMALL, **options)
    with pytest.raises(ValueError, match="is a file"):
        train(out=tmp_path / "thesis.tex", **SMALL)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_without_a_folder_each_run_gets_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = SMALL | {"measure": "loss", "steps": 2}
    first, second = (train(**options).folder for _ in range(2))
    assert [str(first), str(second)] == ["runs/digits-mlp-sgd", "runs/digits-mlp-sgd-2"]
    assert train(resume=True, progress=False).folder == second


def test_a_damaged_checkpoint_is_named_with_a_cure(tmp_path, monkeypatch):
    interrupted(monkeypatch, tmp_path / "run", 13, **SMALL | {"measure": "loss"})
    last = tmp_path / "run" / "checkpoints" / "step-00000010.pt"
    last.write_bytes(last.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"step-00000010.pt cannot be used.*delete it to go on from step-00000005.pt"):
        train(out=tmp_path / "run", resume=True)
    last.unlink()
    assert train(out=tmp_path / "run", resume=True, progress=False).resumed_at == 5


def test_a_full_disk_costs_nothing_that_was_written(tmp_path, monkeypatch):
    options = SMALL | {"measure": "loss"}
    train(out=tmp_path / "whole", **options)
    write = run_folder.write_atomically

    def until_full(path, content):
        if path.name == "step-00000015.pt":
            raise OSError(28, "No space left on device")
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_atomically", until_full)
        with pytest.raises(OSError, match=r"step-00000015.pt cannot be written .*No space left.*--resume"):
            train(out=tmp_path / "run", **options)
    assert train(out=tmp_path / "run", resume=True, progress=False).resumed_at == 10
    assert same(table(tmp_path / "whole"), table(tmp_path / "run"))


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read"), ('{"format": "x", "version": 1}', "cannot be read"), (None, "newer|knows")],
)
def test_a_foreign_options_file_is_refused(finished, tmp_path, content, message):
    if content is None:
        stored = json.loads((finished.folder / "run.json").read_text())
        content = json.dumps(stored | {"version": 99})
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        train(out=tmp_path, resume=True)


def test_changed_data_is_noticed(finished, tmp_path):
    stored = json.loads((finished.folder / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(stored | {"fingerprint": "0" * 64}))
    with pytest.raises(ValueError, match=r"the data .* is not what the run .* began with"):
        train(out=tmp_path, resume=True)


def test_divergence_is_an_error_that_keeps_what_was_measured(tmp_path):
    with pytest.raises(TrainingDiverged, match=r"at step \d+: SGD with .*'lr': 1000000.0.*smaller lr"):
        train(out=tmp_path / "run", **SMALL | {"lr": 1e6, "measure": "loss:1"})
    assert len(table(tmp_path / "run")) >= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workload": "digit-mlp"}, "`workload` is 'digit-mlp'.*near: 'digits-mlp'"),
        ({"optimizer": "Adamm"}, "`optimizer` is 'Adamm'; near it: 'adam"),
        ({"optimizer": "SparseAdam"}, "takes sparse gradients only"),
        ({"optimizer_options": {"momentun": 1}}, "'momentun', which SGD does not take .*near: 'momentum'"),
        ({"lr": -1.0}, "SGD refuses .*Invalid learning rate"),
        ({"measure": ["sharpnes"]}, "`measure` names 'sharpnes'; near it: 'sharpness'"),
        ({"measure": []}, "`measure` is empty"),
        ({"steps": 0}, "`steps` is 0; it must be at least 1"),
        ({"batch_size": 61}, "`batch_size` is 61; there are 60 examples"),
        ({"num_examples": 0}, "`num_examples` is 0"),
        ({"device": "warp"}, "`device` is 'warp'"),
        ({"data": "pydoc"}, "has its data built in"),
    ],
)
def test_bad_options_are_named_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(out=tmp_path / "run", **SMALL | options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("option", "value"), [("steps", 1.5), ("every", True), ("batch_size", "half")])
def test_numbers_must_be_whole(tmp_path, option, value):
    with pytest.raises(TypeError, match=f"`{option}` is {value!r}; give a whole number"):
        train(out=tmp_path / "run", **SMALL | {option: value})


def test_a_transformer_learns_text(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("so it goes. " * 400)
    result = train(
        "char-transformer", optimizer="AdamW", lr=0.01, data=book, batch_size=8, steps=15, every=15, num_measured=4,
        measure=["loss", "sharpness:tol=0.01"], out=tmp_path / "run", threads=1, progress=False,
    )  # fmt: skip
    with result.trajectory() as trajectory:
        losses = trajectory.series("loss").values
    assert losses[-1] < 0.8 * losses[0]
    assert isinstance(result.workload.criterion, nn.CrossEntropyLoss)
