"""The commands of the documentation are taken by the programs that they call, and its files and links exist."""

import re
import shlex
from importlib import import_module

import pytest
from accelerate.commands.launch import launch_command_parser
from docs_pages import ROOT, pages
from transformers import HfArgumentParser

from hf_admm import ADMMTrainingArguments
from hf_admm.cli import COMMANDS


TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in pages()}
LAUNCHES = re.findall(r"^((?:accelerate launch|torchrun) .*)$", TEXTS["docs/distributed.md"], re.M)


def bash_lines(text):
    """The lines of its bash blocks, those that go on after a backslash as one."""
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M):
        yield from block.replace("\\\n", " ").splitlines()


def own_commands(text):
    """The calls of `hf-admm`, without the marks of what is optional; and whether there were any."""
    for line in bash_lines(text):
        for call in line.split("&&"):
            if found := re.search(r"(?:^|[\s/])(?:hf-admm|-m hf_admm) (.*)", call):
                words = shlex.split(re.sub(r"[\[\]]", " ", found[1]), comments=True)
                yield words, "[" in found[1]


CALLS = [(page, words, usage) for page, text in TEXTS.items() for words, usage in own_commands(text)]


class Captured(Exception):
    """Carries a parser out of the command that made it."""


def parser_of(command, monkeypatch):
    module = import_module(f"hf_admm.commands.{command}")
    if hasattr(module, "_parser"):
        return module._parser()

    def capture(self, *args, **kwargs):
        raise Captured(self)

    monkeypatch.setattr(HfArgumentParser, "parse_known_args", capture, raising=False)
    with pytest.raises(Captured) as found:
        module.main([])
    monkeypatch.undo()
    return found.value.args[0]


def test_calls_are_found():
    assert {words[0] for _, words, _ in CALLS} >= {"quickstart", "verify", "speed"}
    assert len(LAUNCHES) >= 3


@pytest.mark.parametrize(("page", "words", "usage"), CALLS, ids=[f"{page}: {' '.join(w)}" for page, w, _ in CALLS])
def test_own_commands(page, words, usage, monkeypatch):
    command, *arguments = words
    if command.startswith("--"):
        return
    assert command in COMMANDS
    parser = parser_of(command, monkeypatch)
    known = {option for action in parser._actions for option in action.option_strings}
    flags = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    assert flags <= known, f"hf-admm {command} does not know {flags - known}"
    if not usage:
        parser.parse_args(arguments)  # the values too


@pytest.mark.parametrize("command", LAUNCHES)
def test_launch_commands(command):
    _, _, arguments = command.partition("train.py")
    parsed = HfArgumentParser(ADMMTrainingArguments).parse_args_into_dataclasses(shlex.split(arguments))
    assert str(parsed[0].pattern) == "2:4"
    if command.startswith("accelerate"):
        launch = launch_command_parser().parse_args(shlex.split(command)[2:])
        assert launch.num_processes == 2 and launch.training_script == "train.py"
        assert launch.multi_gpu or (launch.use_fsdp and launch.fsdp_version == "2")
        assert not launch.use_fsdp or launch.fsdp_state_dict_type in ("FULL_STATE_DICT", "SHARDED_STATE_DICT")


@pytest.mark.parametrize("page", TEXTS)
def test_links_and_files_exist(page):
    folder = (ROOT / page).parent
    prose = re.sub(r"^```.*?^```", "", TEXTS[page], flags=re.S | re.M)
    for link in re.findall(r"\]\((?!http|#|mailto:)([^)#]+)", prose):
        assert (folder / link).exists(), link
    for test in re.findall(r"`(tests/[\w/]+\.py)`", TEXTS[page]):
        assert (ROOT / test).exists(), test
