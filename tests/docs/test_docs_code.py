"""Every Python block of the documentation runs, page by page, in the order in which a reader meets them."""

import pytest
import torch
from docs_pages import ROOT, common_names, pages
from sybil import Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, SkipParser


# Packages that a page may be about and the tests can do without: it is skipped where one is missing.
OPTIONAL = {"nncf", "onnx", "onnxruntime", "openvino", "peft", "sentence_transformers", "timm", "torchvision", "trl"}


def evaluate(example):
    if "cuda" in example.parsed and not torch.cuda.is_available():
        return
    PythonEvaluator()(example)


SYBIL = Sybil(parsers=[CodeBlockParser(language="python", evaluator=evaluate), SkipParser()])
DOCUMENTS = {page: document for page in pages() if list((document := SYBIL.parse(ROOT / page)).examples())}


def test_blocks_are_found():
    assert {"docs/index.md", "docs/callbacks.md", "docs/getting_started.md", "docs/reference/audit.md"} <= set(
        DOCUMENTS
    )


@pytest.mark.parametrize("page", DOCUMENTS)
def test_python_blocks_run(page, folder):
    DOCUMENTS[page].namespace.update(common_names(page))
    for example in DOCUMENTS[page].examples():
        try:
            example.evaluate()
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in OPTIONAL:
                raise
            pytest.skip(f"{error.name} is not installed")
