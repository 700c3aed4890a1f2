"""A tiny pre-trained model with its tokenizer, made-up tasks, and made-up lines of results."""

from functools import lru_cache, partial

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from benchmarks.study.runs import Place
from hf_admm.commands.glue import glue_task


WORDS = ["good", "bad", "film", "plot", "the", "a", "was", "very", "dull", "fun"]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
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
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """SST-2 in the official layout, made up: 40 rows to train on, 12 to judge on."""
    folder = tmp_path_factory.mktemp("glue")
    rng = np.random.default_rng(0)
    (folder / "SST-2").mkdir()
    for name, size in (("train", 40), ("dev", 12)):
        texts = [" ".join(rng.choice(WORDS, size=rng.integers(2, 9))) for _ in range(size)]
        rows = [f"{text}\t{int('good' in text)}" for text in texts]
        (folder / "SST-2" / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]))
    return str(folder)


@pytest.fixture
def place(model_dir, data_dir, tmp_path):
    tasks = lru_cache(maxsize=None)(partial(glue_task, data_dir=data_dir))
    return Place(model_dir, tmp_path / "work", tasks)


@pytest.fixture
def make_line():
    """Makes a line as a run leaves it behind."""

    def make(method, value, task="mrpc", seed=1, pattern="2:4", rate=1.0, **changed):
        line = {
            "key": f"{method} {pattern} {task} {seed} {rate} {changed.get('label')}",
            **{"task": task, "method": method, "seed": seed, "rate": rate, "value": value, "metric": "accuracy"},
            "pattern": "none" if method.startswith("dense") else pattern,
            **{"judged_on": "dev", "model": "tiny", "max_seq_length": 64, "rows": None, "label": "", "steps": 100},
            "arguments": {"max_steps": -1, "bf16": True, "learning_rate": rate * 1e-4},
            **{"sparsity": 0.5, "broken_groups": 0, "phase_1": None, "seconds": 60.0, "date": "2026-01-02 03:04"},
            "machine": {"cpu": "a processor", "threads": 1},
            "versions": {"torch": "2.0", "transformers": "5.0"},
            "source": "abc",
        }
        return line | changed

    return make
