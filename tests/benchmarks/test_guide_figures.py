"""The pictures of the guide come from runs that are what their legends say."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, BertConfig, BertModel

from benchmarks import guide_figures
from benchmarks.guide_figures import FIGURES, PANELS, SETTING, draw, run, same_run
from hf_admm import ADMMTrainingArguments
from hf_admm.commands.quickstart import MODEL_PACKAGE
from hf_admm.finetuning.results import MODEL_FOLDER
from hf_admm.finetuning.tweets import packaged_file


@pytest.fixture
def tiny(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(packaged_file(MODEL_PACKAGE, Path(MODEL_FOLDER)))
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_run_has_its_curves(tiny, monkeypatch):
    monkeypatch.setattr(guide_figures, "EVERY", 1)
    record = run({"admm_rho": 40.0}, max_steps=8, model_dir=tiny, eval_rows=8)
    assert record["arguments"] == {**SETTING, "admm_rho": 40.0, "max_steps": 8}
    assert list(record["curves"]) == [figure for figure, _, _ in PANELS]
    residual = record["curves"]["admm/primal_residual"]
    assert residual["steps"] == list(range(1, 9)) and residual["values"][0] > 0.2 > residual["values"][-1]
    assert record["curves"]["eval_accuracy"]["steps"] == [2, 4, 6, 8]


def test_pictures_show_the_runs_of_their_legends(tmp_path):
    pytest.importorskip("matplotlib", reason="extra bench")
    curve = {"steps": [4, 8], "values": [0.3, 0.0]}
    shown = {figure: curve for figure, _, _ in PANELS}
    records = {
        f"{name}: {title}": {"arguments": {**SETTING, **overrides}, "curves": shown}
        for name, curves in FIGURES.items()
        for title, overrides in curves.items()
    }
    assert all(same_run(overrides, records) for curves in FIGURES.values() for overrides in curves.values())
    assert same_run({"admm_rho": 7.0}, records) is None
    drawn = draw(FIGURES, records, tmp_path)
    assert [path.name for path in drawn] == [f"guide_{name}.png" for name in FIGURES]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_every_run_is_allowed():
    for curves in FIGURES.values():
        for overrides in curves.values():
            ADMMTrainingArguments(output_dir="out", use_cpu=True, **{**SETTING, **overrides})
