"""What a run says and leaves: reads files and plain values, never tensors."""

from dpsgd.report.metrics import MetricsWriter, read_metrics, to_json
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
    rounded_up,
)

__all__ = [
    "MetricsWriter",
    "ProgressView",
    "RunDirectory",
    "default_run_directory",
    "environment",
    "per_class_table",
    "plan_table",
    "read_metrics",
    "result_table",
    "rounded_up",
    "to_json",
]
