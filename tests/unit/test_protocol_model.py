"""A model check of the push protocol: whole runs, in which anything may fail at any moment.

docs/explanation/exactly_once.md numbers the promises. The last test shows that the check can fail: with any one
rule of the protocol taken out it finds a promise that is broken.
"""

from __future__ import annotations

import protocol_processes
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from protocol_events import SCENARIOS, play
from protocol_processes import Attempt, Shard
from protocol_world import Violation

from patterning_dist.aggregation.protocol import START, Answer, Incarnation, Mark, Sender, Verdict, block_digest

WORLDS = st.builds(
    dict,
    num_shards=st.integers(1, 3),
    num_chains=st.integers(1, 3),
    window=st.integers(1, 4),
    total=st.integers(1, 2) | st.integers(1, 12),
    is_deterministic=st.booleans(),
    may_damage=st.booleans(),
    faults=st.integers(5, 40),
    events=st.binary(min_size=900, max_size=900),
)


# Hundreds of events do not shrink in reasonable time.
@settings(max_examples=300, deadline=None, phases=set(Phase) - {Phase.shrink, Phase.explain})
@given(WORLDS)
def test_whatever_dies_every_chain_is_taken_in_once(world):
    play(**world)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_way_to_a_wrong_end(scenario):
    scenario()


# What the model check finds when one rule is taken out.

judge, judge_end = Mark.judge, Mark.judge_end


def judge_without_digests(mark, push, previous, digest):
    verdict = judge(mark, push, previous, digest)
    if verdict is Verdict.CONFLICT and push.sequence == len(mark.digests):
        mark.digests.append(digest)
        return Verdict.APPLIED
    return Verdict.DUPLICATE if verdict is Verdict.CONFLICT else verdict


def judge_without_what_came_before(mark, push, previous, digest):
    return judge(mark, push, mark.last, digest)


def judge_that_takes(refused):
    def judge_all(mark, push, previous, digest):
        verdict = judge(mark, push, previous, digest)
        if verdict is not refused:
            return verdict
        mark.digests.append(digest)
        return Verdict.APPLIED

    return judge_all


def judge_without_fence(mark, push, previous, digest):
    return judge(mark, push._replace(incarnation=max(mark.incarnation, push.incarnation)), previous, digest)


def judge_without_run(mark, push, previous, digest):
    return judge(mark, push._replace(run=mark.run), previous, digest)


def begin_anew_that_stays_durable(mark, incarnation):
    mark.incarnation, mark.digests = incarnation, []


def open_that_starts_over_again(shard, push, restart):
    mark = shard.held[push.chain].mark
    if restart and mark.fence(push.run, push.incarnation):
        mark.incarnation = Incarnation()
    return open_shard(shard, push, restart)


def open_that_keeps_snapshots(shard, push, restart):
    kept = dict(shard.snapshots[push.chain].storage.files)
    answered = open_shard(shard, push, restart)
    shard.snapshots[push.chain].storage.files.update(kept)
    return answered


def begin_without_looking(shard, storage, number, num_chains):
    shard.snapshots = [protocol_processes.snapshots_of(storage, number, chain) for chain in range(num_chains)]
    shard.held = [protocol_processes.restored(snapshots) for snapshots in shard.snapshots]


open_shard = Shard.open
RULES = {
    "a push has the digest that was taken in": (Mark, "judge", judge_without_digests),
    "a push follows what was taken in": (Mark, "judge", judge_without_what_came_before),
    "duplicates are dropped": (Mark, "judge", judge_that_takes(Verdict.DUPLICATE)),
    "pushes after a gap are refused": (Mark, "judge", judge_that_takes(Verdict.GAP)),
    "pushes of earlier incarnations are refused": (Mark, "judge", judge_without_fence),
    "questions of earlier incarnations are refused": (Mark, "fence", lambda mark, run, incarnation: run == mark.run),
    "pushes of other runs are refused": (Mark, "judge", judge_without_run),
    "the end has the digest that was taken in": (Mark, "judge_end", lambda m, push, last: judge_end(m, push, m.last)),
    "a gap before the end is refused": (Mark, "judge_end", lambda mark, push, last: Verdict.APPLIED),
    "what is forgotten is not durable": (Mark, "begin_anew", begin_anew_that_stays_durable),
    "digests stand for all pushes so far": (
        protocol_processes,
        "block_digest",
        lambda previous, arrays: block_digest(START, arrays),
    ),
    "checkpoints are kept up to what is durable": (
        Sender,
        "needed",
        lambda sender, places: max((p for p in places if p <= min(sender.marks)), default=0),
    ),
    "a chain goes back behind every shard": (
        Sender,
        "resume",
        lambda sender, places: max((p for p in places if p <= max(sender.marks)), default=0),
    ),
    "only snapshots are durable": (
        Shard,
        "_answer",
        lambda shard, held, verdict: Answer(verdict, len(held.mark.digests), len(held.mark.digests)),
    ),
    "an attempt starts over once": (Shard, "open", open_that_starts_over_again),
    "to start over is to delete the snapshots": (Shard, "open", open_that_keeps_snapshots),
    "snapshots of other runs are deleted": (Shard, "__init__", begin_without_looking),
    "ends on different shards are compared": (
        protocol_processes,
        "is_ended",
        lambda records: None not in records.values(),
    ),
    "pushes in flight are bounded": (Attempt, "num_in_flight", 0),
}


@pytest.mark.parametrize("rule", RULES)
def test_the_model_check_finds_what_a_missing_rule_breaks(rule, monkeypatch):
    owner, name, broken = RULES[rule]
    monkeypatch.setattr(owner, name, broken)

    @settings(max_examples=400, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    @given(WORLDS)
    def explore(world):
        play(**world)

    with pytest.raises(Violation):
        for scenario in SCENARIOS:
            scenario()
        explore()
