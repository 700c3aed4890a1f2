"""The tiny models and data that tests and the processes that they start train on."""

import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel


SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
_GPT2 = {
    "vocab_size": 64,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
NO_DROPOUT = {
    "tiny_bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "tiny_gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


def tiny_bert(seed=0, model_class=BertForSequenceClassification, **config):
    """
    A BERT of 2 layers and width 16: 12 matrices in its encoder, pooler and classifier beside. Keyword arguments
    override its config; the same seed gives the same weights.
    """
    torch.manual_seed(seed)
    return model_class(BertConfig(**{**SIZES, "num_labels": 2, **config}))


def tiny_gpt2(seed=0, **config):
    """
    A `GPT2LMHeadModel` of 2 layers and width 16, whose matrices are `Conv1D` (transposed) and whose head is tied to
    the embedding. Keyword arguments override its config; the same seed gives the same weights.
    """
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(**{**_GPT2, **config}))


def token_data(n=32, length=8, vocab=64, labels=2, seed=0):
    """
    A list of `n` examples for the default collator. `labels` is the number of classes, which the first token decides,
    so that a model can learn it; 1 gives a float to regress on; `None` gives the tokens themselves, for a language
    model.
    """
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
