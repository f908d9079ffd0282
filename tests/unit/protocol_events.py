"""What happens in a world of the model check: anything, as bytes decide, until no more faults happen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from protocol_world import World, require


class NoMoreEvents(Exception):
    pass


def chooser(events: bytes) -> Callable[[int], int]:
    left = iter(events)

    def choose(num: int) -> int:
        if (number := next(left, None)) is None:
            raise NoMoreEvents
        return number % num

    return choose


def step(world: World, faults: int) -> None:
    """Let one thing happen; ``faults`` is the share of those that should not, in percent."""
    choose = world.choose
    living = [*world.current, *world.zombies]
    if choose(100) < faults:
        fault(world, choose)
        return
    kind = choose(20)
    if kind < 8 and world.messages:
        world.deliver(world.messages.pop(choose(len(world.messages))))
    elif kind < 13 and world.answers:
        world.hear(*world.answers.pop(choose(len(world.answers))))
    elif kind < 18:
        living[choose(len(living))].move()
    elif kind < 19:
        living[choose(len(living))].checkpoint()
    else:
        world.snapshot(choose(world.num_shards), choose(world.num_chains))


def fault(world: World, choose: Callable[[int], int]) -> None:
    kind, shard, chain = choose(14), choose(world.num_shards), choose(world.num_chains)
    if kind == 0:
        world.crash(shard)
    elif kind == 1:
        world.snapshot(shard, chain, fuse=choose(2))
    elif kind in (2, 3) and chain not in world.complete:
        world.replace(chain, lives_on=kind == 3, restart=choose(3) == 0)
    elif kind == 4 and choose(2) == 0:
        world.restart_driver()
    elif kind in (5, 6, 7, 8) and world.messages:
        message = world.messages[choose(len(world.messages))]
        if kind != 8:
            world.messages.remove(message)
        if kind == 5:
            world.deliver(message, dies=True)
        elif kind == 6:
            world.deliver(message, fuse=choose(3))
        elif kind == 8:
            world.deliver(message)  # and again, later
    elif kind == 9 and world.answers:
        world.answers.pop(choose(len(world.answers)))
    elif kind == 10 and world.may_damage:
        world.damage("shard" if choose(2) else "checkpoints", choose(256))
    elif kind == 11:
        [*world.current, *world.zombies][choose(1 + len(world.zombies))].lose_patience()
    elif kind == 12:
        world.intrude(shard, chain)
    elif kind == 13 and world.zombies:
        world.zombies.pop(choose(len(world.zombies))).state = "dead"


def settle(world: World) -> None:
    """No more faults: every chain must come to its end, in a number of steps known before."""
    for zombie in world.zombies:
        zombie.state = "dead"
    world.choose = lambda num: 1 % num  # replays go on to differ
    limit = 40 * world.num_chains * (world.total + 4) * world.num_shards + len(world.messages) + len(world.answers)
    for _ in range(limit):
        if world.finish():
            return
        for chain, attempt in enumerate(world.current):
            if attempt.is_over and chain not in world.complete:
                world.replace(chain, lives_on=False)
        if world.messages:
            world.deliver(world.messages.pop(0))
        elif world.answers:
            world.hear(*world.answers.pop(0))
        elif not any([attempt.move() for attempt in world.current]):
            for attempt in world.current:
                attempt.lose_patience()
        world.check()
    require(False, "a run that is left alone comes to its end")


def play(faults: int, events: bytes, **size) -> None:
    """Runs one after another, each in a new world, until there are no more events."""
    choose = chooser(events)
    with contextlib.suppress(NoMoreEvents):
        while True:
            world = World(choose=choose, **size)
            while not (world.finish() and choose(10) == 0):
                step(world, faults)
                world.check()
    settle(world)


# Ways to a wrong end that chance hardly ever comes by.


def small_world(num_shards: int, total: int) -> World:
    return World(num_shards, 1, 1, total, choose=lambda num: 1 % num, is_deterministic=False, may_damage=False)


def talk(world: World, *kinds: str) -> None:
    """Deliver all messages of these kinds and their answers, in order, with what chains do in between."""
    for kind in kinds:
        world.current[0].move()
        for message in [m for m in world.messages if m.kind == kind]:
            world.messages.remove(message)
            world.deliver(message)
        while world.answers:
            world.hear(*world.answers.pop(0))
        world.check()


def shards_with_the_ends_of_different_attempts() -> None:
    """Shard 0 has closed one attempt; shard 1 lost it, and gets a replay that differs; no one hears of the conflict."""
    world = small_world(num_shards=2, total=1)
    talk(world, "open", "push")
    world.current[0].move()
    world.deliver(world.messages.pop(0))
    world.crash(1)
    for _ in range(2):
        world.answers.clear()
        world.messages.clear()
        world.replace(0, lives_on=False)
        talk(world, "open")
        world.current[0].move()
        while world.messages:
            world.deliver(world.messages.pop(0))
        world.answers.clear()
        world.current[0].lose_patience()
        talk(world, "open", "close")
    settle(world)


def a_late_repetition_of_the_call_to_begin_anew() -> None:
    """It arrives when the chain has come to its end."""
    world = small_world(num_shards=2, total=1)
    world.replace(0, lives_on=False, restart=True)
    late = world.messages[-1]
    talk(world, "open", "push", "close")
    world.deliver(late)
    world.check()
    settle(world)


def a_replay_that_differs_and_then_does_not() -> None:
    """Its second push is what it was before, and the first is not."""
    world = small_world(num_shards=1, total=3)
    world.choose = lambda num: 0
    talk(world, "open", "push", "push")
    world.choose = lambda num: 1 % num
    world.replace(0, lives_on=False)
    talk(world, "open")
    world.current[0].move()
    world.deliver(world.messages.pop(0))
    world.answers.clear()
    world.choose = lambda num: 0
    world.current[0].lose_patience()
    talk(world, "open", "push", "push")
    settle(world)


SCENARIOS = [
    shards_with_the_ends_of_different_attempts,
    a_late_repetition_of_the_call_to_begin_anew,
    a_replay_that_differs_and_then_does_not,
]
