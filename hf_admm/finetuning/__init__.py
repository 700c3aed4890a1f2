"""What the commands run: text classification, with its tasks, data, metrics and results.

Nothing in the rest of the library imports it but `hf_admm.commands`.
"""
