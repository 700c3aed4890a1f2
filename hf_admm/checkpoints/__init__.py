"""The files of a run: sparse weights that load anywhere, and beside them what an exact resume needs.

No arithmetic on weights: what is saved comes from the phases of `hf_admm.pruning`.
"""
