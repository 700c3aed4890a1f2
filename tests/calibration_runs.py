"""Flags of runs that prune by their data, and the rows that they take."""

from transformers import default_data_collator


ROWS, SIZE = 20, 8  # of the training set, and in a batch
ONE_PHASE = {"admm_steps": 0, "srste_mask": "fixed", "mask_freeze_steps": 0, "admm_rho": None}
BY_DEFAULT = {"sparsity_pattern": "2:4", "admm_steps": None, "admm_rho": None, "admm_update_steps": None}
DENSE_HALF = BY_DEFAULT | {"sparsity_pattern": "1:4"}
EVENLY = {"admm_penalty": "distance", "admm_rho": None, "admm_update_steps": 1}


def calibration_batches(data):
    rows = [data[index * len(data) // ROWS] for index in range(ROWS)]
    return [default_data_collator(rows[start : start + SIZE]) for start in range(0, ROWS, SIZE)]


def phases_of(trainer):
    assert trainer.audit.ok
    return {log["admm/phase"] for log in trainer.state.log_history if "admm/phase" in log}
