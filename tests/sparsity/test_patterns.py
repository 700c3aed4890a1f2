"""Pattern strings: what they mean, and what a wrong one is answered with."""

import dataclasses

import pytest

from hf_admm.sparsity.patterns import ALLOWED_PATTERNS, BlockPattern, DensityPattern, NMPattern, parse_pattern


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2:4", NMPattern(2, 4)),
        ("1:4", NMPattern(1, 4)),
        ("4:8", NMPattern(4, 8)),
        ("2:8", NMPattern(2, 8)),
        ("4:4", NMPattern(4, 4)),
        ("16:32", NMPattern(16, 32)),
        (" 2:4 ", NMPattern(2, 4)),
        ("4x4:8", BlockPattern(4, 4, 8)),
        ("1x4:2", BlockPattern(1, 4, 2)),
        ("8x2:16", BlockPattern(8, 2, 16)),
        ("0.5", DensityPattern(0.5)),
        (".25", DensityPattern(0.25)),
        ("1e-2", DensityPattern(0.01)),
        (0.5, DensityPattern(0.5)),  # what a YAML file without quotes gives
    ],
)
def test_parse(text, expected):
    assert parse_pattern(text) == expected


@pytest.mark.parametrize("text", ["2:4", "1:4", "16:32", "4x4:8", "2x16:4", "0.5", "0.125"])
def test_str_is_what_was_parsed(text):
    pattern = parse_pattern(text)
    assert str(pattern) == text
    assert parse_pattern(str(pattern)) == pattern


@pytest.mark.parametrize(
    "text",
    [
        "",
        "half",
        "2",
        "2:",
        ":4",
        "2:4:8",
        "2/4",
        "-2:4",
        "2:-4",
        "2.0:4",
        "4x4",
        "4x:8",
        "4x4:",
        "4X4:8",
        "x4:8",
        "2 : 4",
    ],
)
def test_unparsable(text):
    with pytest.raises(ValueError, match="Invalid sparsity pattern"):
        parse_pattern(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("two of four", "none of the known forms"),
        ("0:4", "N is 0, which would prune every weight"),
        ("0:0", "N is 0"),
        ("5:4", "N = 5 kept of M = 4"),
        ("4x4:0", "K is 0, which would prune every weight"),
        ("4x4:17", r"K = 17 is more than the R\*C = 16 entries"),
        ("0x4:1", "a side of the block is 0"),
        ("4x0:1", "a side of the block is 0"),
        ("0.0", "between 0 and 1"),
        ("1.0", "between 0 and 1"),
        ("-0.5", "between 0 and 1"),
        ("1.5", "between 0 and 1"),
        ("nan", "between 0 and 1"),
        ("inf", "between 0 and 1"),
    ],
)
def test_an_error_says_what_was_given_why_not_and_what_is_allowed(text, reason):
    with pytest.raises(ValueError, match=reason) as error:
        parse_pattern(text)
    assert ALLOWED_PATTERNS in str(error.value)
    assert f"'{text}'" in str(error.value)


@pytest.mark.parametrize(
    "build",
    [lambda: NMPattern(0, 4), lambda: NMPattern(5, 4), lambda: BlockPattern(4, 4, 17), lambda: DensityPattern(1.0)],
)
def test_a_pattern_built_directly_is_checked_too(build):
    with pytest.raises(ValueError, match="Invalid sparsity pattern"):
        build()


@pytest.mark.parametrize(
    ("text", "density"), [("2:4", 0.5), ("1:4", 0.25), ("6:8", 0.75), ("4x4:8", 0.5), ("2x4:2", 0.25), ("0.3", 0.3)]
)
def test_density(text, density):
    assert parse_pattern(text).density == density


@pytest.mark.parametrize(
    ("density", "size", "kept"),
    [(0.5, 10, 5), (0.3, 10, 3), (0.25, 9, 2), (0.99, 100, 99), (0.01, 10, 1), (0.5, 1, 1)],
)
def test_a_density_keeps_the_rounded_share_and_at_least_one(density, size, kept):
    assert DensityPattern(density).kept_of(size) == kept


@pytest.mark.parametrize(
    ("text", "out_features", "in_features"), [("2:4", 3, 8), ("4x4:8", 8, 12), ("2x8:4", 2, 8), ("0.5", 3, 7)]
)
def test_fit(text, out_features, in_features):
    assert parse_pattern(text).misfit(out_features, in_features) is None


@pytest.mark.parametrize(
    ("text", "out_features", "in_features", "reason"),
    [
        ("2:4", 4, 6, "input dimension 6 is not a multiple of 4"),
        ("4x4:8", 6, 8, "output dimension 6 is not a multiple of 4"),
        ("4x4:8", 8, 6, "input dimension 6 is not a multiple of 4"),
        ("4x2:4", 5, 7, "output dimension 5 is not a multiple of 4 and input dimension 7 is not a multiple of 2"),
    ],
)
def test_misfit_names_each_dimension(text, out_features, in_features, reason):
    assert parse_pattern(text).misfit(out_features, in_features) == reason


@pytest.mark.parametrize("text", ["2:4", "4x4:8", "0.5"])
def test_patterns_are_immutable_and_hashable(text):
    pattern = parse_pattern(text)
    assert {pattern: 1}[parse_pattern(text)] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        pattern.kept = 1
