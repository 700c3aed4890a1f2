"""DDP on two gloo processes is the run in one process, and both processes hold the same model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_admm import audit_checkpoint


WORKER = Path(__file__).with_name("ddp_worker.py")


def run(processes, folder, *arguments):
    folder.mkdir()
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parent.parent)}
    command = [sys.executable, *launcher, str(WORKER), str(folder), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(processes)]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")
def test_two_processes_train_as_one_and_resume(tmp_path):
    """SGD, so that a penalty counted once per process would not be normalised away."""
    (one,) = run(1, tmp_path / "one", "16")
    first, second = run(2, tmp_path / "two", "8")
    resumed, _ = run(2, tmp_path / "resumed", "8", str(tmp_path / "two" / "checkpoint-3"))
    for name, weight in one.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.equal(first[name], resumed[name]), name
        torch.testing.assert_close(weight, first[name], rtol=1e-4, atol=2e-6, msg=name)
    assert audit_checkpoint(tmp_path / "two" / "model").ok
