"""Which lines of a shard an earlier holder may have sent without telling."""

from __future__ import annotations

from dataclasses import replace

from batchrunner.frames import Salvaged
from batchrunner.models import Claim


def with_registered_marks(claim: Claim, found: Salvaged) -> Salvaged:
    """Put the store's mark in the place of marks in a journal that keeps none: there is one for all claims, and each of
    them had it registered before it sent anything.
    """
    shard = claim.shard
    assert shard is not None
    if shard.intent_mark < shard.first_line:
        return found
    return replace(found, marks={epoch: shard.intent_mark for epoch, _ in claim.earlier}, mark=shard.intent_mark)


def doubtful_mark(claim: Claim, found: Salvaged) -> int:
    """The highest line that a holder may have sent without telling, 0 if the last that sent any gave the shard back
    whole. Nothing is sent without a mark, so a claim that left none leaves no doubt either.
    """
    assert claim.shard is not None
    is_told = max(found.marks, default=0) <= claim.whole_epoch
    return 0 if is_told else max(found.mark, claim.shard.intent_mark)


def unknown_mark(claim: Claim, found: Salvaged) -> int:
    """The highest line that may have been sent without telling, where it may be sent only once; 0 if the last holder
    gave the shard back whole, for then the open lines were not sent, or refused.

    The claims are asked and not the journal, which may be damaged: there an open line may have had its answer once.
    """
    assert claim.shard is not None
    is_told = claim.earlier[-1][0] == claim.whole_epoch and not found.damages
    return 0 if is_told else claim.shard.intent_mark
