"""A folder of their own for the blocks of each page."""

import shutil

import datasets
import pytest
from docs_pages import fill


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The folder as every page finds it."""
    folder = tmp_path_factory.mktemp("world")
    fill(folder)
    return folder


@pytest.fixture
def folder(world, tmp_path, monkeypatch):
    """A copy of it, which is the working directory."""
    shutil.copytree(world, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "here"
