"""What a run says of itself: its tables, its words on the progress bar, its part of the model card.

Reads and formats what others have found. Changes no weight, computes no figure on tensors, and waits for no device.
"""
