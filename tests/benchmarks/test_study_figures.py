"""Means, intervals and pairs, against scipy's own tests and by hand."""

import numpy as np
import pytest
from scipy import stats

from benchmarks.study.figures import Study, estimate


def test_estimate_is_scipys_interval():
    values = [1.0, 2.5, 0.5, 4.0]
    found, by_test = estimate(values), stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((by_test.low, by_test.high))
    assert found.mean == 2.0 and found.count == 4
    assert found.error == pytest.approx(np.std(values, ddof=1) / 2)


def test_estimate_of_one_value_has_no_interval():
    found = estimate([0.7])
    assert (found.mean, found.error, found.low, found.high) == (0.7, None, None, None)
    assert found.verdict() == "no interval"
    assert estimate([]) is None


def test_estimate_of_equal_values_has_a_point():
    found = estimate([2.0, 2.0, 2.0])
    assert (found.low, found.mean, found.high, found.error) == (2, 2, 2, 0)
    two = estimate([0.92, 0.92 + 1e-14])
    assert two.low is two.high is None and two.verdict() == "no interval", "of two, chance makes them equal"


@pytest.mark.parametrize(
    ("values", "verdict"), [([1, 1.1, 0.9], "above"), ([-1, -1.1, -0.9], "below"), ([1, -1, 0.5], "not told apart")]
)
def test_verdict_is_by_the_interval(values, verdict):
    assert estimate(values).verdict() == verdict


def test_differences_are_paired_by_task_and_seed(make_line):
    ours = {("mrpc", 1): 0.80, ("mrpc", 2): 0.84, ("cola", 1): 0.50, ("cola", 3): 0.9}
    other = {("mrpc", 1): 0.79, ("mrpc", 2): 0.80, ("cola", 1): 0.44, ("cola", 2): 0.1}
    lines = [make_line("ours", value, task, seed) for (task, seed), value in ours.items()]
    lines += [make_line("asp", value, task, seed) for (task, seed), value in other.items()]
    lines += [make_line("asp", 0.0, "mrpc", 1, pattern="1:4")]
    found = Study(lines).difference("ours", "asp", "2:4")
    assert found.count == 3 and found.mean == pytest.approx((1 + 4 + 6) / 3)
    expected = stats.ttest_rel([80, 84, 50], [79, 80, 44]).confidence_interval()
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert Study(lines).difference("ours", "asp", "2:4", "mrpc").mean == pytest.approx(2.5)
    assert Study(lines).difference("ours", "pat", "2:4") is None


def test_runs_of_two_precisions_are_both_counted_and_not_paired(make_line):
    single = {"max_steps": -1, "bf16": False, "learning_rate": 1e-4}
    lines = [make_line("ours", 0.8), make_line("ours", 0.7, arguments=single), make_line("asp", 0.5)]
    found = Study(lines).difference("ours", "asp", "2:4")
    assert found.count == 1 and found.mean == pytest.approx(30)
    assert sorted(Study(lines).values("ours", "2:4").values()) == [0.7, 0.8]
    assert Study([*lines, make_line("asp", 0.6, arguments=single)]).difference("ours", "asp", "2:4").count == 2


def test_share_is_the_mean_over_tasks(make_line):
    lines = [make_line("dense", value, task, 1) for task, value in (("mrpc", 0.8), ("cola", 0.4))]
    lines += [make_line("dense", 0.8, "mrpc", 2)]
    lines += [make_line("ours", 0.8, "mrpc", seed) for seed in (1, 2)] + [make_line("ours", 0.2, "cola", 1)]
    found = Study(lines).share("ours", "2:4")
    assert found.mean == pytest.approx(0.75)  # of 1 and 0.5, though MRPC has two seeds
    pairs = stats.ttest_1samp([1, 1, 0.5], 0).confidence_interval()
    assert found.high - found.low == pytest.approx(pairs.high - pairs.low)
    assert (found.low + found.high) / 2 == pytest.approx(0.75)


def test_a_dense_model_that_learned_nothing_gives_no_share(make_line):
    assert Study([make_line("dense", 0.0), make_line("ours", 0.1)]).share("ours", "2:4") is None


def test_the_best_rate_counts_among_those_with_most_seeds(make_line):
    lines = [make_line("dense", value, seed=seed) for seed, value in ((1, 0.80), (2, 0.82))]
    lines += [make_line("dense", value, seed=seed, rate=0.5) for seed, value in ((1, 0.81), (2, 0.83))]
    lines += [make_line("dense", 0.99, seed=1, rate=2.0)]
    study = Study(lines)
    assert study.values("dense", "2:4") == {("mrpc", 1, True): 0.81, ("mrpc", 2, True): 0.83}
    assert study.rates["dense", "none", "mrpc"] == [0.5, 1.0, 2.0]


def test_the_better_dense_method_is_the_reference(make_line):
    lines = [make_line("dense", 0.80), make_line("dense", 0.99, seed=2), make_line("dense_averaged", 0.85)]
    assert Study(lines).reference == "dense_averaged"  # on seed 1, which both have
    assert Study(lines[:2]).reference == "dense" and Study([make_line("ours", 1.0)]).reference is None


def test_lines_of_earlier_settings_quick_and_tuning_runs_do_not_count(make_line):
    old = {"max_steps": -1, "bf16": True, "learning_rate": 1e-4, "admm_rho": 0.01}
    lines = [make_line("ours", 0.1, seed=seed, arguments=old) for seed in (1, 2)]
    lines += [make_line("ours", 0.8), make_line("ours", 0.2, rows=[640, 200])]
    lines += [make_line("ours", 0.3, judged_on="held-out training rows")]
    lines += [make_line("ours", 0.4, arguments=old | {"max_steps": 20})]
    study = Study(lines)
    assert study.values("ours", "2:4") == {("mrpc", 1, True): 0.8}
    assert study.unused == {"quick or tuning runs": 3, "runs with earlier settings": 2}


def test_undefined_metrics_are_left_out_and_kept_in_mind(make_line):
    study = Study([make_line("ours", None), make_line("ours", 0.5, seed=2)])
    assert study.values("ours", "2:4") == {("mrpc", 2, True): 0.5}
    assert [line["seed"] for line in study.undefined] == [1]


def test_missing_names_what_the_grid_lacks(make_line):
    lines = [make_line("ours", 0.5, task, seed) for task in ("mrpc", "cola") for seed in (1, 2)]
    lines += [make_line("asp", 0.5, "mrpc", seed) for seed in (1, 2)] + [make_line("dense", 0.5, "mrpc", 1)]
    assert Study(lines).missing(["dense", "ours", "asp"]) == [
        "dense: cola seeds 1, 2; mrpc seeds 2",
        "asp at 2:4: cola seeds 1, 2",
    ]
    assert Study(lines).missing(["sr_ste", "pat"]) == ["at 2:4 on any task: sr_ste, pat"]
