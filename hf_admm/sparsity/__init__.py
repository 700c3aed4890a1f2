"""What a legal weight is: patterns, projections on them, masks, and which weights of a model they are for.

Pure functions on tensors and modules: nothing here knows of a run, a trainer or a file of a checkpoint.
"""
