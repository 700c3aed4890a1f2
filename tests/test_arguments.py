"""The flags: from the command line, from YAML, changed later, and through files."""

import dataclasses
import json
import re

import pytest
import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from hf_admm.arguments import ADMMArgumentsMixin, ADMMTrainingArguments
from hf_admm.pruning.defaults import PENALTIES
from hf_admm.pruning.schedules import RHO_SCHEDULES
from hf_admm.sparsity.patterns import NMPattern, parse_pattern
from hf_admm.training.distillation_arguments import DistillationArgumentsMixin


DEFAULTS = {
    "sparsity_pattern": "2:4",
    "sparsity_include": None,
    "sparsity_exclude": None,
    "admm_steps": None,
    "admm_rho": None,
    "admm_rho_schedule": "constant",
    "admm_update_steps": None,
    "admm_penalty": None,
    "admm_lr_scheduler_type": None,
    "num_calibration_samples": None,
    "srste_mask": None,
    "srste_decay": None,
    "srste_lr_multiplier": None,
    "admm_state_dtype": "float32",
    "admm_state_offload": False,
    "mask_update_steps": None,
    "mask_freeze_steps": 0.1,
    "sparsity_report": False,
    "distill_teacher": None,
    "distill_logits_weight": 0.0,
    "distill_hidden_weight": None,
    "distill_temperature": 2.0,
}
# Another value for each: as typed, as YAML holds it, and what becomes of it.
OTHERS = {
    "sparsity_pattern": (["4x4:8"], '"4x4:8"', "4x4:8"),
    "sparsity_include": (["query", "0.value"], "[query, 0.value]", ["query", "0.value"]),
    "sparsity_exclude": (["pooler"], "[pooler]", ["pooler"]),
    "admm_steps": (["100"], "100", 100),
    "admm_rho": (["3e-3"], "3e-3", 3e-3),
    "admm_rho_schedule": (["cosine"], "cosine", "cosine"),
    "admm_update_steps": (["8"], "8", 8),
    "admm_penalty": (["decoupled"], "decoupled", "decoupled"),
    "admm_lr_scheduler_type": (["constant"], "constant", "constant"),
    "num_calibration_samples": (["64"], "64", 64),
    "srste_mask": (["fixed"], "fixed", "fixed"),
    "srste_decay": (["0"], "0", 0),
    "srste_lr_multiplier": (["2.5"], "2.5", 2.5),
    "admm_state_dtype": (["bfloat16"], "bfloat16", "bfloat16"),
    "admm_state_offload": (["true"], "true", True),
    "mask_update_steps": (["8"], "8", 8),
    "mask_freeze_steps": (["0.25"], "0.25", 0.25),
    "sparsity_report": (["true"], "true", True),
    "distill_teacher": (["self"], "self", "self"),
    "distill_logits_weight": (["0.5"], "0.5", 0.5),
    "distill_hidden_weight": (["1e-1"], "1e-1", 0.1),
    "distill_temperature": (["4"], "4", 4),
}
OWN_FIELDS = [
    field
    for field in dataclasses.fields(ADMMTrainingArguments)
    if field.name not in {inherited.name for inherited in dataclasses.fields(TrainingArguments)}
]


@pytest.fixture
def arguments(tmp_path):
    """Builds arguments as code does."""
    return lambda **flags: ADMMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **flags)


@pytest.fixture
def typed(tmp_path):
    """Builds arguments as the command line does."""

    def parse(*argv):
        argv = ["--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none", *argv]
        return HfArgumentParser(ADMMTrainingArguments).parse_args_into_dataclasses(argv)[0]

    return parse


@pytest.fixture
def from_yaml(tmp_path):
    """Builds arguments as `HfArgumentParser.parse_yaml_file` does, which follows YAML 1.1."""

    def parse(text):
        path = tmp_path / "flags.yaml"
        path.write_text(f"output_dir: {tmp_path}\nuse_cpu: true\nreport_to: none\n{text}\n")
        return HfArgumentParser(ADMMTrainingArguments).parse_yaml_file(path)[0]

    return parse


# ---- Parsing ----


def test_the_fields_and_their_defaults(arguments):
    assert {field.name for field in OWN_FIELDS} == DEFAULTS.keys() == OTHERS.keys()
    built = arguments()
    assert {name: getattr(built, name) for name in DEFAULTS} == DEFAULTS


def test_the_command_line_has_the_same_defaults(typed):
    parsed = typed()
    assert {name: getattr(parsed, name) for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize("name", OTHERS)
def test_every_field_parses_from_the_command_line(name, typed):
    words, _, value = OTHERS[name]
    assert value != DEFAULTS[name]
    parsed = typed(f"--{name}", *words)
    assert {other: getattr(parsed, other) for other in DEFAULTS} == {**DEFAULTS, name: value}


@pytest.mark.parametrize("name", OTHERS)
def test_every_field_parses_from_yaml(name, from_yaml):
    _, text, value = OTHERS[name]
    parsed = from_yaml(f"{name}: {text}")
    assert {other: getattr(parsed, other) for other in DEFAULTS} == {**DEFAULTS, name: value}


@pytest.mark.parametrize("name", ["admm_rho", "srste_decay", "srste_lr_multiplier", "admm_steps", "mask_freeze_steps"])
def test_a_number_that_yaml_reads_as_a_string(name, from_yaml):
    # YAML 1.1 wants a dot before the exponent, and would leave "1e-3" to fail somewhere in training.
    assert getattr(from_yaml(f"{name}: 1e-3"), name) == 0.001


def test_a_density_in_yaml_is_a_number(from_yaml):
    assert from_yaml("sparsity_pattern: 0.25").pattern == parse_pattern("0.25")


@pytest.mark.parametrize(("text", "number"), [("2:4", 124), ("1:4", 64), ("16:32", 992)])
def test_an_unquoted_pattern_in_yaml_is_refused(text, number, from_yaml):
    with pytest.raises(ValueError, match=rf'sparsity_pattern={number} is not a string.*write "2:4" in quotes'):
        from_yaml(f"sparsity_pattern: {text}")
    assert from_yaml(f'sparsity_pattern: "{text}"').sparsity_pattern == text


def test_one_word_is_a_regular_expression_if_it_looks_like_one(typed):
    # The command line knows lists alone; a suffix has no character that a regular expression would be written for.
    parsed = typed("--sparsity_include", r".*layer\.[01]\..*", "--sparsity_exclude", "output.dense")
    assert parsed.include == r".*layer\.[01]\..*"
    assert parsed.exclude == ["output.dense"]


def test_several_words_are_suffixes(typed):
    assert typed("--sparsity_include", ".*key", "query").include == [".*key", "query"]


def test_a_string_in_yaml_is_a_regular_expression(from_yaml):
    # PEFT's convention, also where it has no special character.
    parsed = from_yaml("sparsity_include: '.*query'\nsparsity_exclude: bert.pooler")
    assert (parsed.include, parsed.exclude) == (".*query", "bert.pooler")


@pytest.mark.parametrize("field", OWN_FIELDS, ids=lambda field: field.name)
def test_every_field_explains_itself(field):
    text = field.metadata["help"]
    assert text[0].isupper() and text.endswith(".")
    # And in the docstring, with the default that it has.
    docs = ADMMArgumentsMixin.__doc__ + DistillationArgumentsMixin.__doc__
    entry = re.search(rf"\n +{field.name} \((.*)\):\n", docs).group(1)
    if field.default is None:
        assert entry.endswith("*optional*")
    else:
        stated = re.search("defaults to `(.*)`", entry).group(1)
        assert type(field.default)(yaml.safe_load(stated)) == field.default


# ---- "none" ----


@pytest.mark.parametrize("text", ["none", "None", " NONE "])
def test_none_prunes_nothing(text, arguments):
    built = arguments(sparsity_pattern=text)
    assert not built.is_sparse and built.pattern is None


def test_none_is_not_bothered_by_what_does_not_apply(arguments):
    # So a dense baseline is the same command with one flag changed.
    built = arguments(
        sparsity_pattern="none",
        sparsity_include=["no such layer"],
        max_steps=10,
        admm_steps=500,
        mask_freeze_steps=500,
        admm_rho=1.0,
    )
    assert built.max_steps == 10 and not built.is_sparse


def test_none_leaves_the_arguments_of_trainer_as_they_are(arguments, tmp_path):
    plain = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none").to_dict()
    ours = arguments(sparsity_pattern="none").to_dict()
    assert {name: value for name, value in ours.items() if name not in DEFAULTS} == plain


# ---- Derived values ----


@pytest.mark.parametrize("penalty", PENALTIES)
def test_each_penalty_has_a_rho_of_its_own(penalty, arguments):
    assert arguments(admm_penalty=penalty).rho == PENALTIES[penalty].rho
    assert arguments(admm_penalty=penalty, admm_rho=0.5).rho == 0.5
    assert arguments(admm_penalty=penalty, admm_rho=0).rho == 0  # no penalty, and not the default


def test_the_documented_defaults_of_rho():
    metadata = {field.name: field.metadata["help"] for field in OWN_FIELDS}["admm_rho"]
    stated = dict(re.findall(r"([\d.]+) for (?:admm_penalty )?'(\w+)'", metadata))
    assert {penalty: float(rho) for rho, penalty in stated.items()} == {
        penalty: defaults.rho for penalty, defaults in PENALTIES.items()
    }


def test_every_choice_of_the_help_is_one():
    metadata = {field.name: field.metadata["help"] for field in OWN_FIELDS}
    assert set(re.findall(r"'(\w+)'", metadata["admm_rho_schedule"])) == RHO_SCHEDULES.keys()
    assert set(re.findall(r"'(\w+)'", metadata["admm_penalty"])) == PENALTIES.keys()


def test_derived_values_follow_the_attributes(arguments):
    # A hyperparameter search sets attributes of arguments that exist; nothing may stay from before.
    built = arguments()
    assert (built.pattern, built.rho, built.include) == (NMPattern(2, 4), 16.0, None)
    built.sparsity_pattern, built.admm_penalty = "1:4", "gradient"
    built.sparsity_include, built.sparsity_exclude = [".*query"], ["key"]
    assert (built.pattern, built.rho) == (NMPattern(1, 4), 3e-3)
    assert (built.include, built.exclude) == (".*query", ["key"])
    built.admm_rho, built.admm_steps, built.srste_mask = 0.1, 0.25, "fixed"
    assert built.rho == 0.1
    assert built.phase_plan(100).admm_steps == built.phase_plan(100).freeze_step == 25
    built.sparsity_pattern = "none"
    assert not built.is_sparse and built.pattern is None


# ---- Files ----


def changed(arguments):
    return arguments(
        sparsity_pattern="4x4:8", sparsity_include=["query", "key"], admm_rho=0.02, admm_steps=20, srste_mask="fixed"
    )


def test_json_holds_every_field(arguments):
    built = changed(arguments)
    written = json.loads(built.to_json_string())
    assert {name: written[name] for name in DEFAULTS} == {name: getattr(built, name) for name in DEFAULTS}


def test_arguments_survive_torch_save(arguments, tmp_path):
    # As Trainer does with training_args.bin; a parsed pattern kept as an attribute could break it.
    built = changed(arguments)
    torch.save(built, tmp_path / "training_args.bin")
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert type(loaded) is ADMMTrainingArguments
    assert loaded.to_json_string() == built.to_json_string()
    assert (loaded.pattern, loaded.rho, loaded.include) == (built.pattern, built.rho, built.include)
    assert loaded.phase_plan(100) == built.phase_plan(100)


def test_arguments_survive_a_copy(arguments):
    # Trainer and hyperparameter search copy them.
    built = changed(arguments)
    copied = dataclasses.replace(built, admm_rho=0.5)
    assert (copied.rho, built.rho, copied.pattern) == (0.5, 0.02, built.pattern)
