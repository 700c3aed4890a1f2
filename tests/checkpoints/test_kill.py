"""A run killed with SIGKILL at random moments, saves included, resumes and ends with the straight run's bits."""

import json
import os

import pytest

from launch import launch


KILLS = int(os.environ.get("HF_ADMM_KILLS", "32"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_run_ends_as_the_straight_one(tmp_path):
    """After each death, every checkpoint is complete. The moments are random, and the same in every test."""
    launch(1, "kill_worker.py", tmp_path, KILLS, 0, timeout=60 * KILLS)
    report = json.loads((tmp_path / "report.json").read_text())
    assert sum(report["kills"].values()) >= KILLS and min(report["kills"].values()) >= KILLS // 4
    assert report["during_saves"] >= KILLS // 4
    assert report["runs"] >= 1 and report["equal"] == report["runs"]
