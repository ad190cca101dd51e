"""What the small model's switches do: layout LDMs trained alike with and without them, by their loss gaps.

    python -m benchmarks.architecture_ablation                        # runs/mini, 1000 steps per variant
    python -m benchmarks.architecture_ablation --steps 4500 --only mini published_encoder

A loss gap is the rise of the held-out image loss when the true layout is corrupted (`dive_lib.diagnosis`): a model that
does not read its layout has none. All variants see the same data, batches and noises. A stopped training continues.
Share: of the held-out scenes in which the corrupted layout has the higher loss; 0.5 is chance.
"""

import argparse
import time
from pathlib import Path

import torch

from benchmarks import measure
from dive_lib import dataset, first_stage, parameters, paths
from dive_lib.checkpoint import fingerprint
from dive_lib.diagnosis import corruptions, gap_table
from dive_lib.latents import LayoutTokens, cached_latents
from dive_lib.layout import LayoutGrid
from dive_lib.layout_ldm import LayoutLDM, layout_ldm_loss
from dive_lib.train import TrainingConfig, train

RANGES = [(0, 100), (100, 300), (300, 500), (500, 700), (700, 1000)]
SUMMARY = (300, 500)  # where the layout decides the picture
NO_DROPOUT = {"partial": 0.0, "objects": 0.0, "layouts": 0.0}
HIDDEN = {"layers": 2, "linear": False}  # the encoder with a transformer and a hidden layer
PUBLISHED = {"position_attention": False, "encoder": HIDDEN | {"object_tokens": False}}

# name -> model: changes to the architecture (dictionaries are merged); dropout: in place of the profile's.
VARIANTS = {
    "mini": {"model": {}},
    "without_position_attention": {"model": {"position_attention": False}},
    "without_linear_condition": {"model": {"encoder": HIDDEN}},
    "without_field_dropout": {"model": {}, "dropout": NO_DROPOUT},
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
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; benchmarks/results by default")
    options = parser.parse_args(arguments)
    settings = parameters.load(options.profile)["layout_ldm"]
    data = dataset.load(options.profile)
    autoencoder = first_stage.load(paths.runs(options.profile) / "first_stage").to(first_stage.device())
    cache = paths.scratch() / "latents"
    training = cached_latents(autoencoder, data.train, cache, label="training latents")
    held_out = cached_latents(autoencoder, data.val, cache, label="validation latents")[:options.images]
    layouts = LayoutTokens(data.train, data.grid)
    truth = LayoutTokens(data.val, data.grid).tokens[:options.images]
    wrong = corruptions(truth, data.grid, torch.Generator().manual_seed(settings["seed"]))
    rows, gaps = [], []
    for name in options.only:
        row, model = trained(name, settings, options, data.grid, training, layouts)
        table = gap_table(model, held_out, truth, wrong, ranges=RANGES, draws=options.draws, seed=settings["seed"])
        gaps += [{"variant": name} | line for line in table]
        rows.append(row | summary(table))
        print(measure.markdown(rows[-1:]))
    chosen = {"profile": options.profile, "steps": options.steps, "images": len(truth), "draws": options.draws,
              "training": settings, "variants": {name: VARIANTS[name] for name in options.only},
              "summary_range": SUMMARY}
    return measure.save("architecture_ablation", chosen, rows, folder=options.out, gaps=gaps)


def architecture(variant: dict, name: str) -> dict:
    """Arguments of LayoutLDM: the named architecture with the variant's changes."""
    base = parameters.named("architectures", "layout_ldm", name)
    changes = {key: base[key] | value if isinstance(value, dict) else value for key, value in variant["model"].items()}
    return base | changes


def trained(name: str, settings: dict, options: argparse.Namespace, grid: LayoutGrid, latents: torch.Tensor,
            layouts: LayoutTokens) -> tuple[dict, LayoutLDM]:
    """Trains a variant as the notebook 03_layout_ldm does. settings: the profile's group `layout_ldm`."""
    variant = VARIANTS[name]
    dropout = variant.get("dropout", settings["dropout"])
    torch.manual_seed(settings["seed"])
    model = LayoutLDM(grid, **architecture(variant, settings["architecture"])).to(first_stage.device())
    config = TrainingConfig(steps=options.steps, lr=settings["lr"], batch_size=settings["batch_size"], ema=0.998,
                            warmup=min(100, options.steps // 10), bf16=settings["bf16"], seed=settings["seed"])
    loss_of = layout_ldm_loss(latents, layouts, settings["batch_size"], dropout=dropout, focus=settings["focus"],
                              kind=settings["loss"])
    identity = fingerprint(latents, layouts.tokens, model.config, dropout, settings["focus"], settings["loss"])
    began = time.perf_counter()
    losses = train(model, loss_of, config, scratch=paths.scratch() / "architecture_ablation", identity=identity,
                   label=name)
    last = losses[-max(1, len(losses) // 10):]
    return {"variant": name, "parameters": sum(p.numel() for p in model.parameters()), "steps": options.steps,
            "training_loss": sum(last) / len(last),
            "seconds": time.perf_counter() - began}, model.requires_grad_(False).eval()


def summary(table: list[dict]) -> dict:
    """The columns of the short table: gap and share of each corruption in one range of timesteps."""
    chosen = [row for row in table if (row["t_low"], row["t_high"]) == SUMMARY]
    columns = {"held_out_loss": chosen[0]["true_loss"]}
    for row in chosen:
        columns |= {f"{row['corruption']}_gap": row["gap"], f"{row['corruption']}_share": row["share"]}
    return columns


if __name__ == "__main__":
    main()
