"""Training runs for tests/test_zero.py, all in one process group: importing DeepSpeed takes longer than they do."""

import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from transformers import TrainerCallback

from hf_admm import ADMMTrainer, ADMMTrainingArguments
from hf_admm.pruning.srste import SRSTE
from launch import leave
from tiny_models import NO_DROPOUT, tiny_bert, token_data


PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
# Pruned by layer-wise ADMM at the switch, before the first step, and after a dense half.
CALIBRATED = {
    "at switch": {"num_calibration_samples": 12},
    "at start": {"num_calibration_samples": 12, "admm_steps": 0, "sparsity_pattern": "1:4"},
    "dense half": {
        "num_calibration_samples": 12, "admm_steps": None, "admm_update_steps": None, "sparsity_pattern": "1:4"
    },
}  # fmt: skip
PRUNED = "bert.encoder.layer.1.output.dense.weight"


def config(stage: int) -> dict:
    sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": "auto"},
        **dict.fromkeys(sizes, "auto"),
    }


class Masters(TrainerCallback):
    """Between steps, the weights in the model are what the masters say, and none is aside."""

    def __init__(self):
        self.compared = 0

    def on_step_end(self, args, state, control, **kwargs):
        weights = self.sparsity.weights
        assert not weights.aside and bool(weights.masters) == bool(args.deepspeed)
        for name, parameter in weights.parameters.items():
            for master, part in weights.masters.fragment(parameter, parameter.detach()):
                # Rounded once by DeepSpeed and once more when both shrink.
                wide = dict(rtol=2**-6, atol=0) if parameter.dtype == torch.bfloat16 else dict(rtol=0, atol=0)
                torch.testing.assert_close(master, part.float(), **wide, msg=name)
                self.compared += 1
        if isinstance(self.sparsity.phase, SRSTE):
            assert torch.count_nonzero(weights.parameters[PRUNED]) > weights.parameters[PRUNED].numel() / 2, (
                "W is dense"
            )


def run(folder: Path, stage: int = 0, resume: str | None = None, **flags) -> dict[str, torch.Tensor]:
    if stage:
        AcceleratorState._reset_state(True)
    model, data = tiny_bert(**NO_DROPOUT["tiny_bert"]), token_data(64)
    args = ADMMTrainingArguments(
        str(folder), max_steps=12, per_device_train_batch_size=8 // PROCESSES, learning_rate=1e-2,
        gradient_accumulation_steps=2, save_steps=4, eval_strategy="steps", eval_steps=4,
        logging_steps=1, max_grad_norm=0.0, report_to="none", disable_tqdm=True, use_cpu=True,
        deepspeed=config(stage) if stage else None, **{"admm_steps": 6, "admm_update_steps": 2, **flags},
    )  # fmt: skip
    callback = Masters()
    trainer = ADMMTrainer(model, args, train_dataset=data, eval_dataset=data[:16], callbacks=[callback])
    callback.sparsity = trainer.sparsity
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.audit.ok
    assert "num_calibration_samples" not in flags or any(
        "admm/output_change" in log for log in trainer.state.log_history
    )
    assert not stage or callback.compared or PROCESSES > 1
    trainer.save_model(str(folder / "model"))
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def main(folder: Path) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", str(29500 + os.getpid() % 1000))
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # It would compile code of its own for what gloo does as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(1)
    runs = {f"zero{stage}": run(folder / f"zero{stage}", stage) for stage in (1, 2)}
    for step in (4, 8):
        runs[f"resumed{step}"] = run(folder / f"resumed{step}", 2, str(folder / "zero2" / f"checkpoint-{step}"))
    for name, flags in CALIBRATED.items():
        runs[name] = run(folder / name, 2, **flags)
    runs["bf16"] = run(folder / "bf16", 2, bf16=True)
    runs["bf16 resumed"] = run(folder / "bf16 resumed", 2, str(folder / "bf16" / "checkpoint-8"), bf16=True)
    torch.save(runs, folder / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
