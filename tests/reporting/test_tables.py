"""The tables that a run begins and ends with say what is so, in few columns."""

import re

import pytest
import torch
from transformers import TrainerState
from transformers.utils import logging

from hf_admm.audit import audit_weights
from hf_admm.reporting.closing import closing_table, final_metrics
from hf_admm.reporting.opening import MOST_KINDS, kinds_table
from hf_admm.reporting.progress import bar_words
from hf_admm.reporting.settings import phase_words, set_flags
from hf_admm.reporting.tables import format_facts, markdown_table, shortened, size_text
from hf_admm.sparsity.kinds import kind_of, layer_kinds
from tiny_runs import STEPS, Recorder, prepare, train


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bert.encoder.layer.3.attention.self.query.weight", "attention.self.query"),
        ("encoder.block.1.layer.0.SelfAttention.q.weight", "SelfAttention.q"),
        ("layers.0.self_attn.in_proj_weight", "self_attn.in_proj_weight"),
        ("layers.2.mlp.0.weight", "mlp.0"),
        ("fc.weight", "fc"),
        ("0.weight", "0"),
    ],
)
def test_kinds(name, kind):
    assert kind_of(name) == kind


def test_one_kind_of_two_shapes_is_two():
    kinds = layer_kinds({"l.0.k.weight": (4, 8), "l.1.k.weight": (2, 8), "l.2.k.weight": (4, 8)})
    assert [(kind.count, kind.shape_text, kind.entries) for kind in kinds] == [(2, "4x8", 64), (1, "2x8", 16)]


def test_many_kinds_are_cut_to_the_largest_and_the_total_counts_all():
    shapes = {f"layers.0.kind{i}.weight": (4, 4 * (i + 1)) for i in range(40)}
    lines = kinds_table(shapes).splitlines()
    assert len(lines) == 2 + MOST_KINDS + 1
    assert lines[2].split()[0] == "kind29" and lines[-3].split()[0] == "kind39"
    assert lines[-2].split()[:3] == ["29", "other", "kinds"]
    assert lines[-1].split() == ["total", "40", f"{16 * sum(range(1, 41)):,}"]
    shown = [int(line.split()[-1].replace(",", "")) for line in lines[2:-1]]
    assert sum(shown) == 16 * sum(range(1, 41))


def test_tables_of_text():
    assert format_facts([("a", "1"), ("long", "2")]) == "a     1\nlong  2"
    assert markdown_table(["", "b"], [["x|y", "1\n2"]]) == "|  | b |\n| --- | --- |\n| x\\|y | 1 2 |"
    assert [size_text(size) for size in (0, 999, 1000, 999_960, 41_900_000, 3 * 10**12)] == [
        "0 B", "999 B", "1.0 kB", "1.0 MB", "41.9 MB", "3000.0 GB"
    ]  # fmt: skip
    assert shortened("abcdef", 6) == "abcdef" and shortened("abcdefg", 6) == "...efg"


PENALTIES = {
    "distance": {"admm_rho": None},
    "loss": {"admm_penalty": "loss"},
    "bfloat16": {"admm_penalty": "gradient", "admm_state_dtype": "bfloat16"},
    "phase 2 alone": {"admm_steps": 0},
    "phase 1 alone": {"admm_steps": STEPS, "mask_freeze_steps": 0},
    "blocks": {"sparsity_pattern": "4x4:8"},
}


@pytest.mark.parametrize("flags", PENALTIES.values(), ids=PENALTIES)
def test_a_run_begins_and_ends_with_a_table(flags, tiny_bert, token_data, tmp_path, capsys):
    held = []

    def take(state, **_):
        phase = trainer.sparsity.phase
        rooms = getattr(phase, "rooms", {})
        held.append((phase.name, sum(t.nbytes for t in [*phase.companions.values(), *rooms.values()])))

    recorder = Recorder("on_step_end", take)
    trainer = prepare(tiny_bert(), token_data(), tmp_path, callbacks=[recorder], **flags)
    assert capsys.readouterr().out == ""
    trainer.train()
    out = capsys.readouterr().out
    logs = [line for line in out.splitlines() if line.startswith("{")]
    opening, closing = out.split(logs[0])[0], out.split(logs[-1])[1]
    lines = (opening + closing).replace(str(tmp_path), "out").splitlines()
    assert max(map(len, lines)) < 100
    assert opening.startswith(f"hf_admm: BertForSequenceClassification to {trainer.args.pattern} in 12 steps")
    assert re.search(r"^attention\.self\.query +2 +16x16 +512$", opening, re.M)
    assert re.search(r"^total +12 +4,096$", opening, re.M)
    assert "left dense  3 embedding, 2 head" in opening
    memory = [size_text(size) for size in dict(held).values()]  # what is really held in each phase
    if flags.get("admm_steps") != 0:
        memory = [f"{size} in phase {number}" for number, size in enumerate(memory, 1)]
    assert re.search(r"^memory +(.*) beside", opening, re.M)[1].split(" and ") == memory
    phases = re.findall(r"^(phase \d|training) +(\d+) steps", opening, re.M)
    assert phases == re.findall(r"^(phase \d|training) +(\d+) steps", closing, re.M)
    assert sum(int(steps) for _, steps in phases) == STEPS
    assert "zeros          50.00% of 4,096 entries, in 12 weights" in closing
    assert re.search(r"^broken groups  0 of [\d,]+$", closing, re.M)
    model = tmp_path / "model"
    assert "saved          nothing yet\n" in closing
    assert f'next           trainer.save_model("{model}")\n               hf-admm verify {model}\n' in closing


def test_the_last_table_names_what_was_saved(tiny_bert, token_data, tmp_path, capsys):
    saving = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    data = token_data()
    trainer = train(tiny_bert(), data, tmp_path, **saving)
    assert re.findall(r"^(?:last saved|next) +(.*)$", capsys.readouterr().out, re.M) == [
        str(tmp_path / "checkpoint-12"),
        f"hf-admm verify {tmp_path / 'checkpoint-12'}",
    ]
    best = prepare(
        tiny_bert(), data, tmp_path / "best", load_best_model_at_end=True, metric_for_best_model="loss",
        greater_is_better=True, **saving,
    )  # fmt: skip
    best.train()
    out = capsys.readouterr().out
    assert best.state.best_global_step == 4, "the loss falls, so that the worst is the first"
    assert f"next           hf-admm verify {tmp_path / 'best' / 'checkpoint-4'}" in out
    assert f"last saved     {tmp_path / 'best' / 'checkpoint-12'}" in out
    metric = next(log["eval_loss"] for log in best.state.log_history if log["step"] == 4 and "eval_loss" in log)
    assert f"eval_loss {metric:.4f} (of the sparse weights, at step 4)" in out
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert "to 2:4 in 12 steps, resumed after step 8\n" in capsys.readouterr().out
    unsaved = prepare(tiny_bert(), data, tmp_path)
    unsaved.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert "saved          nothing yet\n" in capsys.readouterr().out, "what it went on from is not what was trained"


def test_a_quiet_run_prints_no_table(tiny_bert, token_data, tmp_path, capsys):
    before = logging.get_verbosity()
    try:
        train(tiny_bert(), token_data(), tmp_path, log_level="error")
        assert "hf_admm" not in capsys.readouterr().out
        logging.set_verbosity_error()
        train(tiny_bert(), token_data(), tmp_path)
        assert "hf_admm" not in capsys.readouterr().out
    finally:
        logging.set_verbosity(before)


def test_a_dense_run_says_nothing(tiny_bert, token_data, tmp_path, capsys):
    train(tiny_bert(), token_data(), tmp_path, sparsity_pattern="none")
    assert "hf_admm" not in capsys.readouterr().out


def state(*logs, **given):
    return TrainerState(log_history=list(logs), **given)


def test_the_metrics_are_those_of_the_model_as_it_is():
    logs = [
        {"eval_a_loss": 1.0, "eval_a_runtime": 3.0, "step": 4, "epoch": 1.0},
        {"eval_b_loss": 2.0, "step": 4},
        {"loss": 9.0, "step": 5},
        {"eval_a_loss": 3.0, "eval_note": "text", "step": 8},
    ]
    assert final_metrics(state()) == ({}, None)
    assert final_metrics(state(*logs)) == ({"eval_a_loss": 3.0}, 8)
    assert final_metrics(state(*logs, best_global_step=4), best_loaded=True) == (
        {"eval_a_loss": 1.0, "eval_b_loss": 2.0}, 4
    )  # fmt: skip
    assert final_metrics(state(*logs, best_global_step=4)) == ({"eval_a_loss": 3.0}, 8)
    ended = [*logs, {"train_runtime": 1.0, "step": 8}, {"eval_a_loss": 0.5, "step": 8}]
    assert final_metrics(state(*ended, best_global_step=4), best_loaded=True) == ({"eval_a_loss": 0.5}, 8)


def test_weights_that_were_left_dense_are_in_the_last_table():
    audit = audit_weights([("a.weight", torch.tensor([[1.0, 0, 0, 1]]), False)], "2:4", {"b.weight": "it was frozen"})
    table = closing_table(state({"train_runtime": 61.2, "step": 3}, global_step=3), audit, admm_steps=3)
    assert "hf_admm: 2:4 after 3 steps and 61 s" in table
    assert "left dense     b.weight (it was frozen)" in table
    assert "phase 1        3 steps\n" in table and "phase 2" not in table


def test_settings_in_words_and_flags(tiny_bert, token_data, tmp_path):
    args = prepare(tiny_bert(), token_data(), tmp_path, admm_rho=None, sparsity_exclude=["query"]).args
    assert dict(phase_words(args, STEPS)) == {
        "phase 1": "6 steps: penalty distance from step 4, rho 16, mask updated every 2 steps",
        "phase 2": "6 steps: SR-STE, mask and decay as in phase 1, frozen in the last 1, learning rate x 2",
    }
    flags = set_flags(args, STEPS)
    assert flags["admm_rho"] == "16" and flags["sparsity_exclude"] == "query" and flags["mask_freeze_steps"] == "1"
    assert "admm_rho_schedule" not in flags and "distill_teacher" not in flags
    args.srste_mask, args.admm_rho, args.admm_penalty = "fixed", 0.5, "decoupled"
    args.mask_update_steps, args.srste_decay, args.srste_lr_multiplier = 3, 1e-3, 1.0
    assert dict(phase_words(args, STEPS)) == {
        "phase 1": "6 steps: ADMM, penalty decoupled, rho 0.5, Z and U updated every 2 steps",
        "phase 2": "6 steps: SR-STE, mask frozen, decay 0.001",
    }
    args.srste_mask, args.distill_teacher = "dynamic", str(tmp_path)
    assert "mask updated every 3 steps, frozen in the last 1" in dict(phase_words(args, STEPS))["phase 2"]
    assert set_flags(args, STEPS)["distill_teacher"] == tmp_path.name, "where a folder lies is not published"


def test_a_run_that_is_pruned_before_it_trains(tiny_bert, token_data, tmp_path):
    trainer = prepare(
        tiny_bert(), token_data(), tmp_path, sparsity_pattern="2:4", admm_steps=None, admm_rho=None,
        admm_update_steps=None, logging_steps=3, srste_lr_multiplier=2,
    )  # fmt: skip
    args = trainer.args
    pruned = "pruned by layer-wise ADMM with up to 1024 rows, mask frozen, learning rate x 2"
    assert dict(phase_words(args, STEPS)) == {"training": f"12 steps: {pruned}"}
    flags = set_flags(args, STEPS)
    by_default = "1024 (by default: fewer, where texts are long)"
    assert (flags["num_calibration_samples"], flags["srste_mask"], flags["admm_steps"]) == (by_default, "fixed", "0")
    trainer.train()
    change = next(log["admm/output_change"] for log in trainer.state.log_history if "admm/output_change" in log)
    table = closing_table(trainer.state, trainer.audit, admm_steps=0)
    assert f"training       12 steps: outputs of layers changed by {change:.0%} when pruned\n" in table
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "eprint = {2406.07831}" in card and "2407.08334" not in card and "2102.04010" not in card
    assert f"| `num_calibration_samples` | {by_default} |" in card
    args.num_calibration_samples = 8
    assert set_flags(args, STEPS)["num_calibration_samples"] == "8"
    args.srste_mask = "dynamic"
    assert "with up to 8 rows, SR-STE" in dict(phase_words(args, STEPS))["training"]
    args.num_calibration_samples = 0
    assert "num_calibration_samples" not in set_flags(args, STEPS)


def test_a_dense_half_is_called_so(tiny_bert, token_data, tmp_path):
    """Its distance to the pattern says nothing of the run, and is not looked at; nothing lies beside the weights."""
    trainer = prepare(
        tiny_bert(), token_data(), tmp_path, sparsity_pattern="1:4", admm_steps=None, admm_rho=None,
        admm_update_steps=None, logging_steps=3,
    )  # fmt: skip
    pruned = "pruned by layer-wise ADMM with up to 1024 rows, mask frozen, learning rate x 2"
    said = {"phase 1": "6 steps: dense training", "phase 2": f"6 steps: {pruned}"}
    assert dict(phase_words(trainer.args, STEPS)) == said
    trainer.train()
    figures = {name for log in trainer.state.log_history for name in log if name.startswith("admm/")}
    assert figures == {"admm/phase", "admm/rho", "admm/penalty", "admm/sparsity", "admm/output_change"}
    assert bar_words(1, trainer.state.log_history[0], trainer.args.phase_plan(STEPS)) == "phase 1/2"
    assert trainer.sparsity.bytes_beside(trainer.args.phase_settings(STEPS))["dense_phase"] == 0
    flags = set_flags(trainer.args, STEPS)
    assert flags["admm_rho"] == "0" and not {"admm_penalty", "admm_update_steps"} & flags.keys()
    first, second = closing_table(trainer.state, trainer.audit, admm_steps=6).split("phase 1")[1].split("phase 2")
    assert first.strip() == "6 steps: dense training" and "outputs of layers changed by" in second


def test_words_beside_the_bar(tiny_bert, token_data, tmp_path):
    args = prepare(tiny_bert(), token_data(), tmp_path).args
    plan = args.phase_plan(STEPS)
    logs = {"admm/primal_residual": 0.03125, "admm/mask_flips": 0.00123, "admm/switch_residual": 0.5}
    assert bar_words(1, logs, plan) == "phase 1/2, residual 0.031, flips 0.0012"
    assert bar_words(2, logs, plan) == "phase 2/2, residual 0.5, flips 0.0012"
    args.admm_steps = 0
    assert bar_words(2, {}, args.phase_plan(STEPS)) == ""
    assert bar_words(2, logs, args.phase_plan(STEPS)) == "residual 0.5, flips 0.0012"
