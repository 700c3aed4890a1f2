"""The phase and its figures beside the progress bar, whoever draws it."""

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from hf_admm.callbacks import PhaseProgressCallback
from tiny_runs import Recorder, prepare


def run(model, data, folder, progress, **flags):
    """What stands beside the bar after each step."""
    seen = Recorder("on_step_end", lambda state, **_: getattr(progress.training_bar, "postfix", None))
    trainer = prepare(model, data, folder, **{"logging_steps": 3, **flags})
    trainer.add_callback(progress)
    trainer.add_callback(seen)
    trainer.train()
    return trainer, seen.seen


def test_the_bar_shows_the_phase_at_once_and_figures_when_they_are_logged(tiny_bert, token_data, tmp_path):
    progress = ProgressCallback()
    trainer, seen = run(tiny_bert(), token_data(), tmp_path, progress, admm_rho=None)
    logs = {log["step"]: log for log in trainer.state.log_history if "loss" in log}
    assert seen[:3] == ["phase 1/2"] * 3
    figures = f"residual {logs[3]['admm/primal_residual']:.2g}, flips {logs[3]['admm/mask_flips']:.2g}"
    assert seen[3:6] == [f"phase 1/2, {figures}"] * 3
    assert seen[6:9] == ["phase 2/2"] * 3, "the figures of the phase before are gone"
    figures = f"residual {logs[9]['admm/switch_residual']:.2g}, flips {logs[9]['admm/mask_flips']:.2g}"
    assert seen[9:] == [f"phase 2/2, {figures}"] * 3


def test_a_resumed_run_shows_the_phase_that_it_is_in(tiny_bert, token_data, tmp_path):
    run(tiny_bert(), token_data(), tmp_path, ProgressCallback(), save_strategy="steps", save_steps=8)
    seen = Recorder("on_step_end", lambda state, **_: progress.training_bar.postfix)
    progress, trainer = ProgressCallback(), prepare(tiny_bert(), token_data(), tmp_path, logging_steps=3)
    trainer.add_callback(progress)
    trainer.add_callback(seen)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert seen.seen[0] == "phase 2/2"


class Notebook(TrainerCallback):
    """As that of notebooks: no `training_bar`."""

    training_tracker = object()
    training_bar = None


def test_whoever_draws_no_bar_of_tqdm_is_left_alone(tiny_bert, token_data, tmp_path):
    trainer, seen = run(tiny_bert(), token_data(), tmp_path, Notebook())
    assert seen == [None] * 12 and trainer.audit.ok


def test_a_dense_run_has_plain_words(tiny_bert, token_data, tmp_path):
    _, seen = run(tiny_bert(), token_data(), tmp_path, ProgressCallback(), sparsity_pattern="none")
    assert not any(seen)


def test_no_device_is_waited_for_for_the_sake_of_the_bar(tiny_bert, token_data, tmp_path, monkeypatch):
    """As many numbers are read from tensors with our callback as without it."""
    reads = {True: 0, False: 0}

    def counted(method):
        def call(self, *args):
            reads[shows] += 1
            return method(self, *args)

        return call

    for name in ("item", "tolist", "__float__", "__int__", "__bool__", "__format__"):
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
    for shows in reads:
        trainer = prepare(tiny_bert(), token_data(), tmp_path, logging_steps=4)
        trainer.add_callback(ProgressCallback())
        if not shows:
            trainer.remove_callback(PhaseProgressCallback)
        trainer.train()
    assert reads[True] == reads[False] > 0
