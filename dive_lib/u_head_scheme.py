"""A scheme of Vermouth's framework (the paper's Figures 1 and 2), in the style of the schemes of `pictures`.

Drawn from the published code, as `u_head`, `expert` and `stage_groups` follow it: the paper's own figures were not at
hand.
"""

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from dive_lib.figures import INK, MUTED, ORANGE, styled
from dive_lib.pictures import _arrow, _Box, _canvas, _chain, _legend

NOTE = {"fontsize": 9.5, "color": MUTED}


@styled
def u_head_scheme() -> Figure:
    """From an image to its class: frozen denoiser and expert, the U-head that fuses their maps, texts as answers."""
    figure, axis = _canvas(10.4, 7.7)
    image = _Box(axis, 0.1, 5.0, 1.3, 0.9, "image $x$", "data")
    encoder = _Box(axis, 1.8, 5.0, 1.5, 0.9, "first stage\nencoder", "frozen")
    latent = _Box(axis, 3.7, 5.0, 1.3, 0.9, "latent $z_t$", "plain")
    _Box(axis, 5.4, 3.1, 1.15, 3.0, "U-Net\n$\\epsilon_\\theta$\nat $t$", "frozen")
    condition = _Box(axis, 3.5, 3.3, 1.5, 0.9, "condition:\nnone, caption", "data", 9.5)
    _chain(axis, image, encoder, latent)
    _arrow(axis, latent.right, (5.4, 5.45))
    _arrow(axis, condition.right, (5.4, 3.75))
    axis.text(4.35, 5.95, "noise of $t$, or none", ha="center", va="bottom", **NOTE)
    axis.text(4.25, 3.2, "never the label", ha="center", va="top", **NOTE)

    expert = _Box(axis, 1.8, 6.75, 1.5, 0.9, "expert, e. g.\na ResNet", "frozen", 9.5)
    adapter = _Box(axis, 3.7, 6.75, 1.3, 0.9, "adapters", "trained")
    _arrow(axis, (0.75, 5.9), (0.75, 7.2), head=False)
    _arrow(axis, (0.75, 7.2), expert.left)
    _chain(axis, expert, adapter)

    fused, blocks = "1$\\times$1 conv.,\nnorm, SiLU", []
    for y, name in ((5.3, "finest"), (4.15, "middle"), (3.0, "coarsest")):
        scale = _Box(axis, 6.9, y, 1.3, 0.75, f"{name}\nmap", "plain", 9.5)
        blocks.append(_Box(axis, 8.7, y, 1.5, 0.75, fused, "trained", 9.5))
        _arrow(axis, (6.55, scale.left[1]), scale.left)
        _arrow(axis, scale.right, blocks[-1].left)
    for upper, lower in zip(blocks, blocks[1:]):
        _arrow(axis, upper.bottom, lower.top)
        axis.text(8.45, (upper.bottom[1] + lower.top[1]) / 2, "pooled, joined", ha="right", va="center", **NOTE)
    _arrow(axis, adapter.right, (9.45, 7.2), head=False)
    _arrow(axis, (9.45, 7.2), blocks[0].top)
    axis.text(7.3, 7.3, "an expert's maps join the finest scales (optional)", ha="center", va="bottom", **NOTE)
    axis.text(7.55, 6.2, "groups of stages", ha="center", va="bottom", **NOTE)

    pool = _Box(axis, 8.7, 0.75, 1.5, 0.9, "attention\npooling", "trained")
    vector = _Box(axis, 6.5, 0.75, 1.5, 0.9, "vector in the\ntext space", "plain", 9.5)
    _arrow(axis, blocks[-1].bottom, pool.top)
    likeness = _Box(axis, 4.4, 0.75, 1.6, 0.9, "cosine of\nvector, texts", "loss", 9.5)
    texts = _Box(axis, 2.2, 0.75, 1.7, 0.9, "text encoder", "frozen")
    names = _Box(axis, 0.1, 0.75, 1.6, 0.9, "names of\nall classes", "data")
    _arrow(axis, pool.left, vector.right)
    _arrow(axis, vector.left, likeness.right)
    _chain(axis, names, texts, likeness)
    axis.text(5.2, 1.75, "cross entropy;\nanswer: the nearest text", ha="center", va="bottom", fontsize=9.5, color=INK)
    axis.add_patch(FancyBboxPatch((8.58, 0.63), 1.74, 5.54, boxstyle="round,pad=0.06", fill=False, edgecolor=ORANGE,
                                  linewidth=1.3, linestyle=(0, (4, 2))))
    axis.text(8.42, 2.35, "U-head", ha="right", va="center", fontweight="bold")
    _legend(axis, "data", "trained", "frozen", "loss")
    return figure
