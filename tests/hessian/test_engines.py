"""Every engine against the dense double-backward oracle, and the choice among engines."""

import pytest
import torch
import torch.nn.functional as F
from sharpscope import Hessian, Objective, partition
from sharpscope.hessian import NotTwiceDifferentiable
from torch import nn

ENGINES = ("double-backward", "forward-over-reverse", "finite-difference", "compiled")


def split_batches(data, *sizes):
    return list(zip(*(t.split(sizes) for t in data), strict=True))


def uneven(data):
    rows = len(data[0])
    return split_batches(data, rows // 2, rows // 3, rows - rows // 2 - rows // 3)


@pytest.mark.parametrize("engine", ENGINES)
def test_products_equal_the_dense_hessian(problem, engine, dense_hessian):
    model, data = problem
    exact = dense_hessian(lambda: F.cross_entropy(model(data[0]), data[1]), model.parameters())
    hessian = Hessian(Objective.supervised(model, nn.CrossEntropyLoss(), uneven(data)), engine=engine)
    V = torch.randn(exact.shape[0], 5, dtype=torch.float64)
    error = torch.linalg.matrix_norm(hessian @ V - exact @ V, 2) / (torch.linalg.matrix_norm(exact, 2) * V.norm())
    assert float(error) <= hessian.relative_error
    assert hessian.relative_error < 1e-8
    torch.testing.assert_close(hessian @ V[:, 0], (hessian @ V)[:, 0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer"])
def test_engines_agree_in_float32_within_their_stated_errors(make_problem, name):
    model, data = make_problem(name, torch.float32)
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), data)
    exact = Hessian(Objective.supervised(model, nn.CrossEntropyLoss(), data, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    top = torch.linalg.eigh(exact.dense())[1][:, -3:]
    V = torch.cat([top, torch.randn(top.shape[0], 3, generator=generator, dtype=torch.float64)], dim=1)
    V = V / V.norm(dim=0)
    scale = float(torch.linalg.eigvalsh(exact.dense()).abs().max())
    for engine in ENGINES:
        hessian = Hessian(objective, engine=engine)
        error = float(((hessian @ V.float()).double() - exact @ V).norm(dim=0).max())
        assert error <= hessian.relative_error * scale, engine


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["parameter", "layer", "head"])
def test_block_products_are_principal_submatrices(make_problem, dense_hessian, engine, kind):
    model, data = make_problem("transformer")
    exact = dense_hessian(lambda: F.cross_entropy(model(data[0]), data[1]), model.parameters())
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), data)
    hessian = Hessian(objective, engine=engine)
    blocks = list(partition(objective, kind, **({"head_count": 2} if kind == "head" else {})).values())
    for block in blocks[:: max(1, len(blocks) // 4)]:
        at = block.indices(objective.layout)
        restricted = hessian.block(block)
        V = torch.randn(len(at), 2, dtype=torch.float64)
        torch.testing.assert_close(restricted @ V, exact[at][:, at] @ V, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_changed_between_products_are_noticed(mlp, dense_hessian, engine):
    model, data = mlp
    hessian = Hessian(Objective.supervised(model, nn.CrossEntropyLoss(), data), engine=engine)
    v = torch.ones(hessian.shape[0], dtype=torch.float64)
    hessian @ v
    for change in (lambda: model[0].weight.data.mul_(1.5), lambda: torch.optim.SGD(model.parameters(), 1.0).step()):
        F.cross_entropy(model(data[0]), data[1]).backward()
        change()
        exact = dense_hessian(lambda: F.cross_entropy(model(data[0]), data[1]), model.parameters())
        torch.testing.assert_close(hessian @ v, exact @ v, rtol=1e-7, atol=1e-8)


def test_results_do_not_depend_on_how_many_graphs_fit(mlp):
    model, data = mlp
    v = torch.ones(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    products = []
    for budget in (1, 60_000, 10**9):
        objective = Objective.supervised(model, nn.CrossEntropyLoss(), data, chunk_size=10, memory_budget=budget)
        hessian = Hessian(objective, engine="double-backward")
        products += [hessian @ v, hessian @ v]
    for product in products[1:]:
        torch.testing.assert_close(product, products[0], rtol=1e-12, atol=1e-14)


def test_unused_and_linear_parameters_have_zero_rows(mlp):
    model, (x, y) = mlp
    model.register_parameter("spare", nn.Parameter(torch.ones(4, dtype=torch.float64)))
    for engine in ENGINES:
        hessian = Hessian(Objective.supervised(model, nn.CrossEntropyLoss(), (x, y)), engine=engine)
        product = hessian.unflatten(hessian @ torch.ones(hessian.shape[0], dtype=torch.float64))
        assert float(product["spare"].abs().max()) == 0
    linear = Objective.from_closure(lambda w: (w * torch.arange(3.0)).sum(), torch.ones(3))
    for engine in ENGINES[:2]:
        assert not (Hessian(linear, engine=engine) @ torch.ones(3)).any()


def test_the_choice_falls_on_double_backward_and_says_why(mlp):
    hessian = Hessian(Objective.supervised(mlp[0], nn.CrossEntropyLoss(), mlp[1]))
    assert hessian.engine.name == "double-backward"
    assert "fastest" in hessian.engine.reason


def test_what_has_only_first_derivatives_falls_back_to_differences(first_order_square):
    x = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    objective = Objective.from_closure(lambda x: (first_order_square(x) * x).sum(), x)
    hessian = Hessian(objective)
    assert hessian.engine.name == "finite-difference"
    assert "double-backward:" in hessian.engine.reason
    with pytest.raises(RuntimeError, match=r"disagree .* \['FirstOrderSquare'\].*engine='finite-difference'"):
        Hessian(objective, engine="double-backward") @ x
    torch.testing.assert_close(hessian.dense(), torch.diag(6 * x), rtol=1e-8, atol=1e-8)


def test_differences_state_the_error_that_kinks_leave():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3))
    data = (torch.randn(50, 6), torch.randint(0, 3, (50,)))
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), data)
    exact, differences = (Hessian(objective, engine=engine) for engine in ("double-backward", "finite-difference"))
    v = objective.gradient()
    v = v / v.norm()
    error = float((exact @ v - differences @ v).norm() / (exact @ v).norm())
    assert error <= differences.relative_error
    assert differences.relative_error > 1e-4


def test_a_closure_without_arguments_needs_double_backward():
    x = torch.tensor([1.0, 2.0])
    objective = Objective.from_closure(lambda: (x**3).sum(), x)
    torch.testing.assert_close(Hessian(objective).dense(), torch.diag(6 * x))
    with pytest.raises(ValueError, match=r"write closure\(\*tensors\)"):
        Hessian(objective, engine="finite-difference")


def test_refusals(mlp):
    objective = Objective.supervised(mlp[0], nn.CrossEntropyLoss(), mlp[1])
    with pytest.raises(ValueError, match="near: 'double-backward'"):
        Hessian(objective, engine="double_backward")
    with pytest.raises(TypeError, match="make one with Objective"):
        Hessian(mlp[0])
    singular = Objective.from_closure(lambda x: x.norm() + x.square().sum().sqrt() ** 0.5, torch.zeros(3), check=False)
    with pytest.raises(ValueError, match="not finite"):
        Hessian(singular, engine="double-backward") @ torch.ones(3)


class Normalised(nn.Module):
    """tanh and two layers whose weights are g v / |v|, written out."""

    def __init__(self, model):
        super().__init__()
        own = lambda t: nn.Parameter(t.detach().clone())
        # The order of named_parameters in the parametrised model: bias, g, v.
        self.tensors = nn.ParameterList(
            own(t)
            for layer in (model[0], model[2])
            for t in (layer.bias, layer.parametrizations.weight.original0, layer.parametrizations.weight.original1)
        )

    def forward(self, x):
        for first, activation in ((0, torch.tanh), (3, lambda z: z)):
            bias, g, v = (self.tensors[first + i] for i in range(3))
            x = activation(x @ (g * v / v.square().sum(1, keepdim=True).sqrt()).T + bias)
        return x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weight_norm_against_its_formula(dense_hessian, dtype):
    torch.manual_seed(0)
    norm = torch.nn.utils.parametrizations.weight_norm
    model = nn.Sequential(norm(nn.Linear(4, 6)), nn.Tanh(), norm(nn.Linear(6, 3))).to(dtype)
    for layer in (model[0], model[2]):
        layer.parametrizations.weight.original0.data.mul_(1.7)
    x, y = torch.randn(20, 4, dtype=dtype), torch.randint(0, 3, (20,))
    explicit = Normalised(model).double()
    torch.testing.assert_close(explicit(x.double()), model(x).double(), rtol=1e-5, atol=1e-5)
    exact = dense_hessian(lambda: F.cross_entropy(explicit(x.double()), y), explicit.parameters())
    hessian = Hessian(Objective.supervised(model, nn.CrossEntropyLoss(), (x, y)))
    V = torch.randn(exact.shape[0], 3, dtype=torch.float64)
    error = torch.linalg.matrix_norm((hessian @ V.to(dtype)).double() - exact @ V, 2)
    assert float(error) <= hessian.relative_error * float(torch.linalg.matrix_norm(exact, 2) * V.norm())
    assert hessian.relative_error < (1e-6 if dtype == torch.float64 else 0.05)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", ["batch", "list", "dataset"])
def test_data_changed_in_place_between_products_is_noticed(mlp, dense_hessian, engine, form):
    model, (x, y) = mlp
    data = {
        "batch": (x, y),
        "list": [(x[:30], y[:30]), (x[30:], y[30:])],
        "dataset": torch.utils.data.TensorDataset(x, y),
    }[form]
    hessian = Hessian(Objective.supervised(model, nn.CrossEntropyLoss(), data), engine=engine)
    v = torch.ones(hessian.shape[0], dtype=torch.float64)
    hessian @ v
    for change in (lambda: x.data.mul_(1.5), lambda: y.data.copy_(y.flip(0)), lambda: x.data.copy_(x.flip(0))):
        change()
        exact = dense_hessian(lambda: F.cross_entropy(model(x), y), model.parameters())
        torch.testing.assert_close(hessian @ v, exact @ v, rtol=1e-7, atol=1e-8)


MEAN_SQUARES = {
    "module": nn.MSELoss(),
    "function": F.mse_loss,
    "sum": nn.MSELoss(reduction="sum"),
    "inside a function": lambda z, y: F.mse_loss(input=z, target=y) + F.mse_loss(z, y, reduction="sum") / z.numel(),
}


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize("criterion", MEAN_SQUARES)
def test_mean_squares_under_every_engine(mlp, dense_hessian, engine, criterion):
    model, (x, y) = mlp
    criterion, target = MEAN_SQUARES[criterion], F.one_hot(y, 3).double()
    exact = dense_hessian(lambda: criterion(model(x), target), model.parameters())
    hessian = Hessian(Objective.supervised(model, criterion, (x, target)), engine=engine)
    V = torch.randn(exact.shape[0], 3, dtype=torch.float64)
    for columns in (V, V[:, :1]):
        error = float(torch.linalg.matrix_norm(hessian @ columns - exact @ columns, 2))
        assert error <= hessian.relative_error * float(torch.linalg.matrix_norm(exact, 2) * columns.norm())


def test_differences_refuse_half_precision_unless_evaluated_in_single(mlp):
    model, (x, y) = mlp
    model.bfloat16()
    with pytest.raises(NotTwiceDifferentiable, match=r"half precision; pass dtype=torch\.float32"):
        Hessian(Objective.supervised(model, nn.CrossEntropyLoss(), (x.bfloat16(), y)), engine="finite-difference")
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), (x.bfloat16(), y), dtype=torch.float32)
    differences, exact = (Hessian(objective, engine=engine) for engine in ("finite-difference", "double-backward"))
    v = objective.gradient()
    error = float((differences @ v - exact @ v).norm() / (exact @ v).norm())
    assert error <= differences.relative_error


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_no_columns_give_no_columns(mlp, engine):
    objective = Objective.supervised(mlp[0], nn.CrossEntropyLoss(), mlp[1])
    n = objective.num_parameters
    hessian = Hessian(objective, engine=engine)
    block = next(iter(partition(objective, "layer").values()))
    assert (hessian @ torch.zeros(n, 0, dtype=torch.float64)).shape == (n, 0)
    restricted = hessian.block(block)
    assert (restricted @ torch.zeros(restricted.shape[0], 0, dtype=torch.float64)).shape == (restricted.shape[0], 0)


@pytest.mark.parametrize("smallest", [0.5, 0.02])
def test_the_calibration_survives_steps_out_of_the_domain(smallest):
    w = torch.tensor([smallest, 1.0, 2.0], dtype=torch.float64)
    objective = Objective.from_closure(lambda w: -w.log().sum(), w)
    hessian = Hessian(objective, engine="finite-difference")
    exact = torch.diag(w**-2)
    error = torch.linalg.matrix_norm(hessian.dense() - exact, 2) / torch.linalg.matrix_norm(exact, 2)
    # The second derivative is defined up to steps of the smallest weight; some seven digits remain.
    assert float(error) < 1e-6
    assert float(error) <= hessian.relative_error


def test_differences_state_their_error_on_badly_scaled_problems():
    """Stiff directions that neither the gradient nor a random vector shows, and a block far smaller than the whole."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 3))
    data = (torch.randn(40, 5) * 30, torch.randint(0, 3, (40,)))
    with torch.no_grad():
        model[2].weight *= 1e-4
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), data)
    exact = Hessian(Objective.supervised(model, nn.CrossEntropyLoss(), data, dtype=torch.float64)).dense()
    differences = Hessian(objective, engine="finite-difference")
    block = partition(objective)["0.weight"]
    at = block.indices(objective.layout)
    for found, truth in ((differences, exact), (differences.block(block), exact[at][:, at])):
        error = torch.linalg.matrix_norm(found.dense().double() - truth, 2)
        assert float(error) <= found.relative_error * float(torch.linalg.matrix_norm(truth, 2))
