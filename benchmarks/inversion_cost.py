"""Seconds and forward-equivalents per image of the optimiser, on the trained models of a profile.

    python -m benchmarks.inversion_cost                      # runs/mini, 20 steps
    python -m benchmarks.inversion_cost --steps 200 --repeats 3 --images 40

Compared: one image at a time and many in a batch; with and without memoised states; float32 and bfloat16 (the loop of
`dive_lib.inversion`, monitor included). Then the gradient step alone: of the condition only, the same with matrix
products in place of `dive_lib.sequence_linear`, of all weights as well; eager and compiled. Memoised states pay off the
more, the longer a run is: early steps visit new states. Images are those of the validation split's tuning subset.
`reused` are samples per image that the memo spared.
"""

import argparse
import copy
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import measure
from dive_lib import dataset, detections, parameters, paths
from dive_lib.inversion import InversionConfig, invert
from dive_lib.objective import Objective, Pairs
from dive_lib.sequence_linear import use_matrix_products


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, default=40, help="images of the largest batch")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 10, 40])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; benchmarks/results by default")
    options = parser.parse_args(arguments)
    settings = parameters.load(options.profile)["detection"]
    search = parameters.named("searches", "straight_through", settings["search"])
    inversion = search | {"steps": options.steps, "seed": settings["seed"]}
    spec = describe(options.profile, settings, inversion, options.images)
    runner, ids = detections.Runner(spec), spec["image_ids"]
    latents = runner.latents(ids)
    half = detections.Runner(spec | {"execution": spec["execution"] | {"bf16": True}}).objective
    rows = loop_rows(runner.objective, half, latents, inversion, options)
    rows += gradient_rows(runner.objective, latents, InversionConfig(**inversion), options)
    chosen = {"profile": options.profile, "images": len(ids), "repeats": options.repeats, "inversion": inversion}
    return measure.save("inversion_cost", chosen, rows, arguments=measure.given(arguments), folder=options.out)


def describe(profile: str, settings: dict, inversion: dict, images: int) -> dict:
    """A run of the frozen models of a profile, with its objective, on validation images."""
    data, runs = dataset.load(profile), paths.runs(profile)
    return detections.make_spec(
        data=str(data.root), split=data.names["val"], train_split=data.names["train"],
        image_ids=data.subsets["tuning"][:images], first_stage=str(runs / "first_stage"),
        layout_ldm=str(runs / "layout_ldm"), prior=[str(runs / "layout_prior")], inversion=inversion,
        objective=settings["objective"], execution=settings["execution"])


def loop_rows(objective: Objective, half: Objective, latents: torch.Tensor, inversion: dict,
              options: argparse.Namespace) -> list[dict]:
    """The whole loop: rows per batch size, without the memo, and with networks in bfloat16, `half`."""
    batches = [size for size in dict.fromkeys(options.batches) if size <= len(latents)] or [len(latents)]
    most = max(batches)
    config = InversionConfig(**inversion)
    variants = [("loop", objective, size, config) for size in batches]
    variants += [("loop, without memoised states", objective, most, replace(config, memoise=False)),
                 ("loop, bfloat16", half, most, config)]
    return [loop_row(*variant, latents, options.repeats) for variant in variants]


def loop_row(name: str, objective: Objective, batch: int, config: InversionConfig, latents: torch.Tensor,
             repeats: int) -> dict:
    """Inverts images `batch` at a time. Of single images only a few are inverted: each costs about the same."""
    images = latents[:max(batch, min(5, len(latents)))]
    images = images[:len(images) // batch * batch]
    results = []

    def run():
        results[:] = [result for part in images.split(batch) for result in invert(objective, part, config)]

    device = latents.device.type
    with measure.quiet():
        invert(objective, images[:batch], replace(config, steps=1))
        total = measure.seconds(run, repeats=repeats, warmup=0, device=device)
    count, half = len(images), objective.ldm.network.dtype is torch.bfloat16
    return {"what": name, "images_at_once": batch, "precision": "bf16" if half else "fp32",
            "steps": config.steps, "seconds_per_image": total / count,
            "forward_equivalents_per_image": sum(r.cost.forward_equivalents for r in results) / count,
            "reused_per_image": sum(r.cost.reused for r in results) / count,
            "mean_monitor": sum(r.monitor for r in results) / count}


def gradient_rows(objective: Objective, latents: torch.Tensor, config: InversionConfig,
                  options: argparse.Namespace) -> list[dict]:
    """The gradient step of all images, without memo and monitor: condition only, with weights, compiled."""
    rows = [gradient_row("gradient step, condition only", objective, latents, config, options),
            gradient_row("gradient step, matrix products", with_matrix_products(objective), latents, config, options),
            gradient_row("gradient step, with weights", objective, latents, config, options, weights=True)]
    if options.no_compile:
        return rows + [{"what": "gradient step, compiled", "skipped": "--no-compile"}]
    ldm, eager = objective.ldm, objective.ldm.unet
    try:
        ldm.unet = torch.compile(eager)
        rows.append(gradient_row("gradient step, compiled", objective, latents, config, options))
    except Exception as error:  # no C++ compiler, or an operator that it cannot translate
        reason = str(error).strip().splitlines()
        rows.append({"what": "gradient step, compiled", "skipped": f"{type(error).__name__}: {' '.join(reason[:1])}"})
    finally:
        ldm.unet = eager
        torch.compiler.reset()
    return rows


def with_matrix_products(objective: Objective) -> Objective:
    """A copy with PyTorch's own linear maps, without `dive_lib.sequence_linear`."""
    objective = copy.deepcopy(objective)
    objective.ldm = use_matrix_products(objective.ldm)
    return objective


def gradient_row(name: str, objective: Objective, latents: torch.Tensor, config: InversionConfig,
                 options: argparse.Namespace, *, weights: bool = False) -> dict:
    """One step's gradient with respect to the embeddings, timed and scaled to a run of `steps` steps.

    weights: gradients of all weights are computed as well, as `loss.backward()` on an unfrozen model does; that is
    one more pass of matrix products, counted as one more forward-equivalent.
    """
    ldm, device = objective.ldm, latents.device.type
    pairs = Pairs.draw(ldm, config.timesteps[:config.batch], torch.Generator().manual_seed(config.seed))
    count, samples = len(latents), len(latents) * len(pairs)
    v = ldm.vocabulary(ldm.grid.empty(count).to(latents.device)).detach().requires_grad_()
    rows = torch.arange(count, device=latents.device).repeat_interleave(len(pairs))
    columns = torch.arange(len(pairs), device=latents.device).repeat(count)

    def step():
        ldm.zero_grad(set_to_none=True)
        v.grad = None
        context = ldm.context(v)
        leaf = context.detach().requires_grad_()  # the encoder is passed once per image, as in the library
        for r, c in zip(rows.split(objective.chunk), columns.split(objective.chunk)):
            losses = objective.image_losses(latents[r], leaf[r], pairs[c])
            (losses.sum() / len(pairs)).backward()
        context.backward(leaf.grad)

    ldm.requires_grad_(weights)
    try:
        began = time.perf_counter()
        step()
        first = time.perf_counter() - began
        median = measure.seconds(step, repeats=options.repeats, device=device)
    finally:
        ldm.requires_grad_(False)
        ldm.zero_grad(set_to_none=True)
    return {"what": name, "images_at_once": count, "precision": "fp32", "steps": config.steps,
            "seconds_per_image": median * config.steps / count,
            "forward_equivalents_per_image": (3 if weights else 2) * samples * config.steps / count,
            "ms_per_sample": median * 1000 / samples, "first_call_seconds": first}


if __name__ == "__main__":
    main()
