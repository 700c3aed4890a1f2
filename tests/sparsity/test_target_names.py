"""Naming the weights to prune: sparsity_include, sparsity_exclude, and layers that the pattern does not fit."""

import re

import pytest
from torch import nn

from hf_admm.sparsity.patterns import parse_pattern
from hf_admm.sparsity.targets import matches, select_targets


PATTERN = parse_pattern("2:4")
BERT_LAYER = [
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
]


def reasons(selection):
    """The names that are left dense, by reason."""
    grouped = {}
    for name, (_, reason) in selection.left_out.items():
        grouped.setdefault(reason, set()).add(name)
    return grouped


def modules(selection):
    return [name.removesuffix(".weight") for name in selection.targets]


# ---- include and exclude ----


@pytest.mark.parametrize(
    ("name", "names", "expected"),
    [
        ("encoder.layer.0.query", ["query"], True),
        ("query", ["query"], True),
        ("encoder.layer.0.query", ["0.query"], True),
        ("encoder.layer.0.subquery", ["query"], False),  # whole parts of a name only
        ("encoder.layer.0.query", ["layer"], False),  # a suffix, not any part
        ("encoder.layer.10.query", ["0.query"], False),
        ("encoder.layer.0.query", ["quer."], False),  # no regular expressions in a list
        ("encoder.layer.0.query", [], False),
        ("encoder.layer.0.query", r".*\.query", True),
        ("encoder.layer.0.query", "query", False),  # the whole name must match
        ("encoder.layer.0.query", r"encoder\.layer\.0", False),
    ],
)
def test_matches_follows_the_convention_of_peft(name, names, expected):
    assert matches(name, names) is expected


@pytest.mark.parametrize("include", [["query", "value"], r".*\.(query|value)"])
def test_include_replaces_the_default(include, tiny_bert):
    selection = select_targets(tiny_bert(num_hidden_layers=1), PATTERN, include=include)
    assert modules(selection) == [f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "value")]
    assert "bert.encoder.layer.0.attention.self.key.weight" in reasons(selection)["not in sparsity_include"]


def test_include_reaches_heads_and_what_is_outside_the_layers(tiny_bert):
    # The defaults protect them; who names them wants them pruned.
    selection = select_targets(tiny_bert(), PATTERN, include=["pooler.dense", "classifier"])
    assert modules(selection) == ["bert.pooler.dense", "classifier"]


@pytest.mark.parametrize("exclude", [["query", "0.intermediate.dense"], r".*\.query|.*\.0\.intermediate\.dense"])
def test_exclude_takes_away_from_the_default(exclude, tiny_bert):
    everything = set(select_targets(tiny_bert(), PATTERN).targets)
    selection = select_targets(tiny_bert(), PATTERN, exclude=exclude)
    gone = {f"bert.encoder.layer.{layer}.attention.self.query.weight" for layer in (0, 1)}
    gone.add("bert.encoder.layer.0.intermediate.dense.weight")
    assert everything - set(selection.targets) == gone
    assert reasons(selection)["excluded by sparsity_exclude"] == gone


def test_exclude_wins_over_include(tiny_bert):
    selection = select_targets(tiny_bert(), PATTERN, include=["query", "key"], exclude=r".*layer\.0.*")
    assert modules(selection) == [f"bert.encoder.layer.1.attention.self.{name}" for name in ("query", "key")]


def test_excluding_what_is_dense_anyway_is_no_error(tiny_bert):
    selection = select_targets(tiny_bert(), PATTERN, exclude=["classifier", "word_embeddings"])
    assert len(selection.targets) == 12


@pytest.mark.parametrize("flag", ["include", "exclude"])
def test_misspelt_names_are_all_named(flag, tiny_bert):
    names = ["query", "qeury", "valeu"]
    with pytest.raises(ValueError, match=f"sparsity_{flag} matches no layer with: qeury, valeu") as error:
        select_targets(tiny_bert(), PATTERN, **{flag: names})
    # And what could have been meant.
    assert "end in: classifier, dense, key, query, value." in str(error.value)


@pytest.mark.parametrize("flag", ["include", "exclude"])
@pytest.mark.parametrize("names", [["layer.0"], r".*\.qeury"])
def test_what_would_have_no_effect_is_an_error(flag, names, tiny_bert):
    # A suffix names layers, not the blocks around them: to take it and prune the block all the same would be silent.
    shown = re.escape(names if isinstance(names, str) else names[0])
    with pytest.raises(ValueError, match=rf"sparsity_{flag} matches no layer with: {shown}\..*for all within a block"):
        select_targets(tiny_bert(), PATTERN, **{flag: names})


@pytest.mark.parametrize("flag", ["include", "exclude"])
def test_a_broken_regular_expression(flag, tiny_bert):
    with pytest.raises(ValueError, match=rf"sparsity_{flag} is not a regular expression: '\.\*\(query' \(.*\)"):
        select_targets(tiny_bert(), PATTERN, **{flag: ".*(query"})


def test_no_layer_matched(tiny_bert):
    with pytest.raises(ValueError, match="No layer of BertForSequenceClassification matched") as error:
        select_targets(tiny_bert(num_hidden_layers=1), PATTERN, exclude=".*encoder.*")
    message = str(error.value)
    assert "sparsity_exclude='.*encoder.*'" in message
    assert "6 excluded by sparsity_exclude" in message and "2 head" in message
    assert "sparsity_include" in message and "sparsity_pattern='none'" in message


def test_no_layer_matched_by_an_empty_list(tiny_bert):
    with pytest.raises(ValueError, match=r"No layer .*sparsity_include=\[\].*; left out: 3 embedding, 14 not in"):
        select_targets(tiny_bert(), PATTERN, include=[])


def test_a_model_without_matrices():
    with pytest.raises(ValueError, match="No layer of LayerNorm matched.*it has no matrices"):
        select_targets(nn.LayerNorm(4), PATTERN)


# ---- Fit ----


def advice(error):
    """The value that the message recommends for --sparsity_exclude."""
    return re.search(r"--sparsity_exclude (.*), or choose a pattern", str(error.value)).group(1)


def test_all_misfits_are_named_and_the_advice_works(tiny_bert):
    # 4:32 divides the inputs of output.dense alone, which are 32.
    model, pattern = tiny_bert(), parse_pattern("4:32")
    with pytest.raises(ValueError, match="Pattern 4:32 does not fit 10 of 12 layers") as error:
        select_targets(model, pattern)
    misfits = [f"bert.encoder.layer.{layer}.{name}" for layer in (0, 1) for name in BERT_LAYER[:-1]]
    for name in misfits:
        assert f"  {name}: input dimension 16 is not a multiple of 32\n" in str(error.value)
    selection = select_targets(model, pattern, exclude=advice(error).split())
    assert modules(selection) == [f"bert.encoder.layer.{layer}.output.dense" for layer in (0, 1)]
    assert {name.removesuffix(".weight") for name in reasons(selection)["excluded by sparsity_exclude"]} == {*misfits}


def test_the_advice_keeps_what_was_excluded_already(tiny_bert):
    # The flag given again replaces its value, so the advice must hold the old names too.
    model, pattern = tiny_bert(), parse_pattern("4:32")
    first = ["bert.encoder.layer.0.output.dense", "query"]
    with pytest.raises(ValueError, match="does not fit 8 of 9 layers") as error:
        select_targets(model, pattern, exclude=first)
    names = advice(error).split()
    assert names[:2] == first
    assert modules(select_targets(model, pattern, exclude=names)) == ["bert.encoder.layer.1.output.dense"]


def test_the_advice_keeps_a_regular_expression(tiny_bert):
    model, pattern = tiny_bert(), parse_pattern("4:32")
    with pytest.raises(ValueError, match="does not fit 8 of 9 layers") as error:
        select_targets(model, pattern, exclude=r".*\.query|.*layer\.0\.output\.dense")
    expression = advice(error)
    assert expression[0] == expression[-1] == "'"  # the shell takes it as one word
    selection = select_targets(model, pattern, exclude=expression.strip("'"))
    assert modules(selection) == ["bert.encoder.layer.1.output.dense"]


def test_where_nothing_fits_excluding_is_no_advice(tiny_bert):
    with pytest.raises(ValueError, match="does not fit 12 of 12 layers(.|\n)*Choose a pattern that divides") as error:
        select_targets(tiny_bert(), parse_pattern("1:3"))
    assert "--sparsity_exclude" not in str(error.value)


def test_a_block_names_both_dimensions(tiny_bert):
    with pytest.raises(ValueError, match="output dimension 16 is not a multiple of 5 and input dimension 16 is not"):
        select_targets(tiny_bert(), parse_pattern("5x3:4"))


def test_only_targets_must_fit(tiny_bert):
    # A head of 3 outputs fits no block of 4 rows, and is none of its business.
    model = tiny_bert(num_labels=3)
    assert len(select_targets(model, parse_pattern("4x4:8")).targets) == 12
