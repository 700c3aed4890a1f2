"""The workflows in .github/ parse, and what they call exists: targets, files, extras; each claimed Python is run."""

import configparser
import re
import shlex
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).resolve().parent.parent
FILES = {path.name: path for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))}
WORKFLOWS = {name: yaml.safe_load(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")
EXTRAS = SETUP["options.extras_require"]


def steps(workflow):
    for job in workflow["jobs"].values():
        yield from job["steps"]


def pythons(job):
    """The versions that a job runs with."""
    matrix = job.get("strategy", {}).get("matrix", {}).get("python-version", [])
    plain = [step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
    return [version for version in [*matrix, *plain] if "{{" not in version]


def targets(text):
    return {name for line in re.findall(r"^([\w -]+):", text, re.M) for name in line.split()}


def test_all_are_there():
    assert set(FILES) == {"ci.yml", "docs.yml", "release.yml"}


@pytest.mark.parametrize("name", FILES)
def test_form(name):
    workflow = WORKFLOWS[name]
    assert True in workflow, "`on`, which YAML reads as true"
    assert workflow["permissions"] == {"contents": "read"}, "a job that needs more says so itself"
    for job in workflow["jobs"].values():
        needed = job.get("needs", [])
        assert set([needed] if isinstance(needed, str) else needed) <= set(workflow["jobs"])
    for step in steps(workflow):
        assert ("run" in step) != ("uses" in step)
        assert "uses" not in step or re.fullmatch(r"[\w.-]+/[\w.-]+@[\w./-]+", step["uses"]), "a version is pinned"


@pytest.mark.parametrize("name", FILES)
def test_what_is_called_exists(name):
    for step in steps(WORKFLOWS[name]):
        for line in step.get("run", "").splitlines():
            words = shlex.split(line)
            if words[0] == "make":
                assert set(words[1:]) <= targets(MAKEFILE), line
            if words[0] == "bash":
                assert (ROOT / words[1]).is_file(), line
            for path in re.findall(r"\$TESTS/(\S+?)\"", line):
                assert (ROOT / "tests" / path).is_file(), line
            for path in re.findall(r"-c (\S+)", line):
                assert (ROOT / path).is_file(), line
            for extras in re.findall(r"\.\[([\w,-]+)\]", line):
                assert set(extras.split(",")) <= set(EXTRAS), line


def test_every_claimed_python_is_run():
    claimed = re.findall(r"Python :: (3\.\d+)$", SETUP["metadata"]["classifiers"], re.M)
    jobs = WORKFLOWS["ci.yml"]["jobs"]
    assert sorted([*pythons(jobs["test"]), *pythons(jobs["oldest"])]) == sorted(claimed)
    assert pythons(jobs["oldest"]) == [SETUP["options"]["python_requires"].removeprefix(">=")]


def test_targets_of_the_makefile():
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M)[1].split()
    assert set(phony) == targets(MAKEFILE)
    for extra in re.findall(r"\(extra `([\w-]+)`\)", MAKEFILE):
        assert extra in EXTRAS


def requirements(*extras):
    """Name and lower bound of what is required, with the extras that an extra names."""
    lines = SETUP["options"]["install_requires"].split() if not extras else []
    for extra in extras:
        for line in EXTRAS[extra].split():
            if own := re.fullmatch(r"hf-admm\[([\w,-]+)\]", line):
                yield from requirements(*own[1].split(","))
            else:
                lines.append(line)
    for line in lines:
        yield re.match(r"[\w-]+", line)[0], re.search(r">=([\d.]+)", line)[1]


def test_the_oldest_versions_are_those_that_are_claimed():
    text = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8")
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", text, re.M))
    for name, lowest in [*requirements(), *requirements("test")]:
        found = pinned.get(name, "")
        assert found == lowest or re.fullmatch(rf"{re.escape(lowest)}(\.0)*", found), f"{name}: {found}, not {lowest}"
