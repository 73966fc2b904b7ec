"""Block-wise Hessian products and spectra of a small GPT against the ways other tools take.

    python benchmarks/blocks.py [--quick] [--rounds N] [--out results/blocks]

Two tables, in CPU seconds of this process on one thread, interleaved, printed and written as Markdown and JSON:

1. One product with every parameter's block, in gradients (one forward and backward pass on the same data).
2. The spectra of blocks small enough for a dense float64 reference: error in Wasserstein-1 distance, as a share of
   |λ|max, and cost of `block_spectra` and of 100 Lanczos steps from each of 10 Gaussian probes without
   reorthogonalisation, where a product is a whole backward pass through one retained gradient.

hessian-eigenthings and curvlinops take part where they are installed. Set MALLOC_MMAP_THRESHOLD_ and
MALLOC_TRIM_THRESHOLD_ to large values, as for the other benchmarks, to keep page faults out of the figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sysconfig
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sharpscope import Objective, block_spectra
from sharpscope.hessian.curvature import Hessian
from sharpscope.hessian.density import w1_distance
from sharpscope.hessian.hessian_block import products
from sharpscope.landscape.blocks import partition
from torch import Tensor, nn

# What `block_spectra` is run with.
OURS: dict[str, dict[str, int]] = {
    "defaults": {},
    "25 x 2, ten deflated": {"num_steps": 25, "num_probes": 2, "deflate": 10},
    "20 x 1, ten deflated": {"num_steps": 20, "num_probes": 1, "deflate": 10},
}
SEEDS = 3
# Of the Lanczos runs in the style of hessian-spectrum.
STEPS, PROBES = 100, 10


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, d = x.shape
        h = self.norm1(x)
        q, k, v = (f(h).view(B, T, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        later = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        scores = (q @ k.transpose(-2, -1) / math.sqrt(d // self.heads)).masked_fill(later, -math.inf)
        x = x + self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Token and position embeddings, pre-norm layers, an output tied to the embedding."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                scale = math.sqrt(2 * layers) if name.endswith(("o.weight", "down.weight")) else 1.0
                nn.init.normal_(p, 0, 0.02 / scale)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return (self.norm(x) @ self.tokens.weight.T).flatten(0, 1)


def text(sequences: int, length: int, vocabulary: int, seed: int) -> tuple[Tensor, Tensor]:
    """Bytes of the standard library's sources, and the bytes after them."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    data = torch.tensor(list(b"".join(file.read_bytes() for file in files))) % vocabulary
    rng = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(data) - length - 1, (sequences,), generator=rng)
    inputs = torch.stack([data[i : i + length] for i in starts])
    return inputs, torch.stack([data[i + 1 : i + length + 1] for i in starts]).flatten()


def trained(model: GPT, length: int, vocabulary: int, steps: int, rate: float) -> GPT:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for step in range(steps):
        inputs, targets = text(16, length, vocabulary, seed=1000 + step)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return model.eval()


def interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            began = time.process_time()
            call()
            if turn:
                times[name].append(time.process_time() - began)
    return times


def backward_products(
    model: nn.Module, parameters: Sequence[Tensor], gradients: list[Tensor], i: int, v: Tensor
) -> Tensor:
    """The block's product by a whole backward pass into `.grad`, as hessian-spectrum does."""
    (gradients[i] * v).sum().backward(retain_graph=True)
    found = parameters[i].grad
    assert found is not None
    model.zero_grad(set_to_none=True)
    return found.clone()


def retained_gradients(model: nn.Module, batch: tuple[Tensor, Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    F.cross_entropy(model(batch[0]), batch[1]).backward(create_graph=True)
    gradients = [p.grad for p in parameters if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return gradients


def products_table(model: GPT, batch: tuple[Tensor, Tensor], rounds: int) -> tuple[list[str], dict[str, Any]]:
    inputs, targets = batch
    parameters = list(model.parameters())
    vectors = [torch.randn_like(p) for p in parameters]
    objective = Objective.supervised(model, F.cross_entropy, batch)
    hessian = Hessian(objective, engine="double-backward")
    blocks = [hessian.block(block) for block in partition(objective).values()]
    columns = [v.reshape(-1, 1) for v in vectors]

    def gradient() -> object:
        return torch.autograd.grad(F.cross_entropy(model(inputs), targets), parameters)

    def spectrum_style() -> list[Tensor]:
        gradients = retained_gradients(model, batch, parameters)
        return [backward_products(model, parameters, gradients, i, v) for i, v in enumerate(vectors)]

    calls: dict[str, Callable[[], object]] = {
        "gradient": gradient,
        "sharpscope, all blocks together": lambda: products(blocks, columns)[0],
        "sharpscope, block by block": lambda: [op.matmat(v) for op, v in zip(blocks, columns, strict=True)],
        "hessian-spectrum style": spectrum_style,
    }
    with contextlib.suppress(ImportError):
        from hessian_eigenthings import HessianOperator, match_names  # type: ignore[import-not-found]

        def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1])

        named = [name for name, _ in model.named_parameters()]
        filtered = [HessianOperator(model, [batch], loss, param_filter=match_names(name)) for name in named]
        calls["hessian-eigenthings, param_filter"] = lambda: [
            op.matvec(v.flatten()) for op, v in zip(filtered, vectors, strict=True)
        ]
    with contextlib.suppress(ImportError):
        from curvlinops import HessianLinearOperator  # type: ignore[import-not-found]

        linear = HessianLinearOperator(
            model,
            nn.CrossEntropyLoss(),
            parameters,
            [batch],
            check_deterministic=False,
            block_sizes=[1] * len(parameters),
        )
        calls["curvlinops, block_sizes"] = lambda: linear @ vectors
    ours = products(blocks, columns)[0]
    # A loss does not depend on some biases: their products are noise, so errors count against the largest.
    largest = max(float(w.norm()) for w in ours)
    error = max(float((a.flatten() - b.flatten()).norm()) for a, b in zip(ours, spectrum_style(), strict=True))
    times = interleaved(calls, rounds)
    unit = statistics.median(times["gradient"])
    ratios = {
        name: sorted(t / g for t, g in zip(taken, times["gradient"], strict=True))
        for name, taken in times.items()
        if name != "gradient"
    }
    medians = {name: statistics.median(found) for name, found in ratios.items()}
    peer = min(value for name, value in medians.items() if not name.startswith("sharpscope"))
    lines = [
        f"## One product with each of {len(blocks)} blocks",
        "",
        f"n = {objective.num_parameters}; a gradient takes {1e3 * unit:.0f} ms; {rounds} rounds. The largest "
        f"difference to hessian-spectrum style is {error / largest:.1e} of the largest product.",
        "",
        "| | gradients, median [min, max] | of the best peer |",
        "|---|---|---|",
        *(
            f"| {name} | {medians[name]:.1f} [{found[0]:.1f}, {found[-1]:.1f}] | {medians[name] / peer:.2f} |"
            for name, found in ratios.items()
        ),
        "",
    ]
    return lines, {"blocks": len(blocks), "gradient_seconds": unit, "ratios": ratios, "difference": error / largest}


def plain_quadrature(multiply: Callable[[Tensor], Tensor], n: int, steps: int, probes: int) -> tuple[Tensor, Tensor]:
    """Lanczos without reorthogonalisation: nodes and weights of all probes."""
    nodes, weights = [], []
    for _ in range(probes):
        q, before = F.normalize(torch.randn(n), dim=0), torch.zeros(n)
        alpha, beta = [], [0.0]
        for _ in range(steps):
            w = multiply(q) - beta[-1] * before
            alpha.append(float(w @ q))
            w = w - alpha[-1] * q
            beta.append(float(w.norm()))
            before, q = q, w / max(beta[-1], 1e-30)
        beside = torch.tensor(beta[1:-1], dtype=torch.float64)
        values, S = torch.linalg.eigh(torch.diag(torch.tensor(alpha, dtype=torch.float64)) + torch.diag(beside, -1))
        nodes.append(values)
        weights.append(S[0].square() / probes)
    return torch.cat(nodes), torch.cat(weights)


def spectra_table(model: GPT, batch: tuple[Tensor, Tensor], names: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Mean Wasserstein-1 error of the blocks, products and seconds, by row of the table."""
    objective = Objective.supervised(model, F.cross_entropy, batch)
    blocks = [partition(objective)[name] for name in names]
    exact = block_spectra(
        Objective.supervised(model, F.cross_entropy, batch, dtype=torch.float64), blocks, dense_limit=10**9
    )
    rows: dict[str, dict[str, Any]] = {}

    def enter(label: str, seconds: float, products: int, found: dict[str, tuple[Tensor, Tensor]]) -> None:
        errors = {}
        for name, atoms in found.items():
            true = exact[name].eigenvalues
            assert true is not None
            share = torch.full_like(true, 1 / len(true))
            errors[name] = w1_distance(*atoms, true, share) / float(true.abs().max())
        mean = sum(errors.values()) / len(errors)
        rows[label] = {"seconds": seconds, "products": products, "w1": mean, "by_block": errors}

    for ends, options in OURS.items():
        for seed in range(SEEDS):
            began = time.process_time()
            spectra = block_spectra(objective, blocks, dense_limit=0, seed=100 * seed, **options)
            spent = time.process_time() - began
            atoms = {name: spectra[name].atoms() for name in names}
            enter(f"sharpscope, {ends}, seed {seed}", spent, spectra.products, atoms)
    parameters, named = list(model.parameters()), [name for name, _ in model.named_parameters()]
    began = time.process_time()
    gradients = retained_gradients(model, batch, parameters)
    theirs = {}
    for name in names:
        i = named.index(name)
        shape = parameters[i].shape
        theirs[name] = plain_quadrature(
            lambda v, i=i, shape=shape: backward_products(model, parameters, gradients, i, v.view(shape)).flatten(),
            shape.numel(),
            STEPS,
            PROBES,
        )
    spent = time.process_time() - began
    enter(f"hessian-spectrum style, {STEPS} x {PROBES}", spent, STEPS * PROBES * len(names), theirs)
    last = list(rows.values())[-1]
    lines = [
        f"## Spectra of {len(names)} blocks",
        "",
        f"Sizes {sorted({s.size for s in exact.values()})}. W1: mean over the blocks of the Wasserstein-1 error by "
        "|λ|max. The eigenvalues at the ends, with their residuals, are in the time of sharpscope only.",
        "",
        "| | W1 | products | CPU seconds | times faster than the last line | its W1 |",
        "|---|---|---|---|---|---|",
        *(
            f"| {label} | {row['w1']:.2e} | {row['products']} | {row['seconds']:.2f} "
            f"| {last['seconds'] / row['seconds']:.1f} | {row['w1'] / last['w1']:.2f} |"
            for label, row in rows.items()
        ),
        "",
    ]
    return lines, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="smaller networks, fewer rounds")
    parser.add_argument("--rounds", type=int, default=None)
    default = Path(__file__).parent / "results" / "blocks"
    parser.add_argument("--out", type=Path, default=default, help="without ending")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    quick = arguments.quick
    vocabulary, length, width, layers = (128, 32, 32, 2) if quick else (256, 64, 128, 6)
    model = trained(GPT(vocabulary, length, width, layers), length, vocabulary, 20 if quick else 150, 1e-3)
    lines, one = products_table(model, text(8, length, vocabulary, seed=0), arguments.rounds or (2 if quick else 4))
    torch.manual_seed(0)
    small = trained(GPT(128, 16, 24, 2), 16, 128, 50 if quick else 200, 3e-3)
    names = ["layers.0.q.weight", "layers.1.v.weight"]
    if not quick:
        names = [f"layers.{i}.{role}.weight" for i in range(2) for role in "qkvo"]
    more, two = spectra_table(small, text(16, 16, 128, seed=0), names)
    lines = ["# Blocks of a Hessian", "", f"torch {torch.__version__}, CPU seconds on one thread.", "", *lines, *more]
    print("\n".join(lines))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".md").write_text("\n".join(lines))
    result = {"quick": quick, "torch": torch.__version__, "products": one, "spectra": two}
    arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
