"""One training run for tests/test_distributed.py, started in one process or by torchrun in two."""

import sys

import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_admm import ADMMTrainer, ADMMTrainingArguments


def main(folder: str, batch_size: int, resume: str | None = None) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    tokens = torch.randint(1, 64, (64, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": (row[0] > 32).long()} for row in tokens]
    args = ADMMTrainingArguments(
        folder, max_steps=12, per_device_train_batch_size=batch_size, learning_rate=0.05, optim="sgd", admm_steps=6,
        admm_update_steps=2, admm_rho=2.0, srste_decay=0.01, save_steps=3, logging_steps=1, report_to="none",
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = ADMMTrainer(model, args, train_dataset=data, eval_dataset=data[:16])
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.audit.ok
    rank = args.process_index
    torch.save({name: weight.detach() for name, weight in model.named_parameters()}, f"{folder}/rank{rank}.pt")
    trainer.save_model(f"{folder}/model")
    if args.world_size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
