"""A network's calls recorded as CUDA graphs, whose kernels are launched together.

A U-Net of the papers' size runs some 1500 kernels forward and backward. Launching them one by one takes as long as
computing them on a fast chip (`python -m benchmarks.full_size`).
"""

import functools
import threading
from collections.abc import Callable

import torch

RECORDING = threading.Lock()  # CUDA refuses a recording during which another thread takes memory on the GPU


class Recorded:
    """forward (tensors -> a tensor or a tuple of them) as a function that records the first call of a kind on CUDA and
    replays it in the next. A kind is the tensors' shapes, dtypes and whether they need a gradient, and the options,
    which are no tensors. Elsewhere than on CUDA forward is called.

    Weights must stay in place and be frozen. The memory of a recorded call is kept, of each kind apart. A call's answer
    and gradients are copied, so they stay valid; but a recording holds the activations of one call, and its gradient
    overwrites them. So a gradient can be asked for once, before the next call of its kind: RuntimeError otherwise, and
    never a wrong gradient.
    """

    def __init__(self, forward: Callable):
        self.forward, self.recordings, self.latest = forward, {}, {}

    def __call__(self, *tensors: torch.Tensor, **options):
        if not all(map(torch.is_tensor, tensors)) or any(map(torch.is_tensor, options.values())):
            raise TypeError("a recorded network takes its tensors by position, and everything else by name")
        forward = functools.partial(self.forward, **options)
        if not self.records(tensors[0]):
            return forward(*tensors)
        needs = [torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors]
        shapes = tuple((tuple(t.shape), t.dtype, need) for t, need in zip(tensors, needs))
        kind = shapes, tuple(sorted(options.items()))
        inputs = [self._watched(t, kind) if need else t.detach() for t, need in zip(tensors, needs)]
        if kind not in self.recordings:
            samples = tuple(t.detach().clone().requires_grad_(need) for t, need in zip(tensors, needs))
            with RECORDING:
                self.recordings[kind] = torch.cuda.make_graphed_callables(forward, samples)
        call = self.latest[kind] = object()
        out = self.recordings[kind](*inputs)
        single = torch.is_tensor(out)
        outs = [self._checked(part, kind, call).clone() for part in ([out] if single else out)]
        return outs[0] if single else tuple(outs)

    def records(self, tensor: torch.Tensor) -> bool:
        """Whether calls on this tensor's device are recorded."""
        return tensor.is_cuda

    def _watched(self, tensor: torch.Tensor, kind: tuple) -> torch.Tensor:
        """The tensor, whose gradient leaves the recording's memory and ends the call."""
        def ended(gradient: torch.Tensor) -> torch.Tensor:
            self.latest[kind] = None
            return gradient.clone()

        tensor = tensor.view_as(tensor)
        tensor.register_hook(ended)
        return tensor

    def _checked(self, out: torch.Tensor, kind: tuple, call: object) -> torch.Tensor:
        """An output, whose gradient is refused once its call has ended or its kind was called again."""
        def check(gradient: torch.Tensor) -> None:
            if self.latest[kind] is not call:
                raise RuntimeError("the gradient of a recorded network's call was asked for twice, or after the next "
                                   "call; ask once, for each call first, or set execution.compile to false")

        if out.requires_grad:
            out.register_hook(check)
        return out
