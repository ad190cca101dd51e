"""Classification runs on an untrained model: methods, shards, interruption, restricted vocabularies."""

import pytest
import torch
from diffusers import AutoencoderKL

from dive_lib import class_data, class_models, classifications, dit, image_runs, parameters, stage_scratch
from dive_lib.checkpoint import freeze, save_model
from dive_lib.gradient_shortlist import class_gradients, fit_reading
from dive_lib.inversion import invert
from tests import class_world
from tests.class_world import CLASSES, DIVE, PAIRS
from tests.test_class_data import AUTOENCODER, folder

ELIMINATE = {"method": "eliminate", "keep": [3, 1], "pairs": [2, 6]}
SHORTLIST = {"method": "shortlist", "read": False, "trust": 0.0, "rank_pairs": 3, "size": 3, "keep": [2, 1],
             "pairs": [2, 6]}


@pytest.fixture
def world(tmp_path, monkeypatch):
    return class_world.make(tmp_path, monkeypatch)


def spec(world, method=None, **changes):
    settings = {"split": "test", "image_ids": world.ids("test"), "model": world.root.parent / "runs" / "dit",
                "method": method or DIVE, "pairs": PAIRS, "batch": 5}
    return classifications.make_spec(world, **(settings | changes))


def answers(results):
    return [(r["image_id"], r["prediction"]) for r in results]


def without_seconds(results):
    return [{key: value for key, value in r.items() if key != "seconds"} for r in results]


@pytest.mark.parametrize("method", [{"method": "enumerate"}, ELIMINATE, SHORTLIST, DIVE, DIVE | {"memoise": False}])
def test_shards_and_interruptions_change_nothing(world, tmp_path, method):
    described = spec(world, method)
    whole, parts = (image_runs.prepare(tmp_path / name, described) for name in ("whole", "parts"))
    image_runs.run_shard(whole, classifications.Runner)
    image_runs.run_shard(parts, classifications.Runner, 1, 3)
    with pytest.raises(FileNotFoundError, match="7 of 12 images"):
        image_runs.collect(parts)
    image_runs.run_shard(parts, classifications.Runner, 0, 3)
    (parts / "a-1.json").unlink(missing_ok=True)  # as if it had been stopped before this image
    for shard in range(3):
        image_runs.run_shard(parts, classifications.Runner, shard, 3)
    a, b = image_runs.collect(whole), image_runs.collect(parts)
    assert without_seconds(a) == without_seconds(b)
    assert [r["label"] for r in a] == [k // 2 for k in range(12)]
    assert all(r["correct"] == (r["prediction"] == r["label"]) for r in a)


@pytest.mark.parametrize("shard", ["3", "3/3", "4/3", "-1/3", "a/b"])
def test_a_share_that_does_not_exist_is_refused(monkeypatch, capsys, tmp_path, shard):
    monkeypatch.setattr("sys.argv", ["classifications", str(tmp_path), f"--shard={shard}"])
    with pytest.raises(SystemExit):
        image_runs.command(classifications.Runner)
    assert "0 <= i < n" in capsys.readouterr().err


def test_enumeration_costs_every_class_on_every_pair(world, tmp_path):
    results = classifications.run(tmp_path / "out", spec(world, {"method": "enumerate"}))
    for result in results:
        assert result["cost"]["forward_equivalents"] == 6 * 6 and len(result["errors"]) == 6
        assert result["prediction"] == min(range(6), key=lambda c: result["errors"][c])
        assert result["by_pairs"][-1] == [6, result["prediction"]] and result["by_pairs"][0][0] == 1
    few = classifications.run(tmp_path / "few", spec(world, {"method": "enumerate", "pairs": 2}))
    for result, image in zip(few, results):
        assert result["cost"]["forward_equivalents"] == 6 * 2 and result["by_pairs"][-1][0] == 2
        assert [2, result["prediction"]] in image["by_pairs"], "pairs 1 and 4 of 6"
    with pytest.raises(ValueError, match="7 of 6 pairs"):
        classifications.run(tmp_path / "many", spec(world, {"method": "enumerate", "pairs": 7}))


def test_exact_reuse_gives_the_published_answers_for_less(world, tmp_path):
    enumerated = {r["image_id"]: r for r in classifications.run(tmp_path / "all", spec(world, {"method": "enumerate"}))}
    published = classifications.run(tmp_path / "published", spec(world, DIVE | {"memoise": False}))
    exact = classifications.run(tmp_path / "exact", spec(world, DIVE))
    assert answers(published) == answers(exact)
    for slow, fast in zip(published, exact):
        assert slow["cost"]["forward_equivalents"] == 2 * 8 * 2 + 3 * 6, "eight steps of two pairs, three monitors"
        assert [point[2] for point in slow["curve"]] == [2 * 3 * 2 + 6, 2 * 6 * 2 + 12, 2 * 8 * 2 + 18]
        assert fast["cost"]["forward_equivalents"] <= slow["cost"]["forward_equivalents"]
        assert fast["improvements"][-1][2] == fast["prediction"]
        error = enumerated[fast["image_id"]]["errors"][fast["prediction"]]
        assert fast["monitor"] == pytest.approx(error, abs=1e-5), "the monitor is the class's error"


def test_a_rate_in_deviations_of_the_vocabulary(world):
    settings = {key: value for key, value in DIVE.items() if key != "lr"}
    runner = classifications.Runner(spec(world, settings | {"lr_std": 0.4}))
    assert runner.config.lr == pytest.approx(0.4 * runner.objective.ldm.vocabulary.std)


def test_only_some_classes_are_possible(world, tmp_path):
    ids = [i for i in world.ids("test") if i[0] in "bdf"]
    everything = classifications.run(tmp_path / "all", spec(world, {"method": "enumerate"}))
    for method in ({"method": "enumerate"}, DIVE, SHORTLIST):
        results = classifications.run(tmp_path / "out", spec(world, method, image_ids=ids, classes=[1, 3, 5]))
        assert {r["prediction"] for r in results} <= {1, 3, 5}
        assert all(r["correct"] == (r["prediction"] == r["label"]) for r in results)
    few = spec(world, {"method": "enumerate"}, image_ids=ids, classes=[1, 3, 5])
    results = classifications.run(tmp_path / "out", few)
    by_id = {r["image_id"]: r["errors"] for r in everything}
    for r in results:
        assert r["errors"] == pytest.approx([by_id[r["image_id"]][c] for c in (1, 3, 5)], abs=1e-6)


def test_the_restricted_model_shares_its_weights():
    model = freeze(dit.DiT(CLASSES, class_world.TRANSFORMER))
    part = class_models.with_classes(model, [4, 1])
    assert part.grid.classes == ("e", "b") and len(model.grid.classes) == 6
    assert torch.equal(part.vocabulary.class_table, model.vocabulary.class_table[[4, 1, 6]])
    assert part.transformer is model.transformer and model.vocabulary.class_table.shape[0] == 7


def test_a_vocabulary_may_have_strangers(world, tmp_path):
    """Other entries are as they were, and those of strangers do not depend on how many there are."""
    model = freeze(dit.DiT(CLASSES, class_world.TRANSFORMER))
    few, more = class_models.with_classes(model, [*range(6), 6]), class_models.with_classes(model, range(60))
    assert few.grid.classes == (*CLASSES, "stranger 0") and more.vocabulary.class_table.shape[0] == 61
    own = model.vocabulary.class_table
    for part in (few, more):
        assert torch.equal(part.vocabulary.class_table[:6], own[:6])
        assert torch.equal(part.vocabulary.class_table[-1], own[-1])
    assert torch.allclose(few.vocabulary.class_table[6], more.vocabulary.class_table[6])
    drawn = model.vocabulary.strangers(20_000)
    assert torch.allclose(drawn.mean(0), own[:-1].mean(0), atol=0.01)
    assert torch.allclose(drawn.T.cov(), own[:-1].T.cov(), atol=0.01)
    results = classifications.run(tmp_path / "out", spec(world, {"method": "enumerate"}, classes=list(range(9))))
    assert all(len(r["errors"]) == 9 and 0 <= r["prediction"] < 9 for r in results)


def test_paths_are_those_of_the_run(world, tmp_path):
    runner = classifications.Runner(spec(world))
    ways = runner.paths(world.ids("test")[:3])
    results = classifications.run(tmp_path / "out", spec(world))
    for way, result in zip(ways, results):
        assert way["image_id"] == result["image_id"] and way["embeddings"].shape == (8, 16) and len(way["classes"]) == 8
        assert result["states_visited"] <= len(set(way["classes"])) + 1


def test_processes_share_the_images(world, tmp_path):
    described = spec(world, {"method": "enumerate"}, image_ids=world.ids("test")[:4], batch=2)
    results = classifications.run(tmp_path / "out", described, workers=2, label="test")
    assert [r["image_id"] for r in results] == described["image_ids"]
    assert len(list((tmp_path / "out").glob("*-*.json"))) == 4


def test_a_finished_run_is_kept_until_it_is_forgotten(world, tmp_path, monkeypatch):
    """A stage of several runs that is stopped continues with the runs that it had not finished."""
    described = spec(world, {"method": "enumerate"})
    first = classifications.run(tmp_path / "out", described)
    with monkeypatch.context() as patch:
        patch.setattr(classifications.Runner, "results", None)
        assert classifications.run(tmp_path / "again", described) == first
    image_runs.forget(described)
    again = classifications.run(tmp_path / "out", described)
    assert without_seconds(again) == without_seconds(first) and again != first


def test_a_finished_run_of_a_stage_is_kept_until_the_stage_has_ended(world, tmp_path, monkeypatch):
    described = spec(world, {"method": "enumerate"})
    monkeypatch.setenv("DIVE_STAGE", "mini-12@first")
    first = classifications.run(tmp_path / "out", described)
    image_runs.forget(described)
    monkeypatch.setenv("DIVE_STAGE", "mini-12@second")
    with monkeypatch.context() as patch:
        patch.setattr(classifications.Runner, "results", None)
        assert classifications.run(tmp_path / "again", described) == first
    stage_scratch.forget("mini-12@first")
    assert image_runs.collect(image_runs._scratch(described)) == first
    stage_scratch.forget("mini-12@second")
    assert not image_runs._scratch(described).exists()
    assert image_runs.collect(tmp_path / "again") == first


def test_another_spec_and_other_weights_never_meet_old_results(world, tmp_path):
    described = spec(world)
    run = image_runs.prepare(tmp_path / "run", described)
    image_runs.run_shard(run, classifications.Runner)
    image_runs.prepare(run, spec(world, ELIMINATE))
    with pytest.raises(FileNotFoundError, match="12 of 12 images"):
        image_runs.collect(run)
    class_world.save_dit(world.root.parent / "runs" / "dit", seed=1)
    with pytest.raises(ValueError, match="weights have changed"):
        classifications.Runner(described)


def test_published_noises_belong_to_the_published_timesteps(world):
    pairs = parameters.named("class_searches", "methods", "paper")["pairs"]
    assert pairs == {"t_low": 0, "t_high": 1000, "t_interval": 4, "noise": "published"}
    small = [parameters.named("class_searches", "methods", name)["pairs"] for name in ("smoke", "mini")]
    assert [settings.get("noise") for settings in small] == [None, "antithetic"]
    runner = classifications.Runner(spec(world, pairs=pairs))
    assert runner.pairs.t.tolist() == list(range(2, 1000, 4)) and len(runner.pairs) == 250
    torch.manual_seed(42)
    assert torch.equal(runner.pairs.noise, torch.randn(1024, 1, 8, 8)[:250])
    with pytest.raises(ValueError, match="noise of the pairs is 'white'; choose one of independent, antithetic"):
        spec(world, pairs=pairs | {"noise": "white"})


def test_noises_may_be_opposite_or_shared(world):
    noises = {kind: classifications.Runner(spec(world, pairs=PAIRS | {"noise": kind})).pairs.noise
              for kind in ("independent", "antithetic", "shared")}
    own, opposite, shared = noises.values()
    assert torch.equal(classifications.Runner(spec(world, pairs=PAIRS)).pairs.noise, own)
    assert torch.equal(opposite[1::2], -opposite[:len(opposite) // 2 * 2:2]) and torch.equal(opposite[::2], own[::2])
    assert (shared == own[:1]).all()


def test_opposite_noises_hold_for_a_monitor_of_its_own_pairs_too(world):
    fresh = DIVE | {"fixed_pairs": False, "monitor_pairs": 6}
    assert [classifications.Runner(spec(world, fresh, pairs=PAIRS | {"noise": kind})).config.antithetic
            for kind in ("independent", "antithetic", "shared")] == [False, True, False]
    with pytest.raises(ValueError, match="antithetic"):
        spec(world, DIVE | {"antithetic": True})


def test_a_run_is_executed_as_described(world):
    assert spec(world)["execution"] == spec(world, execution={"chunk": 256})["execution"]
    runner = classifications.Runner(spec(world, execution={"chunk": 7, "bf16": True}))
    assert runner.objective.chunk == 7 and runner.objective.ldm.network.dtype is torch.bfloat16
    with pytest.raises(ValueError, match="chunk"):
        spec(world, execution={"chunk": 0})


def test_a_method_may_have_a_noise_of_its_own(world):
    """Its spec is that of a run on other pairs, and its settings do not name the noise."""
    described = spec(world, {"method": "enumerate", "noise": "independent"}, pairs=PAIRS | {"noise": "antithetic"})
    assert described == spec(world, {"method": "enumerate"}, pairs=PAIRS | {"noise": "independent"})
    assert described["settings"] == {}
    enumerated = classifications.Runner(spec(world, {"method": "enumerate"}, pairs=PAIRS | {"noise": "antithetic"}))
    counts = [count for count, _ in enumerated.results(world.ids("test")[:1])[0]["by_pairs"]]
    assert counts == [2, 6], "of opposite noises both are read"


def test_every_method_answers_on_the_published_noises(world, tmp_path):
    published = PAIRS | {"noise": "published"}
    enumerated = {r["image_id"]: r["errors"] for r in classifications.run(
        tmp_path / "all", spec(world, {"method": "enumerate"}, pairs=published))}
    other = classifications.run(tmp_path / "other", spec(world, {"method": "enumerate"}))
    assert all(r["errors"] != enumerated[r["image_id"]] for r in other)
    for result in classifications.run(tmp_path / "dive", spec(world, DIVE, pairs=published)):
        error = enumerated[result["image_id"]][result["prediction"]]
        assert result["monitor"] == pytest.approx(error, abs=1e-5), "the monitor is the class's error"
    fresh = spec(world, DIVE | {"fixed_pairs": False, "monitor_pairs": 6}, pairs=published)
    assert classifications.Runner(fresh).given is None
    assert len(classifications.Runner(spec(world, pairs=published)).paths(world.ids("test")[:1])) == 1


def test_given_pairs_are_those_that_a_search_would_draw(world):
    runner = classifications.Runner(spec(world))
    latents = runner.latents(world.ids("test")[:4])
    own, given = (invert(runner.objective, latents, runner.config, pairs=pairs) for pairs in (None, runner.given))
    for one, other in zip(own, given, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert (one.monitor, one.curve, one.cost) == (other.monitor, other.curve, other.cost)


@pytest.mark.parametrize("changes, message", [({"patiense": 3}, "patiense"), ({"lr": 0.1, "lr_std": 1.0}, "two rates")])
def test_wrong_settings_of_an_inversion_are_named(world, changes, message):
    with pytest.raises(ValueError, match=message):
        spec(world, DIVE | changes)


@pytest.mark.parametrize("method", [{"method": "guess"}, {"method": "eliminate", "keep": [1]},
                                    {"method": "enumerate", "x": 1}])
def test_unknown_methods_and_settings_are_refused(world, method):
    with pytest.raises(ValueError, match="unknown classification"):
        spec(world, method)


def test_imagenets_way_through_autoencoder_and_published_dit(tmp_path):
    """The profile `paper` with tiny weights in the published formats: colour JPEGs, AutoencoderKL, diffusers' DiT."""
    from diffusers import DiTTransformer2DModel
    torch.manual_seed(0)
    folder(tmp_path / "imagenet", split="train", images=1, size=(40, 30))
    folder(tmp_path / "imagenet", images=4, size=(40, 30))
    AutoencoderKL(**AUTOENCODER).save_pretrained(tmp_path / "vae")
    DiTTransformer2DModel(sample_size=8, in_channels=4, out_channels=8, num_layers=1, num_attention_heads=2,
                          attention_head_dim=8, num_embeds_ada_norm=2).save_pretrained(tmp_path / "DiT" / "transformer")
    names = {"train": "train", "val": "val", "test": "val"}
    data = class_data.describe("paper", tmp_path / "imagenet", names, image_size=16, channels=3,
                               per_class={"train": 0, "val": 1, "test": 2}, encoder=str(tmp_path / "vae"))
    model = dit.load_published(tmp_path / "DiT" / "transformer", data.classes)
    save_model(tmp_path / "dit", model, model.config)
    described = classifications.make_spec(data, "test", data.ids("test"), tmp_path / "dit", DIVE, pairs=PAIRS)
    runner = classifications.Runner(described)
    assert runner.latents(data.ids("test")[:1]).shape == (1, 4, 8, 8)
    results = classifications.run(tmp_path / "out", described)
    assert [r["label"] for r in results] == [0, 0, 1, 1] and all(r["prediction"] in (0, 1) for r in results)


def test_a_reading_is_fitted_without_labels_and_used_for_its_own_model_alone(world, tmp_path, monkeypatch):
    folder, read = tmp_path / "runs" / "reading", SHORTLIST | {"read": True, "size": 2}
    with pytest.raises(ValueError, match="needs the folder of `learn_reading`"):
        spec(world, read)
    with pytest.raises(ValueError, match="only the prediction of a reading can be trusted"):
        spec(world, SHORTLIST | {"trust": 1.0})
    described = spec(world, {"method": "enumerate"}, split="train", image_ids=world.ids("train"))
    results = classifications.run(tmp_path / "train", described)
    cost = classifications.learn_reading(folder, described, results, 3, 0.1)
    assert cost.forward_equivalents == 12 * (6 * 6 + 2 * 3)
    before = (folder / "weights.safetensors").read_bytes()
    hidden = [result | {"label": 0, "correct": False} for result in results]
    classifications.learn_reading(folder, described, hidden, 3, 0.1)
    assert (folder / "weights.safetensors").read_bytes() == before
    answered = classifications.run(tmp_path / "read", spec(world, read, reading=folder))
    assert all(r["cost"]["forward_equivalents"] == 2 * 3 + 2 * 6 for r in answered)
    ranked = classifications.run(tmp_path / "one", spec(world, read | {"size": 1}, reading=folder))
    trusted = classifications.run(tmp_path / "trusted", spec(world, read | {"trust": 1e9}, reading=folder))
    assert answers(trusted) == answers(ranked), "the first of the ranking wins"
    few = [i for i in world.ids("test") if i[0] in "bd"]
    cut = classifications.run(tmp_path / "cut", spec(world, read, reading=folder, image_ids=few, classes=[1, 3]))
    assert {r["prediction"] for r in cut} <= {1, 3}
    for changes in ({"method": read | {"rank_pairs": 2}}, {"seed": 1}):
        with pytest.raises(ValueError, match="reading: fitted for another model, or for other pairs"):
            classifications.Runner(spec(world, reading=folder, **{"method": read} | changes))


def test_a_reading_of_training_images_finds_their_losses(world, tmp_path):
    described = spec(world, {"method": "enumerate"}, split="train", image_ids=world.ids("train"))
    results = classifications.run(tmp_path / "train", described)
    runner = classifications.Runner(described)
    gradients = class_gradients(runner.objective, runner.latents(world.ids("train")), runner.pairs)
    errors = torch.tensor([r["errors"] for r in results])
    centred = errors - errors.mean(1, keepdim=True)
    close, far = (fit_reading(gradients, errors, strength)(gradients) for strength in (1e-6, 1e6))
    assert torch.allclose(close, centred, atol=1e-4) and not torch.allclose(far, centred, atol=1e-4)
    part = fit_reading(gradients, errors, 0.1).restricted([4, 1])
    assert torch.allclose(part(gradients), fit_reading(gradients, errors, 0.1)(gradients)[:, [4, 1]])
