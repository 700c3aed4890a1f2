"""A tokenizer of letters and tiny models in folders, as the trainers of other libraries load them."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)


pytest.register_assert_rewrite("integration_runs")

WORDS = ["<pad>", "<eos>", "<unk>", *(chr(ord("a") + i) for i in range(26))]


@pytest.fixture(scope="session")
def tokenizer():
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", cls_token="<eos>",
        sep_token="<eos>", model_max_length=32,
    )  # fmt: skip
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    return tokenizer


def folder_of(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def llama_config(**config):
    return LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=1, **config,
    )  # fmt: skip


@pytest.fixture(scope="session")
def llama(tokenizer, tmp_path_factory):
    """A language model of 2 layers and width 16: 14 matrices to prune."""
    torch.manual_seed(0)
    return folder_of(LlamaForCausalLM(llama_config()), tokenizer, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def reward_llama(tokenizer, tmp_path_factory):
    """The same with a head of one output."""
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(llama_config(num_labels=1))
    return folder_of(model, tokenizer, tmp_path_factory.mktemp("reward"))


@pytest.fixture(scope="session")
def bert(tokenizer, tmp_path_factory):
    """An encoder of 2 layers and width 16, without dropout: 12 matrices to prune."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=0, max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        num_labels=1,
    )  # fmt: skip
    return folder_of(BertForSequenceClassification(config), tokenizer, tmp_path_factory.mktemp("bert"))
