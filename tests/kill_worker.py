"""Kills training with SIGKILL at random moments and resumes it, for tests/checkpoints/test_kill.py.

A process that has imported everything forks one child a life, so that thirty deaths take a minute. A child dies either
at a random time, or at a random one of the file operations of its saves.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_admm import ADMMTrainer, ADMMTrainingArguments, audit_checkpoint
from hf_admm.checkpoints.sidecar import SIDECAR_NAME
from hf_admm.checkpoints.staging import STAGING_NAME
from launch import die_at
from tiny_models import tiny_bert, token_data


STEPS, SWITCH = 24, 12


class Tell(TrainerCallback):
    """Tells the parent which step begins."""

    def __init__(self, pipe: int):
        self.pipe = pipe

    def on_step_begin(self, args, state, control, **kwargs):
        os.write(self.pipe, f"{state.global_step}\n".encode())


def train(folder: Path, pipe: int) -> None:
    model, data = tiny_bert(), token_data(64)
    args = ADMMTrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=8, learning_rate=1e-3, admm_steps=SWITCH,
        admm_update_steps=4, admm_rho=0.1, save_steps=2, save_total_limit=3, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, logging_steps=2, report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = ADMMTrainer(model, args, train_dataset=data, eval_dataset=data[:16], callbacks=[Tell(pipe)])
    last = get_last_checkpoint(folder) if folder.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    torch.save({"weights": weights, "log": trainer.state.log_history}, folder / "final.tmp")
    os.replace(folder / "final.tmp", folder / "final.pt")


def live(folder: Path, operation: int | None = None, seconds: float | None = None) -> tuple[bool, int]:
    """One life of a run: whether it was killed, and the last step that it began (-1 if none)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if operation is not None:
            die_at(operation, folder)
        try:
            train(folder, writer)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writer)
    told = os.read(reader, 16)
    if seconds is not None and told:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    while chunk := os.read(reader, 4096):
        told = (told + chunk)[-16:]
    os.close(reader)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("training failed by itself, see above")
    steps = told.split()
    return os.WIFSIGNALED(status), int(steps[-1]) if steps else -1


def check(folder: Path, files: set[str]) -> int:
    """Every checkpoint there is, is complete. Returns how many there are."""
    checkpoints = [entry for entry in folder.glob("checkpoint-*") if entry.is_dir()]
    for checkpoint in checkpoints:
        assert {file.name for file in checkpoint.iterdir()} == files, (checkpoint, sorted(checkpoint.iterdir()))
        assert audit_checkpoint(checkpoint).ok, checkpoint
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        assert checkpoint.name == f"checkpoint-{state['global_step']}"
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
            torch.load(checkpoint / name, weights_only=False)
    return len(checkpoints)


def main(folder: str, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    dice, folder = random.Random(seed), Path(folder)
    begun = time.monotonic()
    assert live(folder / "straight") == (False, STEPS - 1)
    duration = time.monotonic() - begun
    straight = torch.load(folder / "straight" / "final.pt", weights_only=False)
    files = {file.name for file in Path(get_last_checkpoint(folder / "straight")).iterdir()}
    assert SIDECAR_NAME in files
    report = {"kills": {"admm": 0, "srste": 0}, "during_saves": 0, "resumed_from_nothing": 0, "runs": 0, "equal": 0}
    while sum(report["kills"].values()) < kills or not report["runs"]:
        run = folder / f"run{report['runs']}"
        moment = (
            {"operation": dice.randint(1, 120)} if dice.random() < 0.5 else {"seconds": dice.uniform(0, duration / 2)}
        )
        killed, step = live(run, **moment)
        if killed:
            report["kills"]["admm" if step < SWITCH else "srste"] += 1
            report["during_saves"] += (run / STAGING_NAME).is_dir()
            report["resumed_from_nothing"] += not (check(run, files) if run.is_dir() else 0)
            continue
        final = torch.load(run / "final.pt", weights_only=False)
        report["runs"] += 1
        report["equal"] += all(torch.equal(final["weights"][n], w) for n, w in straight["weights"].items()) and (
            [log.get("eval_loss") for log in final["log"]] == [log.get("eval_loss") for log in straight["log"]]
        )
        assert check(run, files) and not (run / STAGING_NAME).exists()
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
