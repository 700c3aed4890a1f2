"""The penalty enters once per optimizer step, with the right gradient, and not into the logged loss."""

import copy

import pytest
import torch

from hf_admm.sparsity.projections import project
from tiny_models import NO_DROPOUT
from tiny_runs import STEPS, Recorder, gradients, train, weights


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
