"""Every Python block of the documentation and of its docstrings runs, page by page, in the order of the page."""

import importlib.util
import re

import pytest
import torch
from docs_pages import ROOT, common_names, pages
from sybil import Sybil
from sybil.document import PythonDocStringDocument
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, SkipParser


# Packages that a page may be about and the tests can do without: it is skipped where one is missing.
OPTIONAL = set("matplotlib nncf onnx onnxruntime openvino peft sentence_transformers timm torchvision trl".split())


def evaluate(example):
    if "cuda" in example.parsed and not torch.cuda.is_available():
        return
    PythonEvaluator()(example)


SYBIL = Sybil(
    parsers=[CodeBlockParser(language="python", evaluator=evaluate), SkipParser()],
    document_types={".py": PythonDocStringDocument},
)
# Docstrings are in the reference. That of adapters needs an adapter on disk; those of configs read the command line.
SOURCES = [
    path.relative_to(ROOT).as_posix()
    for folder in ("hf_admm", "callbacks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name != "adapters.py" and "```python" in path.read_text(encoding="utf-8")
]
DOCUMENTS = {
    page: document for page in [*pages(), *SOURCES] if list((document := SYBIL.parse(ROOT / page)).examples())
}


def test_blocks_are_found():
    pages = {"docs/index.md", "docs/callbacks.md", "docs/getting_started.md", "docs/reference/audit.md"}
    assert pages | {"hf_admm/trainer.py", "hf_admm/arguments.py", "callbacks/monitor.py"} <= set(DOCUMENTS)


@pytest.mark.parametrize("page", DOCUMENTS)
def test_python_blocks_run(page, folder):
    DOCUMENTS[page].namespace.update(common_names(page))
    for example in DOCUMENTS[page].examples():
        try:
            example.evaluate()
        except ImportError as error:
            # Of a package that is missing, or what earlier versions of transformers say of one.
            said = re.search(r"requires the (\w+) library", str(error))
            name = said[1].lower() if said else (error.name or "").partition(".")[0]
            if name not in OPTIONAL or importlib.util.find_spec(name):
                raise
            pytest.skip(f"{name} is not installed")
