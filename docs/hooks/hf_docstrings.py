"""Lets mkdocstrings read docstrings in Hugging Face's form, which its Google parser nearly understands."""

import re
from pathlib import Path

import griffe


REFERENCE = Path(__file__).parent.parent / "reference"
# Folders of the repository that install inside the package.
BESIDE = ("callbacks", "configs")

# The line of an argument: "    name (`type`, *optional*, defaults to `"2:4"`):", whose last colon only is a separator.
_ARGUMENT = re.compile(r"^    (?P<name>\*{0,2}\w+) \((?P<about>.+)\):$")
# The line of what is returned or raised: "    `type`: what it is".
_TYPED = re.compile(r"^    (?P<type>(?:`[^`]+`|\[`[^`]+`\])(?: or (?:`[^`]+`|\[`[^`]+`\]))*)(?:$|\.$|:(?P<rest>.*))")
_HEADING = re.compile(r"^ {0,4}> Parameters that control (?P<what>.+)$")
_REFERENCE = re.compile(r"\[`(?P<local>~?)(?P<name>[\w.]+)`\](?![(\[])")


class HuggingFaceDocstrings(griffe.Extension):
    """
    Rewrites each docstring before it is parsed, and places `callbacks/` and `configs/` inside the package.

    Mentions such as [`AuditReport`] become links where docs/reference has a page for them.
    """

    def __init__(self):
        pages = "\n".join(page.read_text(encoding="utf-8") for page in sorted(REFERENCE.glob("*.md")))
        paths = re.findall(r"^::: (\S+)", pages, re.M)
        self.paths = {path.rpartition(".")[2]: path for path in paths}

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs) -> None:
        if pkg.name == "hf_admm":
            for name in BESIDE:
                if name not in pkg.members:
                    pkg.set_member(name, loader.load(name, submodules=True))

    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = self.rewritten(obj.docstring.value)

    def rewritten(self, text: str) -> str:
        """
        A docstring in Google's form.

        Args:
            text (`str`):
                It in Hugging Face's form, dedented.

        Returns:
            `str`
        """
        lines, section = [], ""
        title, begun = "", False  # of the arguments that come next, and whether their table has begun
        for line in text.splitlines():
            if heading := _HEADING.match(line):
                what = heading["what"].strip()
                title, begun = what[:1].upper() + what[1:], False
            elif opened := re.match(r"^(Args|Returns|Raises):$", line):
                section = opened[1]
                if section == "Args":
                    begun = False
                else:
                    lines.append(line)
            elif section == "Args" and (argument := _ARGUMENT.match(line)):
                if not begun:
                    lines += ["", f"Args: {title}".rstrip()]
                    begun = True
                # The signature tells the default; what is left is the type.
                kind = _plain(re.split(r", \*optional\*", argument["about"])[0])
                lines.append(f"    {argument['name']} ({kind}): ")
            elif section in ("Returns", "Raises") and (typed := _TYPED.match(line)):
                lines.append(f"    {_plain(typed['type'])}: {(typed['rest'] or '').strip()}")
            else:
                lines.append(line)
                if line and not line.startswith(" "):
                    section = ""
        return _REFERENCE.sub(self._link, "\n".join(lines))

    def _link(self, found: re.Match) -> str:
        name = found["name"].rpartition(".")[2]
        path = self.paths.get(name)
        return f"[`{name}`][{path}]" if path and not found["local"] else f"`{name}`"


def _plain(annotation: str) -> str:
    """A type without the marks that Hugging Face's form puts around it."""
    return re.sub(r"\[`~?([^`]+)`\]|`([^`]+)`", lambda found: found[1] or found[2], annotation).replace(" or ", " | ")
