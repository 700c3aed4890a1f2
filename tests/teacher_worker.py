"""Distilled runs for tests/test_distributed_teacher.py: through Trainer, and one step of a model that FSDP2 shards."""

import sys

import torch
from accelerate.state import AcceleratorState
from transformers import BertForTokenClassification

from hf_admm import ADMMTrainer, ADMMTrainingArguments
from hf_admm.training.teachers import become
from launch import leave
from tiny_models import NO_DROPOUT, tiny_bert


def build(seed, **config):
    return tiny_bert(seed, BertForTokenClassification, num_labels=8, **NO_DROPOUT["tiny_bert"], **config)


def rows(uneven=True):
    """Of 2 to 8 tokens, so that no batch has as many as another, or of 8 each."""
    tokens = torch.randint(1, 64, (32, 8), generator=torch.Generator().manual_seed(0))
    data = []
    for i, row in enumerate(tokens):
        mask = (torch.arange(8) < (2 + i % 7 if uneven else 8)).long()
        data.append({"input_ids": row, "attention_mask": mask, "labels": (row % 8).masked_fill(mask == 0, -100)})
    return data


def run(folder: str, teacher: str, batch_size: int, kind: str) -> None:
    AcceleratorState._reset_state()
    model, data = build(0), rows()
    phase = {"admm_update_steps": 1}
    if kind == "switch":
        # Pruning changes much, and the model's own loss of phase 1 is that of one process.
        model, data = build(0, initializer_range=0.5), rows(uneven=False)
        teacher, phase = "switch", {"num_calibration_samples": 0}
    args = ADMMTrainingArguments(
        folder, max_steps=6, per_device_train_batch_size=batch_size, learning_rate=0.05, optim="sgd", admm_steps=3,
        logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no",
        max_grad_norm=0.0, distill_teacher=teacher, distill_logits_weight=1.0, distill_hidden_weight=0.2,
        **phase,
    )  # fmt: skip
    trainer = ADMMTrainer(model, args, train_dataset=data)
    if kind in ("trainer", "switch"):
        trainer.train()
        logs = [log.get("distill/loss", 0.0) for log in trainer.state.log_history if "loss" in log]
        found = {"logs": logs, "weights": {name: weight.detach() for name, weight in model.named_parameters()}}
    else:
        trainer._prepare_teacher()
        if args.world_size > 1:
            from torch.distributed.fsdp import fully_shard

            for layer in model.bert.encoder.layer:
                fully_shard(layer)
            fully_shard(model)
        mine = data[args.process_index :: args.world_size]
        batch = {key: torch.stack([row[key] for row in mine]) for key in mine[0]}
        trainer.current_gradient_accumulation_steps = 1
        trainer._window = torch.tensor([32, sum(int(row["attention_mask"].sum()) for row in data)])
        trainer.training_step(model, batch)
        become(trainer._teacher, model)  # as at a switch
        found = trainer._teacher.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in build(0).state_dict().items())
        grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        whole = {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in grads.items()}
        found = {"weights": whole}
    torch.save(found, f"{folder}/{kind}{args.process_index}.pt")


def main(folder: str, teacher: str, batch_size: str, *kinds: str) -> None:
    torch.set_num_threads(1)
    for kind in kinds:
        run(folder, teacher, int(batch_size), kind)


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
