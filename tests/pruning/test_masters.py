"""What is done under ZeRO to weights that each step makes anew of masters, on a stand-in for DeepSpeed's optimizer."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_admm import parse_pattern, select_targets
from hf_admm.pruning.distance import Distance
from hf_admm.pruning.phases import PhaseSettings
from hf_admm.pruning.schedules import PhasePlan
from hf_admm.pruning.srste import SRSTE
from hf_admm.pruning.state import ADMMState


SETTINGS = PhaseSettings(PhasePlan(8, 4, 8), 16.0, "constant", 1, "distance", None, 1)


class Zero:
    """The masters of one of several processes: a flat copy of a part of all weights, as ZeRO divides them."""

    def __init__(self, model: nn.Module, rank: int = 0, processes: int = 1):
        parameters, self.overflow, self.bit16_groups = list(model.parameters()), False, [list(model.parameters())]
        flat = torch.cat([parameter.detach().flatten() for parameter in parameters]).float()
        size = -(-flat.numel() // processes)
        self.flat = flat[rank * size : (rank + 1) * size].clone().requires_grad_()
        self.param_groups = [{"params": [self.flat], "lr": 0.1}]
        before = 0
        for parameter in parameters:
            first, last = max(before, rank * size), min(before + parameter.numel(), rank * size + len(self.flat))
            parameter._hp_mapping = self.mapping(first, last, before, rank * size) if first < last else None
            before += parameter.numel()

    def mapping(self, first: int, last: int, of_parameter: int, of_masters: int):
        place = SimpleNamespace(start=first - of_parameter, numel=last - first)
        master = self.flat.narrow(0, first - of_masters, last - first)
        return SimpleNamespace(lp_fragment_address=place, get_hp_fragment=lambda: master)


def begun(phase, rank=0, processes=1, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6 + 2, 4), nn.Linear(8, 3)).to(dtype)
    zero, state, pattern = Zero(model, rank, processes), ADMMState(), parse_pattern("2:4")
    state.reset(model, pattern, select_targets(model, pattern, ["0", "1"]))
    state.use_optimizer(zero)
    state.enter(phase, SETTINGS, 4)
    return model, zero, state


def shrink(state):
    """As the phase does: after each step, or before the mask follows."""
    state.after_step(SETTINGS, {})
    state.before_forward(5, SETTINGS)
    state.restore_dense()


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("phase", [Distance, SRSTE])
def test_masters_shrink_as_their_weights_do(phase, processes):
    parts = []
    for rank in range(processes):
        model, zero, state = begun(phase, rank, processes)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        state.phase.rho = 0.5
        shrink(state)
        parts.append(zero.flat.detach())
    now = list(model.parameters())
    assert torch.equal(torch.cat(parts), torch.cat([parameter.detach().flatten() for parameter in now]))
    moved = [not torch.equal(a, b) for a, b in zip(before, now, strict=True)]
    assert moved == [True, False, True, False, False, False]


def test_masters_keep_more_digits():
    _, zero, state = begun(SRSTE, dtype=torch.bfloat16)
    before = zero.flat.detach().clone()
    state.phase.rho = 1e-3  # less than half of the last digit of bfloat16
    shrink(state)
    shrunk = zero.flat.detach() != before
    assert shrunk.any() and not torch.equal(zero.flat, zero.flat.bfloat16().float())


@pytest.mark.parametrize("overflow", [False, True])
def test_what_is_aside_is_old_once_the_step_is_taken(overflow):
    model, zero, state = begun(SRSTE)
    weight, dense = model[0].weight, model[0].weight.detach().clone()
    state.before_forward(5, SETTINGS)
    assert (weight == 0).any()
    stepped = dense + 1
    if not overflow:
        weight.data.copy_(stepped)  # within the backward pass
    zero.overflow = overflow
    state.after_clipping(SETTINGS)
    assert not state.masked
    assert torch.equal(weight, dense if overflow else stepped)


@pytest.mark.parametrize("overflow", [False, True])
def test_a_step_that_is_skipped_shrinks_nothing(overflow):
    model, zero, state = begun(Distance)
    before, zero.overflow, state.phase.rho = model[0].weight.detach().clone(), overflow, 0.5
    state.after_step(SETTINGS, {})
    assert torch.equal(model[0].weight, before) == overflow


def test_an_optimizer_without_masters_of_the_targets_is_refused():
    model, _, state = begun(Distance)
    with pytest.raises(ValueError, match="holds none of the 2 weights to prune"):
        state.use_optimizer(Zero(nn.Linear(2, 2)))
