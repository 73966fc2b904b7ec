"""The command line: `sharpscope train | analyze | plot | study | doctor | info`.

Each command calls the function of the same name and shows what it returns. The imports stand inside the commands, so
that help and mistakes in the options are answered at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .terminal import command, say, set_debug, show

app = typer.Typer(
    name="sharpscope",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str | None,
    typer.Option(help="Your model, package.module:name or file.py:name: a module, or a function that makes one."),
]
OwnData = Annotated[
    str | None,
    typer.Option("--data", help="Your data, package.module:name or file.py:name: batches, or what makes them."),
]
Criterion = Annotated[
    str | None,
    typer.Option(help="criterion(prediction, target): a loss of torch.nn such as CrossEntropyLoss, or module:name."),
]
Loss = Annotated[str | None, typer.Option(help="loss(model, batch), module:name, in place of --criterion.")]
Measure = Annotated[
    list[str] | None,
    typer.Option("--measure", "-m", help="Measurement, repeatable: sharpness, density:500, sharpness:num=3,every=10."),
]
Progress = Annotated[bool, typer.Option(help="Show a progress bar.")]


def _version(asked: bool) -> None:
    if asked:
        from . import __version__

        say(f"sharpscope {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """See what the loss landscape does while a network trains."""
    set_debug(debug)


@app.command("train")
@command
def train_command(
    workload: Annotated[
        str | None,
        typer.Option("--workload", "-w", help="digits-mlp (default), digits-cnn, fashion-cnn or char-transformer."),
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="Any optimizer of sharpscope or torch.optim by name; default SGD.")
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(help="Several optimizers, one run each, in one figure: SGD,Adam:lr=0.001,SAM:rho=0.1,lr=0.2"),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; default the workload's or optimizer's.")] = None,
    momentum: Annotated[float | None, typer.Option(help="Short for --option momentum=...")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="Optimizer option key=value, repeatable.")
    ] = None,
    batch_size: Annotated[str | None, typer.Option(help="Examples per step, or 'full' for all of them.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    every: Annotated[int | None, typer.Option(help="Steps between measurements.")] = None,
    measure: Measure = None,
    seed: Annotated[int | None, typer.Option(help="Of initial weights and data order; default 0.")] = None,
    data: Annotated[
        str | None, typer.Option(help="fashion-cnn: a folder of idx files; char-transformer: a text file, kjv, pydoc.")
    ] = None,
    num_examples: Annotated[int | None, typer.Option(help="Examples to train on.")] = None,
    num_measured: Annotated[int | None, typer.Option(help="How many of these the measurements use.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints; default steps/20.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu (default) or cuda.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch on the CPU; default 1 for the digits.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default a new one in runs/.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is in --out.")] = False,
    progress: Progress = True,
) -> None:
    """Train a built-in workload with its sharpness watched.

    Without options: gradient descent on the scikit-learn digits, to the edge of stability.
    """
    from .dynamics.run_folder import FIGURES
    from .dynamics.settings import parse_settings
    from .dynamics.training import train
    from .figures.plot import drawable, plot

    options: dict[str, Any] = {}
    for text in option or []:
        options |= parse_settings(text)
    settings: dict[str, Any] = {
        "workload": workload, "lr": lr, "momentum": momentum, "optimizer_options": options or None, "steps": steps,
        "batch_size": _batch_size(batch_size), "every": every, "measure": measure, "seed": seed, "data": data,
        "num_examples": num_examples, "num_measured": num_measured, "checkpoint_every": checkpoint_every,
        "device": device, "threads": threads, "out": out, "resume": resume, "overwrite": overwrite,
        "progress": progress,
    }  # fmt: skip
    if compare is not None:
        if optimizer is not None:
            raise ValueError(f"`--optimizer` is {optimizer!r} and `--compare` is {compare!r}; give one of them")
        _compare(compare, {key: value for key, value in settings.items() if value is not None})
        return
    result = train(optimizer=optimizer, **settings)
    if resume and result.resumed_at is None:
        say(f"nothing to resume in {result.folder}: the run began at step 0")
    show(str(result.folder), ("", "start -> end"), result.summary())
    with result.trajectory() as trajectory:
        if names := drawable(trajectory):
            for path in plot(trajectory, result.folder / FIGURES, figures=names):
                say(f"figure {path}")


def _compare(optimizers: str, settings: dict[str, Any]) -> None:
    from contextlib import ExitStack

    from .dynamics.comparison import compare
    from .figures.comparison import comparison
    from .figures.style import save

    found = compare(optimizers, **settings)
    for label, result in found.results.items():
        show(f"{label}: {result.folder}", ("", "start -> end"), result.summary())
    path = found.folder / "comparison.png"
    with ExitStack() as stack:
        runs = {label: stack.enter_context(result.trajectory()) for label, result in found.results.items()}
        save(comparison(runs), path)
    say(f"figure {path}")


@app.command("analyze")
@command
def analyze_command(
    checkpoints: Annotated[str, typer.Argument(help="A run of train; or a checkpoint, a folder or a glob of them.")],
    model: Model = None,
    data: OwnData = None,
    criterion: Criterion = None,
    loss: Loss = None,
    measure: Measure = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the new trajectory; default analysis/ beside them.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="Entry of a checkpoint that holds the weights.")] = None,
    progress: Progress = True,
) -> None:
    """Measure curvature at stored checkpoints; what was measured before is not measured again.

    The exit code is 1 when a checkpoint could not be used.
    """
    from .dynamics.analysis import DEFAULT_MEASURE, analyze

    result = analyze(
        checkpoints,
        model=model,
        data=data,
        criterion=criterion,
        loss=loss,
        measure=measure or DEFAULT_MEASURE,
        out=out,
        key=key,
        progress=progress,
    )
    found = result.replay
    steps = set(found.measured) | set(found.cached)
    table = result.table()
    rows = [
        (
            str(row["step"]),
            row["quantity"],
            row["block"],
            str(row["index"]),
            f"{row['value']:.6g}",
            "-" if row["error"] != row["error"] else f"{row['error']:.1g}",
            _yes(row["converged"]),
        )
        for row in table.to_dict("records")
        if row["step"] in steps
    ]
    show(str(result.folder), ("step", "quantity", "block", "index", "value", "error", "converged"), rows)
    if found.failed:
        show("not usable", ("checkpoint", "reason"), found.failed)
    say(
        f"{len(found.measured)} measured, {len(found.cached)} from cache, {len(found.failed)} failed; "
        f"{found.products} operator products"
    )
    if found.failed:
        raise typer.Exit(1)


@app.command("plot")
@command
def plot_command(
    trajectory: Annotated[Path, typer.Argument(help="Folder of a trajectory, such as a run of train.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the figures, or a file .png, .pdf or .svg.")] = None,
    figure: Annotated[
        list[str] | None, typer.Option(help="Which figure, repeatable; default all it has data for.")
    ] = None,
    format: Annotated[list[str] | None, typer.Option(help="png (default), pdf or svg, repeatable.")] = None,
) -> None:
    """Draw the figures of a trajectory."""
    from .figures.plot import plot

    for path in plot(trajectory, out, figures=figure, formats=format or ("png",)):
        say(f"figure {path}")


@app.command("study")
@command
def study_command(
    name: Annotated[str | None, typer.Argument(help="Which; without a name they are listed.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer seeds and steps: less than a minute.")] = False,
    every: Annotated[bool, typer.Option("--all", help="All of them, on all cores, and the replication table.")] = False,
    table: Annotated[bool, typer.Option("--table", help="Only the table, of the results that are there.")] = False,
    jobs: Annotated[int | None, typer.Option(help="Processes of --all; default one per core.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the result, default runs/studies/NAME; of --all: runs/studies.")
    ] = None,
) -> None:
    """Put the claims of a paper to the test: what is claimed, what was measured here, whether it holds.

    The exit code is 0 when the study ran whole, whatever it found. A study that was stopped goes on where it was.
    """
    from .dynamics.studies import STUDIES, study_named
    from .dynamics.studies.catalogue import default_studies_folder

    if name is not None and (every or table):
        raise ValueError(f"`name` is {name!r} and --{'all' if every else 'table'} is given; give one of them")
    if jobs is not None and not every:
        raise ValueError(f"`--jobs` is {jobs} without --all; a single study runs in one process")
    if every or table:
        folder = default_studies_folder(quick=quick) if out is None else out
        _all_studies(folder, quick, -1 if jobs is None else jobs) if every else _replication_table(folder)
    elif name is None:
        studies = [study_named(known) for known in STUDIES]
        show("studies", ("name", "subject", "paper"), ((s.name, s.title, s.paper) for s in studies))
    else:
        _study(name, quick, out)


def _study(name: str, quick: bool, out: Path | None) -> None:
    from .dynamics.studies.catalogue import default_study_folder, study

    folder = default_study_folder(name, quick=quick) if out is None else out
    result = study(name, quick=quick, out=folder, say=lambda part: say(f"... {part}"))
    columns = ("claim", "source", "expected", "measured", "verdict", "note")
    rows = ((c.statement, c.source, c.expected, c.measured, c.verdict, c.note) for c in result.claims)
    show(f"{result.title} ({result.paper})", columns, rows)
    say(result.setting)
    _draw(result, folder)
    say(f"{_outcome(result)}; {folder}")


def _all_studies(folder: Path, quick: bool, jobs: int) -> None:
    from tqdm import tqdm

    from .dynamics.studies import STUDIES
    from .dynamics.studies.replication import replicate

    failed = {}
    for name, result in tqdm(replicate(folder, quick=quick, jobs=jobs), total=len(STUDIES), unit="study"):
        if isinstance(result, str):
            failed[name] = result
            say(f"{name} failed: {result}")
            continue
        say(f"{name}: {_outcome(result)}")
        try:
            _draw(result, folder / name)
        except Exception as error:  # the other studies go on
            failed[name] = f"its figure: {error}"
            say(f"{name} failed: {failed[name]}")
        _replication_table(folder, quiet=True)
    if len(failed) < len(STUDIES):
        _replication_table(folder)
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(STUDIES)} studies did not run whole: {', '.join(failed)}; see {folder}"
        )


def _replication_table(folder: Path, *, quiet: bool = False) -> None:
    from .dynamics.atomic_files import write_atomically
    from .dynamics.studies.replication import SUMMARY_HEAD, TABLE, kept_results, replication_markdown, summary_rows
    from .figures.replication import replication_html

    results = kept_results(folder)
    if not results:
        raise ValueError(f"`out` {folder} holds no result of a study; `sharpscope study --all` makes them")
    write_atomically(folder / f"{TABLE}.md", replication_markdown(results).encode())
    write_atomically(folder / f"{TABLE}.html", replication_html(results).encode())
    if not quiet:
        show("replication", SUMMARY_HEAD, summary_rows(results))
        say(f"table {folder / TABLE}.md, {folder / TABLE}.html")


def _outcome(result: Any) -> str:
    reported = len(result.claims) - result.judged
    others = f", {reported} more reported without a verdict" if reported else ""
    return f"{result.held} of {result.judged} claims hold{others}; {result.seconds:.0f} s of processor time"


def _draw(result: Any, folder: Path) -> None:
    from .figures.study import study_figure
    from .figures.style import save

    if result.panels:
        save(study_figure(result), folder / "study.png")


@app.command("doctor")
@command
def doctor_command(
    model: Model = None,
    data: OwnData = None,
    criterion: Criterion = None,
    loss: Loss = None,
    workload: Annotated[
        str, typer.Option("--workload", "-w", help="Built-in workload to test when no --model is given.")
    ] = "digits-mlp",
    mode: Annotated[
        str | None, typer.Option(help="eval (default), train or keep: the mode in which your model is evaluated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random directions.")] = 0,
) -> None:
    """Test whether the curvature of your model can be trusted here, and say what is peculiar about it.

    The exit code is 1 when a check failed.
    """
    from .dynamics.doctor import doctor
    from .dynamics.subject import subject
    from .dynamics.workloads import workload as built_in

    options: dict[str, Any] = {} if mode is None else {"mode": mode}
    if model is None:
        if data is not None or criterion is not None or loss is not None:
            raise ValueError("`--model` is missing; --data, --criterion and --loss describe a model of your own")
        job = built_in(workload)
        objective = job.objective(**options)
        title = f"doctor: {workload}, {job.source}"
    else:
        if data is None:
            raise ValueError("`--data` is missing: the loss of your model is measured on it")
        objective = subject(model, data, criterion=criterion, loss=loss, **options)
        title = f"doctor: {model}"
    diagnosis = doctor(objective, seed=seed)
    show(title, ("check", "outcome", "found"), ((c.name, c.outcome, c.found) for c in diagnosis.checks))
    failed = [check.name for check in diagnosis.checks if check.outcome == "fail"]
    say("healthy" if diagnosis.healthy else f"failed: {', '.join(failed)}")
    if not diagnosis.healthy:
        raise typer.Exit(1)


@app.command("info")
@command
def info_command() -> None:
    """Show versions, back ends and data, what runs where, and why."""
    from .dynamics.info import info

    show("sharpscope on this machine", ("kind", "name", "found", "meaning"), info())


def _batch_size(text: str | None) -> int | str | None:
    if text is None or text == "full":
        return text
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"`--batch-size` is {text!r}; give a number of examples, or 'full'") from None


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def main() -> None:
    """What the command `sharpscope` runs."""
    app()
