"""The class-conditional LDM: CompVis's files and their errors, the paper's sizes, and every method on it."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel, VQModel
from safetensors.torch import save_file

from dive_lib import (checkpoint, class_data, class_ldm, class_models, class_training, classifications, compvis, dit,
                      image_encoder, parameters)
from dive_lib.class_ldm import ClassLDM
from dive_lib.diffusion_classifier import enumerate_classes
from dive_lib.gradient_shortlist import class_gradients
from dive_lib.inversion import fixed_pairs, invert
from dive_lib.inversion_config import InversionConfig
from dive_lib.objective import Objective
from dive_lib.schedule import NoiseSchedule
from dive_lib.train import TrainingConfig
from tests import tiny
from tests.class_world import DIVE, PAIRS
from tests.test_class_data import folder
from tests.test_compvis import fake_checkpoint, parameters as count_parameters

CIN256 = {  # unet_config of configs/latent-diffusion/cin256-v2.yaml
    "image_size": 64, "in_channels": 3, "out_channels": 3, "model_channels": 192, "attention_resolutions": [8, 4, 2],
    "num_res_blocks": 2, "channel_mult": [1, 2, 3, 5], "num_heads": 1, "use_spatial_transformer": True,
    "transformer_depth": 1, "context_dim": 512}
UNET = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": [8, 16], "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "norm_num_groups": 4,
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "attention_head_dim": 1}
SMALL = {"unet": UNET, "width": 12}
VQ = {"ddconfig": {"z_channels": 3, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1],
                   "num_res_blocks": 1, "attn_resolutions": []}, "embed_dim": 3, "n_embed": 19}
CONFIG = InversionConfig(steps=6, batch=3, lr=0.5, t_interval=200, fixed_pairs=True, metric="l2", exclude_none=True,
                         monitor_pairs=0, monitor_every=2, memo_states=0)


def small(classes=4, seed=0) -> ClassLDM:
    torch.manual_seed(seed)
    return checkpoint.freeze(ClassLDM(classes, **SMALL))


def first_stage() -> VQModel:
    torch.manual_seed(1)
    return VQModel(**compvis.vq_first_stage_config(**VQ)).eval()


def compvis_state(model: ClassLDM) -> dict:
    """Everything that CompVis's checkpoint of such a model has, under its names."""
    vq = compvis.vq_first_stage_config(**VQ)
    state = fake_checkpoint(model.unet, compvis.layout_unet_table(UNET), "model.diffusion_model.")
    state |= fake_checkpoint(first_stage(), compvis.vq_first_stage_table(vq), "first_stage_model.",
                             ("q", "k", "v", "proj_out"))
    state |= {"cond_stage_model.embedding.weight": model.vocabulary.class_table.detach().clone(),
              "first_stage_model.loss.discriminator.main.0.bias": torch.zeros(2), "logvar": torch.zeros(1000),
              "betas": torch.zeros(1000), "alphas_cumprod": model.schedule.alphas_cumprod.clone()}
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


def write(path, state):
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "global_step": 7}, path)
    return path


@pytest.fixture
def small_first_stage(monkeypatch):
    monkeypatch.setattr(image_encoder, "VQ_F4", VQ)


# The paper's model


def test_the_papers_model_has_401_million_parameters():
    architecture = parameters.named("architectures", "class_models", "LDM-4")
    with torch.device("meta"):
        model = class_models.make(1000, architecture)
    assert abs(count_parameters(model.unet) - 400.92e6) < 0.5e6
    assert model.vocabulary.class_table.shape == (1001, 512) and model.latent_shape == (3, 64, 64)
    config = class_ldm._arguments(architecture["unet"], 512)
    one_head = {"attention_head_dim": (1, 1, 1, 1), "transformer_layers_per_block": 1, "dropout": 0.0}
    assert config | one_head == compvis.layout_unet_config(CIN256)
    state = fake_checkpoint(model.unet, compvis.layout_unet_table(config))
    for name, shape in {
            "input_blocks.3.0.op.weight": (192, 192, 3, 3), "input_blocks.4.0.skip_connection.weight": (384, 192, 1, 1),
            "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (384, 512),
            "middle_block.1.proj_in.weight": (960, 960, 1, 1), "output_blocks.2.2.conv.weight": (960, 960, 3, 3),
            "output_blocks.11.0.skip_connection.weight": (192, 384, 1, 1), "out.2.weight": (3, 192, 3, 3)}.items():
        assert state[name].shape == shape, name
    assert "input_blocks.1.1.proj_in.weight" not in state and "output_blocks.11.1.proj_in.weight" not in state
    assert list(compvis.convert_layout_unet(state, config)) == list(model.unet.state_dict())


def test_the_papers_schedule_is_linear_in_the_roots():
    architecture = parameters.named("architectures", "class_models", "LDM-4")
    betas = torch.linspace(0.0015 ** 0.5, 0.0195 ** 0.5, 1000, dtype=torch.float64).square()
    for settings in (architecture["schedule"], class_ldm.BETAS):
        schedule = NoiseSchedule(**settings)
        torch.testing.assert_close(schedule.alphas_cumprod.double(), (1 - betas).cumprod(0), atol=1e-6, rtol=0)


def test_the_papers_first_stage_is_vq_f4():
    config = compvis.vq_first_stage_config(**image_encoder.VQ_F4)
    with torch.device("meta"):
        model = VQModel(**config)
    assert abs(count_parameters(model) - 55.3e6) < 0.1e6 and model.quantize.embedding.weight.shape == (8192, 3)
    assert len(config["block_out_channels"]) == 3 and config["scaling_factor"] == 1.0, "f = 4, latents as they are"


def test_the_profile_paper_compares_with_it():
    settings = {name: parameters.load(name)["model_evaluation"]["second_model"] for name in ("smoke", "mini", "paper")}
    assert settings["paper"]["architecture"] == "LDM-4"
    assert settings["paper"]["checkpoint"] == settings["paper"]["encoder"]
    architecture = parameters.named("architectures", "class_models", settings["paper"]["architecture"])
    assert class_models.kind_of(architecture) is ClassLDM
    for name in ("smoke", "mini"):
        assert not settings[name]["checkpoint"] and parameters.load(name)["dit"]["optimiser"]["early"] > 0


# Files


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
def test_loads_compvis_file(tmp_path, name):
    model = small()
    loaded = class_ldm.load_published(write(tmp_path / name, compvis_state(model)), SMALL)
    assert loaded.grid.classes == ("0", "1", "2", "3") and not any(p.requires_grad for p in loaded.parameters())
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
    named = class_models.load_published(tmp_path / name, SMALL, ["a", "b", "c", "d"])
    assert named.grid.classes == ("a", "b", "c", "d")
    with pytest.raises(ValueError, match=f"{name}: cond_stage.* has 4 classes and a null class, but 3 class names"):
        class_models.load_published(tmp_path / name, SMALL, ["a", "b", "c"])


@pytest.mark.parametrize("change, message", [
    ({"model.diffusion_model.label_emb.weight": torch.zeros(2)}, "UNet: .* has not: label_emb.weight"),
    ({"model.diffusion_model.out.2.bias": None}, "UNet: .* lacks tensors .*: conv_out.bias"),
    ({"model.diffusion_model.out.2.weight": torch.zeros(3, 9, 3, 3)}, r"UNet: out.2.weight has shape \(3, 9, 3, 3\)"),
    ({"cond_stage_model.embedding.weight": None}, "lacks cond_stage_model.embedding.weight, the table of the classes"),
    ({"cond_stage_model.embedding.weight": torch.zeros(5, 9)}, "has width 9, the architecture asks for 12"),
    ({"cond_stage_model.transformer.pos_emb.weight": torch.zeros(1)}, "lacks cond_stage_model.embedding.weight"),
    ({"cond_stage_model.linear.weight": torch.zeros(1)}, "cond_stage_model.linear.weight, which is no part"),
    ({"alphas_cumprod": NoiseSchedule().alphas_cumprod}, "alphas_cumprod is not of the schedule .*0.0195")])
def test_another_models_tensors_are_refused_with_file_and_remedy(tmp_path, change, message):
    state = {name: tensor for name, tensor in (compvis_state(small()) | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=f"model.ckpt: .*{message}.*; give the"):
        class_ldm.load_published(write(tmp_path / "model.ckpt", state), SMALL)


def test_missing_and_damaged_files_are_named_with_the_source(tmp_path, small_first_stage):
    for read in (lambda path: class_ldm.load_published(path, SMALL), image_encoder.load):
        with pytest.raises(FileNotFoundError, match=r"none.ckpt: no such file; download https://ommer-lab.*model.ckpt"):
            read(tmp_path / "none.ckpt")
        (tmp_path / "half.safetensors").write_bytes(b"half a file")
        with pytest.raises(ValueError, match="half.safetensors: damaged .*download"):
            read(tmp_path / "half.safetensors")


def test_the_first_stage_lies_in_the_same_file(tmp_path, small_first_stage):
    path, original = write(tmp_path / "model.ckpt", compvis_state(small())), first_stage()
    encoder, images = image_encoder.load(path), torch.rand(2, 3, 16, 16) * 2 - 1
    latents = encoder.encode(images)
    with torch.no_grad():
        assert torch.equal(latents, original.quant_conv(original.encoder(images))), "neither quantised nor scaled"
        assert latents.shape == (2, 3, 8, 8) and not any(p.requires_grad for p in encoder.parameters())
        codes = original.quantize.embedding.weight
        nearest = torch.cdist(latents.permute(0, 2, 3, 1).reshape(-1, 3), codes).argmin(1)
        quantised = codes[nearest].view(2, 8, 8, 3).permute(0, 3, 1, 2)
        torch.testing.assert_close(encoder.decode(latents), original.decoder(original.post_quant_conv(quantised)))
    original.save_pretrained(tmp_path / "vq")
    again = image_encoder.load(tmp_path / "vq")
    assert isinstance(again, image_encoder.VQLatents) and torch.equal(again.encode(images), latents)
    assert len({image_encoder.fingerprint(p) for p in (path, tmp_path / "vq", "")}) == 3


def test_latents_are_decoded_in_parts(small_first_stage, monkeypatch):
    encoder, latents = checkpoint.freeze(image_encoder.VQLatents(first_stage())), torch.randn(5, 3, 8, 8)
    whole = encoder.decode(latents)
    monkeypatch.setattr(image_encoder, "DECODED", 2)
    torch.testing.assert_close(encoder.decode(latents), whole)


def test_a_file_with_another_first_stage_is_refused(tmp_path):
    path = write(tmp_path / "model.ckpt", compvis_state(small()))
    with pytest.raises(ValueError, match="model.ckpt: VQ first stage: .*; give a checkpoint with a VQ-f4 first stage"):
        image_encoder.load(path)


def test_can_be_saved_as_a_model_of_our_own_and_is_told_from_a_dit(tmp_path):
    for name, model in (("ldm", small()), ("dit", tiny.dit())):
        checkpoint.save_model(tmp_path / name, model, model.config)
        again = class_models.load(tmp_path / name)
        assert type(again) is type(model) and again.config == model.config
        assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
    config = json.loads((tmp_path / "ldm" / "config.json").read_text())
    (tmp_path / "ldm" / "config.json").write_text(json.dumps({"classes": config["classes"], "layers": 3}))
    with pytest.raises(ValueError, match="one of the networks transformer, unet, not classes, layers"):
        class_models.load(tmp_path / "ldm")


# Methods


def latents(count=2):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def test_the_class_is_the_only_token_and_the_gradient_reaches_it():
    model = small()
    z, t = latents(1).expand(3, -1, -1, -1), torch.tensor([200, 200, 200])
    v = model.vocabulary(model.grid.encode(torch.tensor([0, 3, 4]))).detach().requires_grad_()
    eps = model(z, t, v)
    assert eps.shape == (3, 3, 8, 8) and not torch.allclose(eps[0], eps[1]) and not torch.allclose(eps[1], eps[2])
    direct = model.unet(z, t, v[:, 0]).sample
    assert torch.equal(eps, direct) and model.context(v).shape == (3, 12)
    gradient, = torch.autograd.grad(eps.square().sum(), v)
    assert gradient.shape == (3, 1, 1, 12) and (gradient.flatten(1).norm(dim=1) > 0).all()
    with torch.no_grad():  # one token has the weight one, whatever the query
        for name, parameter in model.unet.named_parameters():
            if "attn2.to_q" in name:
                parameter.zero_()
        torch.testing.assert_close(model(z, t, v), eps.detach())


def test_inversion_enumeration_and_shortlist_run_on_it():
    objective = Objective(small())
    pairs = fixed_pairs(objective, CONFIG)
    enumerated = enumerate_classes(objective, latents(), pairs)
    for image, result in zip(enumerated, invert(objective, latents(), CONFIG, pairs=pairs), strict=True):
        assert result.tokens.shape == (1, 1) and 0 <= int(result.tokens) < 4
        assert result.monitor == pytest.approx(float(image.errors[int(result.tokens)]), abs=1e-5)
        assert result.cost.backward > 0 and result.monitor >= float(image.errors.min()) - 1e-5
    gradients = class_gradients(objective, latents(), pairs)
    assert gradients.shape == (2, len(pairs), 12) and (gradients.norm(dim=2) > 0).all()


def test_some_of_its_classes():
    model = small()
    part = class_models.with_classes(model, [3, 1])
    assert part.grid.classes == ("3", "1") and part.unet is model.unet
    assert torch.equal(part.vocabulary.class_table, model.vocabulary.class_table[[3, 1, 4]])
    z, t = latents(1), torch.tensor([300])
    ours, whole = (m(z, t, m.vocabulary(m.grid.encode(torch.tensor([k])))) for m, k in ((part, 0), (model, 3)))
    assert torch.equal(ours, whole)


def test_samples():
    model = small()
    tokens = model.grid.encode(torch.tensor([0, 1, 2]))
    draws = [model.sample(tokens, torch.Generator().manual_seed(seed), steps=2) for seed in (1, 1, 2)]
    assert draws[0].shape == (3, 3, 8, 8) and torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.fixture
def imagenet(tmp_path, small_first_stage):
    """Two classes of colour JPEGs, and a checkpoint with the model of two classes and its first stage."""
    folder(tmp_path / "imagenet", split="train", images=1, size=(40, 30))
    folder(tmp_path / "imagenet", images=4, size=(40, 30))
    path = write(tmp_path / "model.ckpt", compvis_state(small(classes=2)))
    names = {"train": "train", "val": "val", "test": "val"}
    return class_data.describe("paper", tmp_path / "imagenet", names, image_size=16, channels=3,
                               per_class={"train": 0, "val": 1, "test": 2}, encoder=str(path))


def obtain(data, **changes):
    settings = {"architecture": SMALL, "config": TrainingConfig(steps=2, lr=0.01, batch_size=2),
                "checkpoint": data.encoder}
    return class_training.obtain(data, data.load_encoder(), **(settings | changes))


def test_imagenets_way_through_compvis_checkpoint(imagenet, tmp_path):
    """Table VI's second model in the profile `paper`, with tiny weights in the published format."""
    model, losses = obtain(imagenet)
    assert losses == [] and model.grid.classes == ("n01", "n02")
    checkpoint.save_model(tmp_path / "second", model, model.config)
    described = classifications.make_spec(imagenet, "test", imagenet.ids("test"), tmp_path / "second", DIVE,
                                          pairs=PAIRS | {"noise": "published"}, batch=3)
    runner = classifications.Runner(described)
    assert isinstance(runner.objective.ldm, ClassLDM) and runner.pairs.noise.shape[1:] == (3, 8, 8)
    assert runner.latents(imagenet.ids("test")[:1]).shape == (1, 3, 8, 8)
    results = classifications.run(tmp_path / "out", described)
    assert [r["label"] for r in results] == [0, 0, 1, 1] and all(r["prediction"] in (0, 1) for r in results)
    only = classifications.run(tmp_path / "only", described | {"classes": [1]})
    assert {r["prediction"] for r in only} == {1}


def test_a_rate_is_carried_over_in_deviations_of_the_vocabulary(imagenet, tmp_path):
    model, _ = obtain(imagenet)
    checkpoint.save_model(tmp_path / "second", model, model.config)
    spec = classifications.make_spec(imagenet, "test", imagenet.ids("test"), tmp_path / "second", DIVE, pairs=PAIRS)
    method = classifications.method_of(spec)
    assert "lr" not in method and method["lr_std"] * model.vocabulary.std == pytest.approx(DIVE["lr"])
    again = spec | {"settings": {key: value for key, value in method.items() if key != "method"}}
    assert classifications.Runner(again).config.lr == pytest.approx(DIVE["lr"])
    assert classifications.method_of(again) == method
    assert classifications.method_of({"method": "enumerate", "settings": {}}) == {"method": "enumerate"}


def test_is_trained_on_the_data_or_does_not_fit_them(imagenet):
    model, losses = obtain(imagenet, checkpoint="")
    assert len(losses) == 2 and isinstance(model, ClassLDM)
    with pytest.raises(ValueError, match=r"diffuses \(3, 16, 16\), the encoded images are \(3, 8, 8\).*the encoder"):
        obtain(imagenet, architecture=SMALL | {"unet": UNET | {"sample_size": 16}})


def test_arguments_of_the_unet_come_from_yaml_and_json():
    config = class_ldm._arguments(UNET, 12)
    assert config["block_out_channels"] == (8, 16) and config["cross_attention_dim"] == 12
    assert UNet2DConditionModel(**config).config.cross_attention_dim == 12
