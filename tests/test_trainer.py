"""What ADMMTrainer leaves behind, what evaluation sees, and that `none` is plain Trainer."""

import copy

import pytest
import torch
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback, TrainingArguments

from hf_admm import ADMMTrainer, ADMMTrainerMixin, ADMMTrainingArguments
from hf_admm.sparsity.patterns import parse_pattern
from hf_admm.sparsity.projections import broken_groups
from tiny_models import NO_DROPOUT
from tiny_runs import STEPS, Recorder, train, weights


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "4x4:8", "0.5"])
@pytest.mark.parametrize("make", ["tiny_bert", "tiny_gpt2"])
def test_every_target_obeys_the_pattern_and_nothing_else_changes(make, pattern, token_data, tmp_path, request):
    model = request.getfixturevalue(make)()
    keys = list(model.state_dict())
    data = token_data(labels=2 if make == "tiny_bert" else None)
    trainer = train(model, data, tmp_path, sparsity_pattern=pattern)
    assert trainer.audit.ok and trainer.audit.violations == 0
    parsed = parse_pattern(pattern)
    for name, target in trainer.sparsity.targets.items():
        weight = model.get_parameter(name)
        assert not broken_groups(weight, parsed, target.transposed).any()
        assert (weight == 0).float().mean().item() == pytest.approx(1 - parsed.density, abs=2e-3)
    assert list(model.state_dict()) == keys  # no wrapper, buffer or renamed key
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_none_is_plain_trainer_bit_for_bit(tiny_bert, token_data, tmp_path):
    data, reference = token_data(), tiny_bert()
    model = copy.deepcopy(reference)
    flags = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "warmup_steps": 0.2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    plain = Trainer(reference, TrainingArguments(str(tmp_path / "plain"), **flags), train_dataset=data)
    plain.train()
    ours = train(model, data, tmp_path / "ours", sparsity_pattern="none", **flags)
    for name, weight in weights(reference).items():
        assert torch.equal(weight, model.get_parameter(name)), name
    changing = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
    logs = [
        [{k: v for k, v in log.items() if k not in changing} for log in t.state.log_history] for t in (plain, ours)
    ]
    assert logs[0] == logs[1]
    assert ours.audit is None
    names = [[type(callback).__name__ for callback in t.callback_handler.callbacks] for t in (plain, ours)]
    assert names[0] == names[1]


@pytest.mark.parametrize("step", [2, 4, 8, 12])
def test_evaluation_sees_sparse_weights_and_training_goes_on_dense(step, tiny_bert, token_data, tmp_path):
    """In both phases, and the run is the same as one that never evaluates (without dropout: a loader draws a seed)."""
    data, model = token_data(), tiny_bert(**NO_DROPOUT["tiny_bert"])
    seen = []

    class Spy(ADMMTrainer):
        def prediction_step(self, model, *args, **kwargs):
            seen.append({name: model.get_parameter(name).detach().clone() for name in self.sparsity.targets})
            return super().prediction_step(model, *args, **kwargs)

    dense = Recorder("on_step_end", lambda state, model=None, **_: weights(model))
    spied = train(copy.deepcopy(model), data, tmp_path, Spy, callbacks=[dense], eval_strategy="steps", eval_steps=step)
    straight = train(model, data, tmp_path)
    assert seen
    for snapshot in seen:
        for weight in snapshot.values():
            assert not broken_groups(weight, spied.args.pattern).any()
    targets = set(spied.sparsity.targets)
    assert any(broken_groups(dense.seen[-2][name], spied.args.pattern).any() for name in targets)
    for name, weight in weights(straight.model).items():
        assert torch.equal(weight, spied.model.get_parameter(name))


def test_the_mixin_gives_another_trainer_the_same(tiny_bert, token_data, tmp_path):
    class Mixed(ADMMTrainerMixin, Seq2SeqTrainer):
        pass

    model = tiny_bert()
    ours = train(copy.deepcopy(model), token_data(), tmp_path)

    class Arguments(ADMMTrainingArguments):
        predict_with_generate = sortish_sampler = False
        generation_config = generation_max_length = generation_num_beams = None

    args = Arguments(**{f: getattr(ours.args, f) for f in ("output_dir", "max_steps", "learning_rate", "admm_steps",
                     "admm_update_steps", "admm_rho", "save_strategy", "report_to", "disable_tqdm", "use_cpu",
                     "per_device_train_batch_size")})  # fmt: skip
    mixed = Mixed(model=model, args=args, train_dataset=token_data())
    mixed.train()
    for name, weight in weights(ours.model).items():
        assert torch.equal(weight, mixed.model.get_parameter(name))


def test_an_audit_that_fails_is_an_error(tiny_bert, token_data, tmp_path):
    """Something that writes to a weight when training ends: no dense weight may leave silently."""

    class Vandal(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model.get_parameter("bert.encoder.layer.0.attention.self.query.weight").fill_(1.0)

    with pytest.raises(RuntimeError, match=r"groups break the pattern 2:4(?s:.)*layer.0.attention.self.query"):
        train(tiny_bert(), token_data(), tmp_path, callbacks=[Vandal()])


def test_a_stop_in_the_middle_of_a_step_leaves_a_sparse_model(tiny_bert, token_data, tmp_path):
    """The loop breaks between on_step_begin and on_pre_optimizer_step: the weights are masked at that moment."""

    class Stopper(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 8:
                control.should_training_stop = True

    trainer = train(tiny_bert(), token_data(), tmp_path, callbacks=[Stopper()], gradient_accumulation_steps=2)
    assert trainer.state.global_step == 8 and trainer.audit.ok and not trainer.sparsity.masked


def test_stopping_in_phase_1_prunes_at_once(tiny_bert, token_data, tmp_path):
    assert train(tiny_bert(), token_data(), tmp_path, admm_steps=STEPS, mask_freeze_steps=0).audit.ok


def test_bad_set_ups_are_refused_before_training(tiny_bert, token_data, tmp_path):
    data = token_data()
    with pytest.raises(ValueError, match="TrainingArguments, which have no sparsity flags.*ADMMTrainingArguments"):
        ADMMTrainer(tiny_bert(), TrainingArguments(str(tmp_path)), train_dataset=data)
    args = ADMMTrainingArguments(str(tmp_path), num_train_epochs=1, admm_steps=1000, report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="admm_steps=1000 is beyond the run, which has 4 optimizer steps"):
        ADMMTrainer(tiny_bert(), args, train_dataset=data).train()
    frozen = tiny_bert().requires_grad_(False)
    with pytest.raises(ValueError, match="No layer of BertForSequenceClassification matched.*12 frozen"):
        ADMMTrainer(frozen, ADMMTrainingArguments(str(tmp_path), report_to="none", use_cpu=True), train_dataset=data)
