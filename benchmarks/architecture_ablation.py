"""What the small model's switches do: layout LDMs trained as in notebook 03, with and without them, by their loss gaps
and by what DIVE finds with them.

    python -m benchmarks.architecture_ablation                        # runs/mini, 1000 steps per variant
    python -m benchmarks.architecture_ablation --steps 4500 --only mini published_encoder

A loss gap is the rise of the held-out image loss when the true layout is corrupted (`dive_lib.diagnosis`): a model that
does not read its layout has none. All variants see the same data, batches and noises. A stopped training continues.
Share: of the held-out scenes in which the corrupted layout has the higher loss; 0.5 is chance. AP: of DIVE on
validation images without a prior, since a prior belongs to the vocabulary that a layout LDM learns; difference: to the
first variant's, paired over images. How far two trainings of one variant lie apart it does not hold.
"""

import argparse
from pathlib import Path

import torch

from benchmarks import measure, searches
from dive_lib import checkpoint, dataset, first_stage, layout_training, parameters, paths
from dive_lib.dataset import Dataset
from dive_lib.detection_results import evaluate_run
from dive_lib.diagnosis import corruptions, gap_table
from dive_lib.first_stage import FirstStage
from dive_lib.latents import LayoutTokens, cached_latents
from dive_lib.layout_ldm import LayoutLDM
from dive_lib.train import TrainingConfig

RANGES = [(0, 100), (100, 300), (300, 500), (500, 700), (700, 1000)]
SUMMARY = (300, 500)  # where the layout decides the picture
NO_DROPOUT = {"partial": 0.0, "objects": 0.0, "layouts": 0.0}
HIDDEN = {"layers": 2, "linear": False}  # the encoder with a transformer and a hidden layer
PUBLISHED = {"position_attention": False, "encoder": HIDDEN | {"object_tokens": False}}

# name -> model: changes to the architecture (dictionaries are merged); dropout, focus: in place of the profile's.
VARIANTS = {
    "mini": {"model": {}},
    "without_position_attention": {"model": {"position_attention": False}},
    "without_linear_condition": {"model": {"encoder": HIDDEN}},
    "without_field_dropout": {"model": {}, "dropout": NO_DROPOUT},
    "all_timesteps_alike": {"model": {}, "focus": {"low": 0, "high": 1000, "share": 0.0}},  # equation 1 as it stands
    "drawn_coordinates": {"model": {"vocabulary": {"init": "normal"}}},
    "published_encoder": {"model": PUBLISHED},  # one context token per field
    "published_encoder_wide": {"model": PUBLISHED | {"vocabulary": {"width": 128}}},  # as wide as the object tokens
    "published_form": {"model": PUBLISHED, "dropout": NO_DROPOUT},
}


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--images", type=int, default=200, help="held-out images for the gaps")
    parser.add_argument("--draws", type=int, default=4, help="(t, noise) pairs per image, layout and range")
    parser.add_argument("--invert", type=int, default=100, help="validation images that DIVE inverts, of `tuning`")
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; benchmarks/results by default")
    options = parser.parse_args(arguments)
    settings = parameters.load(options.profile)["layout_ldm"]
    data = dataset.load(options.profile)
    autoencoder = first_stage.load(paths.runs(options.profile) / "first_stage").to(first_stage.device())
    cache = paths.scratch() / "latents"
    held_out = cached_latents(autoencoder, data.val, cache, label="validation latents")[:options.images]
    truth = LayoutTokens(data.val, data.grid).tokens[:options.images]
    wrong = corruptions(truth, data.grid, torch.Generator().manual_seed(settings["seed"]))
    annotations, ids = data.annotations("val"), data.subsets["tuning"][:options.invert]
    rows, gaps, reference = [], [], None
    for name in options.only:
        row, model = trained(name, settings, options.steps, data, autoencoder)
        table = gap_table(model, held_out, truth, wrong, ranges=RANGES, draws=options.draws, seed=settings["seed"])
        gaps += [{"variant": name} | line for line in table]
        results = inverted(name, model, options.profile, data, ids)
        found = evaluate_run(annotations, results, ids, resamples=500)
        rows.append(row | {key: found[key] for key in ("AP", "AP_ci95", "AP50")}
                    | searches.difference(annotations, [results], reference, ids) | summary(table))
        reference = reference or [results]
        print(measure.markdown(rows[-1:]))
    chosen = {"profile": options.profile, "steps": options.steps, "images": len(truth), "draws": options.draws,
              "inverted": options.invert, "training": settings,
              "variants": {name: VARIANTS[name] for name in options.only},
              "summary_range": SUMMARY}
    return measure.save("architecture_ablation", chosen, rows, arguments=measure.given(arguments), folder=options.out,
                        gaps=gaps)


def architecture(variant: dict, name: str) -> dict:
    """Arguments of LayoutLDM: the named architecture with the variant's changes."""
    base = parameters.named("architectures", "layout_ldm", name)
    changes = {key: base[key] | value if isinstance(value, dict) else value for key, value in variant["model"].items()}
    return base | changes


def trained(name: str, settings: dict, steps: int, data: Dataset, autoencoder: FirstStage) -> tuple[dict, LayoutLDM]:
    """Trains a variant. settings: the profile's group `layout_ldm`."""
    variant = VARIANTS[name]
    config = TrainingConfig(steps=steps, lr=settings["lr"], batch_size=settings["batch_size"],
                            seed=settings["seed"], **settings["optimiser"])
    model, losses = layout_training.obtain(
        data, autoencoder, architecture(variant, settings["architecture"]), config, label=name, kind=settings["loss"],
        dropout=variant.get("dropout", settings["dropout"]), focus=variant.get("focus", settings["focus"]))
    last = losses[-max(1, len(losses) // 10):]
    return {"variant": name, "parameters": sum(p.numel() for p in model.parameters()), "steps": steps,
            "training_loss": sum(last) / len(last)}, model.requires_grad_(False).eval()


def inverted(name: str, model: LayoutLDM, profile: str, data: Dataset, ids: list[int]) -> list[dict]:
    """Results of the paper's optimiser without a prior on these validation images."""
    folder = paths.runs(profile) / "benchmarks" / f"architecture_{name}"
    checkpoint.save_model(folder / "layout_ldm", model, model.config)
    spec = searches.specification({"inversion": {}, "weight": 0.0}, 0, profile, data, ids,
                                  layout_ldm=folder / "layout_ldm")
    return searches.obtained(folder / "detected", spec, label=name)


def summary(table: list[dict]) -> dict:
    """The columns of the short table: gap and share of each corruption in one range of timesteps."""
    chosen = [row for row in table if (row["t_low"], row["t_high"]) == SUMMARY]
    columns = {"held_out_loss": chosen[0]["true_loss"]}
    for row in chosen:
        columns |= {f"{row['corruption']}_gap": row["gap"], f"{row['corruption']}_share": row["share"]}
    return columns


if __name__ == "__main__":
    main()
