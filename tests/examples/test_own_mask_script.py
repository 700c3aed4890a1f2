"""`examples/own_mask.py`: trains a sparse classifier, or adapters on it, and loses none of its zeros."""

import json

import pytest
from scripts import BERT, FLAGS, load
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

from own_masks import bring_zeros, zeros_of


REVIEWS = [{"text": f"the film was {word}", "label": label} for word, label in [("good", "up"), ("bad", "down")] * 8]


@pytest.mark.parametrize(("rank", "kind"), [(0, "csv"), (4, "jsonl")])
def test_the_script(rank, kind, save, write, tmp_path, capsys):
    if rank:
        pytest.importorskip("peft")
    base = save(BertModel, BertConfig(**BERT))
    model = bring_zeros(BertModel.from_pretrained(base))
    zeros = zeros_of(model)
    model.save_pretrained(base)
    flags = {name: value for name, value in FLAGS.items() if not name.startswith("admm")}
    flags |= {"base": base, "output_dir": tmp_path / "out", "max_steps": 80, "learning_rate": 1e-2, "lora_rank": rank}
    flags |= {"train_file": write(f"train.{kind}", REVIEWS), "validation_file": write(f"dev.{kind}", REVIEWS[:6])}
    metrics = load("own_mask").main([text for name, value in flags.items() for text in (f"--{name}", str(value))])
    assert metrics["eval_accuracy"] == 1.0 or rank  # adapters on a random base learn little
    out = capsys.readouterr().out
    assert "sparse weights none is lost" in out and ("accuracy once merged" in out) == bool(rank)
    trained = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    for name, mask in zeros.items():
        assert not trained.bert.get_parameter(name)[mask].any(), name
    assert (tmp_path / "out" / "model" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "out" / "model" / "config.json").read_text())["model_type"] == "bert"
