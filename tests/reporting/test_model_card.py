"""Our part of a model card: valid metadata, and a section that says what is true of the model."""

import re
from dataclasses import replace

import pytest
import torch
from huggingface_hub import metadata_load
from transformers import Trainer, TrainingArguments

from cards import valid_card
from hf_admm import parse_pattern
from hf_admm.reporting.model_card import BEGIN, END, CardFacts, add_to_card, sparsity_section
from hf_admm.reporting.run_reports import fits_2_4, load_snippet
from tiny_runs import train


FACTS = CardFacts(
    pattern="2:4",
    pattern_words="2 of every 4 consecutive inputs are kept",
    shapes={f"layer.{i}.dense.weight": (8, 16) for i in range(3)},
    left_dense="1 head",
    share=0.5,
    flags={"admm_rho": "16", "sparsity_exclude": "query|key"},
    phases=[("phase 1", "4 steps")],
    verification="OK: all is well.",
    model="me/model",
    served_as_2_4=True,
)


@pytest.fixture
def card(tmp_path):
    def write(text):
        path = tmp_path / "README.md"
        path.write_bytes(text.encode())
        return path

    return write


@pytest.fixture(scope="module")
def trained(tiny_bert, token_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    metrics = {
        "compute_metrics": lambda output: {
            "accuracy": float((output.predictions.argmax(-1) == output.label_ids).mean())
        }
    }
    return train(tiny_bert(), token_data(), folder, parts=metrics, eval_strategy="steps", eval_steps=6, seed=3), folder


def test_the_card_of_a_run_is_valid_and_says_what_came_out(trained):
    trainer, folder = trained
    trainer.dense_metrics = {"eval_accuracy": 0.8765, "eval_loss": 0.25}
    trainer.create_model_card(dataset="letters", dataset_tags=[])
    card = valid_card(folder / "README.md")
    plain = folder.parent / "plain"
    args = TrainingArguments(str(plain), report_to="none", use_cpu=True)
    plain.mkdir()
    Trainer(trainer.model, args).create_model_card(dataset="letters", dataset_tags=[])
    assert set(metadata_load(plain / "README.md")) <= set(card.data.to_dict())
    assert card.data.tags == ["generated_from_trainer", "hf-admm", "sparsity", "2:4"]
    for line in (
        "fine-tuned with `hf-admm`",
        "2 of every 4 consecutive inputs are kept",
        "| sparse weights | 12, with 4,096 entries; 50.00% of them are zero |",
        "| left dense | 3 embedding, 2 head |",
        "| verification | OK: every group of every sparse weight (12 of them) obeys 2:4. |",
        "| `intermediate.dense` | 2 | 32x16 | 1,024 |",
        "| `admm_penalty` | loss |",
        "| `admm_rho` | 0.1 |",
        "| `admm_steps` | 6 |",
        "| `max_steps` | 12 |",
        f'model = BertForSequenceClassification.from_pretrained("{folder.name}")',
        f"hf-admm verify {folder.name}",
        "accelerate_inference(model)",
        "eprint = {2407.08334}",
        "eprint = {2102.04010}",
    ):
        assert line in card.text, line
    assert "2406.07831" not in card.text
    last = [log for log in trainer.state.log_history if "eval_accuracy" in log][-1]
    assert f"| `eval_accuracy` | {last['eval_accuracy']:.4f} | 0.8765 |" in card.text
    assert f"| `eval_loss` | {last['eval_loss']:.4f} | 0.2500 |" in card.text
    assert "_runtime" not in card.text.split("### Metrics")[1]
    switch = next(log for log in trainer.state.log_history if log.get("admm/phase") == 2)["admm/switch_residual"]
    assert f"{switch:.2%} cut off at the switch" in card.text
    trainer.create_model_card()
    assert (folder / "README.md").read_text().count("## Sparsity") == 1


def test_the_snippet_of_the_card_loads_the_model(trained, tmp_path, monkeypatch):
    trainer, _ = trained
    trainer.save_model(str(tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(load_snippet(trainer.model, "model"), scope)
    for name in trainer.sparsity.targets:
        assert torch.equal(scope["model"].get_parameter(name), trainer.model.get_parameter(name))


def test_a_class_of_ones_own_gets_no_snippet_that_would_fail():
    class Own(torch.nn.Module):
        pass

    assert load_snippet(Own(), "model") == ""
    assert "```python\nfrom" not in sparsity_section(replace(FACTS, served_as_2_4=False))


def test_a_card_keeps_its_metadata_text_comments_and_line_ends(card):
    text = (
        "---\r\n# the spec: https://example.org\r\nlibrary_name: mine\r\ntags:\r\n- zero\r\n- sparsity\r\n"
        "model-index:\r\n- name: a\r\n  results: []\r\n---\r\n\r\n# Title\r\n\r\nBody, with --- in it.\r\n"
    )
    path = card(text)
    add_to_card(path, FACTS)
    with open(path, newline="") as file:
        after = file.read()
    assert after.startswith("---\r\n# the spec: https://example.org\r\nlibrary_name: mine\r\n")
    assert "\r\n---\r\n\r\n# Title\r\n\r\nBody, with --- in it." in after
    data = metadata_load(path)
    assert data == {
        "library_name": "mine",
        "tags": ["zero", "sparsity", "hf-admm", "2:4"],
        "model-index": [{"name": "a", "results": []}],
    }
    valid_card(path)


@pytest.mark.parametrize("text", ["# Title\n\nNo metadata, and a line:\n\n---\n", "", "---\n---\n# Title\n"])
def test_a_card_without_metadata_gets_some(text, card):
    path = card(text)
    add_to_card(path, FACTS)
    assert valid_card(path).data.tags == ["hf-admm", "sparsity", "2:4"]
    assert path.read_text().count(text.strip("-\n").strip()) >= 1


def test_a_pattern_is_not_read_as_a_number(card):
    """YAML reads 2:4 without quotes as 124."""
    path = card("---\ntags: one\n---\n")
    add_to_card(path, FACTS)
    assert metadata_load(path)["tags"] == ["one", "hf-admm", "sparsity", "2:4"]


def test_the_section_is_replaced_in_its_place(card):
    path = card(f"---\ntags: [a]\n---\n# Title\n\n{BEGIN}\n\nold 1.5%\\1\n\n{END}\n\n## After\n")
    add_to_card(path, FACTS)
    first = path.read_text()
    add_to_card(path, replace(FACTS, verification="FAILED \\1 badly."))
    text = path.read_text()
    assert "old 1.5%" not in first and "OK: all is well." in first
    assert "FAILED \\1 badly." in text and "OK: all is well." not in text
    assert text.count(BEGIN) == text.count(END) == 1 and text.index("# Title") < text.index(BEGIN) < text.index(
        "## After"
    )


@pytest.mark.parametrize("metadata", ["tags: [unclosed", "- a\n- list", "tags: 3"])
def test_broken_metadata_is_a_warning_and_stays(metadata, card, caplog):
    path = card(f"---\n{metadata}\n---\n# Title\n")
    add_to_card(path, FACTS)
    assert path.read_text().startswith(f"---\n{metadata}\n---\n# Title\n") and "## Sparsity" in path.read_text()
    assert "can't be read" in caplog.text and "Mend what is between" in caplog.text


def test_cells_do_not_break_the_tables():
    section = sparsity_section(FACTS)
    assert r"| `sparsity_exclude` | query\|key |" in section
    for table in re.findall(r"(?:^\|.*\|\n?)+", section, re.M):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [("2:4", True), ("1:4", True), ("1:2", True), ("2:8", True), ("4:8", False), ("3:4", False), ("4x4:8", False),
     ("0.5", False), ("2:6", False), ("2:2", False)],
)  # fmt: skip
def test_kernels_for_2_4_are_promised_to_what_has_them(pattern, fits):
    assert fits_2_4(parse_pattern(pattern)) is fits
    section = sparsity_section(replace(FACTS, served_as_2_4=fits))
    assert ("accelerate_inference" in section) is fits
