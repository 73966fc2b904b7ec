"""Training a built-in workload with its curvature watched, so that it survives `kill -9` and can be repeated."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..landscape.batches import digest
from .data_order import DataOrder
from .monitor import Monitor
from .optimizers.choice import make_optimizer
from .optimizers.closures import needs_closure
from .run_folder import RunFolder, default_folder
from .settings import chosen_measurements
from .training_options import FULL_BATCH, TrainingOptions
from .training_result import TrainingResult
from .trajectory import Trajectory
from .workloads.catalogue import Workload
from .workloads.catalogue import workload as built_in
from .workloads.examples import Examples


class TrainingDiverged(ValueError):
    """The training loss is no longer finite."""


def train(
    workload: str | None = None,
    *,
    optimizer: str | None = None,
    lr: float | None = None,
    momentum: float | None = None,
    optimizer_options: Mapping[str, Any] | None = None,
    batch_size: int | str | None = None,
    steps: int | None = None,
    every: int | None = None,
    measure: str | Sequence[str] | None = None,
    seed: int | None = None,
    data: str | os.PathLike[str] | None = None,
    num_examples: int | None = None,
    num_measured: int | None = None,
    checkpoint_every: int | None = None,
    device: str | None = None,
    threads: int | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> TrainingResult:
    """Trains a built-in workload and records its curvature on the way; without arguments, the main job.

    The main job is gradient descent on all 1500 digits at once with a 64-100-100-10 tanh network and half the squared
    error: at step size η = 0.2 the sharpness rises to 2/η = 10 and stays there, at the edge of stability.

    Everything goes into one folder: options (run.json), `checkpoints/`, and the trajectory. A run killed at any
    moment goes on with `resume=True` and ends with the same table, bit for bit, as one left alone.

    Args:
        workload: "digits-mlp" (default), "digits-cnn", "fashion-cnn" or "char-transformer".
        optimizer: Any of torch.optim by name; default SGD.
        lr, momentum: Shorthands for entries of `optimizer_options`; an lr that is not given is the workload's for
            SGD, and the optimizer's own default otherwise.
        optimizer_options: Keyword arguments of the optimizer.
        batch_size: Examples per step; "full" is all of them. Each epoch goes through all examples once, in a new order.
        steps: Optimizer steps.
        every: Steps between measurements that name no period themselves.
        measure: Measurements as `settings.measurement` reads them, e.g. ["loss", "sharpness:num=3", "density:500"].
        seed: Of initial weights and data order.
        data: Where the data is, for the workloads that read some; see `workload`.
        num_examples: How many to train on.
        num_measured: How many of these the measurements use, the first ones.
        checkpoint_every: Steps between checkpoints; default a twentieth of the run.
        device: "cpu" (default) or "cuda".
        threads: For torch on the CPU; default 1 for the digits, else as found.
        out: The folder; default a new one, runs/WORKLOAD-OPTIMIZER.
        resume: Go on with the run in `out` (default: the last one). Options not given are those of the run; others
            are refused. Where nothing is there yet, the run begins.
        overwrite: Delete a run that is in `out` first.
        progress: Show a progress bar when the terminal can.

    Raises:
        TrainingDiverged: the loss became infinite or NaN; what was measured before is kept.
        ValueError: an option or the folder cannot be used.
    """
    if resume and overwrite:
        raise ValueError("`resume` and `overwrite` are both True; resume goes on with the run, overwrite deletes it")
    given = {
        "workload": workload, "optimizer": optimizer, "lr": lr, "momentum": momentum, "batch_size": batch_size,
        "optimizer_options": optimizer_options, "steps": steps, "every": every, "measure": measure, "seed": seed,
        "data": data, "num_examples": num_examples, "num_measured": num_measured, "device": device,
        "checkpoint_every": checkpoint_every, "threads": threads,
    }  # fmt: skip
    options = TrainingOptions.resolve(given)
    folder = RunFolder(
        default_folder(f"{options.workload}-{options.optimizer.lower()}", resume=resume) if out is None else out
    )
    stored, fingerprint = None, None
    if folder.exists and resume:
        stored, fingerprint = folder.read_options()
        options = _unchanged(TrainingOptions.resolve(given, stored), stored, folder)
    elif folder.exists and not overwrite:
        raise ValueError(
            f"`out` {folder.path} already holds a run; give another folder, `resume` (--resume) to go on with it, or "
            "`overwrite` (--overwrite) to replace it"
        )
    with _settled(options):
        job = built_in(options.workload, seed=options.seed, data=options.data, num_examples=options.num_examples)
        found = _fingerprint(job)
        if stored is not None and found != fingerprint:
            raise ValueError(
                f"the data ({job.source}) is not what the run in {folder.path} began with; restore it, or start a new "
                "run"
            )
        run = _Run(options, job.to(options.device), folder)
        if stored is None:
            if folder.exists:
                folder.clear()
            folder.claim()
            folder.write_options(options.to_json(), found)
        return run.complete(progress)


class _Run:
    """One run in this process: model, optimizer and monitor, moved from checkpoint to checkpoint."""

    def __init__(self, options: TrainingOptions, job: Workload, folder: RunFolder) -> None:
        self.options, self.job, self.folder = options, job, folder
        self.optimizer = make_optimizer(options.optimizer, job.model, options.optimizer_options)
        size = None if options.batch_size == FULL_BATCH else int(options.batch_size)
        self.order = DataOrder(job.train.num, size, options.seed)
        self.objective = job.objective(options.num_measured)
        self.measurements = chosen_measurements(options.measure)

    def complete(self, progress: bool) -> TrainingResult:
        steps = self.options.steps
        state = self.folder.latest_checkpoint()
        start = perf_counter()
        with Trajectory.open(self.folder.path, provenance=self._provenance()) as trajectory:
            first = 0 if state is None else int(state["step"])
            finished = first == steps and trajectory.is_complete(steps)
            if state is None:
                trajectory.discard_after(-1)  # measured by a process that died before its first checkpoint
            monitor = Monitor(self.objective, self.optimizer, self.measurements, trajectory, every=self.options.every)  # type: ignore[arg-type]
            if state is not None:
                self._restore(state, monitor)
            if not finished:
                with monitor, _bar(first, steps, self.options, progress) as bar:
                    for step in range(first, steps):
                        if step % self.options.checkpoint_every == 0 and (state is None or step > first):
                            self._checkpoint(step, monitor)
                        self._step(step, monitor, bar)
                    if first < steps:
                        self._checkpoint(steps, monitor)
        return TrainingResult(
            folder=self.folder.path,
            workload=self.job,
            options=self.options,
            resumed_at=None if state is None else first,
            seconds=perf_counter() - start,
        )

    def _step(self, step: int, monitor: Monitor, bar: tqdm) -> None:
        # Before the forward pass, which moves BatchNorm's running statistics: a replayed checkpoint then sees the same.
        rows = monitor.step()
        self.job.model.train()
        batch = self.job.train.chosen(self.order.at(step))
        value = self._descend(batch)
        if not math.isfinite(value):
            raise TrainingDiverged(
                f"the training loss is {value} at step {step}: {self.options.optimizer} with "
                f"{self.options.optimizer_options} diverged; choose a smaller lr. "
                f"What was measured is in {self.folder.path}"
            )
        shown = {"loss": f"{value:.3g}"}
        for row in rows:
            if row.quantity == "sharpness" and row.index == 0:
                bar.sharpness = f"{row.value:.4g}"  # type: ignore[attr-defined]
        if known := getattr(bar, "sharpness", None):
            shown["sharpness"] = known
        bar.set_postfix(shown, refresh=False)
        bar.update()

    def _descend(self, batch: Examples) -> float:
        """One step of the optimizer; the loss before it."""
        if needs_closure(self.optimizer):
            loss: Any = self.optimizer.step(lambda: self._gradient(batch))  # type: ignore[arg-type]
            return float(loss.detach() if isinstance(loss, Tensor) else loss)
        value = float(self._gradient(batch).detach())
        if math.isfinite(value):
            self.optimizer.step()
        return value

    def _gradient(self, batch: Examples) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.job.loss(batch)
        loss.backward()
        return loss

    def _checkpoint(self, step: int, monitor: Monitor) -> None:
        """The state after `step` updates, before that step is measured. The data order follows from seed and step."""
        rng = {"cpu": torch.get_rng_state()}
        if self.objective.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.objective.device)
        state = {
            "model": self.job.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "monitor": monitor.state_dict(),
            "rng": rng,
        }
        self.folder.save_checkpoint(step, state)

    def _restore(self, state: dict[str, Any], monitor: Monitor) -> None:
        self.job.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        monitor.load_state_dict(state["monitor"])
        torch.set_rng_state(state["rng"]["cpu"])
        if "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.objective.device)

    def _provenance(self) -> dict[str, Any]:
        group = self.optimizer.param_groups[0]
        plain = {key: value for key, value in group.items() if isinstance(value, bool | int | float | str)}
        return {
            "workload": self.job.name,
            "data": self.job.source,
            "optimizer": {"name": self.options.optimizer, **plain},
            "options": self.options.to_json(),
            "num_parameters": self.objective.num_parameters,
        }


def _unchanged(asked: TrainingOptions, stored: dict[str, Any], folder: RunFolder) -> TrainingOptions:
    """The options of the run, when those asked for now agree with them."""
    before = TrainingOptions.resolve(stored)
    changes = before.changes(asked)
    if changes:
        raise ValueError(
            f"the run in {folder.path} cannot be resumed with other options: {'; '.join(changes)}; leave them out, or "
            "start a new run in another folder"
        )
    return before


def _fingerprint(job: Workload) -> str:
    return digest((tuple(job.train), tuple(job.held_out))).hexdigest()


@contextmanager
def _settled(options: TrainingOptions) -> Iterator[None]:
    """Threads and random streams of the run; the caller's are put back."""
    threads = torch.get_num_threads()
    devices = [torch.device(options.device)] if options.device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(options.seed)
        torch.set_num_threads(options.threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _bar(first: int, steps: int, options: TrainingOptions, progress: bool) -> tqdm:
    title = f"{options.workload}, {options.optimizer}"
    # None switches the bar off where there is no terminal to draw it on.
    return tqdm(total=steps, initial=first, desc=title, unit="step", disable=None if progress else True)
