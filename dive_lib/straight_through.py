"""In-vocabulary search (equation 6): v' = sg[NN(v) - v] + v.

The forward pass sees the nearest vocabulary entries, the gradient goes to the continuous embedding as if the
search for the nearest entry were the identity. Each field is searched in its own vocabulary.
"""

import torch
import torch.nn.functional as F

from dive_lib.vocabulary import LayoutVocabulary


def nearest_tokens(v: torch.Tensor, vocabulary: LayoutVocabulary, metric: str = "cosine", *,
                   exclude_none: bool = False) -> torch.Tensor:
    """NN(v) as indices: embeddings (B, N, 5, d) -> tokens (B, N, 5).

    metric: "cosine" (the paper's default) or "l2". exclude_none: search among the entries other than [none].
    """
    fields = []
    for field in range(5):
        table = vocabulary.table(field)
        fields.append(nearest_rows(v[..., field, :], table[:-1] if exclude_none else table, metric))
    return torch.stack(fields, dim=-1)


def nearest_rows(v: torch.Tensor, table: torch.Tensor, metric: str) -> torch.Tensor:
    """Index of the nearest row of table (V, d) for every vector of v (..., d)."""
    if metric == "cosine":
        return (F.normalize(v, dim=-1) @ F.normalize(table, dim=-1).T).argmax(-1)
    if metric == "l2":
        flat = torch.cdist(v.reshape(1, -1, v.shape[-1]), table[None], compute_mode="donot_use_mm_for_euclid_dist")
        return flat[0].argmin(-1).view(v.shape[:-1])
    raise ValueError(f"metric must be 'cosine' or 'l2', got {metric!r}")


def complete_objects(tokens: torch.Tensor, v: torch.Tensor, vocabulary: LayoutVocabulary,
                     metric: str = "cosine", least: int = 3) -> torch.Tensor:
    """Projects onto layouts without half objects: (B, N, 5) -> (B, N, 5).

    An object with at least `least` tokens other than [none] gets its nearest entries other than [none] for the
    rest; any other object becomes empty. An addition of ours (the paper drops half objects only at the end).
    """
    none = vocabulary.grid.none_tokens.to(tokens.device)
    complete = (tokens != none).sum(-1, keepdim=True) >= least
    return torch.where(complete, nearest_tokens(v, vocabulary, metric, exclude_none=True), none)
