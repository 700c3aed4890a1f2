"""Starts a worker script in one process, or by torchrun in several, on CPU."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch


_FILE_EVENTS = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.scandir")

has_gloo = torch.distributed.is_gloo_available()
needs_gloo = pytest.mark.skipif(not has_gloo, reason="needs torch with gloo")
# torch 2.6 gathers the shards of a module on GPUs alone.
trains_shards = pytest.mark.skipif(
    not (has_gloo and hasattr(torch.cpu.Stream, "record_event")), reason="needs torch that trains shards on CPUs"
)


def launch(processes: int, worker: str, *arguments: object, fails=False, timeout: int = 300, stdout=False) -> str:
    """Returns what the worker wrote to stderr, with what it wrote to stdout before it if that is wanted."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    script = Path(__file__).with_name(worker)
    command = [sys.executable, *(torchrun if processes > 1 else []), str(script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parent.parent)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert (result.returncode != 0) == fails, result.stderr[-3000:]
    return result.stdout + result.stderr if stdout else result.stderr


def leave() -> None:
    """Ends a worker without tearing its interpreter down, which gloo's threads can abort (pytorch issue 190489)."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def die_at(operation: int, folder: Path) -> None:
    """Lets this process kill itself right before a file operation in a folder, counted from now on."""
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        if event in _FILE_EVENTS and str(arguments[0]).startswith(str(folder)):
            seen += 1
            if seen >= operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
