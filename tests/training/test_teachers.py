"""Which teachers there can be, for which models, and what is refused with the way out."""

import copy
import types

import pytest
import torch
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    BartConfig,
    BartModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_admm import ADMMTrainer, ADMMTrainerMixin, ADMMTrainingArguments
from hf_admm.training.distillation import hidden_distance, logits_distance
from hf_admm.training.teachers import make_teacher
from own_losses import Means
from tiny_models import NO_DROPOUT
from tiny_runs import assert_same_weights, compiles, gradients, prepare, train, weights


ONE_STEP = {"max_steps": 1, "admm_steps": 1, "admm_rho": 0.0, "mask_freeze_steps": 0, "max_grad_norm": 0.0}
ONE_STEP |= {"optim": "sgd", "learning_rate": 0.0}


def save(model, folder):
    model.save_pretrained(folder)
    return str(folder)


# ---- Flags ----


def test_bad_flags_are_named_all_at_once(tmp_path):
    flags = {"distill_teacher": 3, "distill_logits_weight": 1.5, "distill_hidden_weight": -1, "distill_temperature": 0}
    with pytest.raises(
        ValueError, match="distill_teacher=3 is not allowed: give a folder, a hub id, 'self' or 'switch'"
    ) as error:
        ADMMTrainingArguments(str(tmp_path), use_cpu=True, **flags)
    for part in ("logits_weight=1.5 is not allowed: give a number from 0 to 1",
                 "temperature=0 is not allowed: give a number from 0.01 to 1000",
                 "hidden_weight=-1 is not allowed: give a number from 0 to 1e6"):  # fmt: skip
        assert f"distill_{part}" in str(error.value)
    with pytest.raises(ValueError, match="'self' would teach nothing: .* are both 0"):
        ADMMTrainingArguments(str(tmp_path), use_cpu=True, distill_teacher="self", distill_hidden_weight=0)


def test_the_weight_of_hidden_states_depends_on_the_teacher(tmp_path):
    for teacher, weight, expected in (
        (None, None, 1.0),
        ("dense", None, 1.0),
        ("self", None, 0.1),
        ("self", 2.0, 2.0),
    ):
        flags = {"distill_teacher": teacher, "distill_hidden_weight": weight}
        assert ADMMTrainingArguments(str(tmp_path), use_cpu=True, **flags).hidden_weight == expected


def test_flags_without_a_teacher_are_said_to_have_no_effect(tiny_bert, token_data, tmp_path, caplog):
    prepare(tiny_bert(), token_data(), tmp_path, distill_logits_weight=0.5)
    assert "There is no distill_teacher: distill_logits_weight will have no effect" in caplog.text
    caplog.clear()
    prepare(tiny_bert(), token_data(), tmp_path)
    assert "distill" not in caplog.text


def test_a_model_is_no_teacher_and_a_path_is_one(tiny_bert, tmp_path):
    """A model's `repr` would fill the screen."""
    with pytest.raises(ValueError, match=r"^distill_teacher=a BertForSequenceClassification is not allowed: give a"):
        ADMMTrainingArguments(str(tmp_path), use_cpu=True, distill_teacher=tiny_bert())
    args = ADMMTrainingArguments(str(tmp_path), use_cpu=True, distill_teacher=tmp_path)
    assert args.distill_teacher == str(tmp_path)


# ---- Teachers ----


def test_a_teacher_of_another_size_is_refused_before_the_model_is_pruned(tiny_bert, token_data, tmp_path):
    for other in ({"hidden_size": 32}, {"num_hidden_layers": 3}):
        model, teacher = tiny_bert(), save(tiny_bert(**other), tmp_path / "other")
        before = weights(model)
        trainer = prepare(model, token_data(), tmp_path / "run", distill_teacher=teacher, sparsity_pattern="2:4",
                          admm_steps=None, admm_rho=None, admm_update_steps=None)  # fmt: skip
        name, size = next(iter(other.items()))
        with pytest.raises(ValueError, match=rf"other hidden states than the student: {name} {size}, the student"):
            trainer.train()
        assert trainer.args.calibration_samples and not trainer.state.global_step
        assert_same_weights(model, before)


def test_a_decoder_of_another_length_and_a_text_model_within_are_seen(tmp_path):
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    sizes = {"d_model": 16, "encoder_layers": 2, "vocab_size": 64, "max_position_embeddings": 16, **heads}
    student, other = (BartModel(BartConfig(**sizes, decoder_layers=layers)) for layers in (2, 3))
    args = ADMMTrainingArguments(str(tmp_path), use_cpu=True, distill_teacher=save(other, tmp_path / "other"))
    with pytest.raises(ValueError, match="decoder_layers 3, the student 2"):
        make_teacher(student, args)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 64}
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    student, other = (
        LlavaModel(LlavaConfig(text_config=LlamaConfig(**text, num_hidden_layers=layers), vision_config=vision))
        for layers in (1, 2)
    )
    args.distill_teacher = save(other, tmp_path / "within")
    with pytest.raises(ValueError, match="num_hidden_layers 2, the student 1"):
        make_teacher(student, args)


def test_a_teacher_that_can_not_be_loaded(tiny_bert, tiny_gpt2, token_data, tmp_path):
    others = {"gone": str(tmp_path / "gone"), "wide": save(tiny_bert(num_labels=5), tmp_path / "wide")}
    for teacher in others.values():
        trainer = prepare(tiny_bert(), token_data(), tmp_path / "run", distill_teacher=teacher,
                          distill_logits_weight=0.5)  # fmt: skip
        with pytest.raises(ValueError, match="could not be loaded as BertForSequenceClassification|have other shapes"):
            trainer.train()


def test_a_teacher_without_a_head_has_hidden_states_only(tiny_bert, token_data, tmp_path, caplog):
    teacher = save(BertModel(tiny_bert().config), tmp_path / "base")
    flags = {"distill_teacher": teacher, **ONE_STEP}
    trainer = prepare(tiny_bert(), token_data(), tmp_path / "run", distill_logits_weight=0.5, **flags)
    with pytest.raises(ValueError, match="lacks weights of BertForSequenceClassification: classifier.bias, .*random"):
        trainer.train()
    train(tiny_bert(), token_data(), tmp_path / "run", **flags)
    assert "lacks classifier.bias, classifier.weight. Its hidden states must not need them" in caplog.text


@pytest.mark.parametrize("other", [{"hidden_size": 32}, {"num_hidden_layers": 3}])
def test_a_teacher_of_another_size(other, tiny_bert, token_data, tmp_path):
    teacher = save(tiny_bert(**other), tmp_path / "teacher")
    trainer = prepare(tiny_bert(), token_data(), tmp_path / "run", distill_teacher=teacher)
    with pytest.raises(ValueError, match="has other hidden states than the student: .* set distill_hidden_weight=0"):
        trainer.train()
    flags = {"distill_hidden_weight": 0.0, "distill_logits_weight": 0.5}
    taught = train(tiny_bert(), token_data(), tmp_path / "run", distill_teacher=teacher, **flags)
    assert taught.audit.ok and "distill/hidden" not in taught.state.log_history[0]


def test_labels_in_another_order(tiny_bert, token_data, tmp_path):
    names = [{"id2label": {0: a, 1: b}, "label2id": {a: 0, b: 1}} for a, b in (("no", "yes"), ("yes", "no"))]
    teacher = save(tiny_bert(**names[0]), tmp_path / "teacher")
    trainer = prepare(
        tiny_bert(**names[1]), token_data(), tmp_path / "run", distill_teacher=teacher, distill_logits_weight=0.5
    )
    with pytest.raises(ValueError, match="has the labels of the student in another order"):
        trainer.train()


# ---- Models ----


def test_models_and_backends_that_can_not_be_distilled(tiny_bert, token_data, tmp_path):
    with pytest.raises(ValueError, match="distill_teacher='self' does not work here: Means is no PreTrainedModel"):
        prepare(Means(tiny_bert()), token_data(), tmp_path, distill_teacher="self")
    model = tiny_bert(return_dict=False)
    model.compile(backend="eager")
    model.hf_device_map = {"bert": 0, "classifier": 1}
    with pytest.raises(ValueError, match="returns tuples.*; the model was compiled in place .*; .* over several devi"):
        prepare(model, token_data(), tmp_path, distill_teacher="self")
    trainer = prepare(tiny_bert(), token_data(), tmp_path, distill_teacher="self")
    trainer.is_deepspeed_enabled = True
    trainer.accelerator.state.parallelism_config = types.SimpleNamespace(cp_enabled=True)
    divides = hasattr(type(trainer.accelerator), "parallelism_config")  # this version of accelerate
    named = "; tensor, context and sequence parallelism" if divides else ""
    with pytest.raises(ValueError, match=f"DeepSpeed is not supported{named}"):
        trainer._check_distillation()
    trainer.accelerator.state.parallelism_config = None


def test_sentence_transformers_are_refused(tiny_bert, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import Normalize

    mixed = type("Mixed", (ADMMTrainerMixin, st.SentenceTransformerTrainer), {})
    arguments = type("Arguments", (mixed_arguments(), st.SentenceTransformerTrainingArguments), {})
    args = arguments(str(tmp_path), use_cpu=True, sparsity_pattern="none", distill_teacher="self")
    with pytest.raises(ValueError, match="SentenceTransformer is no PreTrainedModel"):
        mixed(st.SentenceTransformer(modules=[Normalize()], device="cpu"), args)


def mixed_arguments():
    from hf_admm import ADMMArgumentsMixin

    return ADMMArgumentsMixin


class Fused(BertForSequenceClassification):
    """Its loss leaves the logits out."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        outputs = super().forward(input_ids, attention_mask, labels=labels, **kwargs)
        return type(outputs)(loss=outputs.loss, hidden_states=outputs.hidden_states)


def test_a_model_without_logits(tiny_bert, token_data, tmp_path):
    model = Fused(tiny_bert().config)
    trainer = prepare(model, token_data(), tmp_path, distill_teacher="self", distill_logits_weight=1.0)
    with pytest.raises(ValueError, match="returns no logits, .* Set distill_logits_weight=0, .* use_liger_kernel"):
        trainer.train()
    assert train(model, token_data(), tmp_path, distill_teacher="self").audit.ok


CONFIG = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG |= {"intermediate_size": 32, "max_position_embeddings": 32, **NO_DROPOUT["tiny_bert"]}


def build(kind, seed):
    torch.manual_seed(seed)
    if kind == "encoder-decoder":
        config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0,
                          decoder_start_token_id=0)  # fmt: skip
        return T5ForConditionalGeneration(config)
    made = {"choices": AutoModelForMultipleChoice, "answers": AutoModelForQuestionAnswering}[kind]
    return made.from_config(BertConfig(**CONFIG))


def rows(kind):
    generator = torch.Generator().manual_seed(0)
    shape = (8, 3, 6) if kind == "choices" else (8, 6)
    tokens = torch.randint(1, 64, shape, generator=generator)
    mask = torch.ones_like(tokens)
    mask[:4, ..., 4:] = 0
    batch = {"input_ids": tokens, "attention_mask": mask}
    if kind == "choices":
        batch["labels"] = tokens[:, 0, 0] % 3
    elif kind == "answers":
        batch |= {"start_positions": tokens[:, 0] % 4, "end_positions": tokens[:, 1] % 4}
    else:
        batch["labels"] = tokens[:, :5].masked_fill(mask[:, :5] == 0, -100)
    return batch


@pytest.mark.parametrize("kind", ["choices", "answers", "encoder-decoder"])
def test_other_heads_by_hand(kind, tmp_path):
    """The gradient of one batch, whole and in four: the hidden states of encoder and decoder, starts and ends."""
    model, other, batch = build(kind, 0), build(kind, 1), rows(kind)
    data = [{key: value[i] for key, value in batch.items()} for i in range(8)]
    student = copy.deepcopy(model)
    ours = student(**batch, output_hidden_states=True)
    with torch.no_grad():
        theirs = other.eval()(**batch, output_hidden_states=True)
    mask = batch["attention_mask"].reshape(-1, 6)
    if kind == "encoder-decoder":
        kept = batch["labels"] != -100
        hidden = hidden_distance(ours.encoder_hidden_states, theirs.encoder_hidden_states, mask)
        hidden = hidden + hidden_distance(ours.decoder_hidden_states, theirs.decoder_hidden_states, kept)
        logits = logits_distance(ours.logits[kept], theirs.logits[kept], 2.0)
    else:
        hidden = hidden_distance(ours.hidden_states, theirs.hidden_states, mask)
        if kind == "choices":
            logits = logits_distance(ours.logits, theirs.logits, 2.0)
        else:  # the answer is among the tokens, row by row
            ends = [(a[i][m > 0], b[i][m > 0]) for a, b in ((ours.start_logits, theirs.start_logits),
                    (ours.end_logits, theirs.end_logits)) for i, m in enumerate(mask)]  # fmt: skip
            logits = sum(logits_distance(a[None], b[None], 2.0) for a, b in ends) / len(ends)
    (logits + 0.5 * hidden).backward()
    expected = {name: weight.grad for name, weight in student.named_parameters()}
    teacher = save(other, tmp_path / "teacher")
    for size, accumulation in ((8, 1), (2, 4)):
        found = {}

        class Takes(ADMMTrainer):
            def _clip_grad_norm(self, model, found=found):
                found |= gradients(model)
                return super()._clip_grad_norm(model)

        names = ["start_positions", "end_positions"] if kind == "answers" else None
        train(
            copy.deepcopy(model), data, tmp_path / "run", Takes, distill_teacher=teacher, distill_logits_weight=1.0,
            distill_hidden_weight=0.5, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
            label_names=names, **{**ONE_STEP, "max_grad_norm": 1e9},
        )  # fmt: skip
        for name, gradient in found.items():
            if expected[name] is not None:
                torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6, msg=name)


# ---- Wrappers ----


COMPILED = pytest.param({"torch_compile": True, "torch_compile_backend": "eager"}, marks=compiles)


@pytest.mark.parametrize(
    "flags", [COMPILED, {"bf16": True}, {"gradient_checkpointing": True}, {"sparsity_pattern": "none"}]
)
def test_wrapped_models_learn_the_same(flags, tiny_bert, token_data, tmp_path):
    teacher, runs = save(tiny_bert(seed=1), tmp_path / "teacher"), []
    plain = {key: value for key, value in flags.items() if key == "sparsity_pattern"}
    for extra in (plain, flags):
        model = tiny_bert(**NO_DROPOUT["tiny_bert"])
        trainer = train(
            model, token_data(), tmp_path / "run", max_steps=4, admm_steps=2, distill_teacher=teacher,
            distill_logits_weight=0.5, **extra,
        )  # fmt: skip
        runs.append(weights(model))
        hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
        assert not any("output_capturing" in hook.__module__ for hook in hooks) and not model._forward_hooks
        assert trainer.state.log_history[0]["distill/loss"] > 0.1
    tolerance = {"rtol": 0, "atol": 1e-2 if "bf16" in flags else 1e-6}
    torch.testing.assert_close(runs[1], runs[0], **tolerance)
