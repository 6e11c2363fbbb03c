"""What a run says and leaves: reads files and plain values, never tensors."""

from dpsgd.report.metrics import (
    MetricsWriter,
    last_evaluated_step,
    read_metrics,
    to_json,
)
from dpsgd.report.progress import ProgressView
from dpsgd.report.run_directory import (
    RunDirectory,
    default_run_directory,
    environment,
)
from dpsgd.report.tables import (
    per_class_table,
    plan_table,
    result_table,
)

__all__ = [
    "MetricsWriter",
    "ProgressView",
    "RunDirectory",
    "default_run_directory",
    "environment",
    "last_evaluated_step",
    "per_class_table",
    "plan_table",
    "read_metrics",
    "result_table",
    "to_json",
]
