"""How far the headline numbers depend on the training: the models trained again from other seeds, on the same data.

    python -m benchmarks.trainings --seeds 1 2

repeats the notebooks of CHAIN, each seed in a folder of its own, runs/<profile>/benchmarks/trainings/seed=<seed>. First
stage, layout LDM, priors and DiT get the seed; data, splits, draws of the inversion and all settings stay, so the
report's intervals, which are over test images, and this table, which is over trainings, add up. Seed 0 is the report.
It needs what `make repro` leaves in runs/<profile>, and takes about 40 minutes a seed on two cores. A notebook that is
done is not run again.
"""

import argparse
import statistics
from pathlib import Path

from benchmarks import measure
from dive_lib import parameters, paths, run, sweep
from dive_lib.files import read_json, write_json

TRAINED = ("02_first_stage", "03_layout_ldm", "04_layout_prior", "10_dit")
CHAIN = ("02_first_stage", "03_layout_ldm", "04_layout_prior", "05_detection", "06_ablation", "10_dit",
         "11_classification", "15_features", "16_few_shot", "17_sketch_retrieval", "18_segmentation")

# Row of the table -> where its number is: a file of reports/<profile>/metrics, then keys. Where two methods are
# compared, it is their paired difference on the same images.
AP, AP50 = ("against_dive", "AP_difference"), ("against_dive", "AP50_difference")
QUANTITIES = {
    "DIVE, AP": ("detection", "dive", "AP"),
    "DIVE, AP50": ("detection", "dive", "AP50"),
    "best search, AP": ("detection", "dive_best_search", "AP"),
    "best search, AP50": ("detection", "dive_best_search", "AP50"),
    "best search - DIVE, AP": ("ablation", "dive_best_search", *AP),
    "without prior - DIVE, AP": ("ablation", "without_prior", *AP),
    "without in-vocabulary search - DIVE, AP": ("ablation", "without_in_vocabulary", *AP),
    "without in-vocabulary search - DIVE, AP50": ("ablation", "without_in_vocabulary", *AP50),
    "monitor alone in the vocabulary - DIVE, AP": ("ablation", "monitored_in_vocabulary", *AP),
    "decoupled priors - DIVE, AP": ("ablation", "decoupled_prior", *AP),
    "without both - DIVE, AP": ("ablation", "without_both", *AP),
    "Diffusion Classifier, accuracy": ("classification", "diffusion_classifier", "accuracy"),
    "DIVE, published loop, accuracy": ("classification", "dive_published", "accuracy"),
    "DIVE, exact reuse, forward-equivalents": ("classification", "dive_exact", "forward_equivalents"),
    "best approximation, accuracy": ("classification", "dive_fast", "accuracy"),
    "best approximation, forward-equivalents": ("classification", "dive_fast", "forward_equivalents"),
    "without in-vocabulary search, accuracy": ("classification", "dive_without_in_vocabulary", "accuracy"),
    "probe of the layout LDM - untrained, accuracy": ("features", "control", "layout_ldm", "difference"),
    "probe of the DiT - untrained, accuracy": ("features", "control", "dit", "difference"),
    "U-head, 16 images a class, accuracy": ("few_shot", "digits", "u_head", "16", "accuracy"),
    "U-head - linear probe, 16 images a class": ("few_shot", "digits", "u_head", "16", "difference"),
    "sketch retrieval, mAP": ("sketch_retrieval", "digits", "u_head", "mAP"),
    "segmentation, seen classes, mIoU": ("segmentation", "scenes/test", "mIoU_seen"),
    "segmentation, unseen classes, mIoU": ("segmentation", "scenes/test", "mIoU_unseen"),
    "segmentation, unseen / seen": ("segmentation", "scenes/test", "ratio"),
}


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; benchmarks/results by default")
    options = parser.parse_args(arguments)
    if min(options.seeds) < 1 or len(set(options.seeds)) < len(options.seeds):
        parser.error("--seeds: different numbers from 1 on; 0 is the report's own")
    columns = {"seed 0": numbers(options.profile)}
    for seed in options.seeds:
        columns[f"seed {seed}"] = trained(options.profile, seed)
    rows = [{"quantity": name} | {seed: column[name] for seed, column in columns.items()}
            | {"mean": statistics.mean(column[name] for column in columns.values())} for name in QUANTITIES]
    settings = {"profile": options.profile, "seeds": options.seeds, "notebooks": CHAIN, "trained": TRAINED}
    return measure.save("trainings", settings, rows, arguments=measure.given(arguments), folder=options.out)


def numbers(profile: str) -> dict[str, float]:
    """The value of each of QUANTITIES in the metrics where `dive_lib.paths` points."""
    found = {}
    for name, (file, *keys) in QUANTITIES.items():
        value = read_json(paths.metrics(profile, file))
        for key in keys:
            value = value[key]
        found[name] = float(value)
    return found


def trained(profile: str, seed: int) -> dict[str, float]:
    """The same after the whole CHAIN with this seed, of which what is done is not run again."""
    folder = paths.runs(profile) / "benchmarks" / "trainings" / f"seed={seed}"
    done, key, keys = folder / "done.json", "", {}
    for name in CHAIN:  # before the folders change: the key names the report's state, and everything upstream
        settings = {"seed": str(seed)} if name in TRAINED else {}
        notebook = paths.notebooks() / f"{name}.ipynb"
        values = parameters.resolve(notebook, profile, settings)
        key = sweep.hash_of([key, sweep.source_state(notebook, profile), values])
        keys[name] = key, notebook, settings
    with sweep.own_folders(folder, profile, [notebook for _, notebook, _ in keys.values()]):
        for name, (key, notebook, settings) in keys.items():
            known = read_json(done) if done.is_file() else {}
            if known.get(name) != key:
                run.run(notebook, profile, settings)
                write_json(done, known | {name: key})
        return numbers(profile)


if __name__ == "__main__":
    main()
