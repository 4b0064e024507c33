"""How a result is shown to others: its model card, its page, and its way to the Hub."""

from __future__ import annotations

from pathlib import Path

from hfcompress.evaluation.report import Report
from hfcompress.publishing.hub import push
from hfcompress.publishing.model_card import card_of_report, read_report, write_card
from hfcompress.publishing.page import page_of_report, page_of_reports, write_page
from hfcompress.publishing.pictures import write_pictures

__all__ = [
    "card_of_report",
    "page_of_report",
    "page_of_reports",
    "push",
    "read_report",
    "write_card",
    "write_documents",
    "write_page",
]


def write_documents(directory: Path, report: Report | None = None) -> Path:
    """Writes all that people read of a result: the card, its pictures and the page.

    Args:
        directory: A checkpoint folder.
        report: The run's measurements; by default those in the folder's report.json.

    Returns:
        The card's path.

    Raises:
        CheckpointError: The folder has no readable config.json or report.json.
        DataError: The report names a task that is not known.
        RunFolderError: There is a card that somebody else wrote.
    """
    report = report or read_report(directory)
    write_pictures(directory, report)
    card = write_card(directory, report)
    write_page(directory, report)
    return card
