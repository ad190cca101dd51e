"""The token transformer: size, shapes, positions, gradient, and independence of samples in a batch."""

import pytest
import torch
from torch import nn

from dive_lib.token_transformer import TokenTransformer


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def small(**changes) -> TokenTransformer:
    torch.manual_seed(0)
    return TokenTransformer(**{"width": 24, "layers": 2, "heads": 2, "head_width": 8, "length": 10} | changes)


def test_the_papers_encoder_has_50_million_parameters():
    with torch.device("meta"):
        encoder = TokenTransformer(width=512, layers=16)
        placed = TokenTransformer(width=512, layers=16, length=500)
    assert parameters(encoder) == 50_414_592
    assert parameters(placed) - parameters(encoder) == 500 * 512


def test_names_are_those_that_checkpoints_use():
    names = set(small(layers=1).state_dict())
    linear = {f"layers.0.{part}.weight" for part in ("attention.query", "attention.key", "attention.value")}
    parts = "attention.norm attention.out feedforward.norm feedforward.expand feedforward.contract".split()
    both = {f"layers.0.{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    assert names == {"positions", "norm.weight", "norm.bias"} | linear | both


def test_one_layer_equals_the_formula_written_out():
    model = small(layers=1).double()
    for parameter in model.parameters():  # biases and gains away from their initial zeros and ones
        nn.init.normal_(parameter, std=0.5)
    state, x = model.state_dict(), torch.randn(2, 7, 24, dtype=torch.double)

    def norm(h, name):
        h = h - h.mean(-1, keepdim=True)
        h = h / (h.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return h * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(h, name):
        return h @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0.0)

    h = x + state["positions"][:7]
    n = norm(h, "layers.0.attention.norm")
    q, k, v = (linear(n, f"layers.0.attention.{name}") for name in ("query", "key", "value"))
    heads = []
    for head in (slice(0, 8), slice(8, 16)):
        weights = (q[..., head] @ k[..., head].transpose(1, 2) / 8**0.5).softmax(-1)
        heads.append(weights @ v[..., head])
    h = h + linear(torch.cat(heads, -1), "layers.0.attention.out")
    n = linear(norm(h, "layers.0.feedforward.norm"), "layers.0.feedforward.expand")
    n = n * (1 + torch.erf(n / 2**0.5)) / 2  # the exact GELU
    h = h + linear(n, "layers.0.feedforward.contract")
    torch.testing.assert_close(model(x), norm(h, "norm"))


def test_positions_distinguish_tokens_and_start_small():
    x = torch.randn(1, 1, 24).expand(1, 10, 24)
    placed, unplaced = small()(x), small(length=None)(x)
    assert (unplaced - unplaced[:, :1]).abs().max() < 1e-5
    assert (placed - placed[:, :1]).abs().max() > 1e-3
    assert small(length=4000).positions.std().item() == pytest.approx(0.02, rel=0.02)
    assert small(length=4000, position_std=0.5).positions.std().item() == pytest.approx(0.5, rel=0.02)


def test_without_positions_a_permutation_of_tokens_permutes_the_result():
    model, x, order = small(length=None), torch.randn(2, 9, 24), torch.randperm(9)
    torch.testing.assert_close(model(x)[:, order], model(x[:, order]))


def test_samples_of_a_batch_do_not_mix_and_every_parameter_gets_a_gradient():
    model, x = small(), torch.randn(3, 10, 24, requires_grad=True)
    result = model(x)
    torch.testing.assert_close(result[1:2], model(x[1:2]))
    (gradient,) = torch.autograd.grad(result[1].square().sum(), x, retain_graph=True)
    assert gradient[1].abs().min() > 0 and not gradient[[0, 2]].any()
    (result * torch.randn_like(result)).sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_dropout_acts_only_in_training():
    model, x = small(dropout=0.5), torch.randn(1, 10, 24)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_final_norm_is_optional():
    x = torch.randn(2, 10, 24)
    torch.testing.assert_close(nn.functional.layer_norm(small(final_norm=False)(x), (24,)), small()(x))


@pytest.mark.parametrize(
    "shape, message", [((1, 11, 24), "11 tokens.*10 positions"), ((1, 5, 23), r"\(B, L, 24\)")]
)
def test_wrong_input_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        small()(torch.zeros(shape))
