"""Training runs for tests/test_distributed.py, one after another in one process or, started by torchrun, in two."""

import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from transformers import TrainerCallback

from hf_admm import ADMMTrainer, ADMMTrainingArguments, sparsity_mask
from hf_admm.training import calibrating
from launch import leave
from tiny_models import NO_DROPOUT, tiny_bert, token_data


class Fault(TrainerCallback):
    """Changes one entry of one tensor of the state on the second process, in the phase that has such a tensor."""

    def __init__(self, kind: str):
        self.kind = kind

    def on_step_end(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == (7 if self.kind == "mask" else 3):
            tensors = self.state.weights.parameters if self.kind == "weight" else self.state.phase.companions
            entry = tensors["bert.encoder.layer.1.output.dense.weight"].detach().view(-1)[53:54]
            entry.copy_(~entry if self.kind == "mask" else entry + 1e-3)


class Spoilt(ADMMTrainer):
    """Its loss is NaN at one step on the second process."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if self.args.process_index == 1 and self.state.global_step == 7 else loss


def train(folder: Path, batch_size: int, resume: Path | None, fault: str) -> None:
    model, data = tiny_bert(**NO_DROPOUT["tiny_bert"]), token_data(64)
    args = ADMMTrainingArguments(
        str(folder), max_steps=12, per_device_train_batch_size=batch_size, learning_rate=0.05, optim="sgd",
        admm_steps=6, admm_update_steps=2, admm_rho=2.0, srste_decay=0.01, save_steps=3, logging_steps=1,
        report_to="none", disable_tqdm=True, use_cpu=True,
        mask_update_steps=4 if fault == "mask" else 1,  # or it mends itself
        num_calibration_samples=16 if folder.name.startswith("calibrated") else 0,
    )  # fmt: skip
    if args.num_calibration_samples and args.process_index == 1:  # all take what the first one finds
        calibrating.prune_layer = lambda weight, moments, pattern: weight.detach() * sparsity_mask(weight, pattern)
    trainer_class = Spoilt if fault == "loss" else ADMMTrainer
    trainer = trainer_class(model, args, train_dataset=data, eval_dataset=data[:16])
    if fault == "evaluated":
        trainer.evaluate()  # Trainer trains each process on its own after that
    elif fault and fault != "loss":
        callback = Fault(fault)
        callback.state = trainer.sparsity
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    assert trainer.audit.ok
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    torch.save(weights, folder / f"rank{args.process_index}.pt")
    trainer.save_model(str(folder / "model"))


def main(folder: Path, batch_size: int, runs: list[dict]) -> None:
    """Each run has a name, and what it resumes from or a fault, whose error every process writes down."""
    torch.set_num_threads(1)
    for run in runs:
        AcceleratorState._reset_state()
        here, resume, fault = folder / run["name"], run.get("resume"), run.get("fault", "")
        here.mkdir(exist_ok=True)
        try:
            train(here, batch_size, resume and folder / resume, fault)
        except (RuntimeError, FloatingPointError) as error:
            if not fault:
                raise
            rank = torch.distributed.get_rank()
            (here / f"error{rank}.txt").write_text(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
    leave()
