"""Adapters on a sparse base: trained by ADMMTrainer while the base stays as it is, and merged under its mask."""

import pytest
import torch
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

from hf_admm import audit_checkpoint, merge_sparse_adapter
from own_masks import OWN, bring_zeros, zeros_of
from tiny_runs import prepare, train


peft = pytest.importorskip("peft")


def adapted(model, **settings):
    """A model with LoRA that has something to say: B is no longer zero."""
    settings = {"target_modules": ["query", "value"], "r": 4, "modules_to_save": ["classifier"], **settings}
    model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding" in name:
                parameter.normal_(std=0.1)
    return model


def merged_plainly(build, **settings):
    return adapted(bring_zeros(build()), **settings).merge_and_unload()


def assert_kept(merged, base):
    """Every zero of the base is there, and what it has beside them is what PEFT's own merge gives."""
    for name, zeros in zeros_of(base).items():
        assert not merged.get_parameter(name)[zeros].any(), name


@pytest.mark.parametrize(
    "settings", [{}, {"use_dora": True}, {"target_modules": ["query", "output.dense"], "bias": "all"}]
)
def test_a_merge_is_that_of_peft_on_the_mask_and_zero_beside_it(settings, tiny_bert):
    base = bring_zeros(tiny_bert())
    merged = merge_sparse_adapter(adapted(bring_zeros(tiny_bert()), **settings))
    plain = merged_plainly(tiny_bert, **settings)
    assert type(merged) is BertForSequenceClassification
    assert_kept(merged, base)
    zeros, filled = zeros_of(base), 0
    for name, weight in plain.named_parameters():
        expected = weight.masked_fill(zeros[name], 0) if name in zeros else weight
        assert torch.equal(merged.get_parameter(name), expected), name
        filled += int((weight != expected).sum())
    assert filled > 100  # a plain merge loses them


def test_the_report_says_what_the_mask_cost(tiny_bert, caplog, capsys):
    merged, report = merge_sparse_adapter(adapted(bring_zeros(tiny_bert())), output_report=True)
    base, plain = bring_zeros(tiny_bert()), merged_plainly(tiny_bert)
    assert len(report.weights) == 4
    squares = torch.zeros(2, dtype=torch.float64)
    for weight in report.weights:
        before = base.get_parameter(weight.name)
        update = (plain.get_parameter(weight.name) - before).double()
        outside = update[before == 0]
        assert weight.cut == pytest.approx((outside.norm() / update.norm()).item(), rel=1e-4)
        assert weight.density == pytest.approx((before != 0).float().mean().item())
        squares += torch.stack([outside.square().sum(), update.square().sum()])
    assert report.cut == pytest.approx((squares[0] / squares[1]).sqrt().item(), rel=1e-4) and 0.3 < report.cut < 0.9
    assert f"cut off {report.cut:.1%} of the norm of the update" in capsys.readouterr().out
    assert "the merged model is not the one that was evaluated" in caplog.text
    assert all(weight.name in report.table() for weight in report.weights)


def test_several_adapters_are_merged_together(tiny_bert):
    def two():
        model = adapted(bring_zeros(tiny_bert()), modules_to_save=None)
        torch.manual_seed(9)
        model.add_adapter("other", peft.LoraConfig(target_modules=["key", "value"], r=2, init_lora_weights=False))
        return model

    merged, report = merge_sparse_adapter(two(), ["default", "other"], output_report=True)
    assert_kept(merged, bring_zeros(tiny_bert()))
    assert {weight.name.split(".")[-2] for weight in report.weights if weight.update_norm} == {"query", "key", "value"}
    plain = two().merge_and_unload(adapter_names=["default", "other"])
    zeros = zeros_of(bring_zeros(tiny_bert()))
    for name, weight in plain.named_parameters():
        assert torch.equal(merged.get_parameter(name), weight.masked_fill(zeros[name], 0) if name in zeros else weight)


def test_transposed_weights(tiny_gpt2):
    settings = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": None}
    merged = merge_sparse_adapter(adapted(bring_zeros(tiny_gpt2()), **settings))
    base = bring_zeros(tiny_gpt2())
    assert_kept(merged, base)
    assert not torch.equal(merged.transformer.h[0].attn.c_attn.weight, base.transformer.h[0].attn.c_attn.weight)


def test_other_kinds_of_adapters(tiny_bert):
    for config in (
        peft.LoHaConfig(target_modules=["query"], r=2, init_weights=False),
        peft.OFTConfig(target_modules=["query"], r=0, oft_block_size=4, init_weights=False),
        peft.IA3Config(target_modules=["query"], feedforward_modules=[], init_ia3_weights=False),
    ):
        model = peft.get_peft_model(bring_zeros(tiny_bert()), config)
        merged, report = merge_sparse_adapter(model, output_report=True)
        assert_kept(merged, bring_zeros(tiny_bert()))
        # Scaling rows, as IA3 does, makes nothing of a zero.
        assert (report.cut == 0) == isinstance(config, peft.IA3Config)


def test_a_module_that_was_trained_whole_keeps_the_zeros_of_the_original(tiny_bert):
    model = adapted(bring_zeros(tiny_bert()), modules_to_save=["intermediate.dense", "classifier"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    merged, report = merge_sparse_adapter(model, output_report=True)
    base = bring_zeros(tiny_bert())
    assert_kept(merged, base)
    copied = [weight for weight in report.weights if "intermediate" in weight.name]
    assert len(copied) == 2 and all(0.1 < weight.cut < 0.9 for weight in copied)
    weight = merged.bert.encoder.layer[0].intermediate.dense.weight
    kept = base.bert.encoder.layer[0].intermediate.dense.weight
    torch.testing.assert_close(weight[kept != 0], kept[kept != 0] + 0.1)
    assert torch.equal(merged.classifier.weight, model.classifier.weight)


def test_embeddings_have_no_mask_and_that_is_said(tiny_bert, caplog):
    model = tiny_bert()
    bring_zeros(model)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[3:20, ::2] = 0
    model = adapted(model, target_modules=["query", "word_embeddings"], modules_to_save=None)
    merged = merge_sparse_adapter(model)
    assert merged.bert.embeddings.word_embeddings.weight[3:20, ::2].all()
    assert "Embeddings have no mask, and these have lost zeros: bert.embeddings.word_embeddings.weight" in caplog.text


# ---- What it refuses ----


def test_what_is_no_peft_model(tiny_bert):
    with pytest.raises(ValueError, match="BertForSequenceClassification is not a model that PEFT has put adapters on"):
        merge_sparse_adapter(bring_zeros(tiny_bert()))
    inside = bring_zeros(tiny_bert())
    inside.add_adapter(peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match=r"It has adapters within: save them .*PeftModel\.from_pretrained"):
        merge_sparse_adapter(inside)


def test_a_dense_base(tiny_bert):
    with pytest.raises(ValueError, match=r"no weight of the base is sparse .*merge_and_unload\(\) if it is meant"):
        merge_sparse_adapter(adapted(tiny_bert()))


def test_what_is_merged_already(tiny_bert):
    model = adapted(bring_zeros(tiny_bert()))
    model.merge_adapter()
    with pytest.raises(ValueError, match="4 layers have merged their adapters already, such as .*query"):
        merge_sparse_adapter(model)


def test_names_that_are_not_there(tiny_bert):
    with pytest.raises(ValueError, match="adapter_names has other, and the model has default"):
        merge_sparse_adapter(adapted(bring_zeros(tiny_bert())), ["other"])


def test_prompts(tiny_bert):
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    with pytest.raises(ValueError, match=r"default \(PROMPT_TUNING\) learn prompts"):
        merge_sparse_adapter(peft.get_peft_model(bring_zeros(tiny_bert()), config))


def test_a_broken_adapter_leaves_the_model_as_it_was(tiny_bert):
    model = adapted(bring_zeros(tiny_bert()))
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "layer.1" in n and "lora_B" in n)[0, 0] = float("nan")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match="1 weights hold NaN or infinities, such as .*lora_B"):
        merge_sparse_adapter(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.nan_to_num(7.0), before[name].nan_to_num(7.0))


# ---- Training the adapters ----


def own_trainer(model, data, folder, **flags):
    return prepare(model, data, folder, **{**OWN, **flags})


def own(model, data, folder, **flags):
    return train(model, data, folder, **{**OWN, **flags})


def test_adapters_train_as_under_plain_trainer_and_the_base_stays(tiny_bert, token_data, tmp_path, capsys):
    data, flags = token_data(), {"max_steps": 6, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 3}
    ours = own(adapted(bring_zeros(tiny_bert())), data, tmp_path / "ours", **flags)
    out = capsys.readouterr().out
    assert "stay as they are  12 sparse weights that are frozen: " in out and "query.base_layer" in out
    assert "zeros lost" in out and "SR-STE" not in out
    base = {"per_device_train_batch_size": 8, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    args = TrainingArguments(str(tmp_path / "plain"), **base, **flags)
    plain = Trainer(adapted(bring_zeros(tiny_bert())), args, train_dataset=data, eval_dataset=data[:16])
    plain.train()
    for name, weight in plain.model.named_parameters():
        assert torch.equal(ours.model.get_parameter(name), weight), name
    saved = [sorted(p.name for p in (tmp_path / kind / "checkpoint-6").iterdir()) for kind in ("ours", "plain")]
    assert saved[0] == saved[1] and "adapter_model.safetensors" in saved[0]
    assert ours.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    again = own_trainer(adapted(bring_zeros(tiny_bert())), data, tmp_path / "again", **flags)
    again.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-3"))
    for name, weight in plain.model.named_parameters():
        assert torch.equal(again.model.get_parameter(name), weight), name
    merged = merge_sparse_adapter(ours.model)
    merged.save_pretrained(tmp_path / "merged")
    bring_zeros(tiny_bert()).save_pretrained(tmp_path / "base")
    assert audit_checkpoint(tmp_path / "merged", against=tmp_path / "base").ok


def test_a_sparse_copy_that_is_trained_whole_keeps_its_zeros(tiny_bert, token_data, tmp_path, caplog):
    """`modules_to_save`: the copy has a mask, a sidecar and an exact resume, and merges without a loss."""
    data = token_data()

    def build():
        return adapted(bring_zeros(tiny_bert()), modules_to_save=["intermediate.dense", "classifier"])

    flags = {"max_steps": 6, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 3}
    ours = own(build(), data, tmp_path / "run", **flags)
    assert len(ours.sparsity.targets) == 2 and "no sparsity record" not in caplog.text
    again = own_trainer(build(), data, tmp_path / "again", **flags)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for name, weight in ours.model.named_parameters():
        assert torch.equal(again.model.get_parameter(name), weight), name
    merged, report = merge_sparse_adapter(ours.model, output_report=True)
    assert_kept(merged, bring_zeros(tiny_bert()))
    assert [weight.cut for weight in report.weights if "intermediate" in weight.name] == [0.0, 0.0]


def test_a_write_to_the_frozen_base_is_noticed(tiny_bert, token_data, tmp_path):
    trainer = own_trainer(adapted(bring_zeros(tiny_bert())), token_data(), tmp_path, max_steps=2)
    step = trainer.training_step

    def spoil(*args, **kwargs):
        with torch.no_grad():
            trainer.model.base_model.model.bert.encoder.layer[0].output.dense.weight.add_(1e-3)
        return step(*args, **kwargs)

    trainer.training_step = spoil
    with pytest.raises(RuntimeError, match=r"[0-9]+ zeros that the model brought are lost after training"):
        trainer.train()
