"""What else Trainer offers works with sparse training, in both phases, and gives what its users rely on."""

import copy
from dataclasses import dataclass

import pytest
import torch
from transformers import (
    BertConfig,
    BertForTokenClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_admm import ADMMTrainer, ADMMTrainerMixin, ADMMTrainingArguments
from hf_admm.sparsity.projections import broken_groups, project
from tiny_models import NO_DROPOUT
from tiny_runs import SETTINGS, STEPS, Recorder, compiles, prepare, train, weights


def every_step():
    return Recorder("on_step_end", lambda state, model=None, **_: weights(model))


def assert_same_runs(one, other, **tolerance):
    """Two recorders of the weights saw the same at each step: bit for bit, or within a tolerance."""
    assert len(one.seen) == len(other.seen) == STEPS
    for step, (left, right) in enumerate(zip(one.seen, other.seen, strict=True)):
        for name, weight in left.items():
            message = f"{name} at step {step}"
            torch.testing.assert_close(right[name], weight, msg=message, **(tolerance or {"rtol": 0, "atol": 0}))


class Watch:
    """Notes whether the weights are sparse whenever an evaluation or a prediction computes with them."""

    def prediction_step(self, model, *args, **kwargs):
        matrices = [self.model.get_parameter(name) for name in self.select_targets().targets]
        sparse = not any(broken_groups(matrix, self.args.pattern).any() for matrix in matrices)
        self.saw = [*getattr(self, "saw", []), sparse]
        return super().prediction_step(model, *args, **kwargs)


class WatchedTrainer(Watch, ADMMTrainer):
    pass


class WatchedSeq2SeqTrainer(Watch, ADMMTrainerMixin, Seq2SeqTrainer):
    pass


@dataclass
class Seq2SeqArguments(ADMMTrainingArguments, Seq2SeqTrainingArguments):
    pass


# ---- How the forward pass is run ----


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}, {}),
        pytest.param({"torch_compile": True, "torch_compile_backend": "eager"}, {}, marks=compiles),
        pytest.param(
            {"torch_compile": True, "torch_compile_backend": "aot_eager"}, {"rtol": 1e-4, "atol": 1e-6}, marks=compiles
        ),
    ],
    ids=["checkpointing", "compile-eager", "compile-aot"],
)
def test_the_run_is_that_of_the_plain_forward_pass(flags, tolerance, tiny_bert, token_data, tmp_path):
    model, runs = tiny_bert(**NO_DROPOUT["tiny_bert"]), []
    for extra in ({}, flags):
        runs.append(every_step())
        extra = {**extra, "callbacks": [runs[-1]], "eval_strategy": "epoch"}
        trainer = train(copy.deepcopy(model), token_data(), tmp_path, **extra)
        assert trainer.audit.ok and list(trainer.model.state_dict()) == list(model.state_dict())
    assert_same_runs(*runs, **tolerance)


def test_neftune_is_noise_in_training_alone(tiny_bert, token_data, tmp_path):
    model = tiny_bert(**NO_DROPOUT["tiny_bert"])
    plain, noisy = every_step(), every_step()
    train(copy.deepcopy(model), token_data(), tmp_path, callbacks=[plain])
    trainer = train(model, token_data(), tmp_path, callbacks=[noisy], neftune_noise_alpha=5.0)
    for step in (0, 8):
        assert any(not torch.equal(weight, noisy.seen[step][name]) for name, weight in plain.seen[step].items())
    assert trainer.audit.ok and not trainer.model.get_input_embeddings()._forward_hooks
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]


def test_batches_of_like_lengths(tiny_bert, token_data, tmp_path):
    data = token_data(128)
    for i, row in enumerate(data):
        row |= {key: row[key][: 1 + i % 8] for key in ("input_ids", "attention_mask")}

    def pad(rows):
        length = max(len(row["input_ids"]) for row in rows)
        lengths.append({len(row["input_ids"]) for row in rows})
        batch = {"labels": torch.stack([row["labels"] for row in rows])}
        for key in ("input_ids", "attention_mask"):
            batch[key] = torch.stack([torch.nn.functional.pad(row[key], (0, length - len(row[key]))) for row in rows])
        return batch

    spans = {}
    for strategy in ("random", "group_by_length"):
        lengths = []
        trainer = train(tiny_bert(), data, tmp_path, parts={"data_collator": pad}, train_sampling_strategy=strategy)
        assert trainer.audit.ok
        spans[strategy] = sum(max(span) - min(span) for span in lengths)
    assert spans["group_by_length"] < spans["random"] / 2


# ---- The loss ----


def mean_over_items(outputs, labels, num_items_in_batch=None):
    loss = torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
    return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def token_classifier(tiny_bert, token_data):
    """Its rows have 1 to 8 labels each, so a mean of means is not the mean over a step."""
    settings = tiny_bert(**NO_DROPOUT["tiny_bert"]).config.to_dict()
    names = ("id2label", "label2id")  # of two labels
    config = BertConfig(**{key: value for key, value in settings.items() if key not in names}, num_labels=3)
    data = token_data(labels=None)
    for i, row in enumerate(data):
        row["labels"] = row["labels"] % 3
        row["labels"][1 + i % 8 :] = -100
    return BertForTokenClassification(config), data


@pytest.mark.parametrize("loss", ["compute_loss_func", "label_smoothing", "label_smoothing of tokens"])
def test_another_loss_counts_once_and_so_does_the_penalty(loss, tiny_bert, token_data, tmp_path):
    """Whatever the accumulation, the run and the logged loss are the same. SGD, since Adam would hide a factor."""
    model, data = tiny_bert(**NO_DROPOUT["tiny_bert"]), token_data()
    if loss == "label_smoothing of tokens":
        model, data = token_classifier(tiny_bert, token_data)
    flags = {"optim": "sgd", "learning_rate": 0.05, "admm_rho": 2.0}
    if loss == "compute_loss_func":
        flags["parts"] = {"compute_loss_func": mean_over_items}
    else:
        flags["label_smoothing_factor"] = 0.3

    def both(**pattern):
        runs, logs = [], []
        for batch, accumulation in ((8, 1), (2, 4)):
            runs.append(every_step())
            trainer = train(
                copy.deepcopy(model), data, tmp_path, callbacks=[runs[-1]], per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation, **flags, **pattern,
            )  # fmt: skip
            logs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        return runs, logs

    _, logs = both(sparsity_pattern="none")
    if logs[0] != pytest.approx(logs[1], rel=1e-3):
        pytest.skip("plain Trainer counts this loss as often as it accumulates, as earlier versions do")
    runs, logs = both()
    assert_same_runs(*runs, rtol=1e-4, atol=2e-6)
    assert logs[0] == pytest.approx(logs[1], rel=1e-3) and all(0.3 < value < 1.5 for value in logs[0])


# ---- Evaluation and prediction ----


def test_several_evaluation_sets_and_the_first_evaluation(tiny_bert, token_data, tmp_path):
    data, model = token_data(), tiny_bert()
    sets = {"one": data[:16], "two": data[16:]}
    trainer = train(
        copy.deepcopy(model), data, tmp_path, WatchedTrainer, parts={"eval_dataset": sets}, eval_strategy="steps",
        eval_steps=4, eval_on_start=True, save_strategy="steps", save_steps=4, load_best_model_at_end=True,
        metric_for_best_model="eval_two_loss",
    )  # fmt: skip
    logs = trainer.state.log_history
    two = {log["step"]: log["eval_two_loss"] for log in logs if "eval_two_loss" in log}
    assert sorted(two) == [0, 4, 8, 12] and len([log for log in logs if "eval_one_loss" in log]) == 4
    assert trainer.saw and all(trainer.saw)
    assert trainer.evaluate()["eval_two_loss"] == two[trainer.state.best_global_step] == trainer.state.best_metric
    for name in trainer.sparsity.targets:  # what the evaluation at the start should have seen
        weight = model.get_parameter(name)
        weight.data = project(weight.data, trainer.args.pattern)
    start = prepare(model, data, tmp_path, sparsity_pattern="none", parts={"eval_dataset": sets}).evaluate()
    assert start["eval_two_loss"] == two[0]


def test_predictions_between_steps_are_those_of_the_checkpoint(tiny_bert, token_data, tmp_path):
    """And evaluating there changes nothing in the run."""
    data, model = token_data(), tiny_bert(**NO_DROPOUT["tiny_bert"])
    straight, watched, seen = every_step(), every_step(), {}
    train(copy.deepcopy(model), data, tmp_path, callbacks=[straight])
    trainer = prepare(
        model, data, tmp_path, WatchedTrainer, callbacks=[watched], save_strategy="steps", save_steps=1,
        save_total_limit=20,
    )  # fmt: skip

    def predict(args, state, control, **kwargs):
        seen[state.global_step] = trainer.predict(data[:16]).predictions
        assert trainer.evaluate()["eval_loss"] > 0

    watched.on_save = predict
    trainer.train()
    assert_same_runs(straight, watched)
    assert sorted(seen) == list(range(1, STEPS + 1)) and all(trainer.saw)
    for step in (1, 4, 6, 7, 12):
        saved = type(model).from_pretrained(tmp_path / f"checkpoint-{step}")
        alone = prepare(saved, data, tmp_path, sparsity_pattern="none").predict(data[:16]).predictions
        assert (alone == seen[step]).all()
    assert (trainer.predict(data[:16]).predictions == seen[STEPS]).all()


def test_generation_sees_sparse_weights(token_data, tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1))
    args = Seq2SeqArguments(
        str(tmp_path), **SETTINGS, save_strategy="no", eval_strategy="steps", eval_steps=4,
        predict_with_generate=True, generation_max_length=6,
    )  # fmt: skip
    data = token_data(16, labels=None)

    def metrics(prediction):
        assert prediction.predictions.dtype.kind == "i"  # generated tokens, no logits
        return {"tokens": float(prediction.predictions[:, 1:6].mean())}

    trainer = WatchedSeq2SeqTrainer(
        model=model, args=args, train_dataset=data, eval_dataset=data[:8], compute_metrics=metrics
    )
    trainer.train()
    assert trainer.audit.ok and len(trainer.saw) == 3 and all(trainer.saw)
    logged = [log["eval_tokens"] for log in trainer.state.log_history if "eval_tokens" in log]
    assert len(logged) == 3 and trainer.evaluate()["eval_tokens"] == logged[-1]
    assert trainer.predict(data[:8]).predictions.shape[0] == 8


def test_a_dense_run_goes_on_after_a_bad_loss_as_trainer_does(tiny_bert, token_data, tmp_path):
    model = tiny_bert()
    model.classifier.bias.data.fill_(float("inf"))
    trainer = train(model, token_data(), tmp_path, sparsity_pattern="none", max_steps=2)
    assert trainer.state.global_step == 2
