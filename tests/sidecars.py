"""A small model with a state, and what a sidecar makes of it."""

import re
from dataclasses import replace

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_admm.checkpoints.sidecar import load_sidecar
from hf_admm.pruning.phases import PhaseSettings
from hf_admm.pruning.schedules import PhasePlan
from hf_admm.pruning.srste import SRSTE
from hf_admm.pruning.state import ADMMState
from hf_admm.sparsity.patterns import parse_pattern
from hf_admm.sparsity.targets import select_targets


PATTERN = parse_pattern("2:4")
SETTINGS = PhaseSettings(
    plan=PhasePlan(12, 6, 12),
    rho=0.1,
    rho_schedule="constant",
    update_steps=2,
    penalty="loss",
    decay=2e-4,
    mask_update_steps=1,
)


def model_and_state():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), Conv1D(4, 8), nn.Linear(4, 4, dtype=torch.bfloat16))
    state = ADMMState()
    state.reset(model, PATTERN, select_targets(model, PATTERN))
    return model, state


def trained(phase):
    """Both in the middle of a phase, its companions different from what they began with."""
    model, state = model_and_state()
    state.begin(replace(SETTINGS, penalty=None) if phase == "dense_phase" else SETTINGS)
    with torch.no_grad():
        for weight in state.weights.parameters.values():
            weight.add_(torch.randn_like(weight))
    state.before_forward(4, SETTINGS)
    if phase == "srste":
        state.enter(SRSTE, SETTINGS, 6)
    return model, state


def snapshot(model, state):
    tensors = {
        **dict(model.named_parameters()),
        **{f"companion {name}": t for name, t in state.phase.companions.items()},
    }
    settings = (state.phase.name, state.phase.rho, state.phase.updated_at, state.phase.figures, state.resumed)
    return settings, {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same(one, other):
    assert one[0] == other[0] and one[1].keys() == other[1].keys()
    for name, tensor in one[1].items():
        assert tensor.dtype == other[1][name].dtype and torch.equal(tensor, other[1][name]), name


def load(folder):
    """Loads the sidecar into a new model: what it restores, or `None` if it was refused with all left as it was."""
    model, state = model_and_state()
    before = snapshot(model, state)
    try:
        load_sidecar(state, folder, SETTINGS)
    except ValueError as error:
        assert str(folder) in str(error) and re.search("Resume (with|from)", str(error))
        assert_same(snapshot(model, state), before)
        return None
    return snapshot(model, state)
