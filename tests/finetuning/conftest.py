"""A tiny pre-trained model and tasks for it, and `hf-admm glue` on them."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from hf_admm import cli


WORDS = ["good", "bad", "film", "plot", "the", "a", "was", "very", "dull", "fun"]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A tiny pre-trained BERT with a WordPiece tokenizer."""
    folder = tmp_path_factory.mktemp("pretrained")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """SST-2 and MNLI in the official layout, made up."""
    folder = tmp_path_factory.mktemp("glue")
    rng = np.random.default_rng(0)

    def sentence():
        return " ".join(rng.choice(WORDS, size=rng.integers(2, 9)))

    (folder / "SST-2").mkdir()
    for name, size in (("train", 24), ("dev", 10)):
        rows = [f"{text}\t{int('good' in text)}" for text in (sentence() for _ in range(size))]
        (folder / "SST-2" / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]))
    (folder / "MNLI").mkdir()
    for name, size in (("train", 24), ("dev_matched", 10), ("dev_mismatched", 7)):
        labels = rng.choice(["entailment", "neutral", "contradiction"], size=size)
        rows = [f"{sentence()}\t{sentence()}\t{label}" for label in labels]
        (folder / "MNLI" / f"{name}.tsv").write_text("\n".join(["sentence1\tsentence2\tgold_label", *rows]))
    return str(folder)


@pytest.fixture
def glue(model_dir, data_dir, tmp_path):
    """Runs `hf-admm glue` on the tiny model and returns the exit code and the output folder."""

    def run(*flags, task="sst2"):
        shared = ["--task_name", task, "--model_name_or_path", model_dir, "--data_dir", data_dir, "--use_cpu"]
        sizes = ["--per_device_train_batch_size", "8", "--num_train_epochs", "2", "--admm_update_steps", "2"]
        unseen = ["--sparsity_report", "false", "--output_dir", str(tmp_path / "out")]
        return cli.main(["glue", *shared, *sizes, *unseen, *flags]), tmp_path / "out"

    return run


@pytest.fixture(scope="session")
def read_results():
    """The contents of `results.json` in a folder."""
    return lambda folder: json.loads((folder / "results.json").read_text())
