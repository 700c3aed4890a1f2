"""Every bundled recipe loads as it is, and means what its name says."""

import dataclasses
from importlib import resources

import pytest
import yaml
from transformers import HfArgumentParser, TrainingArguments

from hf_admm.arguments import ADMMTrainingArguments
from hf_admm.commands.glue import GlueArguments
from hf_admm.configs import apply_config, available_configs, load_config
from hf_admm.finetuning.glue import GLUE_TASKS


PATTERNS = {"2_4": "2:4", "1_4": "1:4", "4_8": "4:8", "block_4x4_8": "4x4:8", "density_0.5": "0.5"}
TASKS = ["cola", "mrpc", "sst2"]
BASELINES = ["admm_dual", "admm_fixed", "admm_sr_ste", "asp", "dense", "dense_sr_ste", "one_shot", "sr_ste"]
# What `hf-admm glue` takes beside the training arguments.
TASK_KEYS = {"task_name", "max_seq_length"}
# Where a run writes, what it reads and what machine it is on are not part of a recipe.
NOT_A_RECIPE = {"output_dir", "logging_dir", "data_dir", "model_name_or_path", "report_to", "use_cpu", "seed"}


def training_arguments(config, tmp_path):
    config = {name: value for name, value in config.items() if name not in TASK_KEYS}
    return HfArgumentParser(ADMMTrainingArguments).parse_dict({**config, "output_dir": str(tmp_path)})[0]


def test_all_are_there():
    assert available_configs() == sorted([*PATTERNS, *TASKS, *(f"baselines/{name}" for name in BASELINES)])


@pytest.mark.parametrize("name", available_configs())
def test_every_recipe_gives_valid_arguments(name, tmp_path):
    config = load_config(name)
    arguments = training_arguments(config, tmp_path)
    fields = {field.name: field for field in dataclasses.fields(ADMMTrainingArguments)}
    for key, value in config.items():
        if key in TASK_KEYS:
            continue
        assert getattr(arguments, key) == value
        # parse_dict takes any value: a string where a number belongs would fail only in training.
        if fields[key].type in (int, float, float | None):
            assert isinstance(value, int | float) and not isinstance(value, bool), key
    assert not NOT_A_RECIPE & config.keys()


@pytest.mark.parametrize("name", available_configs())
def test_every_recipe_reads_the_same_in_plain_yaml(name):
    # So HfArgumentParser.parse_yaml_file, which follows YAML 1.1, takes the file as well.
    text = resources.files("hf_admm.configs").joinpath(*f"{name}.yaml".split("/")).read_text(encoding="utf-8")
    assert yaml.safe_load(text) == load_config(name)
    assert text.startswith("# ")


@pytest.mark.parametrize(("name", "pattern"), PATTERNS.items())
def test_a_pattern_recipe_prunes_to_its_pattern(name, pattern, tmp_path):
    arguments = training_arguments(load_config(name), tmp_path)
    assert str(arguments.pattern) == pattern
    plan = arguments.phase_plan(100)
    dense = 0 if arguments.pattern.density >= 0.5 else 50
    assert (plan.admm_steps, plan.freeze_step) == (dense, dense), (
        "it is pruned before it trains, or after a dense half"
    )


@pytest.mark.parametrize("name", TASKS)
def test_a_task_recipe_is_one_of_hf_admm_glue(name):
    config = load_config(name)
    assert config["task_name"] == name
    assert name in GLUE_TASKS
    assert TASK_KEYS & config.keys() <= {field.name for field in dataclasses.fields(GlueArguments)}


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_differ_in_the_method_alone(name, tmp_path):
    arguments = training_arguments(load_config(f"baselines/{name}"), tmp_path)
    method = training_arguments(load_config("baselines/admm_sr_ste"), tmp_path)
    assert str(arguments.sparsity_pattern) == ("none" if name == "dense" else method.sparsity_pattern)
    for field in dataclasses.fields(TrainingArguments):
        assert getattr(arguments, field.name) == getattr(method, field.name), field.name


@pytest.mark.parametrize(
    ("name", "admm_steps", "freeze_step", "has_penalty", "has_decay"),
    [
        ("one_shot", 0, 0, None, False),
        ("asp", 60, 60, False, False),
        ("sr_ste", 0, 100, None, True),
        ("admm_fixed", 60, 60, True, False),
        ("admm_sr_ste", 60, 90, True, True),
        ("admm_dual", 60, 90, True, True),
        ("dense_sr_ste", 60, 90, False, True),
    ],
)
def test_baselines_are_what_they_are_called(name, admm_steps, freeze_step, has_penalty, has_decay, tmp_path):
    arguments = training_arguments(load_config(f"baselines/{name}"), tmp_path)
    plan = arguments.phase_plan(100)
    assert (plan.admm_steps, plan.freeze_step) == (admm_steps, freeze_step)
    assert (arguments.srste_decay != 0) == has_decay
    if has_penalty is not None:
        assert (arguments.rho > 0) == has_penalty


def test_dense_prunes_nothing(tmp_path):
    assert training_arguments(load_config("baselines/dense"), tmp_path).pattern is None


@pytest.mark.parametrize("name", ["baselines/asp", "baselines/asp.yaml"])
def test_a_name_may_have_the_suffix(name):
    assert load_config(name)["srste_mask"] == "fixed"


def test_a_name_needs_no_folder_to_be_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("2_4")["sparsity_pattern"] == "2:4"


def test_a_file_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("num_train_epochs: 7\n")
    (tmp_path / "2_4.yaml").write_text("num_train_epochs: 8\n")
    monkeypatch.chdir(tmp_path)
    assert load_config(tmp_path / "mine.yaml") == load_config("mine.yaml") == {"num_train_epochs": 7}
    assert load_config("2_4.yaml") == {"num_train_epochs": 8}  # a file goes before a bundled name
    assert load_config("2_4")["sparsity_pattern"] == "2:4"


def test_values_are_read_as_they_are_meant(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "sparsity_pattern: 2:4\nlearning_rate: 1e-4\nsrste_decay: 2.0e-4\nadmm_steps: .6\nsave_strategy: no\n"
        "max_steps: -1\nbf16: false\nadmm_rho: null\nsparsity_exclude: [query, key]\nwarmup_steps: 0\n"
    )
    assert load_config(path) == {
        "sparsity_pattern": "2:4",
        "learning_rate": 1e-4,
        "srste_decay": 2e-4,
        "admm_steps": 0.6,
        "save_strategy": "no",
        "max_steps": -1,
        "bf16": False,
        "admm_rho": None,
        "sparsity_exclude": ["query", "key"],
        "warmup_steps": 0,
    }


@pytest.mark.parametrize("name", ["3_4", "baselines", "../setup", "baselines/../2_4", "__init__.py", ""])
def test_an_unknown_name_is_answered_with_the_known_ones(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"There is no config '.*path of a YAML file .*1_4, 2_4, .*baselines/asp"
    ) as error:
        load_config(name)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words\n", "1: 2\n"])
def test_a_file_must_hold_a_mapping(text, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mine.yaml' must map argument names to values"):
        load_config(path)


@pytest.mark.parametrize("text", ["a: [1\n", "a: !!python/object/apply:os.getcwd []\n"])
def test_a_file_must_be_plain_yaml(text, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mine.yaml' is not valid YAML: "):
        load_config(path)


def parsed(recipe, *argv):
    parser = HfArgumentParser(ADMMTrainingArguments)
    apply_config(parser, recipe)
    return parser.parse_args_into_dataclasses(["--output_dir", "out", *argv])[0]


def test_a_recipe_gives_a_parser_its_defaults_and_flags_win(tmp_path):
    arguments = parsed("1_4", "--num_train_epochs", "2")
    assert (arguments.sparsity_pattern, arguments.learning_rate, arguments.num_train_epochs) == ("1:4", 1e-4, 2)
    path = tmp_path / "mine.yaml"
    path.write_text(
        "sparsity_pattern: 0.5\nbf16: false\nwarmup_steps: 0.1\nsparsity_exclude: [query, key]\nadmm_rho: null\n"
    )
    arguments = parsed(path)
    assert (arguments.sparsity_pattern, arguments.bf16, arguments.warmup_steps) == ("0.5", False, 0.1)
    assert (arguments.sparsity_exclude, arguments.admm_rho) == (["query", "key"], None)


def test_a_recipe_with_keys_that_are_no_flags_is_refused_by_all_of_them(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("learning_rte: 1\nconfig: 2_4\nhelp: true\nseed: 1\n")
    hint = r"no flags: learning_rte \(did you mean learning_rate\?\), config.*, help"
    with pytest.raises(ValueError, match=hint):
        parsed(path)
    with pytest.raises(ValueError, match="Config 'mrpc' has keys that are no flags: task_name"):
        parsed("mrpc")
