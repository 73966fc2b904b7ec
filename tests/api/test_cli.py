import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import sharpscope
import torch
from sharpscope.cli import app
from sharpscope.dynamics.trajectory import Trajectory
from typer.testing import CliRunner

SHORT = [
    "--num-examples=50",
    "--steps=8",
    "--every=4",
    "--checkpoint-every=4",
    "--threads=1",
    "-m",
    "loss",
    "-m",
    "sharpness",
]


def call(*arguments):
    """Exit code, standard output and standard error, with folded lines joined."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, re.sub(r"\s+", " ", result.stdout), re.sub(r"\s+", " ", result.stderr)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    code, output, errors = call("train", "--out", folder, "-m", "stability_threshold", *SHORT)
    assert code == 0, errors
    return folder, output


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "run"


def test_train_writes_a_run_and_shows_a_table(trained):
    folder, output = trained
    assert {path.name for path in folder.iterdir()} >= {"run.json", "trajectory.sqlite", "checkpoints", "figures"}
    assert (folder / "figures" / "sharpness.png").read_bytes().startswith(b"\x89PNG")
    for part in ("digits-mlp: 17,610 parameters", "SGD lr=0.2", "sharpness / threshold", "accuracy"):
        assert part in output


def test_train_takes_optimizer_options(tmp_path):
    code, _, errors = call(
        "train", "--out", tmp_path / "run", "--optimizer", "adamw", "--lr", "0.003", "-o", "betas=(0.8,0.9)", "-o",
        "weight_decay=0.1", "--batch-size", "20", *SHORT,
    )  # fmt: skip
    assert code == 0, errors
    with Trajectory.open(tmp_path / "run", mode="r") as trajectory:
        options = trajectory.provenance["options"]
    assert options["optimizer"] == "AdamW"
    assert options["optimizer_options"] == {"betas": [0.8, 0.9], "lr": 0.003, "weight_decay": 0.1}
    assert options["batch_size"] == 20


def test_train_without_anything_to_draw_is_a_success(tmp_path):
    code, output, errors = call("train", "--out", tmp_path / "run", "--num-examples=50", "--steps=2", "-m", "sam_edge")
    assert code == 0, errors
    assert "figure" not in output


def test_train_refuses_a_run_that_is_there_and_resumes_it(run):
    code, _, errors = call("train", "--out", run, *SHORT)
    assert code == 1
    assert "already holds a run" in errors
    assert "--resume" in errors
    assert "Traceback" not in errors
    code, output, _ = call("train", "--out", run, "--resume")
    assert code == 0
    assert "since step 8" in output
    code, _, errors = call("train", "--out", run, "--resume", "--seed", "1")
    assert code == 1
    assert "seed 0 -> 1" in errors


def test_resume_says_where_it_found_nothing(tmp_path):
    code, output, _ = call("train", "--out", tmp_path / "run", "--resume", *SHORT)
    assert code == 0
    assert "nothing to resume" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "sdg"], "near it: 'sgd'"),
        (["--workload", "mnist"], "`workload` is 'mnist'"),
        (["--measure", "sharp"], "near it: 'sharpness'"),
        (["--batch-size", "some"], "`--batch-size` is 'some'"),
        (["--option", "lr:3"], "cannot be read as key=value"),
        (["--lr", "1e9", "--num-examples=50"], "diverged"),
    ],
)
def test_train_answers_mistakes_in_one_line(tmp_path, arguments, message):
    code, _, errors = call("train", "--out", tmp_path / "run", *arguments)
    assert code == 1
    assert errors.startswith("error: ")
    assert message in errors


def test_an_unwritable_folder_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    code, _, errors = call("train", "--out", tmp_path / "file" / "run", *SHORT)
    assert code == 1
    assert errors.startswith("error: ")


def test_debug_keeps_the_traceback(tmp_path):
    result = CliRunner().invoke(app, ["--debug", "train", "--optimizer", "sdg", "--out", str(tmp_path / "run")])
    assert isinstance(result.exception, ValueError)
    assert result.exit_code == 1


def test_interruption_has_its_own_exit_code(tmp_path, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("sharpscope.dynamics.training.train", interrupt)
    code, _, errors = call("train", "--out", tmp_path / "run")
    assert code == 130
    assert "--resume" in errors


def test_analyze_measures_caches_and_reports(run):
    code, output, _ = call("analyze", run, "--no-progress")
    assert code == 0
    assert "3 measured, 0 from cache, 0 failed" in output
    code, output, _ = call("analyze", run, "--no-progress")
    assert code == 0
    assert "0 measured, 3 from cache, 0 failed; 0 operator products" in output
    damaged = run / "checkpoints" / "step-00000004.pt"
    damaged.write_bytes(b"no checkpoint")
    code, output, _ = call("analyze", run, "--no-progress")
    assert code == 1
    assert "2 from cache, 1 failed" in output
    assert "step-00000004.pt" in output


OWN = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.{activation}, nn.Linear(5, 2))

def data():
    torch.manual_seed(1)
    return torch.randn(12, 4), torch.randn(12, 2)

def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own_model_for_cli.py"
    path.write_text(OWN.format(activation="Tanh()"))
    yield path
    sys.modules.pop(path.stem, None)


def test_analyze_takes_a_model_of_ones_own(own, tmp_path):
    scope: dict = {}
    exec(own.read_text(), scope)
    torch.save({"model": scope["model"]().state_dict(), "step": 7}, tmp_path / "x.pt")
    names = ("--model", f"{own}:model", "--data", f"{own}:data")
    code, output, errors = call(
        "analyze", tmp_path / "x.pt", *names, "--loss", f"{own}:loss", "-m", "loss", "--no-progress"
    )
    assert code == 0, errors
    assert f"{scope['loss'](scope['model'](), scope['data']()).item():.6g}" in output
    code, _, errors = call("analyze", tmp_path / "x.pt", *names)
    assert code == 1
    assert "--criterion" in errors


def test_doctor_without_arguments_tests_the_main_job():
    code, output, errors = call("doctor")
    assert code == 0, errors
    assert "healthy" in output
    assert "dense block" in output


def test_doctor_of_ones_own_model(own):
    names = ("--model", f"{own}:model", "--data", f"{own}:data")
    code, output, errors = call("doctor", *names, "--criterion", "MSELoss")
    assert code == 0, errors
    sys.modules.pop(own.stem)
    own.write_text(OWN.format(activation="Dropout(0.5)"))
    code, output, _ = call("doctor", *names, "--criterion", "MSELoss", "--mode", "train")
    assert code == 1
    assert "dropout is active" in output
    assert "failed: loss" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "x:y"], "`--model` is missing"),
        (["--model", "torch.nn:Linear"], "`--data` is missing"),
        (["--model", "nowhere_at_all:make", "--data", "x:y", "--criterion", "MSELoss"], "no module 'nowhere_at_all'"),
        (["--workload", "digits"], "near: 'digits-"),
    ],
)
def test_doctor_answers_mistakes_in_one_line(arguments, message):
    code, _, errors = call("doctor", *arguments)
    assert code == 1
    assert message in errors


def test_plot_draws_into_files(run, tmp_path):
    code, output, errors = call("plot", run, "--out", tmp_path / "paper.pdf", "--figure", "sharpness")
    assert code == 0, errors
    assert (tmp_path / "paper.pdf").read_bytes().startswith(b"%PDF")
    assert "paper.pdf" in output
    code, _, errors = call("plot", tmp_path / "missing")
    assert code == 1
    assert errors.startswith("error: ")


def test_info_and_version():
    code, output, _ = call("info")
    assert code == 0
    assert torch.__version__ in output
    code, output, _ = call("--version")
    assert code == 0
    assert sharpscope.__version__ in output


def test_every_command_is_a_function_of_the_same_name():
    code, output, _ = call("--help")
    assert code == 0
    for name in ("train", "analyze", "plot", "doctor", "info"):
        assert name in output
        assert callable(getattr(sharpscope, name))


def test_as_a_module_from_any_folder(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sharpscope"]
    good = subprocess.run(
        [*command, "info"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert good.returncode == 0, good.stderr
    assert "everything runs on" in good.stdout or "cuda" in good.stdout
    bad = subprocess.run(
        [*command, "plot", "x"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert bad.returncode == 1
    assert bad.stderr.startswith("error: ")
    assert "Traceback" not in bad.stderr


def test_train_compares_optimizers_in_one_figure(tmp_path):
    code, output, errors = call("train", "--compare", "SGD,Adam:lr=0.01", "--out", tmp_path / "both", *SHORT)
    assert code == 0, errors
    assert {path.name for path in (tmp_path / "both").iterdir()} == {"SGD", "Adam_lr=0.01", "comparison.png"}
    assert "Adam lr=0.01" in output
    code, _, errors = call("train", "--compare", "SGD,Adam", "--optimizer", "SGD", "--out", tmp_path / "x", *SHORT)
    assert (code, "give one of them" in errors) == (1, True)


def test_study_lists_runs_and_refuses(tmp_path, monkeypatch):
    from sharpscope.dynamics.studies import Claim, Line, Panel, catalogue
    from sharpscope.dynamics.studies.study import Study

    def investigate(laboratory):
        value = laboratory.part("six", lambda x: 2 * x, x=3)
        claims = [
            Claim("twice three is six", "Euclid", "6", str(value), value == 6),
            Claim("twice three is seven", "a mistake", "7", str(value), value == 7, "it is not"),
        ]
        return claims, [Panel("doubling", "x", "2 x", [Line("", [0, 1], [0, 2])])]

    study = Study("doubling", "Doubling", "Euclid, Elements", "One number", investigate)
    monkeypatch.setattr(catalogue, "study_named", lambda name: study)
    code, output, errors = call("study", "sign-methods", "--out", tmp_path / "found")
    assert code == 0, errors
    for part in ("twice three is six", "does not hold", "it is not", "1 of 2 claims hold", "... six"):
        assert part in output
    assert {path.name for path in (tmp_path / "found").iterdir()} == {"parts", "study.json", "study.md", "study.png"}
    again, output, _ = call("study", "sign-methods", "--out", tmp_path / "found")
    assert (again, "... six" in output) == (0, False)  # kept


def test_study_names_are_checked():
    code, _, errors = call("study", "adam-mimi")
    assert (code, "'adam-mini'" in errors) == (1, True)


def test_options_of_all_studies_are_refused_elsewhere(tmp_path):
    code, _, errors = call("study", "coherence", "--quick", "--jobs", "2", "--out", tmp_path)
    assert (code, "`--jobs` is 2 without --all" in errors) == (1, True)
    code, _, errors = call("study", "--table", "--out", tmp_path)
    assert (code, "holds no result of a study" in errors) == (1, True)
    code, _, errors = call("study", "coherence", "--all")
    assert (code, "give one of them" in errors) == (1, True)


def test_all_studies_end_in_a_table_and_a_failed_one_in_the_exit_code(tmp_path, monkeypatch):
    from sharpscope.dynamics.studies import Claim, Line, Panel, StudyResult, catalogue, replication

    def attempt(name, folder, quick):
        if name == "broken":
            return name, "RuntimeError: broken"
        panels = [Panel("p", "x", "y", [Line("", [0, 1], [0, 1])])]
        claims = [Claim("one is one", "here", "1", "1", True), Claim("a number", "here", "-", "2", None)]
        result = StudyResult(name, "Title", "Paper", "Setting", claims, panels, quick, 1.0)
        folder.mkdir(parents=True)
        (folder / "study.json").write_text(json.dumps(result.to_json()))
        return name, result

    known = {"good": "", "broken": ""}
    monkeypatch.setattr(replication, "_attempt", attempt)
    for module in (catalogue, replication, sys.modules["sharpscope.dynamics.studies"]):
        monkeypatch.setattr(module, "STUDIES", known)
    code, output, errors = call("study", "--all", "--jobs", "1", "--out", tmp_path)
    assert code == 1
    assert "1 of 2 studies did not run whole: broken" in errors
    assert "1 of 1 claims hold, 1 more reported without a verdict" in output
    assert {path.name for path in tmp_path.iterdir()} == {"good", "replication.md", "replication.html"}
    assert "Not run whole: broken." in (tmp_path / "replication.md").read_text()
    assert (tmp_path / "good" / "study.png").exists()
    del known["broken"]
    (tmp_path / "good" / "study.json").unlink()
    (tmp_path / "good" / "study.png").unlink()
    (tmp_path / "good").rmdir()
    assert call("study", "--all", "--jobs", "1", "--out", tmp_path)[0] == 0
