"""The trainers of TRL and Sentence Transformers, where they are installed."""

import inspect
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cards import valid_card
from hf_admm import ADMMArgumentsMixin, ADMMTrainerMixin, ADMMTrainingArguments, audit_checkpoint
from tiny_runs import SETTINGS, assert_same_weights, weights


FLAGS = {**SETTINGS, "max_steps": 4, "admm_steps": 2, "admm_update_steps": 1, "per_device_train_batch_size": 2}
FLAGS |= {"save_strategy": "steps", "save_steps": 2}
TRL_FLAGS = {"bf16": False, "gradient_checkpointing": False}
WORDS = ["<pad>", "<eos>", "<unk>", *(chr(ord("a") + i) for i in range(26))]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    model = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    raw = Tokenizer(model)
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", cls_token="<eos>",
        sep_token="<eos>", model_max_length=32,
    )  # fmt: skip
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    return tokenizer


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, pad_token_id=0,
                    num_attention_heads=2, num_key_value_heads=2, bos_token_id=1, eos_token_id=1)
    ).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    return str(folder)


def pairs(*names):
    return Dataset.from_dict({name: [f"{chr(97 + i)} {chr(98 + j)} c" for i in range(8)] for j, name in
                              enumerate(names)})  # fmt: skip


ROWS = {
    "SFT": lambda: pairs("text"),
    "DPO": lambda: pairs("prompt", "chosen", "rejected"),
    "KTO": lambda: pairs("prompt", "completion").add_column("label", [True, False] * 4),
    "Reward": lambda: pairs("chosen", "rejected"),
    "GRPO": lambda: pairs("prompt"),
    "RLOO": lambda: pairs("prompt"),
}
EXTRA = {"GRPO": {"num_generations": 2, "max_completion_length": 4},
         "RLOO": {"num_generations": 2, "max_completion_length": 4}}  # fmt: skip


def reward(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def trl_trainer(name, base, folder, by_position, mixin_first=True):
    trl = pytest.importorskip("trl")
    trainer, config = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    bases = (ADMMArgumentsMixin, config) if mixin_first else (config, ADMMArgumentsMixin)
    args = dataclass(type("Args", bases, {"__module__": __name__}))(
        str(folder), **{**FLAGS, **TRL_FLAGS, **EXTRA.get(name, {})}
    )
    globals()["Args"] = type(args)  # where pickle looks for it
    kwargs = {"train_dataset": ROWS[name]()}
    if "reward_funcs" in inspect.signature(trainer).parameters:
        kwargs["reward_funcs"] = reward
    mixed = type("Mixed", (ADMMTrainerMixin, trainer), {})
    if name == "Reward":
        from transformers import AutoModelForSequenceClassification

        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, torch_dtype=torch.float32)
    else:
        model = LlamaForCausalLM.from_pretrained(base)
    if not by_position:
        return mixed(model=model, args=args, **kwargs)
    parameters = list(inspect.signature(trainer).parameters)
    before = parameters[: parameters.index("args") + 1]
    given = {"model": model, "args": args, **kwargs}
    return mixed(*map(given.get, before), **{key: value for key, value in kwargs.items() if key not in before})


@pytest.mark.parametrize("name", list(ROWS))
def test_trl_trains_saves_and_resumes(name, base, tmp_path):
    trainer = trl_trainer(name, base, tmp_path / "straight", by_position=True)
    trainer.train()
    assert trainer.audit.ok
    last = tmp_path / "straight" / "checkpoint-4"
    assert audit_checkpoint(last).ok
    assert len(json.loads((last / "hf_admm.json").read_text())["targets"]) == len(trainer.sparsity.targets)
    resumed = trl_trainer(name, base, tmp_path / "resumed", by_position=False, mixin_first=False)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert_same_weights(resumed.model, weights(trainer.model))
    trainer.create_model_card(model_name="mine")
    card = valid_card(tmp_path / "straight" / "README.md")
    assert {"trl", "hf-admm", "sparsity", "2:4"} <= set(card.data.tags) and card.data.library_name == "transformers"
    assert "It has been trained using [TRL]" in card.text and "@software{vonwerra2020trl" in card.text
    assert card.text.count("## Sparsity") == 1 and "OK: every group of every sparse weight (7 of them)" in card.text


@pytest.mark.parametrize("name", list(ROWS))
def test_trl_arguments_without_what_is_needed_are_refused_with_the_lines(name, base, tmp_path):
    trl = pytest.importorskip("trl")
    mixed = type("Mixed", (ADMMTrainerMixin, getattr(trl, f"{name}Trainer")), {})
    kwargs = {"train_dataset": ROWS[name]()} | ({"reward_funcs": reward} if name in EXTRA else {})
    config = getattr(trl, f"{name}Config")
    lines = rf"@dataclass\n    class ADMM{name}Config\(ADMMArgumentsMixin, {name}Config\): \.\.\."
    for args, fault in (
        (config(str(tmp_path), use_cpu=True, **TRL_FLAGS), "have no sparsity flags"),
        (ADMMTrainingArguments(str(tmp_path), use_cpu=True), f"lack what it needs of {name}Config"),
    ):
        with pytest.raises(ValueError, match=rf"(?s){fault}.*{lines}"):
            mixed(model=LlamaForCausalLM.from_pretrained(base), args=args, **kwargs)


def test_every_trainer_of_trl_shows_its_arguments_and_has_a_place_for_ours():
    trl = pytest.importorskip("trl")
    from transformers import Trainer

    from hf_admm.training.argument_classes import arguments_class
    from hf_admm.training.signatures import GivenArguments

    found = [getattr(trl, name) for name in dir(trl) if name.endswith("Trainer")]
    found = [cls for cls in found if inspect.isclass(cls) and issubclass(cls, Trainer)]
    assert len(found) >= 6
    for cls in found:
        mixed = type("Mixed", (ADMMTrainerMixin, cls), {})
        assert inspect.signature(mixed) == inspect.signature(cls)
        assert arguments_class(mixed, ADMMTrainerMixin)[0] is not None
        names = list(inspect.signature(cls).parameters)
        given = GivenArguments(mixed, ADMMTrainerMixin, "__init__", tuple(names), {})
        assert given.get("args") == "args" and given.get("model") == "model"


# ---- Sentence Transformers ----


@pytest.fixture(scope="module")
def bert_folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertModel(
        BertConfig(vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, pad_token_id=0,
                   num_attention_heads=2, max_position_embeddings=32, hidden_dropout_prob=0.0,
                   attention_probs_dropout_prob=0.0)
    ).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    return str(folder)


def sentence_trainer(kind, bert_folder, folder, **flags):
    st = pytest.importorskip("sentence_transformers")
    torch.manual_seed(0)
    if kind == "CrossEncoder":
        from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss as Loss

        model, rows = st.CrossEncoder(bert_folder, num_labels=1, device="cpu"), pairs("a", "b")
        rows = rows.add_column("label", [0.0, 1.0] * 4)
    else:
        from sentence_transformers.losses import MultipleNegativesRankingLoss as Loss
        from sentence_transformers.models import Dense, Pooling, Transformer

        modules = [Transformer(bert_folder, max_seq_length=16), Pooling(16), Dense(16, 16)]
        model, rows = st.SentenceTransformer(modules=modules, device="cpu"), pairs("a", "b")
    config = getattr(st, f"{kind}TrainingArguments", None) or getattr(st.cross_encoder, f"{kind}TrainingArguments")
    trainer = getattr(st, f"{kind}Trainer", None) or getattr(st.cross_encoder, f"{kind}Trainer")
    args = type("Args", (ADMMArgumentsMixin, config), {"__module__": __name__})
    globals()["Args"] = args
    flags = {**FLAGS, "remove_unused_columns": True, "eval_strategy": "steps", "eval_steps": 2, **flags}
    mixed = type("Mixed", (ADMMTrainerMixin, trainer), {})
    return mixed(model, args(str(folder), **flags), rows, rows, Loss(model))


@pytest.mark.parametrize("kind", ["SentenceTransformer", "CrossEncoder"])
def test_sentence_transformers_resume_and_load_their_best(kind, bert_folder, tmp_path):
    trainer = sentence_trainer(kind, bert_folder, tmp_path / "straight")
    trainer.train()
    assert trainer.audit.ok
    places = [path.parent for path in (tmp_path / "straight" / "checkpoint-4").rglob("hf_admm.json")]
    recorded = [len(json.loads((place / "hf_admm.json").read_text())["targets"]) for place in places]
    assert sum(recorded) == len(trainer.sparsity.targets)
    assert all(audit_checkpoint(place).ok for place in places)
    trainer.create_model_card()
    straight = tmp_path / "straight"
    for place, verdict in ((straight, "OK: every group"), (straight / "checkpoint-2", "none yet")):
        card = valid_card(place / "README.md")
        assert {"sentence-transformers", "hf-admm", "2:4"} <= set(card.data.tags)
        assert card.data.library_name == "sentence-transformers"
        assert "## Usage" in card.text and "### Training Hyperparameters" in card.text
        assert card.text.count("## Sparsity") == 1 and f"| verification | {verdict}" in card.text
        assert f'model = {kind}("straight")' in card.text
    resumed = sentence_trainer(kind, bert_folder, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert_same_weights(resumed.model, weights(trainer.model))
    for only in (False, True):
        best = sentence_trainer(
            kind, bert_folder, tmp_path / f"best-{only}", load_best_model_at_end=True, save_only_model=only,
            metric_for_best_model="loss", greater_is_better=False, learning_rate=1e-2,
        )  # fmt: skip
        best.train()
        assert best.audit.ok
        losses = {log["step"]: log["eval_loss"] for log in best.state.log_history if "eval_loss" in log}
        assert best.evaluate()["eval_loss"] == pytest.approx(min(losses.values()), rel=1e-6)
    assert Path(best.state.best_model_checkpoint).is_dir()


def test_sentence_transformers_refuse_arguments_of_another_class(bert_folder, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import Pooling, Transformer

    model = st.SentenceTransformer(modules=[Transformer(bert_folder), Pooling(16)], device="cpu")
    mixed = type("Mixed", (ADMMTrainerMixin, st.SentenceTransformerTrainer), {})
    lines = r"class ADMMSentenceTransformerTrainingArguments\(ADMMArgumentsMixin, SentenceTransformerTrainingArg"
    for args in (ADMMTrainingArguments(str(tmp_path)), st.SentenceTransformerTrainingArguments(str(tmp_path))):
        with pytest.raises(ValueError, match=lines):
            mixed(model, args, pairs("a", "b"))
