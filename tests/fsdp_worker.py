"""Runs for tests/pruning/test_sharded.py, in one process or, with the weights sharded by FSDP2, in several."""

import itertools
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from hf_admm import parse_pattern
from hf_admm.checkpoints.sidecar import load_sidecar, save_sidecar
from hf_admm.pruning.phases import PhaseSettings
from hf_admm.pruning.schedules import PhasePlan
from hf_admm.pruning.shards import local, straddles
from hf_admm.pruning.state import ADMMState
from hf_admm.sparsity.targets import select_targets
from launch import leave


# Updates at steps 2 and 4, with a rho that grows, and the switch at 6.
SETTINGS = PhaseSettings(
    plan=PhasePlan(10, 6, 10),
    rho=0.6,
    rho_schedule="linear",
    update_steps=2,
    penalty="loss",
    decay=0.01,
    mask_update_steps=1,
)
PENALTIES = {"loss": SETTINGS, "distance": replace(SETTINGS, penalty="distance", rho=16.0, decay=None)}
PATTERNS = ("2:4", "1:4", "4:8", "4x4:8", "2x8:5", "0.5")


class Layer(nn.Module):
    """Shapes that two or three processes divide evenly, unevenly, and into shards of which some are empty."""

    def __init__(self):
        super().__init__()
        self.even = nn.Linear(16, 24)
        self.conv = Conv1D(16, 24)  # (24, 16): the input dimension is the sharded one
        self.uneven = nn.Linear(16, 40)
        self.narrow = Conv1D(16, 40)
        self.small = nn.Linear(16, 4)

    def forward(self, x):
        x = torch.relu(self.conv(self.even(x)))
        return self.small(torch.tanh(self.narrow(self.uneven(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([layer(x)] * 4, dim=-1)
        return self.head(x[:, :4])


def build(pattern: str, seed: int = 0) -> tuple[Model, ADMMState]:
    torch.manual_seed(seed)
    model = Model()
    if distributed.is_initialized():
        fully_shard(model.layers[0])
        fully_shard(model)  # the other layer too: what the outermost module holds stays gathered after a forward pass
    state = ADMMState()
    selection = select_targets(model, parse_pattern(pattern))
    assert len(selection.targets) == 10
    state.reset(model, parse_pattern(pattern), selection)
    return model, state


def whole(tensors) -> dict[str, torch.Tensor]:
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in tensors}


def evaluate(model, state) -> torch.Tensor:
    with state.sparse_weights(), torch.no_grad():
        return model(torch.linspace(-1, 1, 48).reshape(3, 16)).clone()


def train(model, state, steps, folder, settings):
    """Both phases as the callbacks run them: updates at steps 2 and 4, the switch at 6, an evaluation after each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    evaluations, figures = [], []
    for step in range(steps):
        if step == 0:
            state.begin(settings)
        state.before_forward(step, settings)
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(x), torch.arange(8) % 2).backward()
        state.before_clipping(settings)
        state.after_clipping(settings)
        optimizer.step()
        state.after_step(settings, {})
        optimizer.zero_grad()
        if step + 1 in (3, 8):
            checkpoint = folder / str(step + 1)
            checkpoint.mkdir(exist_ok=True, parents=True)
            save_sidecar(state, checkpoint, write=not distributed.is_initialized() or distributed.get_rank() == 0)
        evaluations.append(evaluate(model, state))
        penalty = state.phase.penalty(settings)
        figures.append({name: float(figure) for name, figure in state.figures.items()} | {"penalty": penalty})
    return torch.stack(evaluations), figures


def main(folder: str) -> None:
    torch.set_num_threads(1)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        distributed.init_process_group("gloo")
    rank = distributed.get_rank() if processes > 1 else 0
    for penalty, pattern in itertools.product(PENALTIES, PATTERNS):
        settings, here = PENALTIES[penalty], Path(folder) / f"{penalty}-{pattern.replace(':', '-')}"
        model, state = build(pattern)
        held = state.weights.parameters
        divided = [n for n, w in held.items() if straddles(w, state.weights.pattern, state.targets[n].transposed)]
        evaluations, figures = train(model, state, 10, here, settings)
        state.finish()
        assert state.weights.obey()
        results = {"evaluations": evaluations, "weights": whole(model.named_parameters())}
        restored = {}
        for step in (3, 8):
            other, again = build(pattern, seed=1)
            if processes > 1:
                distributed.barrier()
            load_sidecar(again, here / str(step), settings)
            dense = whole(again.weights.parameters.items())
            companions = again.phase.companions if again.phase.companion == "anchor" else {}
            companions |= getattr(again.phase, "rooms", {})
            assert all(local(again.weights.parameters[n]).shape == t.shape for n, t in companions.items())
            restored[step] = {"phase": again.phase.name, "weights": dense, "evaluation": evaluate(other, again)}
        results["restored"] = restored
        if rank == 0:
            torch.save(results, here / "results.pt")
            (here / "figures.json").write_text(json.dumps({"figures": figures, "straddle": divided}))


if __name__ == "__main__":
    main(sys.argv[1])
    leave()
