"""The class of an image as DIVE's condition: a layout of one object that has one field.

So tokens are (B, 1, 1) and embeddings (B, 1, 1, d), and nearest-neighbour search, objective and inversion are the
detection's. The last row of the table is [none], the null class with which a class-conditional model is trained for
guidance; it is a state in which inversion may start and no answer.
"""

from collections.abc import Sequence

import torch
from torch import nn

from dive_lib.schedule import ConditionalDenoiser


class ClassGrid:
    """What the tokens mean. classes: names, or their number K; index = token, K = [none]."""

    slots = 1

    def __init__(self, classes: Sequence[str] | int):
        self.classes = tuple(str(k) for k in range(classes)) if isinstance(classes, int) else tuple(classes)
        if not self.classes:
            raise ValueError("a class-conditional model needs at least one class")

    @property
    def vocabulary_sizes(self) -> tuple[int]:
        """Entries of the one field without [none]; the index of [none] is the same number."""
        return (len(self.classes),)

    @property
    def none_tokens(self) -> torch.Tensor:
        """(1,) the null class."""
        return torch.tensor(self.vocabulary_sizes)

    def empty(self, batch: int) -> torch.Tensor:
        """(batch, 1, 1) null classes: the initial state of the paper's text."""
        return self.none_tokens.expand(batch, 1, 1).clone()

    def encode(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels (B,) to tokens (B, 1, 1). Raises ValueError for one that is neither a class nor the null class."""
        outside = labels[(labels < 0) | (labels > len(self.classes))]
        if len(outside):
            raise ValueError(f"label {int(outside[0])} is not one of the {len(self.classes)} classes "
                             f"(0 to {len(self.classes) - 1}) nor the null class {len(self.classes)}")
        return labels.long().view(-1, 1, 1)


class ClassVocabulary(nn.Module):
    """The table of class embeddings (K + 1, d), [none] last. width: d. std: of the initial entries (DiT: 0.02)."""

    def __init__(self, grid: ClassGrid, width: int, *, std: float = 0.02):
        super().__init__()
        self.grid, self.width = grid, width
        self.class_table = nn.Parameter(torch.randn(len(grid.classes) + 1, width) * std)

    def table(self, field: int) -> torch.Tensor:
        """(K + 1, d) the vocabulary of the only field, 0."""
        if field != 0:
            raise IndexError(f"a class condition has the field 0 only, not {field}")
        return self.class_table

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Vocabulary lookup v_theta(y): tokens (..., 1, 1) -> embeddings (..., 1, 1, d)."""
        return self.class_table[tokens]

    @torch.no_grad()
    def strangers(self, count: int) -> torch.Tensor:
        """(count, d) entries that no image is of: drawn from the Gaussian with the table's mean and covariance."""
        table = self.class_table[:-1]
        generator = torch.Generator().manual_seed(0)  # one at a time: more strangers leave the first ones as they are
        draws = torch.stack([torch.randn(len(table), generator=generator) for _ in range(count)]).to(table)
        return table.mean(0) + draws @ (table - table.mean(0)) / max(1, len(table) - 1) ** 0.5

    @property
    def std(self) -> float:
        """Standard deviation over all entries: the scale that learning rates refer to."""
        return self.class_table.detach().std().item()


class ClassConditional(ConditionalDenoiser):
    """eps_theta(z_t, t, v_theta(y)) of a class y: what every such model has beside its network.

    It has `grid`, `vocabulary`, `schedule`, `config`, `network`, `latent_shape` (C, h, w), and `predict_noise`.
    """

    grid: ClassGrid
    vocabulary: ClassVocabulary

    def context(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(B, 1, 1, d) -> (B, d): the class embedding itself."""
        return embeddings[:, 0, 0]
