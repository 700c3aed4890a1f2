"""Trainers with signatures of their own: what they are given is found by name and handed on as it was."""

import copy
import inspect

import pytest
import torch
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments

from hf_admm import ADMMTrainer, ADMMTrainerMixin, ADMMTrainingArguments
from hf_admm.training.signatures import GivenArguments
from tiny_runs import SETTINGS, assert_same_weights, prepare, train, weights


class RefTrainer(Trainer):  # as DPO's
    def __init__(self, model, ref_model=None, args=None, train_dataset=None, callbacks=None):
        assert ref_model is None or isinstance(ref_model, torch.nn.Module)
        super().__init__(model=model, args=args, train_dataset=train_dataset, callbacks=callbacks)
        self.ref_model = ref_model


class RewardTrainer(Trainer):  # as GRPO's
    def __init__(self, model, reward_funcs, args=None, train_dataset=None):
        super().__init__(model=model, args=args, train_dataset=train_dataset)
        self.reward_funcs = reward_funcs


class KeywordTrainer(Trainer):
    def __init__(self, *, args, model, extra, train_dataset=None):
        super().__init__(model, args, train_dataset=train_dataset)
        self.extra = extra


class PassingTrainer(Trainer):
    def __init__(self, *args, alpha=0.5, **kwargs):
        super().__init__(*args, **kwargs)
        self.alpha = alpha


class NestedTrainer(PassingTrainer, RefTrainer):
    pass


class ConfigTrainer(Trainer):
    def __init__(self, config, model, **kwargs):
        super().__init__(model, ADMMTrainingArguments(**config), **kwargs)


class NamedTrainer(Trainer):
    def __init__(self, model, args=None, train_dataset=None):
        super().__init__(model() if callable(model) and not isinstance(model, torch.nn.Module) else model, args,
                         train_dataset=train_dataset)  # fmt: skip


CALLS = {
    "ref": (RefTrainer, lambda m, a, d: ((m, None, a, d), {})),
    "ref by name": (RefTrainer, lambda m, a, d: ((m,), {"args": a, "train_dataset": d})),
    "ref given": (RefTrainer, lambda m, a, d: ((m, copy.deepcopy(m), a), {"train_dataset": d})),
    "reward": (RewardTrainer, lambda m, a, d: ((m, [len], a), {"train_dataset": d})),
    "reward by name": (RewardTrainer, lambda m, a, d: ((), {"reward_funcs": len, "args": a, "model": m,
                                                            "train_dataset": d})),
    "keywords": (KeywordTrainer, lambda m, a, d: ((), {"args": a, "model": m, "extra": 3, "train_dataset": d})),
    "passing": (PassingTrainer, lambda m, a, d: ((m, a), {"alpha": 1, "train_dataset": d})),
    "nested": (NestedTrainer, lambda m, a, d: ((m, None, a, d), {"alpha": 1})),
    "built inside": (ConfigTrainer, lambda m, a, d: (({"output_dir": a.output_dir, **SETTINGS,
                                                       "save_strategy": "no"}, m), {"train_dataset": d})),
    "no module": (NamedTrainer, lambda m, a, d: ((lambda: m, a, d), {})),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_any_signature_in_any_call_form_trains_as_trainer_does(name, tiny_bert, token_data, tmp_path):
    base, call = CALLS[name]
    mixed_class = type("Mixed", (ADMMTrainerMixin, base), {})
    model, data = tiny_bert(), token_data()
    straight = train(copy.deepcopy(model), data, tmp_path)
    args = ADMMTrainingArguments(str(tmp_path), save_strategy="no", **SETTINGS)
    positional, kwargs = call(model, args, data)
    mixed = mixed_class(*positional, **kwargs)
    assert inspect.signature(mixed_class) == inspect.signature(base)
    mixed.train()
    assert mixed.audit.ok
    assert_same_weights(model, weights(straight.model))


def test_a_model_that_cannot_be_pruned_is_refused_wherever_it_stands(tiny_bert, tmp_path):
    class Mixed(ADMMTrainerMixin, RewardTrainer):
        pass

    args = ADMMTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="No layer of BertForSequenceClassification matched"):
        Mixed(tiny_bert().requires_grad_(False), len, args)


def test_arguments_are_made_where_none_are_given(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for base, given in ((RefTrainer, ()), (RewardTrainer, (len,)), (Seq2SeqTrainer, ()), (PassingTrainer, ())):
        trainer = type("Mixed", (ADMMTrainerMixin, base), {})(tiny_bert(), *given)
        assert trainer.args.sparsity_pattern == "2:4" and trainer.args.output_dir == "tmp_trainer"
    assert type(ADMMTrainer(model_init=lambda: tiny_bert()).args) is ADMMTrainingArguments


def test_a_trainer_that_makes_arguments_without_flags_is_told_so(tiny_bert, tmp_path):
    class OwnArguments(Trainer):
        def __init__(self, model, folder):
            super().__init__(model, TrainingArguments(folder))

    class Mixed(ADMMTrainerMixin, OwnArguments):
        pass

    with pytest.raises(ValueError, match="Mixed got args of type TrainingArguments, which have no sparsity flags"):
        Mixed(tiny_bert(), str(tmp_path))


def test_a_mixin_behind_the_trainer_is_refused():
    """It would have no part in the training, which would be dense without a word."""
    with pytest.raises(ValueError, match=r"Late: ADMMTrainerMixin stands behind .*class Late\(ADMMTrainerMixin, "):

        class Late(RefTrainer, ADMMTrainerMixin):
            pass


def test_the_signature_is_that_of_the_class_mixed_into():
    assert inspect.signature(ADMMTrainer) == inspect.signature(Trainer)
    assert inspect.signature(ADMMTrainer.__init__) == inspect.signature(Trainer.__init__)

    class Own(ADMMTrainer):
        def __init__(self, model, extra):
            super().__init__(model)

    class Both(ADMMTrainer, RefTrainer):
        pass

    class Below(Both):
        pass

    assert list(inspect.signature(Own).parameters) == ["model", "extra"]
    assert inspect.signature(Both) == inspect.signature(Below) == inspect.signature(RefTrainer)


def test_what_was_given_is_handed_on_as_it_was():
    class After:
        pass

    class Base:
        def method(self, first, second=None, *, third=None):
            pass

    class Owner(After, Base):
        pass

    given = GivenArguments(Owner, After, "method", (1,), {"third": 3})
    assert (given.first(), given.get("first"), given.get("second"), given.get("third")) == (1, 1, None, 3)
    assert given.takes("second") and not given.takes("fourth")
    given.put("first", 5)
    given.put("second", 6)
    assert (given.args, given.kwargs) == ((5,), {"third": 3, "second": 6})
    assert GivenArguments(Owner, After, "method", (), {"second": 2}).first() == 2


def test_hooks_of_other_signatures_get_what_they_take(tiny_bert, token_data, tmp_path):
    """As Sentence Transformers has them, and others."""

    class Hooks(Trainer):
        def train(self, resume_from_checkpoint=None):
            return super().train(resume_from_checkpoint)

        def _load_from_checkpoint(self, checkpoint_path):
            super()._load_from_checkpoint(checkpoint_path)

        def _load_best_model(self):
            self._load_from_checkpoint(self.state.best_model_checkpoint)

        def _save(self, output_dir=None):
            super()._save(output_dir)

        def save_model(self, output_dir=None, _internal_call=False, suffix=""):
            super().save_model(output_dir + suffix)

        def create_model_card(self, title):
            assert title == "mine"

    class Mixed(ADMMTrainerMixin, Hooks):
        pass

    flags = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    flags |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    straight = train(tiny_bert(), token_data(), tmp_path, Mixed, **flags)
    straight.create_model_card("mine")
    straight.save_model(str(tmp_path / "a"), suffix="b")
    assert (tmp_path / "ab" / "hf_admm.json").is_file()
    best = straight.state.best_model_checkpoint
    assert_same_weights(straight.model, weights(type(straight.model).from_pretrained(best)))
    assert straight.audit.ok
    resumed = prepare(tiny_bert(seed=1), token_data(), tmp_path / "resumed", Mixed, **flags)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.audit.ok
    assert_same_weights(
        type(straight.model).from_pretrained(tmp_path / "resumed" / "checkpoint-12"),
        weights(type(straight.model).from_pretrained(tmp_path / "checkpoint-12")),
    )
