"""What `make package` builds: the source distribution is the repository, the wheel is the package and nothing else."""

import functools
import os
import re
import runpy
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from fnmatch import fnmatch
from pathlib import Path

import pytest


pytest.importorskip("setuptools", minversion="70.1")  # which makes wheels without another package

ROOT = Path(__file__).resolve().parent.parent
MADE_BY_BUILDING = r"PKG-INFO|hf_admm\.egg-info/.*"
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""
README = "See [guide](docs/guide.md#runs), [paper](https://arxiv.org/abs/1), [below](#top). ![A run](docs/a.png)\n"


@functools.cache
def tracked() -> set[str]:
    """What git tracks; where there is no git, as in continuous integration or an sdist, what it would not ignore."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return {name for name in listed.split("\0") if name and (ROOT / name).exists()}
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").split()]
    names = set()
    for folder, folders, files in os.walk(ROOT):
        inside = Path(folder).relative_to(ROOT)
        folders[:] = [name for name in folders if not any(fnmatch(name, pattern) for pattern in ignored)]
        names |= {(inside / name).as_posix() for name in files}
    return {name for name in names if not re.fullmatch(MADE_BY_BUILDING, name)}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Runs setuptools as `python -m build` does, but without fetching it: the sdist, and the wheel from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    tree = folder / "tree"
    for name in tracked():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((ROOT / name).read_bytes())
    (tree / "hf_admm" / "__pycache__").mkdir()
    (tree / "hf_admm" / "__pycache__" / "cli.cpython-311.pyc").touch()  # must not come along

    def build(kind, cwd):
        command = [sys.executable, "-c", BUILD, kind, str(folder)]
        ran = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        return folder / ran.stdout.split()[-1]

    sdist = build("build_sdist", tree)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return sdist, build("build_wheel", folder / sdist.name.removesuffix(".tar.gz"))


def test_the_sdist_is_what_git_tracks(built):
    with tarfile.open(built[0]) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert {name for name in names if not re.fullmatch(MADE_BY_BUILDING, name)} == tracked()


def test_the_wheel_is_the_package(built):
    with zipfile.ZipFile(built[1]) as archive:
        names = set(archive.namelist())
    inside = {name for name in names if ".dist-info/" not in name}
    folders = {"hf_admm/": "hf_admm/", "callbacks/": "hf_admm/callbacks/", "configs/": "hf_admm/configs/"}
    expected = {
        name.replace(folder, home, 1)
        for name in tracked()
        for folder, home in folders.items()
        if name.startswith(folder)
    }
    assert inside == expected
    assert "hf_admm/py.typed" in inside
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_description_has_no_dead_link(built):
    with zipfile.ZipFile(built[1]) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(name))
    assert metadata["Description-Content-Type"] == "text/markdown"
    text = metadata.get_payload()
    assert text.startswith("# hf-admm") and "(https://arxiv.org/" in text
    assert re.findall(r"\]\((?!https?:|#)[^)]*\)", text) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("", "See guide, [paper](https://arxiv.org/abs/1), [below](#top). \n"),
        (
            "https://host/o/r/",
            "See [guide](https://host/o/r/blob/v1.0/docs/guide.md#runs), [paper](https://arxiv.org/abs/1), "
            "[below](#top). ![A run](https://host/o/r/raw/v1.0/docs/a.png)\n",
        ),
    ],
    ids=["unknown", "known"],
)
def test_links_of_the_description(source, expected):
    rewrite = runpy.run_path(str(ROOT / "setup.py"))["long_description"]
    assert rewrite(README, source, "1.0") == expected
