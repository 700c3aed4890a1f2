"""Training in both phases: the penalty counts once, evaluation is sparse, `none` is plain Trainer."""

import copy

import pytest
import torch
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback, TrainingArguments

from hf_admm import ADMMTrainer, ADMMTrainerMixin, ADMMTrainingArguments
from hf_admm.patterns import parse_pattern
from hf_admm.projections import broken_groups, project, sparsity_mask


STEPS = 12
NO_DROPOUT = {
    "tiny_bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "tiny_gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


def train(model, data, folder, trainer_class=ADMMTrainer, callbacks=None, **flags):
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "admm_steps": 6,
        "admm_update_steps": 2,
        "admm_rho": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **flags,
    }
    args = ADMMTrainingArguments(output_dir=str(folder), **settings)
    trainer = trainer_class(model=model, args=args, train_dataset=data, eval_dataset=data[:16], callbacks=callbacks)
    trainer.train()
    return trainer


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


class Recorder(TrainerCallback):
    """Copies of what a run looks like from the inside, taken at one event."""

    def __init__(self, event, take):
        self.seen = []
        setattr(self, event, lambda args, state, control, **kwargs: self.seen.append(take(state, **kwargs)))


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


def oracle_gradients(model, batch, anchors, rho):
    """The gradient of the augmented Lagrangian by autograd, for comparison with the closed form."""
    loss = model(**batch).loss
    for name, anchor in anchors.items():
        loss = loss + rho / 2 * (model.get_parameter(name) - anchor).square().sum()
    loss.backward()
    return gradients(model)


@pytest.mark.parametrize("penalty", ["loss", "gradient"])
def test_the_penalty_is_the_gradient_of_the_augmented_lagrangian(penalty, tiny_bert, token_data, tmp_path):
    """One step on one batch, without clipping, so that both placements must equal autograd's gradient."""
    data, model, rho = token_data(8), tiny_bert(**NO_DROPOUT["tiny_bert"]), 0.5
    reference = copy.deepcopy(model)
    take = Recorder("on_optimizer_step", lambda state, model=None, **_: gradients(model))
    trainer = train(
        model, data, tmp_path, callbacks=[take], max_steps=1, admm_steps=1, admm_rho=rho, admm_penalty=penalty,
        max_grad_norm=0.0, mask_freeze_steps=0,
    )  # fmt: skip
    pattern = trainer.args.pattern
    anchors = {name: project(reference.get_parameter(name), pattern) for name in trainer.sparsity.targets}
    batch = {key: torch.stack([torch.as_tensor(row[key]) for row in data]) for key in data[0]}
    expected = oracle_gradients(reference, batch, anchors, rho)
    for name, gradient in take.seen[0].items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    name = next(iter(anchors))  # the penalty is there: a gradient without it would be another one
    assert not torch.allclose(
        take.seen[0][name], expected[name] - rho * (reference.get_parameter(name) - anchors[name])
    )


@pytest.mark.parametrize("penalty", ["loss", "gradient", "decoupled"])
@pytest.mark.parametrize("make", ["tiny_bert", "tiny_gpt2"])
def test_the_penalty_counts_once_per_step_under_accumulation(make, penalty, token_data, tmp_path, request):
    """20 rows, 8 a step: every epoch ends in a short window, where a penalty per micro-batch would change its factor.

    SGD, since Adam would hide a factor in its normalisation.
    """
    model = request.getfixturevalue(make)(**NO_DROPOUT[make])
    data, runs = token_data(20, labels=2 if make == "tiny_bert" else None), []
    for batch, accumulation in ((8, 1), (4, 2), (2, 4)):
        take = Recorder("on_step_end", lambda state, model=None, **_: weights(model))
        train(
            copy.deepcopy(model), data, tmp_path / str(batch), callbacks=[take], admm_penalty=penalty, admm_rho=2.0,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, optim="sgd",
            learning_rate=0.05,
        )  # fmt: skip
        runs.append(take.seen)
    for other in runs[1:]:
        assert len(other) == STEPS
        for step, (one, many) in enumerate(zip(runs[0], other, strict=True)):
            for name in one:
                torch.testing.assert_close(one[name], many[name], rtol=1e-4, atol=2e-6, msg=f"{name} at step {step}")


def test_the_logged_loss_is_the_task_loss(tiny_bert, token_data, tmp_path):
    """A huge penalty must not reach the logged loss, and accumulation must not multiply a plain mean."""
    trainer = train(
        tiny_bert(), token_data(), tmp_path, admm_rho=1e3, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == STEPS
    assert all(0.3 < log["loss"] < 1.5 for log in logs)
    first, last = logs[2], logs[-1]
    assert first["admm/penalty"] > 10 and first["admm/rho"] == 1e3 and first["admm/phase"] == 1
    assert 0 < first["admm/primal_residual"] < 2 and first["admm/dual_residual"] >= 0
    assert 0 <= first["admm/mask_flips"] <= 1 and first["admm/sparsity"] == 0.5
    assert last["admm/phase"] == 2 and last["admm/sparsity"] == 0.5
    evaluation = trainer.evaluate()
    assert 0.3 < evaluation["eval_loss"] < 1.5 and not any(key.startswith("admm/") for key in evaluation)


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


def test_phase_1_follows_admm_step_by_step(tiny_bert, token_data, tmp_path):
    """Z and U, kept apart as in the textbook, give the anchors of the run at every update."""
    take = Recorder("on_step_end", lambda state, model=None, **_: (state.global_step, weights(model)))
    anchors = {}

    class Spy(ADMMTrainer):
        def training_step(self, *args, **kwargs):
            if self.sparsity.phase == "admm":
                anchors[self.state.global_step] = {n: a.clone() for n, a in self.sparsity.anchors.items()}
            return super().training_step(*args, **kwargs)

    model = tiny_bert()
    start = weights(model)
    trainer = train(model, token_data(), tmp_path, Spy, callbacks=[take])
    by_step = {0: start, **dict(take.seen)}
    name = next(iter(trainer.sparsity.targets))
    z = project(start[name], trainer.args.pattern)
    u = torch.zeros_like(z)
    assert sorted(anchors) == list(range(6))
    for step in range(6):
        if step and step % 2 == 0:
            v = by_step[step][name] + u
            z = v * sparsity_mask(v, trainer.args.pattern)
            u = v - z
        torch.testing.assert_close(anchors[step][name], z - u, rtol=1e-5, atol=1e-7)


def test_phase_2_is_the_straight_through_estimator(tiny_bert, token_data, tmp_path):
    """SGD by hand on a copy, with the mask as a function of the dense weight in an autograd graph."""
    data, model = token_data(8), tiny_bert(**NO_DROPOUT["tiny_bert"])
    reference, rate, decay = copy.deepcopy(model), 0.1, 0.3
    trainer = train(
        model, data, tmp_path, max_steps=3, admm_steps=0, srste_decay=decay, mask_freeze_steps=0, optim="sgd",
        learning_rate=rate, lr_scheduler_type="constant", max_grad_norm=0.0,
    )  # fmt: skip
    batch = {key: torch.stack([torch.as_tensor(row[key]) for row in data]) for key in data[0]}
    pattern, targets = trainer.args.pattern, trainer.sparsity.targets
    dense = weights(reference)
    for _ in range(3):
        masks = {name: sparsity_mask(dense[name], pattern) for name in targets}
        values = {n: w * masks[n] if n in masks else w for n, w in dense.items()}
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        torch.func.functional_call(reference, leaves, kwargs=batch).loss.backward()
        for name, weight in dense.items():
            gradient = leaves[name].grad
            if name in masks:
                gradient = gradient + decay * ~masks[name] * weight
            weight -= rate * gradient
    for name, weight in dense.items():
        expected = weight * masks[name] if name in masks else weight
        torch.testing.assert_close(model.get_parameter(name), expected, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("flags", [{"srste_mask": "fixed"}, {"mask_freeze_steps": 6}])
def test_a_frozen_mask_stays(flags, tiny_bert, token_data, tmp_path):
    masks = []

    class Spy(ADMMTrainer):
        def training_step(self, *args, **kwargs):
            masks.append({name: mask.clone() for name, mask in self.sparsity.masks.items()})
            return super().training_step(*args, **kwargs)

    trainer = train(tiny_bert(), token_data(), tmp_path, Spy, learning_rate=0.05, **flags)
    frozen = masks[6:]
    for name, weight in trainer.sparsity.weights.items():
        assert all(torch.equal(mask[name], frozen[0][name]) for mask in frozen)
        assert torch.equal((weight != 0) & ~frozen[0][name], torch.zeros_like(frozen[0][name]))


def test_a_dynamic_mask_follows_every_few_steps(tiny_bert, token_data, tmp_path):
    masks = []

    class Spy(ADMMTrainer):
        def training_step(self, *args, **kwargs):
            masks.append({name: mask.clone() for name, mask in self.sparsity.masks.items()})
            return super().training_step(*args, **kwargs)

    train(tiny_bert(), token_data(), tmp_path, Spy, learning_rate=0.05, admm_steps=0, mask_update_steps=3,
          mask_freeze_steps=4)  # fmt: skip
    moved = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in zip(masks[:-1], masks[1:], strict=True)]
    assert [step + 1 for step, flag in enumerate(moved) if flag] == [3, 6]  # 9 and later are frozen: 12 - 4 = 8


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup"])
def test_the_learning_rate_has_a_segment_for_each_phase(kind, tiny_bert, token_data, tmp_path):
    take = Recorder("on_step_begin", lambda state, optimizer=None, **_: optimizer.param_groups[0]["lr"])
    train(
        tiny_bert(), token_data(), tmp_path, callbacks=[take], max_steps=20, admm_steps=0.6, lr_scheduler_type=kind,
        warmup_steps=2,
    )  # fmt: skip
    rates = take.seen
    assert rates[0] == 0.0 and rates[2] == 1e-3  # warm-up belongs to the first segment
    assert rates[12] == 1e-3  # phase 2 starts again from the peak
    if kind != "constant_with_warmup":
        assert rates[11] < 2e-4 and rates[19] < 3e-4 and rates[13] < rates[12]


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
