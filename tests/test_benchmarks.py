"""The benchmarks run at their smallest settings and write what they promise. Nothing is timed here."""

import pytest
import torch

from benchmarks import architecture_ablation, class_searches, devices, fresh_scenes, full_size, inversion_cost
from benchmarks import measure, searches, training_cost, trainings
from benchmarks.full_size_models import Models
from dive_lib import dataset, glyphs, parameters, paths
from dive_lib.checkpoint import save_model
from dive_lib.execution import Execution
from dive_lib.files import read_json, write_json
from dive_lib.inversion import InversionConfig
from dive_lib.layout_ldm import LayoutLDM
from dive_lib.local_search import SearchConfig
from dive_lib.objective import Objective
from tests import class_world, tiny
from tests.test_models import first_stage


def test_full_size_runs_reduced_and_says_so(tmp_path, capsys):
    full_size.main(["--device", "cpu", "--size", "tiny", "--repeats", "1", "--modes", "eager",
                    "--out", str(tmp_path)])
    assert "REDUCED SIZE" in capsys.readouterr().out
    result = read_json(tmp_path / "full_size.json")
    assert result["reduced"] is True
    assert {"machine", "torch", "threads", "matrix_tflops", "settings"} <= result.keys()
    done = {(row["step"], row["precision"]) for row in result["rows"] if "failed" not in row}
    assert done == {(step, precision) for step in (*full_size.STEPS, full_size.LOOP) for precision in ("fp32", "bf16")}
    assert "--out" not in result["arguments"] and str(tmp_path) not in (tmp_path / "full_size.md").read_text()
    for row in result["rows"]:
        assert {"ms", "peak_gib", "tflops", "share_of_matrix_rate", "gflop", "batch"} <= row.keys()
        assert row["ms"] > 0 and row["gflop"] > 0 and "minutes_per_image" not in row


def test_rows_of_several_calls_stand_in_one_result(tmp_path, monkeypatch):
    call = ["--device", "cpu", "--size", "tiny", "--repeats", "1", "--modes", "eager", "--out", str(tmp_path),
            "--steps"]
    first = full_size.main([*call, "prior inversion", "DiT inversion", "--precisions", "bf16"])
    result = full_size.main([*call, "DiT inversion", "--add"])
    assert [(row["step"], row["precision"]) for row in result["rows"]] == [
        ("prior inversion", "bf16"), ("DiT inversion", "fp32"), ("DiT inversion", "bf16")]
    assert result["rows"][0] == first["rows"][0] and result["rows"][2] != first["rows"][1]
    assert [given["arguments"] for given in result["earlier"]] == [first["arguments"]]
    assert (tmp_path / "full_size.md").read_text().count("python -m benchmarks.full_size") == 2
    with pytest.raises(ValueError, match="size tiny on cpu .no GPU., this is size reduced on cpu"):
        full_size.main([*call, "DiT inversion", "--add", "--size", "reduced"])
    monkeypatch.setattr(full_size.provenance, "machine", lambda: {"accelerator": "another"})
    with pytest.raises(ValueError, match="this is size tiny on cpu .another.: leave --add out"):
        full_size.main([*call, "DiT inversion", "--add"])


def test_a_row_that_fails_takes_the_place_of_no_measured_one():
    row = {"step": "LDM inversion", "precision": "bf16", "mode": "eager", "images": 1, "batch": 50}
    kept, failed = [row | {"ms": 1.0}, row | {"images": 2, "failed": "before"}], {"failed": "out of memory"}
    rows = [row | failed, row | {"images": 2} | failed, row | {"images": 3} | failed]
    assert full_size.joined(kept, rows) == [kept[0], *rows[1:]]


def test_a_training_step_of_another_batch_is_another_row(tmp_path):
    call = ["--device", "cpu", "--size", "tiny", "--repeats", "1", "--modes", "eager", "--precisions", "fp32", "--out",
            str(tmp_path), "--steps", "LDM training"]
    full_size.main(call)
    rows = full_size.main([*call, "--train-batch", "3", "--add"])["rows"]
    assert [row["batch"] for row in rows] == [2, 3]
    assert rows[1]["gflop"] == pytest.approx(1.5 * rows[0]["gflop"], rel=0.01)


def test_flops_are_counted_on_the_meta_device():
    a, b = torch.empty(3, 5, device="meta"), torch.empty(5, 7, device="meta")
    assert measure.flops(lambda: a @ b) == 2 * 3 * 5 * 7
    once, twice = ({name: measure.flops(build()) for name, build in Models("tiny", "fp32", "meta", images=n)
                    .steps().items()} for n in (1, 2))
    assert twice["LDM inversion"] == 2 * once["LDM inversion"] and twice["DiT inversion"] == 2 * once["DiT inversion"]


def test_inversion_steps_reach_the_condition():
    for precision in ("fp32", "bf16"):
        models = Models("tiny", precision, "cpu", images=2)
        for name in ("LDM inversion", "prior inversion", "DiT inversion"):
            torch.manual_seed(3)
            gradient = models.steps()[name]()()
            assert len(gradient) == 2 and torch.isfinite(gradient).all(), (precision, name)
            assert gradient.abs().amax() > 0, (precision, name)


def test_inversion_cost_rows(capsys):
    options = type("Options", (), {"batches": [1, 2, 40], "repeats": 1, "no_compile": True, "steps": 4})
    inversion = {"steps": 4, "batch": 2, "lr": 0.2, "t_interval": 200, "fixed_pairs": True, "monitor_pairs": 2,
                 "monitor_every": 2}
    objective, half = tiny.objective(), Execution(bf16=True).prepare(tiny.objective())
    rows = inversion_cost.loop_rows(objective, half, tiny.latents(3), inversion, options)
    assert [r["precision"] for r in rows] == ["fp32", "fp32", "fp32", "bf16"]
    assert [r["images_at_once"] for r in rows] == [1, 2, 2, 2]
    without = rows[2]
    assert without["reused_per_image"] == 0
    assert all(r["forward_equivalents_per_image"] <= without["forward_equivalents_per_image"] for r in rows)
    rows = inversion_cost.gradient_rows(objective, tiny.latents(3), InversionConfig(**inversion), options)
    assert [r["forward_equivalents_per_image"] for r in rows[:3]] == [2 * 2 * 4, 2 * 2 * 4, 3 * 2 * 4]
    assert rows[3]["skipped"] == "--no-compile"
    assert not any(p.requires_grad for p in objective.ldm.parameters())
    assert "| what |" in measure.markdown(rows)


def test_candidates_are_valid_searches():
    settings = parameters.load("mini")["detection"]
    for name, candidate in searches.CANDIDATES.items():
        inversion, search = searches.settled(candidate, settings, seed=3)
        assert inversion is not None or search is not None, name
        assert InversionConfig(**inversion or {"seed": 3}).seed == SearchConfig(**search or {"seed": 3}).seed == 3


def test_best_of_restarts_takes_the_lowest_monitor_and_counts_all():
    def results(name):
        return [{"image_id": k, "tokens": [name], "seconds": 1.0,
                 "cost": {"forward": 10, "backward": 5, "forward_equivalents": 15}} for k in range(2)]

    chosen = searches.best_of([results("a"), results("b")], [[0.1, 0.5], [0.2, 0.4]], monitor_size=3)
    assert [r["tokens"] for r in chosen] == [["a"], ["b"]]
    assert chosen[0]["cost"] == {"forward": 26, "backward": 10, "forward_equivalents": 36}
    assert chosen[0]["seconds"] == 2.0


def test_restarts_are_compared_on_common_noises():
    class Runner:
        objective, config = Objective(tiny.layout_ldm()), InversionConfig(monitor_pairs=2, seed=0)

        def latents(self, ids):
            return tiny.latents()

    same = [{"image_id": k, "tokens": t.tolist()} for k, t in enumerate(tiny.layouts())]
    first, second = searches.common_monitor(Runner(), [same, same])
    assert first == second


def test_variants_build_and_change_only_what_they_name():
    published = LayoutLDM(tiny.GRID, **architecture_ablation.architecture(
        architecture_ablation.VARIANTS["published_encoder"], "tiny"))
    tokens = tiny.layouts()
    assert published.context(published.vocabulary(tokens)).shape[1] == 5 * tiny.GRID.slots
    base = parameters.named("architectures", "layout_ldm", "mini")
    assert architecture_ablation.architecture(architecture_ablation.VARIANTS["mini"], "mini") == base
    without = architecture_ablation.architecture(architecture_ablation.VARIANTS["without_position_attention"], "mini")
    assert without == base | {"position_attention": False}
    table = [{"t_low": low, "t_high": high, "corruption": "empty", "true_loss": 1.0, "gap": low, "share": 0.5}
             for low, high in architecture_ablation.RANGES]
    assert architecture_ablation.summary(table)["empty_gap"] == architecture_ablation.SUMMARY[0]


@pytest.fixture
def smoke(tmp_path, monkeypatch):
    """The profile `smoke` in a folder that stands for the repository, with untrained models of both tasks."""
    class_world.make(tmp_path, monkeypatch)
    runs = paths.runs("smoke")
    class_world.save_dit(runs / "dit")
    glyphs.export(paths.data())
    dataset.make_scenes(runs / "data", {"train": 6, "val": 3, "test": 2}, seed=0)
    data = dataset.describe("smoke", runs / "data", {name: name for name in dataset.SPLITS}, image_size=64, bins=17,
                            slots=4, strict=False, evaluation=2, ablation=2, tuning=3, seed=0)
    ldm = tiny.LayoutLDM(data.grid, tiny.VOCABULARY, tiny.ENCODER, tiny.UNET, position_attention=True)
    prior = tiny.LayoutPrior(data.grid, tiny.VOCABULARY, 16, 1, 2, 4).adopt(ldm.vocabulary)
    for name, model in {"first_stage": first_stage(), "layout_ldm": ldm, "layout_prior": prior}.items():
        save_model(runs / name, model, model.config)
    return tmp_path


def test_fresh_scenes_are_read_by_the_rows_of_the_report(smoke):
    report = {"dive": {"inversion": {}}, "best_search": {"search": {}},
              "without_prior": {"inversion": {}, "weight": 0.0},
              "without_in_vocabulary": {"inversion": {"in_vocabulary": False, "monitor_nearest": False,
                                                      "legal": False}}}
    for name, candidate in report.items():
        spec = searches.specification(candidate, 0, "smoke", dataset.load("smoke"), [1, 2])
        write_json(paths.runs("smoke") / "detection" / name / "spec.json", spec)
    write_json(paths.reports("smoke") / "metrics.json", {"detection": {"dive": {"AP": 50.0}}})
    result = fresh_scenes.main(["--profile", "smoke", "--images", "3", "--workers", "1", "--out", str(smoke)])
    assert [row["row"] for row in result["rows"]] == [*fresh_scenes.ROWS, "as_published"]
    assert all(0 <= row["AP"] <= 100 and row["forward_equivalents"] > 0 for row in result["rows"])
    assert [row["report"] for row in result["rows"]] == [50.0, None, None, None, None]
    assert result["rows"][0]["difference"] is None and len(result["rows"][1]["difference_ci95"]) == 2
    root = paths.runs("smoke") / "benchmarks" / "fresh_scenes" / "data"
    fresh, test = (read_json(folder / "annotations" / f"instances_{split}.json")["annotations"]
                   for folder, split in ((root, "fresh"), (paths.runs("smoke") / "data", "test")))
    assert [a["bbox"] for a in fresh] != [a["bbox"] for a in test][:len(fresh)]
    again = fresh_scenes.main(["--profile", "smoke", "--images", "3", "--workers", "1", "--out", str(smoke)])
    assert again["rows"] == result["rows"]


def test_devices_write_a_row_for_each_precision(smoke, monkeypatch, capsys):
    monkeypatch.setattr(devices, "places", lambda processor: iter([("cpu", 1), ("cpu", 2)]))
    before = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    devices.main(["--profile", "smoke", "--images", "5", "--scenes", "2", "--out", str(smoke)])
    assert before == (torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
    result = read_json(smoke / "devices.json")
    assert result["settings"]["split"] == "val" and result["settings"]["detection"]["inversion"]["steps"] == 20
    for task, quality, images in (("classification", "accuracy", 5), ("detection", "AP", 2)):
        rows = [row for row in result["rows"] if row["task"] == task]
        assert [(r["threads"], r["precision"]) for r in rows] == [(1, "float32"), (1, "bfloat16"), (2, "float32"),
                                                                 (2, "bfloat16")]
        full, half = rows[0], rows[1]
        assert full["same_answers"] == 100 and full["forward_equivalents"] > 0 and full["images"] == images
        assert full["mean_monitor"] != half["mean_monitor"] == pytest.approx(full["mean_monitor"], rel=0.05)
        assert all(len(r[f"{quality}_ci95"]) == 2 and r["seconds_per_image"] > 0 for r in rows)


def test_searches_are_compared_with_the_reference_on_the_same_images(smoke):
    result = searches.main(["--profile", "smoke", "--images", "2", "--workers", "1", "--out", str(smoke),
                            "--only", "straight_through", "prior_weight_0", "two_restarts"])
    with pytest.raises(FileNotFoundError, match="04_layout_prior.ipynb smoke --set decoupled_steps=1800"):
        searches.main(["--profile", "smoke", "--images", "2", "--only", "decoupled_priors_trained_as_long"])
    reference, *others = result["rows"]
    assert reference["difference"] is None and reference["relative_cost"] == 1
    for row in result["rows"]:
        assert len(row["APs"]) == 2 and row["AP"] == pytest.approx(sum(row["APs"]) / 2)
    for row in others:
        assert row["difference"] == pytest.approx(row["AP"] - reference["AP"]) and len(row["difference_ci95"]) == 2
    seeds = {path.parent.name: read_json(path)["inversion"]["seed"]
             for path in (paths.runs("smoke") / "benchmarks").glob("*/spec.json")}
    assert seeds == {f"{name}_seed{seed}": seed for name, count in (("straight_through", 2), ("prior_weight_0", 2),
                                                                   ("two_restarts", 4)) for seed in range(count)}


def test_settings_of_classification_are_compared(smoke):
    names = ["enumeration", "exact", "half_rate", "all_timesteps", "without_in_vocabulary"]
    result = class_searches.main(["--profile", "smoke", "--images", "4", "--workers", "1", "--out", str(smoke),
                                  "--only", *names])
    rows = {row["search"]: row for row in result["rows"]}
    assert list(rows) == names and rows["exact"]["difference"] == 0 and rows["exact"]["forward_equivalents"] > 0
    assert rows["all_timesteps"]["pairs"] == 12 and "--images 4" in (smoke / "class_searches.md").read_text()


def test_candidates_of_classification_are_valid():
    for profile in ("mini", "paper"):
        methods = parameters.named("class_searches", "methods", profile)
        for name, candidate in class_searches.CANDIDATES.items():
            method, pairs = class_searches.settled(candidate, methods)
            rate = method.get("lr_std", method.get("lr"))
            usual = methods["rows"][candidate["row"]]
            assert rate == candidate.get("rate", 1) * usual.get("lr_std", usual.get("lr")) if rate else True, name
            assert pairs.keys() >= {"t_low", "t_high", "t_interval"}
            assert set(Execution(**candidate.get("execution", {})).__dict__) == {"chunk", "bf16", "compile"}
            if method["method"] == "invert":
                settings = {key: value for key, value in method.items() if key not in ("method", "noise", "lr_std")}
                InversionConfig(**settings, **{key: value for key, value in pairs.items() if key != "noise"})


def test_devices_compare_answers_and_leave_no_setting_behind():
    def results(*answers):
        return [{"prediction": answer, "seconds": 2.0, "monitor": 1.0} for answer in answers]

    task = devices.Task({}, None, lambda results: {"accuracy": 50.0, "forward_equivalents": 7}, "prediction")
    row = devices.described(results(1, 2, 3, 4), results(1, 2, 3, 5), task)
    assert row["same_answers"] == 75 and row["seconds_per_image"] == 2 and row["accuracy"] == 50
    with pytest.raises(ValueError, match="shorter"):
        devices.described(results(1, 2), results(1), task)
    assert devices.precisions("cpu") == ("float32", "bfloat16") and next(devices.places()) == ("cpu", 1)
    before = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    for precision, tf32 in (("tf32", True), ("float32", False)):
        with pytest.raises(KeyError), devices.computing(precision, 2):
            assert torch.get_num_threads() == 2 and torch.backends.cudnn.allow_tf32 is tf32
            assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
            raise KeyError
        assert before == (torch.get_num_threads(), torch.get_float32_matmul_precision(),
                          torch.backends.cudnn.allow_tf32)


def test_trainings_are_timed_by_their_use_of_the_cores(tmp_path):
    threads = torch.get_num_threads()
    result = training_cost.main(["--profile", "smoke", "--steps", "2", "--repeats", "1", "--out", str(tmp_path)])
    assert torch.get_num_threads() == threads
    ways = ["all cores", "2 parts", "one core", "one core, matrix products", "two side by side"]
    assert [(row["model"], row["cores"]) for row in result["rows"]] == [
        (model, way) for model in ("layout LDM", "layout prior", "DiT") for way in ways]
    assert all(row["ms_per_step"] > 0 for row in result["rows"])
    assert all(row["times_one_core"] == 1 for row in result["rows"] if row["cores"] == "one core")


def test_the_readme_has_the_measured_speed_of_the_full_size():
    result, readme = read_json(measure.RESULTS / "full_size.json"), (paths.ROOT / "README.md").read_text()
    every = {(row["precision"], row["step"], row["mode"], row["images"], row["batch"]): row for row in result["rows"]}
    rows = {(step, mode, images): row for (precision, step, mode, images, _), row in every.items()
            if precision == "bf16"}
    titles = {"LDM inversion": "gradient of LDM-8 to the layout, 50 pairs an image",
              "prior inversion": "gradient of the prior to the layout, 50 pairs an image",
              "DiT inversion": "gradient of DiT-XL/2 to the class, 25 pairs an image",
              "DIVE loop": "DIVE's step for one image, with prior and monitor",
              "LDM training": "a training step of LDM-8, 16 images"}

    def shown(row):
        return "–" if row is None else f"{row['ms']:.0f} ms, {row['tflops']:.0f} TFLOP/s"

    for step, title in titles.items():
        cells = [shown(rows.get((step, *kind))) for kind in (("eager", 1), ("compiled", 1), ("compiled", 2))]
        assert " | ".join(["| " + title, *cells]) + " |" in readme.splitlines()
    text, loop = " ".join(readme.split()), rows["DIVE loop", "eager", 1]
    assert f"Five images at once take {shown(rows['LDM inversion', 'compiled', 5])}." in text
    paper = loop["gflop"] / 1000 * full_size.PAPER_STEPS / full_size.PAPER_MINUTES / 60
    assert f"multiplies large matrices at {result['matrix_tflops']['bf16']:.0f} TFLOP/s" in text
    assert f"{full_size.PAPER_MINUTES} minutes an image on an A100, about {paper:.0f} TFLOP/s by this count" in text
    loop = rows["DIVE loop", "compiled", 10]
    gradients = sum(rows[step, "compiled", 2]["ms"] / 2 for step in ("LDM inversion", "prior inversion"))
    assert (f"takes {loop['ms']:.0f} ms a step, {loop['tflops']:.0f} TFLOP/s: {loop['minutes_per_image']:.1f} minutes "
            f"an image for the paper's {full_size.PAPER_STEPS} steps, of which the two gradients are "
            f"{gradients * full_size.PAPER_STEPS / 60_000:.1f} and") in text
    compiled, eager = (every["fp32", "LDM inversion", mode, 1, 50]["ms"] for mode in ("compiled", "eager"))
    assert f"brings less: {compiled:.0f} ms for LDM-8's gradient, eager {eager:.0f}." in text
    few, many = (every["fp32", "LDM training", "eager", 1, batch] for batch in (16, 128))
    assert few["ms"] < rows["LDM training", "eager", 1]["ms"]
    assert f"a training step of LDM-8 takes {few['ms']:.0f} ms in TF32, and longer under autocast" in text
    assert (f"in TF32 they take {many['ms']:.0f} ms, {many['tflops']:.0f} TFLOP/s, and "
            f"{many['peak_gib']:.0f} GiB.") in text
    assert min(rows["LDM inversion", "compiled", 2]["tflops"], loop["tflops"]) >= 250  # what the project set itself


def test_the_readme_says_what_two_cores_are_worth():
    result = read_json(measure.RESULTS / "training_cost.json")
    text = " ".join((paths.ROOT / "README.md").read_text().split())
    by_use = {}
    for row in result["rows"]:
        by_use.setdefault(row["cores"], []).append(row["times_one_core"])
    least, most = ({use: f"{choose(values):.1f}" for use, values in by_use.items()} for choose in (min, max))
    assert f"every operation it is {least['all cores']} to {most['all cores']} times as fast as with one" in text
    assert f"in two parts of its batch {least['2 parts']} to {most['2 parts']} times" in text
    assert f"side by side are {least['two side by side']} to {most['two side by side']} times as fast" in text
    products = by_use["one core, matrix products"]
    assert f"linear maps by oneDNN make a step {1 / max(products):.1f} to {1 / min(products):.1f} times as fast" in text


def test_trainings_are_repeated_with_other_seeds(tmp_path, monkeypatch):
    monkeypatch.setenv("DIVE_REPORTS", str(paths.ROOT / "reports"))
    tracked = trainings.numbers("mini")  # of the committed report: a renamed metric fails here
    assert tracked.keys() == trainings.QUANTITIES.keys() and tracked["DIVE, AP"] > 0
    monkeypatch.setenv("DIVE_RUNS", str(tmp_path / "runs"))
    calls = []

    def run(notebook, profile, settings):
        assert paths.reports(profile).is_relative_to(tmp_path) and paths.runs(profile).is_relative_to(tmp_path)
        group = parameters.group_name(notebook)
        assert not paths.metrics(profile, group).exists()
        calls.append((notebook.stem, settings))
        write_json(paths.metrics(profile, group), read_json(report / f"{group}.json"))

    report = paths.reports("mini") / "metrics"
    monkeypatch.setattr(trainings.run, "run", run)
    result = trainings.main(["--seeds", "3", "--out", str(tmp_path)])
    assert [name for name, _ in calls] == list(trainings.CHAIN)
    assert {name for name, settings in calls if settings == {"seed": "3"}} == set(trainings.TRAINED)
    row = result["rows"][0]
    assert row["quantity"] == "DIVE, AP" and row["seed 0"] == row["seed 3"] == row["mean"] == tracked["DIVE, AP"]
    calls.clear()
    assert trainings.main(["--seeds", "3", "--out", str(tmp_path)])["rows"] == result["rows"] and not calls
    with pytest.raises(SystemExit):
        trainings.main(["--seeds", "0"])


def test_the_readme_says_what_another_training_gives():
    rows = {row["quantity"]: row for row in read_json(measure.RESULTS / "trainings.json")["rows"]}
    text = " ".join((paths.ROOT / "README.md").read_text().split())

    def both(quantity: str, sign: str = "") -> list[str]:
        values = (rows[quantity]["seed 0"], rows[quantity]["seed 1"])
        return [f"{value:+.1f}" if sign else f"{abs(value):.1f}" for value in values]

    def fall(quantity: str) -> str:
        return " and ".join(both(f"{quantity} - DIVE, AP"))

    assert f"DIVE had {' and '.join(both('DIVE, AP'))} in place of" in text
    assert f"local search {' and '.join(both('best search, AP'))} in place of" in text
    assert f"AP was {fall('without prior')} points below DIVE's without the prior, " \
           f"{fall('without in-vocabulary search')} without in-vocabulary search, " \
           f"{fall('without both')} without both, {fall('decoupled priors')} with decoupled priors" in text
    sides = both("monitor alone in the vocabulary - DIVE, AP", sign="+")
    assert f"was on either side of DIVE ({', '.join(sides)})" in text and sides[0][0] != sides[1][0]


def test_the_readme_says_what_fresh_scenes_give():
    rows = {row["row"]: row for row in read_json(measure.RESULTS / "fresh_scenes.json")["rows"]}
    text = " ".join((paths.ROOT / "README.md").read_text().split())

    def against_dive(name):
        low, high = rows[name]["difference_ci95"]
        return f"{rows[name]['difference']:+.1f} [{low:.1f}, {high:.1f}]"

    assert f"DIVE {rows['dive']['AP']:.1f} / {rows['dive']['AP50']:.1f}" in text
    best = rows["dive_best_search"]
    assert f"local search {best['AP']:.1f} / {best['AP50']:.1f} ({against_dive('dive_best_search')})" in text
    assert f"without prior {against_dive('without_prior')}" in text
    assert f"without in-vocabulary search {against_dive('without_in_vocabulary')}" in text
    published = rows["as_published"]
    assert f"all at once, AP is {published['AP']:.1f} ({against_dive('as_published')})" in text


def test_variants_of_the_layout_model_are_trained_and_inverted(smoke):
    result = architecture_ablation.main(["--profile", "smoke", "--steps", "2", "--images", "2", "--draws", "1",
                                         "--invert", "2", "--only", "mini", "without_field_dropout",
                                         "--out", str(smoke / "out")])
    assert [row["variant"] for row in result["rows"]] == ["mini", "without_field_dropout"]
    for row in result["rows"]:
        assert 0 <= row["AP"] <= row["AP50"] <= 100 and row["steps"] == 2 and 0 <= row["wrong_class_share"] <= 1
        found = paths.runs("smoke") / "benchmarks" / f"architecture_{row['variant']}" / "detected" / "spec.json"
        spec = read_json(found)
        assert len(spec["image_ids"]) == 2 and not spec["prior"] and row["variant"] in spec["layout_ldm"]
