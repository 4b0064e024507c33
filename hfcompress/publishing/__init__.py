"""How a result is shown to others: its model card, and its way to the Hub."""

from __future__ import annotations

from hfcompress.publishing.hub import push
from hfcompress.publishing.model_card import card_of_report, write_card

__all__ = ["card_of_report", "push", "write_card"]
