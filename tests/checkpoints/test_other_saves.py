"""Saves that go another way than Trainer's: what they leave is sparse, has its sidecar, and says what is in it."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

from hf_admm import ADMMTrainer, ADMMTrainerMixin, audit_checkpoint
from hf_admm.checkpoints.files import RECORD_NAME, WEIGHTS_NAME
from hf_admm.checkpoints.sidecar import SIDECAR_NAME
from hf_admm.sparsity.projections import broken_groups
from tiny_models import NO_DROPOUT
from tiny_runs import assert_same_weights, prepare, train, weights


EVERY_4 = {"save_strategy": "steps", "save_steps": 4}


class Wrapper(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, **inputs):
        return self.inner(**inputs)


class SaveAtStep(TrainerCallback):
    def __init__(self, *steps):
        self.steps, self.save = steps, None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            self.save()


class InnerSave:
    """As Sentence Transformers and the many trainers that save a wrapped model."""

    where = ""

    def _save(self, output_dir=None, state_dict=None):
        folder = Path(output_dir or self.args.output_dir) / self.where
        folder.mkdir(parents=True, exist_ok=True)
        self.model.inner.save_pretrained(folder)


class BinSave:
    def _save(self, output_dir=None, state_dict=None):
        os.makedirs(output_dir, exist_ok=True)
        torch.save(self.model.state_dict(), os.path.join(output_dir, "pytorch_model.bin"))


class ModelSave:
    def save_model(self, output_dir=None, _internal_call=False):
        self.model.save_pretrained(output_dir or self.args.output_dir)


class OwnCheckpoint:
    """All that a resume needs, by its own hand, in a folder of its own name."""

    def _save_checkpoint(self, model, trial):
        folder = os.path.join(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}", "")[:-1]
        folder = folder.replace("checkpoint-", self.prefix)
        self.save_model(folder)
        torch.save(self.optimizer.state_dict(), os.path.join(folder, "optimizer.pt"))
        torch.save(self.lr_scheduler.state_dict(), os.path.join(folder, "scheduler.pt"))
        self._save_rng_state(folder)
        self.state.save_to_json(os.path.join(folder, "trainer_state.json"))

    prefix = "checkpoint-"


class OwnName(OwnCheckpoint):
    prefix = "step_"


class OwnOptimizer:
    def _save_optimizer_and_scheduler(self, output_dir):
        torch.save(self.optimizer.state_dict(), os.path.join(output_dir, "optimizer.pt"))
        torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))


def places(saves):
    """The overrides over the mixin, under it, and beside it in a class mixed in before."""
    return {
        "subclass": type(
            "Subclass", (ADMMTrainer,), {k: v for c in saves.__mro__[-2::-1] for k, v in vars(c).items()}
        ),
        "under": type("Under", (ADMMTrainerMixin, type("Base", (saves, Trainer), {})), {}),
        "mixed in": type("MixedIn", (saves, ADMMTrainer), {}),
    }


where = pytest.mark.parametrize("where", ["subclass", "under", "mixed in"])


def resume(trainer_class, model, data, folder, checkpoint):
    trainer = prepare(model, data, folder, trainer_class)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


@where
@pytest.mark.parametrize("saves", [ModelSave, OwnCheckpoint, OwnName, OwnOptimizer, BinSave])
def test_a_checkpoint_by_another_path_resumes_to_the_same_bits(saves, where, tiny_bert, token_data, tmp_path):
    cls, data = places(saves)[where], token_data()
    straight = train(tiny_bert(), data, tmp_path / "straight", cls, **EVERY_4)
    for step in (4, 8):
        checkpoint = tmp_path / "straight" / f"{getattr(saves, 'prefix', 'checkpoint-')}{step}"
        assert (checkpoint / SIDECAR_NAME).is_file()
        if saves is not BinSave:
            assert audit_checkpoint(checkpoint).ok
            assert len(json.loads((checkpoint / RECORD_NAME).read_text())["targets"]) == 12
        resumed = resume(cls, tiny_bert(seed=step), data, tmp_path / str(step), checkpoint)
        assert_same_weights(resumed.model, weights(straight.model))


@pytest.mark.parametrize("flags", [{}, {"save_only_model": True}])
def test_ray_goes_on_from_what_it_saves(flags, tiny_bert, token_data, tmp_path):
    saver = SaveAtStep(4, 8)
    data, model = token_data(), tiny_bert(**NO_DROPOUT["tiny_bert"])  # it saves no state of the random numbers
    trainer = prepare(copy.deepcopy(model), data, tmp_path / "straight", callbacks=[saver], **flags)
    saver.save = lambda: trainer._tune_save_checkpoint(checkpoint_dir=str(tmp_path / "ray"))
    trainer.train()
    for step in (4, 8):
        assert audit_checkpoint(tmp_path / "ray" / f"checkpoint-{step}").ok
        other = copy.deepcopy(model)
        resumed = resume(ADMMTrainer, other, data, tmp_path / str(step), tmp_path / "ray" / f"checkpoint-{step}")
        assert_same_weights(resumed.model, weights(trainer.model))


@where
def test_an_optional_record_that_cannot_be_written_is_a_warning(where, tiny_bert, token_data, tmp_path, caplog):
    trainer = train(tiny_bert(), token_data(), tmp_path, places(BinSave)[where], **EVERY_4)
    assert trainer.audit.ok
    assert "checkpoint-4 has no sparsity record for hf-admm verify: no model.safetensors was saved" in caplog.text
    state = torch.load(tmp_path / "checkpoint-4" / "pytorch_model.bin")
    for name in trainer.sparsity.targets:
        assert not broken_groups(state[name], trainer.args.pattern).any()


def test_no_disk_error_of_the_record_ends_a_run(tiny_bert, token_data, tmp_path, monkeypatch, caplog):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_admm.checkpoints.records._write", full)
    assert train(tiny_bert(), token_data(), tmp_path, **EVERY_4).audit.ok
    assert "record of checkpoint-4 could not be written (OSError: [Errno 28] No space left" in caplog.text


@where
@pytest.mark.parametrize("place", ["", "inner", "0_Transformer/deep"])
def test_the_record_of_an_inner_model_names_every_target(place, where, tiny_bert, token_data, tmp_path):
    cls = places(type("Save", (InnerSave,), {**vars(InnerSave), "where": place}))[where]
    trainer = train(Wrapper(tiny_bert()), token_data(), tmp_path, cls, remove_unused_columns=False, **EVERY_4)
    for step in (4, 8):
        folder = tmp_path / f"checkpoint-{step}" / place
        record = json.loads((folder / RECORD_NAME).read_text())["targets"]
        assert set(record) == {name.removeprefix("inner.") for name in trainer.sparsity.targets}
        assert audit_checkpoint(folder).ok
        assert list((tmp_path / f"checkpoint-{step}").rglob(RECORD_NAME)) == [folder / RECORD_NAME]
    tensors = load_file(folder / WEIGHTS_NAME)
    tensors[next(iter(record))].fill_(1.0)
    save_file(tensors, folder / WEIGHTS_NAME)
    assert not audit_checkpoint(folder).ok


def test_a_record_speaks_of_what_its_own_save_wrote(tiny_bert, token_data, tmp_path):
    """Not of the checkpoints within the folder, nor of a model that lay there before."""
    other = tmp_path / "other"
    tiny_bert(seed=3).save_pretrained(other)
    trainer = train(tiny_bert(), token_data(), tmp_path, **EVERY_4)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob(f"*/{RECORD_NAME}")}
    trainer.save_model()
    assert (tmp_path / RECORD_NAME).is_file() and not (other / RECORD_NAME).exists()
    assert len(stamps) == 3 and all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_the_values_decide_among_names_that_end_alike(tiny_bert, token_data, tmp_path):
    """Two towers, saved in two folders under the same names."""

    class Towers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.passage = tiny_bert(seed=1), tiny_bert(seed=2)

        def forward(self, **inputs):
            output = self.query(**inputs)
            output["loss"] = output["loss"] + self.passage(**inputs)["loss"]
            return output

    class TowerTrainer(ADMMTrainer):
        def _save(self, output_dir=None, state_dict=None):
            for name in ("passage", "query"):
                getattr(self.model, name).save_pretrained(os.path.join(output_dir, name))

    trainer = train(Towers(), token_data(), tmp_path, TowerTrainer, remove_unused_columns=False, **EVERY_4)
    for name in ("passage", "query"):
        record = json.loads((tmp_path / "checkpoint-8" / name / RECORD_NAME).read_text())["targets"]
        assert len(record) == len(trainer.sparsity.targets) // 2 == 12


@where
def test_a_direct_call_saves_sparse_weights(where, tiny_bert, token_data, tmp_path):
    saver = SaveAtStep(3, 9)
    trainer = prepare(tiny_bert(), token_data(), tmp_path, places(type("None_", (), {}))[where], callbacks=[saver])
    saver.save = lambda: trainer._save(str(tmp_path / f"at{trainer.state.global_step}"))
    trainer.train()
    straight = train(tiny_bert(), token_data(), tmp_path / "straight")
    assert_same_weights(trainer.model, weights(straight.model))
    for step in (3, 9):
        assert audit_checkpoint(tmp_path / f"at{step}").ok and not (tmp_path / f"at{step}" / SIDECAR_NAME).exists()


@where
def test_loaders_that_do_not_call_ours_end_with_the_best_model(where, tiny_bert, token_data, tmp_path):
    class Loads:
        def _load_best_model(self):
            self.model.load_state_dict(load_file(Path(self.state.best_model_checkpoint) / WEIGHTS_NAME))

        def _load_optimizer_and_scheduler(self, checkpoint):
            if checkpoint is not None:
                self.optimizer.load_state_dict(torch.load(Path(checkpoint) / "optimizer.pt"))
                self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt"))

    cls, no_dropout = places(Loads)[where], NO_DROPOUT["tiny_bert"]  # an evaluation draws a seed
    flags = {**EVERY_4, "eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True}
    flags |= {"metric_for_best_model": "loss", "greater_is_better": True}
    trainer = train(tiny_bert(**no_dropout), token_data(), tmp_path, cls, **flags)
    best = trainer.state.best_model_checkpoint
    assert_same_weights(trainer.model, weights(type(trainer.model).from_pretrained(best)))
    straight = train(tiny_bert(**no_dropout), token_data(), tmp_path / "straight")
    resumed = resume(
        cls, tiny_bert(seed=1, **no_dropout), token_data(), tmp_path / "resumed", tmp_path / "checkpoint-8"
    )
    assert_same_weights(resumed.model, weights(straight.model))


def test_a_dense_model_saved_over_a_sparse_one_has_no_record_of_it(tiny_bert, token_data, tmp_path):
    sparse = train(tiny_bert(), token_data(), tmp_path / "run")
    for place in ("over", "beside"):
        sparse.save_model(str(tmp_path / place))
    dense = prepare(tiny_bert(), token_data(), tmp_path / "run", sparsity_pattern="none")
    dense.save_model(str(tmp_path / "over"))
    assert not (tmp_path / "over" / RECORD_NAME).exists() and (tmp_path / "over" / WEIGHTS_NAME).is_file()
    sparse.save_model(str(tmp_path / "gone"))
    (tmp_path / "gone" / WEIGHTS_NAME).unlink()
    dense.save_model(str(tmp_path / "gone"))
    assert not (tmp_path / "gone" / RECORD_NAME).exists()
    assert audit_checkpoint(str(tmp_path / "beside")).ok
    (tmp_path / "beside" / "logs").mkdir()
    dense.save_model(str(tmp_path / "beside" / "logs"))
    assert audit_checkpoint(str(tmp_path / "beside")).ok, "what was not written over keeps its record"
