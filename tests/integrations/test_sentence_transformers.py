"""The trainers of Sentence Transformers."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers.trainer

from integration_runs import CALIBRATED, FLAGS, Watch, check, check_best, logged, obeys, texts
from tiny_runs import weights


st = pytest.importorskip("sentence_transformers")

from sentence_transformers import losses  # noqa: E402
from sentence_transformers.cross_encoder import losses as cross_losses  # noqa: E402
from sentence_transformers.cross_encoder.evaluation import CrossEncoderCorrelationEvaluator  # noqa: E402
from sentence_transformers.evaluation import EmbeddingSimilarityEvaluator  # noqa: E402
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer  # noqa: E402

from hf_admm import integrations  # noqa: E402
from hf_admm.checkpoints.sidecar import SIDECAR_NAME  # noqa: E402


SCORES = [i / 15 for i in range(16)]


def embedding_model(folder):
    """A saved one, or an encoder with pooling and a dense layer of its own."""
    if (Path(folder) / "modules.json").is_file():
        return st.SentenceTransformer(folder, device="cpu")
    torch.manual_seed(0)
    modules = [Transformer(folder, max_seq_length=16), Pooling(16), Dense(16, 16)]
    return st.SentenceTransformer(modules=modules, device="cpu")


def make_embedding(loss=losses.MultipleNegativesRankingLoss, rows=None, evaluator=None, **own):
    data = texts("anchor", "positive") if rows is None else rows

    def make(folder, model, **flags):
        model = embedding_model(model)
        args = integrations.ADMMSentenceTransformerTrainingArguments(str(folder), **{**FLAGS, **own, **flags})
        made = {name: each(model) for name, each in loss.items()} if isinstance(loss, dict) else loss(model)
        return integrations.ADMMSentenceTransformerTrainer(model, args, data, data, made, evaluator)

    return make


def make_reranker(loss=cross_losses.BinaryCrossEntropyLoss, rows=None, evaluator=None, **own):
    data = texts("query", "answer").add_column("label", SCORES) if rows is None else rows

    def make(folder, model, **flags):
        model = st.CrossEncoder(model, num_labels=1, device="cpu")
        args = integrations.ADMMCrossEncoderTrainingArguments(str(folder), **{**FLAGS, **own, **flags})
        return integrations.ADMMCrossEncoderTrainer(model, args, data, data, loss(model), evaluator)

    return make


def similarity():
    pairs = texts("a", "b")
    return EmbeddingSimilarityEvaluator(list(pairs["a"]), list(pairs["b"]), SCORES)


def correlation():
    pairs = texts("a", "b")
    return CrossEncoderCorrelationEvaluator([list(pair) for pair in zip(pairs["a"], pairs["b"], strict=True)], SCORES)


EVALUATED = {
    "embedding": (make_embedding, similarity, "eval_spearman_cosine"),
    "reranker": (make_reranker, correlation, "eval_spearman"),
}


@pytest.mark.parametrize("kind", list(EVALUATED))
def test_both_phases_with_an_evaluator(kind, bert, tmp_path):
    build, evaluator, metric = EVALUATED[kind]
    trainer = check(build(evaluator=evaluator(), **CALIBRATED), tmp_path, bert, metrics=("eval_loss", metric))
    assert len(trainer.sparsity.targets) == 12
    assert len(set(logged(trainer, metric).values())) > 1


@pytest.mark.parametrize("kind", list(EVALUATED))
def test_the_best_model_by_loss_and_by_an_evaluator(kind, bert, tmp_path):
    build, evaluator, metric = EVALUATED[kind]
    check_best(build(), tmp_path / "loss", bert)
    check_best(build(evaluator=evaluator()), tmp_path / "evaluator", bert, metric)


def test_an_evaluator_alone(bert, tmp_path):
    make = make_embedding(evaluator=similarity())
    trainer = make(tmp_path, bert)
    trainer.eval_dataset = None
    seen = []
    inner = trainer.evaluator
    trainer.evaluator = lambda *args, **kwargs: seen.append(obeys(trainer)) or inner(*args, **kwargs)
    trainer.train()
    assert seen == [True] * 4 and trainer.audit.ok


# ---- Losses ----

LOSSES = {
    "cached": lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2),
    "cached gist": lambda model: losses.CachedGISTEmbedLoss(model, embedding_model(GUIDE), mini_batch_size=2),
    "matryoshka": lambda model: losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [16, 8]),
}
GUIDE = None


@pytest.mark.parametrize("name", list(LOSSES))
def test_losses(name, bert, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "GUIDE", bert)
    check(make_embedding(LOSSES[name]), tmp_path, bert)


def test_a_cached_reranker_loss(bert, tmp_path):
    def loss(model):
        return cross_losses.CachedMultipleNegativesRankingLoss(model, num_negatives=1, mini_batch_size=2)

    check(make_reranker(loss, rows=texts("query", "answer")), tmp_path, bert, metrics=())


@pytest.mark.parametrize("flags", [{}, {"admm_rho": 0.1}])
def test_a_cached_loss_trains_as_the_one_without_a_cache(flags, bert, tmp_path):
    """Both of its passes compute with the same weights, masked in phase 2."""
    ends = []
    for name, loss in (("plain", losses.MultipleNegativesRankingLoss), ("cached", LOSSES["cached"])):
        trainer = make_embedding(loss, learning_rate=1e-3, optim="sgd", **flags)(tmp_path / name, bert)
        watch = Watch(trainer)
        trainer.train()
        ends.append(weights(trainer.model))
    assert all(len(watch.computed[step]) == 2 * 2 * 2 for step in range(8))  # two columns, two parts, twice
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-4, atol=1e-6)


def test_a_loss_with_weights_of_its_own(bert, tmp_path):
    def softmax(model):
        torch.manual_seed(1)
        return losses.SoftmaxLoss(model, model.get_embedding_dimension(), num_labels=2)

    rows = texts("premise", "hypothesis").add_column("label", [0, 1] * 8)
    make = make_embedding(softmax, rows)
    trainer = make(tmp_path, bert)
    before = trainer.loss.classifier.weight.detach().clone()
    trainer.train()
    assert trainer.audit.ok and not torch.equal(trainer.loss.classifier.weight, before)


def test_several_data_sets_with_a_loss_each(bert, tmp_path):
    from datasets import DatasetDict

    rows = DatasetDict(
        pairs=texts("anchor", "positive"), scored=texts("sentence1", "sentence2").add_column("score", SCORES)
    )
    loss = {"pairs": losses.MultipleNegativesRankingLoss, "scored": losses.CoSENTLoss}
    make = make_embedding(loss, rows, multi_dataset_batch_sampler="round_robin", learning_rate_mapping={"dense": 1e-3})
    check(make, tmp_path, bert, metrics=("eval_pairs_loss", "eval_scored_loss"))


# ---- What a user may give, and gets ----


def test_an_adapter_is_refused(bert, tmp_path):
    peft = pytest.importorskip("peft")
    model = embedding_model(bert)
    model.add_adapter(peft.LoraConfig(target_modules=["query"], r=2, task_type="FEATURE_EXTRACTION"))
    args = integrations.ADMMSentenceTransformerTrainingArguments(str(tmp_path), **FLAGS)
    with pytest.raises(ValueError, match="base weights of a PEFT/LoRA model are frozen"):
        integrations.ADMMSentenceTransformerTrainer(model, args, texts("a", "b"), texts("a", "b"))


def test_other_arguments_are_refused_with_the_class_to_pass(bert, tmp_path):
    plain = st.SentenceTransformerTrainingArguments(str(tmp_path))
    trainer = make_embedding()(tmp_path, bert)
    advice = r"Pass hf_admm\.integrations\.sentence_transformers\.ADMMSentenceTransformerTrainingArguments"
    with pytest.raises(ValueError, match=advice):
        integrations.ADMMSentenceTransformerTrainer(trainer.model, plain, texts("a", "b"))


def test_a_push_leaves_the_sidecar_at_home(bert, tmp_path, monkeypatch):
    trainer = make_embedding()(tmp_path, bert)
    trainer.train()
    hub = SimpleNamespace(upload_folder=lambda **_: SimpleNamespace(is_done=lambda: True))
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub, raising=False)
    monkeypatch.setattr(transformers.trainer, "upload_folder", hub.upload_folder, raising=False)  # earlier versions
    trainer.push_in_progress, trainer.hub_model_id = None, "me/mine"
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint-6"))
    assert (tmp_path / "modules.json").is_file() and not (tmp_path / SIDECAR_NAME).exists()
    assert json.loads((tmp_path / "hf_admm.json").read_text())["pattern"] == "2:4"
