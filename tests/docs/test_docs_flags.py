"""docs/flags.md says what the code takes: every flag with its default, and every default by penalty."""

import dataclasses
import re

import pytest
from docs_pages import ROOT

from hf_admm import ADMMArgumentsMixin, ADMMTrainingArguments, parse_pattern
from hf_admm.pruning.defaults import PENALTIES, UPDATES, PenaltyDefaults, pull_start


PAGE = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| `(\w+)` \| (.*?) ?\| ", PAGE.partition("## ")[0], re.M))
# The fields of `PenaltyDefaults`, by the flag for which they stand, and what None means there.
FLAGS = {
    "rho": ("admm_rho", None),
    "update_steps": ("admm_update_steps", f"phase 1 / {UPDATES}"),
    "decay": ("srste_decay", "as at the end of phase 1"),
    "mask_update_steps": ("mask_update_steps", "as in phase 1"),
    "lr_scheduler_type": ("admm_lr_scheduler_type", "`lr_scheduler_type`"),
    "lr_multiplier": ("srste_lr_multiplier", None),
}


def defaults_table():
    fields = [field.name for field in dataclasses.fields(PenaltyDefaults)]
    assert set(fields) == set(FLAGS), "name the flag of each field in FLAGS"
    lines = [f"| `admm_penalty` | {' | '.join(f'`{FLAGS[name][0]}`' for name in fields)} |"]
    lines.append("| --- " * (len(fields) + 1) + "|")
    for penalty, defaults in PENALTIES.items():
        cells = (getattr(defaults, name) for name in fields)
        texts = [FLAGS[name][1] if cell is None else f"`{cell}`" for name, cell in zip(fields, cells, strict=True)]
        lines.append(f"| `{penalty}` | {' | '.join(texts)} |")
    return "\n".join(lines)


def test_every_flag_is_there_with_its_default():
    fields = {field.name: field.default for field in dataclasses.fields(ADMMArgumentsMixin)}
    assert list(ROWS) and not set(fields) ^ set(ROWS), "flags without a row, or rows without a flag"
    taken = {"admm_penalty": ADMMTrainingArguments(output_dir="out").penalty}  # its None has one meaning
    for name, default in (fields | taken).items():
        # None stands for nothing, or for a default that depends on another flag.
        allowed = {"", "by penalty", "by teacher", "by way"} if default is None else {f"`{default}`"}
        assert ROWS[name] in allowed, f"{name}: {ROWS[name]} instead of {' or '.join(allowed)}"
        if name in (flag for flag, _ in FLAGS.values()):
            assert ROWS[name] == "by penalty", name


def test_the_defaults_by_penalty_are_those_of_the_code():
    assert defaults_table() in PAGE, f"docs/flags.md should hold:\n\n{defaults_table()}"


TWO_PHASES = "[two phases](guide.md#two-phases-in-a-picture)"
SELF_TAUGHT = (
    '[taught by its own first half](distillation.md#taught-by-its-own-first-half), `distill_teacher="switch"`'
)
WAYS = [
    ("pruned [before training](one_shot.md), where half or more is kept", "2:4", {}),
    ("pruned [after a dense half](one_shot.md#where-less-than-half-is-kept), where less is kept", "1:4", {}),
    *((TWO_PHASES, pattern, {"admm_steps": 0.6}) for pattern in ("2:4", "1:4")),
    *((SELF_TAUGHT, pattern, {"distill_teacher": "switch"}) for pattern in ("2:4", "1:4")),
]


def test_the_defaults_by_way_are_those_of_the_code(tmp_path):
    for way, pattern, flags in WAYS:
        args = ADMMTrainingArguments(str(tmp_path), sparsity_pattern=pattern, **flags)
        row = f"| {way} | `{args.calibration_samples}` | `{args.phase_1_length}` | `{args.mask_mode}` |"
        assert row in PAGE, f"docs/flags.md should hold:\n\n{row}"


def test_the_learning_rate_of_a_pruned_model_is_as_said(tmp_path):
    assert "`srste_lr_multiplier` is 1 where the pattern keeps half or more, and by penalty" in PAGE
    for pattern, expected in (("2:4", 1.0), ("3:4", 1.0), ("1:4", PENALTIES["distance"].lr_multiplier)):
        args = ADMMTrainingArguments(str(tmp_path), sparsity_pattern=pattern)
        assert args.lr_multiplier == expected
        assert ADMMTrainingArguments(str(tmp_path), sparsity_pattern=pattern, srste_lr_multiplier=3).lr_multiplier == 3
    switched = ADMMTrainingArguments(str(tmp_path), num_calibration_samples=8, admm_steps=0.2)
    assert switched.lr_multiplier == PENALTIES["distance"].lr_multiplier


@pytest.mark.parametrize(
    "flags", [{"admm_steps": 0.5}, {"admm_penalty": "distance"}, {"admm_rho": 0.0}, {"admm_update_steps": 4}]
)
def test_a_flag_of_phase_1_asks_for_it_as_said(flags, tmp_path):
    args = ADMMTrainingArguments(str(tmp_path), sparsity_pattern="1:4", **flags)
    assert args.calibration_samples == 0 and args.phase_1_length == flags.get("admm_steps", 0.6)
    assert args.mask_mode == "dynamic"
    both = ADMMTrainingArguments(str(tmp_path), sparsity_pattern="2:4", num_calibration_samples=8, **flags)
    assert both.calibration_samples == 8 and both.mask_mode == "fixed"
    assert both.phase_1_length == (0.5 if both.trains_dense else flags.get("admm_steps", 0.6))
    assert both.trains_dense is ("admm_rho" in flags)


def test_the_start_of_the_pull_is_that_of_the_code():
    half, quarter = (pull_start(parse_pattern(text)) for text in ("2:4", "1:4"))
    assert f"is over: {half}, or {quarter} where the pattern keeps less than half" in PAGE
