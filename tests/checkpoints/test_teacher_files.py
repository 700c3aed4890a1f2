"""A resumed run has the teacher that it began with, or says that it can't."""

import json
import shutil

import pytest
import torch

from hf_admm import audit_checkpoint
from hf_admm.checkpoints.teacher_files import TEACHER_RECORD, TEACHER_WEIGHTS
from tiny_runs import STEPS, assert_same_weights, prepare, weights


FLAGS = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 20}


def run(model, data, folder, resume=None, **flags):
    trainer = prepare(model, data, folder, **{**FLAGS, **flags})
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


@pytest.fixture
def teacher(tiny_bert, tmp_path):
    tiny_bert(seed=1).save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


@pytest.mark.parametrize("pattern", ["2:4", "none"])
@pytest.mark.parametrize("who", ["self", "path"])
def test_a_resume_ends_with_the_same_bits(who, pattern, tiny_bert, token_data, teacher, tmp_path):
    """With dropout, from both phases, with a model given that is another one than that of the start."""
    flags = {"distill_teacher": "self" if who == "self" else teacher, "sparsity_pattern": pattern}
    flags |= {"distill_logits_weight": 0.5, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    straight = run(tiny_bert(), token_data(), tmp_path / "run", **flags)
    for step in (3, 9):
        resumed = run(
            tiny_bert(seed=7), token_data(), tmp_path / "run", tmp_path / "run" / f"checkpoint-{step}", **flags
        )
        assert_same_weights(resumed.model, weights(straight.model))
        logs = [[(log["loss"], log["distill/loss"]) for log in t.state.log_history if "loss" in log]
                for t in (straight, resumed)]  # fmt: skip
        assert logs[0] == logs[1] and len(logs[0]) == STEPS


@pytest.mark.parametrize("pattern", ["2:4", "none"])
def test_what_lies_in_the_folders(pattern, tiny_bert, token_data, tmp_path):
    """One copy beside the checkpoints, out of the hub's uploads; nothing of the teacher in the weights."""
    run(tiny_bert(), token_data(), tmp_path, distill_teacher="self", sparsity_pattern=pattern)
    found = sorted(entry.name for entry in tmp_path.iterdir())
    assert found == [TEACHER_WEIGHTS, *sorted(f"checkpoint-{step}" for step in (3, 6, 9, 12))]
    assert TEACHER_WEIGHTS.startswith("_")
    records = [json.loads((tmp_path / f"checkpoint-{step}" / TEACHER_RECORD).read_text()) for step in (3, 12)]
    assert records[0] == records[1] and records[0]["teacher"] == "self"
    if pattern != "none":
        assert audit_checkpoint(tmp_path / "checkpoint-3").ok


def test_no_checkpoint_no_copy(tiny_bert, token_data, teacher, tmp_path):
    for flags in ({"save_strategy": "no"}, {"save_only_model": True}):
        run(tiny_bert(), token_data(), tmp_path / "run", distill_teacher="self", **flags)
    run(tiny_bert(), token_data(), tmp_path / "run", distill_teacher=teacher)
    assert not (tmp_path / "run" / TEACHER_WEIGHTS).exists()


def test_a_checkpoint_that_was_moved_takes_its_teacher_along(tiny_bert, token_data, tmp_path):
    straight = run(tiny_bert(), token_data(), tmp_path / "run", distill_teacher="self")
    (tmp_path / "moved").mkdir()
    shutil.copytree(tmp_path / "run" / "checkpoint-6", tmp_path / "moved" / "checkpoint-6")
    start = tmp_path / "moved" / "checkpoint-6"
    with pytest.raises(ValueError, match=rf"has it no longer: {TEACHER_WEIGHTS} is missing beside it. Copy it there"):
        run(tiny_bert(), token_data(), tmp_path / "new", start, distill_teacher="self")
    shutil.copy(tmp_path / "run" / TEACHER_WEIGHTS, tmp_path / "moved")
    resumed = run(tiny_bert(seed=3), token_data(), tmp_path / "new", start, distill_teacher="self")
    assert_same_weights(resumed.model, weights(straight.model))
    again = run(tiny_bert(), token_data(), tmp_path / "new", tmp_path / "new" / "checkpoint-9", distill_teacher="self")
    assert_same_weights(again.model, weights(straight.model))


def test_a_second_run_in_the_folder_has_its_own_start(tiny_bert, token_data, tmp_path):
    run(tiny_bert(), token_data(), tmp_path, distill_teacher="self", max_steps=4, admm_steps=2, save_steps=4)
    straight = run(tiny_bert(seed=1), token_data(), tmp_path, distill_teacher="self", save_steps=6)
    with pytest.raises(
        ValueError, match="'self' has other weights than the teacher of .*checkpoint-4.*start a new run"
    ):
        run(tiny_bert(), token_data(), tmp_path, tmp_path / "checkpoint-4", distill_teacher="self")
    resumed = run(tiny_bert(), token_data(), tmp_path, tmp_path / "checkpoint-6", distill_teacher="self")
    assert_same_weights(resumed.model, weights(straight.model))


def test_a_teacher_that_has_changed(tiny_bert, token_data, teacher, tmp_path, caplog):
    run(tiny_bert(), token_data(), tmp_path / "run", distill_teacher=teacher)
    start = tmp_path / "run" / "checkpoint-6"
    shutil.copytree(teacher, tmp_path / "elsewhere")
    run(tiny_bert(), token_data(), tmp_path / "run", start, distill_teacher=str(tmp_path / "elsewhere"))  # the same
    run(tiny_bert(), token_data(), tmp_path / "run", start)
    assert "as its teacher, and goes on without one" in caplog.text
    tiny_bert(seed=2).save_pretrained(teacher)
    with pytest.raises(ValueError, match=rf"has other weights than the teacher of .*delete {TEACHER_RECORD} there"):
        run(tiny_bert(), token_data(), tmp_path / "run", start, distill_teacher=teacher)
    (start / TEACHER_RECORD).unlink()
    run(tiny_bert(), token_data(), tmp_path / "run", start, distill_teacher=teacher)
    assert "was trained without a teacher; from here on" in caplog.text


def test_damaged_files(tiny_bert, token_data, tmp_path):
    run(tiny_bert(), token_data(), tmp_path, distill_teacher="self")
    start, file = tmp_path / "checkpoint-6", tmp_path / TEACHER_WEIGHTS
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    for content, message in ((whole[:50], "is not a state of this model"), (flipped, "has other weights")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            run(tiny_bert(), token_data(), tmp_path, start, distill_teacher="self")
    file.write_bytes(whole)
    for text in ("{", "[]", '{"format_version": 9}', '{"format_version": 1, "teacher": "self"}'):
        (start / TEACHER_RECORD).write_text(text)
        with pytest.raises(ValueError, match=rf"{TEACHER_RECORD} is damaged"):
            run(tiny_bert(), token_data(), tmp_path, start, distill_teacher="self")


def test_a_save_that_fails_leaves_the_file_before_it(tiny_bert, token_data, tmp_path, monkeypatch):
    run(tiny_bert(), token_data(), tmp_path, distill_teacher="self")
    before = (tmp_path / TEACHER_WEIGHTS).read_bytes()

    def fails(model, filename, **kwargs):
        torch.save({}, filename)
        raise OSError("No space left on device")

    monkeypatch.setattr("hf_admm.checkpoints.teacher_files.save_model", fails)
    with pytest.raises(OSError, match="No space left"):
        run(tiny_bert(seed=1), token_data(), tmp_path, distill_teacher="self")
    assert (tmp_path / TEACHER_WEIGHTS).read_bytes() == before
    assert not (tmp_path / "_saving").exists()
