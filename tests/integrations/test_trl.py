"""The trainers of TRL."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from integration_runs import CALIBRATED, FLAGS, assert_sparse_checkpoint, check, check_best, obeys, texts
from tiny_runs import assert_same_weights, weights


trl = pytest.importorskip("trl")

from hf_admm import integrations, merge_sparse_adapter  # noqa: E402
from hf_admm.callbacks import PhaseCallback  # noqa: E402


ROWS = {
    "SFT": lambda: texts("text"),
    "DPO": lambda: texts("prompt", "chosen", "rejected"),
    "KTO": lambda: texts("prompt", "completion").add_column("label", [True, False] * 8),
    "Reward": lambda: texts("chosen", "rejected"),
    "GRPO": lambda: texts("prompt"),
    "RLOO": lambda: texts("prompt"),
}
SAMPLES = {
    "num_generations": 2,
    "num_generations_eval": 2,
    "max_completion_length": 4,
    "per_device_eval_batch_size": 4,
}


def reward(completions, **kwargs):
    return [float(len(set(completion))) for completion in completions]


@pytest.fixture
def maker(llama, reward_llama):
    """For the name of a trainer, a function that makes one from the folder of a model."""

    def choose(name, rows=None, parts=None, **own):
        trainer_class = getattr(integrations, f"ADMM{name}Trainer")
        config = getattr(integrations, f"ADMM{name}Config")
        auto = AutoModelForSequenceClassification if name == "Reward" else AutoModelForCausalLM
        data = ROWS[name]() if rows is None else rows

        def make(folder, model, **flags):
            given = {"train_dataset": data, "eval_dataset": data.select(range(8)), **(parts or {})}
            if name in ("DPO", "KTO"):  # a loaded checkpoint is judged against the model of the start
                given["ref_model"] = auto.from_pretrained(llama)
            if name in ("GRPO", "RLOO"):
                given["reward_funcs"] = reward
            args = config(str(folder), **{**FLAGS, **(SAMPLES if "reward_funcs" in given else {}), **own, **flags})
            return trainer_class(auto.from_pretrained(model, dtype=torch.float32), args=args, **given)

        return make, reward_llama if name == "Reward" else llama

    return choose


@pytest.mark.parametrize("name", list(ROWS))
def test_both_phases(name, maker, tmp_path):
    """With TRL's defaults, bf16 and activation checkpointing."""
    # Those with a reference model evaluate in float32 as long as they have not trained, as plain TRL does.
    sampled = name in ("GRPO", "RLOO")
    own = {"bf16": False} if name in ("DPO", "KTO") else {}
    make, model = maker(name, **own, **({} if sampled else CALIBRATED))
    trainer = check(make, tmp_path, model, metrics=() if sampled else ("eval_loss",))
    assert trainer.args.gradient_checkpointing
    assert len(trainer.sparsity.targets) == 14


@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO", "Reward"])
def test_the_best_model(name, maker, tmp_path):
    check_best(*maker(name)[:1], tmp_path, maker(name)[1])


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_the_best_model_by_its_reward(name, maker, tmp_path):
    make, model = maker(name)
    trainer = make(tmp_path, model, load_best_model_at_end=True, metric_for_best_model="eval_reward")
    trainer.train()
    assert trainer.audit.ok and obeys(trainer)
    assert_sparse_checkpoint(trainer, trainer.state.best_model_checkpoint)


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_what_is_sampled_prunes_no_layer(name, llama, tmp_path):
    flags = {**FLAGS, **SAMPLES, **CALIBRATED, "eval_strategy": "no"}
    args = getattr(integrations, f"ADMM{name}Config")(str(tmp_path), **flags)
    trainer_class = getattr(integrations, f"ADMM{name}Trainer")
    with pytest.raises(ValueError, match=f"The rows of ADMM{name}Trainer are prompts"):
        trainer_class(llama, args=args, train_dataset=texts("prompt"), reward_funcs=reward)


def test_metrics_are_of_evaluations_and_steps_alone(maker, tmp_path):
    """TRL adds up metrics in every forward pass; those of the calibration are no evaluation's."""
    make, model = maker("SFT", **CALIBRATED)
    trainer, before = make(tmp_path, model), []
    inner = trainer._at_switch

    def calibrate(weights):
        before.append({kind: dict(metrics) for kind, metrics in trainer._metrics.items()})
        changes = inner(weights)
        before.append({kind: dict(metrics) for kind, metrics in trainer._metrics.items()})
        return changes

    callbacks = trainer.callback_handler.callbacks
    next(callback for callback in callbacks if isinstance(callback, PhaseCallback)).at_switch = calibrate
    trainer.train()
    assert before[0] == before[1] and len(before) == 2


def conversations():
    turns = texts("question", "answer")
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": text}] for text in turns["question"]],
            "completion": [[{"role": "assistant", "content": text}] for text in turns["answer"]],
        }
    )


SFT = {
    "packing": ({"packing": True, "max_length": 16, "eval_packing": False}, None),
    "packing wrapped": ({"packing": True, "packing_strategy": "wrapped", "max_length": 8}, None),
    "padding-free": ({"padding_free": True, "max_length": None}, None),
    "completion-only": ({"completion_only_loss": True}, lambda: texts("prompt", "completion")),
    "conversational": ({}, conversations),
    "accumulation": ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, None),
    "dft": ({"loss_type": "dft"}, None),
    "fp32 without checkpointing": ({"bf16": False, "gradient_checkpointing": False}, None),
    "own rho": ({"admm_rho": 0.1}, None),
}


@pytest.mark.parametrize("feature", list(SFT))
def test_sft(feature, maker, tmp_path):
    flags, rows = SFT[feature]
    make, model = maker("SFT", rows and rows(), **flags)
    check(make, tmp_path, model)


def test_the_loss_is_computed_in_chunks(maker, tmp_path):
    """Logits are never built, and the head's weight is read where it is, sparse too."""
    make, model = maker("SFT", sparsity_include=["q_proj", "lm_head"])
    trainer = make(tmp_path, model)
    outputs = []
    trainer.model.register_forward_hook(lambda module, args, output: outputs.append(output))
    trainer.train()
    assert outputs and all("logits" not in output and output.log_probs is not None for output in outputs)
    assert "lm_head.weight" in trainer.sparsity.targets and trainer.audit.ok


def test_activation_offloading(maker, tmp_path, monkeypatch):
    """TRL asks for an accelerator. A CPU in its place shows that the copies come back for the backward pass."""
    from trl.trainer import sft_trainer

    make, model = maker("SFT", gradient_checkpointing=False)
    inner, copied = sft_trainer.get_act_offloading_ctx_manager, []

    def offloading(model):
        context = inner(model, use_streams=False, use_pin_memory=False, min_offload_size=1)
        pack = context.pack_hook

        def packed(tensor):
            key = pack(tensor)
            copied.append(context.tracker[key][1])
            return key

        context.pack_hook = packed
        return context

    with monkeypatch.context() as patch:
        patch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cpu"))
        patch.setattr(sft_trainer, "get_act_offloading_ctx_manager", offloading)
        offloaded = make(tmp_path / "offloaded", model, activation_offloading=True)
    offloaded.train()
    assert offloaded.audit.ok and sum(copied) > 100
    plain = make(tmp_path / "plain", model)
    plain.train()
    assert_same_weights(offloaded.model, weights(plain.model))


# ---- What a user may give ----


def lora(**config):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM", **config)


def test_a_peft_config_is_refused_before_anything_is_touched(maker, llama, tmp_path):
    make, _ = maker("SFT", parts={"peft_config": lora()})
    with pytest.raises(ValueError, match=r"ADMMSFTTrainer got a peft_config \(LoraConfig\).*sparsity_pattern='own'"):
        make(tmp_path, llama)
    dense = make(tmp_path, llama, sparsity_pattern="none", max_steps=1)  # plain TRL
    dense.train()
    assert (tmp_path / "checkpoint-1" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_a_peft_config_for_a_model_that_is_sparse_already(name, maker, llama, tmp_path):
    """The way that the message names."""
    make, _ = maker(name)
    sparse = make(tmp_path / "sparse", llama)
    sparse.train()
    sparse.save_model(tmp_path / "model")
    flags = {key: value for key, value in FLAGS.items() if not key.startswith("admm_")}
    args = getattr(integrations, f"ADMM{name}Config")(str(tmp_path / "lora"), sparsity_pattern="own", **flags)
    rows = ROWS[name]()
    trainer = type(sparse)(
        str(tmp_path / "model"), args=args, train_dataset=rows, eval_dataset=rows, peft_config=lora()
    )
    trainer.train()
    assert trainer.audit.ok and (tmp_path / "lora" / "checkpoint-8" / "adapter_model.safetensors").is_file()
    merged = merge_sparse_adapter(trainer.model)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for weight in sparse.sparsity.targets:
        assert (merged.get_parameter(weight)[before.get_parameter(weight) == 0] == 0).all()
    query = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(merged.get_parameter(query), before.get_parameter(query))


@pytest.mark.parametrize("trained", [False, True])
def test_a_peft_model_is_refused(trained, llama, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(llama), lora())
    if trained:
        model.requires_grad_(True)
    with pytest.raises(ValueError, match=r"base weights of (a|this) PEFT/LoRA model.*merge_and_unload"):
        integrations.ADMMSFTTrainer(
            model, integrations.ADMMSFTConfig(str(tmp_path), **FLAGS), train_dataset=texts("text")
        )


def test_a_merged_adapter_is_pruned(llama, tmp_path):
    """The way that the message names."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(llama), lora(init_lora_weights=False))
    model = model.merge_and_unload()
    model.requires_grad_(True)
    rows = texts("text")
    trainer = integrations.ADMMSFTTrainer(
        model, integrations.ADMMSFTConfig(str(tmp_path), **FLAGS), train_dataset=rows, eval_dataset=rows
    )
    trainer.train()
    assert trainer.audit.ok and len(trainer.sparsity.targets) == 14


def test_a_model_by_its_name(llama, tmp_path):
    args = integrations.ADMMSFTConfig(str(tmp_path), use_cpu=True)
    trainer = integrations.ADMMSFTTrainer(llama, args, train_dataset=texts("text"))
    assert trainer.args.learning_rate == 2e-5 and "14 weights pruned" in trainer.target_table()


@pytest.mark.parametrize("name", list(ROWS))
def test_other_arguments_are_refused_with_the_class_to_pass(name, maker, tmp_path):
    make, model = maker(name)
    trainer = make(tmp_path, model)
    given = {"train_dataset": ROWS[name]()} | ({"reward_funcs": reward} if name in ("GRPO", "RLOO") else {})
    with pytest.raises(ValueError, match=rf"no sparsity flags. Pass hf_admm.integrations.trl.ADMM{name}Config\."):
        type(trainer)(trainer.model, args=getattr(trl, f"{name}Config")(str(tmp_path), use_cpu=True), **given)


def test_the_command_line_of_trl():
    parser = trl.TrlParser((trl.ScriptArguments, integrations.ADMMSFTConfig, trl.ModelConfig))
    line = "--output_dir out --dataset_name d --model_name_or_path m --sparsity_pattern 4:8 --packing --use_cpu"
    _, args, _ = parser.parse_args_and_config(line.split())
    assert str(args.pattern) == "4:8" and args.packing and args.learning_rate == 2e-5


# ---- Sampling ----


def test_completions_are_sampled_from_what_is_trained_and_what_is_evaluated(maker, tmp_path):
    make, model = maker("GRPO")
    trainer = make(tmp_path, model)
    seen = {}

    def noting(completions, **kwargs):
        seen.setdefault((trainer.model.training, trainer.state.global_step), []).append(obeys(trainer))
        return reward(completions)

    trainer.reward_funcs = [noting]
    trainer.train()
    evaluated = {step: all(sparse) for (training, step), sparse in seen.items() if not training}
    trained = {step: all(sparse) for (training, step), sparse in seen.items() if training}
    assert evaluated == dict.fromkeys((2, 4, 6, 8), True)
    assert not trained[1] and all(sparse for step, sparse in trained.items() if step >= 4)


def test_vllm_gets_the_weights_before_and_after_an_evaluation(maker, tmp_path):
    make, model = maker("GRPO")
    trainer = make(tmp_path, model)
    handed = []

    class VLLM:
        def sync_weights(self):
            handed.append((trainer.state.global_step, obeys(trainer)))

        def generate(self, prompts, images, num_generations, profiler):
            rows = len(prompts)
            return None, [[5, 6, 1]] * rows, [[[-3.0]] * 3] * rows, None

    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, VLLM(), -1
    trainer.vllm_importance_sampling_correction = False
    trainer.train()
    assert trainer.audit.ok
    by_step = {step: [sparse for at, sparse in handed if at == step] for step, _ in handed}
    assert by_step[1] == [False]
    assert by_step[2] == [True, False]  # the evaluation, then training goes on with the dense weights
    assert by_step[6] == [True, True]
