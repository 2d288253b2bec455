"""What a layer asks of the host on a GPU, seen without one.

Tensors of the GPU are fake: they have a device, a dtype and a shape, and no values. Whatever the
layer copies to the host is counted, and gets the values that the test has planned.
"""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from remoe import ReMoELayer, ReMoELayerConfig
from remoe.kernels import Permutation, experts, routed, swiglu

aten = torch.ops.aten
TOKENS, EXPERTS = 32, 8
# Operators after which the host waits for the size of the result.
WAITS = {aten.nonzero, aten.masked_select, aten._unique2, aten._local_scalar_dense}


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    """Where torch sees a GPU, a fake mode lets it copy lists to the device unseen."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


class HostCopies(TorchDispatchMode):
    """Counts what the host waits for; goes over a `FakeTensorMode`, whose CPU tensors are real."""

    def __init__(self, planned):
        super().__init__()
        self.planned, self.waits = list(planned), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        on_gpu = any(t.device.type == "cuda" for t in tensors)
        target = torch.device(kwargs.get("device") or "cpu").type
        packet = func.overloadpacket
        if packet is aten._to_copy and "device" in kwargs and on_gpu and target == "cpu":
            self.waits.append(str(packet))
            with _disable_current_modes():
                return torch.tensor(self.planned.pop(0), dtype=tensors[0].dtype)
        if packet is aten._to_copy and not on_gpu and target == "cuda":
            if not kwargs.get("non_blocking"):
                self.waits.append("copy to the device")
            return torch.empty(tensors[0].shape, dtype=tensors[0].dtype, device="cuda")
        if on_gpu and packet in WAITS:
            self.waits.append(str(packet))
        if packet in (aten.index, aten.index_put_) and on_gpu:
            self._indices(args[1])
        if not on_gpu and tensors and target == "cpu":
            with _disable_current_modes():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _indices(self, indices):
        for index in indices:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                self.waits.append("boolean index")


def on_fake_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(swiglu, "_fused", lambda function, z: function)  # not compiled here


def waits_of_forward(planned, dtype=torch.bfloat16, **changes):
    sizes = {"hidden_size": 16, "ffn_hidden_size": 24, "num_experts": EXPERTS, "topk": 1}
    with FakeTensorMode(allow_non_fake_inputs=True), HostCopies(planned) as copies:
        layer = ReMoELayer(ReMoELayerConfig(**sizes | changes), device="cuda", dtype=dtype)
        x = torch.empty(TOKENS, 16, device="cuda", dtype=dtype)
        copies.waits.clear()
        y = layer(x)
    assert (y.device.type, y.dtype, y.shape) == ("cuda", dtype, x.shape)
    return copies.waits


def context_of_autograd(inputs):
    context = SimpleNamespace(needs_input_grad=(True,) * inputs)
    context.save_for_backward = lambda *tensors: setattr(context, "saved_tensors", tensors)
    return context


COUNTS = [5, 0, 0, 9, 1, 0, 30, 0]


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_forward_waits_for_its_counts_only(monkeypatch, capability, dtype):
    on_fake_gpu(monkeypatch, capability)
    assert waits_of_forward([COUNTS], dtype, max_assignments=1000) == ["aten._to_copy"]


def test_forward_in_chunks_waits_at_most_once_more(monkeypatch):
    on_fake_gpu(monkeypatch, (9, 0))
    assert len(waits_of_forward([COUNTS], max_assignments=30)) == 1
    assert len(waits_of_forward([COUNTS, [10, 10, 10]], max_assignments=10)) == 2  # tokens split


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("accumulates", [False, True])
def test_backward_of_experts_waits_for_nothing(monkeypatch, capability, accumulates):
    """Autograd's engine asks for a real GPU, so this calls the function itself."""
    on_fake_gpu(monkeypatch, capability)
    with FakeTensorMode(allow_non_fake_inputs=True), HostCopies([]) as copies, torch.no_grad():
        inputs = inputs_of_experts()
        main_grads = tuple(weight.clone() for weight in inputs[2:]) if accumulates else None
        context = context_of_autograd(7)
        y = experts._GroupedSwiGLU.forward(context, *inputs, COUNTS, main_grads, False)
        grads = experts._GroupedSwiGLU.backward(context, y)
    assert copies.waits == []
    for grad, tensor in zip(grads[:4], inputs, strict=True):
        assert (grad.device, grad.dtype, grad.shape) == (tensor.device, tensor.dtype, tensor.shape)


def inputs_of_experts():
    """Rows, weights of rows, and both weights of experts."""
    rows, hidden, width = sum(COUNTS), 16, 24
    sizes = ((rows, hidden), (rows,), (EXPERTS, 2 * width, hidden), (EXPERTS, hidden, width))
    return [torch.empty(*size, device="cuda", dtype=torch.bfloat16) for size in sizes]


class Launches(HostCopies):
    """Records products, and multiplications of rows of width H."""

    def __init__(self):
        super().__init__([])
        self.products = self.weightings = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.products += func.overloadpacket is aten._grouped_mm
        self.weightings += func.overloadpacket is aten.mul and result.shape[-1] == 16
        return result


def test_experts_launch_what_the_roofline_says(monkeypatch):
    from megatron.remoe.bench.layer import Shape
    from megatron.remoe.bench.roofline import PRODUCTS, counted_in_torch

    on_fake_gpu(monkeypatch, (9, 0))
    counted = counted_in_torch(Shape(TOKENS, 16, 24, EXPERTS, 1, torch.bfloat16))
    with FakeTensorMode(allow_non_fake_inputs=True), Launches() as launches, torch.no_grad():
        context = context_of_autograd(7)
        inputs = inputs_of_experts()
        y = experts._GroupedSwiGLU.forward(context, *inputs, COUNTS, None, False)
        forward = launches.products, launches.weightings
        experts._GroupedSwiGLU.backward(context, y)
    both = launches.products, launches.weightings
    names = (PRODUCTS, "weighting")
    assert forward == tuple(counted[name].forward.launches for name in names)
    assert both == tuple(sum(c.launches for c in counted[name]) for name in names)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_backward_of_one_function_waits_for_nothing(monkeypatch, capability):
    on_fake_gpu(monkeypatch, capability)
    context = context_of_autograd(8)
    with FakeTensorMode(allow_non_fake_inputs=True), HostCopies([]) as copies, torch.no_grad():
        pairs, hidden, width = sum(COUNTS), 16, 24
        index = [torch.empty(n, device="cuda", dtype=torch.long) for n in (pairs,) * 3 + (TOKENS,)]
        tensors = [
            torch.empty(*size, device="cuda", dtype=torch.bfloat16)
            for size in (
                (TOKENS, hidden),
                (TOKENS, EXPERTS),
                (EXPERTS, 2 * width, hidden),
                (EXPERTS, hidden, width),
            )
        ]
        function = routed._RoutedSwiGLU
        y = function.forward(context, *tensors, Permutation(*index), COUNTS, False)
        grads = function.backward(context, y)
    assert copies.waits == []
    for grad, tensor in zip(grads[:4], tensors, strict=True):
        assert (grad.device, grad.dtype, grad.shape) == (tensor.device, tensor.dtype, tensor.shape)


def test_the_count_of_waits_sees_them():
    with FakeTensorMode(allow_non_fake_inputs=True), HostCopies([[1, 2]]) as copies:
        x = torch.empty(2, device="cuda")
        assert x.cpu().tolist() == [1, 2]
        x[[0]] = 0
        x[x > 0] = 0
        torch.tensor([1.0]).to("cuda")
    copy = "copy to the device"
    assert copies.waits == ["aten._to_copy", copy, "boolean index", copy]
