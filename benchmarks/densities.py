"""Spectral densities and traces of a Hessian against its exact spectrum: time, Wasserstein-1 distance, trace error.

    python benchmarks/densities.py --quick      # a smaller network, fewer seeds: one minute
    python benchmarks/densities.py              # n = 7770; the exact spectrum takes some minutes and is kept

A tanh network is trained on scikit-learn's digits for 120 steps; its exact spectrum is that of the dense float64
Hessian. W1 is in units of the spectral radius. Engines run in turns within each round, a new seed every round; times
are medians of processor seconds in one thread, with the making of the operator. Peers that are not installed are left
out; PyHessian needs torch.eig, which torch has no more: here it is made of torch.linalg.eigh. The tables are printed
and written as Markdown and JSON (--out, by default results/densities).
"""

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import wasserstein_distance
from sharpscope import Hessian, Objective, spectral_density, trace
from sklearn.datasets import load_digits
from torch import nn

# For the ladder: what each engine is run with, steps x probes.
LADDER = ((15, 1), (20, 1), (30, 1), (40, 1), (60, 1), (80, 1), (40, 2), (60, 2))
OURS_ONLY = ((10, 1), (15, 2))
GOALS = (1.1e-3, 1e-3, 9e-4, 8e-4, 7e-4)
# Plain and deflated at the same products: steps x probes of both, and pairs.
EQUAL = (((40, 4), (40, 3), 10), ((40, 8), (40, 7), 10))


def workload(sizes):
    """Model in eval mode, inputs, targets: digits with noise on 5 % of the labels, 120 steps of SGD with momentum."""
    torch.manual_seed(0)
    layers = []
    for i, (a, b) in enumerate(pairwise(sizes)):
        layers += [nn.Linear(a, b)] + ([nn.Tanh()] if i < len(sizes) - 2 else [])
    model, data, generator = nn.Sequential(*layers), load_digits(), torch.Generator().manual_seed(0)
    chosen = torch.randint(0, len(data.target), (1024,), generator=generator)
    X = (torch.tensor(data.images, dtype=torch.float32)[chosen].flatten(1) / 16 - 0.3) / 0.35
    X = X + 0.3 * torch.randn(X.shape, generator=generator)
    y = torch.tensor(data.target)[chosen]
    wrong = torch.rand(1024, generator=generator) < 0.05
    y[wrong] = torch.randint(0, 10, (int(wrong.sum()),), generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(120):
        first = step * 64 % 1024
        optimizer.zero_grad()
        F.cross_entropy(model(X[first : first + 64]), y[first : first + 64]).backward()
        optimizer.step()
    return model.eval(), X, y


def exact_spectrum(sizes, model, X, y):
    """Ascending eigenvalues [n] of the dense float64 Hessian, kept beside the temporary files."""
    key = f"{sum(float(p.detach().double().sum()) for p in model.parameters()):.12g}"
    path = Path(tempfile.gettempdir()) / f"sharpscope-spectrum-{'-'.join(map(str, sizes))}-{key}.npy"
    if not path.exists():
        double = nn.Sequential(*workload(sizes)[0]).double()
        objective = Objective.supervised(double, F.cross_entropy, [(X.double(), y)])
        matrix = Hessian(objective).dense()
        np.save(path, torch.linalg.eigvalsh((matrix + matrix.T) / 2).numpy())
    return np.load(path)


def ours(model, X, y, steps, probes, seed, **options):
    op = Hessian(Objective.supervised(model, F.cross_entropy, [(X, y)]))
    density = spectral_density(op, num_steps=steps, num_probes=probes, seed=seed, **options)
    return density.nodes.numpy(), density.weights.numpy(), density.products


def pyhessian_density(model, X, y, steps, probes, seed):
    from pyhessian import hessian

    def eig(T, eigenvectors=True):
        values, vectors = torch.linalg.eigh(T)
        return torch.stack([values, torch.zeros_like(values)], dim=1), vectors

    torch.eig = eig
    torch.manual_seed(seed)
    nodes, weights = hessian(model, F.cross_entropy, data=(X, y), cuda=False).density(iter=steps, n_v=probes)
    return np.array(nodes), np.array(weights), steps * probes


def eigenthings_density(model, X, y, steps, probes, seed):
    from hessian_eigenthings import HessianOperator
    from hessian_eigenthings.algorithms import spectral_density as density

    op = HessianOperator(model, [(X, y)], lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]))
    found = density(op, num_runs=probes, lanczos_steps=steps, seed=1000 * seed)
    return found.raw_eigenvalues.numpy(), found.raw_weights.numpy(), steps * probes


def curvlinops_density(model, X, y, steps, probes, seed):
    """The quadrature alone, without the eigsh run for its grid."""
    from curvlinops import HessianLinearOperator
    from curvlinops.papyan2020traces.spectrum import fast_lanczos

    torch.manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    op = HessianLinearOperator(model, nn.CrossEntropyLoss(), parameters, [(X, y)], check_deterministic=False)
    runs = [fast_lanczos(op, steps) for _ in range(probes)]
    return np.array([v.numpy() for v, _ in runs]), np.array([v[0].numpy() ** 2 for _, v in runs]), steps * probes


ENGINES = {
    "sharpscope": ours,
    "sharpscope, deflate=10": lambda *args: ours(*args, deflate=10),
    "PyHessian": pyhessian_density,
    "hessian-eigenthings": eigenthings_density,
    "curvlinops": curvlinops_density,
}
DEFAULTS = {
    "sharpscope": (40, 8),
    "sharpscope, deflate=10": (40, 8),
    "PyHessian": (100, 1),
    "hessian-eigenthings": (80, 10),
    "curvlinops": (128, 1),
}


def run(engine, setting, problem, spectrum, seed):
    """Products, W1 over the radius, relative trace error, processor seconds."""
    began = time.process_time()
    nodes, weights, products = ENGINES[engine](*problem, *setting, seed)
    seconds = time.process_time() - began
    shares = weights.reshape(-1) / weights.sum()
    distance = wasserstein_distance(nodes.reshape(-1), spectrum, shares) / np.abs(spectrum).max()
    return products, distance, len(spectrum) * (shares @ nodes.reshape(-1)) / spectrum.sum() - 1, seconds


def measure(settings, problem, spectrum, rounds):
    """{(engine, setting): rows of `run`}, engines in turns."""
    found = {key: [] for key in settings}
    for key in settings:
        run(*key, problem, spectrum, 10_000)
        break
    for seed in range(rounds):
        for key in settings:
            found[key].append(run(*key, problem, spectrum, seed))
    return {key: np.array(rows) for key, rows in found.items()}


def show(found):
    lines = [
        "| engine | steps x probes | products | W1 / radius (sd) | trace error, rms | seconds [min, max] |",
        "|---|---|---|---|---|---|",
    ]
    for (engine, (steps, probes)), rows in found.items():
        products, w1, error, seconds = rows.T
        lines.append(
            f"| {engine} | {steps} x {probes} | {products.mean():.0f} | {w1.mean():.2e} ({w1.std():.0e}) "
            f"| {np.sqrt(np.mean(error**2)):.3f} | {statistics.median(seconds):.2f} "
            f"[{seconds.min():.2f}, {seconds.max():.2f}] |"
        )
    return lines


def show_goals(found):
    """The fastest setting of each engine whose mean W1 is within the goal."""
    lines = [
        "| W1 / radius at most | " + " | ".join(ENGINES) + " | ours / best peer |",
        "|---" * (len(ENGINES) + 2) + "|",
    ]
    for goal in GOALS:
        best = {}
        for (engine, setting), rows in found.items():
            if rows[:, 1].mean() <= goal:
                entry = (statistics.median(rows[:, 3]), setting)
                best[engine] = min(best.get(engine, entry), entry)
        mine = [best[e][0] for e in best if e.startswith("sharpscope")]
        theirs = [best[e][0] for e in best if not e.startswith("sharpscope")]
        ratio = f"{min(mine) / min(theirs):.2f}" if mine and theirs else "-"
        cells = [f"{best[e][0]:.2f} s, {best[e][1][0]} x {best[e][1][1]}" if e in best else "-" for e in ENGINES]
        lines.append(f"| {goal:g} | " + " | ".join(cells) + f" | {ratio} |")
    return lines


def show_equal(problem, spectrum, rounds):
    """Trace error of the density, plain and deflated, at equal products."""
    lines = [
        "| plain | products | trace error, rms | deflated | products | trace error, rms | deflated / plain |",
        "|---|---|---|---|---|---|---|",
    ]
    for plain, fewer, pairs in EQUAL:
        sides = []
        for (steps, probes), options in ((plain, {}), (fewer, {"deflate": pairs})):
            found = []
            for seed in range(rounds):
                nodes, weights, products = ours(*problem, steps, probes, seed, **options)
                trace_error = len(spectrum) * (weights * nodes).sum(1).mean() / spectrum.sum() - 1
                found.append((products, trace_error))
            products, errors = np.array(found).T
            sides.append((f"{steps} x {probes}", products.max(), np.sqrt(np.mean(errors**2))))
        (a, m, x), (b, k, y) = sides
        lines.append(f"| {a} | {m:.0f} | {x:.4f} | {b}, {pairs} pairs | {k:.0f} | {y:.4f} | {y / x:.2f} |")
    return lines


def show_traces(problem, spectrum, budgets, rounds):
    """Relative trace errors at equal products."""
    model, X, y = problem
    methods = {
        "hutchinson": {},
        "hutchinson, deflate=10": {"deflate": 10},
        "hutch++": {"method": "hutch++"},
        "xtrace": {"method": "xtrace"},
    }
    lines = [
        "| products | " + " | ".join(methods) + " | deflated / plain | xtrace / plain |",
        "|---" * (len(methods) + 3) + "|",
    ]
    for budget in budgets:
        spread = {}
        for name, options in methods.items():
            op = Hessian(Objective.supervised(model, F.cross_entropy, [(X, y)]))
            found = [trace(op, num_probes=budget, seed=seed, **options) for seed in range(rounds)]
            errors = np.array([float(f) / spectrum.sum() - 1 for f in found])
            stated = np.mean([f.stderr for f in found]) / spectrum.sum()
            spread[name] = (np.sqrt(np.mean(errors**2)), stated)
        ratios = [spread[name][0] / spread["hutchinson"][0] for name in ("hutchinson, deflate=10", "xtrace")]
        cells = " | ".join(f"{rms:.4f} (stated {stated:.4f})" for rms, stated in spread.values())
        lines.append(f"| {budget} | {cells} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
    return lines


def installed():
    for engine, module in (
        ("PyHessian", "pyhessian"),
        ("hessian-eigenthings", "hessian_eigenthings"),
        ("curvlinops", "curvlinops"),
    ):
        try:
            __import__(module)
        except ImportError:
            print(f"{engine} is not installed and left out")
            ENGINES.pop(engine)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller network and fewer seeds")
    parser.add_argument("--rounds", type=int, help="seeds; default 12, or 3 with --quick")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "densities")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    installed()
    sizes, rounds = ((64, 32, 24, 10), 3) if args.quick else ((64, 64, 48, 10), 12)
    rounds = args.rounds or rounds
    problem = workload(sizes)
    spectrum = exact_spectrum(sizes, *problem)
    document = [
        "# Spectral densities and traces",
        "",
        f"n = {len(spectrum)}, radius {np.abs(spectrum).max():.4g}, trace {spectrum.sum():.4g}; {rounds} seeds; "
        f"torch {torch.__version__}, CPU seconds on one thread.",
    ]

    def section(title, lines):
        document.extend(["", f"## {title}", "", *lines])
        print("\n".join(["", f"## {title}", "", *lines]), flush=True)

    defaults = measure([(engine, DEFAULTS[engine]) for engine in ENGINES], problem, spectrum, min(rounds, 3))
    section("Defaults", show(defaults))
    settings = [(engine, setting) for setting in LADDER for engine in ENGINES]
    settings += [("sharpscope, deflate=10", setting) for setting in OURS_ONLY]
    found = measure(settings, problem, spectrum, rounds)
    section("Steps x probes", show(found))
    section("Seconds to an accuracy", show_goals(found))
    section("Trace of the density at equal products", show_equal(problem, spectrum, 6 if args.quick else 24))
    section("Trace at equal products", show_traces(problem, spectrum, (40, 100, 200), max(rounds, 12)))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".md").write_text("\n".join([*document, ""]))
    rows = [
        {"engine": engine, "steps": steps, "probes": probes, "products_w1_trace_seconds": values.tolist()}
        for runs in (defaults, found)
        for (engine, (steps, probes)), values in runs.items()
    ]
    result = {"n": len(spectrum), "quick": args.quick, "rounds": rounds, "torch": torch.__version__, "runs": rows}
    args.out.with_suffix(".json").write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
