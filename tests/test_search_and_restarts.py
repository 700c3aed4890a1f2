"""Training that starts more than once: searches, smaller batches after a memory error, interrupts."""

import optuna
import pytest
import torch

import hf_admm.pruning.srste
import hf_admm.pruning.weights
from hf_admm import ADMMTrainer, audit_checkpoint
from hf_admm.sparsity.projections import broken_groups
from restarts import Breaks, Trials, out_of_memory, search
from tiny_runs import STEPS, Recorder, assert_same_weights, prepare, train, weights


def is_sparse(trainer, pattern=None):
    targets = trainer.sparsity.targets.items()
    pattern = pattern or trainer.args.pattern
    return all(not broken_groups(trainer.model.get_parameter(n), pattern, t.transposed).any() for n, t in targets)


# ---- Hyperparameter search ----


@pytest.mark.parametrize("first", ["none", "2:4"])
def test_each_trial_trains_with_its_own_pattern_on_a_fresh_model(first, tiny_bert, token_data, tmp_path):
    """Each ends with the bits of a run of its own, whatever the arguments were when the trainer was made."""
    data = token_data()
    space = {"sparsity_pattern": ["none", "2:4", "1:4"], "learning_rate": [2e-3], "admm_rho": [3.0]}
    flags = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 4}
    parts = {"model_init": lambda: tiny_bert()}
    trainer = prepare(None, data, tmp_path, Trials, parts=parts, sparsity_pattern=first, **flags)
    best = search(trainer, space, direction="minimize")
    assert sorted(pattern for pattern, *_ in trainer.ends) == ["1:4", "2:4", "none"]
    assert best.hyperparameters["sparsity_pattern"] in space["sparsity_pattern"] and 0 < best.objective < 2
    assert best.hyperparameters["admm_rho"] == 3.0
    for pattern, audit, phase, end in trainer.ends:
        chosen = {"sparsity_pattern": pattern, "learning_rate": 2e-3, "admm_rho": 3.0}
        alone = train(None, data, tmp_path / "alone", parts=parts, **flags, **chosen)
        assert_same_weights(alone.model, end)
        if pattern == "none":
            assert audit is None and phase == "dense"
        else:
            assert audit.ok and str(audit.pattern) == pattern and phase == "sparse"


def test_a_pruned_trial_leaves_nothing_to_the_next(tiny_bert, token_data, tmp_path):
    class AtNine(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return trial.number == 0 and trial.last_step == 9  # in phase 2

    data, space = token_data(), {"sparsity_pattern": ["2:4", "1:4"]}
    flags = {"eval_strategy": "steps", "eval_steps": 3, "parts": {"model_init": lambda: tiny_bert()}}
    trainer = prepare(None, data, tmp_path, Trials, **flags)
    best = search(trainer, space, direction="minimize", pruner=AtNine())
    assert best.run_id == "1"
    pattern, audit, _, end = trainer.ends[1]
    alone = train(None, data, tmp_path / "alone", sparsity_pattern=pattern, **flags)
    assert audit.ok and str(audit.pattern) == pattern
    assert_same_weights(alone.model, end)


def test_a_trial_with_a_bad_pattern_is_refused(tiny_bert, token_data, tmp_path):
    trainer = prepare(None, token_data(), tmp_path, parts={"model_init": lambda: tiny_bert()})
    with pytest.raises(ValueError, match="5:4"):
        search(trainer, {"sparsity_pattern": ["5:4"]}, direction="minimize")


def test_every_train_starts_from_model_init(tiny_bert, token_data, tmp_path):
    trainer = train(None, token_data(), tmp_path, parts={"model_init": lambda: tiny_bert()})
    first, end = trainer.model, weights(trainer.model)
    trainer.train()
    assert trainer.model is not first and trainer.audit.ok
    assert_same_weights(trainer.model, end)


def test_a_second_train_runs_both_phases_again(tiny_bert, token_data, tmp_path):
    phases = []

    class Spy(ADMMTrainer):
        def training_step(self, *args, **kwargs):
            phases.append(self.sparsity.phase.name)
            return super().training_step(*args, **kwargs)

    trainer = train(tiny_bert(), token_data(), tmp_path, Spy)
    end = weights(trainer.model)
    trainer.train()
    assert phases == (["admm"] * 6 + ["srste"] * 6) * 2
    assert trainer.audit.ok and is_sparse(trainer)
    assert any(not torch.equal(weight, trainer.model.get_parameter(name)) for name, weight in end.items())


# ---- Errors in the middle of a run ----


@pytest.mark.parametrize("step", [3, 8])
def test_a_smaller_batch_starts_both_phases_again_on_the_dense_weights(step, tiny_bert, token_data, tmp_path):
    dense = Recorder("on_step_end", lambda state, model=None, **_: weights(model))
    starts = Recorder("on_train_begin", lambda state, model=None, **_: weights(model))
    phases = []

    class Spy(Breaks):
        def training_step(self, *args, **kwargs):
            phases.append((self.state.global_step, self.sparsity.phase.name))
            return super().training_step(*args, **kwargs)

    flags = {"callbacks": [dense, starts], "auto_find_batch_size": True}
    trainer = prepare(tiny_bert(), token_data(), tmp_path, Spy, **flags)
    trainer.error, trainer.at = out_of_memory(), step
    trainer.train()
    assert trainer._train_batch_size in (4, 7) and trainer.state.global_step == STEPS  # by the version of accelerate
    assert all(torch.equal(weight, dense.seen[step - 1][name]) for name, weight in starts.seen[1].items())
    expected = [(k, "admm" if k < 6 else "srste") for k in range(STEPS)]
    assert phases == expected[: step + 1] + expected
    assert trainer.audit.ok and is_sparse(trainer)


def test_a_retry_of_a_resume_goes_on_from_the_checkpoint(tiny_bert, token_data, tmp_path):
    data, flags = token_data(), {"save_strategy": "steps", "save_steps": 3, "auto_find_batch_size": True}
    train(tiny_bert(), data, tmp_path, **flags)
    trainer = prepare(tiny_bert(), data, tmp_path, Breaks, **flags)
    trainer.error, trainer.at = out_of_memory(), 9
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert trainer._train_batch_size in (4, 7) and trainer.state.global_step == STEPS
    assert trainer.audit.ok and is_sparse(trainer)


@pytest.mark.parametrize("step", [3, 8])
def test_an_interrupt_leaves_the_dense_weights_and_sparse_evaluations(step, tiny_bert, token_data, tmp_path):
    dense = Recorder("on_step_end", lambda state, model=None, **_: weights(model))
    trainer = prepare(tiny_bert(), token_data(), tmp_path, Breaks, callbacks=[dense])
    trainer.error, trainer.at = KeyboardInterrupt(), step
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert_same_weights(trainer.model, dense.seen[step - 1])
    assert not is_sparse(trainer)
    trainer.save_model(str(tmp_path / "model"))  # as anyone would who stops a notebook
    assert audit_checkpoint(tmp_path / "model").ok
    saved = type(trainer.model).from_pretrained(tmp_path / "model")
    loss = trainer.evaluate()["eval_loss"]
    assert prepare(saved, token_data(), tmp_path).evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-6)
    assert_same_weights(trainer.model, dense.seen[step - 1])
    trainer.train()
    assert trainer.audit.ok and is_sparse(trainer)


@pytest.mark.parametrize(("moment", "step"), [("evaluate", 3), ("evaluate", 8), ("mask", 8)])
def test_an_error_halfway_through_the_weights_loses_none(moment, step, tiny_bert, token_data, tmp_path, monkeypatch):
    """The fifth of twelve weights can't be masked: for the step itself, or for an evaluation after it."""
    zero_outside, calls = hf_admm.pruning.srste.zero_outside, []

    def fails(*args):
        calls.append(args)
        if len(calls) == 5:
            raise out_of_memory()
        return zero_outside(*args)

    trainer = prepare(tiny_bert(), token_data(), tmp_path)
    seen = {}

    def look(args, state, control, model=None, **kwargs):
        if state.global_step == step:
            seen.update(weights(model))
            monkeypatch.setattr(hf_admm.pruning.srste, "zero_outside", fails)
            monkeypatch.setattr(hf_admm.pruning.weights, "zero_outside", fails)
            if moment == "evaluate":
                trainer.evaluate()

    watch = Recorder("on_step_end", lambda state, **_: None)
    watch.on_step_end = look
    trainer.add_callback(watch)
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        trainer.train()
    assert len(calls) == 5 and not trainer.sparsity.masked
    assert_same_weights(trainer.model, seen)


def test_a_checkpoint_that_is_not_there_gives_the_message_of_trainer(tiny_bert, token_data, tmp_path):
    for pattern in ("2:4", "none"):
        trainer = prepare(tiny_bert(), token_data(), tmp_path, sparsity_pattern=pattern)
        with pytest.raises(ValueError, match="Can't find a valid checkpoint at"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "bogus"))
