"""Time of an AdamW step on the CPU: full precision, four bits on every path of sharpscope, and the peers.

    python benchmarks/lowbit_adamw.py             # one to five minutes; peers that are not installed are named as such

One process; in every round each optimizer takes a step, in random order, so that all of them see the same load, and a
ratio is one of two steps of one round. Slow ones take part in few rounds. The table goes to
benchmarks/results/lowbit_adamw.md.
"""

import argparse
import importlib.metadata
import os
import platform
import random
import statistics
import time
import warnings
from pathlib import Path

import torch
from sharpscope.kernels import adamw4_state, adamw4_step

RESULTS = Path(__file__).parent / "results" / "lowbit_adamw.md"
BASELINE = "torch AdamW fused, fp32"
HYPER = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
SIZES = {"1M": (1024, 1024), "10M": (10240, 1024)}
MANY = ("1000 x 100", 1000, 100)
# A step that took more than this takes part in few rounds.
SLOW_SECONDS, SLOW_ROUNDS = 0.15, 3


class Missing(Exception):
    """What a row says instead of numbers."""


def parameters(shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    for p in made:
        p.grad = (torch.randn(p.shape, generator=generator) * 1e-3).to(dtype)
    return made


def of_torch(**kind):
    return lambda shapes: torch.optim.AdamW(parameters(shapes), **HYPER, **kind).step


def of_sharpscope(path, *, map="linear", scale="block128", rounding="nearest", dtype=torch.float32):
    def make(shapes):
        params = parameters(shapes, dtype)
        grads = [p.grad for p in params]
        states = [adamw4_state(p, map=map, scale=scale, id=i) for i, p in enumerate(params)]
        count = 0

        def step():
            nonlocal count
            count += 1
            os.environ["SHARPSCOPE_KERNELS"] = path
            adamw4_step(params, grads, states, **HYPER, step=count, rounding=rounding)

        return step

    return make


def of_torchao(shapes):
    try:
        from torchao.optim import AdamW4bit
    except ImportError:
        raise Missing("not installed") from None
    torch._dynamo.reset()  # compiled code keeps the number of threads
    return AdamW4bit(parameters(shapes), **HYPER).step


def of_bitsandbytes(shapes):
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise Missing("not installed") from None
    return AdamW8bit(parameters(shapes), **HYPER, min_8bit_size=4096).step


CASES = {
    BASELINE: of_torch(fused=True),
    "torch AdamW foreach, fp32": of_torch(foreach=True),
    "sharpscope c, block linear": of_sharpscope("c"),
    "sharpscope c, rank-1 linear": of_sharpscope("c", scale="rank1"),
    "sharpscope c, block square": of_sharpscope("c", map="square"),
    "sharpscope c, rank-1 square": of_sharpscope("c", map="square", scale="rank1"),
    "sharpscope c, block linear, bf16": of_sharpscope("c", dtype=torch.bfloat16),
    "sharpscope c, block linear, stochastic": of_sharpscope("c", rounding="stochastic"),
    "sharpscope c, rank-1 square, stochastic": of_sharpscope("c", map="square", scale="rank1", rounding="stochastic"),
    "sharpscope numba, block linear": of_sharpscope("numba"),
    "sharpscope numba, rank-1 linear": of_sharpscope("numba", scale="rank1"),
    "sharpscope torch, block linear": of_sharpscope("torch"),
    "torchao AdamW4bit": of_torchao,
    "bitsandbytes AdamW8bit": of_bitsandbytes,
}
SMALL = [
    name for name in CASES if name.startswith(("torch AdamW", "sharpscope c, block linear", "sharpscope c, rank-1 l"))
]


def timed(step):
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def measure(shapes, names, rounds):
    """First-step seconds, later steps' seconds and their ratios to the baseline, for each name; or why not."""
    steps, found = {}, {}
    for name in names:
        try:
            steps[name] = CASES[name](shapes)
            first = timed(steps[name])
            slow = timed(steps[name]) > SLOW_SECONDS
            found[name] = {"first": first, "slow": slow, "seconds": [], "ratios": []}
        except (Missing, RuntimeError) as error:
            steps.pop(name, None)
            found[name] = str(error).splitlines()[0]
    order = random.Random(0)
    for i in range(rounds):
        baseline = timed(steps[BASELINE])
        # Each leaves caches and threads in another state for the next, so that none has a fixed neighbour.
        for name, step in order.sample(list(steps.items()), len(steps)):
            row = found[name]
            if row["slow"] and i >= SLOW_ROUNDS:
                continue
            seconds = baseline if name == BASELINE else timed(step)
            row["seconds"].append(seconds)
            row["ratios"].append(seconds / baseline)
    return found


def spread(numbers, digits):
    """Median and the middle half."""
    low, _, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return f"{statistics.median(numbers):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(found, unit, scale, digits):
    lines = [f"| step | {unit} | times {BASELINE} | first step, s |", "|---|---|---|---|"]
    for name, row in found.items():
        if isinstance(row, str):
            lines.append(f"| {name} | {row} | | |")
            continue
        scaled = [seconds * scale for seconds in row["seconds"]]
        lines.append(f"| {name} | {spread(scaled, digits)} | {spread(row['ratios'], 2)} | {row['first']:.2f} |")
    return lines


def section(label, threads, rows):
    """With its heading; printed at once."""
    lines = ["", f"## {label} parameters, {threads} thread(s), load {os.getloadavg()[0]:.1f}", "", *rows]
    print("\n".join(lines), flush=True)
    return lines


def version(name):
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{name} not installed"


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    named = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    wide = any("avx512bw" in line for line in lines if line.startswith("flags"))
    return f"{named[0] if named else platform.processor()}, {os.cpu_count()} cores, AVX-512: {'yes' if wide else 'no'}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="for 1M parameters; a third of it for 10M")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    began = time.perf_counter()
    packages = ("sharpscope", "torch", "numba", "torchao", "bitsandbytes")
    lines = [
        "# A step of AdamW on the CPU",
        "",
        f"{', '.join(version(name) for name in packages)}, Python {platform.python_version()}; {processor()}. "
        "Made by `python benchmarks/lowbit_adamw.py`.",
        "",
        "Medians, and in brackets the middle half, over rounds in which every optimizer takes one step; ratios are of "
        f"two steps of one round. Steps slower than {SLOW_SECONDS} s take part in {SLOW_ROUNDS} rounds.",
    ]
    print("\n".join(lines))
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for label, shape in SIZES.items():
            rounds = arguments.rounds if label == "1M" else max(SLOW_ROUNDS, arguments.rounds // 3)
            found = measure([shape], CASES, rounds)
            lines += section(label, threads, table(found, "ns per parameter", 1e9 / (shape[0] * shape[1]), 2))
        label, count, size = MANY
        found = measure([(size,)] * count, SMALL, arguments.rounds)
        lines += section(label, threads, table(found, "microseconds per step", 1e6, 0))
    lines += ["", f"Made in {time.perf_counter() - began:.0f} s."]
    print(lines[-1])
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
