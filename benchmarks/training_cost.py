"""What a training step costs by how it uses the cores, for the models of a profile with random weights.

    python -m benchmarks.training_cost                    # the profile mini
    python -m benchmarks.training_cost --profile smoke --steps 3

all cores: each operation of the step by all of them. parts: as many parts of the batch as the profile has, each on one
core (`dive_lib.batch_parts`). one core; the same with matrix products, without `dive_lib.sequence_linear`. two side by
side: two trainings on one core each, as in `dive_lib.lanes`, time per step of either, halved. Two cores would ideally
be twice as fast as one. The ways come by turns, `--repeats` times, and the median is kept, since other users of a
machine come and go.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks import devices, measure
from dive_lib import class_models, parameters, provenance
from dive_lib.class_training import class_loss
from dive_lib.layout import LayoutGrid
from dive_lib.layout_ldm import LayoutLDM, layout_ldm_loss
from dive_lib.layout_prior import LayoutPrior, layout_prior_loss
from dive_lib.progress import silent
from dive_lib.sequence_linear import use_matrix_products
from dive_lib.side_by_side import side_by_side
from dive_lib.train import TrainingConfig, train

CLASSES, IMAGES = 100, 500


class RandomLayouts:
    """As LayoutTokens, of boxes anywhere."""

    def __init__(self, grid: LayoutGrid):
        corners = torch.rand(IMAGES, 3, 2, 2) * grid.image_size
        boxes = torch.cat([corners.amin(2), corners.amax(2)], dim=2)
        self.tokens = torch.stack([grid.encode(own, torch.randint(len(grid.classes), (3,))) for own in boxes])

    def __len__(self) -> int:
        return IMAGES

    def draw(self, indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return self.tokens[indices]


def trainings(profile: str) -> dict[str, tuple[Callable[[], torch.nn.Module], Callable, dict]]:
    """{name: (makes the model, its objective, settings of the profile)}."""
    groups = parameters.load(profile)
    data, ldm, prior, dit = (groups[name] for name in ("data", "layout_ldm", "layout_prior", "dit"))
    grid = LayoutGrid(tuple(map(str, range(10))), data["image_size"], data["bins"], data["slots"])
    layouts = RandomLayouts(grid)
    make_ldm = partial(LayoutLDM, grid, **parameters.named("architectures", "layout_ldm", ldm["architecture"]))
    make_dit = partial(class_models.make, CLASSES, parameters.named("architectures", "dit", dit["architecture"]))
    vocabulary, shape = make_ldm().vocabulary, make_ldm().latent_shape

    def make_prior() -> LayoutPrior:
        network = parameters.named("architectures", "layout_prior", prior["architecture"])
        return LayoutPrior(grid, make_ldm().config["vocabulary"], **network).adopt(vocabulary)

    return {
        "layout LDM": (make_ldm, layout_ldm_loss(torch.randn(IMAGES, *shape), layouts, ldm["batch_size"],
                                                 dropout=ldm["dropout"], focus=ldm["focus"]), ldm),
        "layout prior": (make_prior, layout_prior_loss(layouts, prior["batch_size"]), prior),
        "DiT": (make_dit, class_loss(torch.randn(IMAGES, *make_dit().latent_shape),
                                     torch.randint(CLASSES, (IMAGES,)), dit["batch_size"], **dit["draws"]), dit)}


def plain(training: tuple) -> tuple:
    """The same training with PyTorch's own linear maps."""
    return lambda: use_matrix_products(training[0]()), *training[1:]


def step_seconds(training: tuple, parts: int, threads: int, steps: int) -> float:
    """Seconds of a step, after some that are not counted."""
    make, objective, settings = training
    with devices.computing("float32", threads), silent(), tempfile.TemporaryDirectory() as scratch:
        model, took = make(), 0.0
        for count in (2, steps):
            config = TrainingConfig(steps=count, lr=settings["lr"], batch_size=settings["batch_size"], parts=parts)
            began = time.perf_counter()
            train(model, objective, config, scratch=Path(scratch), identity="cost")
            took = time.perf_counter() - began
        return took / steps


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; benchmarks/results by default")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    cores, rows = provenance.cores(), []
    for name, training in trainings(options.profile).items():
        parts = training[2]["optimiser"]["parts"]
        one = partial(step_seconds, training, 1, 1, options.steps)
        ways = {"all cores": partial(step_seconds, training, 1, cores, options.steps),
                f"{parts} parts": partial(step_seconds, training, parts, 1, options.steps),
                "one core": one,
                "one core, matrix products": partial(step_seconds, plain(training), 1, 1, options.steps),
                "two side by side": lambda one=one: sum(side_by_side([one, one], 2, "trainings")) / 4}
        taken = {way: [] for way in ways}
        for _ in range(options.repeats):
            for way, seconds in ways.items():
                with measure.quiet():
                    taken[way].append(seconds())
        medians = {way: statistics.median(values) for way, values in taken.items()}
        rows += [{"model": name, "batch": training[2]["batch_size"], "cores": way, "ms_per_step": 1000 * seconds,
                  "times_one_core": medians["one core"] / seconds} for way, seconds in medians.items()]
        print(measure.markdown(rows[-len(ways):]), flush=True)
    settings = {"profile": options.profile, "steps": options.steps, "repeats": options.repeats}
    return measure.save("training_cost", settings, rows, arguments=measure.given(arguments), folder=options.out)


if __name__ == "__main__":
    main()
