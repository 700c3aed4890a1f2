"""The reference has an entry for every public name, and for every command."""

import re

import pytest
from docs_pages import ROOT

import hf_admm
from hf_admm import callbacks, integrations
from hf_admm.cli import COMMANDS


REFERENCE = "\n".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs" / "reference").glob("*.md")))
ENTRIES = {path.rpartition(".")[2] for path in re.findall(r"^::: (\S+)", REFERENCE, re.M)}


@pytest.mark.parametrize("module", [hf_admm, callbacks, integrations], ids=lambda module: module.__name__)
def test_public_names_have_an_entry(module):
    names = {name for name in module.__all__ if not name.startswith("_")}
    assert names and not names - ENTRIES, f"give them an entry in docs/reference: {sorted(names - ENTRIES)}"


def test_commands_are_described():
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"\nhf-admm {name} " not in page] == []
