"""
The metadata is in setup.cfg. Only the long description is made here: an index shows the README without the repository
around it, where its relative links and pictures lead nowhere.
"""

import os
import re
from pathlib import Path

from setuptools import setup


# A Markdown link or picture whose address has no scheme and is no place on the page itself.
RELATIVE = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)")


def long_description(readme: str, source: str, version: str) -> str:
    """The README for an index: relative links lead to the tag in the repository at `source`, or are left out."""

    def absolute(found: re.Match) -> str:
        picture, text, path = found.groups()
        if source:
            return f"{picture}[{text}]({source.rstrip('/')}/{'raw' if picture else 'blob'}/v{version}/{path})"
        return "" if picture else text

    return RELATIVE.sub(absolute, readme)


if __name__ == "__main__":
    root = Path(__file__).parent
    version = re.search(r'__version__ = "(.+)"', (root / "hf_admm" / "version.py").read_text(encoding="utf-8"))[1]
    # Set by .github/workflows/release.yml, which knows where the repository is.
    source = os.environ.get("HF_ADMM_SOURCE_URL", "")
    setup(
        long_description=long_description((root / "README.md").read_text(encoding="utf-8"), source, version),
        long_description_content_type="text/markdown",
        project_urls={"Source": source} if source else {},
    )
