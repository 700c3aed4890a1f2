"""The site builds without a warning, and its API reference reads the docstrings as they are written here."""

import html
import os
import re
import subprocess
import sys

import pytest
from docs_pages import ROOT


pytest.importorskip("mkdocs", reason="extra docs")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def words(site, page):
    """The text of a page, its white space as single blanks."""
    text = (site / page).read_text(encoding="utf-8")
    article = re.search(r"<article.*?</article>", text, re.S)[0]
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", article)).split())


def test_arguments_have_types_defaults_and_headings(site):
    page = words(site, "reference/arguments.html")
    assert "sparsity_pattern (str, default: '2:4' ) – \"N:M\" (N kept" in page
    assert "Phase 1, ADMM admm_steps (float, default:" in page
    assert "Phase 2, SR-STE num_calibration_samples (int, default:" in page
    assert "Distillation" in page and "distill_temperature (float, default:" in page


def test_results_errors_and_links(site):
    page = words(site, "reference/audit.html")
    assert "Returns: AuditReport – The targets that the record names" in page
    assert "Raises: ValueError – If there are no safetensors" in page
    source = (site / "reference" / "patterns.html").read_text(encoding="utf-8")
    assert re.search(r'href="#hf_admm.sparsity.verdicts.TargetSelection"', source), "mentions are links"


def test_nothing_of_the_docstrings_form_is_left(site):
    for path in (site / "reference").glob("*.html"):
        page = words(site, path.relative_to(site))
        for mark in ("*optional*", "> Parameters", "Args:", "defaults to `", "[`"):
            assert mark not in page, f"{path.name}: {mark}"


def test_modules_beside_the_package_are_in_it(site):
    assert 'id="hf_admm.callbacks.phases.PhaseCallback"' in (site / "reference" / "callbacks.html").read_text()
    assert 'id="hf_admm.configs.load_config"' in (site / "reference" / "recipes.html").read_text()
