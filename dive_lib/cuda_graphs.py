"""A network's calls recorded as CUDA graphs, whose kernels are launched together.

A U-Net of the papers' size runs some 1500 kernels forward and backward. Launching them one by one takes as long as
computing them on a fast chip (`python -m benchmarks.full_size`: compiled alone, and recorded).
"""

import functools
from collections.abc import Callable

import torch


class Recorded:
    """forward (tensors -> a tensor or a tuple of them) as a function that records the first call of a kind on CUDA and
    replays it in the next. A kind is a shape, a dtype and whether there is a gradient. Elsewhere forward is called. Its
    options, which are no tensors, must be the same in every call.

    Weights must stay in place and be frozen. The memory of a recorded call is kept. A call's answer and gradients are
    copied, so they stay valid; but a recording holds the activations of one call, so a gradient must be asked for
    before the next call of its kind: RuntimeError otherwise, and never the gradient of another call.
    """

    def __init__(self, forward: Callable):
        self.forward, self.recordings, self.latest = forward, {}, {}

    def __call__(self, *tensors: torch.Tensor, **options):
        forward = functools.partial(self.forward, **options) if options else self.forward
        if not self.records(tensors[0]):
            return forward(*tensors)
        needs = [torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors]
        kind = tuple((tuple(t.shape), t.dtype, need) for t, need in zip(tensors, needs))
        inputs = [self._copied_gradient(t) if need else t.detach() for t, need in zip(tensors, needs)]
        if kind not in self.recordings:
            samples = tuple(t.detach().clone().requires_grad_(need) for t, need in zip(tensors, needs))
            self.recordings[kind] = torch.cuda.make_graphed_callables(forward, samples)
        call = self.latest[kind] = object()
        out = self.recordings[kind](*inputs)
        single = torch.is_tensor(out)
        outs = [self._checked(part, kind, call).clone() for part in ([out] if single else out)]
        return outs[0] if single else tuple(outs)

    def records(self, tensor: torch.Tensor) -> bool:
        """Whether calls on this tensor's device are recorded."""
        return tensor.is_cuda

    def _copied_gradient(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, whose gradient leaves the recording's memory."""
        tensor = tensor.view_as(tensor)
        tensor.register_hook(torch.clone)
        return tensor

    def _checked(self, out: torch.Tensor, kind: tuple, call: object) -> torch.Tensor:
        """An output, whose gradient is refused once its kind was called again."""
        def check(gradient):
            if self.latest[kind] is not call:
                raise RuntimeError("a recorded network was called again before the gradient of its last call was "
                                   "asked for; ask for each call's gradient first, or set execution.compile to false")

        if out.requires_grad:
            out.register_hook(check)
        return out
