"""Random flags, from code and from the command line: an error that names the flag, or arguments that make sense."""

import io
import math
from contextlib import redirect_stderr
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import HfArgumentParser

from hf_admm.arguments import ADMMTrainingArguments
from hf_admm.pruning.defaults import PENALTIES
from hf_admm.pruning.schedules import RHO_SCHEDULES
from hf_admm.sparsity.patterns import parse_pattern
from hf_admm.sparsity.targets import select_targets
from hf_admm.validation import MASK_MODES, PLAIN_SCHEDULERS, STATE_DTYPES
from tiny_runs import train


PATTERNS = ("2:4", "1:4", "4x4:8", "0.5", "none")
# For each flag, values that are allowed in some run.
GOOD = {
    "sparsity_pattern": st.sampled_from(PATTERNS),
    "sparsity_include": st.none() | st.just(["0", "1"]) | st.just([".*"]) | st.just(r"\d"),
    "sparsity_exclude": st.none() | st.just(["0"]) | st.just(["[0]"]),
    "admm_steps": st.none() | st.floats(0, 1) | st.integers(0, 40),
    "admm_rho": st.none() | st.floats(1e-30, 100) | st.sampled_from([0, 1e-30, 1e30]),
    "admm_rho_schedule": st.sampled_from(sorted(RHO_SCHEDULES)),
    "admm_update_steps": st.integers(1, 100),
    "admm_penalty": st.none() | st.sampled_from(sorted(PENALTIES)),
    "admm_lr_scheduler_type": st.none() | st.sampled_from(PLAIN_SCHEDULERS),
    "num_calibration_samples": st.none() | st.integers(0, 1000),
    "srste_mask": st.none() | st.sampled_from(MASK_MODES),
    "srste_decay": st.floats(0, 1),
    "srste_lr_multiplier": st.none() | st.floats(1e-3, 10),
    "admm_state_dtype": st.sampled_from(STATE_DTYPES),
    "admm_state_offload": st.booleans(),
    "mask_update_steps": st.none() | st.integers(1, 100),
    "mask_freeze_steps": st.floats(0, 1) | st.integers(0, 40),
    "distill_teacher": st.none() | st.sampled_from(["self", "switch"]),
    "distill_logits_weight": st.floats(0, 1),
    "distill_hidden_weight": st.none() | st.floats(1e-3, 100),
    "distill_temperature": st.floats(0.1, 20),
}
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=4),
    st.complex_numbers(),
    st.fractions(),
    st.lists(st.none() | st.integers() | st.text(max_size=4), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.sampled_from(
        [10**400, -(10**400), 10**5000, -(10**5000), Fraction(10**400, 3), 5e-324, 1e308, -0.0, 2**63, "1e-3", "nan"]
        + ["1e400", "a{99999999999}", "(" * 3000, "[", "*", "2:4\n", "NONE ", object, object(), len, (), ("0",), ...]
        + [
            np.float32(0.5),
            np.float64("nan"),
            np.int64(3),
            np.array(["loss"]),
            torch.tensor(1.0),
            torch.tensor([1, 2]),
        ]
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("flags"))


@pytest.fixture(scope="module")
def parser():
    return HfArgumentParser(ADMMTrainingArguments)


def assert_names_a_flag(error, flags):
    message = str(error)
    assert any(name in message for name in flags) or ("sparsity_pattern" in flags and "sparsity pattern" in message)
    assert len(message) > len("admm_rho") + 20, "says more than the name"


def assert_sensible(args, max_steps):
    """What training relies on."""
    assert args.is_sparse == (args.sparsity_pattern.strip().lower() != "none")
    assert not args.is_sparse or parse_pattern(str(args.pattern)) == args.pattern
    assert math.isfinite(args.rho) and args.rho >= 0 and args.lr_multiplier > 0
    assert args.srste_decay is None or math.isfinite(args.srste_decay) and args.srste_decay >= 0
    assert 1 <= (args.admm_update_steps or 1) < 2**63 and 1 <= (args.mask_update_steps or 1) < 2**63
    numbers = (args.admm_rho, args.srste_decay, args.admm_steps, args.mask_freeze_steps, args.admm_update_steps)
    numbers = (*numbers, args.num_calibration_samples)
    assert not any(isinstance(number, bool) for number in (*numbers, args.mask_update_steps))
    for names in (args.include, args.exclude):
        assert names is None or isinstance(names, str) or all(isinstance(name, str) for name in names)
    try:
        plan = args.phase_plan(max_steps)
    except ValueError as error:
        assert "admm_steps" in str(error) or "mask_freeze_steps" in str(error)
        assert "is beyond the run" in str(error) or args.learns_from_switch and "has none of the run's" in str(error)
        assert not args.is_sparse or args.max_steps != max_steps, "would have been refused at once"
        return
    assert 0 <= plan.admm_steps <= plan.freeze_step <= plan.max_steps == max_steps
    assert all(type(step) is int for step in (plan.admm_steps, plan.freeze_step))
    assert sum(plan.segments) == max_steps and all(plan.segments)
    assert args.mask_mode == "dynamic" or plan.freeze_step == plan.admm_steps
    assert args.calibration_samples == 0 or args.is_sparse and args.calibration_samples > 0
    given = ("admm_steps", "admm_penalty", "admm_rho", "admm_update_steps", "admm_lr_scheduler_type")
    phase_1 = args.trains_dense or any(getattr(args, name) is not None for name in given)
    assert args.calibration_samples == 0 or phase_1 or plan.admm_steps == 0
    settings = args.phase_settings(max_steps)
    assert settings.update_steps >= 1 and (settings.decay is None or settings.decay >= 0)
    shares = [plan.shrinkage(args.rho, step) for step in range(max(1, plan.admm_steps))]
    assert shares == sorted(shares) and all(math.isfinite(share) and share >= 0 for share in shares)
    strengths = [plan.rho(args.rho, args.admm_rho_schedule, step) for step in range(max(1, plan.admm_steps))]
    assert strengths == sorted(strengths), "a smaller rho would scale U up"
    assert all(0 < float(np.float32(strength)) < math.inf for strength in strengths) or args.rho == 0
    if args.is_sparse:
        model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 8)])
        try:
            selection = select_targets(model, args.pattern, args.include, args.exclude)
        except ValueError as error:
            assert "sparsity_" in str(error) or "does not fit" in str(error)
        else:
            assert selection.targets


def build_or_refuse(folder, max_steps, flags):
    try:
        args = ADMMTrainingArguments(folder, use_cpu=True, report_to="none", max_steps=max_steps, **flags)
    except ValueError as error:
        assert_names_a_flag(error, flags or GOOD)
        return error
    assert_sensible(args, max_steps if max_steps > 0 else 20)
    return None


@given(st.fixed_dictionaries({}, optional=GOOD), st.sampled_from([-1, 1, 2, 20, 40]))
def test_good_values_in_any_combination(folder, flags, max_steps):
    """Refused only where phases are longer than the run, or leave a teacher of the switch none of the two."""
    refusal = build_or_refuse(folder, max_steps, flags)
    switch = flags.get("distill_teacher") == "switch" and "distill_teacher='switch'" in str(refusal)
    assert refusal is None or "is beyond the run" in str(refusal) or switch


@given(
    st.fixed_dictionaries({}, optional={name: good | ANYTHING for name, good in GOOD.items()}),
    st.sampled_from([-1, 1, 20]),
)
def test_anything_in_any_combination(folder, flags, max_steps):
    build_or_refuse(folder, max_steps, flags)


@pytest.mark.parametrize("name", sorted(GOOD))
@given(value=ANYTHING)
@example(value=True)
@example(value=10**5000)
@example(value=-(10**5000))
@example(value=Fraction(7, 2))
@example(value=["a{99999999999}"])
def test_one_flag_alone_is_named_if_it_is_refused(folder, name, value):
    build_or_refuse(folder, 20, {name: value})


@given(
    st.dictionaries(st.sampled_from(sorted(GOOD)), ANYTHING, min_size=1, max_size=3),
    st.sampled_from([1, 20]),
)
def test_anything_set_later_is_checked_when_training_starts(folder, flags, max_steps):
    args = ADMMTrainingArguments(folder, use_cpu=True, report_to="none", max_steps=max_steps)
    for name, value in flags.items():
        setattr(args, name, value)
    try:
        args.validate_sparsity()
    except ValueError as error:
        assert_names_a_flag(error, flags)
    else:
        assert_sensible(args, max_steps)


WORDS = st.one_of(
    st.text(max_size=8),
    st.integers(-3, 60).map(str),
    st.floats().map(repr),
    st.sampled_from(
        [*PATTERNS, *PENALTIES, *MASK_MODES, *RHO_SCHEDULES, "1e400", "1_0", "0x10", "9" * 5000, "٢", "%s"]
    ),
    st.sampled_from(["", " ", "-1", "--", "None", "[]", "['0']", "{", "True", "a{99999999999}", "2:4 "]),
)


@given(st.dictionaries(st.sampled_from(sorted(GOOD)), WORDS, min_size=1, max_size=4))
def test_command_lines(folder, parser, flags):
    line = ["--output_dir", folder, "--use_cpu", "--report_to", "none", "--max_steps", "20"]
    stderr = io.StringIO()
    try:
        with redirect_stderr(stderr):
            (args,) = parser.parse_args_into_dataclasses(
                [*line, *(f"--{name}={word}" for name, word in flags.items())]
            )
    except SystemExit as stop:  # argparse's own refusal
        assert stop.code == 2
        assert_names_a_flag(stderr.getvalue().rsplit("error:", 1)[-1], flags)
    except ValueError as error:
        assert_names_a_flag(error, flags)
    else:
        assert_sensible(args, 20)


@settings(max_examples=settings().max_examples // 10, suppress_health_check=[HealthCheck.too_slow])
@given(flags=st.fixed_dictionaries({}, optional={name: GOOD[name] for name in GOOD if "clude" not in name}))
def test_what_is_allowed_trains_to_the_pattern(folder, flags, tiny_bert, token_data):
    """Up to the largest penalty: the weights may be lost, the groups are not."""
    flags = {"admm_update_steps": 1, **flags, "max_steps": 4, "logging_strategy": "no"}
    try:
        trainer = train(tiny_bert(num_hidden_layers=1), token_data(8), folder, **flags)
    except ValueError as error:
        assert "is beyond the run" in str(error)
        return
    assert trainer.audit.ok if trainer.args.is_sparse else trainer.audit is None
