"""The vector work of spectra on a CPU: tridiagonal quadrature, Gram-Schmidt, and its share of block spectra.

    export OPENBLAS_NUM_THREADS=1                   # numpy and scipy: their matrices here are too small to share out
    python benchmarks/spectra_kernels.py            # two to five minutes; writes benchmarks/results/spectra_kernels.md
    python benchmarks/spectra_kernels.py share      # one of its sections again: quadrature, lanczos, share

What is compared runs in turns within each round, so that other load on the machine falls on all of it. With one thread
the clock counts processor time, which other load does not; with two it is the wall clock. A figure is the median over
rounds with the quartiles beside it; ratios are medians of the ratios within a round.
"""

import argparse
import os
import platform
import statistics
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import scipy
import scipy.linalg
import torch
import torch.nn.functional as F
from sharpscope import Hessian, Objective
from sharpscope.kernels import capabilities, tridiagonal_quadrature
from sharpscope.kernels.batched_lanczos import batched_lanczos
from sharpscope.landscape.blocks import partition
from torch import nn

RESULTS = Path(__file__).parent / "results" / "spectra_kernels.md"
SIZES = ((256, 64), (64, 32))


def clock():
    """Seconds: processor time with one thread, which is what it takes on an idle machine; wall clock with more."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def rounds(contestants, count):
    """Seconds by name, one for each round, in turns; the first round is thrown away."""
    seconds = {name: [] for name in contestants}
    for round in range(count + 1):
        for name, run in contestants.items():
            began = clock()
            run()
            if round:
                seconds[name].append(clock() - began)
    return seconds


def shown(values, unit=1e3):
    low, middle, high = (float(np.quantile(values, q)) * unit for q in (0.25, 0.5, 0.75))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def quadrature(count, k):
    """Seconds of ours and of what one would write without it."""
    rng = np.random.default_rng(0)
    alpha, beta = rng.standard_normal((count, k)), np.abs(rng.standard_normal((count, k - 1)))
    a, b = torch.from_numpy(alpha), torch.from_numpy(beta)

    def dense():
        return torch.diag_embed(a) + torch.diag_embed(b, 1) + torch.diag_embed(b, -1)

    def scipy_loop():
        return [scipy.linalg.eigh_tridiagonal(*row) for row in zip(alpha, beta, strict=True)]

    nodes, weights = tridiagonal_quadrature(a, b)
    for theta, w, (values, vectors) in zip(nodes.numpy(), weights.numpy(), scipy_loop(), strict=True):
        assert np.abs(theta - values).max() < 1e-12
        assert np.abs(w - vectors[0] ** 2).max() < 1e-10
    contestants = {
        "sharpscope": lambda: tridiagonal_quadrature(a, b),
        "scipy eigh_tridiagonal, loop": scipy_loop,
        "torch.linalg.eigh": lambda: torch.linalg.eigh(dense()),
        "numpy.linalg.eigh": lambda: np.linalg.eigh(dense().numpy()),
    }
    return rounds(contestants, 9)


def gemv_pairs(matvec, offsets, m, start):
    """Two-pass Gram-Schmidt as two torch products for each pass and recurrence, without accurate sums or breakdown."""
    Q = torch.empty(m, len(start))
    parts = [slice(*pair) for pair in pairwise(offsets)]
    for part in parts:
        Q[0, part] = start[part] / start[part].norm()
    for j in range(m):
        w = matvec(Q[j])
        for part in parts:
            basis, rest = Q[: j + 1, part], w[part]
            for _ in range(2):
                rest = torch.addmv(rest, basis.T, basis @ rest, alpha=-1)
            length = rest.norm()
            if j + 1 < m:
                Q[j + 1, part] = rest / length
    return Q


def gram_schmidt(lengths, m):
    """Seconds of all steps with a product that costs next to nothing, and of reading the basis three times a step."""
    offsets = [0, *np.cumsum(lengths).tolist()]
    n = offsets[-1]
    start, d = torch.randn(n), torch.linspace(-1, 1, n)
    basis = torch.randn(m, n)

    def read():
        """Three reads of the growing basis."""
        for j in range(m):
            for _ in range(3):
                basis[: j + 1].sum()

    return rounds(
        {
            "sharpscope": lambda: batched_lanczos(lambda v: d * v, offsets, m, start=start),
            "torch gemv pairs": lambda: gemv_pairs(lambda v: d * v, offsets, m, start),
            "three reads of the basis": read,
        },
        5,
    )


class Transformer(nn.Module):
    """Three pre-norm layers of width 64 with queries, keys and values apart: 51 parameters, 156 402 entries."""

    def __init__(self, vocabulary=50, width=64, layers=3):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x).transpose(1, 2)


class Layer(nn.Module):
    def __init__(self, width, heads=4):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries, self.keys, self.values, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        b, t, d = x.shape
        normed = self.norm1(x)
        q, k, v = (f(normed).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.queries, self.keys, self.values))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def objective_of_text():
    """16 windows of 32 characters, by rank of frequency."""
    import pydoc_data.topics

    text = "".join(pydoc_data.topics.topics.values()).encode()[: 16 * 33]
    ranks = {c: min(i, 49) for i, c in enumerate(sorted(set(text), key=text.count, reverse=True))}
    tokens = torch.tensor([ranks[c] for c in text]).view(16, 33)
    torch.manual_seed(0)
    return Objective.supervised(Transformer(), nn.CrossEntropyLoss(), (tokens[:, :-1], tokens[:, 1:]))


def block_share(m):
    """(seconds in products, seconds beside them, blocks, entries) of `m` steps on every block of a transformer."""
    objective = objective_of_text()
    hessian, division = Hessian(objective), partition(objective, "parameter")
    ops = [hessian.block(block) for block in division.values()]
    offsets, spent = [0, *np.cumsum([op.shape[0] for op in ops]).tolist()], 0.0

    def product(flat):
        nonlocal spent
        began = clock()
        out = torch.cat([op.matvec(flat[a:b]) for op, (a, b) in zip(ops, pairwise(offsets), strict=True)])
        spent += clock() - began
        return out

    batched_lanczos(product, offsets, 1)  # the engine is chosen and its graph built
    spent, began = 0.0, clock()
    batched_lanczos(product, offsets, m)
    return spent, clock() - began - spent, len(ops), offsets[-1]


def quadrature_table():
    yield "| matrices | threads | method | ms | sharpscope is faster by |"
    yield "|---|---|---|---|---|"
    for count, k in SIZES:
        for threads in each_thread_count():
            seconds = quadrature(count, k)
            for name, values in seconds.items():
                yield f"| ({count}, {k}) | {threads} | {name} | {shown(values)} | {times(seconds, name)} |"


def gram_schmidt_table():
    yield "| recurrences | steps | threads | method | ms | sharpscope is faster by |"
    yield "|---|---|---|---|---|---|"
    ragged = [int(x) for x in np.geomspace(50, 16_384, 51)]
    for what, lengths in (("1 of 500 000", [500_000]), (f"51 of 50 to 16 384 ({sum(ragged)})", ragged)):
        for threads in each_thread_count():
            seconds = gram_schmidt(lengths, 40)
            for name, values in seconds.items():
                yield f"| {what} | 40 | {threads} | {name} | {shown(values)} | {times(seconds, name)} |"


def share_table():
    yield "| blocks | entries | steps | threads | products, s | vector work, s | share |"
    yield "|---|---|---|---|---|---|---|"
    for threads in each_thread_count():
        products, work, blocks, n = block_share(40)
        yield f"| {blocks} | {n} | 40 | {threads} | {products:.2f} | {work:.3f} | {work / products:.2%} |"


SECTIONS = {
    "quadrature": ("Tridiagonal quadrature", quadrature_table),
    "lanczos": ("Vector work of Lanczos, float32", gram_schmidt_table),
    "share": ("Share of the vector work in block spectra", share_table),
}


def each_thread_count():
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        yield threads
    torch.set_num_threads(before)


def times(seconds, name):
    """How many times as fast as `name` ours is."""
    if name == "sharpscope":
        return ""
    return f"{statistics.median(b / a for a, b in zip(seconds['sharpscope'], seconds[name], strict=True)):.2f}x"


def head():
    return (
        "# Spectra kernels on a CPU\n\n"
        f"{processor()}, {os.cpu_count()} cores. Python {platform.python_version()}, torch {torch.__version__}, "
        f"numpy {np.__version__}, scipy {scipy.__version__}; paths: {paths()}.\n"
        "Written by `benchmarks/spectra_kernels.py`: medians (quartiles) of rounds in turns; processor time with one "
        "thread, wall clock with two.\n"
    )


def paths():
    found = [f"{c.function} {c.path}" for c in capabilities() if c.device == "cpu"]
    return ", ".join(name for name in found if name.startswith(("lanczos", "tridiagonal")))


def processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"what to measure again: {', '.join(SECTIONS)}; all by default")
    wanted = parser.parse_args().sections or list(SECTIONS)
    if os.environ.get("OPENBLAS_NUM_THREADS") != "1":
        parser.error("set OPENBLAS_NUM_THREADS=1: threads of numpy that wait would count as its processor time")
    measured = {}
    for section in wanted:
        title, table = SECTIONS[section]
        load = os.getloadavg()[0]
        measured[title] = "\n" + "\n".join(table()) + f"\n\nLoad average {load:.1f} at the start.\n"
    parts = RESULTS.read_text().split("\n## ")[1:] if RESULTS.exists() else []
    known = dict(part.split("\n", 1) for part in parts) | measured
    order = [title for title, _ in SECTIONS.values() if title in known]
    text = head() + "".join(f"\n## {title}\n{known[title]}" for title in order)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text)
    print(text)
