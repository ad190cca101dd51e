"""Detection runs: many images, image by image on disk (`image_runs`), and as COCO results.

    python -m dive_lib.detections FOLDER --shard 0/2
    python -m dive_lib.detections FOLDER --shard 1/2
"""

import time
from dataclasses import asdict
from pathlib import Path

import torch

from dive_lib import checkpoint, first_stage, image_runs, layout_ldm, layout_prior, paths
from dive_lib.coco import CocoLayouts, read_split, to_original
from dive_lib.execution import Execution
from dive_lib.inversion import InversionConfig, Inverted, invert, monitor_pairs
from dive_lib.latents import LayoutTokens, load_images
from dive_lib.local_search import LocalSearch, SearchConfig, box_proposals
from dive_lib.objective import Objective, Pairs


def make_spec(*, data: str, split: str, image_ids: list[int], first_stage: str, layout_ldm: str,
              prior: list[str] = (), objective: dict | None = None, inversion: dict | None = None,
              search: dict | None = None, start: str = "none", batch: int = 40, train_split: str = "train",
              execution: dict | None = None) -> dict:
    """Describes a run. Paths are relative to the repository root.

    prior: no folder, one (the joint prior) or two (classes and boxes). objective: weight, reduction, loss.
    inversion, search: settings of InversionConfig and SearchConfig; with both, inversion starts at the search's
    result; with neither there is nothing to run. start: "none", or "truth" (the diagnosis of the objective).
    execution: settings of Execution.
    """
    if inversion is None and search is None:
        raise ValueError("a run needs inversion settings, search settings or both")
    if start not in ("none", "truth"):
        raise ValueError(f"start must be 'none' or 'truth', got {start!r}")
    InversionConfig(**(inversion or {}))
    SearchConfig(**(search or {}))
    weights = {str(folder): checkpoint.weights_fingerprint(folder)
               for folder in (first_stage, layout_ldm, *prior)}
    return {"data": str(data), "split": split, "train_split": train_split, "image_ids": list(image_ids),
            "first_stage": str(first_stage), "layout_ldm": str(layout_ldm), "prior": [str(p) for p in prior],
            "objective": objective or {}, "inversion": inversion, "search": search, "start": start, "batch": batch,
            "weights": weights, "execution": asdict(Execution(**(execution or {})))}


prepare, collect = image_runs.prepare, image_runs.collect


def run(directory: Path | str, spec: dict, *, workers: int = 1, label: str = "detection") -> list[dict]:
    """All results of a spec, in the order of its image ids; see `image_runs.run`."""
    return image_runs.run(directory, spec, Runner, workers=workers, label=label)


def run_shard(directory: Path | str, shard: int = 0, shards: int = 1) -> None:
    """Computes the missing results of every `shards`-th batch, from the `shard`-th on."""
    image_runs.run_shard(directory, Runner, shard, shards)


class Runner:
    """The frozen models and the data of a spec."""

    def __init__(self, spec: dict):
        self.spec = spec
        device = first_stage.device()
        for folder, weights in spec["weights"].items():
            if checkpoint.weights_fingerprint(folder) != weights:
                raise ValueError(f"{folder}: the weights have changed since the run was described; describe it anew")
        self.first_stage = first_stage.load(paths.ROOT / spec["first_stage"]).to(device)
        self.ldm = layout_ldm.load(paths.ROOT / spec["layout_ldm"]).to(device)
        prior = [paths.ROOT / folder for folder in spec["prior"]]
        load_prior = layout_prior.load_decoupled if len(prior) == 2 else layout_prior.load
        prior = load_prior(*prior) if prior else None
        objective = Objective(self.ldm, prior.to(device) if prior else None, **spec["objective"])
        self.objective = Execution(**spec["execution"]).prepare(objective)
        grid = self.ldm.grid
        train = read_split(paths.ROOT / spec["data"], spec["train_split"], check_images=False)
        split = read_split(paths.ROOT / spec["data"], spec["split"], categories=train.categories, check_images=False)
        self.layouts = CocoLayouts(split, grid.image_size, grid.slots)
        if spec["search"] is not None:
            self.search = SearchConfig(**spec["search"])
            tokens = LayoutTokens(CocoLayouts(train, grid.image_size, grid.slots), grid).tokens
            self.proposals = box_proposals(tokens, grid, self.search.proposals)
        self.config = self.search.monitor if spec["inversion"] is None else InversionConfig(**spec["inversion"])

    def latents(self, image_ids: list[int]) -> torch.Tensor:
        images = load_images(self.layouts, [self.layouts.index_of(i) for i in image_ids])
        with torch.no_grad():
            return self.first_stage.encode(images.to(self.first_stage.latent_mean.device))

    def truth(self, image_ids: list[int]) -> torch.Tensor:
        """(B, N, 5) tokens of the annotations."""
        generator = torch.Generator().manual_seed(0)
        draws = [self.layouts.draw(self.layouts.index_of(i), generator) for i in image_ids]
        return torch.stack([self.ldm.grid.encode(*draw) for draw in draws])

    def results(self, image_ids: list[int]) -> list[dict]:
        """Inverts one batch and returns the JSON-serialisable results."""
        latents = self.latents(image_ids)
        began = time.perf_counter()
        start = self.truth(image_ids) if self.spec["start"] == "truth" else None
        searched: list[Inverted] = []
        if self.spec["search"] is not None:
            searched = LocalSearch(self.objective, latents, self.search, self.proposals).run()
            start = torch.stack([r.tokens for r in searched])
        results = searched
        if self.spec["inversion"] is not None:
            results = invert(self.objective, latents, self.config, start)
            for result, before in zip(results, searched):
                result.cost = result.cost + before.cost
        concluded = self.conclude(image_ids, results, latents)
        seconds = (time.perf_counter() - began) / len(image_ids)
        return [result | {"seconds": seconds} for result in concluded]

    def conclude(self, image_ids: list[int], results: list[Inverted],
                 latents: torch.Tensor | None = None) -> list[dict]:
        """Scores, decodes and describes layouts of images."""
        latents = self.latents(image_ids) if latents is None else latents
        pairs = monitor_pairs(self.objective, self.config)
        confidences, evaluations = removal_confidence(self.objective, latents, [r.tokens for r in results], pairs)
        return [self.describe(*row) for row in zip(image_ids, results, confidences, evaluations)]

    def describe(self, image_id, result, confidence, confidence_forward) -> dict:
        decoded = self.ldm.grid.decode(result.tokens)
        boxes = to_original(decoded.boxes_xyxy, self.layouts.original_size(self.layouts.index_of(image_id)),
                            self.ldm.grid.image_size)
        categories = self.layouts.categories.ids
        detections = [
            {"image_id": image_id, "category_id": categories[c], "bbox": [round(v, 3) for v in box], "score": score}
            for box, c, score in zip(boxes.tolist(), decoded.class_ids.tolist(), confidence[decoded.slots].tolist())]
        kept = set(decoded.slots.tolist())  # an object with a [none] may have been completed, and then is not dropped
        dropped = [d for d in self.ldm.grid.decode(result.nearest).dropped if d["slot"] not in kept]
        return {"image_id": image_id, "detections": detections, "dropped": dropped,
                "tokens": result.tokens.tolist(), "nearest": result.nearest.tolist(),
                "monitor": result.monitor if result.curve else None,
                "convergence_step": result.convergence_step, "states_visited": result.states_visited,
                "curve": result.curve, "improvements": result.improvements, "cost": result.cost.to_dict(),
                "confidence_forward": confidence_forward}


def removal_confidence(objective: Objective, latents: torch.Tensor, tokens: list[torch.Tensor],
                       pairs: Pairs) -> tuple[torch.Tensor, list[int]]:
    """How much the monitor's image loss rises when an object is removed: (B, N), zero for empty slots.

    Also returns each image's number of denoiser evaluations. The paper gives no rule for scores; the constant 1 is
    reported beside this one.
    """
    tokens = torch.stack(list(tokens)).to(latents.device)
    none = objective.ldm.grid.none_tokens.to(latents.device)
    confidence = torch.zeros(tokens.shape[:2])
    evaluations = []
    for b in range(len(tokens)):
        slots = (tokens[b] != none).all(-1).nonzero()[:, 0]
        evaluations.append((len(slots) + 1) * len(pairs) if len(slots) else 0)
        if len(slots) == 0:
            continue
        candidates = tokens[b].repeat(len(slots) + 1, 1, 1)
        candidates[torch.arange(len(slots)), slots] = none
        losses = objective.evaluate(latents[b].expand(len(candidates), -1, -1, -1), candidates, pairs, prior=False)
        confidence[b, slots.cpu()] = (losses[:-1] - losses[-1]).cpu()
    return confidence, evaluations


if __name__ == "__main__":
    image_runs.command(Runner)
