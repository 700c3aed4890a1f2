"""What a run does to the weights: the phases, their updates and schedules, on one process or several.

No events of Trainer and no files: callbacks and the trainer say when, `hf_admm.checkpoints` stores.
"""
