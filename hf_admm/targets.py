"""Where `hf_admm.sparsity.targets` used to be: for scripts that import it from here."""

from hf_admm.sparsity.targets import *  # noqa: F403
