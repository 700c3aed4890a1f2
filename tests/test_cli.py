import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from hf_admm import cli
from hf_admm.commands.flags import DEFAULTS, CommandArguments, parse_flags
from hf_admm.commands.glue import GlueArguments


def parse(*argv, defaults=None):
    return parse_flags(argv, "hf-admm glue", "", GlueArguments, DEFAULTS if defaults is None else defaults)


NEEDED = ("--task_name", "rte", "--model_name_or_path", "m")


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return "--config", str(path)

    return write


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_the_commands(flag, capsys):
    assert cli.main([flag]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("quickstart", "glue", "verify"))


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("hf-admm 0.")


@pytest.mark.parametrize(("argv", "complaint"), [([], "usage"), (["train"], "error: unknown command 'train'")])
def test_unknown_command_prints_the_usage(argv, complaint, capsys):
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(complaint)
    assert "usage: hf-admm COMMAND" in captured.err and not captured.out


def test_python_m_hf_admm_without_torch():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['hf_admm', '--help']\n"
        "try:\n    runpy.run_module('hf_admm', run_name='__main__')\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage: hf-admm COMMAND" in done.stdout


def test_quickstart_stays_offline_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.setattr(cli, "import_module", lambda name: SimpleNamespace(main=lambda argv: 5))
    monkeypatch.setattr(cli.os, "environ", {"OMP_WAIT_POLICY": "ACTIVE"})
    assert cli.main(["quickstart"]) == 5
    assert cli.os.environ == {"OMP_WAIT_POLICY": "ACTIVE", "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["glue"], "needs --task_name and --model_name_or_path"),
        (["glue", "--task_name", "ax", "--model_name_or_path", "m"], "Unknown GLUE task 'ax'"),
        (["glue", *NEEDED, "--sparsity_patern", "2:4"], "--sparsity_patern (did you mean --sparsity_pattern?)"),
        (["glue", *NEEDED, "--learning_rate", "fast"], "argument --learning_rate/--learning-rate: invalid float"),
        (["glue", *NEEDED, "--max_train_samples", "0"], "--max_train_samples 0 is not allowed"),
        (["glue", *NEEDED, "--data_dir", "nowhere"], "There is no folder"),
        (["glue", *NEEDED, "--config", "nowhere.yaml"], "There is no config 'nowhere.yaml'"),
        (["verify", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(argv, complaint, capsys):
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert complaint in error


def test_what_the_system_refuses_is_one_line_too(monkeypatch, capsys):
    def fails(argv):
        raise PermissionError(13, "Permission denied", "out.onnx")

    monkeypatch.setattr("hf_admm.commands.export.main", fails)
    assert cli.main(["export", "model", "out.onnx"]) == 2
    assert capsys.readouterr().err == "error: [Errno 13] Permission denied: 'out.onnx'\n"


def test_value_comes_from_flag_else_config_else_defaults_else_dataclass(config):
    file = config("learning_rate: 1e-3\nnum_train_epochs: 7\nmax_seq_length: 64\nseed: 1\n")
    command, arguments = parse(*NEEDED, *file, "--num_train_epochs", "2", "--seed=3")
    assert (command.task_name, command.max_seq_length, command.dense_baseline) == ("rte", 64, False)
    assert arguments["seed"] == 3
    assert arguments["num_train_epochs"] == 2
    assert arguments["learning_rate"] == 1e-3
    assert arguments["per_device_train_batch_size"] == DEFAULTS["per_device_train_batch_size"]
    assert arguments["weight_decay"] == 0.0
    assert arguments["output_dir"] is None


def test_flags_equal_to_a_default_still_win(config):
    _, arguments = parse(*NEEDED, *config("num_train_epochs: 7\n"), "--num_train_epochs", "5")
    assert arguments["num_train_epochs"] == 5


def test_config_holds_any_flag(config):
    text = "task_name: mrpc\nmodel_name_or_path: m\ndense_baseline: true\nsparsity_pattern: 0.5\nbf16: false\n"
    command, arguments = parse(*config(text + "sparsity_exclude: [query, key]\nadmm_rho: null\n"))
    assert (command.task_name, command.dense_baseline) == ("mrpc", True)
    assert arguments["sparsity_pattern"] == "0.5"
    assert arguments["sparsity_exclude"] == ["query", "key"]
    assert arguments["admm_rho"] is None and arguments["bf16"] is False


def test_bundled_config():
    _, arguments = parse(*NEEDED, "--config", "1_4")
    assert arguments["sparsity_pattern"] == "1:4"


def test_unknown_config_keys_are_all_named(config):
    with pytest.raises(ValueError, match=r"learning_rte \(did you mean learning_rate\?\), config"):
        parse(*NEEDED, *config("learning_rte: 1\nconfig: other\nseed: 1\n"))


def test_config_value_of_the_wrong_type(config):
    with pytest.raises(ValueError, match="invalid int value: '1.5'"):
        parse(*NEEDED, *config("max_seq_length: 1.5\n"))


def test_config_without_a_name():
    with pytest.raises(ValueError, match="expected one argument"):
        parse(*NEEDED, "--config")


def test_lists_keep_their_type():
    _, arguments = parse(*NEEDED, "--sparsity_include", "query", "key")
    assert arguments["sparsity_include"] == ["query", "key"]


def test_limits_must_be_positive():
    with pytest.raises(ValueError, match="--max_eval_samples -1 is not allowed: give a whole number of at least 1"):
        CommandArguments(max_eval_samples=-1)
