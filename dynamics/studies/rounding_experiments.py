"""Experiments on learned rounding: a residual block, one row against all roundings, two networks, the loss along V."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ...hessian.curvature import Hessian
from ...hessian.eigs import top_eigenvalues
from ...landscape.objective import Objective
from ..data_order import DataOrder
from ..optimizers.block_rounding import layer_weights, sign_round
from ..optimizers.sign_rounding import SignRound
from ..optimizers.weight_grid import WeightGrid
from ..workloads.digits import digits
from ..workloads.models import digits_mlp
from .character_training import CharacterTraining, single_thread

WIDTH, HIDDEN, OUTLIERS = 64, 256, 0.05
GROUP, BATCH, NUM_CALIBRATION, ITERATIONS = 32, 256, 2048, 200
ADAM_LRS = (0.5, 1.0, 2.0, 4.0)  # in units of 1 / iterations


class ResidualBlock(nn.Module):
    """x + W₂ GELU(W₁ x), 64-256-64."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


def block_and_inputs(seed: int) -> tuple[ResidualBlock, Tensor, Tensor]:
    """A block at random weights; calibration [2048, 64] and held-out [1024, 64] inputs.

    Inputs are correlated normal vectors, five per cent of whose channels are ten times as large.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        block = ResidualBlock()
    gen = torch.Generator().manual_seed(seed)
    mix = torch.eye(WIDTH) + torch.randn(WIDTH, WIDTH, generator=gen) / math.sqrt(WIDTH)
    scale = torch.ones(WIDTH)
    scale[torch.randperm(WIDTH, generator=gen)[: round(OUTLIERS * WIDTH)]] = 10.0
    calibration, held_out = (torch.randn(N, WIDTH, generator=gen) @ mix * scale for N in (NUM_CALIBRATION, 1024))
    return block, calibration, held_out


@torch.no_grad()
def error(block: nn.Module, X: Tensor, targets: Tensor) -> float:
    return float(F.mse_loss(block(X), targets))


def rounded_block(bits: int, clip: bool, seed: int) -> dict[str, Any]:
    """One block after 200 iterations: errors relative to rounding to nearest, of the last step and of the best one."""
    block, X, held_out = block_and_inputs(seed)
    full = {name: value.clone() for name, value in block.state_dict().items()}
    with single_thread():
        with torch.no_grad():
            held_out_targets = block(held_out)
        options = {"bits": bits, "group_size": GROUP, "clip": clip, "batch_size": BATCH, "seed": seed}
        sign_round(block, X, iterations=0, **options)
        nearest = error(block, held_out, held_out_targets)
        block.load_state_dict(full)
        last = sign_round(block, X, iterations=ITERATIONS, keep="last", num_judged=NUM_CALIBRATION, **options)
        held_out_error = error(block, held_out, held_out_targets)
        exact = all(
            torch.equal(last.weights[name].pack().unpack().dequantize(), p.detach())
            for name, p in layer_weights(block).items()
        )
        bytes_used = sum(weight.pack().num_bytes for weight in last.weights.values())
        block.load_state_dict(full)
        best = sign_round(block, X, iterations=ITERATIONS, keep="best", num_judged=BATCH, **options)
    return {
        "ratio": last.loss / last.loss_nearest,
        "held_out": held_out_error / nearest,
        "best": best.loss / best.loss_nearest,
        "curve": [loss / best.loss_nearest for loss in best.judged_losses],
        "max_offset": last.max_offset,
        "flips": float(np.mean(list(last.flips.values()))),
        "exact": exact,
        "bits_per_weight": 8 * bytes_used / (2 * WIDTH * HIDDEN),
    }


def update_rules(bits: int, seed: int, iterations: int) -> dict[str, float]:
    """Error of the block, relative to nearest, after some iterations on V by signs and by Adam with each of its rates;
    and the largest difference of V between runs on the loss and on 1024 times the loss."""
    block, X, _ = block_and_inputs(seed)
    with single_thread():
        with torch.no_grad():
            targets = block(X)
        full = {name: p.detach().clone() for name, p in layer_weights(block).items()}
        grid = WeightGrid(bits, GROUP)
        ones = {name: torch.ones(grid.grouped(W).shape[:2]) for name, W in full.items()}

        def quantized(V: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: grid.fake_quantize(W, V[name], ones[name], ones[name]) for name, W in full.items()}

        def loss(V: dict[str, Tensor], chosen: Tensor | slice) -> Tensor:
            return F.mse_loss(functional_call(block, quantized(V), (X[chosen],)), targets[chosen])

        def batches() -> list[Tensor]:
            gen = torch.Generator().manual_seed(seed)
            return [torch.randperm(len(X), generator=gen)[:BATCH] for _ in range(iterations)]

        zero = {name: torch.zeros_like(W) for name, W in full.items()}
        nearest = float(loss(zero, slice(None)).detach())
        found = {}
        for multiple in ADAM_LRS:
            V = {name: torch.zeros_like(W, requires_grad=True) for name, W in full.items()}
            adam = torch.optim.Adam(V.values(), lr=multiple / iterations)
            decay = torch.optim.lr_scheduler.LambdaLR(adam, lambda k: max(0.0, 1 - k / iterations))
            for chosen in batches():
                adam.zero_grad()
                loss(V, chosen).backward()
                adam.step()
                decay.step()
            with torch.no_grad():
                found[f"Adam {multiple:g}"] = float(loss(V, slice(None))) / nearest
        offsets = []
        for factor in (1.0, 1024.0):
            block.load_state_dict({**block.state_dict(), **full})
            params = list(layer_weights(block).values())
            signed = SignRound(params, bits=bits, group_size=GROUP, iterations=iterations, clip=False)
            signed.round_to_nearest()
            for chosen in batches():
                signed.zero_grad()
                (factor * F.mse_loss(block(X[chosen]), targets[chosen])).backward()
                signed.step()
            if factor == 1.0:
                found["sign"] = error(block, X, targets) / nearest
            offsets.append([signed.state[p]["offset"] for p in params])
        found["moved"] = max(float((a - b).abs().max()) for a, b in zip(*offsets, strict=True))
    return found


def best_of_all(X: Tensor, W: Tensor, bits: int) -> float:
    """Least mean squared error of X (W~ − W)ᵀ over all 2^n ways to round a row [1, n] up or down on the grid of
    rounding to nearest."""
    grid = WeightGrid(bits, -1)
    ones = torch.ones(1, 1, dtype=W.dtype)
    s, z = (float(x) for x in grid.scales(W, ones, ones))
    up = torch.tensor(list(itertools.product((0.0, 1.0), repeat=W.shape[1])), dtype=W.dtype)
    e = s * ((torch.floor(W / s) + up + z).clamp(0, grid.largest_code) - z) - W
    return float(((e @ (X.T @ X)) * e).sum(1).min()) / len(X)


def row_roundings(bits: int, orthogonal: bool, seed: int) -> dict[str, float]:
    """A row of 12 weights: error over the least possible one, by nearest, by SignRound's best and by its last step;
    and how many codes differ from nearest."""
    n = 12
    gen = torch.Generator().manual_seed(seed)
    mix = torch.eye(n, dtype=torch.float64) + torch.randn(n, n, generator=gen, dtype=torch.float64) / math.sqrt(n)
    X = torch.randn(256, n, generator=gen, dtype=torch.float64) @ mix
    if orthogonal:
        X = torch.linalg.qr(X).Q * 16
    W = torch.randn(1, n, generator=gen, dtype=torch.float64)
    least = best_of_all(X, W, bits)
    found = {}
    for keep in ("best", "last"):
        layer = nn.Linear(n, 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(W)
        result = sign_round(
            layer, X, bits=bits, group_size=-1, clip=False, batch_size=256, keep=keep, iterations=ITERATIONS, seed=seed
        )
        found[keep] = result.loss / least
        found["nearest"] = result.loss_nearest / least
        found[f"flips {keep}"] = round(12 * result.flips["weight"])
    return found


def rounded_digits(seed: int, epochs: int) -> dict[str, float]:
    """A trained digits network with all three layers at two bits, layer by layer on 512 training images.

    Returns:
        Held-out accuracy in points at full precision, rounded to nearest and with SignRound; errors of the logits on
        calibration and held-out images for both.
    """
    data = digits()
    (x, y), (x_out, y_out) = data.train, data.held_out
    with single_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = digits_mlp()
        adam = torch.optim.Adam(model.parameters(), lr=2e-3)
        order = DataOrder(len(x), 64, seed)
        for step in range(epochs * len(x) // 64):
            chosen = order.at(step)
            adam.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            adam.step()
        model.requires_grad_(False)
        calibration = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:512]]
        wanted, wanted_out = model(calibration), model(x_out)
        full = {name: value.clone() for name, value in model.state_dict().items()}

        def accuracy() -> float:
            return 100 * float((model(x_out).argmax(1) == y_out).double().mean())

        found = {"full": accuracy()}
        for name, iterations in (("nearest", 0), ("signround", ITERATIONS)):
            model.load_state_dict(full)
            reference, inputs = calibration, calibration
            for layer in (model[:2], model[2:4], model[4:]):
                reference = layer(reference)
                sign_round(
                    layer,
                    inputs,
                    targets=reference,
                    bits=2,
                    group_size=GROUP,
                    iterations=iterations,
                    batch_size=64,
                    seed=seed,
                )
                inputs = layer(inputs)
            found[name] = accuracy()
            found[f"{name} error"] = error(model, calibration, wanted)
            found[f"{name} held-out error"] = error(model, x_out, wanted_out)
    return found


def rounded_text(seed: int, steps: int) -> dict[str, float]:
    """A trained character transformer with its two layers at two bits, layer by layer on 128 training windows;
    embedding and norms stay.

    Returns:
        Held-out loss in nats per character at full precision, rounded to nearest and with SignRound; errors of the
        logits on calibration and held-out windows for both.
    """
    run = CharacterTraining(seed)
    model, train = run.model, run.windows.data.train
    run.train(torch.optim.AdamW(model.parameters(), lr=3e-3), steps)
    model.requires_grad_(False)
    gen = torch.Generator().manual_seed(seed)
    calibration = train.inputs[torch.randperm(len(train.inputs), generator=gen)[:128]]
    held_out = run.windows.data.held_out.inputs
    with single_thread():
        wanted, wanted_out = model(calibration), model(held_out)
        full = {name: value.clone() for name, value in model.state_dict().items()}
        found = {"full": run.held_out_loss()}
        for name, iterations in (("nearest", 0), ("signround", ITERATIONS)):
            model.load_state_dict(full)
            reference = model.embedding(calibration) + model.positions(torch.arange(calibration.shape[1]))
            inputs = reference
            for layer in model.layers:
                reference = layer(reference)
                sign_round(layer, inputs, targets=reference, bits=2, group_size=GROUP, iterations=iterations, seed=seed)
                inputs = layer(inputs)
            found[name] = run.held_out_loss()
            found[f"{name} error"] = error(model, calibration, wanted)
            found[f"{name} held-out error"] = error(model, held_out, wanted_out)
    return found


def rounding_landscape(bits: int, seed: int, num_points: int) -> dict[str, Any]:
    """Loss of the block along a V*, V* being what 200 iterations found; and curvature at the ends.

    Returns:
        "place" and "loss", relative to nearest; for nearest and learned the sharpness of the block loss by the weights,
        and eᵀHe/2 over the loss, with H at the full-precision weights (where the loss is zero) and e the change.
    """
    block, X, _ = block_and_inputs(seed)
    X = X[:512]
    with single_thread():
        with torch.no_grad():
            targets = block(X)
        named = layer_weights(block)
        full = {name: p.detach().clone() for name, p in named.items()}
        objective = Objective.supervised(block, nn.MSELoss(), (X, targets), params=list(named))
        H = Hessian(objective)
        products: dict[str, Tensor] = {}

        def change() -> Tensor:
            return torch.cat([(p.detach() - full[name]).flatten() for name, p in named.items()])

        def set_weights(values: dict[str, Tensor]) -> None:
            with torch.no_grad():
                for name, p in named.items():
                    p.copy_(values[name])

        optimizer = SignRound(list(named.values()), bits=bits, group_size=GROUP, clip=False, iterations=ITERATIONS)
        optimizer.round_to_nearest()
        ends = {"nearest": {name: p.detach().clone() for name, p in named.items()}}
        changes = {"nearest": change()}
        gen = torch.Generator().manual_seed(seed)
        for _ in range(ITERATIONS):
            chosen = torch.randperm(len(X), generator=gen)[:BATCH]
            optimizer.zero_grad()
            F.mse_loss(block(X[chosen]), targets[chosen]).backward()
            optimizer.step()
        optimizer.zero_grad()
        ends["learned"] = {name: p.detach().clone() for name, p in named.items()}
        changes["learned"] = change()
        found: dict[str, Any] = {}
        set_weights(full)
        for name, e in changes.items():
            products[name] = H @ e
        for name, weights in ends.items():
            set_weights(weights)
            loss = error(block, X, targets)
            found[f"{name} loss"] = loss
            found[f"{name} quadratic"] = 0.5 * float(changes[name] @ products[name]) / loss
            found[f"{name} sharpness"] = float(top_eigenvalues(H, tol=1e-2).values[0])
            found[f"{name} length"] = float(changes[name].norm())
        places = torch.linspace(-0.5, 1.5, num_points).tolist()
        offsets = {p: optimizer.state[p]["offset"].clone() for p in named.values()}
        losses = []
        for place in places:
            optimizer.restore({p: {"offset": place * V} for p, V in offsets.items()})
            losses.append(error(block, X, targets) / found["nearest loss"])
    return {**found, "place": places, "loss": losses}
