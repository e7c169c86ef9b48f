"""report.html: a run in one self-contained file."""

from __future__ import annotations

from megatron.metrics.report_data import ReportData
from megatron.metrics.report_page import evaluation_section, facts_section, ledger_table, page
from megatron.metrics.report_plots import loss_plot, mixture_plot, norm_plot, rate_plot, throughput_plot


def render_report(data: ReportData) -> str:
    """The whole HTML document."""
    absent = '<p class="absent">The run has no steps yet.</p>'
    there = bool(data.steps)
    sections = [
        ("What it was trained on", (mixture_plot(data) if there else absent) + ledger_table(data)),
        ("What it learnt", loss_plot(data) if there else absent),
        ("What it can do", evaluation_section(data)),
        ("How it ran", rate_plot(data) + norm_plot(data) + throughput_plot(data) if there else absent),
        ("What ran", facts_section(data)),
    ]
    return page(data, sections)
