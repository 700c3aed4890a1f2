"""With `num_calibration_samples`, a run prunes at the switch by what its data put into the layers."""

import random

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification, TrainerCallback, default_data_collator

from calibration_runs import BY_DEFAULT, DENSE_HALF, EVENLY, ONE_PHASE, ROWS, SIZE, calibration_batches, phases_of
from hf_admm import ADMMTrainer, ADMMTrainingArguments, prune_one_shot
from hf_admm.training import calibrating
from tiny_runs import STEPS, Recorder, assert_same_weights, prepare, train, weights


def test_before_the_first_step_it_is_prune_one_shot(tiny_bert, token_data, tmp_path):
    """To the bits, dropout and the order of the data included."""
    data, by_hand = token_data(64), tiny_bert()
    report = prune_one_shot(by_hand, calibration_batches(data), "1:4")
    expected = train(by_hand, data, tmp_path, sparsity_pattern="1:4", **ONE_PHASE)
    trainer = prepare(tiny_bert(), data, tmp_path, sparsity_pattern="1:4", num_calibration_samples=ROWS, **ONE_PHASE)
    at_start = Recorder("on_step_begin", lambda state, model, **_: weights(model))
    trainer.add_callback(at_start)
    trainer.train()
    assert_same_weights(trainer.model, weights(expected.model))
    pruned = tiny_bert()
    prune_one_shot(pruned, calibration_batches(data), "1:4")
    assert_same_weights(pruned, at_start.seen[0])
    logged = next(log["admm/output_change"] for log in trainer.state.log_history if "admm/output_change" in log)
    assert logged == pytest.approx(sum(report.errors.values()) / len(report.errors), rel=1e-5)


@pytest.mark.parametrize("pattern", ["2:4", "0.5", "4x4:8"])
def test_where_half_is_kept_it_is_so_by_default(pattern, tiny_bert, token_data, tmp_path):
    """By all rows, as they are fewer than 1,024; then the zeros stay. The rate is the dense model's."""
    data, by_hand = token_data(64), tiny_bert()
    batches = [
        default_data_collator([data[row] for row in range(start, start + SIZE)]) for start in range(0, 64, SIZE)
    ]
    prune_one_shot(by_hand, batches, pattern)
    at_start = Recorder("on_step_begin", lambda state, model, **_: weights(model))
    flags = {**BY_DEFAULT, "sparsity_pattern": pattern, "lr_scheduler_type": "constant"}
    trainer = train(tiny_bert(), data, tmp_path, callbacks=[at_start], **flags)
    assert_same_weights(by_hand, at_start.seen[0])
    rates = {log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log}
    assert rates == {1e-3} and trainer.audit.ok
    for name in trainer.sparsity.weights.targets:
        zeros = at_start.seen[0][name] == 0
        assert zeros.any() and not trainer.model.get_parameter(name)[zeros].any(), name


@pytest.mark.parametrize("asked", [False, True])
def test_by_default_as_many_of_the_rows_as_suffice_every_layer(asked, tiny_bert, token_data, tmp_path, monkeypatch):
    """Four of eight batches, with 8 tokens per input of the widest layer; a number that is given counts."""
    monkeypatch.setattr(calibrating, "CALIBRATION_TOKENS", 8)
    data, by_hand = token_data(64), tiny_bert()
    tokens, widest = data[0]["input_ids"].numel(), by_hand.config.intermediate_size
    assert 3 * SIZE * tokens < 8 * widest <= 4 * SIZE * tokens
    batches = [
        default_data_collator([data[row] for row in range(start, start + SIZE)]) for start in range(0, 64, SIZE)
    ]
    prune_one_shot(by_hand, batches if asked else batches[::2], "2:4")
    trainer = prepare(
        tiny_bert(), data, tmp_path, **BY_DEFAULT,
        **{"num_calibration_samples": 64} if asked else {},
    )  # fmt: skip
    at_start = Recorder("on_step_begin", lambda state, model, **_: weights(model))
    trainer.add_callback(at_start)
    trainer.train()
    assert_same_weights(by_hand, at_start.seen[0])


@pytest.mark.parametrize("pattern", ["1:4", "2:8", "0.3"])
def test_where_less_is_kept_it_is_after_a_dense_half_by_default(pattern, tiny_bert, token_data, tmp_path):
    """Which has a schedule of its own, and to the bits that of a model that teaches what comes after it."""
    data, dense, flags = token_data(64), Dense(STEPS // 2), {**BY_DEFAULT, "sparsity_pattern": pattern}
    train(tiny_bert(), data, tmp_path / "taught", callbacks=[dense], **flags, distill_teacher="switch")
    by_hand, taught = tiny_bert(), dense.weights
    by_hand.load_state_dict(taught, strict=False)
    batches = [
        default_data_collator([data[row] for row in range(start, start + SIZE)]) for start in range(0, 64, SIZE)
    ]
    prune_one_shot(by_hand, batches, pattern)
    masked = Recorder("on_step_begin", lambda state, model, **_: weights(model))
    trainer = train(tiny_bert(), data, tmp_path, callbacks=[dense, masked], logging_steps=1, **flags)
    assert all(torch.equal(dense.weights[name], weight) for name, weight in taught.items())
    assert_same_weights(by_hand, masked.seen[STEPS // 2])
    assert phases_of(trainer) == {1, 2} and trainer._teacher is None
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert (max(rates[: STEPS // 2]), max(rates[STEPS // 2 :])) == (1e-3, 2e-3)
    assert rates[STEPS // 2 - 1] < 2e-4, "a decay of its own"
    for name in trainer.sparsity.weights.targets:
        zeros = masked.seen[STEPS // 2][name] == 0
        assert zeros.any() and not trainer.model.get_parameter(name)[zeros].any(), name


@pytest.mark.parametrize("falls", [True, False])
def test_a_best_model_of_the_dense_half_is_warned_of(falls, tiny_bert, token_data, tmp_path, caplog):
    scores = iter(range(STEPS, 0, -1) if falls else range(STEPS))
    trainer = train(
        tiny_bert(), token_data(64), tmp_path, **BY_DEFAULT | {"sparsity_pattern": "1:4"}, eval_strategy="steps",
        eval_steps=3, save_strategy="steps", save_steps=3, load_best_model_at_end=True, metric_for_best_model="score",
        greater_is_better=True, parts={"compute_metrics": lambda _: {"score": next(scores)}},
    )  # fmt: skip
    assert trainer.audit.ok
    assert caplog.text.count("The best model is that of step 3, in the dense phase, which has 6") == falls
    assert caplog.text.count("The best model is that of step") == falls


def test_a_scheduler_of_ones_own_runs_through_both(tiny_bert, token_data, tmp_path, caplog):
    model = tiny_bert()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    flags = BY_DEFAULT | {"sparsity_pattern": "1:4"}
    train(model, token_data(64), tmp_path, **flags, parts={"optimizers": (optimizer, schedule)})
    assert caplog.text.count("runs through the dense phase and the sparse one as it is") == 1


def test_where_less_is_kept_flags_change_the_dense_half(tiny_bert, token_data, tmp_path):
    def phases(**flags):
        args = prepare(tiny_bert(), token_data(), tmp_path, **{**BY_DEFAULT, "sparsity_pattern": "1:4", **flags}).args
        assert args.penalty == "distance" and args.phase_schedulers[0] == (args.rho and "constant_with_warmup" or None)
        return args.phase_1_length, args.rho, args.calibration_samples, args.mask_mode, args.lr_multiplier

    assert phases() == phases(num_calibration_samples=1024) == (0.5, 0.0, 1024, "fixed", 2.0)
    assert phases(num_calibration_samples=1024, admm_steps=0) == (0, 16.0, 1024, "fixed", 2.0)
    longer = {"num_calibration_samples": 1024, "admm_steps": 0.7, "admm_rho": 0}
    assert phases(**longer) == (0.7, 0, 1024, "fixed", 2.0)
    assert phases(**longer, sparsity_pattern="2:4") == (0.7, 0, 1024, "fixed", 1.0)
    assert phases(num_calibration_samples=8, admm_rho=0, sparsity_pattern="2:4") == (0.5, 0, 8, "fixed", 1.0)
    assert phases(num_calibration_samples=8, admm_penalty="distance") == (0.6, 16.0, 8, "fixed", 2.0)
    assert phases(num_calibration_samples=0) == phases(admm_steps=0.6) == (0.6, 16.0, 0, "dynamic", 2.0)
    assert phases(srste_decay=1e-3) == (0.5, 0.0, 1024, "dynamic", 2.0)
    # Weights that are averaged know nothing of what is pruned at the switch.
    args = ADMMTrainingArguments(str(tmp_path), sparsity_pattern="1:4", optim="schedule_free_adamw")
    assert (args.phase_1_length, args.calibration_samples) == (0, 1024)


class Dense(TrainerCallback):
    """Keeps the weights that a step ends with."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.weights = weights(model)


@pytest.mark.parametrize("mask", ["fixed", "dynamic"])
def test_at_the_switch_it_prunes_what_phase_1_has_made(mask, tiny_bert, token_data, tmp_path):
    data, dense = token_data(64), Dense(6)
    flags = {"sparsity_pattern": "1:4", "num_calibration_samples": ROWS, "srste_mask": mask, **EVENLY}
    trainer = prepare(tiny_bert(), data, tmp_path, callbacks=[dense], **flags)
    masked = Recorder("on_step_begin", lambda state, model, **_: weights(model))
    trainer.add_callback(masked)
    trainer.train()
    model = tiny_bert()
    model.load_state_dict(dense.weights, strict=False)
    prune_one_shot(model, calibration_batches(data), "1:4")
    assert_same_weights(model, masked.seen[6])
    assert trainer.audit.ok
    if mask == "fixed":
        final = weights(trainer.model)
        assert all(torch.equal(final[name] != 0, masked.seen[6][name] != 0) for name in trainer.sparsity.targets)


@pytest.mark.parametrize("step", [3, 6, 9])
@pytest.mark.parametrize("phase_1", [EVENLY, DENSE_HALF], ids=["distance", "dense"])
def test_a_resume_gives_the_same_bits(phase_1, step, tiny_bert, token_data, tmp_path):
    """From phase 1, from the switch, and from phase 2, which does not prune again."""
    data, flags = token_data(64), {"num_calibration_samples": ROWS, "save_steps": 3, "save_strategy": "steps"}
    straight = train(tiny_bert(), data, tmp_path, **flags, **phase_1)
    resumed = prepare(tiny_bert(), data, tmp_path / "resumed", **flags, **phase_1)
    pruned = []
    inner = resumed.sparsity.weights.__class__.replace

    def replace(self, name, whole):
        pruned.append(name)
        inner(self, name, whole)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(resumed.sparsity.weights), "replace", replace)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert bool(pruned) is (step < 9)
    assert_same_weights(resumed.model, weights(straight.model))


def test_nothing_else_is_changed(tiny_bert, token_data, tmp_path):
    """The steps before and after draw what they draw without it, though its collator draws too."""

    def collate(rows):
        assert torch.rand(()) + np.random.rand() + random.random() >= 0
        return default_data_collator(rows)

    data, states = token_data(64), []
    for rows in (0, ROWS):
        state = Recorder("on_step_end", lambda *_, **__: (torch.get_rng_state(), random.getstate(), np.random.rand()))
        trainer = train(
            tiny_bert(), data, tmp_path, callbacks=[state], num_calibration_samples=rows, sparsity_pattern="2:4",
            parts={"data_collator": collate},
        )  # fmt: skip
        states.append(state.seen)
        assert not any(module._forward_pre_hooks for module in trainer.model.modules())
    assert len(states[0]) == STEPS
    for (torch_one, *one), (torch_other, *other) in zip(*states, strict=True):
        assert torch.equal(torch_one, torch_other) and one == other


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)

    def __len__(self):
        return len(self.rows)


def test_a_default_that_can_not_be_has_two_phases_instead(tiny_bert, token_data, tmp_path, caplog):
    flags = {**BY_DEFAULT, "parts": {"eval_dataset": None}}
    trainer = train(tiny_bert(), Stream(token_data(128)), tmp_path, **flags)
    said = "This run has two phases instead: The training data (Stream) has no rows that can be looked up."
    assert caplog.text.count(said) == 1
    assert phases_of(trainer) == {1, 2} and trainer.args.num_calibration_samples is None
    caplog.clear()
    trainer = ADMMTrainer(tiny_bert(), trainer.args, train_dataset=token_data(64))
    trainer.train()
    assert phases_of(trainer) == {2} and "two phases" not in caplog.text


@pytest.mark.parametrize(
    ("flags", "phases", "mask"),
    [
        ({}, {2}, "fixed"),
        ({"srste_decay": 1e-3}, {2}, "dynamic"),
        ({"mask_update_steps": 2}, {2}, "dynamic"),
        ({"admm_update_steps": 2}, {1, 2}, "dynamic"),
        ({"admm_lr_scheduler_type": "cosine"}, {1, 2}, "dynamic"),
        ({"admm_penalty": "distance"}, {1, 2}, "dynamic"),
        ({"num_calibration_samples": 0}, {1, 2}, "dynamic"),
        ({"num_calibration_samples": 8, "admm_steps": 6}, {1, 2}, "fixed"),
    ],
)
def test_what_flags_ask_for_is_done(flags, phases, mask, tiny_bert, token_data, tmp_path):
    trainer = train(tiny_bert(), token_data(64), tmp_path, **{**BY_DEFAULT, **flags})
    assert phases_of(trainer) == phases and trainer.args.mask_mode == mask
    switched = [log for log in trainer.state.log_history if "admm/switch_residual" in log]
    assert bool(switched) is (phases == {1, 2} and "num_calibration_samples" not in flags or flags == {
        "num_calibration_samples": 0})  # fmt: skip


def test_replicas_are_compared_as_often_as_in_two_phases(tiny_bert, token_data, tmp_path):
    """Not at every step, for want of a phase 1."""
    args = prepare(tiny_bert(), token_data(), tmp_path, **BY_DEFAULT).args
    assert args.phase_settings(2400).update_steps == 100


def test_a_dense_half_says_that_zeros_do_not_stay(tiny_bert, token_data, tmp_path, caplog):
    """What it says to do instead is what the test after it does."""
    model = tiny_bert()
    prune_one_shot(model, calibration_batches(token_data(64)), "1:4")
    trainer = train(model, token_data(64), tmp_path, **BY_DEFAULT | {"sparsity_pattern": "1:4"})
    said = "The model obeys 1:4 already, and phase 1 will train it dense: its zeros do not stay"
    assert caplog.text.count(said) == 1 and "admm_steps=0 with num_calibration_samples=1024" in caplog.text
    assert phases_of(trainer) == {1, 2}


@pytest.mark.parametrize("flags", [{}, {"sparsity_pattern": "1:4", "admm_steps": 0, "num_calibration_samples": 1024}])
def test_a_model_that_obeys_already_keeps_its_zeros(flags, tiny_bert, token_data, tmp_path, caplog):
    data, model, flags = token_data(64), tiny_bert(), {**BY_DEFAULT, **flags}
    prune_one_shot(model, calibration_batches(data), flags["sparsity_pattern"])
    zeros = {name: weight == 0 for name, weight in weights(model).items()}
    trainer = train(model, data, tmp_path, **flags)
    final = weights(trainer.model)
    assert all(torch.equal(final[name] == 0, zeros[name]) for name in trainer.sparsity.targets)
    assert not any("admm/output_change" in log for log in trainer.state.log_history)
    assert "train it dense" not in caplog.text


def test_a_model_that_may_start_from_scratch_is_warned_of(tiny_bert, token_data, tmp_path, caplog):
    told = "BertForSequenceClassification is pruned by its data before it trains, as is the default, and it was not"
    train(tiny_bert(), token_data(), tmp_path / "run", **BY_DEFAULT)
    assert told in caplog.text and "set admm_steps=0.6" in caplog.text
    caplog.clear()
    tiny_bert().save_pretrained(tmp_path / "model")
    train(
        BertForSequenceClassification.from_pretrained(tmp_path / "model"), token_data(), tmp_path / "run", **BY_DEFAULT
    )
    train(tiny_bert(), token_data(), tmp_path / "run", **BY_DEFAULT | {"num_calibration_samples": 8})
    train(tiny_bert(), token_data(), tmp_path / "run", **DENSE_HALF)
    assert "not loaded" not in caplog.text
