"""Runs for tests/pruning/test_sharded.py, in one process or, with the weights sharded by FSDP2, in several."""

import itertools
import json
import os
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from hf_admm import parse_pattern
from hf_admm.checkpoints.sidecar import SHARDED_SIDECAR_NAME, load_sidecar, save_sidecar
from hf_admm.pruning.phases import PhaseSettings
from hf_admm.pruning.schedules import PhasePlan
from hf_admm.pruning.shards import local, straddles
from hf_admm.pruning.state import ADMMState
from hf_admm.sparsity.targets import select_targets
from launch import die_at, leave


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
PENALTIES = {
    "loss": SETTINGS,
    "distance": replace(SETTINGS, penalty="distance", rho=16.0, decay=None),
    "none": replace(SETTINGS, penalty=None, rho=0.0),
}
PHASE_1 = {"loss": "admm", "distance": "distance", "none": "dense_phase"}
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


@contextmanager
def nothing_gathered():
    """Within it, no process may ask for the whole of a tensor."""
    full_tensor = DTensor.full_tensor
    DTensor.full_tensor = None
    try:
        yield
    finally:
        DTensor.full_tensor = full_tensor


def assert_same_state(one, other):
    """All that training goes on from, to the bit, on this process."""
    phases = one.phase, other.phase
    assert len({(phase.name, phase.rho, phase.updated_at, str(phase.figures)) for phase in phases}) == 1
    assert one.weights.kept == other.weights.kept and one.targets == other.targets
    for name, part in one.weights.local():
        assert torch.equal(part, local(other.weights.parameters[name].detach())), name
    assert phases[0].companions.keys() == phases[1].companions.keys()
    for name, companion in phases[0].companions.items():
        assert torch.equal(companion, phases[1].companions[name]), name
    rooms = [{n: (t.shape, t.dtype) for n, t in getattr(phase, "rooms", {}).items()} for phase in phases]
    assert rooms[0] == rooms[1]


def restore(pattern, folder, settings, seed):
    """A state from a sidecar, in a new model."""
    _, state = build(pattern, seed)
    load_sidecar(state, folder, settings)
    return state


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
            (shards := folder / "shards" / str(step + 1)).mkdir(exist_ok=True, parents=True)
            with nothing_gathered():
                save_sidecar(state, shards, sharded=True)
        evaluations.append(evaluate(model, state))
        penalty = state.phase.penalty(settings)
        figures.append({name: float(figure) for name, figure in state.figures.items()} | {"penalty": penalty})
    return torch.stack(evaluations), figures


def one_process_fails(folder: Path) -> None:
    """A full disk, and a shard that is damaged, on the second process alone: both stop, and all is as it was."""
    rank, settings = distributed.get_rank(), PENALTIES["loss"]
    _, state = build("2:4")
    state.begin(settings)
    folder.mkdir(exist_ok=True)
    save_sidecar(state, folder, sharded=True)
    with torch.no_grad():
        for _, part in state.weights.local():
            part.add_(1)
    write = FileSystemWriter.write_data
    if rank == 1:
        FileSystemWriter.write_data = lambda *_: (_ for _ in ()).throw(OSError("No space left on device"))
    with raises(OSError, "No space left on device"):
        save_sidecar(state, folder, sharded=True)
    FileSystemWriter.write_data = write
    before = restore("2:4", folder, settings, 2)
    assert not any(
        torch.equal(p, q) for (_, p), (_, q) in zip(before.weights.local(), state.weights.local(), strict=True)
    )

    shard = folder / SHARDED_SIDECAR_NAME / "__1_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    distributed.barrier()
    if rank == 0:
        shard.write_bytes(content)
    distributed.barrier()
    _, other = build("2:4", seed=3)
    _, same = build("2:4", seed=3)
    with raises(ValueError, "not what was saved: __1_0.distcp): it is damaged"):
        load_sidecar(other, folder, settings)
    assert_same_state(other, same)


@contextmanager
def raises(kind, text):
    try:
        yield
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"{kind} was not raised")


def killed_while_writing(folder: Path) -> None:
    """A child is killed at each of the file operations of a save in turn; the old state is there, or the new one."""
    settings, states = PENALTIES["loss"], []
    for shift in (0, 1):
        _, state = build("2:4", seed=shift)
        state.begin(settings)
        states.append(state)
    killed = {"old": 0, "new": 0}
    for operation in range(1, 1000):
        place = folder / str(operation)
        place.mkdir()
        save_sidecar(states[0], place, sharded=True)
        if (child := os.fork()) == 0:
            die_at(operation, place)
            save_sidecar(states[1], place, sharded=True)
            os._exit(0)
        survived = not os.WIFSIGNALED(os.waitpid(child, 0)[1])
        found = restore("2:4", place, settings, 2)
        ages = [all(torch.equal(part, dict(state.weights.local())[name]) for name, part in found.weights.local())
                for state in states]  # fmt: skip
        assert sum(ages) == 1
        assert_same_state(found, states[ages.index(True)])
        save_sidecar(states[1], place, sharded=True)  # what was left is no hindrance
        assert [path.name for path in place.iterdir()] == [SHARDED_SIDECAR_NAME]
        if survived:
            assert ages == [False, True]
            break
        killed["new" if ages[1] else "old"] += 1
    assert killed["old"] > 8 and killed["new"], killed


def main(folder: str, *others: str) -> None:
    sharded_by = list(map(int, others))  # numbers of processes of earlier runs
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
            # Whoever wrote the shards, they are what the file of the same run is.
            for count in (processes, *sharded_by):
                run = Path(folder).parent / str(count) / here.name
                file, shards = (restore(pattern, at / str(step), settings, 2) for at in (run, run / "shards"))
                assert_same_state(file, shards)
            restored[step] = {"phase": again.phase.name, "weights": dense, "evaluation": evaluate(other, again)}
        results["restored"] = restored
        if rank == 0:
            torch.save(results, here / "results.pt")
            (here / "figures.json").write_text(json.dumps({"figures": figures, "straddle": divided}))

    if processes == 2:
        one_process_fails(Path(folder) / "faults")
    if processes == 1 and hasattr(os, "fork"):
        (Path(folder) / "kills").mkdir()
        killed_while_writing(Path(folder) / "kills")


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
