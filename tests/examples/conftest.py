"""Runs the scripts of `examples/` on tiny models with tokenizers of their own, and files of a few made-up rows."""

import json

import pytest
import torch
from scripts import FLAGS, VOCABULARY, load
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_admm import audit_checkpoint


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    """What `load_dataset` makes of the files goes where the files are."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="session")
def tokenizer():
    raw = Tokenizer(models.WordPiece({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    roles = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, model_max_length=64, mask_token="[MASK]", eos_token="[SEP]", **roles
    )


@pytest.fixture
def save(tokenizer, tmp_path):
    """Saves a tiny model of a class and a config, with the tokenizer, and returns its folder."""

    def saved(model_class, config, beside=None):
        torch.manual_seed(0)
        model_class(config).save_pretrained(tmp_path / "pretrained")
        (beside or tokenizer).save_pretrained(tmp_path / "pretrained")
        return str(tmp_path / "pretrained")

    return saved


@pytest.fixture
def write(tmp_path):
    """Writes rows as JSON lines, or as CSV if the name ends so, and returns the path."""

    def written(name, rows):
        path = tmp_path / name
        if name.endswith(".csv"):
            lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        else:
            lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    return written


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the `main` of a script and returns its metrics; what it saved obeys the pattern, and it says so."""

    def ran(name, weights, pattern="2:4", **flags):
        flags = {"output_dir": str(tmp_path / "out"), **FLAGS, **flags}
        metrics = load(name).main([text for flag, value in flags.items() for text in (f"--{flag}", str(value))])
        report = audit_checkpoint(tmp_path / "out")
        assert report.ok and report.pattern == pattern and report.recorded == len(report.sparse) == weights
        verdict = f"{tmp_path / 'out'}: OK: every group of every sparse weight ({weights} of them) obeys {pattern}."
        assert verdict in capsys.readouterr().out.splitlines()
        assert json.loads((tmp_path / "out" / "eval_results.json").read_text()) == metrics
        return metrics

    return ran
