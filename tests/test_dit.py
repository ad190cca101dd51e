"""The class-conditional DiT: the original's numbers, the folder's errors, and life as a model trained here."""

import json
import shutil

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from dive_lib import checkpoint, class_models, class_training, dit
from dive_lib.class_vocabulary import ClassGrid, ClassVocabulary
from dive_lib.schedule import NoiseSchedule
from dive_lib.train import TrainingConfig, train
from tests import tiny
from tests.published_inversion import read_arrays

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(shared):
    return shared / "fixtures" / "dive_classification"


@pytest.fixture()
def copied(folder, tmp_path):
    """A copy of the published folder that a test may damage."""
    shutil.copytree(folder / "transformer", tmp_path / "transformer")
    return tmp_path / "transformer"


def test_gives_the_numbers_of_the_original(folder):
    model, io = dit.load_published(folder / "transformer"), read_arrays(folder / "inputs.npz")
    context = model.context(model.vocabulary(model.grid.encode(io["y"])))
    output = model.predict(io["x"], io["t"], context)
    torch.testing.assert_close(output, io["model_output"], atol=1e-5, rtol=0)
    eps = model.predict_noise(io["x"], io["t"], context)
    assert torch.equal(eps, output[:, :4]) and not any(p.requires_grad for p in model.parameters())


def test_can_be_saved_as_a_model_of_our_own(folder, tmp_path):
    published = dit.load_published(folder / "transformer")
    checkpoint.save_model(tmp_path, published, published.config)
    state, again = published.state_dict(), class_models.load(tmp_path).state_dict()
    assert state.keys() == again.keys() and all(torch.equal(state[name], again[name]) for name in state)


def test_diffusers_as_shipped_does_not(folder):
    io = read_arrays(folder / "inputs.npz")
    shipped = DiTTransformer2DModel.from_pretrained(folder / "transformer").eval()
    with torch.no_grad():
        output = shipped(io["x"], io["t"], io["y"]).sample
    assert (output - io["model_output"]).abs().max() > 1e-3


def test_schedule_is_the_original(folder):
    expected = read_arrays(folder / "enumeration.npz")["alphas_cumprod"]
    schedule = dit.load_published(folder / "transformer").schedule
    torch.testing.assert_close(schedule.alphas_cumprod.double(), expected, atol=1e-6, rtol=0)
    assert not torch.allclose(NoiseSchedule().alphas_cumprod.double(), expected, atol=1e-3)


def test_classes_can_have_names(folder):
    names = [f"class {k}" for k in range(10)]
    assert dit.load_published(folder / "transformer", names).grid.classes == tuple(names)
    with pytest.raises(ValueError, match="num_embeds_ada_norm is 10, but 9"):
        dit.load_published(folder / "transformer", names[:9])


OLD_FORMAT = {"_class_name": "Transformer2DModel", "_diffusers_version": "0.12.0.dev0", "cross_attention_dim": None,
              "num_vector_embeds": None, "only_cross_attention": False, "use_linear_projection": False,
              "norm_type": "ada_norm_zero"}


def test_the_published_configuration_is_that_of_an_older_class(copied):
    """facebook/DiT-XL-2-256 was saved as diffusers' Transformer2DModel, with entries that a DiT does not use."""
    expected = dit.load_published(copied)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | OLD_FORMAT))
    model = dit.load_published(copied)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.state_dict().values()))
    z, t = torch.randn(2, *model.latent_shape), torch.tensor([10, 500])
    context = model.vocabulary.class_table[:2]
    assert torch.equal(model.predict(z, t, context), expected.predict(z, t, context))


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_missing_file_is_named_with_its_source(copied, name):
    (copied / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}.*facebook/DiT-XL-2-256"):
        dit.load_published(copied)


@pytest.mark.parametrize("change, message", [
    ({"_class_name": "UNet2DConditionModel"}, "config.json.*_class_name"),
    (OLD_FORMAT | {"norm_type": "ada_norm_single"}, "config.json.*ada_norm_single"),
    (OLD_FORMAT | {"cross_attention_dim": 768}, "cross_attention_dim is set"),
    ({"num_embeds_ada_norm": 12}, "class_table|embedding_table.*shape"),
    ({"num_layers": 4}, "lacks"), ({"num_layers": 2}, "unknown tensor")])
def test_another_models_configuration_is_refused(copied, change, message):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        dit.load_published(copied)


def test_damaged_weights_are_refused(copied):
    state = load_file(copied / WEIGHTS)
    table = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    save_file(state | {table: state[table] + 1}, copied / WEIGHTS)
    with pytest.raises(ValueError, match="transformer_blocks.1.*differs from that of block 0"):
        dit.load_published(copied)
    (copied / WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="damaged.*download it again"):
        dit.load_published(copied)


# Models of our own


def test_class_reaches_the_prediction_and_the_gradient():
    model = tiny.dit()
    t, z = torch.tensor([200, 200, 200]), tiny.latents()[:1].expand(3, -1, -1, -1)
    v = model.vocabulary(model.grid.encode(torch.tensor([0, 3, 4]))).detach().requires_grad_()
    eps = model(z, t, v)
    assert eps.shape == (3, 4, 8, 8) and not torch.allclose(eps[0], eps[1]) and not torch.allclose(eps[1], eps[2])
    gradient, = torch.autograd.grad(eps.square().sum(), v)
    assert gradient.shape == (3, 1, 1, 16) and (gradient.flatten(1).norm(dim=1) > 0).all()


def test_learned_variance_is_left_out():
    torch.manual_seed(0)
    model = dit.DiT(3, tiny.TRANSFORMER | {"out_channels": 8})
    z, context = tiny.latents(2), torch.zeros(2, 16)
    t = torch.tensor([1, 2])
    assert model.predict(z, t, context).shape == (2, 8, 8, 8) and model.predict_noise(z, t, context).shape == z.shape


def test_starts_with_blocks_that_are_the_identity():
    torch.manual_seed(0)
    model = dit.DiT(3, tiny.TRANSFORMER)
    assert (model(tiny.latents(1), torch.tensor([5]), model.vocabulary(model.grid.empty(1))) == 0).all()


def test_trains_survives_the_disk_and_samples(tmp_path):
    torch.manual_seed(0)
    model, labels = dit.DiT(["left", "right"], tiny.TRANSFORMER), torch.tensor([0, 1, 1])
    before = model.vocabulary.class_table.detach().clone()
    loss_of = class_training.class_loss(tiny.latents(3), labels, 8, dropout=0.5,
                                        focus={"low": 0, "high": 500, "share": 0.5})
    losses = train(model, loss_of, TrainingConfig(steps=30, lr=0.01, batch_size=8), scratch=tmp_path, identity="")
    assert losses[-1] < losses[0] and (model.vocabulary.class_table != before).any(1).all(), "the null class, too"
    checkpoint.save_model(tmp_path / "dit", model, model.config)
    again = class_models.load(tmp_path / "dit")
    assert again.config == model.config and not any(p.requires_grad for p in again.parameters())
    tokens = again.grid.encode(torch.tensor([0, 1]))
    samples = [m.sample(tokens, torch.Generator().manual_seed(1), steps=3) for m in (model, again)]
    assert samples[0].shape == (2, 4, 8, 8) and torch.equal(*samples)


def test_labels_and_latents_must_be_of_the_same_images():
    with pytest.raises(ValueError, match="3 latents and 2 labels"):
        class_training.class_loss(tiny.latents(3), torch.tensor([0, 1]), 2)


def test_an_image_is_learned_under_a_noise_and_its_opposite():
    """The mean of an image's two inputs is the image without noise."""
    model, seen = dit.DiT(["left", "right"], tiny.TRANSFORMER), []
    predict = model.predict_noise
    model.predict_noise = lambda z, t, context: seen.append((z, t, context)) or predict(z, t, context)
    loss_of = class_training.class_loss(tiny.latents(3), torch.tensor([0, 1, 1]), 8, antithetic=True)
    loss_of(model, 0, torch.Generator().manual_seed(2))
    (z, t, context), = seen
    assert len(z) == 8 and torch.equal(t[:4], t[4:]) and torch.equal(context[:4], context[4:])
    index = torch.randint(3, (4,), generator=torch.Generator().manual_seed(2))
    level = model.schedule.alphas_cumprod[t[:4]].view(-1, 1, 1, 1).sqrt()
    torch.testing.assert_close((z[:4] + z[4:]) / 2, level * tiny.latents(3)[index])
    assert not torch.allclose(z[:4], z[4:])
    with pytest.raises(ValueError, match="must be even, got 7"):
        class_training.class_loss(tiny.latents(3), torch.tensor([0, 1, 1]), 7, antithetic=True)


def test_a_class_is_a_layout_of_one_object_with_one_field():
    grid = ClassGrid(["cat", "dog"])
    vocabulary = ClassVocabulary(grid, 6)
    assert grid.empty(3).tolist() == [[[2]]] * 3 and grid.vocabulary_sizes == (2,)
    tokens = grid.encode(torch.tensor([1, 2]))
    assert vocabulary(tokens).shape == (2, 1, 1, 6)
    assert torch.equal(vocabulary(tokens)[:, 0, 0], vocabulary.table(0)[1:])
    with pytest.raises(ValueError, match="label 3"):
        grid.encode(torch.tensor([0, 3]))
    with pytest.raises(IndexError, match="field"):
        vocabulary.table(1)
    with pytest.raises(ValueError, match="at least one class"):
        ClassGrid([])
