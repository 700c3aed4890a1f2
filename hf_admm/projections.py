"""Where `hf_admm.sparsity.projections` used to be: for scripts that import it from here."""

from hf_admm.sparsity.projections import *  # noqa: F403
