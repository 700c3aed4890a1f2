"""The results of a study survive whatever stops it."""

import fcntl
import json
import multiprocessing
import threading

import pytest

from benchmarks.study.lines import append, claimed, key, read


def test_a_key_is_of_the_settings_and_not_of_their_order():
    assert key({"a": 1, "b": {"c": 2, "d": 3}}) == key({"b": {"d": 3, "c": 2}, "a": 1})
    assert key({"a": 1}) != key({"a": 2}) and key({"a": 1}) != key({"b": 1})


def test_lines_come_back(tmp_path):
    path = tmp_path / "deep" / "results.jsonl"
    assert read(path) == []
    append(path, {"key": "x", "value": 0.5, "nested": [1, float("nan")]})
    append(path, {"key": "y", "value": float("inf")})
    assert read(path) == [{"key": "x", "value": 0.5, "nested": [1, None]}, {"key": "y", "value": None}]


def test_the_later_of_two_lines_with_one_key_counts(tmp_path):
    path = tmp_path / "results.jsonl"
    for value in (1, 2):
        append(path, {"key": "x", "value": value})
    assert read(path) == [{"key": "x", "value": 2}]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_kill_in_the_middle_of_a_line_loses_that_line_alone(cut, tmp_path):
    path = tmp_path / "results.jsonl"
    append(path, {"key": "first", "value": 1})
    whole = path.read_bytes()
    append(path, {"key": "second", "value": 2})
    path.write_bytes(path.read_bytes()[: len(whole) + cut])
    assert read(path) == [{"key": "first", "value": 1}]
    append(path, {"key": "third", "value": 3})
    assert [line["key"] for line in read(path)] == ["first", "third"]


def test_a_line_that_only_lacks_its_end_is_whole(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({"key": "first"}))
    append(path, {"key": "second"})
    assert [line["key"] for line in read(path)] == ["first", "second"]


def _write(path, name):
    for number in range(50):
        append(path, {"key": f"{name}-{number}", "text": "x" * 5000})


def test_processes_do_not_write_into_each_others_lines(tmp_path):
    path = tmp_path / "results.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(read(path)) == 100


def test_a_line_waits_for_the_one_that_is_being_written(tmp_path):
    path = tmp_path / "results.jsonl"
    writer = threading.Thread(target=append, args=(path, {"key": "second"}))
    with open(path, "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(b'{"key": ')
        other.flush()
        writer.start()
        writer.join(0.2)
        assert writer.is_alive()
        other.write(b'"first"}\n')
    writer.join()
    assert [line["key"] for line in read(path)] == ["first", "second"]


def test_a_claim_is_of_one_at_a_time(tmp_path):
    with claimed(tmp_path, "run") as first, claimed(tmp_path, "run") as second, claimed(tmp_path, "other") as other:
        assert first and other and not second
    with claimed(tmp_path, "run") as again:
        assert again
