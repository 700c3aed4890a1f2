"""Packed checkpoints, a format for storage: `codec` <- `header` <- `files` <- `writing` <- `checkpoints`."""
