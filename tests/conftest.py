"""Tiny models and data for every test, seeded, offline and on one thread."""

import os


# Before anything imports huggingface_hub or torch: both read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")  # Trainer's own bar

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers.utils import logging  # noqa: E402


logging.disable_progress_bar()
torch.set_num_threads(1)  # the models are too small to gain from more

# The same examples in every run, few of them; `make fuzz` draws many new ones.
settings.register_profile("quick", deadline=None, derandomize=True, max_examples=60)
settings.register_profile("thorough", deadline=None, max_examples=3000, print_blob=True)
settings.load_profile("quick")


@pytest.fixture(autouse=True)
def verbosity():
    """Some commands speak less for the rest of their process; the next test is to hear everything."""
    logging.set_verbosity_warning()


@pytest.fixture(scope="session")
def tiny_bert():
    """
    Builds a `BertForSequenceClassification` of 2 layers and width 16: 12 matrices in its encoder, pooler and
    classifier beside. Keyword arguments override its config; the same seed gives the same weights.
    """

    def build(seed=0, **config):
        defaults = {
            "vocab_size": 64,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 32,
            "num_labels": 2,
        }
        torch.manual_seed(seed)
        return BertForSequenceClassification(BertConfig(**{**defaults, **config}))

    return build


@pytest.fixture(scope="session")
def tiny_gpt2():
    """
    Builds a `GPT2LMHeadModel` of 2 layers and width 16, whose matrices are `Conv1D` (transposed) and whose head is
    tied to the embedding. Keyword arguments override its config; the same seed gives the same weights.
    """

    def build(seed=0, **config):
        defaults = {
            "vocab_size": 64,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 32,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        torch.manual_seed(seed)
        return GPT2LMHeadModel(GPT2Config(**{**defaults, **config}))

    return build


@pytest.fixture(scope="session")
def token_data():
    """
    Builds a list of `n` examples for the default collator. `labels` is the number of classes, which the first token
    decides, so that a model can learn it; 1 gives a float to regress on; `None` gives the tokens themselves, for a
    language model.
    """

    def build(n=32, length=8, vocab=64, labels=2, seed=0):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(1, vocab, (n, length), generator=generator)
        if labels is None:
            targets = tokens.clone()
        elif labels == 1:
            targets = tokens[:, 0].float() / vocab
        else:
            targets = tokens[:, 0] * labels // vocab
        return [
            {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": target}
            for row, target in zip(tokens, targets, strict=True)
        ]

    return build
