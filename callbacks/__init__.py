"""When things happen in a sparse fine-tuning run. The callbacks hold no tensors and do no maths."""

from hf_admm.callbacks.metrics import MetricsCallback
from hf_admm.callbacks.phases import PhaseCallback
from hf_admm.callbacks.report import ReportCallback


__all__ = ["MetricsCallback", "PhaseCallback", "ReportCallback"]
