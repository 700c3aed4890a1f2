"""What Trainer leaves to be settled before a sparse run trains as it should: how its parts fit the method.

No tensors of the method, and no files: those are in `hf_admm.pruning` and `hf_admm.checkpoints`.
"""
