"""Half precision, skipped steps, and losses that are not finite."""

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_admm import ADMMTrainer, ADMMTrainingArguments, audit_checkpoint
from tiny_runs import SETTINGS, STEPS, Recorder, train, weights


PENALTIES = ["loss", "gradient", "decoupled"]


# ---- A loss that is not finite ----


class Spoilt(ADMMTrainer):
    """Its loss is `bad` at one step, from the model's own arithmetic on."""

    bad, step = float("nan"), 0

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * self.bad if self.state.global_step == self.step and self.model.training else loss


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [0, 4, 9])
def test_gradients_that_are_not_finite_stop_the_run(bad, step, tiny_bert, token_data, tmp_path):
    """In both phases: with a message that names the last checkpoint, which is whole, and the weights still finite."""
    model, data = tiny_bert(), token_data()
    args = ADMMTrainingArguments(str(tmp_path), **{**SETTINGS, "save_steps": 2, "gradient_accumulation_steps": 2})
    trainer = Spoilt(model, args, train_dataset=data)
    trainer.bad, trainer.step = bad, step
    last = f"checkpoint-{step - step % 2}" if step else "none, nothing was saved yet"
    with pytest.raises(
        FloatingPointError,
        match=f"The norm of the gradients of step {step + 1} is (nan|inf).*{last}.*Resume from there",
    ):
        trainer.train()
    assert all(weight.isfinite().all() for weight in model.parameters())
    if step:
        assert audit_checkpoint(get_last_checkpoint(tmp_path)).ok
        resumed = ADMMTrainer(tiny_bert(seed=1), args, train_dataset=data)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.audit.ok and resumed.state.global_step == STEPS


class Huge(ADMMTrainer):
    """Its gradients are finite at one step, and the sum of their squares is not."""

    step = 0

    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        if self.state.global_step == self.step:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(3e19)
        return loss


@pytest.mark.parametrize("step", [3, 9])
def test_a_norm_that_overflows_does_not_stop_the_run(step, tiny_bert, token_data, tmp_path):
    """Clipping makes zeros of such gradients, in plain `Trainer` too; without it, they are NaN."""
    Huge.step = step
    trainer = train(tiny_bert(), token_data(), tmp_path, Huge)
    assert trainer.state.log_history[step]["grad_norm"] == float("inf")
    assert trainer.audit.ok and all(weight.isfinite().all() for weight in trainer.model.parameters())
    with pytest.raises(FloatingPointError, match=f"The norm of the gradients of step {step + 1} is inf"):
        train(tiny_bert(), token_data(), tmp_path, Huge, max_grad_norm=0.0)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_batch_without_a_label_changes_nothing(penalty, tiny_gpt2, token_data, tmp_path):
    """Its mean loss is NaN and its gradient zero, as in plain Trainer: truncated prompts are common."""
    data = token_data(32, labels=None)
    for row in data:
        row["labels"] = torch.full_like(row["labels"], -100)
    trainer = train(tiny_gpt2(), data, tmp_path, admm_penalty=penalty)
    assert trainer.audit.ok and all(weight.isfinite().all() for weight in trainer.model.parameters())


# ---- bfloat16 ----


@pytest.mark.parametrize("penalty", PENALTIES)
def test_bfloat16_weights_have_a_float32_state(penalty, tiny_bert, token_data, tmp_path):
    """Pure bfloat16: the model is sparse, the anchors are float32, and a resume gives the same bits."""
    data, seen = token_data(), []
    anchors = Recorder("on_step_end", lambda state, **kwargs: None)

    def run(seed, **flags):
        model = tiny_bert(seed).to(torch.bfloat16)
        trainer = ADMMTrainer(
            model,
            ADMMTrainingArguments(str(tmp_path), **{**SETTINGS, "save_steps": 3, "admm_penalty": penalty}),
            train_dataset=data,
            callbacks=[anchors],
        )
        anchors.seen.clear()
        anchors.on_step_begin = lambda args, state, control, **kwargs: seen.append(
            {tensor.dtype for tensor in trainer.sparsity.phase.companions.values()}
            if trainer.sparsity.phase.name == "admm"
            else None
        )
        trainer.train(**flags)
        assert trainer.audit.ok and {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        return weights(model)

    straight = run(0)
    assert seen.count({torch.float32}) == SETTINGS["admm_steps"]
    for step in (3, 9):
        assert audit_checkpoint(tmp_path / f"checkpoint-{step}").ok
        resumed = run(1, resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert all(torch.equal(straight[name], weight) for name, weight in resumed.items())


def test_a_bfloat16_state_is_half_as_large_and_resumes_to_the_same_bits(tiny_bert, token_data, tmp_path):
    data, held = token_data(), {}

    def run(seed, **flags):
        settings = {**SETTINGS, "save_steps": 3, "admm_state_dtype": "bfloat16"}
        trainer = ADMMTrainer(tiny_bert(seed), ADMMTrainingArguments(str(tmp_path), **settings), train_dataset=data)
        trainer.add_callback(
            Recorder("on_step_end", lambda state, **kwargs: held.update({state.global_step: state_bytes(trainer)}))
        )
        trainer.train(**flags)
        assert trainer.audit.ok
        return weights(trainer.model)

    straight = run(0)
    pruned = 4096 * 4  # bytes of the pruned weights
    assert held[1] == pruned // 2 and held[SETTINGS["admm_steps"] + 1] == pruned + pruned // 32
    for step in (3, 9):
        resumed = run(1, resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert all(torch.equal(straight[name], weight) for name, weight in resumed.items())


def test_without_a_gpu_there_is_nothing_to_offload(tiny_bert, token_data, tmp_path):
    data = token_data()
    runs = [
        weights(train(tiny_bert(), data, tmp_path / str(offload), admm_state_offload=offload).model)
        for offload in (False, True)
    ]
    assert all(torch.equal(runs[0][name], weight) for name, weight in runs[1].items())


def state_bytes(trainer) -> int:
    phase = trainer.sparsity.phase
    held = [*phase.companions.values(), *getattr(phase, "rooms", {}).values()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())


def test_bfloat16_autocast_keeps_float32_weights(tiny_bert, token_data, tmp_path):
    trainer = train(tiny_bert(), token_data(), tmp_path, bf16=True)
    assert trainer.audit.ok and {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert any(log.get("admm/phase") == 2 for log in trainer.state.log_history)


# ---- float16: the scale of the loss, and steps that are skipped ----


class Scaled(ADMMTrainer):
    """Scales its loss as fp16 does on a GPU (accelerate refuses fp16 without one); some gradients overflow."""

    overflows = ()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        type(self.accelerator).mixed_precision = property(lambda accelerator: "fp16")

        class Amp(TrainerCallback):
            def on_train_begin(_, args, state, control, **kwargs):
                self.accelerator.native_amp = True

        self.add_callback(Amp())

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.state.global_step in self.overflows:
            self.model.classifier.weight.grad[0, 0] = float("inf")
        return loss


@pytest.fixture
def scaled(monkeypatch):
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "mixed_precision", Accelerator.mixed_precision)  # put back afterwards
    return Scaled


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_scaled_loss_changes_nothing(penalty, scaled, tiny_bert, token_data, tmp_path):
    """The scale is a power of two: with the penalty scaled alike, the same bits come out."""
    data = token_data()
    plain = train(tiny_bert(), data, tmp_path, admm_penalty=penalty)
    trainer = train(tiny_bert(), data, tmp_path, admm_penalty=penalty, trainer_class=scaled)
    assert trainer.accelerator.scaler.get_scale() == 1024.0
    for name, weight in weights(plain.model).items():
        assert torch.equal(weight, trainer.model.get_parameter(name)), name


def test_an_overflow_that_no_scale_mends_stops_the_run(scaled, tiny_bert, token_data, tmp_path):
    """From a scale of 1024, eleven steps in a row: halved below 1, the scale is not what makes them overflow."""
    cls = type("Overflowing", (scaled,), {"overflows": range(STEPS)})
    with pytest.raises(FloatingPointError, match="The norm of the gradients of step 12 is (inf|nan)"):
        train(tiny_bert(), token_data(), tmp_path, cls)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_skipped_step_moves_no_weight(penalty, optim, scaled, tiny_bert, token_data, tmp_path):
    """Overflows in both phases, on a step that also updates Z and U, and on the switch."""
    overflows = (1, 2, 6, 8)
    before = Recorder("on_step_begin", lambda state, model, **kwargs: weights(model))
    after = Recorder("on_step_end", lambda state, model, **kwargs: weights(model))
    dense = Recorder("on_pre_optimizer_step", lambda state, model, **kwargs: weights(model))
    cls = type("Overflowing", (scaled,), {"overflows": overflows})
    trainer = train(
        tiny_bert(), token_data(), tmp_path, cls, [before, after, dense], admm_penalty=penalty, optim=optim
    )  # fmt: skip
    assert trainer.accelerator.scaler.get_scale() == 1024.0 / 2 ** len(overflows)
    for step in range(STEPS):
        moved = {name for name, weight in dense.seen[step].items() if not torch.equal(weight, after.seen[step][name])}
        assert bool(moved) == (step not in overflows), (step, moved)
    assert trainer.audit.ok and all(weight.isfinite().all() for weight in trainer.model.parameters())
