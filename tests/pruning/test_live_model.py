"""Weights that change their status in a run: frozen, unfrozen, replaced, gone, or not the optimizer's."""

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from tiny_runs import Recorder, assert_same_weights, prepare, weights


NAME = "bert.encoder.layer.0.attention.self.query.weight"
PENALTIES = ["loss", "gradient", "decoupled"]


class At(TrainerCallback):
    """Does something to the model at the end of one step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.action(model)


def freeze(model):
    model.get_parameter(NAME).requires_grad = False


def run(model, data, folder, step, action, caplog, **flags):
    after = Recorder("on_step_end", lambda state, model=None, **_: weights(model))
    trainer = prepare(model, data, folder, callbacks=[At(step, action), after], **flags)
    trainer.train()
    warned = " ".join(record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    return trainer, [seen.get(NAME) for seen in after.seen], warned


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_weight_that_is_frozen_in_phase_1_does_not_move(penalty, tiny_bert, token_data, tmp_path, caplog):
    trainer, seen, warned = run(
        tiny_bert(), token_data(), tmp_path, 3, freeze, caplog, admm_penalty=penalty, admm_rho=1.0
    )
    assert all(torch.equal(weight, seen[2]) for weight in seen[3:])
    assert torch.equal(trainer.model.get_parameter(NAME), seen[2])
    assert f"{NAME} is not pruned any more: it was frozen in the run" in warned
    assert trainer.audit.ok and NAME in trainer.audit.released and NAME in trainer.audit.table()
    assert f"Left dense: {NAME} (it was frozen in the run)." in trainer.audit.verdict()


@pytest.mark.parametrize("flags", [{}, {"admm_rho": None}], ids=["dual", "distance"])
def test_a_weight_may_be_frozen_for_a_part_of_phase_1(flags, tiny_bert, token_data, tmp_path, caplog):
    """Nothing moves it meanwhile, its anchor included; then it is pruned with the others."""

    class Thaws(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.get_parameter(NAME).requires_grad = state.global_step not in range(1, 5)

    held = Recorder("on_step_end", lambda state, **_: None)
    trainer = prepare(tiny_bert(), token_data(), tmp_path, callbacks=[Thaws()], **flags)
    held.on_step_end = lambda args, state, control, model=None, **_: held.seen.append(
        (model.get_parameter(NAME).detach().clone(), trainer.sparsity.phase.companions[NAME].clone())
    )
    trainer.add_callback(held)
    trainer.train()
    assert all(torch.equal(weight, held.seen[0][0]) for weight, _ in held.seen[1:5])
    still = held.seen[2:5] if flags else held.seen[0:5]  # a mask follows once more
    assert all(torch.equal(companion, still[0][1]) for _, companion in still)
    assert trainer.audit.ok and not trainer.audit.released and NAME not in caplog.text
    assert (trainer.model.get_parameter(NAME) == 0).float().mean() == 0.5


def test_a_weight_that_is_frozen_in_phase_2_does_not_move(tiny_bert, token_data, tmp_path, caplog):
    """It has computed with its zeros: they stay, and so do its dense values until the end."""
    trainer, seen, _ = run(tiny_bert(), token_data(), tmp_path, 8, freeze, caplog, srste_decay=0.5, learning_rate=0.01)
    assert all(torch.equal(weight, seen[7]) for weight in seen[8:])
    end = trainer.model.get_parameter(NAME)
    assert torch.equal(end, torch.where(end == 0, 0, seen[7])) and (end == 0).float().mean() == 0.5
    assert trainer.audit.ok and not trainer.audit.released


def test_a_weight_that_is_unfrozen_is_named(tiny_bert, token_data, tmp_path, caplog):
    model = tiny_bert()
    freeze(model)

    def unfreeze(model):
        model.get_parameter(NAME).requires_grad = True

    trainer, _, warned = run(model, token_data(), tmp_path, 3, unfreeze, caplog)
    assert f"{NAME} was frozen when training began and is trained by now. It stays dense." in warned
    assert trainer.audit.ok and NAME in trainer.audit.released


@pytest.mark.parametrize("step", [3, 8])
def test_a_module_that_is_replaced_is_pruned_all_the_same(step, tiny_bert, token_data, tmp_path, caplog):
    def replace(model):
        torch.manual_seed(5)
        model.bert.encoder.layer[0].attention.self.query = nn.Linear(16, 16)

    trainer, _, warned = run(tiny_bert(), token_data(), tmp_path, step, replace, caplog)
    live = trainer.model.get_parameter(NAME)
    assert f"{NAME} was replaced in the model" in warned
    assert trainer.audit.ok and (live == 0).float().mean() == 0.5
    assert NAME in [weight.name for weight in trainer.audit.sparse]


@pytest.mark.parametrize("step", [3, 8])
def test_a_weight_that_can_not_be_pruned_any_more_is_named(step, tiny_bert, token_data, tmp_path, caplog):
    class Wide(nn.Module):
        """A layer of another shape, under another name."""

        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(16, 16)

        def forward(self, x):
            return self.inner(x)

    def replace(model):
        model.bert.encoder.layer[0].attention.self.query = Wide()

    trainer, _, warned = run(tiny_bert(), token_data(), tmp_path, step, replace, caplog)
    assert f"{NAME} is not pruned any more: it is gone from the model" in warned
    assert trainer.audit.ok and NAME in trainer.audit.released and len(trainer.audit.sparse) == 11


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_weight_that_the_optimizer_does_not_hold(penalty, tiny_bert, token_data, tmp_path, caplog):
    model = tiny_bert()
    start = model.get_parameter(NAME).detach().clone()
    held = [parameter for name, parameter in model.named_parameters() if name != NAME]
    parts = {"optimizers": (torch.optim.SGD(held, lr=0.01), None)}
    trainer = prepare(model, token_data(), tmp_path, parts=parts, admm_penalty=penalty)
    trainer.train()
    assert torch.equal(model.get_parameter(NAME), start)
    assert trainer.audit.ok and trainer.audit.released == {NAME: "the optimizer does not hold it"}
    assert f"{NAME} is not pruned any more: the optimizer does not hold it" in caplog.text


def test_an_optimizer_without_any_of_the_weights_is_refused(tiny_bert, token_data, tmp_path):
    model = tiny_bert()
    parts = {"optimizers": (torch.optim.SGD(model.classifier.parameters(), lr=0.01), None)}
    with pytest.raises(ValueError, match=r"The optimizer \(SGD\) holds none of the 12 weights to prune.*parameters"):
        prepare(model, token_data(), tmp_path, parts=parts).train()


class Frozen(TrainerCallback):
    """Freezes from the third step on, in a resumed run too."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step >= 3:
            freeze(model)

    on_train_begin = on_step_end


@pytest.mark.parametrize("saved", [4, 8])
def test_a_run_with_a_frozen_weight_resumes_to_the_same_bits(saved, tiny_bert, token_data, tmp_path):
    flags = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 9}
    straight = prepare(tiny_bert(), token_data(), tmp_path / "straight", callbacks=[Frozen()], **flags)
    straight.train()
    resumed = prepare(tiny_bert(seed=1), token_data(), tmp_path / "resumed", callbacks=[Frozen()])
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{saved}"))
    assert_same_weights(resumed.model, weights(straight.model))
    assert resumed.audit.released == {NAME: "it was frozen in the run"}


@pytest.mark.parametrize("step", [0, 3])
def test_a_run_without_a_weight_left_to_prune_is_stopped(step, tiny_bert, token_data, tmp_path, caplog):
    def freeze_layers(model):
        model.bert.requires_grad_(False)

    trainer = prepare(tiny_bert(), token_data(), tmp_path, callbacks=[At(step, freeze_layers)])
    if not step:
        trainer.add_callback(Recorder("on_train_begin", lambda state, model=None, **_: freeze_layers(model)))
    with pytest.raises(ValueError, match=f"None of the weights is left that were to be pruned.*{NAME} .it was frozen"):
        trainer.train()
