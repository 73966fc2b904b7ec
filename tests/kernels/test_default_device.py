"""Kernels work on the device of their arguments, whatever the default device is, from the first call in a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sharpscope import kernels
from sharpscope.kernels import _dispatch


def results(x, v, A, numbers):
    """What every public function makes of CPU tensors x [6, 50], v [6, 50] ≥ 0 and A [20, 20]; `numbers` [9]."""
    found = []
    for rounding in ("nearest", "stochastic"):
        packed = [kernels.quantize_m(x, rounding=rounding, seed=1)]
        packed += [
            kernels.quantize_v(v, map=map, scale=scale, rounding=rounding, seed=1)
            for map in ("linear", "square")
            for scale in ("rank1", "block128")
        ]
        for part in packed:
            found += [part.codes, *part.scales, part.bad, kernels.dequantize(part)]
        for scale in ("rank1", "block128"):
            params = [x.clone(), v.clone()]
            states = [kernels.adamw4_state(p, scale=scale, id=i) for i, p in enumerate(params)]
            for given in (None, numbers):
                grads = [v.clone(), x.clone()]
                kernels.adamw4_step(params, grads, states, lr=0.1, step=1, rounding=rounding, seed=2, numbers=given)
            found += params
            for state in states:
                found += [state.m.codes, *state.m.scales, state.v.codes, *state.v.scales, state.skipped]
    whole = kernels.quantize_m(torch.cat([x.reshape(-1), x.reshape(-1)[:84]]))
    theirs = kernels.to_torchao(whole)
    found += [theirs[0], theirs[1], kernels.from_torchao(*theirs[:2], whole.shape, map="de").codes]
    found.append(kernels.adamw4_numbers(lr=0.1, step=3))
    for start in (None, x.reshape(-1)[:20].contiguous()):
        runs = kernels.batched_lanczos(lambda q: A @ q, [0, 20], 5, start=start)
        found += [runs.offsets, runs.alpha, runs.beta, runs.residual_norm, runs.steps, runs.basis]
    found += [*kernels.tridiagonal_quadrature(x[:, :5], v[:, :4])]
    found += [*kernels.tridiagonal_quadrature(x[:, :5], v[:, :4], (v[:, 0] > 0).long() + 2)]
    found += [kernels.dot(x[0], x[1]), kernels.norm(x[0]), kernels.project(x, v[0]), kernels.combine(x, v[:, 0])]
    assert len(kernels.capabilities()) == 2 * len(_dispatch.FUNCTIONS)
    return found


def compare(how):
    """Both ways in one process: what is made at first use is made while the default device is another."""
    generator = torch.Generator().manual_seed(0)
    x, A = torch.randn(6, 50, generator=generator), torch.randn(20, 20, generator=generator)
    given = (x, x.square(), A + A.T, kernels.adamw4_numbers(lr=0.1, step=2))
    if how == "context":
        with torch.device("meta"):
            found = results(*given)
    else:
        torch.set_default_device("meta")
        found = results(*given)
        torch.set_default_device(None)
    expected = results(*given)
    assert [value.device.type for value in found] == ["cpu"] * len(expected)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize(("path", "how"), [("c", "context"), ("numba", "setting"), ("torch", "context")])
def test_the_default_device_is_not_theirs(path, how):
    if reason := _dispatch.why_unavailable("codec", path):
        pytest.skip(f"{path}: {reason}")
    environment = {**os.environ, _dispatch.VARIABLE: path}
    command = [sys.executable, "-P", str(Path(__file__)), how]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]


if __name__ == "__main__":
    compare(sys.argv[1])
