"""Sizes of the paper's models, and what each module promises."""

import pytest
import torch
from diffusers import VQModel

from dive_lib import compvis, layout_ldm, layout_prior
from dive_lib.checkpoint import load_tensors, save_model, save_tensors
from dive_lib.first_stage import FirstStage, device, reconstruction_loss
from dive_lib.layout_prior import DecoupledPrior, LayoutPrior
from dive_lib.parameters import load, named
from dive_lib.schedule import NoiseSchedule, draw_timesteps, evenly_spaced
from dive_lib.train import TrainingConfig, train
from tests import tiny


def millions(module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


COCO = {"classes": [f"class {k}" for k in range(80)], "image_size": 256, "bins": 257, "slots": 100}


def build(name: str) -> layout_ldm.LayoutLDM:
    with torch.device("meta"):
        return layout_ldm.LayoutLDM(COCO, **named("architectures", "layout_ldm", name))


def test_the_paper_profile_uses_these_models():
    paper = load("paper")
    assert (paper["layout_ldm"]["architecture"], paper["layout_prior"]["architecture"]) == ("LDM-8", "prior-58M")
    assert {key: paper["data"][key] for key in ("image_size", "bins", "slots")} == {k: COCO[k] for k in
                                                                                    ("image_size", "bins", "slots")}


def test_ldm8_has_the_papers_363_million_parameters():
    model = build("LDM-8")
    assert millions(model) == pytest.approx(363.1, abs=0.5)
    assert millions(model.unet) == pytest.approx(312.24, abs=0.01)


def test_ldm8_s_has_about_65_million_parameters():
    assert millions(build("LDM-8-S")) == pytest.approx(65, abs=0.7)


def test_the_first_stage_of_the_profile_paper_takes_the_public_weights():
    """`first_stage.adopt_compvis` fills this architecture with weights that are converted for CompVis's settings."""
    with torch.device("meta"):
        model = FirstStage(**named("architectures", "first_stage", load("paper")["first_stage"]["architecture"]))
        public = VQModel(**compvis.vq_first_stage_config(**compvis.VQ_F8))
    shapes, expected = ({name: tuple(t.shape) for name, t in vq.state_dict().items()} for vq in (model.vq, public))
    assert shapes == expected and model.factor == 8


def test_prior_has_the_papers_58_million_parameters():
    vocabulary = named("architectures", "layout_ldm", "LDM-8")["vocabulary"]
    with torch.device("meta"):
        model = LayoutPrior(COCO, vocabulary, **named("architectures", "layout_prior", "prior-58M"))
    assert millions(model) == pytest.approx(58, abs=1)


@pytest.mark.parametrize("position_attention", [True, False])
def test_layout_reaches_the_prediction_and_the_gradient(position_attention):
    model = tiny.layout_ldm(position_attention)
    t = torch.tensor([200, 200, 200])
    z = tiny.latents()[:1].expand(3, -1, -1, -1)
    v = model.vocabulary(tiny.layouts()).detach().requires_grad_()
    eps = model(z, t, v)
    assert eps.shape == (3, 4, 8, 8)
    assert not torch.allclose(eps[0], eps[1]) and not torch.allclose(eps[1], eps[2])
    gradient, = torch.autograd.grad(eps.square().sum(), v)
    assert (gradient.flatten(2).norm(dim=2) > 0).all()


def test_position_attention_starts_as_a_soft_box():
    model = tiny.layout_ldm()
    processor = next(m for m in model.modules() if type(m).__name__ == "PositionAttention")
    boxes = model.vocabulary(tiny.layouts()[:1])[:, :, 1:].flatten(2)  # objects: left, right, none
    bias = (boxes @ processor.grid_query.T)[0].view(3, 8, 8)
    assert bias[0, 3, 2] > bias[0, 3, 6] + 1 and bias[1, 4, 6] > bias[1, 4, 1] + 1
    assert bias[2].std() < 0.5 and -4 < bias[2].mean() < 0, "an object without a box attracts every pixel a little"


def test_object_order_does_not_matter_with_object_tokens():
    model = tiny.layout_ldm()
    tokens = tiny.layouts()[:1]
    z, t = tiny.latents(1), torch.tensor([300])
    torch.testing.assert_close(model(z, t, model.vocabulary(tokens)), model(z, t, model.vocabulary(tokens.flip(1))))


def test_position_attention_needs_object_tokens():
    encoder = {"layers": 1, "heads": 2, "head_width": 4}
    with pytest.raises(ValueError, match="object_tokens"):
        layout_ldm.LayoutLDM(tiny.GRID, tiny.VOCABULARY, encoder, tiny.UNET, position_attention=True)


def test_a_linear_condition_has_no_hidden_layer():
    encoder = {"layers": 0, "heads": 1, "head_width": 4, "object_tokens": True, "linear": True, "width": 16}
    torch.manual_seed(0)
    model = layout_ldm.LayoutLDM(tiny.GRID, tiny.VOCABULARY, encoder, tiny.UNET, position_attention=True)
    a, b = model.vocabulary(tiny.layouts()[:2]).flatten(2)
    join = model.encoder.join
    torch.testing.assert_close(join(a) + join(b), join(a + b) + join(torch.zeros_like(a)))
    with pytest.raises(ValueError, match="linear needs object_tokens"):
        layout_ldm.LayoutLDM(tiny.GRID, tiny.VOCABULARY, encoder | {"object_tokens": False}, tiny.UNET)


def test_priors_see_their_own_fields_only():
    ldm = tiny.layout_ldm()
    classes, boxes = (tiny.layout_prior(ldm, fields) for fields in ("classes", "boxes"))
    t, noise = torch.tensor([100]), torch.randn(1, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    a = ldm.vocabulary(tiny.layouts()[:1])
    b = a.clone()
    b[:, :, 0] = 0
    assert torch.equal(boxes.loss(a, t, noise), boxes.loss(b, t, noise))
    assert not torch.equal(classes.loss(a, t, noise), classes.loss(b, t, noise))
    both = DecoupledPrior(classes, boxes).loss(a, t, noise)
    torch.testing.assert_close(both, (classes.loss(a, t, noise) + 4 * boxes.loss(a, t, noise)) / 5)


def test_prior_loss_is_equation_3():
    ldm = tiny.layout_ldm()
    prior = tiny.layout_prior(ldm)
    v, t = ldm.vocabulary(tiny.layouts()), torch.tensor([10, 400, 900])
    noise = torch.randn(3, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    noisy = prior.schedule.add_noise(v / ldm.vocabulary.std, noise, t)
    expected = (prior(noisy, t) - noise).square().mean((1, 2, 3))
    torch.testing.assert_close(prior.loss(v, t, noise), expected)


def test_models_survive_the_disk(tmp_path):
    ldm = tiny.layout_ldm()
    save_model(tmp_path / "ldm", ldm, ldm.config)
    prior = tiny.layout_prior(ldm)
    save_model(tmp_path / "prior", prior, prior.config)
    z, t, v = tiny.latents(), torch.tensor([5, 50, 500]), ldm.vocabulary(tiny.layouts())
    assert torch.equal(layout_ldm.load(tmp_path / "ldm")(z, t, v), ldm(z, t, v))
    again = layout_prior.load(tmp_path / "prior")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), prior.state_dict().values()))
    with pytest.raises(FileNotFoundError, match="first_stage"):
        layout_ldm.load(tmp_path / "first_stage")


def test_tensors_keep_their_metadata(tmp_path):
    save_tensors(tmp_path / "x.safetensors", {"a": torch.arange(3)}, {"step": 4})
    tensors, metadata = load_tensors(tmp_path / "x.safetensors")
    assert tensors["a"].tolist() == [0, 1, 2] and metadata == {"step": 4}


def first_stage() -> FirstStage:
    torch.manual_seed(0)
    return FirstStage({"block_out_channels": [8, 8], "down_block_types": ["DownEncoderBlock2D"] * 2,
                       "up_block_types": ["UpDecoderBlock2D"] * 2, "layers_per_block": 1, "latent_channels": 4,
                       "num_vq_embeddings": 16, "norm_num_groups": 4, "mid_block_add_attention": False}, unshuffle=4)


def test_first_stage_shapes_and_standardisation():
    model, images = first_stage(), torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert model.factor == 8
    model.standardise(images)
    latents = model.encode(images)
    assert latents.shape == (6, 4, 8, 8) and model.decode(latents).shape == images.shape
    assert latents.mean().abs() < 1e-4 and abs(latents.std() - 1) < 1e-2
    raw = model.decode_raw(model.raw_latents(images), quantize=False)
    torch.testing.assert_close(model.decode(latents, quantize=False), raw, atol=1e-4, rtol=1e-4)


def test_codebook_is_filled_from_latents_and_stays_in_use():
    model = first_stage()
    data = torch.rand(64, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def images(generator):
        return data[torch.randint(64, (8,), generator=generator)]

    objective = reconstruction_loss(images, quantize_from=1, restart_every=2)
    before = model.vq.quantize.embedding.weight.clone()
    objective(model, 0, torch.Generator().manual_seed(0))
    assert torch.equal(before, model.vq.quantize.embedding.weight)
    for step in (1, 2, 3):
        objective(model, step, torch.Generator().manual_seed(step)).backward()
    assert model.codes(data).unique().numel() >= 12


@pytest.mark.parametrize("parts", [1, 2])
def test_a_first_stage_stopped_before_its_codebook_is_used_goes_on(tmp_path, parts):
    """Until then the codebook has no gradient, and the optimiser no state of it."""
    data = torch.rand(64, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    config = TrainingConfig(steps=6, lr=0.002, batch_size=4, parts=parts)

    def trained(folder, *stops):
        for stop in (*stops, None):
            model = first_stage()
            losses = train(model, reconstruction_loss(lambda g: data[torch.randint(64, (4,), generator=g)],
                                                      quantize_from=3, restart_every=2),
                           config, scratch=tmp_path / folder, identity="x", stop_after=stop)
        return losses, model.state_dict()

    losses, whole = trained("whole")
    again, continued = trained("parts", 1, 3, 5)
    assert losses == again and all(torch.equal(value, continued[name]) for name, value in whole.items())


def test_schedule_is_ldms():
    schedule = NoiseSchedule()
    betas = torch.linspace(0.0015**0.5, 0.0205**0.5, 1000) ** 2
    torch.testing.assert_close(schedule.alphas_cumprod, (1 - betas).cumprod(0), rtol=1e-4, atol=1e-6)
    x, noise, t = torch.ones(2, 3), torch.zeros(2, 3), torch.tensor([0, 999])
    torch.testing.assert_close(schedule.add_noise(x, noise, t)[:, 0], schedule.alphas_cumprod[t].sqrt())


def test_timestep_grids():
    assert evenly_spaced(0, 1000, 5)[[0, 1, -1]].tolist() == [2, 7, 997] and len(evenly_spaced(0, 1000, 5)) == 200
    assert evenly_spaced(0, 1000, 4)[[0, -1]].tolist() == [2, 998] and len(evenly_spaced(0, 1000, 4)) == 250
    with pytest.raises(ValueError, match="low < high"):
        evenly_spaced(5, 5, 1)
    t = draw_timesteps(4000, 1000, torch.Generator().manual_seed(0), focus=(100, 200), share=0.5)
    assert abs(((t >= 100) & (t < 200)).float().mean() - 0.55) < 0.03


@pytest.mark.parametrize("cuda, calls", [(False, []), (True, ["high"])])
def test_matrix_products_are_tf32_on_cuda_from_the_first_question_for_the_device(monkeypatch, cuda, calls):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    device.cache_clear()
    try:
        assert device() == device() == ("cuda" if cuda else "cpu") and asked == calls
    finally:
        device.cache_clear()
