"""When things happen in a sparse fine-tuning run, or in a plain one. The callbacks hold no tensors and do no maths."""

from hf_admm.callbacks.audit import PatternAuditCallback
from hf_admm.callbacks.metrics import MetricsCallback
from hf_admm.callbacks.monitor import SparsityMonitorCallback
from hf_admm.callbacks.phases import PhaseCallback
from hf_admm.callbacks.progress import PhaseProgressCallback
from hf_admm.callbacks.report import ReportCallback


__all__ = [
    "MetricsCallback",
    "PatternAuditCallback",
    "PhaseCallback",
    "PhaseProgressCallback",
    "ReportCallback",
    "SparsityMonitorCallback",
]
