"""Full-size models with random weights on an accelerator: milliseconds, memory, TFLOP/s and share of the chip's rate.

    python -m benchmarks.full_size                     # full size on an accelerator, reduced size without one
    python -m benchmarks.full_size --modes compiled --images 2 --steps "LDM inversion" --add   # keeps the other rows
    python -m benchmarks.full_size --size reduced

Steps: gradient of LDM-8 with respect to the token embeddings (50 pairs), training step of LDM-8 (batch 16, or
`--train-batch`), gradient of the 58M prior, gradient of DiT-XL/2 with respect to the class embedding (batch 25), and
`dive_lib.inversion.invert` as a whole, with draws, optimiser and monitor. images: how many are inverted in one step;
the loop has them two at a time in a call of a network, as the profile paper has.

Precisions: fp32 (matrix products in TF32 where the chip has it) and bf16 (`dive_lib.execution`; a training step keeps
float32 weights under autocast). Modes: eager, and compiled as `dive_lib.execution` does it, which on a GPU also records
CUDA graphs. Compiling takes minutes for each row: with --add they can be measured in several calls, on accelerators of
one kind.
"""

import argparse
import functools
import gc
from itertools import product
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.full_size_models import SIZES, Models
from dive_lib import paths, provenance
from dive_lib.files import read_json
from dive_lib.inversion import InversionConfig, invert

NOTE = "fp32: matrix products in TF32 where the chip has it."
PAPER_STEPS = 2000
PAPER_MINUTES = 50  # per image, on an A100
PRECISIONS = ("fp32", "bf16")
MODES = ("eager", "compiled")
STEPS = ("LDM inversion", "LDM training", "prior inversion", "DiT inversion")
LOOP = "DIVE loop"
TOGETHER = 2  # images in a call of a network in the loop


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--size", default="auto", choices=("auto", *SIZES), help="auto: full on an accelerator")
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--steps", nargs="+", default=[*STEPS, LOOP], choices=(*STEPS, LOOP))
    parser.add_argument("--images", nargs="+", type=int, default=[1], help="images inverted in one step")
    parser.add_argument("--train-batch", type=int, default=None, help="images of the training step; 16 at full size")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; benchmarks/results by default")
    parser.add_argument("--add", action="store_true", help="keep the rows of earlier calls that are not measured again")
    options = parser.parse_args(arguments)
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    size = options.size if options.size != "auto" else "full" if device == "cuda" else "reduced"
    earlier = earlier_result(options.out, device, size) if options.add else None
    reduced = size != "full"
    if reduced:
        print(f"REDUCED SIZE ({size}) on {device}: architectures and batches are small"
              + ("" if device == "cuda" else ", because no accelerator is in use")
              + ". These numbers say nothing about the full-size models.")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True

    rates = {name: measure.matrix_rate(SIZES[size]["matrix"], dtype, device)
             for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    print("matrix product of side {}: ".format(SIZES[size]["matrix"])
          + ", ".join(f"{name} {rate:.3g} TFLOP/s" for name, rate in rates.items()))
    of_size = functools.partial(Models, size, train_batch=options.train_batch)
    counted = {images: {name: measure.flops(build()) for name, build in of_size("fp32", "meta", images=images)
                        .steps().items()} for images in options.images}
    settings = {"device": device, "size": size, "precisions": options.precisions, "modes": options.modes,
                "images": options.images, "repeats": options.repeats,
                "pairs": SIZES[size]["pairs"], "matrix": SIZES[size]["matrix"]}
    facts = {"arguments": measure.given(arguments), "folder": options.out, "reduced": reduced, "matrix_tflops": rates,
             "paper_minutes_per_image": PAPER_MINUTES, "note": NOTE,
             "earlier": [] if earlier is None else calls(earlier)}
    rows, kept = [], [] if earlier is None else earlier["rows"]
    for precision, mode, images, name in product(options.precisions, options.modes, options.images, options.steps):
        if skipped(name, precision, mode, images, options) is not None:
            continue
        models = of_size(precision, device, compiled=mode == "compiled", images=images)
        rows.append(measure_loop(models, mode, counted[images], rates[precision]) if name == LOOP else
                    measure_step(models, name, mode, counted[images][name], rates[precision], options.repeats))
        print(measure.markdown(rows[-1:]), flush=True)
        measure.save("full_size", settings, joined(kept, rows), **facts, show=False)  # the next one may take minutes
    return measure.save("full_size", settings, joined(kept, rows), **facts)


def earlier_result(folder: Path | None, device: str, size: str) -> dict | None:
    """The result that stands in the folder. ValueError where it is of another accelerator, device or size, whose rows
    say nothing beside these."""
    path = (folder or measure.RESULTS) / "full_size.json"
    if not path.is_file():
        return None
    earlier, here = read_json(path), provenance.machine().get("accelerator") or "no GPU"
    settings, gpu = earlier["settings"], earlier["machine"].get("accelerator") or "no GPU"
    was = settings["size"], settings["device"], gpu
    if was != (size, device, here):
        raise ValueError(f"{paths.shorten(path)} has rows of size {was[0]} on {was[1]} ({was[2]}), this is size {size} "
                         f"on {device} ({here}): leave --add out, or give another --out")
    return earlier


def calls(result: dict) -> list[dict]:
    """Every call that rows of a result are of."""
    kept = ("arguments", "commit", "torch", "matrix_tflops", "settings")
    return result.get("earlier", []) + [{key: result.get(key) for key in kept}]


def joined(kept: list[dict], rows: list[dict]) -> list[dict]:
    """The rows, after those of earlier calls that none of them replaces. One that failed replaces no measured one."""
    def key(row: dict) -> tuple:
        return tuple(row[name] for name in ("step", "precision", "mode", "images", "batch"))

    measured = {key(row) for row in kept if "failed" not in row}
    rows = [row for row in rows if "failed" not in row or key(row) not in measured]
    replaced = {key(row) for row in rows}
    return [row for row in kept if key(row) not in replaced] + rows


def skipped(name: str, precision: str, mode: str, images: int, options: argparse.Namespace) -> str | None:
    """Why a combination is left out; None where it is measured."""
    if name != "LDM training":
        return None
    if mode != "eager":
        return "dive_lib.train does not compile"
    return "training knows no images" if images != options.images[0] else None


def measure_step(models: Models, name: str, mode: str, flops: int, peak: float, repeats: int) -> dict:
    """One row. A step that fails (out of memory, no compiler) becomes a row that says why."""
    row = {"step": name, "precision": models.precision, "mode": mode, "images": models.images,
           "batch": models.batch(name), "gflop": flops / 1e9}
    try:
        measure.reset_peak(models.device)
        step = models.steps()[name]()
        median = measure.seconds(step, repeats=repeats, warmup=3 if models.device == "cuda" else 1,
                                 device=models.device)
        row |= {"ms": median * 1000, "peak_gib": measure.peak_gib(models.device), "tflops": flops / median / 1e12,
                "share_of_matrix_rate": flops / median / 1e12 / peak}
    except Exception as error:  # a benchmark reports what a chip or a compiler cannot do and goes on
        row["failed"] = reason(error)
    finally:
        step = None
        gc.collect()
        torch.compiler.reset()
    return row


def reason(error: Exception) -> str:
    """Kind and first line of what went wrong."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def measure_loop(models: Models, mode: str, counted: dict[str, int], peak: float, steps: int = 4) -> dict:
    """The library's whole loop (draws, straight-through step, prior, AdamW, monitor) at the paper's settings: with a
    monitor of four times as many pairs, 200, after every fourth step. Minutes per image are those of 2000 such steps.

    Operations: each forward-equivalent is taken as half of a counted step's operations per sample.
    """
    row = {"step": LOOP, "precision": models.precision, "mode": mode,
           "images": models.images, "batch": models.batch("LDM inversion")}
    try:
        measure.reset_peak(models.device)
        ldm, pairs = models.ldm(), models.size["pairs"]
        objective = models.frozen(ldm, models.prior(ldm), chunk=pairs * min(models.images, TOGETHER))
        config = InversionConfig(steps=steps, batch=pairs, monitor_pairs=4 * pairs, monitor_every=4,
                                 monitor_start=False)
        latents = models.random(models.images, *ldm.latent_shape)
        costs = []
        with measure.quiet():
            median = measure.seconds(lambda: costs.append([r.cost for r in invert(objective, latents, config)]),
                                     repeats=3, device=models.device)
        image = sum(cost.forward_equivalents for cost in costs[-1])
        prior = sum(cost.prior_forward + cost.prior_backward for cost in costs[-1])
        flops = (image * counted["LDM inversion"] / models.batch("LDM inversion") / 2
                 + prior * counted["prior inversion"] / models.batch("prior inversion") / 2)
        row |= {"gflop": flops / 1e9 / steps, "ms": median * 1000 / steps, "peak_gib": measure.peak_gib(models.device),
                "tflops": flops / median / 1e12, "share_of_matrix_rate": flops / median / 1e12 / peak}
        if models.size["ldm"] == SIZES["full"]["ldm"]:
            row["minutes_per_image"] = median / steps * PAPER_STEPS / 60 / models.images
    except Exception as error:  # as in measure_step
        row["failed"] = reason(error)
    finally:
        ldm = objective = None
        gc.collect()
        torch.compiler.reset()
    return row


if __name__ == "__main__":
    main()
