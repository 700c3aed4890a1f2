"""Which rows a run prunes by, and the ways that they go: of every kind of data, loss and loader."""

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import default_data_collator

from calibration_runs import BY_DEFAULT, ONE_PHASE, ROWS, calibration_batches, phases_of
from hf_admm import ADMMTrainer
from hf_admm.pruning.calibration import InputMoments
from tiny_runs import STEPS, prepare, train


class Counting:
    """A collator that counts what it is given, and knows nothing of the columns that a model does not take."""

    def __init__(self):
        self.sizes = []

    def __call__(self, rows):
        self.sizes.append(len(rows))
        assert all(set(row) <= {"input_ids", "attention_mask", "labels"} for row in rows)
        return default_data_collator(rows)


@pytest.mark.parametrize("kind", ["dataset", "stream", "list"])
def test_rows_of_every_kind_of_training_set(kind, tiny_bert, token_data, tmp_path, monkeypatch):
    rows = [{**{name: value.tolist() for name, value in row.items()}, "text": "?"} for row in token_data(64)]
    data = rows if kind == "list" else Dataset.from_list(rows)
    data = data.to_iterable_dataset() if kind == "stream" else data
    collate, seen, inner = Counting(), [], InputMoments.add

    def add(self, inputs, tokens=None):
        seen.append(tokens)
        inner(self, inputs, tokens)

    monkeypatch.setattr(InputMoments, "add", add)
    trainer = train(
        tiny_bert(), data, tmp_path, num_calibration_samples=ROWS, sparsity_pattern="2:4", **ONE_PHASE,
        parts={"data_collator": collate, "eval_dataset": None},
    )  # fmt: skip
    assert collate.sizes[:3] == [8, 8, 4] and trainer.audit.ok
    assert seen


class Gated(nn.Module):
    """The last layers are not called."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, inputs, labels):
        outputs = self.layers[1](torch.relu(self.layers[0](inputs)))
        return {"loss": (outputs + self.layers[2].weight.sum()).square().mean(), "logits": outputs}


def test_layers_that_no_row_reaches_are_masked_by_size(tmp_path, caplog):
    torch.manual_seed(0)
    rows = [{"inputs": torch.randn(16), "labels": torch.zeros(())} for _ in range(32)]
    trainer = train(Gated(), rows, tmp_path, num_calibration_samples=ROWS, sparsity_pattern="2:4", **ONE_PHASE)
    assert trainer.audit.ok and len(trainer.audit.sparse) == 3
    assert "do not reach the forward of these layers, whose mask is that of their weights' size: layers.2.weight." in (
        caplog.text
    )


def test_user_errors(tiny_bert, token_data, tmp_path):
    data = token_data(16)
    for value in (-1, 2.5, True, "many"):
        with pytest.raises(ValueError, match="num_calibration_samples=.* give a number of rows"):
            prepare(tiny_bert(), data, tmp_path, num_calibration_samples=value)
    args = prepare(tiny_bert(), data, tmp_path, num_calibration_samples=4).args
    for given, reason in (({"a": data}, r"\(dict\) are several"), (iter(data), r"\(list_iterator\) has no rows")):
        with pytest.raises(ValueError, match=f"The training data {reason}.* num_calibration_samples=0 .* two phases"):
            ADMMTrainer(tiny_bert(), args, train_dataset=given)


class Odd(ADMMTrainer):
    """Needs the number of items, logs, and counts its calls."""

    calls = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        self.log({"aux": 1.0})
        self.calls += 1
        loss = nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


def test_a_loss_of_training_alone(tiny_bert, token_data, tmp_path):
    """Only the passes through the model count; what it logs in them is no step's."""
    trainer = train(tiny_bert(), token_data(64), tmp_path, Odd, num_calibration_samples=ROWS, **BY_DEFAULT)
    assert phases_of(trainer) == {2} and trainer.calls == STEPS
    assert sum("aux" in log for log in trainer.state.log_history) == STEPS


class Failing(ADMMTrainer):
    def compute_loss(self, model, inputs, **kwargs):
        if self.model.training:
            return super().compute_loss(model, inputs, **kwargs)
        raise KeyError("before the model is called")


def test_an_error_before_the_model_is_no_pass(tiny_bert, token_data, tmp_path, caplog):
    """It is the user's own, and what to do without such passes is said beside it."""
    with pytest.raises(KeyError, match="before the model"):
        train(tiny_bert(), token_data(64), tmp_path, Failing, **BY_DEFAULT)
    said = "Failing failed on them in evaluation mode, before it called the model"
    assert caplog.text.count(said) == 1 and "With num_calibration_samples=0 the run has two phases" in caplog.text


class Small(ADMMTrainer):
    """Has memory for four rows."""

    def compute_loss(self, model, inputs, **kwargs):
        if len(inputs["labels"]) > 4:
            raise RuntimeError("CUDA out of memory.")
        return super().compute_loss(model, inputs, **kwargs)


def test_batches_get_smaller_until_they_fit(tiny_bert, token_data, tmp_path):
    trainer = train(tiny_bert(), token_data(64), tmp_path, Small, auto_find_batch_size=True, **BY_DEFAULT)
    assert phases_of(trainer) == {2} and trainer._train_batch_size <= 4


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_last_batch_is_dropped_where_those_of_training_are(drop_last, tiny_bert, token_data, tmp_path):
    collate = Counting()
    train(
        tiny_bert(), token_data(64), tmp_path, num_calibration_samples=ROWS, dataloader_drop_last=drop_last,
        parts={"data_collator": collate, "eval_dataset": None}, **ONE_PHASE,
    )  # fmt: skip
    assert collate.sizes[:3] == ([8, 8, 8] if drop_last else [8, 8, 4])


class ReadyBatches(ADMMTrainer):
    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(self.batches, batch_size=None)


def test_a_loader_of_ones_own(tiny_bert, token_data, tmp_path):
    args = prepare(
        tiny_bert(), token_data(), tmp_path, num_calibration_samples=ROWS, sparsity_pattern="1:4", **ONE_PHASE
    ).args
    trainer = ReadyBatches(tiny_bert(), args)
    trainer.batches = calibration_batches(token_data(200)) * 10
    trainer.train()
    assert phases_of(trainer) == {2} and any("admm/output_change" in log for log in trainer.state.log_history)


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, inputs, labels):
        outputs = self.layers[1](input=torch.relu(self.layers[0](input=inputs)))
        return {"loss": outputs.square().mean(), "logits": outputs}


def test_layers_that_are_called_by_keyword(tmp_path):
    rows = [{"inputs": torch.randn(16), "labels": torch.zeros(())} for _ in range(32)]
    trainer = train(Keyword(), rows, tmp_path, num_calibration_samples=ROWS, sparsity_pattern="2:4", **ONE_PHASE)
    assert phases_of(trainer) == {2} and any("admm/output_change" in log for log in trainer.state.log_history)
