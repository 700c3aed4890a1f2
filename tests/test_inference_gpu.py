"""Serving with the real kernels; skipped without a GPU that has them."""

import copy

import pytest
import torch
from torch import nn

from fake_gpu import PRUNED, WIDE, assert_same_state, linear, sparse, tokens
from hf_admm import accelerate_inference, inference


pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs a GPU with 2:4 kernels"
)


@pytest.mark.parametrize("backend", [None, *inference.BACKENDS])
@pytest.mark.parametrize("dtype", inference.DTYPES)
def test_outputs_are_within_tolerance(request, dtype, backend):
    if backend == "cusparselt" and not torch.backends.cusparselt.is_available():
        pytest.skip("this PyTorch comes without cuSPARSELt")
    for name in WIDE:
        dense = sparse(request, name).to("cuda", dtype)
        state = copy.deepcopy(dense.state_dict())
        served = copy.deepcopy(dense)
        assert len(accelerate_inference(served, backend).converted) == PRUNED[name]
        with torch.inference_mode():
            for batch in (1, 3, 8):
                inputs = tokens(batch).cuda()
                expected = dense(inputs).logits
                torch.testing.assert_close(served(inputs).logits, expected, rtol=0.03, atol=0.03)
        assert_same_state(served.state_dict(), state)


@pytest.mark.parametrize("dtype", inference.DTYPES)
def test_layers_differ_by_rounding_alone(dtype):
    dense = linear(768, 3072, dtype).cuda()
    layer = nn.Sequential(copy.deepcopy(dense))
    accelerate_inference(layer)
    inputs = torch.randn(7, 5, 3072, device="cuda").to(dtype)
    exact = nn.functional.linear(inputs.double(), dense.weight.double(), dense.bias.double())
    error = (layer(inputs).double() - exact).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * exact.abs().max()
    compiled = torch.compile(layer)
    torch.testing.assert_close(compiled(inputs), layer(inputs))
