"""Low-rank factorization of attention and feed-forward layers."""

from __future__ import annotations

from hfcompress.methods.low_rank.config import LowRankConfig, Target
from hfcompress.methods.low_rank.maths import truncate
from hfcompress.methods.low_rank.method import low_rank
from hfcompress.methods.low_rank.ranks import rank_for
from hfcompress.methods.low_rank.streaming import stream_step
from hfcompress.methods.registry import Method, register

__all__ = ["LowRankConfig", "Target", "low_rank", "rank_for", "truncate"]

register(
    Method(
        name="low_rank",
        config=LowRankConfig,
        summary="Splits linear layers into products of two thin ones.",
        apply=low_rank,
        stream=stream_step,
    )
)
