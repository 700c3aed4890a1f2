"""The docs say what the lines say, and no more."""

import pytest

from benchmarks import accuracy
from benchmarks.study import report
from benchmarks.study.lines import append
from benchmarks.study.methods import METHODS


PHASE_1 = {
    **{"primal_start": 0.3, "primal_switch": 0.04, "flips_mean": 0.001, "flips_most": 0.002, "cut_start": 0.35},
    **{"cut_switch": 0.045, "switch_metric": 0.79, "share_of_final": 0.975},
}


@pytest.fixture
def lines(make_line):
    made = []
    for seed in (1, 2, 3):
        noise = 0.001 * seed
        for task, level in (("cola", 0.5), ("mrpc", 0.8)):
            made.append(make_line("dense", level + noise, task, seed))
            made.append(make_line("ours", level + noise, task, seed, phase_1=PHASE_1))
            made.append(make_line("asp", level - 0.02, task, seed))
            made.append(make_line("rho0", level + noise * (-1) ** seed, task, seed))
    return [*made, make_line("ours", 0.7, "mrpc", 1, pattern="1:4")]


def test_page_has_every_method_with_error_share_and_interval(lines):
    text = report.page(lines)
    assert "| | cola (accuracy) | mrpc (accuracy) | share of dense | ours less this, points |" in text
    assert "| dense | 50.20 ± 0.06 | 80.20 ± 0.06 |  | +0.00 [+0.00, +0.00] |" in text
    assert "| ours | 50.20 ± 0.06 | 80.20 ± 0.06 | 100.0% [100.0, 100.0] |  |" in text
    assert "| ASP | 48.00 ± 0.00 | 78.00 ± 0.00 |" in text and "+2.20 [+2.11, +2.29]" in text
    assert "| ours | mrpc | 35 % | 4.5 % | 4 % | 0.1 % | 0.2 % | 97.5 % |" in text
    assert "3 seeds (1, 2, 3)" in text and "a processor, 1 threads" in text and "torch 2.0, transformers 5.0" in text
    assert text.startswith("# Results\n") and "python -m benchmarks.accuracy --report" in text


def test_claims_follow_the_intervals(lines):
    text = report.page(lines)
    assert "- Ours is better than ASP (+2.20 [+2.11, +2.29])." in text
    assert "- Ours is not told apart from rho 0, SR-STE (+0.27 [" in text
    assert "What ADMM adds" not in text
    two = [{**line, "method": "two_phases"} for line in lines if line["method"] == "ours"]
    added = "- What ADMM adds in phase 1, ADMM, SR-STE less rho 0, SR-STE: cola +0.27 ["
    assert added in (told := report.page([*lines, *two])) and "; mrpc +0.27 [" in told
    assert "worse than" not in text
    part = text[text.index("## 1:4") :]
    assert "Nothing to compare yet." in part[: part.index("##", 5)]


def test_what_was_judged_on_further_rows_has_a_table_of_its_own(make_line):
    def judged(method, seed, value):
        return make_line(method, 0.5, "sst2", seed, further={"rows": 20_000, "accuracy": value, "loss": 1.0})

    made = [
        judged(method, seed, value + 0.001 * seed)
        for method, value in {"ours": 0.9, "rho0": 0.88}.items()
        for seed in (1, 2)
    ]
    made += [judged("dense", 1, 0.95), make_line("ours", 0.5, "sst2", 3), make_line("asp", 0.5, "sst2", 1)]
    text = report.page(made)
    assert "On 20,000 further rows of sst2's training file" in text
    assert "| ours | 90.15 ± 0.05 | 2 |  |" in text
    assert "| rho 0, SR-STE | 88.15 ± 0.05 | 2 | +2.00, no interval |" in text
    assert "| dense | 95.00 | 1 | -4.90, no interval |" in text
    assert text.count("| ASP |") == 1, "ASP was not judged on further rows"
    assert "are phrases of sentences" in text, "what is particular to SST-2"
    other = [{**line, "task": "qqp"} for line in made]
    assert "further rows of qqp" in report.page(other) and "phrases" not in report.page(other)
    assert "further rows" not in report.page([make_line("ours", 0.9), judged("dense", 1, 0.9)])


def test_defaults_that_have_changed_are_told(make_line):
    old = {"max_steps": -1, "bf16": True, "learning_rate": 1e-4, "mask_update_steps": 1, "admm_steps": 0.6}
    text = report.page([make_line("two_phases", 0.8, arguments=old), make_line("dense", 0.8, arguments=old)])
    assert "Not the defaults of today: `mask_update_steps=1` in 1 runs." in text
    few = {**old, "mask_update_steps": None, "num_calibration_samples": 256}
    text = report.page([make_line("sparsegpt", 0.8, arguments=few), make_line("dense", 0.8, arguments=old)])
    assert "Not the defaults of today: `num_calibration_samples=256` in 1 runs." in text
    assert "Not the defaults" not in report.page([make_line("ours", 0.8)])


def test_a_single_pair_makes_no_claim(make_line):
    text = report.page([make_line("dense", 0.8), make_line("ours", 0.9), make_line("asp", 0.1)])
    assert "Ours is no interval, so nothing is said, against ASP (+80.00, no interval)." in text
    assert "better than" not in text and "above dense" not in text
    assert "Only 1 seed:" in text


def test_what_is_missing_is_said(lines, make_line):
    lines += [make_line("ours", None, "cola", 1, pattern="1:4"), make_line("asp", 0.5, "cola", 1, rows=[1, 1])]
    lines += [make_line("sr_ste", 0.5, "cola", 1, broken_groups=7, source="xyz")]
    text = report.page(lines)
    missing = text[text.index("## What is missing") :]
    never = "dense, averaged, dense, one schedule, ADMM, SR-STE, ours with a teacher, ADMM, SR-STE with a teacher"
    never += ", taught by its phase 1, ours after a dense half, ADMM, fixed mask, SparseGPT, fixed mask"
    never += ", ours, by SparseGPT, layer-wise ADMM, fixed mask"
    assert f"Never run: {never}, layer-wise ADMM, SR-STE, PAT." in missing
    assert "Not run: ours at 1:4: cola seeds 1, 2, 3; mrpc seeds 2, 3." in missing
    assert "Undefined metric: ours, cola, seed 1." in missing
    assert "Left out: 1 quick or tuning runs." in missing and "7 broken groups" in missing
    assert "2 states of the library's code" in text


def test_rates_that_were_tried_are_said(lines, make_line):
    lines += [make_line("dense", 0.9, "mrpc", seed, rate=0.5) for seed in (1, 2, 3)]
    assert "Rates run: 0.5, 1 times the task's; taken: cola 1, mrpc 0.5." in report.page(lines)


def test_short_table_has_at_most_so_many_rows(lines, make_line, monkeypatch):
    assert "2 tasks of GLUE, 3 seeds, equal" in report.short_table(
        [line for line in lines if line["pattern"] != "1:4"]
    )
    lines += [make_line(name, 0.5, "mrpc", 1) for name in METHODS]
    text = report.short_table(lines)
    assert text.splitlines()[0] == "| | cola (accuracy) | mrpc (accuracy) | share of dense |"
    assert "| ASP, 2:4 | " in text and "95 % intervals" in text and "2 tasks of GLUE, 3 seeds" in text
    assert sum(line.startswith("| ") for line in text.splitlines()) == 2 + 4, "those of one run are left out"
    more = [make_line(name, 0.5, "mrpc", 2) for name in METHODS if name not in ("dense", "ours", "asp", "rho0")]
    text = report.short_table(lines + more)
    assert sum(line.startswith("| ") for line in text.splitlines()) == 2 + 8
    assert "2 tasks of GLUE, 2 to 3 seeds a figure" in text
    both = [{**lines[0], "arguments": {**lines[0]["arguments"], "bf16": not lines[0]["arguments"]["bf16"]}}]
    assert "2 to 3 seeds a figure, some in float32 and bf16" in report.short_table([*lines, *more, *both])
    monkeypatch.setattr(report, "README_ROWS", 3)
    assert sum(line.startswith("| ") for line in report.short_table(lines).splitlines()) == 2 + 3


def test_ours_of_every_pattern_comes_first_in_the_short_table(lines, make_line):
    lines += [make_line("ours", 0.7, "cola", 1, pattern="1:4")]
    first = [line.split(" | ")[0] for line in report.short_table(lines).splitlines()[2:6]]
    assert first == ["| dense", "| ours, 2:4", "| ours, 1:4", "| rho 0, SR-STE, 2:4"]
    lines += [make_line("ours_teacher", 0.7, "cola", 1, pattern="1:4")]
    first = [line.split(" | ")[0] for line in report.short_table(lines).splitlines()[2:7]]
    assert first[3:] == ["| ours with a teacher, 1:4", "| rho 0, SR-STE, 2:4"]


def test_no_results_make_no_table(tmp_path):
    assert report.EMPTY in report.page([])
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.START}\nold\n{report.END}\n")
    report.write([], tmp_path / "docs", readme)
    assert "old" in readme.read_text()


def test_the_command_writes_docs_and_readme(lines, tmp_path, capsys):
    results, docs, readme = tmp_path / "accuracy.jsonl", tmp_path / "docs", tmp_path / "README.md"
    for line in lines:
        append(results, line)
    where = ["--report", "--results", str(results), "--docs", str(docs), "--readme", str(readme)]
    readme.write_text("no place for it\n")
    accuracy.main(where)
    assert "left as it is" in capsys.readouterr().out and readme.read_text() == "no place for it\n"
    readme.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        accuracy.main(where)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert text.count("| ASP, 2:4 |") == 1 and "## 2:4" in (docs / "results.md").read_text()


def test_plots_are_drawn_and_shown(lines, tmp_path):
    pytest.importorskip("matplotlib", reason="an extra of its own: bench")
    readme = tmp_path / "README.md"
    readme.write_text("")
    report.write(lines, tmp_path, readme)
    plot = tmp_path / "figures" / "share_of_dense_2_4.png"
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "](figures/share_of_dense_2_4.png)" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize("text", ["", report.START, f"{report.END} {report.START}", 2 * (report.START + report.END)])
def test_broken_markers_are_refused(text):
    with pytest.raises(ValueError, match="once each"):
        report.replace_between(text, "")
