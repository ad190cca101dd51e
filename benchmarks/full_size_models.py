"""The full-size models with random weights, and one optimisation step of each as a function without arguments.

Used by `benchmarks/full_size.py`. A step can be built on the meta device to count its operations, or on a chip.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from diffusers import DiTTransformer2DModel
from diffusers.utils import logging
from torch import nn

from dive_lib.layout import LayoutGrid
from dive_lib.layout_ldm import LayoutLDM, denoising_loss
from dive_lib.layout_prior import LayoutPrior
from dive_lib.objective import Objective, Pairs
from dive_lib.parameters import named

logging.set_verbosity_error()  # a note at each cast to bfloat16

# pairs: (t, noise) pairs of an inversion step. dit: arguments of DiTTransformer2DModel; those of "full" are
# facebook/DiT-XL-2-256. matrix: side of the product that measures the chip.
SIZES = {
    "full": {"grid": {"classes": 80, "image_size": 256, "bins": 257, "slots": 100}, "ldm": "LDM-8",
             "prior": "prior-58M", "pairs": 50, "train_batch": 16, "dit_batch": 25, "matrix": 8192, "dit": {}},
    "reduced": {"grid": {"classes": 10, "image_size": 64, "bins": 33, "slots": 8}, "ldm": "mini", "prior": "mini",
                "pairs": 8, "train_batch": 4, "dit_batch": 4, "matrix": 1024,
                "dit": {"num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 4, "sample_size": 16}},
    "tiny": {"grid": {"classes": 10, "image_size": 64, "bins": 33, "slots": 4}, "ldm": "tiny", "prior": "tiny",
             "pairs": 2, "train_batch": 2, "dit_batch": 2, "matrix": 64,
             "dit": {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8}},
}


class InBfloat16(nn.Module):
    """A module with bfloat16 weights and activations between float32 neighbours.

    Unlike autocast it keeps normalisations in bfloat16 too, which halves their memory traffic.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module.to(torch.bfloat16)

    def forward(self, *args, **kwargs):
        args = [a.to(torch.bfloat16) if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
        out = self.module(*args, **kwargs)
        return (out[0].float(),) if isinstance(out, tuple) else out.float()


class Models:
    """Builds models and steps of one size, precision ("fp32", "bf16_autocast" or "bf16") and device.

    compiled: pass networks through torch.compile. images: how many images are inverted in one step, each with its
    own embeddings and all with the same pairs.
    """

    def __init__(self, size: str, precision: str, device: str, *, compiled: bool = False, images: int = 1):
        self.size, self.precision, self.device = SIZES[size], precision, device
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

    def prepared(self, network: nn.Module, *, frozen: bool = True) -> nn.Module:
        """A network in the chosen precision and layout, and compiled where asked for."""
        network.requires_grad_(not frozen)
        network.train(not frozen)
        if self.device == "cuda":
            network = network.to(memory_format=torch.channels_last)
        if self.precision == "bf16" and frozen:
            network = InBfloat16(network)
        return torch.compile(network) if self.compiled and self.device != "meta" else network

    def autocast(self, training: bool = False):
        """Training keeps float32 weights, so its bfloat16 is always autocast."""
        wanted = self.precision == "bf16_autocast" or (training and self.precision == "bf16")
        device = "cpu" if self.device == "meta" else self.device
        return torch.autocast(device, torch.bfloat16) if wanted else nullcontext()

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device)

    def times(self, count: int) -> torch.Tensor:
        return torch.randint(0, 1000, (count,), device=self.device)

    def ldm_inversion(self) -> Callable[[], torch.Tensor]:
        """Gradient of the image loss with respect to the token embeddings of each image (equation 5, first term)."""
        ldm, count, batch = self.ldm(), self.size["pairs"], self.batch("LDM inversion")
        shape = ldm.latent_shape
        ldm.requires_grad_(False)
        ldm.unet, ldm.encoder = self.prepared(ldm.unet), self.prepared(ldm.encoder)
        objective = Objective(ldm)
        latents = self.random(self.images, *shape).repeat_interleave(count, 0)
        pairs = Pairs(self.times(count).repeat(self.images), self.random(count, *shape).repeat(self.images, 1, 1, 1),
                      torch.empty(batch, 0, device=self.device))
        v = self.random(self.images, self.grid.slots, 5, ldm.vocabulary.width).requires_grad_()

        # The FLOP counter cannot follow autograd.grad to a leaf that is itself a module's argument: hence the view.
        def step() -> torch.Tensor:
            with self.autocast():
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
        ldm.unet = self.prepared(ldm.unet, frozen=False)
        ldm.encoder = self.prepared(ldm.encoder, frozen=False)
        optimizer = torch.optim.AdamW(ldm.parameters(), lr=1e-5, fused=True if self.device == "cuda" else None)

        def step() -> torch.Tensor:
            optimizer.zero_grad(set_to_none=True)
            with self.autocast(training=True):
                predicted = ldm(ldm.schedule.add_noise(clean, noise, t), t, ldm.vocabulary(tokens))
                loss = denoising_loss(predicted.float(), noise).mean()
            loss.backward()
            if self.device != "meta":  # the optimiser does no matrix products
                optimizer.step()
            return loss.detach()

        return step

    def prior_inversion(self) -> Callable[[], torch.Tensor]:
        """Gradient of the prior's loss with respect to the token embeddings (equation 5, second term)."""
        prior, count, batch = self.prior(), self.size["pairs"], self.batch("prior inversion")
        prior.requires_grad_(False).eval()
        prior.transformer = self.prepared(prior.transformer)
        shape = (self.grid.slots, 5, prior.vocabulary.width)
        v, noise, t = self.random(self.images, *shape).requires_grad_(), self.random(batch, *shape), self.times(batch)

        def step() -> torch.Tensor:
            with self.autocast():
                loss = prior.loss(v.repeat_interleave(count, 0), t, noise).sum() / count
            return torch.autograd.grad(loss, v)[0]

        return step

    def dit_inversion(self) -> Callable[[], torch.Tensor]:
        """Gradient of equation 1 with respect to the class embedding of the class-conditional DiT.

        One embedding enters every block: the blocks' own tables, copies of one in the published weights, are
        replaced by the identity, and the embedding is passed in place of the class labels.
        """
        settings = {"in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 1000} | self.size["dit"]
        with torch.device(self.device):
            dit = DiTTransformer2DModel(**settings)
        for block in dit.transformer_blocks:
            block.norm1.emb.class_embedder = nn.Identity()
        dit = dit.to(self.device)
        width, side, count = dit.inner_dim, dit.config.sample_size, self.size["dit_batch"]
        network, batch = self.prepared(dit), self.batch("DiT inversion")
        z, noise, t = self.random(batch, 4, side, side), self.random(batch, 4, side, side), self.times(batch)
        v = self.random(self.images, width).requires_grad_()

        def step() -> torch.Tensor:
            with self.autocast():
                out = network(z, t, v.repeat_interleave(count, 0), return_dict=False)[0]
                loss = (out[:, :4].float() - noise).square().flatten(1).mean(1).sum() / count
            return torch.autograd.grad(loss, v)[0]

        return step
