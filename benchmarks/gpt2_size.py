"""A 124M-parameter decoder on this machine: certified sharpness, density, vector work and memory, against the plan.

    python benchmarks/gpt2_size.py top          # top eigenvalue to 1e-3
    python benchmarks/gpt2_size.py density      # 40 Lanczos steps of the spectral density
    python benchmarks/gpt2_size.py vectors      # Gram-Schmidt of 16 vectors against per-tensor lists

Each job runs in its own process so that peak memory is its own; results go to benchmarks/results/gpt2_size.json.
The model has the shape of GPT-2 small (12 layers, width 768, 50257 tokens, tied), random weights, 1 x 128 tokens of
English text, split into words of at most four characters.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
import zlib
from pathlib import Path

import torch
from sharpscope import Hessian, Objective, spectral_density, top_eigenvalues
from sharpscope.dynamics.workloads.models import CharTransformer
from sharpscope.kernels.accurate import dot, norm, orthogonalise, project
from torch import nn

RESULTS = Path(__file__).parent / "results" / "gpt2_size.json"
VOCABULARY, LENGTH = 50257, 128
ROWS = 16  # of the basis in the vector work
ROUNDS = 3


def objective():
    import pydoc_data.topics

    text = "".join(pydoc_data.topics.topics.values())
    words = [text[i : i + 4] for i in range(0, 4 * (LENGTH + 1), 4)]
    tokens = torch.tensor([[zlib.crc32(word.encode()) % VOCABULARY for word in words]])
    torch.manual_seed(0)
    model = CharTransformer(VOCABULARY, length=LENGTH, width=768, num_heads=12, num_layers=12)
    return Objective.supervised(model, nn.CrossEntropyLoss(), (tokens[:, :-1], tokens[:, 1:]))


def resident(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


class PeakMemory:
    """Peak of the resident memory above that at the start, in bytes."""

    def __enter__(self):
        Path("/proc/self/clear_refs").write_text("5")
        self._before = resident("VmRSS")
        return self

    def __exit__(self, *error):
        self.bytes = resident("VmHWM") - self._before


def top():
    loss = objective()
    hessian = Hessian(loss)
    plan = top_eigenvalues.plan(hessian, 1, tol=1e-3)
    print(plan, flush=True)
    del hessian
    fresh = Hessian(loss)
    with PeakMemory() as peak:
        pairs = top_eigenvalues(fresh, 1, tol=1e-3, progress=True)
    v = pairs.vectors[:, 0]
    image = fresh @ v
    value = float(dot(v, image))
    return {
        "parameters": loss.num_parameters,
        "engine": fresh.engine.name,
        "top_eigenvalue": float(pairs.values[0]),
        "residual": float(pairs.residuals[0]),
        "value_bound": float(pairs.value_bounds[0]),
        "rayleigh_quotient_recomputed": value,
        "residual_recomputed": float(norm(image - value * v)),
        "converged": pairs.converged,
        "verified": pairs.verified,
        **against(plan, pairs, peak),
    }


def density():
    loss = objective()
    hessian = Hessian(loss)
    plan = spectral_density.plan(hessian, num_steps=40, num_probes=1)
    print(plan, flush=True)
    del hessian
    with PeakMemory() as peak:
        found = spectral_density(Hessian(loss), num_steps=40, num_probes=1, progress=True)
    return {
        "parameters": loss.num_parameters,
        "nodes_from": float(found.nodes.min()),
        "nodes_to": float(found.nodes.max()),
        "mean": found.mean().estimate,
        "mean_stderr": found.mean().stderr,
        **against(plan, found, peak),
    }


def against(plan, found, peak):
    return {
        "products": found.products,
        "products_planned": plan.products,
        "seconds": found.seconds,
        "seconds_planned": plan.seconds,
        "peak_memory_gib": peak.bytes / 2**30,
        "peak_memory_planned_gib": plan.bytes / 2**30,
    }


def vectors():
    """One new vector made orthogonal to 16: two passes on one contiguous basis, and one on lists of tensors."""
    shapes = [p.shape for p in objective().parameters.values()]
    n = sum(shape.numel() for shape in shapes)
    basis = torch.empty(ROWS, n)
    for row in basis:
        row.normal_()
    basis /= n**0.5
    w = torch.randn(n)

    def pieces(x):
        return [piece.view(shape) for piece, shape in zip(x.split([s.numel() for s in shapes]), shapes, strict=True)]

    lists, parts = [pieces(row) for row in basis], pieces(w)

    def contiguous():
        orthogonalise(basis, w)

    def per_tensor():
        rest = [part.clone() for part in parts]
        for row in lists:
            share = -sum(torch.sum(a * b) for a, b in zip(rest, row, strict=True))
            for a, b in zip(rest, row, strict=True):
                a.add_(b * share)

    ways = {"read": lambda: basis.sum(1), "contiguous": contiguous, "per-tensor lists": per_tensor}
    times = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - began)
    wide = float(sum(a.double() @ b.double() for a, b in zip(basis[0].split(1 << 20), w.split(1 << 20), strict=True)))
    scale = float(norm(basis[0]) * norm(w))
    seconds = {name: statistics.median(found) for name, found in times.items()}
    return {
        "parameters": n,
        "rows": ROWS,
        "seconds": seconds,
        "spread": {name: [min(found), max(found)] for name, found in times.items()},
        "ratio": seconds["contiguous"] / seconds["per-tensor lists"],
        "error_of_dot": abs(float(dot(basis[0], w)) - wide) / scale,
        "error_of_project": abs(float(project(basis, w)[0]) - wide) / scale,
        "error_of_torch_norm": abs(float(torch.linalg.vector_norm(w)) / float(norm(w)) - 1),
    }


JOBS = {"top": top, "density": density, "vectors": vectors}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=JOBS)
    job = parser.parse_args().job
    result = JOBS[job]() | {
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[job] = result
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(known, indent=2) + "\n")
    json.dump(result, sys.stdout, indent=2)
    print()
