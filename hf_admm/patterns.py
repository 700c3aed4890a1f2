"""Where `hf_admm.sparsity.patterns` used to be: for scripts that import it from here."""

from hf_admm.sparsity.patterns import *  # noqa: F403
