"""Steps that are begun and not completed: no order of events may cost a dense weight, or count a penalty twice."""

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from hf_admm import ADMMTrainer, ADMMTrainerMixin
from tiny_runs import Recorder, prepare, train, weights


class Stream(IterableDataset):
    """Rows whose number nobody knows; or a wrong one."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)

    def __getitem__(self, rows):  # for those who evaluate on some of them
        return self.rows[rows]


class WronglyLong(Stream):
    def __len__(self):
        return len(self.rows) + 5


class StopsEpoch(TrainerCallback):
    """Ends an epoch in the middle of an accumulation window, in both phases."""

    def on_substep_end(self, args, state, control, **kwargs):
        control.should_epoch_stop = state.global_step in (2, 4)
        return control


def dense_weights_survive(trainer):
    """Nothing may change a target between a step and the optimizer's next one."""
    after = Recorder("on_step_end", lambda state, model=None, **_: weights(model))
    before = Recorder("on_pre_optimizer_step", lambda state, model=None, **_: weights(model))
    trainer.add_callback(after)
    trainer.add_callback(before)
    trainer.train()
    for left, found in zip(after.seen[:-1], before.seen[1:], strict=True):
        for name in trainer.sparsity.targets:
            assert torch.equal(left[name], found[name]), name
    assert trainer.audit.ok


@pytest.mark.parametrize(("rows", "accumulation", "stream"), [(20, 2, Stream), (28, 4, Stream), (20, 2, WronglyLong)])
@pytest.mark.parametrize("admm_steps", [0, 2])
def test_an_epoch_that_ends_within_a_window(rows, accumulation, stream, admm_steps, tiny_bert, token_data, tmp_path):
    flags = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4, "mask_freeze_steps": 0}
    data = stream(token_data(rows))
    dense_weights_survive(prepare(tiny_bert(), data, tmp_path, admm_steps=admm_steps, admm_update_steps=1, **flags))


def test_an_epoch_that_a_callback_stops_within_a_window(tiny_bert, token_data, tmp_path):
    flags = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "admm_steps": 1}
    dense_weights_survive(prepare(tiny_bert(), token_data(), tmp_path, callbacks=[StopsEpoch()], **flags))


def test_an_evaluation_and_a_save_within_a_window(tiny_bert, token_data, tmp_path):
    """At the end of such an epoch the model holds masked weights, and the checkpoint the dense ones."""
    flags = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "admm_steps": 1, "max_steps": 8}
    flags |= {"save_strategy": "epoch", "eval_strategy": "epoch", "save_total_limit": 9}
    trainer = train(tiny_bert(), Stream(token_data(20)), tmp_path, parts={"eval_dataset": token_data(8)}, **flags)
    assert trainer.audit.ok and all("eval_loss" in log for log in trainer.state.log_history if "eval_runtime" in log)


def test_masking_twice_is_masking_once(tiny_bert, token_data, tmp_path):
    trainer = prepare(tiny_bert(), token_data(), tmp_path, admm_steps=0)
    seen = {}

    def look(args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            settings = args.phase_settings(state.max_steps)
            dense = {name: part.clone() for name, part in trainer.sparsity.weights.dense()}
            masked = weights(model)
            trainer.sparsity.before_forward(3, settings)
            assert all(torch.equal(masked[name], weight) for name, weight in weights(model).items())
            assert all(torch.equal(dense[name], part) for name, part in trainer.sparsity.weights.dense())
            seen["looked"] = True

    watch = Recorder("on_step_end", lambda state, **_: None)
    watch.on_step_begin = look
    trainer.add_callback(watch)
    trainer.train()
    assert seen and trainer.audit.ok


# ---- The penalty belongs to the step, not to a method ----


def own_step(self, model, inputs, num_items_in_batch=None):
    """Forward and backward without the method of Trainer, twice, as adversarial training does."""
    model.train()
    inputs = self._prepare_inputs(inputs)
    for _ in range(2):
        loss = self.compute_loss(model, dict(inputs)) / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
    return loss.detach()


class Base(Trainer):
    training_step = own_step


class Above(ADMMTrainerMixin, Base):
    pass


class Over(ADMMTrainer):
    training_step = own_step


class Twice(ADMMTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        super().training_step(model, dict(inputs), num_items_in_batch)
        return super().training_step(model, inputs, num_items_in_batch)


class OwnClipping(ADMMTrainer):
    """Clips by value, and never asks Trainer."""

    def _clip_grad_norm(self, model):
        torch.nn.utils.clip_grad_value_(model.parameters(), 1.0)
        return None

    def _get_grad_norm(self, model, grad_norm=None):
        return 1.0


@pytest.mark.parametrize("cls", [Above, Over, Twice, OwnClipping])
@pytest.mark.parametrize("penalty", ["loss", "gradient"])
@pytest.mark.parametrize("flags", [{}, {"max_grad_norm": 0.0}, {"gradient_accumulation_steps": 2}])
def test_the_penalty_pulls_once_a_step(cls, penalty, flags, tiny_bert, token_data, tmp_path):
    trainer, pulls = prepare(tiny_bert(), token_data(), tmp_path, cls, admm_penalty=penalty, **flags), []
    pull = trainer.sparsity.pull_gradients

    def counted(strength):
        pulls.append((trainer.state.global_step, strength))
        pull(strength)

    trainer.sparsity.pull_gradients = counted
    trainer.train()
    assert pulls == [(step, 0.1) for step in range(6)] and trainer.audit.ok


# ---- A step that Trainer does not take ----


class OwnSteps(ADMMTrainer):
    """Steps the optimizer in its `training_step`, as a loop of one's own that was moved there does."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
        optimizer = self.optimizer.optimizer  # accelerate's wrapper would not step before the window is over
        optimizer.step()
        optimizer.zero_grad()
        return loss


def dense_weights(cls, *args, **flags):
    trainer = prepare(*args, cls, admm_penalty="gradient", **flags)
    taken = Recorder("on_step_end", lambda *_, **__: {n: w.clone() for n, w in trainer.sparsity.weights.dense()})
    trainer.add_callback(taken)
    trainer.train()
    return taken.seen


@pytest.mark.parametrize("flags", [{}, {"admm_steps": 0}, {"admm_steps": 12}])
def test_steps_of_ones_own_move_the_dense_weights(flags, tiny_bert, token_data, tmp_path):
    """As Trainer's step does, to the bit where the penalty is not clipped."""
    expected = dense_weights(ADMMTrainer, tiny_bert(), token_data(), tmp_path, **flags)
    found = dense_weights(OwnSteps, tiny_bert(), token_data(), tmp_path, **flags)
    for mine, theirs in zip(expected, found, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_each_step_of_ones_own_is_pulled_once(tiny_bert, token_data, tmp_path):
    """Two in each of Trainer's; and nothing stays in the optimizer."""
    trainer, pulls = (
        prepare(tiny_bert(), token_data(), tmp_path, OwnSteps, gradient_accumulation_steps=2, admm_penalty="loss"),
        [],
    )
    pull = trainer.sparsity.pull_gradients
    trainer.sparsity.pull_gradients = lambda strength: pulls.append(trainer.state.global_step) or pull(strength)
    trainer.train()
    assert pulls == [step for step in range(6) for _ in range(2)]
    assert trainer.audit.ok and not trainer.sparsity._hooks
