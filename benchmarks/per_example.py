"""Second moments and norms of per-example gradients: time in gradients and extra memory, against vmap and BackPACK.

    python benchmarks/per_example.py [--quick] [--only PART] [--out results/per_example]

Every method runs once per round, so that all see the same load; a ratio is to the gradient of the same round, in CPU
seconds of one thread. Extra memory is the peak of the resident set over its level before (Linux). BackPACK, where it is
installed, needs one run for the second moments and another for the norms, and takes no model but a Sequential. Two
minutes, with --quick one; writes OUT.md and OUT.json unless --only is given.
"""

import os

# One thread: the unit is CPU seconds.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import copy
import ctypes
import gc
import itertools
import json
import platform
import statistics
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from sharpscope import Objective, per_example_statistics
from torch import nn
from torch.func import functional_call, grad, vmap


class Residual(nn.Module):
    def __init__(self, i, o, stride):
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.c2, self.n2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.short = nn.Conv2d(i, o, 1, stride, bias=False) if stride > 1 or i != o else nn.Identity()

    def forward(self, x):
        return F.relu(self.n2(self.c2(F.relu(self.n1(self.c1(x))))) + self.short(x))


class Layer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.n1, self.n2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = (p.view(b, t, self.heads, -1).transpose(1, 2) for p in self.qkv(self.n1(x)).chunk(3, -1))
        a = (q @ k.mT / (d // self.heads) ** 0.5).masked_fill(~torch.ones(t, t, dtype=torch.bool).tril(), -torch.inf)
        x = x + self.out((a.softmax(-1) @ v).transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.n2(x))))


class Transformer(nn.Module):
    """Tied embedding, learned positions; predictions flattened to [b · length, vocabulary]."""

    def __init__(self, vocabulary=256, length=64, width=128, depth=6, heads=4):
        super().__init__()
        self.table, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.layers, self.norm = nn.ModuleList(Layer(width, heads) for _ in range(depth)), nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, 0, 0.02)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        x = self.table(tokens) + self.places(torch.arange(tokens.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)).flatten(0, 1)


def mlp():
    sizes = (784, 256, 256, 10)
    layers = [m for i, o in itertools.pairwise(sizes) for m in (nn.Linear(i, o), nn.ReLU())][:-1]
    return nn.Sequential(*layers), torch.randn(512, 784), torch.randint(0, 10, (512,))


def wide_mlp():
    layers = [nn.Linear(100, 1024), nn.GELU(), nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 20)]
    return nn.Sequential(*layers), torch.randn(256, 100), torch.randint(0, 20, (256,))


def resnet():
    layers = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    for i, o, stride in ((16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)):
        layers.append(Residual(i, o, stride))
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return model, torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))


def cnn():
    model = nn.Sequential(
        *(nn.Conv2d(3, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 64, 128), nn.ReLU(), nn.Linear(128, 10)),
    )
    return model, torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))


def transformer():
    tokens = torch.randint(0, 256, (16, 65))
    return Transformer(), tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


WORKLOADS = {
    "a: MLP 269k, 512 examples": mlp,
    "MLP 1.2M wide, 256 examples": wide_mlp,
    "b: ResNet 175k, 64 images": resnet,
    "CNN 0.55M, 64 images": cnn,
    "c: transformer 1.2M, tied, 16 sequences": transformer,
}


def methods(model, x, y):
    """Method -> a function that gives (Σ g² / N, ‖g_i‖), of which one may be None."""
    parameters, size = list(model.parameters()), len(x)
    plain = {name: p.detach() for name, p in model.named_parameters()}
    loss = nn.CrossEntropyLoss()
    objective = Objective.supervised(model, loss, (x, y), split=lambda batch: (batch[0], batch[1].flatten()))
    one = vmap(grad(lambda p, a, t: loss(functional_call(model, p, (a[None],)), t.reshape(-1))), (None, 0, 0))

    def gradient():
        torch.autograd.grad(loss(model(x), y.flatten()), parameters)
        return None, None

    def ours():
        found = per_example_statistics(objective, collect="sums")
        assert found.method == "factors"
        return found.second_moment, found.norms

    def vectorised(step):
        second, squares = [torch.zeros_like(p) for p in parameters], []
        for i in range(0, size, step):
            rows = list(one(plain, x[i : i + step], y[i : i + step]).values())
            for total, g in zip(second, rows, strict=True):
                total.add_(g.square().sum(0))
            squares.append(sum(g.flatten(1).square().sum(1) for g in rows))
        return torch.cat([s.reshape(-1) for s in second]) / size, torch.cat(squares).sqrt()

    found = {
        "gradient": gradient,
        "sharpscope": ours,
        "vmap(grad), all": lambda: vectorised(size),
        "vmap(grad), 16": lambda: vectorised(min(16, size)),
        "vmap(grad), 4": lambda: vectorised(4),
    }
    return found | backpack_methods(model, x, y, size)


def backpack_methods(model, x, y, size):
    try:
        from backpack import backpack, extend
        from backpack.extensions import BatchL2Grad, SumGradSquared
    except ImportError:
        return {}
    copied, loss = extend(copy.deepcopy(model)), extend(nn.CrossEntropyLoss())

    def run(extension):
        copied.zero_grad()
        with backpack(extension()):
            loss(copied(x), y.flatten()).backward()
        if extension is SumGradSquared:
            return torch.cat([p.sum_grad_squared.reshape(-1) for p in copied.parameters()]) * size, None
        return None, sum(p.batch_l2 for p in copied.parameters()).sqrt() * size

    return {
        "BackPACK SumGradSquared": lambda: run(SumGradSquared),
        "BackPACK BatchL2Grad": lambda: run(BatchL2Grad),
    }


def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def extra_megabytes(function):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")
    before = status("VmRSS")
    kept = function()
    peak = status("VmHWM")
    del kept
    return peak - before


def difference(found, expected):
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a is not None]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs) if pairs else 0.0


def measure(name, build, rounds, seconds):
    """Rows of a workload: a dictionary for each method."""
    torch.manual_seed(0)
    model, x, y = build()
    functions = methods(model.eval(), x, y)
    expected = functions["vmap(grad), 4"]()
    errors, memory, rows = {}, {}, []
    for key, function in list(functions.items()):
        try:
            errors[key] = difference(function(), expected)
            if errors[key] > 1e-4:
                raise ValueError(f"wrong: {errors[key]:.0e}")
            memory[key] = extra_megabytes(function)
        except Exception as error:
            rows.append({"workload": name, "method": key, "failed": f"{type(error).__name__}: {str(error)[:60]}"})
            del functions[key]
    times = {key: [] for key in functions}
    ends = time.monotonic() + seconds
    skipped = set()
    for number in range(rounds):
        for key, function in functions.items():
            if key in skipped:
                continue
            start = time.process_time()
            function()
            times[key].append(time.process_time() - start)
            if number == 2 and times[key][-1] > seconds / 40:
                skipped.add(key)
        if number >= 2 and time.monotonic() > ends:
            break
    for key, taken in times.items():
        ratios = [a / b for a, b in zip(taken[1:], times["gradient"][1:], strict=False)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        rows.append(
            {
                "workload": name,
                "method": key,
                "gradients": middle,
                "quartiles": [low, high],
                "rounds": len(ratios),
                "milliseconds": 1e3 * statistics.median(taken[1:]),
                "extra_megabytes": memory[key],
                "error": errors[key],
            }
        )
    return rows


def line(row):
    start = f"| {row['workload']} | {row['method']} |"
    if "failed" in row:
        return f"{start} {row['failed']} | | |"
    low, high = row["quartiles"]
    ratio = f"{row['gradients']:.2f} [{low:.2f}, {high:.2f}]"
    return f"{start} {ratio} | {row['extra_megabytes']:.0f} | {row['error']:.0e} |"


HEADER = "| workload | method | gradients, median [quartiles] | extra MB | error |\n|---|---|---|---|---|"


def report(result):
    return "\n".join(
        [
            "# Per-example gradients on a CPU",
            "",
            f"{result['processor']}, one thread. Python {result['python']}, torch {result['torch']}.",
            "Written by `benchmarks/per_example.py`: second moments and norms of all per-example gradients, in",
            "gradients of the same round (processor time); the peak of the resident memory over its level before; the",
            "largest relative error of second moments and norms against vmap(grad).",
            "",
            HEADER,
            *(line(row) for row in result["rows"]),
            "",
        ]
    )


def processor():
    with open("/proc/cpuinfo") as lines:
        return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--only", default="", help="part of a workload's name")
    default = Path(__file__).parent / "results" / "per_example"
    parser.add_argument("--out", type=Path, default=default, help="reports without their endings")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(HEADER)
    rows = []
    for name, build in WORKLOADS.items():
        if arguments.only in name:
            found = measure(name, build, *((6, 3) if arguments.quick else (30, 15)))
            print(*map(line, found), sep="\n", flush=True)
            rows += found
    if arguments.only:
        return
    result = {"processor": processor(), "python": platform.python_version(), "torch": torch.__version__, "rows": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(report(result))


if __name__ == "__main__":
    main()
