"""The audit: of live weights, and of checkpoints with and without a record, in one file or in shards."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from hf_admm.audit import audit_checkpoint, audit_weights
from hf_admm.checkpoints.files import RECORD_NAME, WEIGHTS_NAME
from hf_admm.sparsity.patterns import parse_pattern
from hf_admm.sparsity.projections import project


QUERY = "encoder.layer.0.attention.self.query.weight"
BERT = BertConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=24,
)
GPT2 = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=24)


def sparse_weight(pattern="2:4", shape=(8, 16), transposed=False, dtype=torch.float32):
    return project(torch.randn(shape), parse_pattern(pattern), transposed).to(dtype)


def prune(model, pattern="2:4", transposed=False):
    """Prunes the matrices of the layers in place and returns their names."""
    names = [
        name for name, weight in model.named_parameters() if weight.dim() == 2 and "layer" in name or ".c_" in name
    ]
    names = [name for name in names if name.endswith("weight")]
    with torch.no_grad():
        for name in names:
            weight = model.get_parameter(name)
            weight.copy_(project(weight, parse_pattern(pattern), transposed))
    return names


def write_record(folder, targets, pattern="2:4", transposed=False):
    record = {
        "format_version": 1,
        "hf_admm_version": "0.1.0",
        "pattern": pattern,
        "targets": {name: {"transposed": transposed} for name in targets},
    }
    (folder / RECORD_NAME).write_text(json.dumps(record))


@pytest.fixture
def bert(tmp_path):
    """A pruned BERT on disk, and the names of its pruned weights."""
    torch.manual_seed(0)
    model = BertModel(BERT, add_pooling_layer=False)
    names = prune(model)
    model.save_pretrained(tmp_path)
    return tmp_path, names


def rewrite(folder, change):
    """Applies `change` to the state dict in `model.safetensors`."""
    tensors = load_file(folder / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})


def fill_first_zero(tensor, value=1e-3):
    tensor[tuple(torch.nonzero(tensor == 0)[0])] = value


def by_name(report):
    return {weight.name: weight for weight in report.weights}


class TestAuditWeights:
    def test_weights_that_obey(self):
        weights = [("a", sparse_weight(), False), ("b", sparse_weight(shape=(16, 4), transposed=True), True)]
        report = audit_weights(weights, "2:4")
        assert report.ok and report.violations == 0 and report.sparsity == 0.5
        assert [weight.groups for weight in report.weights] == [32, 16]

    @pytest.mark.parametrize("value", [1e-30, float("nan"), float("inf")])
    def test_one_changed_entry_breaks_one_group(self, value):
        weight = sparse_weight()
        fill_first_zero(weight, value)
        report = audit_weights([("good", sparse_weight(), False), ("bad", weight, False)], parse_pattern("2:4"))
        assert not report.ok and report.violations == 1
        assert [weight.zeros for weight in report.weights] == [64, 63]
        assert [failure.name for failure in report.failures] == ["bad"]
        assert "bad (1 of 32 groups broken)" in report.verdict() and "good" not in report.verdict()

    def test_orientation_matters(self):
        weight = sparse_weight(shape=(16, 16), transposed=True)
        assert audit_weights([("w", weight, True)], "2:4").ok
        assert not audit_weights([("w", weight, False)], "2:4").ok

    @pytest.mark.parametrize("pattern", ["4x4:8", "1:4", "3:4", "2:8", "0.25"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_patterns_and_dtypes(self, pattern, dtype):
        weight = sparse_weight(pattern, dtype=dtype)
        report = audit_weights([("w", weight, False)], pattern)
        assert report.ok and report.sparsity == pytest.approx(1 - parse_pattern(pattern).density)
        fill_first_zero(weight)
        assert audit_weights([("w", weight, False)], pattern).violations == 1

    def test_a_weight_of_another_shape_fails(self):
        report = audit_weights([("odd", torch.zeros(4, 6), False), ("fine", sparse_weight(), False)], "2:4")
        assert not report.ok and [failure.status for failure in report.failures] == ["misfit"]

    def test_nothing_to_audit_is_a_failure(self):
        report = audit_weights([], "2:4")
        assert not report.ok and "no weight is sparse" in report.verdict() and report.sparsity == 0

    def test_weights_may_come_from_a_generator(self):
        alive = []

        def weights():
            for name in "abc":
                alive.append(name)
                yield name, sparse_weight(), False

        assert len(audit_weights(weights(), "2:4").weights) == 3
        assert alive == ["a", "b", "c"]

    def test_invalid_pattern(self):
        with pytest.raises(ValueError, match="Invalid sparsity pattern '5:4'"):
            audit_weights([], "5:4")

    def test_table_and_dict(self):
        bad = sparse_weight()
        fill_first_zero(bad)
        report = audit_weights([("a.weight", bad, False), ("b", sparse_weight(shape=(16, 4)).t(), True)], "2:4")
        lines = report.table().splitlines()
        assert lines[0].split() == ["weight", "shape", "zeros", "groups", "broken", "status"]
        assert lines[2].split() == ["a.weight", "8x16", "49.2%", "32", "1", "broken"]
        assert lines[3].split() == ["b", "4x16", "50.0%", "16", "0", "ok", "(transposed)"]
        assert lines[-1] == "pattern 2:4: 2 of 2 weights sparse, 49.48% zeros, 1 of 48 groups broken"
        decoded = json.loads(json.dumps(report.to_dict()))
        assert decoded["violations"] == 1 and decoded["ok"] is False and decoded["weights"][0]["shape"] == [8, 16]


class TestWithoutRecord:
    def test_a_pruned_model_passes_and_the_rest_is_dense(self, bert):
        folder, names = bert
        report = audit_checkpoint(folder)
        assert report.ok and report.pattern == "2:4" and report.sparsity == 0.5
        assert {weight.name for weight in report.sparse} == set(names) and len(names) == 12
        dense = {weight.name for weight in report.weights if weight.status == "dense"}
        assert dense == {f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")}

    def test_a_dense_model_is_not_ok(self, tmp_path):
        BertModel(BERT).save_pretrained(tmp_path)
        report = audit_checkpoint(tmp_path)
        assert not report.ok and report.sparse == [] and report.failures == []

    def test_one_changed_entry_is_found(self, bert):
        folder, _ = bert
        rewrite(folder, lambda tensors: fill_first_zero(tensors[QUERY]))
        report = audit_checkpoint(folder)
        assert [(weight.name, weight.broken, weight.groups) for weight in report.failures] == [(QUERY, 1, 64)]

    def test_one_entry_changed_in_every_group_is_found(self, tmp_path):
        weight = torch.tensor([[1.0, 2.0, 3.0, 0.0]]).repeat(6, 3)
        save_file({"w": weight, "v": sparse_weight()}, tmp_path / WEIGHTS_NAME)
        report = audit_checkpoint(tmp_path)
        assert [(failure.name, failure.broken) for failure in report.failures] == [("w", 18)]

    def test_the_smallest_weight_is_not_excused(self, tmp_path):
        save_file({"w": torch.tensor([[1.0, 0.0, 3.0, 4.0]])}, tmp_path / WEIGHTS_NAME)
        assert audit_checkpoint(tmp_path).violations == 1

    def test_padding_rows_do_not_make_an_embedding_sparse(self, tmp_path):
        embedding = torch.randn(12, 8)
        embedding[4:] = 0
        save_file({"embedding": embedding, "w": sparse_weight()}, tmp_path / WEIGHTS_NAME)
        report = audit_checkpoint(tmp_path)
        assert report.ok and by_name(report)["embedding"].status == "dense"

    def test_zeros_alone_are_not_sparse_training(self, tmp_path):
        save_file({"w": torch.zeros(8, 8), "b": torch.zeros(8)}, tmp_path / WEIGHTS_NAME)
        report = audit_checkpoint(tmp_path)
        assert not report.ok and [weight.status for weight in report.weights] == ["all zero"]

    def test_a_pruned_weight_that_the_pattern_does_not_fit_is_listed(self, tmp_path):
        odd = torch.randn(6, 6)
        odd[:, ::2] = 0
        save_file({"odd": odd, "w": sparse_weight()}, tmp_path / WEIGHTS_NAME)
        report = audit_checkpoint(tmp_path)
        assert report.ok and by_name(report)["odd"].status == "odd shape"

    def test_transposed_weights_are_recognised(self, tmp_path):
        model = GPT2Model(GPT2)
        names = prune(model, transposed=True)
        model.save_pretrained(tmp_path)
        report = audit_checkpoint(tmp_path)
        assert report.ok and len(names) == 8
        assert all(weight.transposed for weight in report.sparse)
        rewrite(tmp_path, lambda tensors: fill_first_zero(tensors[names[-1]]))
        assert [(weight.name, weight.broken) for weight in audit_checkpoint(tmp_path).failures] == [(names[-1], 1)]

    @pytest.mark.parametrize("pattern", ["4x4:8", "1:4", "0.3"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_other_patterns_and_dtypes(self, tmp_path, pattern, dtype):
        model = BertModel(BERT, add_pooling_layer=False)
        names = prune(model, pattern)
        model.to(dtype).save_pretrained(tmp_path)
        assert {weight.name for weight in audit_checkpoint(tmp_path, pattern).sparse} == set(names)
        assert audit_checkpoint(tmp_path, pattern).ok
        rewrite(tmp_path, lambda tensors: fill_first_zero(tensors[QUERY]))
        assert [weight.name for weight in audit_checkpoint(tmp_path, pattern).failures] == [QUERY]

    def test_integers_and_other_dimensions_are_not_looked_at(self, tmp_path):
        tensors = {"ids": torch.zeros(4, 4, dtype=torch.int64), "b": torch.zeros(8), "w": sparse_weight()}
        save_file(tensors, tmp_path / WEIGHTS_NAME)
        assert [weight.name for weight in audit_checkpoint(tmp_path).weights] == ["w"]


class TestShards:
    def test_shards_are_audited_as_one_model(self, tmp_path):
        model = BertModel(BERT, add_pooling_layer=False)
        names = prune(model)
        model.save_pretrained(tmp_path / "whole")
        model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
        shards = sorted((tmp_path / "shards").glob("*.safetensors"))
        assert len(shards) > 2
        whole, sharded = audit_checkpoint(tmp_path / "whole"), audit_checkpoint(tmp_path / "shards")
        assert by_name(sharded) == by_name(whole) and sharded.ok and len(sharded.sparse) == len(names)

    def test_one_shard_on_its_own_is_not_held_to_the_record(self, tmp_path):
        model = BertModel(BERT, add_pooling_layer=False)
        names = prune(model)
        model.save_pretrained(tmp_path, max_shard_size="8KB")
        write_record(tmp_path, names)
        assert audit_checkpoint(tmp_path).ok
        shard = next(path for path in tmp_path.glob("*.safetensors") if set(load_file(path)) & set(names))
        report = audit_checkpoint(shard)
        assert report.ok and 0 < len(report.sparse) < len(names)


class TestRecord:
    def test_every_recorded_target_is_checked_with_its_pattern(self, tmp_path):
        model = GPT2Model(GPT2)
        names = prune(model, "1:4", transposed=True)
        model.save_pretrained(tmp_path)
        write_record(tmp_path, names, "1:4", transposed=True)
        report = audit_checkpoint(tmp_path)
        assert report.ok and report.pattern == "1:4" and report.sparsity == 0.75
        assert audit_checkpoint(tmp_path / WEIGHTS_NAME) == report

    def test_a_recorded_weight_turned_dense_fails(self, bert):
        folder, names = bert
        rewrite(folder, lambda tensors: tensors[QUERY].normal_())
        assert audit_checkpoint(folder).ok, "without a record it is one more dense weight"
        write_record(folder, names)
        report = audit_checkpoint(folder)
        assert [(weight.name, weight.broken) for weight in report.failures] == [(QUERY, 64)]

    def test_a_recorded_weight_stored_the_other_way_round_fails(self, bert):
        folder, names = bert
        rewrite(folder, lambda tensors: tensors.update({QUERY: tensors[QUERY].t().contiguous()}))
        assert audit_checkpoint(folder).ok
        write_record(folder, names)
        assert [weight.name for weight in audit_checkpoint(folder).failures] == [QUERY]

    def test_a_missing_target_fails_by_name(self, bert):
        folder, names = bert
        write_record(folder, [*names, "gone.weight"])
        report = audit_checkpoint(folder)
        assert not report.ok and "gone.weight (missing)" in report.verdict()
        assert report.violations == 0 and report.table().splitlines()[-2].split() == [
            "gone.weight",
            *"----",
            "missing",
        ]

    def test_a_given_pattern_overrides_the_record(self, bert):
        folder, names = bert
        write_record(folder, names)
        assert audit_checkpoint(folder, "4:8").ok
        report = audit_checkpoint(folder, "1:4")
        assert {weight.name for weight in report.failures} == set(names)
        assert {weight.status for weight in audit_checkpoint(folder, "1:5").failures} == {"misfit"}
