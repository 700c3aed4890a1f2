"""Passes outside of the training steps leave no hooks: transformers collects hidden states by such."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BertModel, BertPreTrainedModel, Trainer

from calibration_runs import BY_DEFAULT, DENSE_HALF
from hf_admm.training.traceless import as_it_was
from tiny_runs import prepare, train


class SecondToLast(BertPreTrainedModel):
    """Reads hidden states within its forward, as many heads do."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        found = self.bert(input_ids, attention_mask, output_hidden_states=True).hidden_states
        assert len(found) == self.config.num_hidden_layers + 1, f"{len(found)} hidden states"
        logits = self.classifier(found[-2].mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize(
    "flags",
    [
        BY_DEFAULT,
        DENSE_HALF,
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    ],
    ids=["pruned first", "dense half", "how its loss is scaled is measured"],
)
def test_a_model_that_reads_its_hidden_states_gets_them_once(flags, tiny_bert, token_data, tmp_path):
    trainer = train(tiny_bert(model_class=SecondToLast), token_data(64), tmp_path, **flags)
    trainer.save_model(str(tmp_path / "model"))
    saved = SecondToLast.from_pretrained(tmp_path / "model")
    reloaded = Trainer(saved, trainer.args, eval_dataset=trainer.eval_dataset)
    assert reloaded.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]


def test_hidden_states_that_the_config_asks_for_are_as_many_as_before(tiny_bert, token_data, tmp_path):
    data = token_data(64)
    trainer = prepare(tiny_bert(output_hidden_states=True), data, tmp_path, **BY_DEFAULT)
    trainer.train()
    assert len(trainer.model(data[0]["input_ids"][None]).hidden_states) == 3


def test_hooks_that_were_there_stay(tiny_bert):
    model, seen = tiny_bert(), []
    model.classifier.register_forward_hook(lambda *_: seen.append("before"))
    with as_it_was(model, SimpleNamespace()):
        model.classifier.register_forward_hook(lambda *_: seen.append("within"))
        model.bert.register_forward_pre_hook(lambda *_: seen.append("within"))
        model.register_state_dict_pre_hook(lambda *_: seen.append("as FSDP2 does in its first pass"))
    model(torch.ones(1, 4, dtype=torch.long))
    assert seen == ["before"]
    model.state_dict()
    assert seen[1:] == ["as FSDP2 does in its first pass"]
