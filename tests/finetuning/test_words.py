"""What the commands print and write for people."""

import pytest
from datasets import disable_progress_bars, enable_progress_bars, is_progress_bar_enabled
from transformers.utils import logging

from cards import valid_card
from hf_admm import cli
from hf_admm.commands import quickstart


@pytest.fixture
def words_restored():
    before = logging.get_verbosity(), is_progress_bar_enabled()
    yield
    logging.set_verbosity(before[0])
    (enable_progress_bars if before[1] else disable_progress_bars)()


def test_a_command_says_what_runs_and_what_comes_next(glue, capsys):
    code, folder = glue("--dense_baseline")
    out = capsys.readouterr().out
    before, after = out.split("hf_admm: now dense, the same 6 steps")
    assert code == 0 and "hf_admm: BertForSequenceClassification to 2:4 in 6 steps" in before
    assert before.count("broken groups") == 1 and after.count("broken groups") == 1
    assert "kind of layer" not in after and "trainer.save_model" not in out
    assert out.endswith(f"next: hf-admm verify {folder / 'model'}\n")


def test_the_saved_model_has_a_card_with_both_metrics(glue, read_results):
    _, folder = glue("--dense_baseline")
    results, card = read_results(folder), valid_card(folder / "model" / "README.md")
    for name in ("accuracy", "loss"):
        assert f"| `{name}` | {results['sparse'][name]:.4f} | {results['dense'][name]:.4f} |" in card.text
    assert {"hf-admm", "sparsity", "2:4"} <= set(card.data.tags) and card.data.get("datasets") is None
    assert "on the sst2 dataset" in card.text and card.text.count("## Sparsity") == 1
    assert str(folder) not in card.text, "where it lies is nobody else's business"
    assert not (folder / "README.md").exists()


def test_a_dense_run_alone_has_no_part_of_ours(glue, capsys):
    code, folder = glue("--sparsity_pattern", "none")
    assert code == 0 and not (folder / "model" / "README.md").exists()
    out = capsys.readouterr().out
    assert "hf_admm" not in out and "next:" not in out


def test_quiet_leaves_the_table_of_results(glue, capfd, words_restored, read_results):
    code, folder = glue("--dense_baseline", "--quiet", "--logging_steps", "1")
    out, err = capfd.readouterr()
    assert code == 0 and len(out.splitlines()) == 4 and "sparse 2:4" in out.splitlines()[3]
    assert "LOAD REPORT" not in err and "it/s" not in err
    assert not {"log_level", "disable_tqdm", "quiet"} & set(read_results(folder)["arguments"])


def test_a_quiet_quickstart(model_dir, tmp_path, monkeypatch, capsys, words_restored):
    monkeypatch.setattr(quickstart, "packaged_file", lambda *names: model_dir)
    monkeypatch.chdir(tmp_path)
    flags = ["--max_train_samples", "32", "--max_eval_samples", "8", "--max_steps", "2", "--bf16", "false", "--quiet"]
    assert cli.main(["quickstart", *flags]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
