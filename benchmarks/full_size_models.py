"""The full-size models with random weights, and one optimisation step of each as a function without arguments.

Used by `benchmarks/full_size.py`. A step can be built on the meta device to count its operations, or on a chip.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from diffusers.utils import logging
from torch import nn

from dive_lib.dit import DiT
from dive_lib.execution import Execution
from dive_lib.layout import LayoutGrid
from dive_lib.layout_ldm import LayoutLDM, denoising_loss
from dive_lib.layout_prior import LayoutPrior
from dive_lib.objective import Objective, Pairs
from dive_lib.parameters import named

logging.set_verbosity_error()  # a note at each cast to bfloat16

# pairs: (t, noise) pairs of an inversion step. ldm, prior, dit: architectures of params.yaml. matrix: side of the
# product that measures the chip.
SIZES = {
    "full": {"grid": {"classes": 80, "image_size": 256, "bins": 257, "slots": 100}, "ldm": "LDM-8",
             "prior": "prior-58M", "pairs": 50, "train_batch": 16, "dit": "DiT-XL-2",
             "dit_batch": 25, "matrix": 8192},
    "reduced": {"grid": {"classes": 10, "image_size": 64, "bins": 33, "slots": 8}, "ldm": "mini", "prior": "mini",
                "pairs": 8, "train_batch": 4, "dit": "mini", "dit_batch": 4, "matrix": 1024},
    "tiny": {"grid": {"classes": 10, "image_size": 64, "bins": 33, "slots": 4}, "ldm": "tiny", "prior": "tiny",
             "pairs": 2, "train_batch": 2, "dit": "tiny", "dit_batch": 2, "matrix": 64},
}


class Models:
    """Builds models and steps of one size, precision ("fp32" or "bf16") and device.

    Inversion runs as `dive_lib.execution` has it; training in bf16 keeps float32 weights under autocast, as
    `dive_lib.train` does. compiled: pass networks through torch.compile. images: how many images are inverted in one
    step, each with its own embeddings and all with the same pairs. train_batch: images of a training step, where not
    those of the size.
    """

    def __init__(self, size: str, precision: str, device: str, *, compiled: bool = False, images: int = 1,
                 train_batch: int | None = None):
        self.size = SIZES[size] if train_batch is None else SIZES[size] | {"train_batch": train_batch}
        self.precision, self.device = precision, device
        self.compiled, self.images = compiled, images
        classes = tuple(f"class {k}" for k in range(self.size["grid"]["classes"]))
        self.grid = LayoutGrid(**self.size["grid"] | {"classes": classes})

    def steps(self) -> dict[str, Callable[[], Callable[[], object]]]:
        """Name of each step -> function that builds it; models exist only while their step is in use."""
        return {"LDM inversion": self.ldm_inversion, "LDM training": self.ldm_training,
                "prior inversion": self.prior_inversion, "DiT inversion": self.dit_inversion}

    def batch(self, name: str) -> int:
        """Samples that pass the network in a step."""
        batch = {"LDM training": "train_batch", "DiT inversion": "dit_batch"}.get(name, "pairs")
        return self.size[batch] * (1 if name == "LDM training" else self.images)

    def ldm(self) -> LayoutLDM:
        with torch.device(self.device):
            torch.manual_seed(0)
            ldm = LayoutLDM(self.grid, **named("architectures", "layout_ldm", self.size["ldm"]))
        ldm = ldm.to(self.device)
        ldm.schedule.alphas_cumprod = ldm.schedule.alphas_cumprod.to(self.device)
        return ldm

    def prior(self, ldm: LayoutLDM | None = None) -> LayoutPrior:
        vocabulary = named("architectures", "layout_ldm", self.size["ldm"])["vocabulary"]
        with torch.device(self.device):
            prior = LayoutPrior(self.grid, vocabulary, **named("architectures", "layout_prior", self.size["prior"]))
        prior = prior.to(self.device)
        prior.schedule.alphas_cumprod = prior.schedule.alphas_cumprod.to(self.device)
        return prior.adopt(ldm.vocabulary) if ldm is not None else prior

    def frozen(self, ldm: nn.Module, prior: LayoutPrior | None = None, *, chunk: int) -> Objective:
        """The objective of frozen models, executed in the chosen precision, and compiled where asked for."""
        for model in (ldm, prior) if prior is not None else (ldm,):
            model.requires_grad_(False).eval()
        execution = Execution(chunk=chunk, bf16=self.precision == "bf16",
                              compile=self.compiled and self.device != "meta")
        return execution.prepare(Objective(ldm, prior))

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device)

    def times(self, count: int) -> torch.Tensor:
        return torch.randint(0, 1000, (count,), device=self.device)

    def ldm_inversion(self) -> Callable[[], torch.Tensor]:
        """Gradient of the image loss with respect to the token embeddings of each image (equation 5, first term)."""
        return self.image_step(self.ldm(), self.size["pairs"])

    def dit_inversion(self) -> Callable[[], torch.Tensor]:
        """Gradient of equation 1 with respect to the class embedding of each image."""
        with torch.device(self.device):
            dit = DiT(1000, **named("architectures", "dit", self.size["dit"]))
        for weights in dit.parameters():  # some start at zero, and let no gradient pass
            nn.init.normal_(weights, std=0.02)
        dit.schedule.alphas_cumprod = dit.schedule.alphas_cumprod.to(self.device)
        return self.image_step(dit.to(self.device), self.size["dit_batch"])

    def image_step(self, ldm: LayoutLDM | DiT, count: int) -> Callable[[], torch.Tensor]:
        """The gradient of the mean image loss on `count` pairs with respect to the condition of each image."""
        objective = self.frozen(ldm, chunk=count * self.images)
        latents = self.random(self.images, *ldm.latent_shape).repeat_interleave(count, 0)
        pairs = Pairs(self.times(count).repeat(self.images),
                      self.random(count, *ldm.latent_shape).repeat(self.images, 1, 1, 1),
                      torch.empty(len(latents), 0, device=self.device))
        fields = len(ldm.grid.vocabulary_sizes)
        v = self.random(self.images, ldm.grid.slots, fields, ldm.vocabulary.width).requires_grad_()

        # The FLOP counter cannot follow autograd.grad to a leaf that is itself a module's argument: hence the view.
        def step() -> torch.Tensor:
            context = ldm.context(v.view_as(v)).repeat_interleave(count, 0)
            loss = objective.image_losses(latents, context, pairs).sum() / count
            return torch.autograd.grad(loss, v)[0]

        return step

    def ldm_training(self) -> Callable[[], torch.Tensor]:
        """Gradient of equation 1 with respect to all weights, and the AdamW update."""
        ldm, batch = self.ldm(), self.size["train_batch"]
        clean = self.random(batch, *ldm.latent_shape)
        noise, t = torch.randn_like(clean), self.times(batch)
        tokens = self.grid.empty(batch).to(self.device)
        if self.device == "cuda":
            ldm.unet.to(memory_format=torch.channels_last)
        autocast = torch.autocast("cuda" if self.device == "cuda" else "cpu", torch.bfloat16)
        optimizer = torch.optim.AdamW(ldm.parameters(), lr=1e-5, fused=True if self.device == "cuda" else None)

        def step() -> torch.Tensor:
            optimizer.zero_grad(set_to_none=True)
            with autocast if self.precision == "bf16" else nullcontext():
                predicted = ldm(ldm.schedule.add_noise(clean, noise, t), t, ldm.vocabulary(tokens))
                loss = denoising_loss(predicted.float(), noise).mean()
            loss.backward()
            if self.device != "meta":  # the optimiser does no matrix products
                optimizer.step()
            return loss.detach()

        return step

    def prior_inversion(self) -> Callable[[], torch.Tensor]:
        """Gradient of the prior's loss with respect to the token embeddings (equation 5, second term)."""
        prior = self.prior()
        count, batch = self.size["pairs"], self.batch("prior inversion")
        self.frozen(prior, chunk=batch)
        shape = (self.grid.slots, 5, prior.vocabulary.width)
        v, noise, t = self.random(self.images, *shape).requires_grad_(), self.random(batch, *shape), self.times(batch)

        def step() -> torch.Tensor:
            loss = prior.loss(v.repeat_interleave(count, 0), t, noise).sum() / count
            return torch.autograd.grad(loss, v)[0]

        return step
