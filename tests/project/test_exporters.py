"""What records operations: torch.jit, torch.fx, ONNX. torch.export: test_export.py."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import disalign_ops
from disalign_ops import losses
from disalign_ops import nn as dnn
from disalign_ops.errors import ArgumentError

FORMS = ("interpolated", "residual")
IN, CLASSES = 4, 5


def layers(form: str) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Layers, an example, and features of another size."""
    found: list[tuple[nn.Module, Tensor, Tensor]] = []
    for kind, background in itertools.product(
        (dnn.DisAlignLinear, dnn.DisAlignCosineLinear), (None, "first", "last")
    ):
        layer = kind(IN, CLASSES, form=form, background=background)
        found.append((layer, torch.randn(3, IN), torch.randn(7, IN)))
    found.append((dnn.DisAlignLinear(IN, CLASSES, form=form), torch.randn(2, 3, IN),
                  torch.randn(4, 5, IN)))  # fmt: skip
    head = dnn.DisAlignSegHead(IN, CLASSES, form=form)
    found.append((head, torch.randn(2, IN, 6, 6), torch.randn(3, IN, 4, 5)))
    for layer, _, _ in found:
        with torch.no_grad():
            for parameter in (layer.logit_scale, layer.logit_bias):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return found


def assert_same(found: Any, layer: nn.Module, x: Tensor) -> None:
    """Values and gradients of a graph that shares the layer's parameters."""
    results = []
    for function in (found, layer):
        q = x.clone().requires_grad_()
        out = function(q)
        upstream = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
        inputs = [q, *layer.parameters()]
        results.append([out, *torch.autograd.grad(out, inputs, upstream)])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.fixture(autouse=True)
def _no_tracer_warnings() -> Any:
    """A TracerWarning says that a size or value of the example became a constant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript and its exporter are old
        warnings.simplefilter("error", torch.jit.TracerWarning)
        yield


@pytest.mark.parametrize("form", FORMS)
def test_jit_trace_of_layers(form: str) -> None:
    for layer, example, x in layers(form):
        layer.eval()
        traced = torch.jit.trace(layer, (example,))
        assert "disalign_ops::" not in str(traced.inlined_graph)
        assert_same(traced, layer, x)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        torch.testing.assert_close(torch.jit.load(file)(x), layer(x))


def test_a_masked_class_stays_masked_in_a_graph() -> None:
    layer = dnn.DisAlignLinear(IN, CLASSES)
    with torch.no_grad():
        assert layer.bias is not None
        layer.bias[1] = -float("inf")
    x = torch.randn(3, IN)
    for graph in (
        torch.jit.trace(layer, x),
        torch.jit.script(layer),
        torch.fx.symbolic_trace(layer),
    ):
        for found in (graph, layer):
            out = found(x)
            assert (out[:, 1] == -float("inf")).all()
            kept = torch.cat((out[:, :1], out[:, 2:]), 1).sum()
            for grad in torch.autograd.grad(kept, list(layer.parameters())):
                assert grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_onnx_by_tracing(form: str) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra disalign_ops[onnx]")
    for layer, example, x in layers(form):
        layer.eval()
        file = io.BytesIO()
        torch.onnx.export(
            layer, (example,), file, dynamo=False, input_names=["x"],
            dynamic_axes={"x": {0: "n", **({2: "h", 3: "w"} if x.dim() == 4 else {})}},
        )  # fmt: skip
        session = runtime.InferenceSession(file.getvalue())
        wide = x if x.dim() != 3 else example
        found = session.run(None, {"x": wide.numpy()})[0]
        np.testing.assert_allclose(found, layer(wide).detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_jit_script_of_layers(form: str) -> None:
    for layer, _, x in layers(form):
        model = nn.Sequential(nn.Identity(), layer)
        scripted = torch.jit.script(model)
        assert model[1] is layer
        assert list(scripted.state_dict()) == list(model.state_dict())
        for mode in (False, True):
            scripted.train(mode)
            layer.train(mode)
            assert_same(scripted, layer, x)
        half = copy.deepcopy(model).eval().bfloat16()
        found = torch.jit.script(half)(x.bfloat16())
        torch.testing.assert_close(found, half(x.bfloat16()), rtol=0.02, atol=0.02)


LOSSES: dict[str, Any] = {
    "plain": lambda: dnn.CrossEntropyLoss(),
    "weights and smoothing": lambda: dnn.CrossEntropyLoss(torch.rand(5), label_smoothing=0.1),
    "none": lambda: dnn.CrossEntropyLoss(torch.rand(5).double(), reduction="none"),
    "sum": lambda: dnn.CrossEntropyLoss(reduction="sum"),
    "count": lambda: dnn.CrossEntropyLoss(normalizer="count"),
    "number": lambda: dnn.CrossEntropyLoss(normalizer=7.0),
    "margins": lambda: dnn.CrossEntropyLoss(margin=torch.rand(5), focal_gamma=2.0),
    "prior": lambda: losses.balanced_softmax([5, 4, 3, 2, 1]),
    "scaled": lambda: losses.ldam([5, 4, 3, 2, 1], normalizer="valid"),
    "gains": lambda: losses.vs([5, 4, 3, 2, 1]),
}


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_jit_trace_of_losses(name: str, dense: bool) -> None:
    criterion = LOSSES[name]()
    sizes = ((2, 3, 4), (3, 2, 6)) if dense else ((6,), (9,))
    data = []
    for n, *rest in sizes:
        target = torch.randint(0, 5, (n, *rest))
        target[0] = -100
        data.append((torch.randn(n, 5, *rest), target))
    example = (data[0][0].clone().requires_grad_(), data[0][1])
    traced = torch.jit.trace(criterion, example)
    for z, t in data:
        results = []
        for function in (traced, criterion):
            q = z.clone().requires_grad_()
            loss = function(q, t)
            results.append([loss, *torch.autograd.grad(loss.sum(), q)])
        for a, e in zip(*results, strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("background", [None, "first", "last"])
def test_jit_trace_of_a_calibrated_loss(background: Any) -> None:
    class Loss(nn.Module):
        def forward(self, z: Tensor, t: Tensor, *calibration: Tensor) -> Tensor:
            return disalign_ops.disalign_cross_entropy(
                z, t, *calibration, background=background, sample_weight=calibration[0].exp()
            )

    def data(n: int) -> tuple[Tensor, ...]:
        k = 5 - (background is not None)
        target = torch.randint(0, 5, (n,))
        return torch.randn(n, 5), target, torch.randn(n), torch.rand(1, k), torch.rand(1, k)

    traced = torch.jit.trace(Loss(), data(6))
    more = data(9)
    torch.testing.assert_close(traced(*more), Loss()(*more))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_jit_trace_with_class_probabilities(reduction: str) -> None:
    def data(*shape: int) -> tuple[Tensor, Tensor]:
        return torch.randn(shape), torch.softmax(torch.randn(shape), 1)

    for options in ({}, {"normalizer": 3.0}):
        criterion = dnn.CrossEntropyLoss(
            torch.rand(5), label_smoothing=0.1, reduction=reduction, prior=torch.rand(5), **options
        )
        for small, large in (((6, 5), (9, 5)), ((2, 5, 3, 4), (3, 5, 2, 6))):
            traced = torch.jit.trace(criterion, data(*small))
            more = data(*large)
            torch.testing.assert_close(traced(*more), criterion(*more))


class LayerLoss(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = self.layer.loss(x, target)
        return loss


def test_jit_trace_of_the_losses_of_layers() -> None:
    for layer in (dnn.DisAlignLinear(IN, 5), dnn.DisAlignCosineLinear(IN, 5, background="last")):
        module = LayerLoss(layer)
        traced = torch.jit.trace(module, (torch.randn(6, IN), torch.randint(0, 5, (6,))))
        x, t = torch.randn(9, IN), torch.randint(0, 5, (9,))
        torch.testing.assert_close(traced(x, t), module(x, t))
    head = LayerLoss(dnn.DisAlignSegHead(IN, 5).eval())
    masks = torch.randint(0, 5, (2, 9, 7))
    traced = torch.jit.trace(head, (torch.randn(2, IN, 3, 3), masks))
    x, t = torch.randn(3, IN, 4, 2), torch.randint(0, 5, (3, 6, 11), dtype=torch.uint8)
    torch.testing.assert_close(traced(x, t.long()), head(x, t))


def test_a_trace_checks_arguments_as_a_call_does() -> None:
    z = torch.randn(4, 5)
    with pytest.raises(IndexError, match=r"Target 7 is out of bounds: target\[1\]"):
        torch.jit.trace(dnn.CrossEntropyLoss(), (z, torch.tensor([0, 7, 1, 1])))
    with pytest.raises(ArgumentError, match=r"weight must have one entry a class \(5\), got 3"):
        torch.jit.trace(dnn.CrossEntropyLoss(torch.ones(3)), (z, torch.tensor([0, 1, 1, 1])))

    class Details(nn.Module):
        def forward(self, z: Tensor, t: Tensor) -> Any:
            return disalign_ops.upsample_cross_entropy(z, t, return_details=True)

    with pytest.raises(ArgumentError, match=r"upsample_predict, or torch\.export"):
        torch.jit.trace(Details(), (torch.randn(1, 5, 2, 2), torch.ones(1, 4, 4).long()))


def test_a_replaced_loop_traces_as_torchs() -> None:
    class Loss(nn.Module):
        def forward(self, z: Tensor, t: Tensor) -> Tensor:
            return torch.nn.functional.cross_entropy(z, t)

    example = torch.randn(4, 5), torch.tensor([0, 4, 2, 1])
    with disalign_ops.replace_cross_entropy():
        traced = torch.jit.trace(Loss(), example)
    assert "aten::cross_entropy_loss" in str(traced.graph)
    torch.testing.assert_close(traced(*example), Loss()(*example))


@pytest.mark.parametrize("name", LOSSES)
def test_jit_script_of_a_loss_names_the_way_out(name: str) -> None:
    criterion = LOSSES[name]()
    for module in (criterion, nn.Sequential(criterion)):
        with pytest.raises(ArgumentError, match=r"cannot compile .*Loss: use torch.jit.trace"):
            torch.jit.script(module)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, IN, 3), nn.BatchNorm2d(IN)
        self.fc = nn.Linear(IN, CLASSES)

    def forward(self, x):  # untyped: torch.fx pickles no type that is a string
        return self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize("form", FORMS)
def test_fx_of_a_converted_model(form: str) -> None:
    model, x = dnn.convert_to_disalign(Net(), form=form), torch.randn(2, 3, 8, 8)
    for mode in (True, False):
        graph = torch.fx.symbolic_trace(model.train(mode))
        graph.graph.lint()
        assert graph.training == mode
        called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        assert disalign_ops.functional.calibrate in called  # one call, by the kernels
        assert_same(graph, model, x)
        for other in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
            torch.testing.assert_close(other(x), model(x))
        graph.train(not mode)
        torch.testing.assert_close(graph(x), model.train(not mode)(x))
    frozen = torch.fx.symbolic_trace(model)
    parameters = dnn.freeze_for_stage2(model)
    assert {id(p) for p in parameters} == {id(p) for p in frozen.parameters() if p.requires_grad}


def test_fx_of_every_layer() -> None:
    for layer, _, x in layers("interpolated"):
        assert_same(torch.fx.symbolic_trace(layer.eval()), layer, x)


def test_fx_finds_the_features_of_a_layer() -> None:
    """As feature extractors do: the node of each module's path."""
    paths: dict[torch.fx.Node, str] = {}

    class PathTracer(torch.fx.Tracer):
        path = ""

        def call_module(self, m: Any, forward: Any, args: Any, kwargs: Any) -> Any:
            before, self.path = self.path, self.path_of_module(m)
            try:
                return super().call_module(m, forward, args, kwargs)
            finally:
                self.path = before

        def create_proxy(self, *arguments: Any, **options: Any) -> Any:
            proxy = super().create_proxy(*arguments, **options)
            paths[proxy.node] = self.path
            return proxy

    model, x = dnn.convert_to_disalign(Net()).eval(), torch.randn(2, 3, 8, 8)
    tracer = PathTracer()
    graph = tracer.trace(model)
    inside = [node for node, path in paths.items() if path == "fc"]
    linear = next(n for n in inside if n.target is torch.nn.functional.linear)
    (output,) = (n for n in graph.nodes if n.op == "output")
    output.args = (linear,)
    extractor = torch.fx.GraphModule(model, graph)
    graph.eliminate_dead_code()
    extractor.recompile()
    raw = extractor(x)
    features = torch.relu(model.norm(model.conv(x))).mean((2, 3))
    torch.testing.assert_close(raw, model.fc.raw_logits(features))


def test_fx_of_what_a_model_calls_itself() -> None:
    class Losses(nn.Module):
        def forward(self, z: Any, t: Any, c: Any, a: Any, b: Any) -> Any:
            calibrated = disalign_ops.calibrate(z, c, a, b)
            return disalign_ops.cross_entropy(calibrated, t) + disalign_ops.disalign_cross_entropy(
                z, t, c, a, b
            )

    graph = torch.fx.symbolic_trace(Losses())
    inputs = (torch.randn(4, 5), torch.tensor([0, 4, 2, 1]), torch.randn(4), torch.rand(5),
              torch.rand(5))  # fmt: skip
    torch.testing.assert_close(graph(*inputs), Losses()(*inputs))
    criterion = dnn.GRWCrossEntropyLoss([5, 4, 3, 2, 1])
    torch.testing.assert_close(
        torch.fx.symbolic_trace(criterion)(*inputs[:2]), criterion(*inputs[:2])
    )


def test_jit_trace_of_predict() -> None:
    class Predict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = dnn.DisAlignSegHead(IN, CLASSES).eval()

        def forward(self, x: Tensor) -> Tensor:
            return self.head.predict(x, (9, 11))

    module = Predict()
    traced = torch.jit.trace(module, torch.randn(2, IN, 3, 3))
    x = torch.randn(4, IN, 5, 3)
    assert torch.equal(traced(x), module(x))
