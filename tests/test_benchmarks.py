"""The benchmarks measure what they say, on tiny sizes, and their peers compute what we compute."""

import json
import statistics

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

from benchmarks import memory, peers, projection, scale, step_overhead, table
from benchmarks.common import interleave, ratios, row, summary, write_result
from benchmarks.trainers import FIRST_STEPS, PEERS, PHASES, HookTimer, Tokens, build, pruned_names, spread
from hf_admm import parse_pattern, sparsity_mask


@pytest.fixture
def bert(tiny_bert):
    return tiny_bert(num_labels=3)


# ---- Timing ----


def test_interleave_calls_each_contender_once_a_round():
    calls = []
    seconds = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=8, warmup=2)
    assert [sorted(calls[i : i + 2]) for i in range(0, 20, 2)] == [["a", "b"]] * 10
    assert len({tuple(calls[i : i + 2]) for i in range(0, 20, 2)}) == 2, "always in the same order"
    assert all(len(times) == 8 and min(times) > 0 for times in seconds.values())


def test_summary_holds_the_median_between_its_bounds():
    found = summary(ratios([2.0, 3.0, 4.0, 9.0, 1.0], [1.0] * 5))
    assert found["median"] == 3 and found["min"] == 1 and found["max"] == 9
    assert 1 <= found["low"] <= 3 <= found["high"] <= 9
    assert found["rounds"] == [2, 3, 4, 9, 1]


def test_spread_keeps_the_total_of_a_period():
    # Steps of 10 s, 1 s of it ours; every fourth takes 8 s more for the update.
    due = [index % 4 == 0 for index in range(8)]
    seconds, hooks = spread([18.0 if d else 10.0 for d in due], [9.0 if d else 1.0 for d in due], due, 4)
    assert seconds == [12.0] * 8 and hooks == [3.0] * 8
    _, hooks = spread([18.0, 10.0], [9.0, 1.0], [True, False], 64)
    assert hooks == [1.125] * 2


@pytest.mark.parametrize("name", PHASES)
def test_updates_are_due_when_the_benchmark_says_so(name, bert, tmp_path):
    first, period, updated = FIRST_STEPS[name], step_overhead.MEASURED_PERIOD, []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            updated.append(trainer.sparsity.phase.updated_at)

        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == first + 2 * period + 1

    flags = {"ours": {"admm_update_steps": period}, "per_device_train_batch_size": 2}
    trainer = build(name, bert, Tokens(8, 64), str(tmp_path), **flags)
    trainer.add_callback(Watch())
    trainer.train()
    assert list(dict.fromkeys(updated[first:])) == [first, first + period, first + 2 * period]


def test_spread_needs_an_update():
    with pytest.raises(ValueError, match="every 64 steps"):
        spread([1.0], [1.0], [False], 64)


# ---- Peers ----


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "4x4:8", "0.5"])
def test_masks_of_peers_are_ours_without_ties(pattern):
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    ours = sparsity_mask(weight, parse_pattern(pattern))
    rivals, left_out = peers.masks(weight, pattern)
    assert {"torch.topk", "NM-sparsity argsort", "WeightNormSparsifier"} <= set(rivals)
    if ":" in pattern and "x" not in pattern:
        assert "ASP" in rivals and ("PAT" in rivals or "torchao" in left_out["PAT"])
    for name, rival in rivals.items():
        assert torch.equal(rival() != 0, ours), name


def test_sparse_ste_passes_the_gradient_straight_through():
    weight = torch.randn(4, 8, requires_grad=True)
    mask = sparsity_mask(weight, parse_pattern("2:4"))
    output = peers.SparseSTE.apply(weight, 2, 4)
    assert torch.equal(output, weight * mask)
    output.backward(torch.ones_like(weight))
    assert torch.allclose(weight.grad, 1 + 2e-4 * ~mask * weight.detach())


def test_penalty_of_the_peer_is_ours(bert, tmp_path):
    data = Tokens(8, 64, size=32)
    flags = {"per_device_train_batch_size": 4}
    trainer = build("penalty in autograd", bert, data, str(tmp_path), **flags)
    inputs = {name: tensor[None] for name, tensor in data[0].items()}
    trainer.model.eval()
    plain = build("plain", bert, data, str(tmp_path), **flags)
    plain.model.eval()
    extra = trainer.compute_loss(trainer.model, inputs) - plain.compute_loss(plain.model, inputs)
    pruned = [bert.get_parameter(name) for name in pruned_names(bert)]
    squares = [(w[~sparsity_mask(w, parse_pattern("2:4"))] ** 2).sum() for w in pruned]
    assert extra.item() == pytest.approx(0.005 * sum(squares).item(), rel=1e-3)


# ---- Each benchmark ----


def test_projection():
    entry, _ = projection.measure("2:4", "fp32", threads=1, size=64, rounds=3)
    assert entry["at_least"] == 8 and len(entry["result"]["rounds"]) == 3
    assert entry["beside"][entry["fastest"]] == min(entry["beside"].values()) == entry["result"]["median"]
    assert set(entry["agreement"].values()) == {1.0}


def test_step_overhead(bert):
    rows, left_out = step_overhead.measure("2x8/2", bert, steps=9, names=("phase 1",))
    (entry,) = rows
    assert entry["figure"] == "step of phase 1, batch 2x8, accumulation 2" and not left_out
    assert len(entry["result"]["rounds"]) == 9 and entry["result"]["median"] > 0
    assert entry["by_hooks"]["median"] > 1


@pytest.mark.parametrize("name", PEERS)
def test_peers_train(bert, tmp_path, name):
    if name == "PAT":
        pytest.importorskip("torchao", reason="an extra of its own: bench")
    data = Tokens(8, 64, size=32)
    trainer = build(name, bert, data, str(tmp_path), max_steps=2)
    trainer.train()
    before, after = bert.get_parameter(pruned_names(bert)[0]), trainer.model.get_parameter(pruned_names(bert)[0])
    assert not torch.equal(before, after)
    if name == "PAT":
        assert torch.equal(sparsity_mask(after, parse_pattern("2:4")), after != 0)


def test_hook_timer_counts_nested_calls_once(bert, tmp_path):
    trainer = build("phase 2", bert, Tokens(8, 64, size=32), str(tmp_path), max_steps=3, logging_steps=1)
    timer = HookTimer(trainer)
    started = statistics.median([timer.take() for _ in range(3)])
    seconds = trainer.train().metrics["train_runtime"]
    assert started == 0 and 0 < timer.take() < seconds
    assert trainer.sparsity.phase.name == "sparse" and trainer.audit.ok


def test_memory(tiny_bert):
    bert = tiny_bert(hidden_size=128, intermediate_size=512, num_labels=3)
    figures = {name: memory.watch(name, 2, 8, bert) for name in ("plain", "phase 1", "phase 2")}
    assert figures["plain"]["held"] == 0
    # M is a bit an entry.
    assert figures["phase 1"]["held"] == pytest.approx(1 / 32 * figures["phase 1"]["pruned"], rel=0.01)
    assert figures["phase 2"]["held"] == pytest.approx(33 / 32 * figures["phase 2"]["pruned"], rel=0.01)
    rows = memory.compare(figures)
    assert [entry["figure"] for entry in rows[:2]] == ["state of phase 1", "state of phase 2"]
    for name in ("phase 1", "phase 2"):
        # By the allocations, a workspace of a size that is always the same comes on top.
        beyond = figures[name]["live"] - figures["plain"]["live"] - figures[name]["held"]
        assert -(2**16) < beyond < 2**22


def test_scale():
    runs = [[scale.train(kind, 64, 1, "sgd", scale.time.time())] for kind in ("plain", "ours")]
    rows = scale.compare("tiny", "sgd", *runs)
    assert all(entry["result"]["median"] > 0 for entry in rows)
    states = [entry["result"]["median"] for entry in rows if entry["figure"].startswith("state")]
    assert states == pytest.approx([1.0, 33 / 32], rel=0.01)


# ---- The tables ----


@pytest.fixture
def results(tmp_path):
    rows = [
        row("step of phase 1, batch 32x32", [1.01, 1.02, 1.03], at_most=1.03, beside={"PAT": 1.5}),
        row("projection 2:4, fp32, 1 thread", [5.0, 5.5, 6.0], at_least=8.0),
        row("a detail", [2.0], note="said only at length"),
    ]
    write_result("step_overhead", tmp_path / "results", 2, rows, {"PAT": "ImportError: No module named 'torchao'"})
    return table.load(tmp_path / "results")


def test_results_are_json_with_machine_and_rounds(results):
    (result,) = results
    assert result["machine"]["torch"] == torch.__version__ and result["machine"]["threads"] == 2
    assert result["rows"][0]["result"]["rounds"] == [1.01, 1.02, 1.03]
    assert result["command"].startswith("python -m benchmarks.step_overhead")


def test_short_table_shows_targets(results):
    text = table.short_table(results)
    assert "| step of phase 1, batch 32x32 | 1.020x | at most 1.03x, met | PAT 1.500 |" in text
    assert "| projection 2:4, fp32, 1 thread | 5.500x | at least 8x, **missed** |  |" in text
    assert "a detail" not in text
    assert "python -m benchmarks.step_overhead" in text and "2 threads" in text


def test_long_table_shows_everything(results):
    text = table.long_table(results)
    assert "said only at length" in text and "1.010 to 1.030" in text
    assert "Left out: PAT (ImportError: No module named 'torchao')" in text


def test_tables_replace_only_what_is_between_the_markers(results, tmp_path):
    readme, page = tmp_path / "README.md", tmp_path / "benchmarks.md"
    readme.write_text(f"before\n\n{table.START}\nold\n{table.END}\n\nafter\n")
    for _ in range(2):
        table.write(results, readme, page)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert text.count("step of phase 1") == page.read_text().count("step of phase 1") == 1


def test_a_readme_without_markers_is_left(results, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("no table here\n")
    table.write(results, readme, tmp_path / "benchmarks.md")
    assert readme.read_text() == "no table here\n" and "left as it is" in capsys.readouterr().out


def test_broken_markers_are_refused():
    with pytest.raises(ValueError, match="once each"):
        table.replace_between(f"{table.END} {table.START}", "")


def test_results_that_are_there_make_the_tables():
    results = table.load(table.RESULTS)
    assert json.dumps(results) and table.short_table(results) and table.long_table(results)


def test_models_without_the_package_have_the_size(monkeypatch):
    from benchmarks import trainers

    def missing(*_):
        raise ValueError

    monkeypatch.setattr(trainers, "packaged_file", missing)
    monkeypatch.setattr(
        trainers.AutoModelForSequenceClassification,
        "from_config",
        lambda config: BertForSequenceClassification(BertConfig(**config.to_diff_dict() | {"vocab_size": 64})),
    )
    model, label = trainers.minilm()
    assert "random" in label and model.config.hidden_size == 384
