"""Who sees which weights in training: evaluations and saves sparse ones, everything else dense ones."""

import io
import logging

import pytest
import torch
from transformers import BertForQuestionAnswering, EarlyStoppingCallback, TrainerCallback

from hf_admm import ADMMTrainer
from tiny_runs import assert_same_weights, prepare, train, weights


EVENTS = ["on_evaluate", "on_save", "on_predict"]


def share_of_zeros(trainer):
    held = [trainer.model.get_parameter(name) for name in trainer.sparsity.targets]
    return sum((weight == 0).sum().item() for weight in held) / sum(weight.numel() for weight in held)


def watching(trainer, *events):
    """The share of zeros that a callback finds in the model, by event."""
    seen = {}

    class Watch(TrainerCallback):
        pass

    for event in events:
        name = event

        def look(self, args, state, control, name=name, **kwargs):
            seen.setdefault(name, []).append((state.global_step, share_of_zeros(trainer)))

        setattr(Watch, event, look)
    trainer.add_callback(Watch())
    return seen


FLAGS = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}


def test_callbacks_of_evaluations_and_saves_see_sparse_weights(tiny_bert, token_data, tmp_path):
    data = token_data()
    trainer = prepare(tiny_bert(), data, tmp_path, **FLAGS)
    seen = watching(trainer, *EVENTS, "on_step_end")

    class Predicts(TrainerCallback):
        def on_epoch_begin(self, *args, **kwargs):
            trainer.predict(data[:8])

    trainer.add_callback(Predicts())
    trainer.train()
    for event in EVENTS:
        assert seen[event] and all(zeros == 0.5 for _, zeros in seen[event]), event
    assert all(zeros < 0.05 for _, zeros in seen["on_step_end"])
    plain = train(tiny_bert(), data, tmp_path / "plain", callbacks=[], **FLAGS)
    assert plain.audit.ok


@pytest.mark.parametrize("trial", ["subclass", "mixed"])
def test_an_overridden_evaluation_sees_sparse_weights_to_its_end(trial, tiny_bert, token_data, tmp_path):
    zeros = []

    class After(ADMMTrainer):
        def evaluate(self, *args, **kwargs):
            metrics = super().evaluate(*args, **kwargs)
            zeros.append(share_of_zeros(self))
            return metrics

    train(tiny_bert(), token_data(), tmp_path, After, **FLAGS)
    assert zeros == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("step", [3, 8])
def test_a_callback_may_ask_for_sparse_weights(step, tiny_bert, token_data, tmp_path):
    trainer = prepare(tiny_bert(), token_data(), tmp_path)
    seen = []

    def look(args, state, control, model=None, **kwargs):
        if state.global_step == step:
            dense = weights(model)
            with trainer.sparse_weights():
                seen.append(share_of_zeros(trainer))
                with trainer.sparse_weights():
                    seen.append(share_of_zeros(trainer))
                seen.append(share_of_zeros(trainer))
            assert_same_weights(model, dense)
            seen.append(share_of_zeros(trainer))

    callback = TrainerCallback()
    callback.on_step_end = look
    trainer.add_callback(callback)
    trainer.train()
    assert seen[:3] == [0.5, 0.5, 0.5] and seen[3] < 0.05
    with trainer.sparse_weights():  # nothing to hide any more
        assert share_of_zeros(trainer) == 0.5


def test_what_a_callback_saves_on_save_loads_as_sparse(tiny_bert, token_data, tmp_path):
    """And the checkpoint beside it still has the dense weights for a resume to the same bits."""
    data, flags = token_data(), {**FLAGS, "save_total_limit": 9}
    straight = train(tiny_bert(), data, tmp_path / "straight", **flags)
    resumed = prepare(tiny_bert(seed=1), data, tmp_path / "resumed", **flags)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-4"))
    assert_same_weights(resumed.model, weights(straight.model))


# ---- A run that ends before its time, or a batch that teaches nothing ----


class Stop(TrainerCallback):
    """After the first step."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def test_a_run_that_ends_in_phase_1_says_so(tiny_bert, token_data, tmp_path):
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger("hf_admm").addHandler(handler)
    try:
        for best in (False, True):
            stream.truncate(0)
            parts = {"compute_metrics": lambda prediction: {"level": 0.5}}
            flags = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "level", "max_steps": 40}
            flags |= {"save_strategy": "steps", "save_steps": 1, "admm_steps": 20, "greater_is_better": True}
            flags |= {"load_best_model_at_end": best}
            stops = [EarlyStoppingCallback(2)]
            trainer = train(tiny_bert(), token_data(), tmp_path / str(best), callbacks=stops, parts=parts, **flags)
            assert trainer.state.global_step == 3 and trainer.audit.ok
            told = stream.getvalue()
            assert "Training ended after 3 of 40 steps, in phase 1, which has 20: phase 2 never ran." in told
        stream.truncate(0)
        train(tiny_bert(), token_data(), tmp_path / "last", callbacks=[Stop()], admm_steps=1, admm_update_steps=1)
        assert "Training ended after 1 of 12 steps, in phase 1, which has 1: phase 2 never ran." in stream.getvalue()
        stream.truncate(0)
        train(tiny_bert(), token_data(), tmp_path / "whole")
        train(tiny_bert(), token_data(), tmp_path / "all", admm_steps=12, mask_freeze_steps=0)
        assert "Training ended" not in stream.getvalue()
    finally:
        logging.getLogger("hf_admm").removeHandler(handler)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_answers_that_are_all_cut_off_do_not_stop_training(accumulation, tiny_bert, token_data, tmp_path):
    """The mean over no answer is NaN, its gradient is zero: plain Trainer goes on too."""
    data = token_data(32)
    for index, row in enumerate(data):
        del row["labels"]
        row["start_positions"] = torch.tensor(999 if 8 <= index < 16 else index % 8)
        row["end_positions"] = torch.tensor(999 if 8 <= index < 16 else 7)

    class InOrder(ADMMTrainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    config = tiny_bert().config
    torch.manual_seed(0)
    flags = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 8 // accumulation}
    trainer = train(BertForQuestionAnswering(config), data, tmp_path, InOrder, **flags)
    assert trainer.audit.ok and all(weight.isfinite().all() for weight in trainer.model.parameters())


def test_bad_gradients_stop_whatever_form_the_inputs_have(tiny_bert, token_data, tmp_path):
    """Trainers of one's own hand on lists."""

    class Lists(ADMMTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            if self.state.global_step == 4:
                self.model.classifier.weight.grad[0, 0] = float("nan")
            return loss

        def _prepare_inputs(self, inputs):
            return super()._prepare_inputs(inputs[0])

    trainer = prepare(tiny_bert(), token_data(), tmp_path, Lists, parts={"data_collator": as_list})
    with pytest.raises(FloatingPointError, match="The norm of the gradients of step 5 is nan"):
        trainer.train()


def as_list(rows):
    return [{name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}]
