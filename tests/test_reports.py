"""Where a run is reported: the hub, its model card, TensorBoard."""

import json
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers.trainer
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer

from cards import valid_card
from hf_admm import ADMMTrainerMixin, audit_checkpoint
from tiny_runs import train


class FakeHub:
    """Stands for the hub's client, and keeps what is sent to it."""

    def __init__(self, folder):
        self.folder, self.pushes = folder, []

    def create_repo(self, repo_id, **kwargs):
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(self, folder_path, path_in_repo="", ignore_patterns=None, run_as_future=False, **kwargs):
        paths = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        copies = self.folder / f"push-{len(self.pushes)}"
        for path in filter_repo_objects(paths, ignore_patterns=ignore_patterns):
            (copies / path).parent.mkdir(parents=True, exist_ok=True)
            (copies / path).write_bytes((Path(folder_path) / path).read_bytes())
        self.pushes.append((path_in_repo, copies))
        future = Future()
        future.set_result("commit")
        return future if run_as_future else "commit"


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint"])
def test_every_push_to_the_hub_is_a_sparse_model(strategy, tiny_bert, token_data, tmp_path, monkeypatch):
    hub = FakeHub(tmp_path)
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub, raising=False)
    for name in ("create_repo", "upload_folder"):  # what earlier versions of transformers call
        monkeypatch.setattr(transformers.trainer, name, getattr(hub, name), raising=False)
    trainer = train(
        tiny_bert(), token_data(), tmp_path / "run", push_to_hub=True, hub_strategy=strategy, save_strategy="steps",
        save_steps=4, hub_always_push=True,
    )  # fmt: skip
    assert len(hub.pushes) == {"end": 0, "every_save": 3, "checkpoint": 6}[strategy]
    trainer.push_to_hub(tags="mine")
    plain = {"config.json", "model.safetensors", "training_args.bin", "hf_admm.json"}
    for place, folder in hub.pushes:
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert plain <= files and not any(name.startswith("checkpoint") for name in files)
        assert ("admm_state.safetensors" in files) == (place == "last-checkpoint" and "optimizer.pt" in files)
        assert audit_checkpoint(folder).ok
        assert json.loads((folder / "hf_admm.json").read_text())["pattern"] == "2:4"
    card = valid_card(hub.pushes[-1][1] / "README.md")
    assert {"mine", "hf-admm", "sparsity", "2:4", "generated_from_trainer"} <= set(card.data.tags)
    assert "| verification | OK: every group of every sparse weight (12 of them) obeys 2:4. |" in card.text
    assert 'BertForSequenceClassification.from_pretrained("me/run")' in card.text


def test_the_card_of_a_trainer_with_other_arguments(tiny_bert, token_data, tmp_path):
    """TRL's trainers take the name of a data set in the second place, and make a card at each checkpoint."""
    cards = []

    class Other(Trainer):
        def create_model_card(self, model_name=None, dataset_name=None, tags=None):
            cards.append((model_name, dataset_name, tags))
            (Path(self.args.output_dir) / "README.md").write_text("---\ntags: [one]\n---\n# Card\n")

        def _save_checkpoint(self, model, trial):
            self.create_model_card(model_name="mine")
            super()._save_checkpoint(model, trial)

    sparse = type("Sparse", (ADMMTrainerMixin, Other), {})
    tags = {}
    for pattern in ("2:4", "none"):
        train(
            tiny_bert(), token_data(), tmp_path, sparse, sparsity_pattern=pattern, save_strategy="steps", save_steps=12
        )
        card = valid_card(tmp_path / "README.md")
        assert "# Card" in card.text
        tags[pattern] = card.data.tags
    assert cards == [("mine", None, None)] * 2
    assert tags == {"2:4": ["one", "hf-admm", "sparsity", "2:4"], "none": ["one"]}


def test_the_card_of_a_dense_run_is_that_of_trainer(tiny_bert, token_data, tmp_path):
    train(tiny_bert(), token_data(), tmp_path, sparsity_pattern="none").create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert "2:4" not in card.data.tags and "Sparsity" not in card.text


def test_tensorboard_gets_every_figure(tiny_bert, token_data, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = train(tiny_bert(), token_data(), tmp_path, report_to="tensorboard", eval_strategy="steps", eval_steps=6)
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    names = ("primal_residual", "dual_residual", "mask_flips", "penalty", "phase", "rho", "sparsity")
    for name in ["loss", *(f"admm/{name}" for name in names)]:
        expected = {log["step"]: pytest.approx(log[name], rel=1e-6) for log in logs if name in log}
        assert {event.step: event.value for event in events.Scalars(f"train/{name}")} == expected and expected
    assert {"eval/loss"} <= set(events.Tags()["scalars"])
    assert not [tag for tag in events.Tags()["scalars"] if tag.startswith("eval/admm")]
