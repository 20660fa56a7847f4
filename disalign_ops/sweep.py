"""Many strengths rho of the re-weighting in one stage 2, over features that are computed once.

features, target = cache_features(model, loader)  # the backbone runs once
layers = sweep_rho(model, features, target, counts, rhos=(0.5, 0.8, 1.0, 1.2, 1.5))
for rho, layer in layers.items():
    ...  # layer(validation_features)
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from . import functional
from ._call.arguments import check_choice, check_integer, check_number
from .class_stats import Counts, grw_weights
from .errors import ArgumentError, ArgumentTypeError
from .nn.linear import _DisAlign

if TYPE_CHECKING:
    import numpy.typing as npt


def _layer_of(model: nn.Module) -> _DisAlign:
    layers = [m for m in model.modules() if isinstance(m, _DisAlign)]
    if len(layers) != 1:
        raise ArgumentError(
            f"model must have one DisAlignLinear or DisAlignCosineLinear layer, got {len(layers)}"
        )
    return layers[0]


@torch.no_grad()
def cache_features(
    model: nn.Module, batches: Iterable[tuple[Any, Tensor]]
) -> tuple[Tensor, Tensor]:
    """What the model's DisAlign layer is given for every batch, (N, D), and the targets (N,).

    The model runs as it is: in eval mode, unless you want another. On the device of its layer.
    Several passes over a loader that augments, `itertools.chain(loader, loader)`, give several
    views of every image.
    Raises ArgumentError: no such layer, or several; no batches; a layer that is not called once.
    """
    layer = _layer_of(model)
    given: list[Tensor] = []
    targets: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].detach()))
    try:
        for inputs, target in batches:
            model(inputs)
            targets.append(target.to(layer.weight.device))
            if len(given) != len(targets):
                raise ArgumentError(
                    "model must call its DisAlign layer once a batch, got "
                    f"{len(given)} calls in {len(targets)} batches"
                )
    finally:
        hook.remove()
    if not given:
        raise ArgumentError("batches must have at least one (inputs, target), got none")
    return torch.cat(given), torch.cat(targets)


def sweep_rho(
    model: nn.Module, features: Tensor, target: Tensor, counts: Counts,
    rhos: Sequence[float] | npt.NDArray[Any] | Tensor, *,
    epochs: int = 10, batch_size: int = 256, lr: float = 0.1, momentum: float = 0.9,
    weight_decay: float = 0.0, step: Literal["epoch", "batch"] = "epoch",
    generator: torch.Generator | None = None, **options: Any,
) -> dict[float, nn.Module]:  # fmt: skip
    """Stage 2 for every rho at once: a trained copy of the model's DisAlign layer for each.

    The raw logits of a batch are made once for all of them. Each copy learns by SGD with a learning
    rate that falls from lr along a cosine, without a warm-up. The defaults are those of the
    released ImageNet-LT configuration but for weight_decay, which it has at 5e-4.

    Augmentation: what the features were computed from. The released stage 2 draws another crop
    (RandomResizedCrop), flip and ColorJitter(0.4) in every epoch and has BatchNorm in train mode;
    cached features are the views that `cache_features` saw, the same ones in every epoch. For v
    views of every image train epochs / v, with step="batch". To compare rho one view will often
    do; train the layer that you keep on the images.

    Args:
        model: with one DisAlign layer, or the layer; it stays as it is.
        features, target: (N, D) and (N,), as from `cache_features`.
        counts: training samples of each class, a background not among them.
        rhos: numbers, see `class_stats.grw_weights`; the keys of what is returned.
        weight_decay: of all that learns, as in torch.optim.SGD. It pulls logit_scale to 0: in the
            residual form to the logits of stage 1, u = z, from which the released start is away; in
            the interpolated form away from them, to (1 - c) z.
        step: when the learning rate falls: after every "epoch", as released, or every "batch".
        generator: of the order of the rows, on the CPU; every rho sees the same one.
        options: keywords of `disalign_cross_entropy` but weight, form and background.

    Returns the copies by rho, in eval mode. Raises ArgumentError: no rhos, or one twice; and what
    `grw_weights` and `disalign_cross_entropy` raise.
    Source: Zhang et al., "Distribution Alignment", CVPR 2021, sections 3.3 and 4.
    """
    layer = _layer_of(model)
    epochs, batch_size = check_integer("epochs", epochs), check_integer("batch_size", batch_size)
    lr, momentum = check_number("lr", lr, 0.0), check_number("momentum", momentum, 0.0)
    weight_decay = check_number("weight_decay", weight_decay, 0.0)
    check_choice("step", step, ("epoch", "batch"))
    if epochs < 1 or batch_size < 1:
        raise ArgumentError(
            f"epochs and batch_size must be 1 or more, got {epochs} and {batch_size}"
        )
    if not isinstance(rhos, Iterable) or getattr(rhos, "ndim", 1) != 1:
        raise ArgumentTypeError(f"rhos must be a sequence of numbers, got {rhos!r}")
    # A tensor's entries are tensors, of which each would be a key of its own.
    strengths = [check_number("rhos", rho, 0.0) for rho in rhos]
    if not strengths or len(set(strengths)) != len(strengths):
        raise ArgumentError(f"rhos must be numbers, each once, got {strengths}")
    if len(features) != len(target):
        raise ArgumentError(
            f"target must have as many rows as features ({len(features)}), got {len(target)}"
        )
    device = layer.weight.device
    background: Any = layer.background
    copies = {rho: copy.deepcopy(layer) for rho in strengths}
    weights = {rho: grw_weights(counts, rho, background=background).to(device) for rho in strengths}
    learned: list[Tensor] = []
    for one in copies.values():
        one.train().requires_grad_(False)  # train: the mean confidence is watched
        for part in (one.logit_scale, one.logit_bias, one.confidence_layer):
            part.requires_grad_()
            learned += [part] if isinstance(part, Tensor) else list(part.parameters())
    optimizer = torch.optim.SGD(learned, lr=lr, momentum=momentum, weight_decay=weight_decay)
    steps = epochs if step == "epoch" else epochs * -(-len(features) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        order = torch.randperm(len(features), generator=generator, device="cpu")
        order = order.to(features.device)
        for rows in order.split(batch_size):
            x, t = features[rows].to(device), target[rows].to(device)
            with torch.no_grad():
                logits, seen = layer._checked_raw(x)
            optimizer.zero_grad()
            for rho, one in copies.items():
                functional.disalign_cross_entropy(
                    logits, t, one._confidence(seen), one.logit_scale, one.logit_bias,
                    weights[rho], **one._form(), **options,
                ).backward()  # fmt: skip
            optimizer.step()
            if step == "batch":
                schedule.step()
        if step == "epoch":
            schedule.step()
    return {rho: one.eval().requires_grad_(False) for rho, one in copies.items()}
