"""Two minutes with the README tell what this is, how to use and try it, what it gives and what it costs."""

import re

import pytest
from docs_pages import ROOT


README = (ROOT / "README.md").read_text(encoding="utf-8")
MOST_ROWS = 8


def block(mark):
    return re.search(rf"<!-- {mark}:start -->\n(.*?)<!-- {mark}:end -->", README, re.S)[1]


def command(mark):
    return re.search(rf"<!-- ci: {mark} -->\n```bash\n(.*?)```", README, re.S)[1].splitlines()


def test_it_begins_with_the_claim_and_the_change():
    title, claim, change = README.split("\n\n")[:3]
    assert title == "# hf-admm"
    assert "Replace `Trainer` by `ADMMTrainer`" in claim
    assert change.startswith("```diff\n- from transformers import Trainer")
    changed = re.search(r"```diff\n(.*?)```", README, re.S)[1]
    assert "+ from hf_admm import ADMMTrainer, ADMMTrainingArguments" in changed


@pytest.mark.parametrize(("mark", "end"), [("quickstart", "hf-admm quickstart"), ("test", "python -m pytest")])
def test_a_single_line_tries_it(mark, end):
    (line,) = command(mark)
    assert line.endswith(end)


@pytest.mark.parametrize("mark", ["results", "bench"])
def test_tables_are_read_at_a_glance(mark):
    lines = [line for line in block(mark).splitlines() if line.startswith("|")]
    assert len({line.count(" | ") for line in lines[2:]}) == 1
    assert 1 <= len(lines) - 2 <= MOST_ROWS


def test_the_order_of_the_sections():
    order = ["Try it", "What it gives", "How it works", "Patterns", "What it costs", "Where to go next", "Licence"]
    assert re.findall(r"^## (.*)$", README, re.M) == order
