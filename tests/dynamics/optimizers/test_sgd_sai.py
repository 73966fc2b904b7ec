"""SGD-SaI: the authors' package, torch's SGD, the closed form of G, floors, late parameters, what is kept."""

import math

import pytest
import torch
from sharpscope.dynamics.optimizers.base import MissingGradientError
from sharpscope.dynamics.optimizers.gradient_snr import gsnr
from sharpscope.dynamics.optimizers.sgd_sai import SGDSaI
from sharpscope.dynamics.workloads.models import digits_mlp
from sharpscope.landscape.blocks import partition
from torch import nn

SHAPES = ((6, 5), (4, 3, 3), (9,), (2, 7))


def start(dtype=torch.float64):
    gen = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=gen, dtype=torch.float64).to(dtype)) for s in SHAPES]


def steps(optimizer, params, num=50, seed=1):
    gen = torch.Generator().manual_seed(seed)
    for _ in range(num):
        for p in params:
            p.grad = (0.3 + torch.randn(p.shape, generator=gen, dtype=torch.float64)).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_it_is_the_authors_package(dtype, tolerance):
    package = pytest.importorskip("sgd_sai")
    mine, theirs = start(dtype), start(dtype)
    options = {"lr": 1e-2, "momentum": 0.8, "weight_decay": 0.1}
    steps(SGDSaI(mine, **options), mine, 200 if dtype == torch.float64 else 50)
    steps(package.SGD_sai(theirs, **options), theirs, 200 if dtype == torch.float64 else 50)
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_is_torchs_sgd_with_dampening_and_scaled_learning_rates(momentum):
    mine, theirs = start(), start()
    ours = SGDSaI(mine, lr=0.01, momentum=momentum, weight_decay=0.0)
    steps(ours, mine, 1)
    scales = [row.scale for row in ours.scales()]
    groups = [{"params": [q], "lr": 0.01 * S} for q, S in zip(theirs, scales, strict=True)]
    oracle = torch.optim.SGD(groups, momentum=momentum, dampening=momentum, foreach=False)
    steps(oracle, theirs, 1)
    steps(ours, mine, 49, seed=2)
    steps(oracle, theirs, 49, seed=2)
    assert all(torch.equal(p, q) for p, q in zip(mine, theirs, strict=True))


def test_one_tensor_in_the_papers_scale_is_plain_momentum():
    mine, theirs = start()[:1], start()[:1]
    steps(SGDSaI(mine, lr=0.1, weight_decay=0.0, scale="paper"), mine)
    steps(torch.optim.SGD(theirs, lr=0.1, momentum=0.9, dampening=0.9), theirs)
    assert torch.equal(mine[0], theirs[0])


def test_g_is_its_closed_form():
    """G²/d = 1 + mean²/var for the paper's form without eps."""
    gen = torch.Generator().manual_seed(0)
    gradients = {"a": 2 + torch.randn(30, 4, generator=gen), "b": torch.randn(50, generator=gen)}
    for row in gsnr(gradients, eps=0.0, form="paper"):
        assert row.relative**2 == pytest.approx(1 + row.squared_mean_over_variance, rel=1e-12)
        assert row.value == pytest.approx(row.relative * math.sqrt(row.size), rel=1e-14)
    (a, _), (b, _) = (gsnr(gradients, eps=0.0, form=form) for form in ("paper", "code"))
    assert a.value / b.value == pytest.approx(math.sqrt(120 / 119), rel=1e-12)
    model = digits_mlp()
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=gen)
    rows = gsnr({n: p.grad for n, p in model.named_parameters()}, partition(model, "neuron"))
    assert len(rows) == 210
    assert {row.size for row in rows} == {65, 101}


def test_the_scale_is_measured_once_and_survives_a_resume():
    mine = start()
    optimizer = SGDSaI(mine)
    steps(optimizer, mine, 1)
    scales = optimizer.scales()
    steps(optimizer, mine, 5, seed=7)
    assert optimizer.scales() == scales
    fresh = SGDSaI(start())
    fresh.load_state_dict(optimizer.state_dict())
    assert [row.scale for row in fresh.scales()] == [row.scale for row in scales]
    assert "all within 5%" not in optimizer.describe()


def test_scales_that_are_sizes_are_called_so():
    p = nn.Parameter(torch.zeros(100, 100))
    optimizer = SGDSaI([("w", p)])
    p.grad = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert "w       10000" in optimizer.describe()
    assert "all within 5% of the square root of the size" in optimizer.describe()


def first_step(gradient, **options):
    p = nn.Parameter(torch.zeros(gradient.shape))
    optimizer = SGDSaI([p], lr=1e-2, **options)
    p.grad = gradient
    optimizer.step()
    return p, optimizer


@pytest.mark.parametrize("gradient", [torch.tensor([0.5]), torch.full((10,), 0.3), torch.tensor(0.5)])
def test_gradients_that_do_not_vary_get_the_square_root_of_the_size(gradient):
    with pytest.warns(UserWarning, match="constant up to `floor`"):
        p, optimizer = first_step(gradient)
    d = gradient.numel()
    torch.testing.assert_close(p.detach(), -1e-2 * math.sqrt(d) * gradient)
    assert optimizer.scales()[0].floored
    assert "floored" in optimizer.describe()
    assert float(first_step(gradient, floor=None)[0].detach().abs().max()) > 1e3


def test_a_first_gradient_of_zeros_is_no_first_gradient():
    p, optimizer = first_step(torch.zeros(4, 3))
    assert optimizer.scales() == []
    p.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert optimizer.scales()[0].gsnr == pytest.approx(gsnr({"p": p.grad})[0].value)
    torch.testing.assert_close(p.detach(), -1e-2 * optimizer.scales()[0].scale * p.grad)
    stuck, without = first_step(torch.zeros(4, 3), floor=None)
    stuck.grad = torch.ones(4, 3)
    without.step()
    assert torch.equal(stuck.detach(), torch.zeros(4, 3))


def test_late_parameters_are_scaled_by_their_own_gradient_under_the_kept_maximum():
    mine = start()
    optimizer = SGDSaI(mine[:2], scale="paper")
    steps(optimizer, mine[:2], 1)
    small, large = start()[2], nn.Parameter(torch.zeros(50, 50, dtype=torch.float64))
    optimizer.add_param_group({"params": [small, large]})
    gen = torch.Generator().manual_seed(5)
    small.grad = torch.randn(9, generator=gen, dtype=torch.float64)
    large.grad = torch.randn(50, 50, generator=gen, dtype=torch.float64)
    kept = max(row.gsnr for row in optimizer.scales())
    optimizer.step()
    late = optimizer.scales()[2:]
    assert [row.scale for row in late] == [pytest.approx(late[0].gsnr / kept), 1.0]
    assert max(row.scale for row in optimizer.scales()[:2]) == 1.0
    strict = SGDSaI(start()[:1], late_params="error")
    steps(strict, strict.param_groups[0]["params"], 1)
    strict.add_param_group({"params": [small]})
    with pytest.raises(ValueError, match="parameter 0 of group 1 has its first gradient after"):
        strict.step()


def test_the_preconditioner_is_one_over_the_scale():
    mine = start()
    for scale in ("code", "paper"):
        optimizer = SGDSaI(mine, scale=scale)
        with pytest.raises(ValueError, match="has not made a step"):
            optimizer.preconditioner(mine[0])
        gen = torch.Generator().manual_seed(1)
        for p in mine:
            p.grad = torch.randn(p.shape, generator=gen, dtype=torch.float64)
        before = []
        if scale == "code":
            before = [optimizer.preconditioner(p, p.grad) for p in mine]
        else:  # the largest ratio of all tensors is not known yet
            with pytest.raises(MissingGradientError):
                optimizer.preconditioner(mine[0], mine[0].grad)
        assert not optimizer.state
        optimizer.step()
        for p, row in zip(mine, optimizer.scales(), strict=True):
            torch.testing.assert_close(optimizer.preconditioner(p), torch.full_like(p, 1 / row.scale))
        for p, P in zip(mine, before, strict=False):
            assert torch.equal(P, optimizer.preconditioner(p))


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.0), (0.8, 0.4)])
def test_it_diverges_above_its_threshold_and_not_below(momentum, weight_decay):
    h = torch.tensor([2.0, 5.0, 0.3], dtype=torch.float64)

    def grows(lr):
        p = nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = SGDSaI([p], lr=lr, momentum=momentum, weight_decay=weight_decay)
        sizes = []
        for _ in range(400):
            p.grad = h * p.detach()
            optimizer.step()
            sizes.append(float(p.detach().norm()))
            if sizes[-1] > 1e5:
                return True
        return max(sizes[300:]) > max(sizes[100:200])

    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    S = 1 / float(SGDSaI([p]).preconditioner(p, h.clone())[0])
    low, high = 1e-3, 10.0
    for _ in range(14):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if grows(middle) else (middle, high)
    optimizer = SGDSaI([p], lr=low, momentum=momentum, weight_decay=weight_decay)
    assert optimizer.stability_threshold() == pytest.approx(5.0 * S, rel=1e-2)


def test_what_it_cannot_use_is_said():
    for option, value in (("momentum", 1.0), ("eps", -1.0), ("scale", "max"), ("floor", 1.5), ("late_params", "skip")):
        with pytest.raises(ValueError, match=f"`{option}` is"):
            SGDSaI(start(), **{option: value})
    with pytest.raises(ValueError, match="no parameter of this SGDSaI"):
        SGDSaI(start()).preconditioner(start()[0])
