"""Layers are pruned one by one, each with the inputs that it will have."""

import pytest
import torch
from torch import nn

from benchmarks.study.calibration import prune_model
from benchmarks.study.sparsegpt import prune
from layer_inputs import data, hessian_of


def test_hessian_is_the_same_in_parts():
    inputs = data(8)
    assert torch.allclose(hessian_of(inputs), 2 / len(inputs) * inputs.T @ inputs, rtol=1e-4)


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, inputs):
        for layer in self.layers:
            inputs = torch.relu(layer(inputs))
        return inputs


def test_a_later_block_sees_the_pruned_blocks_before_it():
    torch.manual_seed(0)
    model, inputs = Blocks(), data(16)
    first, second = (layer.weight.detach().clone() for layer in model.layers)
    bias = model.layers[0].bias.detach()
    calls = []
    prune_model(model, [f"layers.{i}.weight" for i in range(2)], "2:4", lambda m: calls.append(m(inputs)), prune)
    assert len(calls) == 2 and model.training
    pruned = prune(first, hessian_of(inputs), 2, 4)
    assert torch.allclose(model.layers[0].weight, pruned, atol=1e-5)
    between = torch.relu(inputs @ pruned.T + bias)
    assert torch.allclose(model.layers[1].weight, prune(second, hessian_of(between), 2, 4), atol=1e-4)


def test_what_it_can_not_prune_is_refused(tiny_gpt2):
    with pytest.raises(ValueError, match="to N:M, not to '4x4:8'"):
        prune_model(Blocks(), ["layers.0.weight"], "4x4:8", lambda model: None, prune)
    with pytest.raises(ValueError, match=r"if they are nn.Linear, not transformer.h.0.attn.c_attn.weight"):
        prune_model(tiny_gpt2(), ["transformer.h.0.attn.c_attn.weight"], "2:4", lambda model: None, prune)
