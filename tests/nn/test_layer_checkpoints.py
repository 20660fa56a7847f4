"""state_dicts of the DisAlign layers: released names and shapes, the form, earlier versions."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from disalign_ops.nn import DisAlignCosineLinear, DisAlignLinear, DisAlignSegHead
from support.nn_cases import (
    FORMS,
    LAYERS,
    RELEASED,
    C,
    D,
    N,
    equal_states,
    released_detection,
    trained,
)
from support.places import TESTS


class Parent(nn.Module):
    """A model as the released one: `network.linear`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.network = nn.Module()
        self.network.linear = layer


def test_parameters_have_the_released_names_and_shapes() -> None:
    shapes = {k: tuple(v.shape) for k, v in Parent(DisAlignLinear(D, C)).state_dict().items()}
    assert shapes == {
        "network.linear.weight": (C, D),
        "network.linear.bias": (C,),
        "network.linear.logit_scale": (1, C),
        "network.linear.logit_bias": (1, C),
        "network.linear.confidence_layer.weight": (1, D),
        "network.linear.confidence_layer.bias": (1,),
        "network.linear.calibration_form": (2,),
    }
    cosine = {k: tuple(v.shape) for k, v in DisAlignCosineLinear(D, C).state_dict().items()}
    assert cosine == {
        "weight": (C, D),
        "scale": (1,),
        "logit_scale": (1, C),
        "logit_bias": (1, C),
        "confidence_layer.weight": (1, D),
        "confidence_layer.bias": (1,),
        "calibration_form": (2,),
    }
    assert "bias" not in DisAlignLinear(D, C, bias=False).state_dict()
    assert DisAlignLinear(D, C, background="last").logit_scale.shape == (1, C - 1)


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize(("form", "background", "_formula"), RELEASED, ids=FORMS)
def test_round_trip_through_a_file(
    cls: Any, form: str, background: str | None, _formula: Any, tmp_path: Any
) -> None:
    saved = Parent(trained(cls(D, C, form=form, background=background)))
    torch.save(saved.state_dict(), tmp_path / "checkpoint.pth")
    loaded = Parent(cls(D, C, form=form, background=background))
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    loaded.load_state_dict(state)
    assert equal_states(saved, loaded)
    x = torch.randn(N, D)
    assert torch.equal(saved.network.linear(x), loaded.network.linear(x))


@pytest.mark.parametrize("cls", LAYERS)
def test_a_released_detectors_checkpoint(backend: str, cls: Any) -> None:
    source = trained(cls(D, C, form="interpolated", background="last"))
    names = {"weight": "cls_score.weight", "bias": "cls_score.bias", "scale": "cls_score.scale"}
    prefix = "roi_heads.box_predictor."
    own = source.state_dict()
    del own["calibration_form"]
    released = {prefix + names.get(k, k): v for k, v in own.items()}
    for vector in ("logit_scale", "logit_bias"):
        released[prefix + vector] = released[prefix + vector].reshape(C - 1)
    before = dict(released)

    model = nn.Module()
    model.roi_heads = nn.Module()
    model.roi_heads.box_predictor = cls(D, C, form="interpolated", background="last")
    model.load_state_dict(released)  # strict: no key missing, none left over
    assert released.keys() == before.keys()
    assert all(released[k] is before[k] for k in released)
    assert equal_states(model.roi_heads.box_predictor, source)
    x = torch.randn(N, D)
    torch.testing.assert_close(model.roi_heads.box_predictor(x), released_detection(source, x))

    # The layer itself as the root, and a segmentation head's (1, C, 1, 1).
    state = {k.removeprefix(prefix): v for k, v in released.items()}
    state["logit_scale"] = state["logit_scale"].reshape(1, C - 1, 1, 1)
    root = cls(D, C, form="interpolated", background="last")
    root.load_state_dict(state)
    assert equal_states(root, source)


def test_a_checkpoint_of_other_sizes_is_refused() -> None:
    state = DisAlignLinear(D, C).state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for logit_scale.*\[1, 9\].*\[1, 8\]"):
        DisAlignLinear(D, C, background="last").load_state_dict(state)


def test_the_form_is_in_the_state_dict() -> None:
    saved = Parent(trained(DisAlignLinear(D, C, form="residual", background="first"))).state_dict()
    before = {name: value.clone() for name, value in saved.items()}
    # Metadata is lost where names are changed, or tensors alone are kept.
    plain = {f"ema.{name}": value for name, value in saved.items()}
    for state in (saved, {name.removeprefix("ema."): value for name, value in plain.items()}):
        message = r"network\.linear\.form must be 'interpolated', as in this layer, got 'residual'"
        with pytest.raises(RuntimeError, match=message):
            Parent(DisAlignLinear(D, C, background="first")).load_state_dict(state)
        message = r"network\.linear\.background must be 'last', as in this layer, got 'first'"
        with pytest.raises(RuntimeError, match=message):
            Parent(DisAlignLinear(D, C, form="residual", background="last")).load_state_dict(state)
        Parent(DisAlignLinear(D, C, form="residual", background="first")).load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in saved.items())
    for code in ([7, 0], [0, -1], [0]):
        unknown = saved | {"network.linear.calibration_form": torch.tensor(code)}
        with pytest.raises(RuntimeError, match=r"got 'code \[.*\]' in the state_dict"):
            Parent(DisAlignLinear(D, C)).load_state_dict(unknown)


def test_no_forward_reads_the_forms_buffer_and_no_file_is_wrong_for_it() -> None:
    layer = trained(DisAlignLinear(D, C, form="residual"))
    x = torch.randn(N, D)
    expected = layer(x)
    code = layer.state_dict()["calibration_form"].clone()
    layer.calibration_form.fill_(100)  # as averaging or to_empty might
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.state_dict()["calibration_form"], code)
    layer.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    assert torch.equal(layer.calibration_form, code)
    assert layer.half().state_dict()["calibration_form"].dtype == torch.int8
    averaged = torch.optim.swa_utils.AveragedModel(layer, use_buffers=True)
    for _ in range(3):
        averaged.update_parameters(layer)
    DisAlignLinear(D, C, form="residual").load_state_dict(averaged.module.state_dict())
    with torch.device("meta"):
        empty = DisAlignLinear(D, C, form="residual")
    state = layer.float().state_dict()
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty(x), layer(x))
    assert not empty.calibration_form.is_meta
    assert torch.equal(empty.to("cpu", torch.float64)(x.double()), layer.double()(x.double()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_file_of_which_every_tensor_was_cast_keeps_its_form(dtype: torch.dtype) -> None:
    layer = DisAlignLinear(D, C, form="residual", background="last")
    state = {name: value.to(dtype) for name, value in layer.state_dict().items()}
    DisAlignLinear(D, C, form="residual", background="last").load_state_dict(state)
    with pytest.raises(RuntimeError, match="form must be 'interpolated'"):
        DisAlignLinear(D, C, background="last").load_state_dict(state)


@pytest.mark.parametrize("cls", [DisAlignLinear, DisAlignCosineLinear, DisAlignSegHead])
@pytest.mark.parametrize("form", FORMS)
def test_a_layer_that_version_0_1_0_pickled_whole(cls: Any, form: str) -> None:
    layer = trained(cls(D, C, form=form))
    x = torch.randn(N, D, 2, 2) if cls is DisAlignSegHead else torch.randn(N, D)
    expected = layer(x)
    old = copy.deepcopy(layer)
    for name in ("_watch", "start"):
        del old.__dict__[name]
    del old._buffers["calibration_form"]
    if cls is DisAlignSegHead:
        del old.__dict__["background"]  # the class had it
    old = pickle.loads(pickle.dumps(old))
    old.train()
    assert torch.equal(old(x), expected)
    assert "start='released'" in repr(old)
    cls(D, C, form=form).load_state_dict(old.state_dict())


@pytest.mark.parametrize("kind", ["linear", "cosine", "segmentation"])
@pytest.mark.parametrize("form", FORMS)
def test_files_of_version_0_1_0_load_as_before(kind: str, form: str) -> None:
    file = TESTS / "data" / "version_0_1_0.pth"
    saved = torch.load(file, weights_only=True)[f"{kind} {form}"]
    state = saved["state_dict"]
    assert not any("calibration_form" in name for name in state)

    def model(form: str) -> nn.Module:
        options: dict[str, Any] = {"form": form}
        if state["1.logit_scale"].numel() == 2:
            options["background"] = "last"
        cls = {"linear": DisAlignLinear, "cosine": DisAlignCosineLinear}.get(kind, DisAlignSegHead)
        return nn.Sequential(nn.Identity(), cls(4, 3, **options)).eval()

    loaded = model(form)
    loaded.load_state_dict(state)
    torch.testing.assert_close(loaded(saved["x"]), saved["out"])
    assert loaded.state_dict()["1.calibration_form"].tolist()[0] == FORMS.index(form) ^ 1
    other = FORMS[FORMS.index(form) ^ 1]
    with pytest.raises(RuntimeError, match=f"1.form must be '{other}', as in this layer, got"):
        model(other).load_state_dict(state)  # 0.1.0 kept it in the metadata
    model(other).load_state_dict(dict(state.items()))  # which is lost here: for the caller to know


def test_a_checkpoint_of_stage_1_says_what_it_is() -> None:
    stage1 = nn.Sequential(nn.Linear(D, C)).state_dict()
    model = nn.Sequential(DisAlignLinear(D, C))
    with pytest.warns(
        UserWarning, match=r"must have 0\.logit_scale .* got a checkpoint of stage 1"
    ):
        found = model.load_state_dict(stage1, strict=False)
    assert "0.logit_scale" in found.missing_keys
    assert torch.equal(model[0].weight, stage1["0.weight"])
    with pytest.warns(UserWarning, match="before convert_to_disalign, or with strict=False"):  # noqa: SIM117
        with pytest.raises(RuntimeError, match="Missing key"):
            model.load_state_dict(stage1)
