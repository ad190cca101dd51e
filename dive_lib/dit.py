"""DiT, the class-conditional diffusion transformer of DIVE's classification: p(x | class).

The network is diffusers' `DiTTransformer2DModel` with two departures that make it the original one (Peebles and Xie,
facebookresearch/DiT). As shipped, diffusers projects timesteps with downscale_freq_shift=1 (original: 0) and
normalises the feed-forward input with eps 1e-5 (original: 1e-6), and its noise differs in the second decimal. The
embeddings of timestep and class, which diffusers repeats in every block, are computed once, and the class enters as
an embedding, since that is what DIVE optimises.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from dive_lib import checkpoint
from dive_lib.class_vocabulary import ClassConditional, ClassGrid, ClassVocabulary
from dive_lib.files import read_json
from dive_lib.schedule import NoiseSchedule
from dive_lib.sequence_linear import use_sequence_linear

FREQUENCIES = 256  # channels of the timestep's sines and cosines
LINEAR_BETAS = {"steps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
EMBEDDERS = "transformer_blocks.{}.norm1.emb."  # diffusers' copies of what DiT has once
IGNORED = ("_class_name", "_diffusers_version", "num_embeds_ada_norm", "norm_eps")  # of config.json
# Entries of diffusers' older, general class, under which the published DiT-XL/2 was saved; a DiT uses none of them.
UNUSED = ("cross_attention_dim", "double_self_attention", "num_vector_embeds", "only_cross_attention",
          "use_linear_projection")
PUBLISHED_AS = [(name, "ada_norm_zero") for name in ("DiTTransformer2DModel", "Transformer2DModel")]


class _Given(nn.Module):
    """In the place of a block's own embedders: passes on the conditioning that was computed once for all blocks."""

    def forward(self, conditioning, labels=None, hidden_dtype=None):
        return conditioning


class DiT(ClassConditional):
    """eps_theta(z_t, t, v_theta(y)).

    classes: names of the K classes, or K. transformer, schedule: keyword arguments of diffusers'
    DiTTransformer2DModel and of NoiseSchedule (DiT's linear betas by default). out_channels = 2 * in_channels means a
    learned variance in the second half of the output, which is never used here. std: of the initial class table.
    """

    def __init__(self, classes: Sequence[str] | int, transformer: dict, schedule: dict | None = None,
                 std: float = 0.02):
        super().__init__()
        self.grid = ClassGrid(classes)
        self.config = {"classes": list(self.grid.classes), "transformer": dict(transformer),
                       "schedule": LINEAR_BETAS | dict(schedule or {}), "std": std}
        self.transformer = DiTTransformer2DModel(**transformer, num_embeds_ada_norm=1, norm_eps=1e-6)
        for block in self.transformer.transformer_blocks:
            block.norm1.emb = _Given()
        self.vocabulary = ClassVocabulary(self.grid, self.transformer.inner_dim, std=std)
        self.time = TimestepEmbedding(FREQUENCIES, self.vocabulary.width)
        self.schedule = NoiseSchedule(**self.config["schedule"])
        _initialise(self)
        use_sequence_linear(self.transformer)

    @property
    def network(self) -> nn.Module:
        """What predicts the noise, and takes nearly all of the time."""
        return self.transformer

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a latent."""
        config = self.transformer.config
        return config.in_channels, config.sample_size, config.sample_size

    def predict(self, z_t: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Noise and, where it is learned, variance: z_t (B, 4, h, w), t (B,), context (B, d) -> (B, 4 or 8, h, w)."""
        features = get_timestep_embedding(t, FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        conditioning = self.time(features.to(context.dtype)) + context
        return self.transformer(z_t, conditioning, return_dict=False)[0]

    def predict_noise(self, z_t: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """eps_theta: z_t (B, 4, h, w), t (B,), context (B, d) -> (B, 4, h, w)."""
        return self.predict(z_t, t, context)[:, :z_t.shape[1]]


def load_published(directory: Path | str, classes: Sequence[str] | None = None) -> DiT:
    """Loads a DiT in diffusers' format, frozen: config.json and diffusion_pytorch_model.safetensors of the folder
    `transformer` of, for example, facebook/DiT-XL-2-256. classes: their names, by default their numbers.

    Raises FileNotFoundError for a missing file, and ValueError for one that is damaged or is not of such a model;
    both name the file, the entry and what to do.
    """
    directory = Path(directory)
    config_file, weights_file = directory / "config.json", directory / "diffusion_pytorch_model.safetensors"
    for path in (config_file, weights_file):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; download the folder 'transformer' of "
                                    f"huggingface.co/facebook/DiT-XL-2-256 into {directory} (where it has a .bin file "
                                    "alone, load it with torch.load(weights_only=True) and save it with "
                                    "safetensors.torch.save_file)")
    config = read_json(config_file)
    if (config.get("_class_name"), config.get("norm_type", "ada_norm_zero")) not in PUBLISHED_AS \
            or "num_embeds_ada_norm" not in config:
        raise ValueError(f"{config_file}: _class_name is {config.get('_class_name')!r} with norm_type "
                         f"{config.get('norm_type')!r}, expected 'DiTTransformer2DModel' (or 'Transformer2DModel') "
                         "with 'ada_norm_zero' and num_embeds_ada_norm; give the folder of a DiT's transformer")
    used = [key for key in UNUSED if config.get(key)]
    if used:
        raise ValueError(f"{config_file}: {', '.join(used)} is set, which a DiT has not; give the folder of a DiT's "
                         "transformer")
    count = config["num_embeds_ada_norm"]
    if classes is not None and len(classes) != count:
        raise ValueError(f"{config_file}: num_embeds_ada_norm is {count}, but {len(classes)} class names are given")
    options = {key: value for key, value in config.items() if key not in IGNORED + UNUSED}
    model = DiT(count if classes is None else classes, options)
    try:
        state = load_file(weights_file)
    except SafetensorError as error:
        raise ValueError(f"{weights_file}: damaged ({error}); download it again") from error
    model.load_state_dict(_from_diffusers(state, model, weights_file))
    return checkpoint.freeze(model)


def _from_diffusers(state: dict, model: DiT, path: Path) -> dict:
    """Our names for diffusers' tensors; of the embedders, each block's copy must be the first block's."""
    renamed = {}
    for name, tensor in state.items():
        block = name.split(".")[1] if ".norm1.emb." in name else None
        part = name.removeprefix(EMBEDDERS.format(block))
        if block is None:
            renamed[f"transformer.{name}"] = tensor
        elif not torch.equal(tensor, state.get(EMBEDDERS.format(0) + part, tensor)):
            raise ValueError(f"{path}: {name} differs from that of block 0; a DiT has one such tensor for all blocks. "
                             "Give the weights of a DiT")
        elif part.startswith("timestep_embedder."):
            renamed["time." + part.removeprefix("timestep_embedder.")] = tensor
        else:
            renamed["vocabulary.class_table"] = tensor
    expected = model.state_dict()
    for name in sorted(expected.keys() ^ renamed.keys()):
        verb = "lacks" if name in expected else "has the unknown tensor"
        raise ValueError(f"{path}: {verb} {name.removeprefix('transformer.')}; weights and config.json must be of "
                         "the same model, download both again")
    for name, goal in expected.items():
        if renamed[name].shape != goal.shape:
            raise ValueError(f"{path}: {name.removeprefix('transformer.')} has shape {tuple(renamed[name].shape)}, "
                             f"config.json asks for {tuple(goal.shape)}; download both again")
    return renamed


def _initialise(model: DiT) -> None:
    """DiT's initial weights: modulation and output start at zero, so that every block starts as the identity."""
    for module in model.transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for linear in (model.time.linear_1, model.time.linear_2):
        nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
    patches = model.transformer.pos_embed.proj
    nn.init.xavier_uniform_(patches.weight.view(len(patches.weight), -1))
    nn.init.zeros_(patches.bias)
    last = (model.transformer.proj_out_1, model.transformer.proj_out_2)
    for linear in (*(block.norm1.linear for block in model.transformer.transformer_blocks), *last):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
