import pytest
import torch
from sharpscope.dynamics.workloads.digits import digits
from sklearn.datasets import load_digits


def test_train_and_held_out_are_the_whole_of_the_digits():
    data = digits()
    assert data.train.inputs.shape == (1500, 64)
    assert data.held_out.inputs.shape == (297, 64)
    labels = torch.cat([data.train.targets, data.held_out.targets])
    assert labels.tolist() == load_digits().target.tolist()


def test_inputs_are_pixels_over_sixteen_minus_the_mean_training_image():
    data = digits()
    # Undoing both gives the original integers back.
    pixels = torch.as_tensor(load_digits().data)
    mean = pixels[:1500].mean(0) / 16
    assert torch.allclose(data.train.inputs.double() + mean, pixels[:1500] / 16, atol=1e-6)
    assert torch.allclose(data.held_out.inputs.double() + mean, pixels[1500:] / 16, atol=1e-6)
    assert data.train.inputs.mean(0).abs().max() < 1e-6


def test_a_subset_is_the_beginning():
    part = digits(40).train
    assert torch.equal(part.inputs, digits().train.inputs[:40])
    assert part.num == 40


@pytest.mark.parametrize("num", [0, -3, 1501])
def test_a_number_that_is_not_there_is_refused(num):
    with pytest.raises(ValueError, match=rf"`num_examples` is {num}.*1 to 1500"):
        digits(num)
