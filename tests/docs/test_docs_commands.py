"""The commands of the documentation are taken by the programs that they call."""

import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from transformers import HfArgumentParser

from hf_admm import ADMMTrainingArguments


ROOT = Path(__file__).parent.parent
COMMANDS = re.findall(r"^((?:accelerate launch|torchrun) .*)$", (ROOT / "docs" / "distributed.md").read_text(), re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_launch_commands(command):
    _, _, arguments = command.partition("train.py")
    parsed = HfArgumentParser(ADMMTrainingArguments).parse_args_into_dataclasses(shlex.split(arguments))
    assert str(parsed[0].pattern) == "2:4"
    if command.startswith("accelerate"):
        launch = launch_command_parser().parse_args(shlex.split(command)[2:])
        assert launch.num_processes == 2 and launch.training_script == "train.py"
        assert launch.multi_gpu or (launch.use_fsdp and launch.fsdp_version == "2")
        assert not launch.use_fsdp or launch.fsdp_state_dict_type == "FULL_STATE_DICT"


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").iterdir())]
)
def test_links_and_files_exist(page):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert ((ROOT / page).parent / link).exists(), link
    for test in re.findall(r"`(tests/\w+\.py)`", text):
        assert (ROOT / test).exists(), test
