"""Strategies for files that something happened to, or that somebody wrote by hand."""

import torch
from hypothesis import strategies as st
from safetensors.torch import save


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from([10**400, "2:4"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def stored(dtypes):
    """Those of some dtypes that this version of safetensors has a name for."""
    found = []
    for dtype in dtypes:
        try:
            save({"tensor": torch.zeros(1, dtype=dtype)})
        except KeyError:
            continue
        found.append(dtype)
    return st.sampled_from(found)


@st.composite
def damaged(draw, content):
    """The bytes of a file after an accident: bits flipped, a part cut out, overwritten or put in."""
    content = bytearray(content)
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(draw(st.integers(1, 3))):
        # The header is small beside the tensors, and where most can go wrong.
        at = draw(st.integers(0, header + 8) | st.integers(0, 2000)) % max(1, len(content))
        kind = draw(st.sampled_from(["flip", "truncate", "cut", "insert", "overwrite", "append"]))
        junk = draw(st.binary(min_size=1, max_size=12))
        if kind == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "truncate":
            del content[at:]
        elif kind == "cut":
            del content[at : at + len(junk)]
        elif kind == "insert":
            content[at:at] = junk
        elif kind == "overwrite":
            content[at : at + len(junk)] = junk
        else:
            content += junk
    return bytes(content)
