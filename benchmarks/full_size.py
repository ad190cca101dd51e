"""Full-size models with random weights on an accelerator: milliseconds, memory, TFLOP/s and share of the chip's rate.

    python -m benchmarks.full_size                     # full size on an accelerator, reduced size without one
    python -m benchmarks.full_size --modes eager graph compiled compiled+graph --images 1 4
    python -m benchmarks.full_size --size reduced

Steps: gradient of LDM-8 with respect to the token embeddings (50 pairs), training step of LDM-8 (batch 16), gradient of
the 58M prior, gradient of DiT-XL/2 with respect to the class embedding (batch 25), and `dive_lib.inversion.invert`
as a whole, with draws, optimiser and monitor.

Precisions: fp32 (matrix products in TF32 where the chip has it), bf16_autocast (float32 weights, `bf16: true` of the
library), bf16 (networks wholly in bfloat16; a training step keeps float32 weights and is the same as autocast).
Modes: eager, compiled (torch.compile), graph (the step replayed as one CUDA graph, without launch costs) and both.
"""

import argparse
import gc
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.full_size_models import SIZES, Models
from dive_lib.inversion import InversionConfig, invert
from dive_lib.objective import Objective

PAPER_FLOP_PER_IMAGE = 3.4e16  # 2000 steps of 50 pairs and the monitor, by FLOPs of LDM-8
PAPER_TFLOPS = 11.0  # which 50 minutes per image amount to
PRECISIONS = ("fp32", "bf16_autocast", "bf16")
MODES = ("eager", "compiled", "graph", "compiled+graph")


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--size", default="auto", choices=("auto", *SIZES), help="auto: full on an accelerator")
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--modes", nargs="+", default=["eager"], choices=MODES)
    parser.add_argument("--images", nargs="+", type=int, default=[1], help="images inverted in one step")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; benchmarks/results by default")
    options = parser.parse_args(arguments)
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    size = options.size if options.size != "auto" else "full" if device == "cuda" else "reduced"
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
    counted = {images: {name: measure.flops(build()) for name, build in Models(size, "fp32", "meta", images=images)
                        .steps().items()} for images in options.images}
    rows = []
    for precision in options.precisions:
        peak = rates["fp32" if precision == "fp32" else "bf16"]
        for mode in options.modes:
            for images in options.images:
                models = Models(size, precision, device, compiled="compiled" in mode, images=images)
                rows += [measure_step(models, name, mode, counted[images][name], peak, options.repeats)
                         for name in models.steps() if skipped(name, precision, mode, images, options) is None]
        if precision != "bf16":  # the library knows float32 and autocast
            for images in options.images:
                rows.append(measure_loop(Models(size, precision, device, images=images), counted[images], peak))
    for row in rows:
        if not reduced and row.get("step", "").startswith("LDM inversion") and row.get("tflops"):
            row["minutes_per_image_at_the_papers_setting"] = PAPER_FLOP_PER_IMAGE / row["tflops"] / 1e12 / 60
    settings = {"device": device, "size": size, "precisions": options.precisions, "modes": options.modes,
                "images": options.images, "repeats": options.repeats, "pairs": SIZES[size]["pairs"],
                "matrix": SIZES[size]["matrix"]}
    return measure.save("full_size", settings, rows, arguments=measure.given(arguments), folder=options.out,
                        reduced=reduced, matrix_tflops=rates, paper_detection_tflops=PAPER_TFLOPS)


def skipped(name: str, precision: str, mode: str, images: int, options: argparse.Namespace) -> str | None:
    """Why a combination would only repeat another one; None where it is measured."""
    if name != "LDM training":
        return None
    if precision == "bf16" and "bf16_autocast" in options.precisions:
        return "training in bf16 is autocast"
    if "graph" in mode and mode.replace("+graph", "").replace("graph", "eager") in options.modes:
        return "training is not replayed as a graph"
    return "training knows no images" if images != options.images[0] else None


def measure_step(models: Models, name: str, mode: str, flops: int, peak: float, repeats: int) -> dict:
    """One row. A step that fails (out of memory, no compiler) becomes a row that says why."""
    row = {"step": name, "precision": models.precision, "mode": mode, "images": models.images,
           "batch": models.batch(name), "gflop": flops / 1e9}
    try:
        measure.reset_peak(models.device)
        step = models.steps()[name]()
        if "graph" in mode and name != "LDM training":
            step = replayed(step, models.device)
        median = measure.seconds(step, repeats=repeats, warmup=3 if models.device == "cuda" else 1,
                                 device=models.device)
        row |= {"ms": median * 1000, "peak_gib": measure.peak_gib(models.device), "tflops": flops / median / 1e12,
                "share_of_matrix_rate": flops / median / 1e12 / peak}
    except Exception as error:  # a benchmark reports what a chip or a compiler cannot do and goes on
        row["failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    finally:
        step = None
        gc.collect()
        torch.compiler.reset()
    return row


def replayed(step, device: str):
    """The step as a CUDA graph: its kernels are recorded once and launched together."""
    if device != "cuda":
        raise RuntimeError("CUDA graphs need an accelerator")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradient = step()

    def replay():
        graph.replay()
        return step, gradient  # what the graph reads and writes must stay allocated

    return replay


def measure_loop(models: Models, counted: dict[str, int], peak: float, steps: int = 4) -> dict:
    """The library's whole loop (draws, straight-through step, prior, AdamW, monitor) at the paper's settings.

    Operations: each forward-equivalent is taken as half of a counted step's operations per sample.
    """
    row = {"step": "DIVE loop (dive_lib.inversion)", "precision": models.precision, "mode": "eager",
           "images": models.images, "batch": models.batch("LDM inversion")}
    try:
        measure.reset_peak(models.device)
        ldm = models.ldm().requires_grad_(False).eval()
        objective = Objective(ldm, models.prior(ldm).requires_grad_(False).eval())
        pairs = models.size["pairs"]
        config = InversionConfig(steps=steps, batch=pairs, monitor_pairs=pairs, monitor_every=steps,
                                 bf16=models.precision != "fp32")
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
    except Exception as error:  # as in measure_step
        row["failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    finally:
        ldm = objective = None
        gc.collect()
    return row


if __name__ == "__main__":
    main()
