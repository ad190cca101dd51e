"""Linear maps of sequences by another kernel are the same maps."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dive_lib.sequence_linear import FEWEST, SequenceLinear, use_matrix_products, use_sequence_linear
from dive_lib.token_transformer import TokenTransformer
from tests import tiny


class Called(TorchDispatchMode):
    """The names of the operations in this block."""

    def __enter__(self):
        self.names = set()
        return super().__enter__()

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.names.add(operation.overloadpacket.__name__)
        return operation(*arguments, **(options or {}))


def gradients(model: nn.Module, x: torch.Tensor, *more) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    out = model(x, *more)
    torch.manual_seed(1)
    weights = [x, *(p for p in model.parameters() if p.requires_grad)]
    return [out, *torch.autograd.grad((out * torch.randn_like(out)).sum(), weights)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(FEWEST, 9, 12), (40, 2, 12), (40, 1, 12), (3, 9, 12), (1, 2, 12)])
def test_answers_and_gradients_are_those_of_a_matrix_product(bias, shape):
    torch.manual_seed(0)
    plain, x = nn.Linear(12, 20, bias=bias), torch.randn(shape)
    changed = nn.Sequential(copy.deepcopy(plain))
    use_sequence_linear(changed)
    with Called() as called:
        changed(x)
    assert type(changed[0]) is SequenceLinear
    assert ("convolution" in called.names) is torch.backends.mkl.is_available()
    for ours, reference in zip(gradients(changed, x), gradients(plain, x), strict=True):
        assert ours.shape == reference.shape and torch.allclose(ours, reference, rtol=1e-4, atol=1e-5)
    assert changed(x).is_contiguous()


def test_a_sequence_that_is_no_block_of_memory_is_read_right():
    torch.manual_seed(0)
    linear = SequenceLinear(12, 20)
    x = torch.randn(FEWEST, 12, 9).mT
    expected = nn.functional.linear(x, linear.weight, linear.bias)
    assert not x.is_contiguous() and torch.allclose(linear(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("x", [
    torch.randn(FEWEST, 12), torch.randn(12), torch.randn(FEWEST, 3, 3, 12),
    torch.randn(FEWEST, 9, 12, dtype=torch.bfloat16), torch.empty(FEWEST, 9, 12, device="meta")],
    ids=lambda x: f"{tuple(x.shape)} {x.dtype} {x.device}")
def test_everything_else_stays_a_matrix_product(x):
    linear = SequenceLinear(12, 20, dtype=x.dtype, device=x.device)
    with Called() as called:
        out = linear(x)
    assert "convolution" not in called.names and out.shape == (*x.shape[:-1], 20)


@pytest.mark.parametrize("length, width, out", [(1, 48, 96), (9, 256, 48), (16, 128, 512), (40, 192, 192)])
def test_a_sample_does_not_depend_on_those_beside_it_or_on_threads(length, width, out):
    torch.manual_seed(0)
    linear, x = SequenceLinear(width, out).requires_grad_(False), torch.randn(64, length, width)
    weights, threads = torch.randn(64, length, out), torch.get_num_threads()

    def answers(count: int) -> list[torch.Tensor]:
        part = x[:count].clone().requires_grad_()
        answer = linear(part)
        return [answer, *torch.autograd.grad((answer * weights[:count]).sum(), part)]

    together = answers(64)
    try:
        for cores in (1, 2):
            torch.set_num_threads(cores)
            for count in (1, 2, 7, 15, 16, 17, 50):
                for alone, same in zip(answers(count), together):
                    assert torch.equal(alone, same[:count]), f"{count} samples, {cores} threads"
    finally:
        torch.set_num_threads(threads)


def test_the_models_have_it_with_weights_under_their_names():
    ldm, transformer = tiny.layout_ldm(True), TokenTransformer(16, layers=1, heads=2, head_width=8)
    for model in (ldm.unet, transformer, tiny.dit().transformer):
        names = list(model.state_dict())
        assert sum(type(module) is SequenceLinear for module in model.modules()) > 3
        assert not any(type(module) is nn.Linear for module in model.modules())
        use_matrix_products(model)
        assert not any(type(module) is SequenceLinear for module in model.modules())
        assert names == list(model.state_dict())


def test_the_layout_ldm_answers_as_before():
    ldm = tiny.layout_ldm(True)
    context = ldm.context(ldm.vocabulary(tiny.layouts().repeat(6, 1, 1)))
    latents, t = tiny.latents().repeat(6, 1, 1, 1), torch.tensor([10, 300, 900]).repeat(6)
    answer = ldm.predict_noise(latents, t, context)
    use_matrix_products(ldm)
    assert torch.allclose(answer, ldm.predict_noise(latents, t, context), rtol=1e-4, atol=1e-5)
