"""Runs of the study on a tiny model: each method trains as it says, and a stopped study goes on."""

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from benchmarks.study import runs
from benchmarks.study.methods import METHODS, choose, left_out
from benchmarks.study.runs import Spec, execute
from benchmarks.study.tasks import further, judged, recipe
from benchmarks.study.training import AVERAGED, Averaging, TwoSegmentTrainer, build, learning_rates, phase_1_figures
from hf_admm import ADMMTrainer, ADMMTrainingArguments
from hf_admm.finetuning.tasks import TextTask
from tests.tiny_runs import weights


FLAGS = {"admm_update_steps": 2, "admm_steps": 0.5}


def spec(method, seed=1, **changed):
    pattern = "none" if METHODS[method].dense else "2:4"
    return Spec("sst2", method, **{"pattern": pattern, "seed": seed, "max_steps": 12, "flags": FLAGS} | changed)


# ---- The data ----


def made_up(rows):
    train = Dataset.from_dict({"sentence1": [str(i) for i in range(rows)], "label": [0] * rows})
    return TextTask("made up", train, {"validation": train.select(range(5))}, dict, "accuracy", ("a", "b"))


def test_a_small_task_is_trained_whole_and_tuned_on_15_percent_of_it():
    task = made_up(100)
    assert judged(task, tune=False) is task
    tuned = judged(task, tune=True)
    held_out = tuned.evaluations["held_out"]["sentence1"][:]
    assert len(tuned.train) == 85 and len(held_out) == 15
    assert not set(held_out) & set(tuned.train["sentence1"][:])
    assert held_out == judged(task, tune=True).evaluations["held_out"]["sentence1"][:]


def test_a_large_task_is_cut_and_tuned_on_others_of_its_rows():
    plain, tuned = (judged(made_up(30_000), tune) for tune in (False, True))
    assert plain.train["sentence1"][:] == tuned.train["sentence1"][:] and len(plain.train) == 16_000
    assert len(plain.evaluations["validation"]) == 5
    held_out = tuned.evaluations["held_out"]["sentence1"][:]
    assert len(held_out) == 10_000 and not set(held_out) & set(tuned.train["sentence1"][:])


def test_further_rows_of_a_large_task_are_neither_trained_on_nor_tuned_on():
    task = made_up(40_000)
    rows = further(task)["sentence1"][:]
    tuned = judged(task, tune=True)
    used = {*tuned.train["sentence1"][:], *tuned.evaluations["held_out"]["sentence1"][:]}
    assert len(rows) == len(set(rows)) == 14_000 and not used & set(rows)
    assert len(further(made_up(60_000))) == 20_000
    assert further(made_up(26_000)) is None and further(made_up(100)) is None


# ---- What defines a run ----


def test_keys_differ_by_all_that_matters():
    base = spec("ours")
    others = [spec("ours", **change) for change in ({"seed": 2}, {"pattern": "1:4"}, {"rate": 2.0}, {"tune": True})]
    others += [spec("ours", **change) for change in ({"label": "x"}, {"max_steps": 13}, {"bf16": True})]
    others += [spec("ours", flags=FLAGS | {"admm_rho": 0.5}), spec("ours", rows=(8, 8)), spec("asp"), spec("rho0")]
    assert len({base.key, *(other.key for other in others)}) == len(others) + 1
    assert base.key == spec("ours").key


def test_a_dense_half_is_not_taken_for_a_penalty_of_its_length():
    """Which has the same flags but for the rho that is taken."""
    dense = Spec("cola", "ours", "1:4", 1)
    pulled = Spec("cola", "ours", "1:4", 1, flags={"admm_steps": 0.5, "num_calibration_samples": 1024})
    assert dense.key != pulled.key and dense.phase_1_key != pulled.phase_1_key
    assert dense.settings["arguments"]["admm_rho"] == 0.0 and pulled.settings["arguments"]["admm_rho"] is None
    assert dense.settings["arguments"]["admm_steps"] == 0.5


def test_dense_runs_are_made_anew_for_another_schedule_alone():
    base = spec("dense").key
    stronger = {"admm_penalty": "distance", "admm_rho": 20.0, "srste_decay": 0.1}
    assert spec("dense", flags=FLAGS | stronger).key == base
    assert spec("dense", flags=FLAGS | {"srste_lr_multiplier": 3.0}).key != base
    assert spec("dense", flags={"admm_steps": 0.3}).key != base


def test_methods_share_a_phase_1_if_they_differ_after_it():
    assert spec("ours").phase_1_key == spec("admm_fixed").phase_1_key is not None
    assert spec("rho0").phase_1_key == spec("asp").phase_1_key != spec("ours").phase_1_key
    assert spec("ours").phase_1_key != spec("admm_fixed", seed=2).phase_1_key
    assert not spec("sr_ste").phase_1_key and not spec("dense").phase_1_key


def test_methods_are_looked_up():
    assert list(choose(["asp", "dense"])) == ["asp", "dense"]
    assert "ours" in choose()
    with pytest.raises(ValueError, match="Unknown methods: best. Allowed: dense, "):
        choose(["best"])


def test_methods_that_lack_something_are_left_out(monkeypatch):
    monkeypatch.setattr("benchmarks.study.methods.left_out", lambda: {"pat": "torchao is not installed"})
    assert "pat" not in choose()
    with pytest.raises(ValueError, match=r"pat \(torchao is not installed\). Leave them out"):
        choose(["pat"])


# ---- Training ----


class Rates(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        self.seen += lr_scheduler.get_last_lr()[:1]


@pytest.mark.parametrize("method", ["dense", "rho0", "asp", "admm_fixed"])
def test_methods_have_the_learning_rates_of_ours(method, tiny_bert, token_data, tmp_path):
    arguments = {"output_dir": str(tmp_path), "max_steps": 10, "use_cpu": True, "report_to": "none", "warmup_steps": 2}
    arguments |= {"admm_lr_scheduler_type": "constant_with_warmup", "srste_lr_multiplier": 2.0}
    found = []
    for name in (method, "ours"):
        flags = arguments | METHODS[name].flags
        trainer = build(METHODS[name], "2:4", flags, tiny_bert(), None, train_dataset=token_data(64))
        trainer.add_callback(rates := Rates())
        if name != "dense":
            trainer.eval_dataset = token_data(8)
        trainer.train()
        found.append(rates.seen)
    assert found[0] == found[1] and len(found[0]) == 10
    assert max(found[0]) > 1.5 * found[0][3], "there is no second segment"
    args = ADMMTrainingArguments(**arguments)
    assert [5e-5 * share for share in learning_rates(args, 10)] == pytest.approx(found[0])


def test_averaging_takes_the_mean_of_the_last_part(tiny_bert, token_data, tmp_path):
    args = {"output_dir": str(tmp_path), "max_steps": 20, "use_cpu": True, "report_to": "none", "learning_rate": 1e-2}
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(weights(model))

    trainer = build(METHODS["dense_averaged"], "2:4", args, tiny_bert(), None, train_dataset=token_data(64))
    assert any(isinstance(callback, Averaging) for callback in trainer.callback_handler.callbacks)
    trainer.add_callback(Watch())
    trainer.train()
    last = seen[-round(AVERAGED * 20) :]
    assert len(last) == 2
    for name, weight in weights(trainer.model).items():
        assert torch.allclose(weight, sum(step[name] for step in last) / 2, atol=1e-6), name
        assert "classifier.weight" not in name or not torch.allclose(weight, last[-1][name], atol=1e-5)


def test_kinds_of_trainers(tiny_bert, token_data, tmp_path):
    args = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    data = token_data(8)

    def made(name):
        flags = args | METHODS[name].flags
        encode = lambda rows: {"input_ids": torch.stack([data[row]["input_ids"] for row in rows])}  # noqa: E731
        return build(METHODS[name], "2:4", flags, tiny_bert(), encode, train_dataset=data)

    assert isinstance(made("dense"), TwoSegmentTrainer) and not isinstance(made("dense"), ADMMTrainer)
    assert made("ours").args.calibration_samples == 1024 and made("ours").args.lr_multiplier == 1
    assert made("two_phases").args.calibration_samples == 0 and made("two_phases").args.phase_1_length == 0.6
    assert made("sr_ste").args.admm_steps == 0 and made("sr_ste").args.srste_mask == "dynamic"
    assert made("layerwise").args.calibration_samples == made("layerwise_sr_ste").args.calibration_samples == 1024
    recorded = {name: spec(name, flags={}).settings["arguments"] for name in ("ours", "two_phases", "sparsegpt")}
    assert [recorded[name]["num_calibration_samples"] for name in recorded] == [1024, 0, 1024]
    assert made("asp").args.rho == 0 and made("asp").args.srste_mask == "fixed"
    start = tiny_bert().bert.encoder.layer[0].output.dense.weight
    pruned = made("sparsegpt").model.bert.encoder.layer[0].output.dense.weight
    assert (pruned == 0).float().mean() == 0.5
    assert not torch.equal(pruned[pruned != 0], start[pruned != 0]), "what is left was not moved"


@pytest.mark.parametrize(("pattern", "most"), [("2:4", 1), ("1:4", 2)])
def test_ours_by_sparsegpt_differs_in_how_a_layer_is_pruned_alone(pattern, most, tiny_bert, token_data, tmp_path):
    """Before the first step, or after a dense half; a learning rate of 0 shows what was pruned."""
    args = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "max_steps": most, "learning_rate": 0.0}

    data = token_data(64)

    def pruned(name):
        trainer = build(METHODS[name], pattern, args, tiny_bert(), None, train_dataset=data, eval_dataset=data)
        trainer.train()
        return weights(trainer.model)["bert.encoder.layer.0.attention.self.query.weight"]

    encode = lambda rows: {"input_ids": torch.stack([data[row]["input_ids"] for row in rows])}  # noqa: E731
    first = build(METHODS["sparsegpt"], pattern, args, tiny_bert(), encode, train_dataset=data).model
    expected = weights(first)["bert.encoder.layer.0.attention.self.query.weight"]
    assert torch.equal(pruned("ours_sparsegpt") == 0, expected == 0)
    assert torch.allclose(pruned("ours_sparsegpt"), expected, atol=1e-5)
    assert not torch.equal(pruned("ours") == 0, expected == 0)


def test_rivals_of_n_m_alone_refuse_other_patterns(tiny_bert):
    with pytest.raises(ValueError, match="PAT prunes to N:M, not to '4x4:8'"):
        build(METHODS["pat"], "4x4:8", {}, tiny_bert(), None)


def test_phase_1_figures_are_read_from_the_log():
    log = [
        {"step": 0, "study/cut": 0.35},
        {"step": 10, "admm/primal_residual": 0.3, "admm/mask_flips": 0.4},
        {"step": 45, "admm/primal_residual": 0.2, "admm/mask_flips": 0.02},
        {"step": 55, "admm/primal_residual": 0.1, "admm/mask_flips": 0.01},
        {"step": 60, "study/cut": 0.08},
        {"step": 60, "eval_accuracy": 0.6},
        {"step": 70, "admm/mask_flips": 0.9, "eval_accuracy": 0.9},
    ]
    found = phase_1_figures(log, 60, "accuracy", 0.8)
    assert found == pytest.approx(
        {
            **{"primal_start": 0.3, "primal_switch": 0.1, "flips_mean": 0.015, "flips_most": 0.02},
            **{"cut_start": 0.35, "cut_switch": 0.08, "switch_metric": 0.6, "share_of_final": 0.75},
        }
    )
    assert phase_1_figures(log, 0, "accuracy", 0.8) is None
    assert phase_1_figures([], 60, "accuracy", None)["share_of_final"] is None


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_a_line(method, place):
    if method in left_out():
        pytest.skip(left_out()[method])
    line = execute(spec(method), place)
    assert line["key"] == spec(method).key and line["steps"] == 12 and line["metric"] == "accuracy"
    assert line["value"] == line["metrics"]["accuracy"] and 0 <= line["value"] <= 1
    dense = METHODS[method].dense
    assert line["broken_groups"] == 0 and line["sparsity"] == (0 if dense else pytest.approx(0.5, abs=0.01))
    with_phase_1 = {
        "ours",
        "two_phases",
        "ours_teacher",
        "two_phases_teacher",
        "self_taught",
        "dense_half",
        "rho0",
        "admm_fixed",
        "asp",
        "ours_sparsegpt",
    }
    assert (line["phase_1"] is not None) == (method in with_phase_1)
    assert line["arguments"].get("distill_teacher") == ("switch" if method == "self_taught" else None)
    if method == "ours":
        assert {name for name, figure in line["phase_1"].items() if figure is None} <= {"share_of_final"}
    assert line["machine"]["threads"] == 1 and line["versions"]["torch"] and line["seconds"] > 0
    assert not [path for path in place.work_dir.iterdir() if path.name.startswith(f"{method}-")]


def test_further_rows_are_judged_apart_and_change_nothing_else(place, monkeypatch):
    plain = execute(spec("ours"), place)
    rows = place.tasks("sst2").train.select(range(7))
    monkeypatch.setattr(runs, "further", lambda task: rows)
    found = execute(spec("ours"), place)
    assert plain["further"] is None and found["further"]["rows"] == 7
    assert round(7 * found["further"]["accuracy"], 6) in range(8)
    for name in ("metrics", "phase_1", "rows_used"):
        assert found[name] == pytest.approx(plain[name], nan_ok=True), name
    assert execute(spec("ours", tune=True), place)["further"] is None


def test_what_goes_on_from_the_switch_ends_with_the_same_bits(place, tmp_path):
    alone = execute(spec("admm_fixed"), place, keep=tmp_path / "alone")
    first = execute(spec("ours"), place, share=True)
    assert not first["from_switch"] and list(place.switch(spec("ours")).iterdir())
    shared = execute(spec("admm_fixed"), place, share=True, keep=tmp_path / "shared")
    assert shared["from_switch"] and not alone["from_switch"] and shared["steps"] == 12
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("alone", "shared")]
    assert files[0] == files[1]
    assert shared["metrics"] == alone["metrics"]
    assert shared["phase_1"] == pytest.approx(alone["phase_1"], nan_ok=True)


def test_recipes():
    assert recipe("sst2").epochs == 3 and recipe("rte").epochs == 5 and recipe("rte", 2).epochs == 2
    assert recipe("cola").max_seq_length == 64


def test_source_digest_is_of_the_code(monkeypatch, tmp_path):
    before = runs.source_digest()
    assert before == runs.source_digest() and len(before) == 12
    package = tmp_path / "hf_admm"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(runs.hf_admm, "__file__", str(package / "__init__.py"))
    assert runs.source_digest() != before
