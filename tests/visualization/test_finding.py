"""What the report finds: places of weights, logs, notes, and figures of weights against the audit and brute force."""

import json
import math

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file

from hf_admm import audit_checkpoint, parse_pattern, project
from hf_admm.checkpoints.files import WEIGHTS_NAME
from hf_admm.visualization.layers import Place, place, row_labels
from hf_admm.visualization.logs import RunLogs, read_logs
from hf_admm.visualization.notes import NOTES_NAME, RunNotes, read_notes, save_notes, take_rows
from hf_admm.visualization.pictures import heat_map_cells, mask_text, most_masks, possible_masks
from hf_admm.visualization.weights import DenseWeights, weight_figures


# ---- Names ----


def test_places():
    assert place("bert.encoder.layer.3.output.dense.weight") == Place("bert.encoder.layer", 3, "output.dense")
    assert place("h.11.attn.c_attn.weight") == Place("h", 11, "attn.c_attn")
    assert place("classifier.weight") == Place("", None, "classifier")
    assert place("head.0.weight") == Place("", None, "head.0")


def test_rows_tell_an_encoder_from_a_decoder():
    names = [f"model.{stack}.layers.{i}.fc1.weight" for stack in ("encoder", "decoder") for i in range(2)]
    assert list(row_labels(names).values()) == ["encoder: fc1", "decoder: fc1"]
    assert list(row_labels(names[:2]).values()) == ["fc1"]


# ---- Logs ----


def test_series_leave_out_what_is_no_number():
    logs = RunLogs([{"step": 1, "loss": 0.5}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": 1}, {"loss": 2}])
    assert logs.series("loss") == ([1, 3], [0.5, 1.0]) and logs.series("x") == ([], [])
    assert logs.last_step == 3 and logs.switch_step is None


def test_the_switch_is_where_the_run_says_else_the_last_step_logged_in_phase_1():
    entries = [{"step": step, "admm/phase": 1 if step <= 6 else 2} for step in (2, 4, 8, 10)]
    assert RunLogs(entries).switch_step == 4 and RunLogs(entries, 6).switch_step == 6
    assert RunLogs(entries[:2], 6).switch_step is None, "phase 2 was not reached"


def test_metrics_come_without_times_and_with_the_loss_last():
    logs = RunLogs([{"step": 1, "eval_loss": 1.0, "eval_f1": 0.5, "eval_runtime": 3.0, "eval_x_per": "no", "loss": 1}])
    assert logs.metrics == ["eval_f1", "eval_loss"]


def test_logs_come_from_the_run_else_from_its_last_checkpoint(tmp_path):
    assert read_logs(tmp_path) is None
    for step in (9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": step}]}))
    assert read_logs(tmp_path) == [{"step": 10}]
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"step": 11, "loss": NaN}]}')
    assert read_logs(tmp_path)[0]["step"] == 11
    for damage in ("{", "[]", '{"log_history": 3}', '{"log_history": [3]}'):
        (tmp_path / "trainer_state.json").write_text(damage)
        with pytest.raises(ValueError, match="trainer_state.json is damaged"):
            read_logs(tmp_path)


# ---- Notes ----


def test_rows_have_no_padding_and_no_labels():
    def collate(rows):
        (row,) = rows
        ids = torch.tensor([[0, 0, *row]])
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([1]), "text": ["x"]}

    data = [[3, 4], [5, 6, 7]]
    rows = take_rows(data, collate)
    assert [row["input_ids"].tolist() for row in rows] == [[[3, 4]], [[5, 6, 7]]]
    assert set(rows[0]) == {"input_ids", "attention_mask"}
    assert set(take_rows(data, collate, keep_labels=True)[0]) == {"input_ids", "attention_mask", "labels"}
    assert len(take_rows(data * 9, collate, count=3)) == 3


def test_notes_come_back_and_are_not_uploaded(tmp_path):
    assert read_notes(tmp_path) == RunNotes()
    rows = [{"input_ids": torch.tensor([[i, 2]]), "pixel_values": torch.rand(1, 3)} for i in range(12)]
    save_notes(RunNotes("start", 7, rows), tmp_path)
    back = read_notes(tmp_path)
    assert (back.start, back.switch) == ("start", 7)
    assert [row["input_ids"].tolist() for row in back.rows] == [[[i, 2]] for i in range(12)]
    save_notes(RunNotes(), tmp_path)
    assert read_notes(tmp_path) == RunNotes()
    assert [file.name for file in tmp_path.iterdir()] == [NOTES_NAME]
    assert not list(filter_repo_objects([NOTES_NAME], ignore_patterns=["_*", "checkpoint-*"]))
    (tmp_path / NOTES_NAME).write_bytes(b"no")
    with pytest.raises(ValueError, match=f"{NOTES_NAME} is damaged"):
        read_notes(tmp_path)


# ---- Weights ----


@pytest.fixture
def folders(tmp_path):
    """Builds a dense and a sparse checkpoint of the same weights, which have a wrapper's prefix in the second."""

    def build(pattern, shape=(8, 16)):
        generator, parsed = torch.Generator().manual_seed(0), parse_pattern(pattern)
        dense = {f"layer.{i}.{kind}.weight": torch.randn(shape, generator=generator) for i in (0, 1) for kind in "ab"}
        dense["embedding.weight"] = torch.randn(10, 16, generator=generator)
        moved = {name: weight + 0.5 * torch.randn(shape, generator=generator) for name, weight in dense.items()
                 if "layer" in name}  # fmt: skip
        sparse = {f"bert.{name}": project(weight, parsed) for name, weight in moved.items()}
        sparse["bert.embedding.weight"] = dense["embedding.weight"]
        for name, tensors in (("dense", dense), ("sparse", sparse)):
            (tmp_path / name).mkdir(exist_ok=True)
            save_file(tensors, tmp_path / name / WEIGHTS_NAME)
        return tmp_path, dense, sparse

    return build


def find(folder, sparse, pattern):
    report = audit_checkpoint(folder / "sparse", pattern)
    size = (folder / "sparse" / WEIGHTS_NAME).stat().st_size
    return weight_figures(lambda: iter(sparse.items()), report, size, DenseWeights(folder / "dense"))


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4x4:8"])
def test_figures_are_those_of_the_audit_and_of_brute_force(pattern, folders):
    folder, dense, sparse = folders(pattern)
    sparse["bert.layer.1.a.weight"][0, 0:4] = 0  # fewer than the pattern keeps
    save_file(sparse, folder / "sparse" / WEIGHTS_NAME)
    found = find(folder, sparse, pattern)
    assert [layer.audit for layer in found.layers] == audit_checkpoint(folder / "sparse", pattern).weights
    rows, columns = found.group_sides
    masks = {}
    for layer in found.layers:
        if not layer.audit.sparse:
            assert layer.audit.name == "bert.embedding.weight" and layer.lost is None
            continue
        before, after = dense[layer.audit.name.removeprefix("bert.")], sparse[layer.audit.name]
        zeros = [(i, j) for i in range(8) for j in range(16) if after[i, j] == 0]
        assert layer.sparsity == len(zeros) / 128
        lost = sum(before[at].item() ** 2 for at in zeros) ** 0.5 / before.norm().item()
        cut = (before - project(before, parse_pattern(pattern))).norm() / before.norm()
        assert layer.lost == pytest.approx(lost, rel=1e-5) and layer.least == pytest.approx(cut.item(), rel=1e-5)
        assert layer.lost > layer.least
        for top in range(0, 8, rows):
            for left in range(0, 16, columns):
                block = after[top : top + rows, left : left + columns].flatten().tolist()
                code = sum(1 << i for i, value in enumerate(block) if value != 0)
                masks[code] = masks.get(code, 0) + 1
    assert found.masks == masks
    kept = sum(int((weight != 0).sum()) for name, weight in sparse.items() if "layer" in name)
    assert found.packed == found.stored - 4 * (4 * 128 - kept) + 4 * 128 // 8
    assert torch.equal(found.sample.after, sparse[found.sample.name])
    assert torch.equal(found.sample.before, dense[found.sample.name.removeprefix("bert.")])


def test_transposed_weights_are_grouped_along_their_inputs(tmp_path):
    weight = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    sparse = {"h.0.c.weight": project(weight, parse_pattern("2:4"), transposed=True)}
    save_file(sparse, tmp_path / WEIGHTS_NAME)
    report = audit_checkpoint(tmp_path, "2:4")
    found = weight_figures(lambda: iter(sparse.items()), report, 512)
    assert report.sparse[0].transposed and found.masks.total() == 32
    assert {code.bit_count() for code in found.masks} == {2} and found.sample.after.shape == (8, 16)


def test_a_density_has_no_masks_to_count(folders):
    folder, _, sparse = folders("0.5")
    found = find(folder, sparse, "0.5")
    assert not found.masks and len(found.lost) == 4


def test_names_that_might_mean_two_weights_mean_none(tmp_path):
    tensors = {"a.layer.0.weight": torch.ones(2, 2), "b.layer.0.weight": torch.ones(2, 2), "c.weight": torch.ones(2)}
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    dense = DenseWeights(tmp_path)
    assert (
        dense.get("layer.0.weight", (2, 2)) is None and dense.get("0_Transformer/a.layer.0.weight", (2, 2)) is not None
    )
    assert dense.get("c.weight", (3,)) is None and dense.get("model.c.weight", (2,)) is not None


def test_cells_of_the_heat_map(folders):
    folder, _, sparse = folders("2:4")
    found = find(folder, sparse, "2:4")
    values = {
        layer.audit.name: float(i) for i, layer in enumerate(found.layers) if "layer.1.b" not in layer.audit.name
    }
    labels, columns, cells = heat_map_cells(found, values)
    assert labels == ["a", "b"] and columns == [0, 1]
    expected = [[values["bert.layer.0.a.weight"], values["bert.layer.1.a.weight"]], [values["bert.layer.0.b.weight"]]]
    assert cells[0].tolist() == expected[0] and cells[1][0] == expected[1][0] and math.isnan(cells[1][1])


def test_masks_as_text(folders):
    assert mask_text(0b0101, (1, 4)) == "■□■□" and mask_text(0b1001, (2, 2)) == "■□\n□■"
    assert (possible_masks("2:4"), possible_masks("4x4:8")) == (6, 12870)
    folder, _, sparse = folders("4x4:8", (32, 64))
    assert len(most_masks(find(folder, sparse, "4x4:8"))) == 8
