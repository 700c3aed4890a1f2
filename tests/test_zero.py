"""Under DeepSpeed's ZeRO of stages 1 and 2, a run is what it is without, and what is out of reach is refused."""

import importlib.util
import json

import pytest
import torch

import zero_worker
from hf_admm import ADMMTrainingArguments
from hf_admm.training.zero import refuse_deepspeed
from launch import launch, needs_gloo


needs_deepspeed = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="extra test-deepspeed")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    kinds = {"two phases": {}, **zero_worker.CALIBRATED}
    return {name: zero_worker.run(tmp_path_factory.mktemp("plain"), **flags) for name, flags in kinds.items()}


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def runs(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    launch(request.param, "zero_worker.py", folder, timeout=1200)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(request.param)]


@needs_deepspeed
@needs_gloo
def test_a_run_is_that_of_the_plain_trainer(runs, plain):
    kinds = {"zero1": "two phases", "zero2": "two phases"} | {kind: kind for kind in zero_worker.CALIBRATED}
    for kind, same in kinds.items():
        for name, weight in runs[0][kind].items():
            torch.testing.assert_close(weight, plain[same][name], rtol=1e-4, atol=5e-5, msg=f"{kind}: {name}")
            assert torch.equal(weight == 0, plain[same][name] == 0), name


@needs_deepspeed
@needs_gloo
def test_a_resume_is_exact(runs):
    for straight, resumed in (("zero2", "resumed4"), ("zero2", "resumed8"), ("bf16", "bf16 resumed")):
        for name, weight in runs[0][straight].items():
            assert torch.equal(weight, runs[0][resumed][name]), f"{resumed}: {name}"


@needs_deepspeed
@needs_gloo
def test_all_processes_hold_the_same(runs):
    for other in runs[1:]:
        for name, weights in runs[0].items():
            assert all(torch.equal(weight, other[name][key]) for key, weight in weights.items()), name


def zero(stage=2, **others):
    return {"zero_optimization": {"stage": stage}, **others}


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        (zero(), {"admm_penalty": "loss"}, "admm_penalty='loss' joins the gradient"),
        (zero(), {"admm_rho": 0.1}, "admm_penalty='loss' joins the gradient"),
        (zero(), {"admm_steps": 0}, "srste_decay joins the gradient"),
        (zero(), {"srste_decay": 1e-4}, "srste_decay joins the gradient"),
        (zero(), {"sparsity_pattern": "own"}, "'own' masks the gradient"),
        (zero(), {"optim": "schedule_free_adamw"}, "swaps weights"),
        (zero(fp16={"enabled": True}), {}, "fp16 is on"),
        (zero(optimizer={"type": "AdamW"}, scheduler={"type": "WarmupLR"}), {}, "section 'optimizer'.*'scheduler'"),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
            {},
            "offload_optimizer is given",
        ),
        (zero(3), {}, "DeepSpeed is not supported"),
        (zero(0), {}, "DeepSpeed is not supported"),
        ({}, {}, "DeepSpeed is not supported"),
    ],
)
def test_what_is_out_of_reach_is_refused(config, flags, message, tmp_path):
    args = ADMMTrainingArguments(str(tmp_path), use_cpu=True, **flags)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    for given in (config, str(file)):
        with pytest.raises(ValueError, match=message):
            refuse_deepspeed(args, given)


@pytest.mark.parametrize(
    "flags", [{}, {"srste_decay": 0.0}, {"admm_steps": 5, "bf16": True}, {"sparsity_pattern": "1:4"}]
)
def test_the_default_run_is_let_through(flags, tmp_path):
    args = ADMMTrainingArguments(str(tmp_path), use_cpu=True, **flags)
    for stage in (1, 2):
        refuse_deepspeed(args, zero(stage, bf16={"enabled": "auto"}, fp16={"enabled": "auto"}))
    nowhere = {"device": "none"}  # as `accelerate launch` writes it
    refuse_deepspeed(args, {"zero_optimization": {"stage": 2, "offload_optimizer": nowhere, "offload_param": nowhere}})
