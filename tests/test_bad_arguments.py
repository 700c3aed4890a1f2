"""Flags that are refused: each error says what was given and what is allowed."""

import re

import pytest

from hf_admm.arguments import ADMMTrainingArguments
from hf_admm.sparsity.patterns import ALLOWED_PATTERNS


@pytest.fixture
def arguments(tmp_path):
    """Builds arguments as code does."""
    return lambda **flags: ADMMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **flags)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "none of the known forms"),
        ("half", "none of the known forms"),
        ("2:4:8", "none of the known forms"),
        ("5:4", "N = 5 kept of M = 4"),
        ("0:4", "N is 0"),
        ("4x4:17", r"K = 17 is more than the R\*C = 16"),
        ("4x4:0", "K is 0"),
        ("0x4:1", "a side of the block is 0"),
        ("0.0", "between 0 and 1"),
        ("1.0", "between 0 and 1"),
        ("-0.5", "between 0 and 1"),
        ("nan", "between 0 and 1"),
    ],
)
def test_a_bad_pattern(text, reason, arguments):
    with pytest.raises(ValueError, match=reason) as error:
        arguments(sparsity_pattern=text)
    assert f"'{text}'" in str(error.value) and ALLOWED_PATTERNS in str(error.value)


@pytest.mark.parametrize("value", [124, 1, None, True, ["2:4"]])
def test_a_pattern_that_is_no_string(value, arguments):
    with pytest.raises(ValueError, match=rf"sparsity_pattern={re.escape(repr(value))} is not a string"):
        arguments(sparsity_pattern=value)


@pytest.mark.parametrize("name", ["admm_rho", "srste_decay", "srste_lr_multiplier", "admm_steps", "mask_freeze_steps"])
@pytest.mark.parametrize("value", [-1, -1e-9, float("nan"), float("inf"), "much"])
def test_a_bad_number(name, value, arguments):
    with pytest.raises(ValueError, match=rf"^{name}={re.escape(repr(value))} .* a finite number of at least 0"):
        arguments(**{name: value})


def test_a_phase_that_could_not_learn(arguments):
    with pytest.raises(ValueError, match="srste_lr_multiplier=0 is not allowed: .* Give a number above 0"):
        arguments(srste_lr_multiplier=0)


@pytest.mark.parametrize("name", ["mask_freeze_steps"])
def test_a_number_that_is_missing(name, arguments):
    with pytest.raises(ValueError, match=rf"^{name}=None .* a finite number of at least 0"):
        arguments(**{name: None})


@pytest.mark.parametrize("name", ["admm_update_steps", "mask_update_steps"])
@pytest.mark.parametrize("value", [0, -16, 1.5, float("nan"), float("inf"), "16"])
def test_a_bad_interval(name, value, arguments):
    with pytest.raises(ValueError, match=rf"^{name}={re.escape(repr(value))} .* a whole number of at least 1"):
        arguments(**{name: value})


@pytest.mark.parametrize("name", ["admm_steps", "mask_freeze_steps"])
def test_steps_are_a_share_or_whole(name, arguments):
    with pytest.raises(ValueError, match=rf"{name}=1.5 is neither a share of the run \(below 1\) nor a whole number"):
        arguments(**{name: 1.5})


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("admm_penalty", "distance, loss, gradient, decoupled"),
        ("admm_rho_schedule", "constant, linear, cosine, exponential"),
        ("srste_mask", "dynamic, fixed"),
    ],
)
@pytest.mark.parametrize("value", ["LOSS", "", None, 1, ["fixed"]])
def test_an_unknown_choice(name, allowed, value, arguments):
    if name in ("admm_penalty", "srste_mask") and value is None:
        pytest.skip("stands for the default")
    with pytest.raises(ValueError, match=rf"{name}={re.escape(repr(value))} is unknown. Allowed: {allowed}\."):
        arguments(**{name: value})


@pytest.mark.parametrize("name", ["admm_steps", "mask_freeze_steps"])
def test_steps_beyond_the_run(name, arguments):
    with pytest.raises(ValueError, match=rf"{name}=101 is beyond the run, which has 100 optimizer steps.*max_steps"):
        arguments(max_steps=100, **{name: 101})
    assert getattr(arguments(max_steps=100, **{name: 100}), name) == 100
    # The length of a run in epochs is not known yet: it is checked when training starts.
    later = arguments(num_train_epochs=1, **{name: 101})
    with pytest.raises(ValueError, match=f"{name}=101 is beyond the run"):
        later.phase_plan(100)


@pytest.mark.parametrize(
    ("flags", "backend"),
    [
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "DeepSpeed"),
        ({"deepspeed": "zero3.json"}, "DeepSpeed"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "FSDP1"),
        ({"fsdp": "full_shard", "fsdp_config": {"fsdp_version": 1}}, "FSDP1"),
    ],
)
def test_backends_whose_shards_are_out_of_reach(flags, backend, arguments):
    # Before the backend asks for its package or its devices, which are not here.
    with pytest.raises(ValueError, match=f"Sparse training under {backend} is not supported.*FSDP2.*, or set"):
        arguments(**flags)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sparsity_pattern", "5:4", "N = 5 kept of M = 4"),
        ("admm_rho", -1.0, "admm_rho=-1.0 is not allowed"),
        ("admm_penalty", "weight", "admm_penalty='weight' is unknown"),
        ("mask_update_steps", 0, "mask_update_steps=0 is not allowed"),
        ("admm_steps", 11, "admm_steps=11 is beyond the run"),
    ],
)
def test_attributes_set_later_are_checked_by_validate(name, value, message, arguments):
    built = arguments(max_steps=10)
    setattr(built, name, value)
    with pytest.raises(ValueError, match=message):
        built.validate_sparsity()


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_an_optimizer_that_moves_weights_on_its_own(optim, arguments):
    with pytest.raises(ValueError, match=rf"optim='{optim}' is not supported by sparse training.*'none'"):
        arguments(optim=optim)
    arguments(optim=optim, sparsity_pattern="none")


def test_of_a_long_value_the_start_is_shown(arguments):
    with pytest.raises(ValueError, match=r"^sparsity_include=\[1, 1, 1, [1, ]{1,190}\.\.\. is not allowed"):
        arguments(sparsity_include=[1] * 500)
