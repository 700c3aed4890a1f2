"""The package is whole: in a checkout, where callbacks/ and configs/ stand beside it, and installed."""

import configparser
import importlib
import re
from importlib import metadata, resources
from pathlib import Path

import pytest

import hf_admm


# Folders of the repository that stand beside the package and install inside it.
BESIDE = ("callbacks", "configs")


@pytest.mark.parametrize(
    "name", ["hf_admm", "hf_admm.callbacks", "hf_admm.configs", "hf_admm.commands", "hf_admm.cli"]
)
def test_modules_have_the_package_in_their_name(name):
    module = importlib.import_module(name)
    assert module.__name__ == name
    assert module.__file__, "a folder without __init__.py is not found in an editable install"


def test_every_package_is_declared():
    root = Path(__file__).resolve().parent.parent
    setup = configparser.ConfigParser()
    setup.read(root / "setup.cfg", encoding="utf-8")
    inside = {path.parent.relative_to(root) for path in (root / "hf_admm").rglob("*.py")}
    beside = {"hf_admm" / path.parent.relative_to(root) for name in BESIDE for path in (root / name).rglob("*.py")}
    assert set(setup["options"]["packages"].split()) == {".".join(path.parts) for path in inside | beside}


def test_recipes_are_package_data():
    folder = resources.files("hf_admm.configs")
    for path in ("2_4.yaml", "baselines/asp.yaml"):
        assert folder.joinpath(*path.split("/")).read_text(encoding="utf-8").startswith("#")


def test_types_are_announced():
    assert resources.files("hf_admm").joinpath("py.typed").is_file()


def test_public_names_exist():
    assert [name for name in hf_admm.__all__ if not hasattr(hf_admm, name)] == []


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", hf_admm.__version__)


def installed():
    try:
        return metadata.distribution("hf-admm")
    except metadata.PackageNotFoundError:
        pytest.skip("hf-admm is not installed")


def test_the_distribution_has_the_version_of_the_package():
    assert installed().version == hf_admm.__version__


def test_the_console_script_is_the_command():
    (script,) = (entry for entry in installed().entry_points if entry.group == "console_scripts")
    assert script.name == "hf-admm"
    assert script.load() is importlib.import_module("hf_admm.cli").main


def test_only_the_package_is_importable():
    # callbacks/ and configs/ must not become top-level modules of whoever installs this.
    assert set((installed().read_text("top_level.txt") or "hf_admm").split()) == {"hf_admm"}
