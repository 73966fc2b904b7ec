"""Per-example statistics against a loop over examples with autograd, for every operation that a rule knows."""

import pytest
import torch
import torch.nn.functional as F
from sharpscope import Fisher, Objective, per_example_statistics
from sharpscope.landscape import per_example_parts
from sharpscope.landscape.per_example_singles import Singles
from sharpscope.landscape.per_example_sums import ChunkSums
from torch import nn

B = 6


def reference(model, loss, examples, weights, names=None):
    """Σ w g, Σ w g², ‖g_i‖ and g_i by one backward pass per example."""
    tensors = [p for n, p in model.named_parameters() if names is None or n in names]
    rows = []
    for example in examples:
        found = torch.autograd.grad(loss(model, example), tensors, allow_unused=True)
        rows.append(
            torch.cat(
                [(torch.zeros_like(t) if g is None else g).reshape(-1) for g, t in zip(found, tensors, strict=True)]
            )
        )
    G, w = torch.stack(rows), torch.as_tensor(weights, dtype=torch.float64)
    return w @ G, w @ G.square(), G.norm(dim=1), G


def assert_same(found, expected, weights):
    mean, second, norms, G = expected
    for a, b in ((found.mean, mean), (found.second_moment, second), (found.norms, norms)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * float(b.abs().max()))
    if found.kept is not None:
        torch.testing.assert_close(found.gradients, G, rtol=1e-10, atol=1e-10 * float(G.abs().max()))
    identity = float(torch.as_tensor(weights, dtype=torch.float64) @ found.norms.square())
    assert float(found.second_moment.sum()) == pytest.approx(identity, rel=1e-10)


class Lambda(nn.Module):
    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def parameter(*shape):
    return nn.Parameter(torch.randn(shape))


def vectors():
    return torch.randn(B, 5)


def tokens(length=4):
    return torch.randint(0, 7, (B, length))


def mlp():
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)), vectors()


def sequence_linear():
    return Lambda(lambda m, x: m.b(m.a(x).tanh()).mean(1), a=nn.Linear(5, 4), b=nn.Linear(4, 3)), torch.randn(B, 6, 5)


def conv(axes, kernel=3, **options):
    kinds = {1: (nn.Conv1d, (9,)), 2: (nn.Conv2d, (7, 8)), 3: (nn.Conv3d, (5, 6, 5))}
    kind, shape = kinds[axes]
    layer = kind(4, 6, kernel, **options)
    return Lambda(lambda m, x: m.head(m.layer(x).tanh().flatten(2).mean(2)), layer=layer, head=nn.Linear(6, 3)), (
        torch.randn(B, 4, *shape)
    )


def frames():
    model = Lambda(
        lambda m, x: m.head(m.norm(m.conv(x.flatten(0, 1))).tanh().mean((2, 3))).view(len(x), 3, 3).mean(1),
        conv=nn.Conv2d(2, 4, 3),
        norm=nn.BatchNorm2d(4),
        head=nn.Linear(4, 3),
    )
    model.norm.running_mean.normal_()
    return model, torch.randn(B, 3, 2, 6, 6)


def embedding():
    model = Lambda(lambda m, x: m.head(m.table(x).tanh().mean(1)), table=nn.Embedding(7, 4, 2), head=nn.Linear(4, 3))
    return model, tokens()


def tied():
    model = Lambda(
        lambda m, x: m.head((m.table(x) + m.places(torch.arange(4))).tanh()).mean(1)[:, :3],
        table=nn.Embedding(7, 5),
        places=nn.Embedding(4, 5),
        head=nn.Linear(5, 7, bias=False),
    )
    model.head.weight = model.table.weight
    return model, tokens()


def as_many_places_as_examples():
    model, _ = tied()
    model.function = lambda m, x: m.head((m.table(x) + m.places(torch.arange(B))).tanh()).mean(1)[:, :3]
    model.places = nn.Embedding(B, 5)
    return model, tokens(B)


def places_of_one_row():
    model, x = tied()
    model.function = lambda m, x: m.head((m.table(x) + m.places(torch.arange(4).unsqueeze(0))).tanh()).mean(1)[:, :3]
    return model, x


def called_twice():
    return Lambda(lambda m, x: m.b(m.a(m.a(x).tanh()).tanh()), a=nn.Linear(5, 5), b=nn.Linear(5, 3)), vectors()


def functional_use():
    return Lambda(lambda m, x: F.linear(m.a(x).tanh(), m.a.weight[:3] * 1.0), a=nn.Linear(5, 5)), vectors()


def functional_linear():
    return Lambda(lambda m, x: F.linear(m.a(x).tanh(), m.a.weight, m.a.bias)[:, :3], a=nn.Linear(5, 5)), vectors()


def norms():
    model = Lambda(
        lambda m, x: m.head(m.batch(m.group(m.layer(x).transpose(1, 2)).tanh()).mean(2)),
        layer=nn.LayerNorm(4),
        group=nn.GroupNorm(2, 4),
        batch=nn.BatchNorm1d(4),
        head=nn.Linear(4, 3),
    )
    for p in model.parameters():
        nn.init.normal_(p)
    model.batch.running_mean.normal_()
    model.batch.running_var.uniform_(0.5, 2)
    return model, torch.randn(B, 5, 4)


def rms_norms():
    model = Lambda(
        lambda m, x: m.head(m.rms(x) + x * x.square().mean(-1, keepdim=True).rsqrt() * m.scale).mean(1),
        rms=nn.RMSNorm(4),
        scale=parameter(4),
        head=nn.Linear(4, 3),
    )
    nn.init.normal_(model.rms.weight)
    return model, torch.randn(B, 5, 4)


def own_parameters():
    """A matrix on the right, a scale, a class token, places, a scalar."""
    model = Lambda(
        lambda m, x: (
            m.gain
            * torch.addmm(
                m.shift, torch.cat([m.token.expand(len(x), -1, -1), x @ m.matrix], 1).add(m.places).mean(1), m.last
            )
        ),
        gain=parameter(),
        shift=parameter(3),
        token=parameter(1, 1, 4),
        matrix=parameter(5, 4),
        places=parameter(1, 7, 4),
        last=parameter(4, 3),
    )
    return model, torch.randn(B, 6, 5)


def attention():
    model = Lambda(
        lambda m, x: m.head(m.mha(x, x, x, need_weights=False)[0].mean(1)),
        mha=nn.MultiheadAttention(4, 2, batch_first=True),
        head=nn.Linear(4, 3),
    )
    return model, torch.randn(B, 5, 4)


def time_first():
    """As many steps as examples, time in front: rows that look like examples but are not."""
    return Lambda(lambda m, x: m.b(m.a(x.transpose(0, 1)).tanh()).mean(0), a=nn.Linear(5, 4), b=nn.Linear(4, 3)), (
        torch.randn(B, B, 5)
    )


def recurrent():
    return Lambda(
        lambda m, x: m.head(m.cell(x)[0][:, -1]), cell=nn.GRU(5, 4, batch_first=True), head=nn.Linear(4, 3)
    ), (torch.randn(B, 4, 5))


def dense_with_own_scale():
    model = nn.Sequential(nn.Linear(5, 30), Lambda(lambda m, x: x * m.s.exp(), s=parameter(30)), nn.Linear(30, 3))
    return model, vectors()


def unused():
    model, x = mlp()
    model.extra = nn.Linear(2, 2)
    return Lambda(lambda m, x: m.inner[2](m.inner[1](m.inner[0](x))), inner=model), x


FACTORS = {
    "mlp": mlp,
    "sequence_linear": sequence_linear,
    "conv1d": lambda: conv(1, stride=2, padding=1),
    "conv2d": lambda: conv(2, stride=(1, 2), padding=(2, 1), dilation=(2, 1), groups=2),
    "conv2d_same": lambda: conv(2, padding="same", dilation=2, bias=False),
    "conv1d_same_even": lambda: conv(1, 4, padding="same"),
    "conv2d_reflect": lambda: conv(2, padding=1, padding_mode="reflect"),
    "conv2d_valid": lambda: conv(2),
    "conv3d": lambda: conv(3, stride=2, padding=1, groups=2),
    "frames": frames,
    "embedding": embedding,
    "tied": tied,
    "as_many_places_as_examples": as_many_places_as_examples,
    "places_of_one_row": places_of_one_row,
    "called_twice": called_twice,
    "functional_linear": functional_linear,
    "norms": norms,
    "rms_norms": rms_norms,
    "own_parameters": own_parameters,
    "unused": unused,
}
OTHERS = {
    "functional_use": (functional_use, "vmap"),
    "attention": (attention, "vmap"),
    "time_first": (time_first, "vmap"),
    "recurrent": (recurrent, None),
    "dense_with_own_scale": (dense_with_own_scale, "factors+vmap"),
}


def make(build):
    torch.manual_seed(0)
    model, x = build()
    return model.double().eval(), x.double() if x.is_floating_point() else x


def check(build, method, *, expected_method=None, **options):
    model, x = make(build)
    y = torch.randint(0, 3, (B,))
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), (x, y))
    found = per_example_statistics(objective, method=method, **options)
    one = lambda m, i: F.cross_entropy(m(x), y, reduction="none")[i]
    expected = reference(model, one, range(B), [1 / B] * B)
    assert_same(found, expected, [1 / B] * B)
    torch.testing.assert_close(found.mean, objective.gradient(), rtol=1e-10, atol=1e-12)
    assert expected_method is None or found.method == expected_method
    return found


@pytest.mark.parametrize("name", FACTORS)
def test_every_operation_with_a_rule(name):
    check(FACTORS[name], "auto", expected_method="factors", collect="sums")
    check(FACTORS[name], "factors", chunk_size=4)
    check(FACTORS[name], "factors", chunk_size=1, collect="sums")


@pytest.mark.parametrize("name", OTHERS)
def test_everything_else_goes_another_way(name):
    build, method = OTHERS[name]
    check(build, "auto", expected_method=method, collect="sums")
    check(build, "auto", chunk_size=4)


@pytest.mark.parametrize("method", ["vmap", "loop"])
@pytest.mark.parametrize("name", ["mlp", "tied", "norms"])
def test_the_other_methods_agree(name, method):
    check(FACTORS[name], method, expected_method=method)
    check(FACTORS[name], method, chunk_size=4, collect="sums")


def test_what_factors_do_not_cover_is_refused_by_name():
    with pytest.raises(ValueError, match="method='factors' does not cover.*mha"):
        check(attention, "factors")
    with pytest.raises(ValueError, match="differs from what a backward pass of its own"):
        check(time_first, "factors")


@pytest.mark.parametrize("axes", [False, True])
def test_one_example_is_verified_once_and_again_when_axes_change(axes, monkeypatch):
    """As many steps as examples: rows of time and rows of examples have the same shapes."""

    def forward(m, x):
        if axes:
            return m.b(m.a(x.transpose(m.front, 1)).tanh()).mean(m.front)
        return m.b(m.a(x if m.front else x.transpose(0, 1)).tanh()).mean(m.front)

    model = Lambda(forward, a=nn.Linear(5, 4), b=nn.Linear(4, 3)).double()
    model.front = 1
    x, y = torch.randn(B, B, 5).double(), torch.randint(0, 3, (B,))
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), (x, y), check=False)
    verified, gradient = [], Singles.gradient
    monkeypatch.setattr(Singles, "gradient", lambda *a: verified.append(1) or gradient(*a))
    for _ in range(3):
        assert per_example_statistics(objective).method == "factors"
    assert len(verified) == 1
    model.front = 0
    found = per_example_statistics(objective)
    assert found.method == "vmap"
    one = lambda m, i: F.cross_entropy(m(x), y, reduction="none")[i]
    assert_same(found, reference(model, one, range(B), [1 / B] * B), [1 / B] * B)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("residual", [0.0, 3.0])
def test_near_an_exact_fit_rounding_is_told_from_mixed_rows(residual, kind, monkeypatch):
    """Residuals of `residual` roundings: no two ways of computing give the same gradient, and none is recorded."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 5)).to(kind)
    x, noise = torch.randn(64, 30, dtype=kind), torch.randn(64, 5, dtype=kind)
    fitted = model(x).detach()
    y = fitted + residual * torch.finfo(kind).eps * noise
    objective = Objective.supervised(model, nn.MSELoss(), (x, y))
    verified, gradient = [], Singles.gradient
    monkeypatch.setattr(Singles, "gradient", lambda *a: verified.append(1) or gradient(*a))
    for number in range(3):
        assert per_example_statistics(objective).method == "factors"
        assert len(verified) == number + 1

    # Rows that are mixed up differ by far more than rounding does.
    norms_of = ChunkSums.norms_of
    monkeypatch.setattr(ChunkSums, "norms_of", lambda self, i: norms_of(self, 0))
    y[0] += 1e-3
    with pytest.raises(ValueError, match="differs from what a backward pass"):
        per_example_statistics(Objective.supervised(model, nn.MSELoss(), (x, y)), method="factors")


def test_inputs_are_squared_in_blocks(monkeypatch):
    monkeypatch.setattr(per_example_parts, "SQUARED_ENTRIES", 10)
    check(mlp, "factors")
    model, x = make(mlp)
    y = torch.tensor([0, 1, 2, 2, 0, 1])
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.5, 3.0], dtype=torch.float64))
    weights = criterion.weight[y] / criterion.weight[y].sum()
    single = lambda m, i: F.cross_entropy(m(x[i : i + 1]), y[i : i + 1])
    for size in (None, 4):
        found = per_example_statistics(Objective.supervised(model, criterion, (x, y), chunk_size=size))
        assert_same(found, reference(model, single, range(B), weights.tolist()), weights)


def test_rows_of_a_table_in_an_unknown_operation():
    model, x = make(tied)
    model.function = lambda m, x: m.head((m.table(x) + 2 * m.places(torch.arange(4))).tanh()).mean(1)[:, :3]
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), (x, torch.zeros(B, dtype=torch.long)))
    with pytest.raises(ValueError, match="rows of a table that all examples share"):
        per_example_statistics(objective, method="factors")
    check(lambda: (model, x), "auto", expected_method="vmap")


def test_conditions_that_vmap_cannot_trace_are_looped():
    def branch(m, x):
        y = m.a(x).tanh()
        return m.b(y * (2.0 if float(y.detach().sum()) > 1e9 else 1.0) * m.s.exp())

    build = lambda: (Lambda(branch, a=nn.Linear(5, 4), b=nn.Linear(4, 3), s=parameter(4)), vectors())
    check(build, "auto", expected_method="loop")


def test_a_custom_function_that_uses_a_parameter_is_seen():
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            return g * w, (g * x).sum(0)

    build = lambda: (Lambda(lambda m, x: Scale.apply(m.a(x), m.a.bias), a=nn.Linear(5, 3)), vectors())
    check(build, "auto", expected_method="loop")


def test_uneven_batches_chunks_and_a_frozen_part():
    model, x = make(mlp)
    y = torch.randint(0, 3, (B,))
    one = lambda m, i: F.cross_entropy(m(x), y, reduction="none")[i]
    for params in (None, "2.*", "0.weight"):
        names = None if params is None else [n for n, _ in model.named_parameters() if n.startswith(params.strip("*"))]
        expected = reference(model, one, range(B), [1 / B] * B, names)
        for data in ((x, y), [(x[:1], y[:1]), (x[1:5], y[1:5]), (x[5:], y[5:])]):
            for size in (None, 2):
                objective = Objective.supervised(model, nn.CrossEntropyLoss(), data, params=params, chunk_size=size)
                found = per_example_statistics(objective)
                assert found.method == "factors"
                assert_same(found, expected, [1 / B] * B)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("method", ["factors", "vmap", "loop"])
def test_sequences_with_ignored_labels(method, flat, make_problem):
    model, (x, y) = make_problem("transformer")
    y = y.clone()
    y[0, 2:], y[3, 1:], y[5] = -100, -100, -100
    kept = (y != -100).sum(1)
    if flat:
        inner = model
        model = Lambda(lambda m, x: m.inner(x).transpose(1, 2).flatten(0, 1), inner=inner)
        split = lambda batch: (batch[0], batch[1].flatten())
        one = lambda m, i: F.cross_entropy(m(x[i : i + 1]), y[i])
    else:
        split, one = None, lambda m, i: F.cross_entropy(m(x[i : i + 1]), y[i : i + 1])
    rows = [i for i in range(len(x)) if i != 5]
    weights = (kept[rows].double() / kept.sum()).tolist()
    expected = reference(model, one, rows, weights)
    for data in ((x, y), [(x[:4], y[:4]), (x[4:], y[4:])]):
        objective = Objective.supervised(model, nn.CrossEntropyLoss(), data, split=split)
        found = per_example_statistics(objective, method=method)
        assert found.num_examples == 9
        assert found.weights.tolist() == pytest.approx(weights)
        assert_same(found, expected, weights)
        assert_same(per_example_statistics(objective, method=method, collect="sums"), expected, weights)
    if flat:  # targets that are flat in the data, too
        objective = Objective.supervised(model, nn.CrossEntropyLoss(), (x, y.flatten()))
        assert_same(per_example_statistics(objective, method=method), expected, weights)


def test_class_weights_and_sums(mlp):
    model, (x, y) = mlp
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.5, 3.0], dtype=torch.float64))
    weights = criterion.weight[y] / criterion.weight[y].sum()
    single = lambda m, i: F.cross_entropy(m(x[i : i + 1]), y[i : i + 1])
    found = per_example_statistics(Objective.supervised(model, criterion, (x, y)))
    assert_same(found, reference(model, single, range(len(x)), weights.tolist()), weights)
    found = per_example_statistics(Objective.supervised(model, nn.CrossEntropyLoss(reduction="sum"), (x, y)))
    assert_same(found, reference(model, single, range(len(x)), [1.0] * len(x)), [1.0] * len(x))


@pytest.mark.parametrize("kind", ["supervised", "counted", "plain"])
def test_unknown_losses_are_checked_to_be_means(kind):
    model, x = make(mlp)
    y = torch.randint(0, 3, (B,))
    plain = lambda m, batch: F.cross_entropy(m(batch[0]), batch[1])
    if kind == "supervised":
        objective = Objective.supervised(model, lambda z, t: F.cross_entropy(z, t), (x, y))
    else:
        objective = Objective(model, plain, (x, y), count=(lambda b: len(b[0])) if kind == "counted" else None)
    found = per_example_statistics(objective)
    assert found.method == "factors"
    one = lambda m, i: F.cross_entropy(m(x[i : i + 1]), y[i : i + 1])
    assert_same(found, reference(model, one, range(B), [1 / B] * B), [1 / B] * B)


def test_a_loss_that_is_no_mean_over_examples_is_refused():
    model, x = make(mlp)
    y = torch.tensor([0, 1, -100, 2, -100, 1])  # one label in each but two examples
    y = torch.stack([y, torch.tensor([0, -100, -100, 2, 1, 1])], 1)
    two = Lambda(lambda m, x: m.inner(x).unsqueeze(2).expand(-1, -1, 2), inner=model)
    plain = lambda m, batch: F.cross_entropy(m(batch[0]), batch[1])
    for method in ("auto", "factors"):
        with pytest.raises(ValueError, match="mixes examples or is not their mean|NaN|nan"):
            per_example_statistics(Objective(two, plain, (x, y)), method=method)
    centred = Lambda(lambda m, x: m.inner(x - x.mean(0)), inner=model)
    for method in ("auto", "vmap", "loop"):
        objective = Objective.supervised(centred, nn.CrossEntropyLoss(), (x, y[:, 0].clamp(min=0)))
        with pytest.raises(ValueError, match="mixes examples"):
            per_example_statistics(objective, method=method)


def test_batch_statistics_are_refused():
    model, x = make(frames)
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), (x, torch.zeros(B, dtype=torch.long)), mode="train")
    with pytest.raises(ValueError, match="norm takes its statistics from each batch"):
        per_example_statistics(objective)


def test_equals_the_diagonal_of_the_empirical_fisher_matrix(problem):
    model, data = problem
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), data)
    found = per_example_statistics(objective)
    assert found.method == "factors"
    dense = Fisher(objective, kind="empirical")
    torch.manual_seed(3)
    for i in torch.randint(0, objective.num_parameters, (25,)).tolist():
        e = torch.zeros(objective.num_parameters, dtype=torch.float64)
        e[i] = 1
        assert float(found.second_moment[i]) == pytest.approx(float((dense @ e)[i]), rel=1e-9, abs=1e-16)


def test_nothing_is_left_behind(problem):
    model, (x, y) = problem
    model.train()
    calls = []
    hook = next(model.children()).register_forward_hook(lambda *a: calls.append(1))
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    versions = [p._version for p in model.parameters()]
    hooks = [[len(m._forward_hooks), len(m._backward_hooks)] for m in model.modules()]
    random = torch.get_rng_state()
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), (x, y))
    for method in ("factors", "vmap", "loop"):
        per_example_statistics(objective, method=method)
    assert calls
    assert torch.equal(random, torch.get_rng_state())
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(bool((p.grad == 0.5).all()) and p.requires_grad for p in model.parameters())
    assert versions == [p._version for p in model.parameters()]
    assert hooks == [[len(m._forward_hooks), len(m._backward_hooks)] for m in model.modules()]
    hook.remove()


def test_inputs_changed_in_place_are_not_used():
    def forward(m, x):
        h = m.a(x) * 1.0
        y = m.b(h)
        h.zero_()
        return y + 0 * h[:, :3]

    model = Lambda(forward, a=nn.Linear(5, 4), b=nn.Linear(4, 3)).double()
    objective = Objective.supervised(
        model, nn.CrossEntropyLoss(), (vectors().double(), torch.zeros(B, dtype=torch.long)), check=False
    )
    with pytest.raises(ValueError, match="an input was changed in place"):
        per_example_statistics(objective, method="factors")


def test_float32_agrees_with_float64(make_problem):
    model, data = make_problem("transformer", torch.float32)
    exact = per_example_statistics(Objective.supervised(model, nn.CrossEntropyLoss(), data, dtype=torch.float64))
    found = per_example_statistics(Objective.supervised(model, nn.CrossEntropyLoss(), data))
    assert found.method == "factors"
    assert found.norms.dtype == torch.float32
    for a, b in ((found.mean, exact.mean), (found.second_moment, exact.second_moment), (found.norms, exact.norms)):
        assert float((a.double() - b).norm() / b.norm()) < 1e-5


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "hook"}, "`method` is 'hook'"),
        ({"chunk_size": 0}, "`chunk_size` is 0; give a positive number"),
        ({"chunk_size": True}, "`chunk_size` is True"),
    ],
)
def test_options_are_checked(options, match, mlp):
    model, data = mlp
    with pytest.raises(ValueError, match=match):
        per_example_statistics(Objective.supervised(model, nn.CrossEntropyLoss(), data), **options)


def test_what_has_no_examples_is_refused():
    with pytest.raises(ValueError, match="a closure has no examples"):
        per_example_statistics(Objective.from_closure(lambda t: t.square().sum(), torch.ones(2)))
    with pytest.raises(TypeError, match="`objective` is a int"):
        per_example_statistics(3)  # type: ignore[arg-type]


def test_rows_that_change_places_by_their_values_are_not_mixed_up():
    torch.manual_seed(0)

    class Sorted(nn.Module):
        """As sequences are sorted by length before a recurrent layer."""

        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            order = torch.argsort(x[:, 0], descending=True)
            return self.last(torch.tanh(self.first(x[order])))[torch.argsort(order)]

    x = torch.randn(16, 3, dtype=torch.float64)
    x[:8] = x[:8][x[:8, 0].argsort(descending=True)]  # the first batch is in order already
    y = torch.randint(0, 2, (16,))
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0], dtype=torch.float64))
    objective = Objective.supervised(Sorted().double(), criterion, [(x[:8], y[:8]), (x[8:], y[8:])])
    found = per_example_statistics(objective)
    expected = per_example_statistics(objective, method="loop")
    torch.testing.assert_close(found.norms, expected.norms, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.second_moment, expected.second_moment, rtol=1e-9, atol=1e-12)
