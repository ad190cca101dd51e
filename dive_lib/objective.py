"""What DIVE minimises: the denoising losses of image and layout on (t, noise) pairs (equations 4 and 5).

They stand for -log p(x | y) and -log p(y), so the minimum is at the most likely layout y of the image x (equation 2).

A pair is an index into a fixed set of timesteps and noises that all images share. For one image and one layout the
objective on pair k is

    | eps_k - eps_theta(z_tk, t_k, v) |^2  +  weight * | eps'_k - eps_phi(v_tk, t_k) |^2.

Everything here works on many (image, layout, pair) triples in one batch, and counts network evaluations.
"""

from dataclasses import dataclass, field

import torch

from dive_lib.layout_ldm import LayoutLDM

ENCODED = 1024  # most layouts whose contexts are computed in one call


@dataclass
class Pairs:
    """t (P,) timesteps, noise (P, 4, h, w) for the image, prior_noise (P, N, F, d) for the layout of F = 5 fields."""

    t: torch.Tensor
    noise: torch.Tensor
    prior_noise: torch.Tensor

    @classmethod
    def draw(cls, ldm: LayoutLDM, t: torch.Tensor, generator: torch.Generator, *, prior: bool = True,
             antithetic: bool = False) -> "Pairs":
        """One noise per timestep of t (P,), on the model's device.

        prior: draw the prior's noises, too. They come from a generator of their own, so that the image's noises
        are the same with and without a prior. antithetic: as the method of that name.
        """
        device = ldm.vocabulary.class_table.device
        own = torch.Generator().manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        noise = torch.randn(len(t), *ldm.latent_shape, generator=generator)
        fields = len(ldm.grid.vocabulary_sizes)
        shape = (len(t), ldm.grid.slots, fields, ldm.vocabulary.width) if prior else (len(t), 0)
        pairs = cls(t.to(device), noise.to(device), torch.randn(shape, generator=own).to(device))
        return pairs.antithetic() if antithetic else pairs

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, index) -> "Pairs":
        return Pairs(self.t[index], self.noise[index], self.prior_noise[index])

    def antithetic(self) -> "Pairs":
        """These pairs with every second noise the opposite of the one before: what is odd in it cancels."""
        noise, prior_noise = self.noise.clone(), self.prior_noise.clone()
        for noises in (noise, prior_noise):
            noises[1::2] = -noises[:len(self) // 2 * 2:2]
        return Pairs(self.t, noise, prior_noise)

    @property
    def opposite(self) -> bool:
        """Whether every second noise is the opposite of the one before, so that pairs belong together by two."""
        even = self.noise[:len(self) // 2 * 2]
        return len(even) > 0 and torch.equal(even[1::2], -even[::2])

    def to(self, device: torch.device | str) -> "Pairs":
        """The same pairs on another device."""
        return Pairs(self.t.to(device), self.noise.to(device), self.prior_noise.to(device))


@dataclass
class Cost:
    """Evaluations of the image denoiser and of the prior, forward and backward, in samples.

    `forward_equivalents` counts the image denoiser: a forward pass as 1, a backward pass to the condition as 1
    (weights are frozen, so it costs one pass of matrix products and not two). The prior's are listed apart.
    """

    forward: int = 0
    backward: int = 0
    prior_forward: int = 0
    prior_backward: int = 0
    reused: int = 0

    @property
    def forward_equivalents(self) -> int:
        return self.forward + self.backward

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, name) + getattr(other, name) for name in vars(self)))

    @classmethod
    def from_dict(cls, counts: dict) -> "Cost":
        """Inverse of to_dict, which also has the sum."""
        return cls(**{name: counts[name] for name in vars(cls()) if name in counts})

    def to_dict(self) -> dict:
        return dict(vars(self)) | {"forward_equivalents": self.forward_equivalents}


@dataclass
class Objective:
    """The frozen models and the weight of the prior.

    ldm: frozen LayoutLDM or DiT. prior: frozen layout prior with `.loss(embeddings, t, noise) -> (B,)`, or None.
    weight: of the prior's term. reduction: "mean" (error per element: each term is a mean over its elements) or
    "sum" (each term is a sum, so that the larger tensor dominates). chunk: most samples in one network call.
    loss: "l2" or "l1", for the image term.
    """

    ldm: LayoutLDM
    prior: torch.nn.Module | None = None
    weight: float = 1.0
    reduction: str = "mean"
    chunk: int = 256
    loss: str = "l2"
    cost: Cost = field(default_factory=Cost)

    def __post_init__(self):
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {self.reduction!r}")
        if self.loss not in ("l2", "l1"):
            raise ValueError(f"loss must be 'l2' or 'l1', got {self.loss!r}")

    @property
    def uses_prior(self) -> bool:
        return self.prior is not None and self.weight > 0

    def image_errors(self, latents: torch.Tensor, context: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """Error maps (B, h, w), mean over channels, of latents (B, 4, h, w), context (B, L, c) and B pairs."""
        z_t = self.ldm.schedule.add_noise(latents, pairs.noise, pairs.t)
        error = self.ldm.predict_noise(z_t, pairs.t, context) - pairs.noise
        return (error.square() if self.loss == "l2" else error.abs()).mean(1)

    def image_losses(self, latents: torch.Tensor, context: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """(B,) the first term of equation 5."""
        losses = self.image_errors(latents, context, pairs).flatten(1).mean(1)
        return losses * latents[0].numel() if self.reduction == "sum" else losses

    def prior_losses(self, embeddings: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """(B,) the second term of equation 5 with its weight; embeddings (B, N, 5, d), B pairs."""
        losses = self.weight * self.prior.loss(embeddings, pairs.t, pairs.prior_noise)
        return losses * embeddings[0].numel() if self.reduction == "sum" else losses

    @torch.enable_grad()
    def image_gradients(self, latents: torch.Tensor, context: torch.Tensor,
                        pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
        """`image_losses` (B,) and the gradient of each with respect to its own context (B, L, c)."""
        leaf = context.detach().requires_grad_()
        losses = self.image_losses(latents, leaf, pairs)
        return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]

    @torch.no_grad()
    def evaluate(self, latents: torch.Tensor, tokens: torch.Tensor, pairs: Pairs, *,
                 prior: bool = True) -> torch.Tensor:
        """The objective of layouts, mean over pairs: latents (B, 4, h, w) -> (B,).

        tokens: (B, N, F), or embeddings (B, N, F, d) that need not be in the vocabulary.
        """
        values = self.error_maps(latents, tokens, pairs).flatten(1).mean(1)
        if self.reduction == "sum":
            values = values * latents[0].numel()
        if prior and self.uses_prior:
            embeddings = self.embeddings(tokens)
            for b, k in _chunks(len(tokens), len(pairs), self.chunk, latents.device):
                part = self.prior_losses(embeddings[b], pairs[k])
                values = values.index_add(0, b, part / len(pairs))
            self.cost.prior_forward += len(tokens) * len(pairs)
        return values

    @torch.no_grad()
    def error_maps(self, latents: torch.Tensor, tokens: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """(B, h, w) image error of layouts (tokens or embeddings) per latent position, mean over all pairs."""
        context = self.ldm.context(self.embeddings(tokens))
        maps = latents.new_zeros(len(tokens), *latents.shape[2:])
        for b, k in _chunks(len(tokens), len(pairs), self.chunk, latents.device):
            maps.index_add_(0, b, self.image_errors(latents[b], context[b], pairs[k]).float() / len(pairs))
        self.cost.forward += len(tokens) * len(pairs)
        return maps

    @torch.no_grad()
    def losses_per_pair(self, latents: torch.Tensor, tokens: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """(B, P) image loss of discrete layouts on every pair."""
        index = torch.arange(len(tokens) * len(pairs), device=latents.device)
        layout = index // len(pairs)
        return self.losses_at(latents, tokens, pairs, layout, layout, index % len(pairs)).view(-1, len(pairs))

    @torch.no_grad()
    def losses_at(self, latents: torch.Tensor, tokens: torch.Tensor, pairs: Pairs, image: torch.Tensor,
                  layout: torch.Tensor, pair: torch.Tensor) -> torch.Tensor:
        """(n,) image loss of latents[image] under tokens[layout] on pairs[pair], all three (n,) indices."""
        encoded = [self.ldm.context(self.ldm.vocabulary(part)) for part in tokens.split(ENCODED)]
        context = encoded[0] if len(encoded) == 1 else torch.cat(encoded)
        parts = [self.image_losses(latents[i], context[b], pairs[k])
                 for i, b, k in zip(*(index.split(self.chunk) for index in (image, layout, pair)))]
        self.cost.forward += len(image)
        return torch.cat(parts)

    def embeddings(self, tokens: torch.Tensor) -> torch.Tensor:
        """v_theta(y) of tokens (B, N, F); embeddings (B, N, F, d) are given back as they are."""
        return tokens if tokens.is_floating_point() else self.ldm.vocabulary(tokens)


def _chunks(batch: int, pairs: int, size: int, device):
    """Index tensors (layout, pair) of all combinations, layout by layout, `size` at a time."""
    index = torch.arange(batch * pairs, device=device)
    for part in index.split(size):
        yield part // pairs, part % pairs
