"""Runs for tests/test_own_mask.py, in one process or in two: DDP through the trainer, and FSDP2 by `fully_shard`."""

import os
import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

from fsdp_worker import SETTINGS, Model, assert_same_state, whole
from hf_admm import ADMMTrainer, ADMMTrainingArguments
from hf_admm.checkpoints.sidecar import load_sidecar, save_sidecar
from hf_admm.mask_audit import audit_masks
from hf_admm.pruning.state import ADMMState
from hf_admm.sparsity.patterns import OwnPattern
from hf_admm.sparsity.targets import select_targets
from launch import leave
from own_masks import bring_zeros, zeros_of
from tiny_models import NO_DROPOUT, tiny_bert, token_data


def by_the_trainer(folder: Path, processes: int) -> tuple[dict, dict]:
    model, data = bring_zeros(tiny_bert(**NO_DROPOUT["tiny_bert"])), token_data(64)
    zeros = zeros_of(model)
    args = ADMMTrainingArguments(
        str(folder), sparsity_pattern="own", max_steps=6, per_device_train_batch_size=16 // processes, optim="sgd",
        learning_rate=0.05, save_steps=3, report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = ADMMTrainer(model, args, train_dataset=data)
    trainer.train()
    assert trainer.audit.ok
    return whole(model.named_parameters()), zeros


def build(seed: int = 0) -> tuple[Model, ADMMState, dict]:
    torch.manual_seed(seed)
    model = bring_zeros(Model())
    zeros = zeros_of(model)
    if distributed.is_initialized():
        fully_shard(model.layers[0])
        fully_shard(model)
    state = ADMMState()
    selection = select_targets(model, OwnPattern())
    assert set(selection.targets) == set(zeros) and len(zeros) == 10
    state.reset(model, OwnPattern(), selection)
    return model, state, zeros


def by_shards(folder: Path, fault: bool) -> dict:
    model, state, zeros = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    for step in range(6):
        if step == 0:
            state.begin(SETTINGS)
        state.before_forward(step, SETTINGS)
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(x), torch.arange(8) % 2).backward()
        state.before_clipping(SETTINGS)
        state.after_clipping(SETTINGS)
        optimizer.step()
        state.after_step(SETTINGS, {})
        optimizer.zero_grad()
        with state.sparse_weights(), torch.no_grad():
            model(torch.ones(2, 16))
        if step == 3:
            save_sidecar(state, folder, write=rank == 0)
            (folder / "shards").mkdir(exist_ok=True)
            save_sidecar(state, folder / "shards", sharded=True)
    state.finish()
    assert state.weights.obey()
    found = {"fsdp": whole(model.named_parameters()), "fsdp zeros": zeros}
    found["audit"] = audit_masks(state.weights.whole_masks()).verdict()
    if distributed.is_initialized():
        distributed.barrier()
    _, again, _ = build()
    load_sidecar(again, folder, SETTINGS)
    assert again.weights.kept == state.weights.kept
    _, from_shards, _ = build()
    load_sidecar(from_shards, folder / "shards", SETTINGS)
    assert_same_state(again, from_shards)
    return {**found, "restored": whole(again.weights.parameters.items()), "restored zeros": zeros}


def drift(folder: Path) -> None:
    """Unsharded replicas, one bit of one mask of which differs."""
    torch.manual_seed(0)
    state, model = ADMMState(), bring_zeros(Model())
    state.reset(model, OwnPattern(), select_targets(model, OwnPattern()))
    state.begin(SETTINGS)
    if distributed.get_rank() == 1:
        state.weights.masks["layers.0.even.weight"][3] ^= 1
    state.before_forward(64, SETTINGS)


def main(folder: str, fault: str = "") -> None:
    torch.set_num_threads(1)
    here, processes = Path(folder), int(os.environ.get("WORLD_SIZE", "1"))
    here.mkdir(exist_ok=True)
    if fault:
        distributed.init_process_group("gloo")
        drift(here)
        return
    results = {}
    results["ddp"], results["ddp zeros"] = by_the_trainer(here / "run", processes)
    results |= by_shards(here, bool(fault))
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        torch.save(results, here / "results.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
