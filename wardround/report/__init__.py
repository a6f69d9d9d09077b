"""The reports of a run: self-contained HTML files, each with its content as JSON, made from the files of the run's folder."""

from wardround.report.page import write_report

__all__ = ["write_report"]
