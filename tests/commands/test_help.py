"""`--help` of the training commands is short, `--help_all` is whole, and `--quiet` leaves what one came for."""

import dataclasses
import re

import pytest
from transformers import TrainingArguments

from hf_admm import ADMMTrainingArguments, cli
from hf_admm.commands.flags import DEFAULTS, CommandArguments, parse_flags
from hf_admm.commands.glue import GlueArguments
from hf_admm.commands.help import COMMON_FLAGS


OURS = {field.name for field in dataclasses.fields(ADMMTrainingArguments)} - {
    field.name for field in dataclasses.fields(TrainingArguments)
}


def show(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        cli.main([*argv])
    assert stop.value.code == 0
    return capsys.readouterr().out


def flags_in(text):
    return re.findall(r"^  (?:-h, )?--(\w+)", text, re.M)


@pytest.mark.parametrize("command", ["glue", "quickstart"])
def test_help_shows_our_flags_and_the_common_ones(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = show(capsys, command, "--help")
    shown = flags_in(text)
    own = {field.name for field in dataclasses.fields(CommandArguments)}
    own |= {field.name for field in dataclasses.fields(GlueArguments)} if command == "glue" else set()
    assert set(shown) == {*own, *OURS, *COMMON_FLAGS, "help", "help_all"}
    assert len(shown) == len(set(shown)) and len(COMMON_FLAGS) == 12
    assert text.count("\n") < 200 and max(map(len, text.splitlines())) <= 80
    assert "--help_all shows the others" in text
    if command == "glue":
        assert shown.index("task_name") < shown.index("config"), "what a command needs comes first"


def test_help_all_shows_every_flag_once(capsys):
    shown = flags_in(show(capsys, "glue", "--help_all"))
    everything = {field.name for field in dataclasses.fields(GlueArguments)} | {"help", "help_all"}
    everything |= {field.name for field in dataclasses.fields(ADMMTrainingArguments) if field.init}
    assert set(shown) == everything
    assert len(shown) == len(set(shown))


def test_help_shows_the_defaults_that_are_in_force(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    config = tmp_path / "config.yaml"
    config.write_text("learning_rate: 3e-5\n")
    text = show(capsys, "glue", "--config", str(config), "--help")
    assert re.search(r"--learning_rate X +The initial .* \(default: 3e-05\)", text)
    assert re.search(rf"--num_train_epochs X .*\(default: {DEFAULTS['num_train_epochs']}\)", text)
    assert "None" not in text and "--dry_run  " in text
    assert "--eval_strategy {no,steps,epoch}" in text


def test_both_spellings_and_switches_are_still_parsed():
    needed = ["--task_name", "rte", "--model_name_or_path", "m"]
    argv = [*needed, "--learning-rate", "1e-3", "--bf16", "--no_remove_unused_columns", "--quiet"]
    command, arguments = parse_flags(argv, "hf-admm glue", "", GlueArguments, DEFAULTS)
    assert command.quiet and arguments["learning_rate"] == 1e-3 and arguments["bf16"] is True
    assert arguments["remove_unused_columns"] is False
    with pytest.raises(ValueError, match=r"--help_al \(did you mean .*\). |does not know --help_al"):
        parse_flags([*needed, "--help_al"], "hf-admm glue", "", GlueArguments, DEFAULTS)


def test_a_flag_of_a_new_kind_is_shown_too(capsys, monkeypatch):
    monkeypatch.setattr("hf_admm.commands.help._SECTIONS", {"phase 1, ADMM": ("admm_",)})
    text = show(capsys, "glue", "--help")
    assert OURS <= set(flags_in(text))
    assert "srste_mask" in text.split("other flags of sparse training:")[1].split("\n\n")[0]
