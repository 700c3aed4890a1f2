"""Runs that train dense, prune by their data and train on, with or without that dense model as a teacher, and what
Trainer does around a training."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_admm import ADMMTrainer, audit_checkpoint
from hf_admm.sparsity.projections import project
from hf_admm.training.teachers import become
from restarts import Breaks, Trials, out_of_memory, search
from tiny_runs import STEPS, Recorder, assert_same_weights, prepare, train, weights


# As a user gives them: nothing of a phase.
PLAIN = {"admm_steps": None, "admm_rho": None, "admm_update_steps": None}
RECIPES = {
    "pruned": PLAIN | {"sparsity_pattern": "1:4"},
    "taught": PLAIN | {"sparsity_pattern": "2:4", "distill_teacher": "switch"},
}


@pytest.fixture(params=RECIPES)
def recipe(request):
    return RECIPES[request.param]


@pytest.mark.parametrize("best", [3, 9])
def test_the_best_model_is_that_of_its_checkpoint(best, recipe, tiny_bert, token_data, tmp_path):
    """Of either half: it is sparse, and is what is saved."""
    flags = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 3, "eval_steps": 3}

    class Chosen(ADMMTrainer):
        def _determine_best_metric(self, metrics, trial):
            judged = metrics | {"eval_score": float(self.state.global_step == best)}
            return super()._determine_best_metric(judged, trial)

    trainer = train(
        tiny_bert(), token_data(), tmp_path, Chosen, load_best_model_at_end=True, metric_for_best_model="score",
        greater_is_better=True, **flags, **recipe,
    )  # fmt: skip
    assert trainer.state.best_global_step == best and trainer.audit.ok
    trainer.save_model(str(tmp_path / "model"))
    assert audit_checkpoint(tmp_path / "model").ok
    best_of = type(trainer.model).from_pretrained(tmp_path / f"checkpoint-{best}")
    assert_same_weights(trainer.model, weights(best_of))


@pytest.mark.parametrize("step", [3, 8])
def test_a_smaller_batch_begins_anew(step, recipe, tiny_bert, token_data, tmp_path, monkeypatch):
    """With a dense half; it prunes, and takes the teacher, of that attempt. The log has what pruning changed."""
    taken, phases = [], Recorder("on_step_begin", lambda state, **_: trainer.sparsity.phase.name)
    monkeypatch.setattr(
        "hf_admm.training.teaching.become", lambda teacher, student: (taken.append(1), become(teacher, student))
    )
    trainer = prepare(
        tiny_bert(), token_data(), tmp_path, Breaks, callbacks=[phases], auto_find_batch_size=True, **recipe
    )
    trainer.error, trainer.at = out_of_memory(), step
    trainer.train()
    halves = ["dense_phase"] * (STEPS // 2) + ["srste"] * (STEPS // 2)
    assert phases.seen == halves[: step + 1] + halves
    assert trainer.audit.ok and len(taken) == (0 if trainer.args.distill_teacher is None else 1 + (step > 6))
    logs = [log for log in trainer.state.log_history if "admm/output_change" in log]
    assert logs and all(log["admm/phase"] == 2 for log in logs)


def test_trials_of_a_search(recipe, tiny_bert, token_data, tmp_path):
    """Each ends with the bits of a run of its own."""
    data, parts = token_data(), {"model_init": lambda: tiny_bert()}
    flags = {**recipe, "eval_strategy": "steps", "eval_steps": 4}
    trainer = prepare(None, data, tmp_path, Trials, parts=parts, **flags)
    search(trainer, {"sparsity_pattern": ["2:8", "1:4"]}, direction="minimize")
    assert sorted(pattern for pattern, *_ in trainer.ends) == ["1:4", "2:8"]
    for pattern, audit, phase, end in trainer.ends:
        alone = train(None, data, tmp_path / "alone", parts=parts, **flags | {"sparsity_pattern": pattern})
        assert audit.ok and phase == "sparse"
        assert_same_weights(alone.model, end)


def test_a_checkpoint_of_the_dense_half_is_sparse_and_its_sidecar_dense(recipe, tiny_bert, token_data, tmp_path):
    dense = Recorder("on_step_end", lambda state, model, **_: weights(model))
    train(tiny_bert(), token_data(), tmp_path, callbacks=[dense], save_strategy="steps", save_steps=3, **recipe)
    folder = tmp_path / "checkpoint-3"
    assert audit_checkpoint(folder, pattern=recipe["sparsity_pattern"]).ok
    beside = load_file(folder / "admm_state.safetensors")
    assert beside and all(name.startswith("weight/") for name in beside)
    for name, weight in beside.items():
        assert torch.equal(weight, dense.seen[2][name.removeprefix("weight/")]), name


def test_a_run_that_stops_in_the_dense_half_is_sparse(recipe, tiny_bert, token_data, tmp_path, caplog):
    """Cut by size, as its evaluations were, and a warning says that it never trained so."""

    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    dense = Recorder("on_step_end", lambda state, model, **_: weights(model))
    trainer = train(tiny_bert(), token_data(), tmp_path, callbacks=[dense, Stops()], **recipe)
    assert trainer.audit.ok and caplog.text.count("in phase 1, which has 6: phase 2 never ran") == 1
    keeps = "a smaller admm_steps (with admm_rho=0 and num_calibration_samples=1024), or evaluations that wait"
    assert (keeps in caplog.text) is ("distill_teacher" not in recipe), "there admm_steps alone keeps the method"
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "## Sparsity" in card and "### Citation" not in card, "no method was used to the end"
    for name, target in trainer.sparsity.targets.items():
        expected = project(dense.seen[2][name], trainer.args.pattern, target.transposed)
        assert torch.equal(trainer.model.get_parameter(name), expected), name


def test_processes_are_compared_in_both_halves(recipe, tiny_bert, token_data, tmp_path, monkeypatch):
    compared, trainer = [], prepare(tiny_bert(), token_data(), tmp_path, **recipe)
    monkeypatch.setattr(
        type(trainer.sparsity.weights), "check_replicas", lambda *_: compared.append(trainer.state.global_step)
    )
    trainer.train()
    assert set(compared) == set(range(STEPS))


@pytest.mark.parametrize("one_phase", [False, True])
def test_a_smaller_batch_begins_with_what_was_there_before_the_pruning(one_phase, tiny_bert, token_data, tmp_path):
    """Not with a pruned model, of which a dense half would make something else."""
    flags = PLAIN | {"sparsity_pattern": "2:4" if one_phase else "1:4"}
    dense = Recorder("on_step_end", lambda state, model, **_: weights(model))
    starts = Recorder("on_train_begin", lambda state, model, **_: weights(model))
    trainer = prepare(
        tiny_bert(), token_data(), tmp_path, Breaks, callbacks=[dense, starts], auto_find_batch_size=True, **flags
    )
    trainer.error, trainer.at = out_of_memory(), 8
    trainer.train()
    if not one_phase:  # else it is pruned by then, anew
        assert all(torch.equal(starts.seen[1][n], dense.seen[STEPS // 2 - 1][n]) for n in trainer.sparsity.targets)
    assert any("admm/output_change" in log for log in trainer.state.log_history)
    assert trainer.audit.ok and not trainer.sparsity.weights.remembered


def test_an_error_that_ends_the_run_leaves_no_copy(tiny_bert, token_data, tmp_path):
    """It would overwrite what the user puts into the model before another training."""
    trainer = prepare(tiny_bert(), token_data(), tmp_path, Breaks, auto_find_batch_size=True, **RECIPES["pruned"])
    trainer.error, trainer.at = KeyboardInterrupt(), 8
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not trainer.sparsity.weights.remembered


class Insists(ADMMTrainer):
    """Has no loss but of training."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if not self.model.training:
            raise KeyError("no loss in evaluation mode")
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_what_can_not_be_done_at_the_switch_is_said_at_the_start(recipe, tiny_bert, token_data, tmp_path, caplog):
    steps = Recorder("on_step_begin", lambda state, **_: state.global_step)
    with pytest.raises(KeyError, match="no loss in evaluation mode"):
        train(tiny_bert(), token_data(), tmp_path, Insists, callbacks=[steps], **recipe)
    assert steps.seen == [] and "failed on them in evaluation mode, before it called the model" in caplog.text
    if "distill_teacher" not in recipe:  # there is no switch, so nothing has to be tried
        train(
            tiny_bert(),
            token_data(),
            tmp_path,
            Insists,
            **recipe | {"admm_steps": STEPS, "admm_rho": 0, "num_calibration_samples": 8},
        )

    train(tiny_bert(), token_data(), tmp_path / "run", save_strategy="steps", save_steps=3, **recipe)
    resumed = prepare(tiny_bert(), token_data(), tmp_path / "run", Insists, **recipe)
    steps.seen.clear()
    resumed.add_callback(steps)
    with pytest.raises(KeyError, match="no loss in evaluation mode"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert steps.seen == []

    class Pairs(list):
        def __getitem__(self, place):
            return super().__getitem__(place[0])

    with pytest.raises(ValueError, match=r"Row 0 of the training data \(Pairs\) can't be looked up by its number"):
        train(tiny_bert(), Pairs(token_data()), tmp_path, callbacks=[steps], parts={"eval_dataset": None}, **recipe)
    assert steps.seen == []


def test_a_checkpoint_that_does_not_fit_the_length_is_named(recipe, tiny_bert, token_data, tmp_path, caplog):
    train(tiny_bert(), token_data(), tmp_path, save_strategy="steps", save_steps=3, **recipe)
    for step, length, phase in ((9, 30, 2), (6, 8, 1)):
        checkpoint = str(tmp_path / f"checkpoint-{step}")
        for flags, fits in ({}, True), ({"max_steps": length}, False):
            caplog.clear()
            trainer = prepare(tiny_bert(), token_data(), tmp_path / "again", **recipe | flags)
            trainer.train(resume_from_checkpoint=checkpoint)
            said = f"The checkpoint at step {step} was saved in phase {phase}. By the flags and the length of this run"
            assert (said in caplog.text) is not fits and trainer.audit.ok


def test_zeros_that_a_teacher_of_the_switch_costs_are_warned_of(tiny_bert, token_data, tmp_path, caplog):
    model = train(tiny_bert(), token_data(), tmp_path, **PLAIN, sparsity_pattern="2:4").model
    train(model, token_data(), tmp_path, **RECIPES["taught"])
    assert caplog.text.count("The model obeys 2:4 already, and phase 1 will train it dense") == 1
    assert "set sparsity_pattern='own'." in caplog.text
