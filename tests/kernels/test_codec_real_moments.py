"""The codec on Adam's moments after 1.5 million steps of a real training run, subnormal numbers among them.

They come with the package Resemblyzer 0.1.4 (pip install --no-deps Resemblyzer==0.1.4): a speaker encoder, an LSTM of
1.4 million parameters, with the state of its optimizer.
"""

import importlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from sharpscope.kernels import _dispatch, codec_reference

EPS = 1e-8


@pytest.fixture(scope="module")
def moments():
    """[(first, second)] of the 16 tensors."""
    spec = find_spec("resemblyzer")
    if spec is None or spec.origin is None:
        pytest.skip("Resemblyzer is not installed; pip install --no-deps Resemblyzer==0.1.4")
    checkpoint = torch.load(Path(spec.origin).parent / "pretrained.pt", map_location="cpu", weights_only=True)
    states = checkpoint["optimizer_state"]["state"].values()
    return [(state["exp_avg"], state["exp_avg_sq"]) for state in states]


@pytest.fixture(params=["c", "numba", "torch"])
def path(request):
    reason = _dispatch.why_unavailable("codec", request.param)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    return importlib.import_module(f"sharpscope.kernels.codec_{request.param}")


def coded(module, x, map, *, rank1=False, stochastic=False):
    """(what is stored, decoded) of one tensor, as numpy arrays."""
    n, bad, how = x.numel(), torch.zeros(1, dtype=torch.int64), {"map": map, "stochastic": stochastic, "seed": 6}
    codes, out = torch.empty(-(-n // 2), dtype=torch.uint8), torch.empty(n)
    if rank1 and x.ndim == 2:
        scales = [torch.empty(size) for size in x.shape]
        module.quantize_rank1(x, codes, *scales, bad, **how)
        module.dequantize_rank1(codes, *scales, out.view(x.shape), map=map)
    else:
        scales = [torch.empty(-(-n // 128))]
        module.quantize_block(x.reshape(-1), codes, *scales, bad, **how)
        module.dequantize_block(codes, *scales, out, map=map)
    assert int(bad) == 0
    return [codes.numpy(), *(scale.numpy() for scale in scales)], out.numpy()


def test_the_moments_are_as_hard_as_they_are_said_to_be(moments):
    seconds = torch.cat([v.reshape(-1) for _, v in moments])
    assert (len(moments), seconds.numel()) == (16, 1_423_618)
    assert 0 < float(seconds.min()) < 1e-42
    assert float(seconds.max()) > 0.4


@pytest.mark.parametrize("stochastic", [False, True])
def test_every_path_stores_the_same_bytes(moments, path, stochastic):
    for m, v in moments:
        for x, map, rank1 in ((m, "de", False), (v, "linear", False), (v, "square", True)):
            ours, reference = (
                coded(module, x, map, rank1=rank1, stochastic=stochastic) for module in (path, codec_reference)
            )
            assert [part.tobytes() for part in ours[0]] == [part.tobytes() for part in reference[0]]
            assert ours[1].tobytes() == reference[1].tobytes()


def test_errors_keep_their_bounds(moments):
    for m, v in moments:
        for x, map, bound in ((m, "de", 0.1125), (v, "linear", 1 / 16), (v, "square", 1 - (31 / 32) ** 2)):
            flat = x.reshape(-1).double().numpy()
            (_, scales), back = coded(codec_reference, x, map)
            flushed = np.repeat(scales == 0, 128)[: flat.size]
            assert not back[flushed].any()
            assert np.abs(flat[flushed]).max(initial=0) < 2.0**-126
            error, largest = np.abs(back - flat), np.repeat(scales.astype(np.float64), 128)[: flat.size]
            # Four roundings of numbers of at most 1: r, x r, the threshold, the decoded value; which may be subnormal.
            allowed = largest * (bound + 4 * 2.0**-24) + 2.0**-149
            assert (error <= allowed)[~flushed].all()


def update_errors(moments, factor):
    """Relative error of m/(√v + ε) over all entries, for gradients and ε times `factor`, with exact m."""
    m = torch.cat([m.reshape(-1).double() * factor for m, _ in moments]).numpy()
    scaled = [(v.double() * factor**2).float() for _, v in moments]
    eps = EPS * factor
    exact = m / (np.sqrt(np.concatenate([v.reshape(-1).double().numpy() for v in scaled])) + eps)
    errors = {}
    for map in ("linear", "square"):
        for rank1 in (False, True):
            back = np.concatenate([coded(codec_reference, v, map, rank1=rank1)[1].astype(np.float64) for v in scaled])
            update = m / (np.sqrt(back) + eps)
            errors[map, rank1] = np.sqrt(((update - exact) ** 2).sum() / (exact**2).sum())
    return errors


def test_square_is_better_than_linear_and_rank1_than_blocks(moments):
    errors = update_errors(moments, 1.0)
    for rank1 in (False, True):
        assert errors["square", rank1] < 0.8 * errors["linear", rank1]
    for map in ("linear", "square"):
        assert errors[map, True] < errors[map, False]
    assert max(errors.values()) < 0.2
    # The unit of the gradients does not matter, but where more blocks of subnormal numbers become 0.
    assert update_errors(moments, 1e-4) == pytest.approx(errors, rel=1e-6)
