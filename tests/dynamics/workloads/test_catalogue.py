import pytest
import torch
from sharpscope.dynamics.workloads import WORKLOADS, HalfSquaredError, workload
from sharpscope.dynamics.workloads.fashion_mnist import PACKAGE_FOLDER
from torch import nn


@pytest.fixture
def char(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("all that is gold does not glitter, not all those who wander are lost. " * 60)
    return workload("char-transformer", data=path, num_examples=6)


@pytest.fixture(params=["digits-mlp", "digits-cnn", "char-transformer"])
def small(request):
    if request.param == "char-transformer":
        return request.getfixturevalue("char")
    return workload(request.param, num_examples=30)


def test_the_objective_is_the_loss_in_the_mode_of_the_workload(small):
    objective = small.objective(small.train.num)
    small.model.train(small.defaults.mode == "train")
    assert objective.loss() == pytest.approx(float(small.loss(small.train).detach()), rel=1e-6)
    assert objective.num_examples == small.train.num


def test_the_objective_of_a_subset_is_the_loss_of_the_first_examples(small):
    objective = small.objective(4)
    small.model.train(small.defaults.mode == "train")
    first = type(small.train)(*(t[:4] for t in small.train))
    assert objective.loss() == pytest.approx(float(small.loss(first).detach()), rel=1e-6)


def test_batchnorm_is_measured_as_it_is_trained():
    w = workload("digits-cnn", num_examples=30)
    w.model.train()
    trained = float(w.loss(w.train).detach())
    assert w.objective().loss() == pytest.approx(trained, rel=1e-6)
    assert w.objective(mode="eval").loss() != pytest.approx(trained, rel=1e-3)


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_stream_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (workload("digits-mlp", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    a, b, c = (torch.cat([p.flatten() for p in w.model.parameters()]) for w in (first, again, other))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_half_squared_error_has_the_identity_as_its_hessian():
    prediction, target = torch.randn(1, 4, dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda z: HalfSquaredError()(z, target), prediction)
    assert torch.allclose(hessian.reshape(4, 4), torch.eye(4, dtype=torch.float64))
    batch = torch.randn(6, 4)
    assert float(HalfSquaredError()(batch, torch.zeros(6, 4))) == pytest.approx(float(batch.square().sum()) / 12)


def test_accuracy_counts_labels_and_leaves_the_modes(small):
    small.model.train()
    before = [module.training for module in small.model.modules()]
    found = small.accuracy(small.train)
    assert [module.training for module in small.model.modules()] == before
    small.model.eval()
    targets = small.train.targets.argmax(1) if small.train.targets.is_floating_point() else small.train.targets
    assert found == pytest.approx(float((small.model(small.train.inputs).argmax(1) == targets).float().mean()))


def test_digits_mlp_learns_one_hot_targets():
    w = workload("digits-mlp", num_examples=20)
    assert torch.equal(w.train.targets.sum(1), torch.ones(20))
    assert isinstance(w.criterion, HalfSquaredError)
    assert isinstance(workload("digits-cnn").criterion, nn.CrossEntropyLoss)


@pytest.mark.skipif(not PACKAGE_FOLDER.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_fashion_cnn_starts_near_the_loss_of_guessing():
    w = workload("fashion-cnn", num_examples=200)
    assert w.objective().loss() == pytest.approx(2.303, abs=0.3)  # log 10


def test_moving_keeps_everything_together():
    w = workload("digits-mlp", num_examples=10).to("meta")
    assert {t.device.type for t in (*w.train, *w.held_out, *w.model.parameters())} == {"meta"}


def test_an_unknown_name_lists_the_near_ones():
    with pytest.raises(ValueError, match=r"`workload` is 'digit-mlp'.*near: 'digits-mlp'"):
        workload("digit-mlp")
    assert len(WORKLOADS) == 4


def test_data_for_a_workload_that_has_its_own_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has its data built in"):
        workload("digits-cnn", data=tmp_path)
