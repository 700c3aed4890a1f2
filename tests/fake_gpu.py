"""Serving without a GPU, for the tests of it.

PyTorch's own sparse tensors run on a CPU all the same: their compressed layout, dispatch and padding are Python. Only
the two CUDA kernels are replaced, by a product with the matrix that the layout stands for.
"""

from contextlib import contextmanager

import torch
from torch import nn
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass as unpack
from transformers.pytorch_utils import Conv1D

from hf_admm import inference, parse_pattern, project, select_targets


PATTERN = parse_pattern("2:4")
BF16 = torch.bfloat16
# Tiny models as wide as the backends ask for, and how many of their layers are pruned.
WIDE = {"tiny_bert": {"hidden_size": 64, "intermediate_size": 128}, "tiny_gpt2": {"n_embd": 64}}
PRUNED = {"tiny_bert": 12, "tiny_gpt2": 8}


@contextmanager
def fake_gpu(monkeypatch):
    """A CPU that passes for a GPU without cuSPARSELt."""

    def product(packed, meta, dense, **_):
        return unpack(packed, meta) @ dense

    def biased_product(bias, packed, meta, dense, **_):
        return product(packed, meta, dense) + bias[:, None]

    kernels = torch.library.Library("aten", "IMPL")
    kernels.impl("_sparse_semi_structured_mm", product, "CPU")
    kernels.impl("_sparse_semi_structured_addmm", biased_product, "CPU")
    monkeypatch.setattr(inference, "_is_cuda", lambda device: device.type == "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    cutlass = inference.BACKENDS["cutlass"]
    monkeypatch.setattr(cutlass, "_validate_device_dim_dtype_shape", classmethod(lambda cls, tensor: None))
    yield
    kernels._destroy()


def sparse(request, name):
    """The tiny model of that fixture in bfloat16 with its pruned weights 2:4, ready to serve."""
    model = request.getfixturevalue(name)(**WIDE[name]).to(BF16).eval()
    for weight, target in select_targets(model, PATTERN).targets.items():
        parameter = model.get_parameter(weight)
        parameter.data.copy_(project(parameter.data, PATTERN, target.transposed))
    return model


def linear(rows=32, columns=64, dtype=BF16, bias=True, sparse=True):
    torch.manual_seed(0)
    layer = nn.Linear(columns, rows, bias=bias).to(dtype).eval()
    if sparse:
        layer.weight.data.copy_(project(layer.weight.data, PATTERN))
    return layer


def conv1d(rows=32, columns=64):
    torch.manual_seed(0)
    layer = Conv1D(rows, columns).to(BF16).eval()
    layer.weight.data.copy_(project(torch.randn(columns, rows), PATTERN, transposed=True))
    return layer


def tokens(batch=3, length=7):
    return torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(0))


def assert_close(outputs, expected):
    """Equal but for the rounding of a few sums."""
    assert outputs.shape == expected.shape and outputs.dtype == expected.dtype
    if expected.numel():
        error = (outputs - expected).abs().max()
        assert error <= 8 * torch.finfo(expected.dtype).eps * expected.abs().max()


def assert_same_state(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert type(state[name]) is torch.Tensor and torch.equal(state[name], tensor), name
