"""What a run says and leaves: reads files and plain values, never tensors."""

from dpsgd.report.audit import audit_table, save_audit_plot
from dpsgd.report.comparison_page import comparison_report
from dpsgd.report.metrics import (
    MetricsWriter,
    last_evaluated_step,
    read_metrics,
    to_json,
)
from dpsgd.report.outcomes import Comparison, compare, comparison_table
from dpsgd.report.outputs import OwnFiles
from dpsgd.report.progress import ProgressView
from dpsgd.report.run_directory import (
    FORMAT,
    RunDirectory,
    default_run_directory,
    environment,
)
from dpsgd.report.run_page import run_report
from dpsgd.report.runs import RunRecord, read_run
from dpsgd.report.tables import facts_table, guarantee_in_words, result_table

__all__ = [
    "FORMAT",
    "Comparison",
    "MetricsWriter",
    "OwnFiles",
    "ProgressView",
    "RunDirectory",
    "RunRecord",
    "audit_table",
    "compare",
    "comparison_report",
    "comparison_table",
    "default_run_directory",
    "environment",
    "facts_table",
    "guarantee_in_words",
    "last_evaluated_step",
    "read_metrics",
    "read_run",
    "result_table",
    "run_report",
    "save_audit_plot",
    "to_json",
]
