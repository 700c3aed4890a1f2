"""Seq2SeqTrainer, whose evaluations may generate."""

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration

from hf_admm.integrations import ADMMSeq2SeqTrainer, ADMMSeq2SeqTrainingArguments
from integration_runs import FLAGS, check, check_best, logged


@pytest.fixture(scope="module")
def t5(tokenizer, tmp_path_factory):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("t5")
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make(tokenizer, token_data):
    rows = [
        {"input_ids": row["input_ids"], "labels": row["input_ids"].flip(0)[:4]}
        for row in token_data(n=16, vocab=len(tokenizer))
    ]

    def generated(prediction):
        return {"generated": prediction.predictions.clip(0).mean()}

    def build(folder, model, **flags):
        model = T5ForConditionalGeneration.from_pretrained(model)
        args = ADMMSeq2SeqTrainingArguments(
            str(folder), **{**FLAGS, "predict_with_generate": True, "generation_max_length": 5, **flags}
        )
        collator = DataCollatorForSeq2Seq(tokenizer, model=model)
        return ADMMSeq2SeqTrainer(
            model, args, collator, rows, rows, processing_class=tokenizer, compute_metrics=generated
        )

    return build


def test_generated_metrics_checkpoints_and_resume(make, t5, tmp_path):
    trainer = check(make, tmp_path, t5, metrics=("eval_loss", "eval_generated"))
    assert len(set(logged(trainer, "eval_generated").values())) > 1


def test_the_best_model_by_a_metric_of_generated_text(make, t5, tmp_path):
    check_best(make, tmp_path, t5)


def test_arguments_are_made_where_none_are_given(t5, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = ADMMSeq2SeqTrainer(T5ForConditionalGeneration.from_pretrained(t5))
    assert type(trainer.args) is ADMMSeq2SeqTrainingArguments and trainer.args.is_sparse


def test_other_arguments_are_refused_with_the_class_to_pass(t5, tmp_path):
    model = T5ForConditionalGeneration.from_pretrained(t5)
    with pytest.raises(ValueError, match=r"Pass hf_admm\.integrations\.seq2seq\.ADMMSeq2SeqTrainingArguments\."):
        ADMMSeq2SeqTrainer(model, Seq2SeqTrainingArguments(str(tmp_path), use_cpu=True))
