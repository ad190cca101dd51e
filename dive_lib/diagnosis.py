"""Diagnosis: do the losses prefer the truth, and where inversion fails, did the search or the model fail?"""

from functools import partial

import torch

from dive_lib.dit import DiT
from dive_lib.evaluation import coco_average_precision
from dive_lib.layout import LayoutGrid, shuffle_slots
from dive_lib.layout_ldm import LayoutLDM
from dive_lib.objective import Objective, Pairs
from dive_lib.provenance import cores
from dive_lib.side_by_side import side_by_side
from dive_lib.vocabulary import LayoutVocabulary


def corruptions(tokens: torch.Tensor, grid: LayoutGrid, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Wrong layouts of the same images, each (B, N, 5): what a detector must tell from the truth (B, N, 5)."""
    first = _first_objects(tokens, grid)
    rows = torch.arange(len(tokens))
    dropped = tokens.clone()
    dropped[rows, first] = grid.none_tokens
    return {"empty": grid.empty(len(tokens)), "moved_16px": moved(tokens, grid, 16),
            "moved_4px": moved(tokens, grid, 4), "wrong_class": wrong_class(tokens, grid, generator),
            "one_dropped": dropped}


def moved(tokens: torch.Tensor, grid: LayoutGrid, pixels: float) -> torch.Tensor:
    """All boxes moved sideways by `pixels`: to the right where there is room, otherwise to the left."""
    present = (tokens != grid.none_tokens).all(-1)
    bins = max(1, round(pixels / grid.pixels_per_bin))
    room = (torch.where(present, tokens[..., 3], 0).amax(1) + bins) < grid.bins
    step = torch.where(room, bins, -bins)[:, None]
    result = tokens.clone()
    for field in (1, 3):
        shifted = (tokens[..., field] + step).clamp(0, grid.bins - 1)
        result[..., field] = torch.where(present, shifted, tokens[..., field])
    return result


def wrong_class(tokens: torch.Tensor, grid: LayoutGrid, generator: torch.Generator) -> torch.Tensor:
    """One object of each layout gets another class."""
    first, rows = _first_objects(tokens, grid), torch.arange(len(tokens))
    classes = len(grid.classes)
    offset = torch.randint(1, max(2, classes), (len(tokens),), generator=generator)
    result = tokens.clone()
    old = tokens[rows, first, 0]
    result[rows, first, 0] = torch.where(old < classes, (old + offset) % classes, old)
    return result


def layout_corruptions(tokens: torch.Tensor, grid: LayoutGrid, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Implausible layouts (B, N, 5), for the prior. `shuffled`: coordinates exchanged between layouts, class and box
    taken apart; `duplicated`: one object twice; `wrong_class`; `illegal`: x1 and x2 exchanged; `empty`."""
    present = (tokens != grid.none_tokens).all(-1)
    flat = tokens[present]
    shuffled = tokens.clone()
    shuffled[present] = torch.stack([flat[torch.randperm(len(flat), generator=generator), f] for f in range(5)], dim=1)
    duplicated = tokens.clone()
    rows, first = torch.arange(len(tokens)), _first_objects(tokens, grid)
    free = present.float().argmin(1)
    duplicated[rows, free] = tokens[rows, first]
    illegal = tokens.clone()
    illegal[present] = flat[:, [0, 3, 2, 1, 4]]
    return {"shuffled": shuffled, "duplicated": duplicated, "wrong_class": wrong_class(tokens, grid, generator),
            "illegal": illegal, "empty": grid.empty(len(tokens))}


def gap_table(ldm: LayoutLDM, latents: torch.Tensor, truth: torch.Tensor, wrong: dict[str, torch.Tensor], *,
              ranges: list[tuple[int, int]], draws: int, seed: int) -> list[dict]:
    """Rise of the image loss by each corruption and range of timesteps: rows for figures.gap_heatmap.

    latents (B, 4, h, w), truth (B, N, 5). Every layout of an image is evaluated on the same `draws` (t, noise), at
    evenly spaced t. Columns as of `gap_rows`.
    """
    pairs = []
    for low, high in ranges:
        step = max(1, (high - low) // draws)
        t = torch.arange(low + step // 2, high, step)[:draws]
        pairs.append(Pairs.draw(ldm, t, torch.Generator().manual_seed(seed + low), prior=False))
    return gap_rows(ldm, latents, truth, wrong, ranges, pairs)


def gap_rows(model: LayoutLDM | DiT, latents: torch.Tensor, truth: torch.Tensor, wrong: dict[str, torch.Tensor],
             ranges: list[tuple[int, int]], pairs: list[Pairs]) -> list[dict]:
    """Rows {corruption, t_low, t_high, true_loss, gap, share}: every condition of an image on the same pairs.

    latents (B, C, h, w), truth and each of wrong (B, N, F) on any device; pairs: those of each range, on the model's.
    share: of the images in which the wrong condition has the higher loss.
    """
    objective, device = Objective(model), model.vocabulary.class_table.device
    latents = latents.to(device)

    @torch.no_grad()
    def of_range(low: int, high: int, drawn: Pairs) -> list[dict]:
        rows, base = [], objective.losses_per_pair(latents, truth.to(device), drawn).mean(1)
        for name, tokens in wrong.items():
            gap = objective.losses_per_pair(latents, tokens.to(device), drawn).mean(1) - base
            rows.append({"corruption": name, "t_low": low, "t_high": high, "true_loss": base.mean().item(),
                         "gap": gap.mean().item(), "share": (gap > 0).float().mean().item()})
        return rows

    rows = side_by_side([partial(of_range, *bounds, drawn) for bounds, drawn in zip(ranges, pairs, strict=True)],
                        cores(), "losses of wrong conditions", "ranges of t")
    return [row for part in rows for row in part]


@torch.no_grad()
def prior_ranking(priors: dict, vocabulary: LayoutVocabulary, truth: torch.Tensor, wrong: dict[str, torch.Tensor], *,
                  seed: int, steps: int = 20, most: int = 1000, batch: int = 500) -> list[dict]:
    """Rise of each prior's loss by each corruption, mean over `steps` timesteps, every layout on the same noises.

    truth and each of wrong (B, N, 5), an object in the same slot in each, where it meets the same noise. Slots are
    shuffled, alike in all, since stored layouts have their objects first. most: of more layouts only so many are taken,
    evenly spread. batch: layouts in one pass. Memory holds the noises of one timestep: 1 GB for 1000 layouts of 100
    slots and width 512.

    Rows {prior, corruption, true_loss, gap, share}. share: of layouts ranked before their corrupted copy, ties by half.
    """
    if len(truth) > most:
        chosen = torch.arange(most) * len(truth) // most
        truth, wrong = truth[chosen], {corruption: tokens[chosen] for corruption, tokens in wrong.items()}
    generator = torch.Generator().manual_seed(seed)
    beside = torch.cat([truth, *wrong.values()], dim=-1)  # so that the slots of all are shuffled alike
    layouts = dict(zip(["", *wrong], shuffle_slots(beside, generator).split(truth.shape[-1], dim=-1)))
    shape = (len(truth), vocabulary.grid.slots, 5, vocabulary.width)
    totals = {(name, corruption): 0 for name in priors for corruption in layouts}
    for k in range(steps):
        noise = torch.randn(shape, generator=generator)
        for name, prior in priors.items():
            device = prior.scale.device
            table = vocabulary.to(device)
            for corruption, tokens in layouts.items():
                parts = [prior.loss(table(part.to(device)), torch.full((len(part),), 25 + 50 * k, device=device),
                                    own.to(device)) for part, own in zip(tokens.split(batch), noise.split(batch))]
                totals[name, corruption] = totals[name, corruption] + torch.cat(parts)
    rows = []
    for name in priors:
        base = totals[name, ""] / steps
        for corruption in wrong:
            gap = totals[name, corruption] / steps - base
            rows.append({"prior": name, "corruption": corruption, "true_loss": base.mean().item(),
                         "gap": gap.mean().item(), "share": (gap.sign() / 2 + 0.5).mean().item()})
    return rows


def class_from_gradient(objective: Objective, latents: torch.Tensor, truth: torch.Tensor, pairs: Pairs,
                        generator: torch.Generator) -> list[dict]:
    """How often the gradient at one layout names the right class of an object whose box is known.

    In each layout of truth (B, N, 5) the first object's class is replaced by [none] or by another class. To first order
    the loss of class b is then L + g . (v_b - v_now) with the gradient g at the replaced layout; straight-through steps
    rely on it. A row for each replacement with the share of images in which the true class has the lowest first-order
    loss (`gradient`) and the lowest loss when every class is evaluated on the same pairs (`evaluation`).
    """
    truth, ldm, rows = truth.cpu(), objective.ldm, torch.arange(len(truth))
    first, table = _first_objects(truth, ldm.grid), ldm.vocabulary.class_table.detach()[:-1]
    right = truth[rows, first, 0].to(table.device)

    def replaced(classes):
        tokens = truth.clone()
        tokens[rows, first, 0] = classes
        return tokens.to(table.device)

    def share(scores):  # (B, classes), the lowest is the guess
        return (scores.argmin(1) == right).float().mean().item()

    losses = [objective.evaluate(latents, replaced(b), pairs, prior=False) for b in range(len(table))]
    table_rows = []
    another = wrong_class(truth, ldm.grid, generator).to(table.device)
    for name, tokens in {"none": replaced(len(table)), "another": another}.items():
        scores = []
        for k in range(len(truth)):
            v = ldm.vocabulary(tokens[k:k + 1]).detach().requires_grad_()
            gradient = torch.zeros_like(v)
            for part in torch.arange(len(pairs)).split(objective.chunk):
                images, context = (x.expand(len(part), *x.shape[1:]) for x in (latents[k:k + 1], ldm.context(v)))
                loss = objective.image_losses(images, context, pairs[part]).mean() * (len(part) / len(pairs))
                gradient += torch.autograd.grad(loss, v)[0]
            scores.append(table @ gradient[0, first[k], 0])
        table_rows.append({"class": name, "gradient": share(torch.stack(scores)),
                           "evaluation": share(torch.stack(losses, 1))})
    return table_rows


def failures(found: torch.Tensor, true: torch.Tensor, perfect: list[bool]) -> dict:
    """Why images are imperfect. found, true (B,): the objective of the found and of the true layout.

    Search failure: the truth has the lower loss and was not found. Model failure: what was found has the lower loss.
    """
    worse = (found > true).tolist()
    imperfect = [k for k, good in enumerate(perfect) if not good]
    search = sum(worse[k] for k in imperfect)
    count = max(1, len(imperfect))
    return {"perfect": sum(perfect), "imperfect": len(imperfect), "search_failures": search,
            "model_failures": len(imperfect) - search, "search_failure_share": search / count,
            "mean_found": found.mean().item(), "mean_true": true.mean().item()}


def perfect_images(ground_truth: dict, detections: list[dict], image_ids: list[int]) -> list[bool]:
    """Whether an image's detections are exactly its objects: IoU of at least 0.5, right class, none in excess."""
    result = []
    for image_id in image_ids:
        own = [d | {"score": 1.0} for d in detections if d["image_id"] == image_id]
        objects = [a for a in ground_truth["annotations"] if a["image_id"] == image_id and not a.get("iscrowd", 0)]
        exact = len(own) == len(objects)
        if exact and objects:
            exact = coco_average_precision(ground_truth, own, [image_id])["AP50"] > 99.99
        result.append(bool(exact))
    return result


def _first_objects(tokens: torch.Tensor, grid: LayoutGrid) -> torch.Tensor:
    """(B,) slot of each layout's first object (0 where there is none)."""
    return (tokens != grid.none_tokens).all(-1).float().argmax(1)
