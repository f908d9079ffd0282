"""Verdicts of the push protocol, one by one; test_protocol_model.py checks whole runs."""

from __future__ import annotations

import numpy as np

from patterning_dist.aggregation.protocol import START, Answer, Incarnation, Mark, PushId, Sender, Verdict, block_digest

FIRST, SECOND = Incarnation(1, 1), Incarnation(1, 2)


def digests(num, salt=b""):
    found = [START]
    for number in range(num):
        found.append(block_digest(found[-1], [np.frombuffer(salt + bytes([number]), np.uint8)]))
    return found


def push(sequence, incarnation=FIRST, run="run"):
    return PushId(run, 0, incarnation, sequence)


def filled(num):
    mark, chain = Mark("run"), digests(num)
    for n in range(num):
        assert mark.judge(push(n), chain[n], chain[n + 1]) is Verdict.APPLIED
    return mark, chain


def test_verdicts():
    mark, chain = filled(3)
    ahead, other = digests(9), digests(9, b"other")
    assert mark.judge(push(1), chain[1], chain[2]) is Verdict.DUPLICATE
    assert mark.judge(push(4), ahead[4], ahead[5]) is Verdict.GAP
    assert mark.judge(push(1), other[1], other[2]) is Verdict.CONFLICT
    assert mark.judge(push(3), other[3], other[4]) is Verdict.CONFLICT
    assert mark.judge(push(3, run="other"), ahead[3], ahead[4]) is Verdict.ZOMBIE
    assert (mark.digests, mark.incarnation) == (chain[1:], FIRST)
    assert mark.judge(push(3, SECOND), ahead[3], ahead[4]) is Verdict.APPLIED
    assert mark.judge(push(4), ahead[4], ahead[5]) is Verdict.ZOMBIE


def test_a_fence_keeps_out_earlier_incarnations_and_other_runs():
    mark, chain = filled(1)
    assert mark.fence("run", SECOND)
    assert mark.judge(push(1), chain[1], digests(2)[2]) is Verdict.ZOMBIE
    assert not mark.fence("run", FIRST)
    assert not mark.fence("other", Incarnation(9, 9))
    assert mark.incarnation == SECOND


def test_a_later_driver_counts_for_more_than_later_attempts():
    assert Incarnation(2, 1) > Incarnation(1, 7)


def test_the_end_of_a_chain_is_judged_by_all_its_pushes():
    mark, chain = filled(3)
    assert mark.judge_end(push(3), chain[3]) is Verdict.APPLIED
    assert mark.judge_end(push(4), digests(4)[4]) is Verdict.GAP
    assert mark.judge_end(push(3), digests(3, b"other")[3]) is Verdict.CONFLICT
    assert mark.judge_end(push(2), chain[2]) is Verdict.CONFLICT
    mark.fence("run", SECOND)
    assert mark.judge_end(push(3), chain[3]) is Verdict.ZOMBIE


def test_to_begin_anew_forgets_the_pushes_but_not_the_fence():
    mark, _ = filled(3)
    mark.durable = 2
    mark.begin_anew(SECOND)
    other = digests(1, b"other")
    assert (mark.digests, mark.durable, mark.last) == ([], 0, START)
    assert mark.judge(push(0), other[0], other[1]) is Verdict.ZOMBIE
    assert mark.judge(push(0, SECOND), other[0], other[1]) is Verdict.APPLIED


def test_a_digest_depends_on_every_bit_and_on_all_that_came_before():
    block = [np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(2)]
    base = block_digest(START, block)
    assert block_digest(START, [np.asfortranarray(block[0]), block[1]]) == base
    assert block_digest(base, block) != base
    nudged = np.nextafter(block[0], np.float32(9))
    assert len({base, block_digest(START, [nudged, block[1]]), block_digest(START, block[:1])}) == 3


def test_a_chain_goes_back_to_what_no_shard_is_behind_of_and_keeps_what_no_shard_could_lose():
    sender = Sender(2)
    sender.heard(0, Answer(Verdict.APPLIED, mark=9, durable=4))
    sender.heard(1, Answer(Verdict.GAP, mark=6, durable=6))
    assert sender.resume([2, 5, 7]) == 5
    assert sender.resume([7]) == 0
    assert sender.needed([2, 3, 5]) == 3
    assert sender.needed([5]) == 0
