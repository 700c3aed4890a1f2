"""A checkpoint appears whole or not at all, and goes whole.

It is written into a staging folder beside the others, whose name no reader of checkpoints takes for one, and renamed
when all of it is on disk. What is deleted or replaced is renamed into that folder first. So whenever a run is killed,
every `checkpoint-*` folder is complete; or it holds nothing but a mark, if it was the save of `enable_jit_checkpoint`.
"""

import os
import re
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_admm.checkpoints.files import sync


# Hub uploads of the output folder ignore `_*`.
STAGING_NAME = "_saving"
# Left by `enable_jit_checkpoint` in an otherwise empty folder when a run is killed during such a save.
_SENTINEL = "checkpoint-is-incomplete.txt"
_REPLACED, _DELETED = "replaced-", "deleted-"
_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def checkpoint_name(step: int) -> str:
    """The folder's name of the checkpoint of a step, `checkpoint-{step}`."""
    return f"{PREFIX_CHECKPOINT_DIR}-{step}"


def publish(staged: Path, final: Path) -> None:
    """
    Gives a complete checkpoint its name, once its bytes are on disk. One that has this name already is replaced.

    Args:
        staged (`Path`):
            The folder that was written, in the staging folder of the one that holds `final`.
        final (`Path`):
            Its name from now on.
    """
    if not staged.is_dir():
        return
    for file in staged.rglob("*"):
        if file.is_file():
            sync(file)
    replaced = staged.with_name(_REPLACED + final.name)
    if final.exists():
        _remove(replaced)
        os.replace(final, replaced)
    os.replace(staged, final)
    sync(final.parent)
    _remove(replaced)
    _remove_if_empty(staged.parent)


def publish_rest(run_dir: Path) -> None:
    """
    Moves to its place what a trainer has written beside the checkpoint, or in a folder that it names itself.

    Args:
        run_dir (`Path`):
            The folder that holds the staging folder.
    """
    staging = run_dir / STAGING_NAME
    for entry in list(staging.glob("*")):
        final = run_dir / entry.name
        if entry.name.startswith((_REPLACED, _DELETED)):
            continue
        if entry.is_dir() and not final.is_dir():
            publish(entry, final)
        elif entry.is_dir():
            shutil.copytree(entry, final, dirs_exist_ok=True)
            _remove(entry)
        else:
            os.replace(entry, final)
    _remove_if_empty(staging)


def delete(folder: Path) -> None:
    """Deletes a checkpoint, which leaves its place as a whole."""
    doomed = folder.parent / STAGING_NAME / (_DELETED + folder.name)
    doomed.parent.mkdir(exist_ok=True)
    _remove(doomed)
    os.replace(folder, doomed)
    _remove(doomed)
    _remove_if_empty(doomed.parent)


def discard(staged: Path) -> None:
    """Removes what there is of an unfinished checkpoint."""
    _remove(staged)
    _remove_if_empty(staged.parent)


def rotate(run_dir: Path, limit: int | None, keep: list[Path]) -> None:
    """
    Deletes the oldest checkpoints.

    Args:
        run_dir (`Path`):
            The folder that holds the checkpoints.
        limit (`int`, *optional*):
            How many stay at most, `save_total_limit`. `None` or 0: all of them.
        keep (`list[Path]`):
            Those that stay in any case: the newest and the best.
    """
    if not limit or limit < 0:
        return
    found = [(folder.stat().st_mtime_ns, step, folder) for step, folder in _checkpoints(run_dir)]
    deletable = [folder for *_, folder in sorted(found) if folder not in keep]
    for folder in deletable[: max(0, len(found) - max(limit, len(set(keep))))]:
        delete(folder)


def clean_up(run_dir: Path) -> list[Path]:
    """
    Puts in order what a killed run left: unfinished saves and deletions go; a checkpoint that was about to be replaced
    and is missing comes back.

    Args:
        run_dir (`Path`):
            The folder that holds the checkpoints. Need not exist.

    Returns:
        `list[Path]`: The folders with the name of a checkpoint that held nothing of one, and are gone.
    """
    staging = run_dir / STAGING_NAME
    for replaced in staging.glob(f"{_REPLACED}*"):
        final = run_dir / replaced.name.removeprefix(_REPLACED)
        if not final.exists():
            os.replace(replaced, final)
    _remove(staging)
    empty = [folder for _, folder in _checkpoints(run_dir) if os.listdir(folder) == [_SENTINEL]]
    for folder in empty:
        _remove(folder)
    return empty


def _checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    matches = [(_CHECKPOINT.fullmatch(folder.name), folder) for folder in run_dir.glob("*") if folder.is_dir()]
    return [(int(match[1]), folder) for match, folder in matches if match]


def _remove(folder: Path) -> None:
    if folder.is_symlink():  # a checkpoint that was moved to another disk, which stays there
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        pass
