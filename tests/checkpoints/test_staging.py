"""Checkpoints appear whole or not at all: full disks, SIGTERM, leftovers of killed runs, and what stays of the old."""

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_admm import ADMMTrainer, ADMMTrainingArguments, audit_checkpoint
from hf_admm.checkpoints.staging import STAGING_NAME, checkpoint_name, clean_up, publish, rotate
from tiny_models import NO_DROPOUT
from tiny_runs import SETTINGS


def build(model, data, folder, **flags):
    args = ADMMTrainingArguments(str(folder), **{**SETTINGS, "save_steps": 3, **flags})
    return ADMMTrainer(model, args, train_dataset=data, eval_dataset=data[:16])


def names(folder):
    return sorted(entry.name for entry in Path(folder).iterdir())


def make(folder, content="new", age=0):
    folder.mkdir(parents=True)
    (folder / "file").write_text(content)
    os.utime(folder, ns=(10**18 - age, 10**18 - age))
    return folder


# ---- The folder operations ----


def test_a_published_checkpoint_replaces_one_of_its_name(tmp_path):
    final, staged = make(tmp_path / "checkpoint-3", "old"), make(tmp_path / STAGING_NAME / "checkpoint-3")
    publish(staged, final)
    assert (final / "file").read_text() == "new" and names(tmp_path) == ["checkpoint-3"]


def test_cleaning_up_brings_back_what_was_being_replaced(tmp_path):
    """Killed between the two renames of a replacement: the old checkpoint is all there is."""
    make(tmp_path / STAGING_NAME / "replaced-checkpoint-3", "old")
    make(tmp_path / STAGING_NAME / "checkpoint-3")
    make(tmp_path / "checkpoint-2")
    jit = tmp_path / "checkpoint-4"
    jit.mkdir()
    (jit / "checkpoint-is-incomplete.txt").touch()
    clean_up(tmp_path)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    assert (tmp_path / "checkpoint-3" / "file").read_text() == "old"


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [(None, 1, [1, 2, 3, 4]), (0, 1, [1, 2, 3, 4]), (9, 1, [1, 2, 3, 4]), (2, None, [3, 4]), (2, 1, [1, 4]),
     (1, 2, [2, 4]), (1, 4, [4]), (3, 1, [1, 3, 4])],
)  # fmt: skip
def test_the_oldest_checkpoints_go_and_the_best_stays(limit, best, left, tmp_path):
    folders = {step: make(tmp_path / checkpoint_name(step), age=10 - step) for step in (1, 2, 3, 4)}
    make(tmp_path / "checkpoint-of-mine")
    rotate(tmp_path, limit, [folders[4], *([folders[best]] if best else [])])
    assert names(tmp_path) == ["checkpoint-of-mine" if not step else f"checkpoint-{step}" for step in [*left, 0]]


def test_what_was_written_last_is_the_newest(tmp_path):
    """A run that starts again from an earlier checkpoint in the same folder."""
    for step, age in ((3, 1), (9, 5), (12, 4)):
        make(tmp_path / checkpoint_name(step), age=age)
    rotate(tmp_path, 2, [tmp_path / "checkpoint-3"])
    assert names(tmp_path) == ["checkpoint-12", "checkpoint-3"]


def test_a_checkpoint_that_is_a_link_gives_way(tmp_path):
    elsewhere = make(tmp_path / "elsewhere", "old")
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint-3").symlink_to(elsewhere)
    publish(make(run / STAGING_NAME / "checkpoint-3"), run / "checkpoint-3")
    assert names(run) == ["checkpoint-3"] and (run / "checkpoint-3" / "file").read_text() == "new"
    assert (elsewhere / "file").read_text() == "old"


# ---- In a run ----


def test_the_best_checkpoint_of_another_run_keeps_its_neighbours(tiny_bert, token_data, tmp_path):
    """Resumed from there into a folder of its own, where nothing is better."""
    data = token_data()
    flags = {
        "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True,
        "metric_for_best_model": "score",
    }  # fmt: skip

    def score(trainer, best):
        trainer.compute_metrics = lambda prediction: {"score": float(trainer.state.global_step == best)}
        return trainer

    score(build(tiny_bert(), data, tmp_path / "first", **flags), 2).train()
    before = names(tmp_path / "first")
    second = score(build(tiny_bert(), data, tmp_path / "second", **flags, save_total_limit=1), 2)
    second.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-4"))
    assert second.state.best_model_checkpoint == str(tmp_path / "first" / "checkpoint-2")
    assert names(tmp_path / "first") == before and len(before) == 6


def test_a_save_that_sigterm_began_and_a_kill_ended(tiny_bert, token_data, tmp_path, caplog):
    """Scripts ask for the last checkpoint before they build a trainer, and get a folder with nothing but a mark."""
    data = token_data()
    build(tiny_bert(), data, tmp_path, max_steps=4, admm_steps=2).train()
    mark = tmp_path / "checkpoint-5" / "checkpoint-is-incomplete.txt"
    mark.parent.mkdir()
    mark.touch()
    last = get_last_checkpoint(tmp_path)
    assert last == str(mark.parent)
    trainer = build(tiny_bert(), data, tmp_path)
    trainer.train(resume_from_checkpoint=last)
    assert "checkpoint-5 was never written. Resuming from" in caplog.text and trainer.state.global_step == 12


@pytest.mark.parametrize("kilobytes", [8, 40])
def test_a_full_disk_costs_one_checkpoint(kilobytes, tiny_bert, token_data, tmp_path, caplog):
    """The limit on the size of a file stands for it: too small for the model, then only for the optimizer."""
    resource = pytest.importorskip("resource")
    data = token_data()
    straight = build(tiny_bert(), data, tmp_path / "straight")
    straight.train()
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "straight" / "checkpoint-3").iterdir()}
    assert (sizes["model.safetensors"] > kilobytes * 1024) == (kilobytes == 8)
    assert sizes["optimizer.pt"] > kilobytes * 1024

    class FullDisk(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 8:
                resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, hard))

    trainer = build(tiny_bert(), data, tmp_path / "run")
    trainer.add_callback(FullDisk())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises((OSError, RuntimeError, SafetensorError)):  # whatever the writer of the file makes of it
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "checkpoint-9 could not be written" in caplog.text and "before it are complete" in caplog.text
    assert names(tmp_path / "run") == ["checkpoint-3", "checkpoint-6"]
    resumed = build(tiny_bert(seed=1), data, tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    for name, weight in straight.model.named_parameters():
        assert torch.equal(weight, resumed.model.get_parameter(name)), name


class Terminate(TrainerCallback):
    """Asks for a checkpoint at an event of a step, as the handler of SIGTERM does."""

    def __init__(self, event, step):
        setattr(self, event, lambda args, state, control, **kwargs: self.ask() if state.global_step == step else None)

    def ask(self):
        self.manager.is_checkpoint_requested = True


@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step", "on_step_end"])
@pytest.mark.parametrize("step", [3, 4, 6, 9])
def test_a_checkpoint_on_sigterm_resumes_exactly(event, step, tiny_bert, token_data, tmp_path):
    """`enable_jit_checkpoint` saves at any moment of a step, with weights that are masked or already unmasked."""
    data, build_model = token_data(), lambda seed=0: tiny_bert(seed, **NO_DROPOUT["tiny_bert"])
    straight = build(build_model(), data, tmp_path / "straight", save_strategy="no")
    straight.train()
    trainer = build(build_model(), data, tmp_path / "run", save_strategy="no", enable_jit_checkpoint=True)
    callback = Terminate(event, step)
    jit = next(
        entry for entry in trainer.callback_handler.callbacks if type(entry).__name__ == "JITCheckpointCallback"
    )
    callback.manager = jit.jit_manager
    trainer.callback_handler.callbacks.insert(0, callback)
    trainer.train()
    assert names(tmp_path / "run") == [f"checkpoint-{step}"]
    assert audit_checkpoint(tmp_path / "run" / f"checkpoint-{step}").ok
    assert trainer.audit.ok
    resumed = build(build_model(seed=1), data, tmp_path / "run", save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    for name, weight in straight.model.named_parameters():
        assert torch.equal(weight, resumed.model.get_parameter(name)), name


def test_sigterm_itself_leaves_a_checkpoint(tiny_bert, token_data, tmp_path):
    class Sender(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer = build(
        tiny_bert(), token_data(), tmp_path, save_strategy="no", enable_jit_checkpoint=True, max_steps=4000
    )
    jit = next(
        entry for entry in trainer.callback_handler.callbacks if type(entry).__name__ == "JITCheckpointCallback"
    )
    manager = jit.jit_manager
    manager.kill_wait = 0
    trainer.callback_handler.callbacks.insert(0, Sender())
    trainer.train()
    assert trainer.state.global_step < 4000
    assert audit_checkpoint(get_last_checkpoint(tmp_path)).ok
