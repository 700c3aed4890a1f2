"""Runs of ADMMTrainer for tests/test_fsdp_trainer.py, with the weights sharded by FSDP2 on CPU processes.

accelerate hands FSDP's plugin on where processes have GPUs, and drops it without a word on CPUs: Trainer trains with
DDP then (`AcceleratorState.__init__`). That one decision is taken for it here; all else is accelerate's and Trainer's.
"""

import sys
from pathlib import Path

import accelerate.accelerator
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, default_data_collator

from hf_admm import ADMMTrainer, ADMMTrainingArguments, prune_one_shot
from launch import leave
from tiny_models import NO_DROPOUT, tiny_bert, token_data


SAMPLES = 12
PULLED = {"admm_steps": 4, "admm_update_steps": 2, "admm_rho": 2.0, "admm_penalty": "loss"}
DENSE_HALF = {"sparsity_pattern": "1:4"}  # by default


class WithPlugin(AcceleratorState):
    def __init__(self, *args, fsdp_plugin=None, **kwargs):
        super().__init__(*args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type in (DistributedType.MULTI_CPU, DistributedType.FSDP):
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # as it does where there are GPUs


accelerate.accelerator.AcceleratorState = WithPlugin


class Keep(TrainerCallback):
    """Keeps the dense weights that a step begins with."""

    def __init__(self, step):
        self.step, self.weights = step, None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.weights = whole(model)


class Switch(TrainerCallback):
    """Keeps the dense weights that phase 1 ends with, and what phase 2 computes with at first."""

    def __init__(self, step):
        self.step, self.before, self.after = step, None, None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.before = whole(model)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.after = whole(model)


def assert_pruned_as_one(switch, data, pattern):
    """By the same rows, a whole model is pruned to the same weights."""
    model = tiny_bert(**NO_DROPOUT["tiny_bert"])
    model.load_state_dict(switch.before, strict=False)
    rows = [data[index * len(data) // SAMPLES] for index in range(SAMPLES)]
    report = prune_one_shot(model, [default_data_collator(rows[:8]), default_data_collator(rows[8:])], pattern)
    for name in report.errors:
        expected, found = model.get_parameter(name).detach(), switch.after[name]
        assert torch.equal(expected == 0, found == 0), name
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5, msg=name)


def whole(model):
    return {
        name: (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().clone()
        for name, weight in model.named_parameters()
    }


def train(folder, kind="SHARDED_STATE_DICT", resume=None, phase_1=PULLED, **options):
    AcceleratorState._reset_state()
    model, data = tiny_bert(**NO_DROPOUT["tiny_bert"]), token_data(64)
    fsdp = {"version": 2, "state_dict_type": kind, "transformer_layer_cls_to_wrap": ["BertLayer"]}
    args = ADMMTrainingArguments(
        str(folder), max_steps=8, per_device_train_batch_size=8, learning_rate=0.01, num_calibration_samples=SAMPLES,
        save_steps=2, eval_strategy="steps", eval_steps=2, logging_steps=1,
        report_to="none", disable_tqdm=True, use_cpu=True, fsdp=True, fsdp_config=fsdp, **phase_1, **options,
    )  # fmt: skip
    assert args.trains_dense is (phase_1 is DENSE_HALF)
    keep, switch = Keep(2), Switch(4)
    trainer = ADMMTrainer(model, args, train_dataset=data, eval_dataset=data[:16], callbacks=[keep, switch])
    trainer.train(resume_from_checkpoint=resume and str(resume))
    assert all(isinstance(weight, DTensor) for weight in trainer.model.parameters())
    assert trainer.audit.ok
    if switch.before is not None:  # not in a run that was resumed after it
        assert_pruned_as_one(switch, data, args.pattern)
    results = {"weights": whole(trainer.model), "at_2": keep.weights, "best": trainer.state.best_model_checkpoint}
    trainer.save_model(str(folder / "model"))
    if args.process_index == 0:
        torch.save(results, folder / "results.pt")


def main(folder: str) -> None:
    torch.set_num_threads(1)
    folder = Path(folder)
    straight = folder / "straight"
    if straight.is_dir():  # on another number of processes
        train(folder / "three", resume=straight / "checkpoint-2")
        return
    train(straight)
    train(folder / "phase1", resume=straight / "checkpoint-2")
    train(folder / "phase2", resume=straight / "checkpoint-6")
    train(folder / "to_whole", "FULL_STATE_DICT", resume=straight / "checkpoint-4")
    train(folder / "from_whole", resume=folder / "to_whole" / "checkpoint-6")
    train(folder / "best", load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True)
    train(folder / "dense", phase_1=DENSE_HALF)
    for step in (2, 6):
        train(folder / f"dense{step}", resume=folder / "dense" / f"checkpoint-{step}", phase_1=DENSE_HALF)


if __name__ == "__main__":
    main(sys.argv[1])
    leave()
