"""In-vocabulary search (equation 6): v' = sg[NN(v) - v] + v.

The forward pass sees the nearest vocabulary entries, the gradient goes to the continuous embedding as if the
search for the nearest entry were the identity. Each field is searched in its own vocabulary.
"""

import torch
import torch.nn.functional as F

from dive_lib.class_vocabulary import ClassVocabulary
from dive_lib.layout import illegal_boxes
from dive_lib.vocabulary import LayoutVocabulary


def nearest_tokens(v: torch.Tensor, vocabulary: LayoutVocabulary | ClassVocabulary, metric: str = "cosine", *,
                   exclude_none: bool = False) -> torch.Tensor:
    """NN(v) as indices (equations 6 and 7): embeddings (B, N, F, d) -> tokens (B, N, F), F = 5 fields of a layout or 1
    of a class.

    metric: "cosine" (the paper's default) or "l2". exclude_none: search among the entries other than [none].
    """
    fields = []
    for field in range(v.shape[-2]):
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


def open_illegal_pairs(tokens: torch.Tensor, none: torch.Tensor) -> torch.Tensor:
    """Sets the two coordinates of an axis to [none] where low >= high: (B, N, 5) -> (B, N, 5).

    No training layout has such a box. The model sees no pixel in it, so its gradient is nil and the slot is dead; at
    [none] the gradient again says where an object would help. An addition of ours.
    """
    tokens = tokens.clone()
    for low, high in ((1, 3), (2, 4)):
        given = (tokens[..., low] != none[low]) & (tokens[..., high] != none[high])
        illegal = given & (tokens[..., low] >= tokens[..., high])
        tokens[..., low][illegal], tokens[..., high][illegal] = none[low], none[high]
    return tokens


def legal_objects(tokens: torch.Tensor, v: torch.Tensor, vocabulary: LayoutVocabulary,
                  metric: str = "cosine", least: int = 3) -> torch.Tensor:
    """Reads (B, N, 5) as whole objects with legal boxes: what is scored is what decoding would keep.

    An object with at least `least` tokens other than [none] gets its nearest entries other than [none] for the
    rest; any other object, and one with low >= high, becomes empty. An addition of ours (the paper drops half and
    illegal objects only at the end, and its monitor sees them).
    """
    none = vocabulary.grid.none_tokens.to(tokens.device)
    whole = (tokens != none).sum(-1, keepdim=True) >= least
    completed = torch.where(whole, nearest_tokens(v, vocabulary, metric, exclude_none=True), none)
    return torch.where(illegal_boxes(completed[..., 1:])[..., None], none, completed)
