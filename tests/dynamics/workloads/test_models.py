import pytest
import torch
import torch.nn.functional as F
from sharpscope.dynamics.workloads.models import CharTransformer, digits_cnn, digits_mlp, fashion_cnn
from torch.nn.attention import SDPBackend, sdpa_kernel


@pytest.mark.parametrize(("make", "shape"), [(digits_mlp, (64,)), (digits_cnn, (64,)), (fashion_cnn, (1, 28, 28))])
def test_classifiers_give_ten_outputs(make, shape):
    assert make()(torch.randn(5, *shape)).shape == (5, 10)


def test_the_network_of_the_main_job_is_64_100_100_10():
    assert [tuple(p.shape) for p in digits_mlp().parameters()] == [
        (100, 64),
        (100,),
        (100, 100),
        (100,),
        (10, 100),
        (10,),
    ]


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    return CharTransformer(13, length=12, width=16, num_heads=4, num_layers=2).double()


def test_a_character_sees_none_after_it(transformer):
    characters = torch.randint(0, 13, (3, 12))
    changed = characters.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 13
    a, b = transformer(characters), transformer(changed)
    assert a.shape == (3, 13, 12)
    assert torch.equal(a[:, :, :7], b[:, :, :7])
    assert not torch.allclose(a[:, :, 7:], b[:, :, 7:])


def test_the_output_weights_are_the_embedding(transformer):
    assert transformer.head.weight is transformer.embedding.weight
    assert "head.weight" not in dict(transformer.named_parameters())


def test_attention_is_softmax_of_scaled_products(transformer):
    attention = transformer.layers[0].attention
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    q, k, v = (t.view(2, 12, 4, 4).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.mT / 2  # sqrt of the head size 4
    scores = scores.masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf)
    expected = attention.out_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 12, 16))
    assert torch.allclose(attention(x), expected, atol=1e-12)


def test_it_can_be_differentiated_twice_on_the_math_kernel(transformer):
    characters, targets = torch.randint(0, 13, (2, 3, 12))
    with sdpa_kernel(SDPBackend.MATH):
        loss = F.cross_entropy(transformer(characters), targets)
        parameters = list(transformer.parameters())
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        square = sum(g.square().sum() for g in gradients)
        assert all(torch.isfinite(h).all() for h in torch.autograd.grad(square, parameters))
