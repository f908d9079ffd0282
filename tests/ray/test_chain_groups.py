"""A chain on 1, 2 and 4 ranks is the same chain: noise bit for bit, the rest to the rounding of sums.

Ranks of a process group without Ray (``chain_group_script``) run every sampler on small models whose parameters do not
divide by the number of ranks. Then the actors: a group is a worker, and a chain goes on after the loss of a rank.
"""

from __future__ import annotations

import functools
import io
import re
import time

import chain_group_script as script
import numpy as np
import pytest
from chain_group_study import GroupStudy, refuse
from rich.console import Console
from tiny_run import SETTINGS, quiet

from patterning_dist.aggregation.ledger import LedgerPlan
from patterning_dist.aggregation.protocol import Incarnation
from patterning_dist.config import SamplingConfig
from patterning_dist.errors import PatterningError
from patterning_dist.progress import Progress
from patterning_dist.storage.store import LocalStorage

SIZES = (2, 4)
CASES = [*script.CASES, "bfloat16"]
# Losses of up to 10 nats lie 1e-6 apart in float32, weights of up to 2 lie 1.2e-7 apart. Sums over another number of
# ranks round differently by one or two such steps; six steps of a chain carry that on.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-6


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return script.run_ranks(tmp_path_factory.mktemp("ranks"), "cpu", [{"OMP_NUM_THREADS": "1"}] * max(SIZES))


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
class TestOneChainOnSeveralRanks:
    def test_noise_is_the_same_bit_for_bit(self, runs, case, size):
        one, several = (script.whole(runs, n, case, "noise") for n in (1, size))
        assert one.keys() == several.keys()
        for name in one:
            np.testing.assert_array_equal(several[name], one[name], err_msg=name)

    def test_gradients_are_sums_over_the_minibatch(self, runs, case, size):
        """Five samples: ranks have two and three, or one, one, one and two; an average would be a half or a quarter."""
        one, several = (script.whole(runs, n, case, "gradient") for n in (1, size))
        tolerance = 5e-3 if case == "bfloat16" else 5e-7  # a rounding of the largest, 0.6: 2^-8 or 2^-24
        for name in one:
            np.testing.assert_allclose(several[name], one[name], rtol=0, atol=tolerance, err_msg=name)
        assert max(np.abs(g).max() for g in one.values()) > 0.02
        loss = [runs[n, 0][f"{case}|loss"] for n in (1, size)]
        np.testing.assert_allclose(loss[1], loss[0], rtol=0, atol=0.02 if case == "bfloat16" else 1e-6)

    def test_draws_and_positions_agree(self, runs, case, size):
        tolerances = (0.15, 5e-3) if case == "bfloat16" else (LOSS_TOLERANCE, WEIGHT_TOLERANCE)
        one, mine = runs[1, 0], runs[size, 0]
        np.testing.assert_allclose(mine[f"{case}|losses"], one[f"{case}|losses"], rtol=0, atol=tolerances[0])
        assert np.abs(one[f"{case}|losses"]).max() > 0.05
        observables = [run[f"{case}|observables"] for run in (mine, one)]
        np.testing.assert_allclose(*(o[:, :3] for o in observables), rtol=0, atol=tolerances[0])
        # The squared norm, up to 1000, in steps of 6e-5.
        np.testing.assert_allclose(*(o[:, 3] for o in observables), rtol=0, atol=max(3e-4, tolerances[0]))
        before, after = script.whole(runs, 1, case, "position"), script.whole(runs, size, case, "position")
        for name in before:
            np.testing.assert_allclose(after[name], before[name], rtol=0, atol=tolerances[1], err_msg=name)

    def test_temperatures_are_of_all_ranks(self, runs, case, size):
        for what, atol in (("temperatures", 1e-5), ("step_biases", 1e-4)):
            one, several = (runs[n, 0][f"{case}|{what}"] for n in (1, size))
            relative = 0.1 if case == "bfloat16" else 1e-4
            np.testing.assert_allclose(several, one, rtol=relative, atol=atol * (relative / 1e-4))
            assert all(np.array_equal(runs[size, rank][f"{case}|{what}"], several) for rank in range(size))
        assert np.abs(runs[1, 0][f"{case}|temperatures"]).max() > 0.01

    def test_all_ranks_report_the_same_draws_and_restart_bit_for_bit(self, runs, case, size):
        for rank in range(size):
            for what in ("losses", "observables"):
                np.testing.assert_array_equal(runs[size, rank][f"{case}|{what}"], runs[size, 0][f"{case}|{what}"])
            assert runs[size, rank][f"{case}|restarts"]


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", ["gpt2 head controlled 2", "llama everything full 16"])
def test_controlled_products_are_those_of_one_rank(runs, case, size):
    """But for Hessian products, which are differences of gradients there: good to some 1e-3, as float32 goes."""
    for what in ("mean_phi", "comoment"):
        one, several = (runs[n, 0][f"{case}|controlled/{what}"] for n in (1, size))
        for row in range(2):
            largest = np.abs(one[:, row]).max()
            np.testing.assert_allclose(
                several[:, row], one[:, row], rtol=0, atol=0.01 * largest, err_msg=f"{what} {row}"
            )
    assert not any(f"{case}|controlled/comoment" in runs[size, rank] for rank in range(1, size))


@pytest.mark.slow
def test_some_ranks_hold_nothing_of_some_parameters(runs):
    """Else the cases above would not be what they are meant to be."""
    prefix = "gpt2 everything sgld 16|extent/"
    sizes = [
        [stop - start for start, stop, _ in (runs[4, rank][key] for rank in range(4))]
        for key in runs[4, 0]
        if key.startswith(prefix)
    ]
    assert any(0 in held for held in sizes)
    assert any(0 < min(held) < max(held) for held in sizes)


@pytest.mark.slow
def test_a_failed_chain_says_the_same_on_all_ranks(runs):
    messages = {str(run["failure|message"]) for run in runs.values()}
    assert len(messages) == 1
    assert messages.pop().startswith("the weights left the neighbourhood of the checkpoint by step 3 (gamma ")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["base", "neox", "half", "experts", "untied"])
def test_loading_by_rows_gives_the_numbers_of_the_plain_loader(runs, kind):
    kinds = {"base": "gpt2", "half": "llama", "untied": "llama"}
    shapes = [p.shape for p in script.make_model(kinds.get(kind, kind)).parameters()]
    for size in SIZES:
        # Parts are padded to the largest: ceil(rows / size) rows.
        expected = sum(4 * -(-shape[0] // size) * shape[1:].numel() for shape in shapes)
        for rank in range(size):
            assert runs[size, rank][f"loading {kind}|same"]
            np.testing.assert_allclose(
                runs[size, rank][f"loading {kind}|losses"], runs[1, 0][f"loading {kind}|losses"], atol=1e-6
            )
            assert runs[size, rank][f"loading {kind}|held"] == expected


@pytest.mark.slow
def test_weights_that_do_not_fit_are_refused_by_name(runs):
    for size, rank in ((2, 0), (4, 3)):
        names = ("lacking", "misshapen", "empty", "infinite")
        found = {name: str(runs[size, rank][f"refusals|{name}"]) for name in names}
        assert "/lacking: the weights lack model.layers.1.mlp.up_proj.weight; copy the folder" in found["lacking"]
        assert "/misshapen/model.safetensors: model.layers.1.mlp.up_proj.weight has shape [4, 12]" in found["misshapen"]
        assert "the model of config.json [5, 12]" in found["misshapen"]
        assert "/empty: no weights in safetensors" in found["empty"]
        # In the last row, which one rank alone reads.
        assert "model.layers.1.mlp.up_proj.weight holds NaN or infinite weights" in found["infinite"]


@pytest.mark.slow
def test_loading_in_the_pieces_of_zero_3_gives_the_numbers_of_the_plain_loader(runs):
    total = sum(p.numel() for p in script.make_model("experts").parameters())
    for rank in range(2):
        assert runs[2, rank]["zero 3|same"]
        assert runs[2, rank]["zero 3|held"] < 0.51 * total + 40  # pieces are padded to the largest, one number each


@pytest.mark.slow
def test_autocast_keeps_no_copy_of_the_weights(runs):
    """Copies in bfloat16 of the layers' 2 bytes a weight, on every rank, would not shrink with the number of ranks."""
    num_layer_weights = sum(p.numel() for p in script.make_model("llama").model.layers.parameters() if p.dim() == 2)
    for size in SIZES:
        plain, recomputed = (int(runs[size, 0][f"kept|{name}"]) for name in ("as it is", "recomputed"))
        assert plain - recomputed > 2 * num_layer_weights


# With Ray.


def sampling_config(**changes):
    return SamplingConfig(**SETTINGS["sampling"] | {"draws_per_push": 4, "ranks_per_chain": 2} | changes)


def ledger_plan(num_chains):
    num_columns = len(script.PROBE) * script.CONTEXT
    return LedgerPlan("run", GroupStudy.observables, num_columns, GroupStudy.num_draws, 2, num_chains)


SUBJECTS = {"worker/steady": 2, "worker/diverging": 1, "group/steady": 2, "group/diverging": 1} | dict.fromkeys(
    ("group/refused", "group/raising", "group/killed"), 1
)


def make_shard(storage):
    """The only shard of an aggregator for ``SUBJECTS``."""
    from patterning_dist.runtime.chains.aggregator import AggregatorShard

    plans = {subject: ledger_plan(num_chains) for subject, num_chains in SUBJECTS.items()}
    return AggregatorShard.remote("test", plans, 0, 1, storage, 60.0)


def groups(make_study, **changes):
    from patterning_dist.runtime.chains.groups import chain_workers

    return chain_workers(make_study, sampling_config(**changes), "cpu", 1, quiet())


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_group_is_a_worker_and_its_losses_are_told(tmp_path):
    """One test, since a group takes long to start: chains as a worker runs them, a failed chain, lost ranks."""
    import ray
    from ray.util import placement_group, remove_placement_group

    from patterning_dist.runtime.boards import progress_board
    from patterning_dist.runtime.chains.attempt import Ending
    from patterning_dist.runtime.chains.groups import ChainGroup
    from patterning_dist.runtime.chains.pushes import ChainTask
    from patterning_dist.runtime.model_workers import ModelWorker
    from patterning_dist.runtime.watch import Pulse
    from patterning_dist.runtime.workforce import TaskFailed, WorkerLost

    storage = LocalStorage(tmp_path)
    shard, pulse = make_shard(storage), Pulse(progress_board(), "task")

    def chain(worker, subject, number):
        task = ChainTask(
            "test", subject, number, Incarnation(1, 1), False, ledger_plan(SUBJECTS[subject]), storage, 4, 60.0
        )
        # Without someone who watches the ranks, those that are left would wait for ten minutes.
        return ray.get(worker.chain.remote(task, [shard], pulse), timeout=300)

    def chains(worker, subject):
        """Records, without the seconds, and what the shard has of the chains."""
        for number in range(SUBJECTS[subject]):
            assert chain(worker, subject, number).ending is Ending.CLOSED
        records, _, part = ray.get(shard.finish.remote(subject, lambda part: part, pulse), timeout=100)
        return [(r.chain, r.healthy, r.reason, r.draws, r.steps) for r in records], part.chains

    worker = ModelWorker.options(num_cpus=1).remote("cpu")
    ray.get(worker.open_study.remote(1, GroupStudy), timeout=100)
    plain, expected = chains(worker, "worker/steady")
    failed, _ = chains(worker, "worker/diverging")
    ray.kill(worker)
    place = placement_group([{"CPU": 1}] * 2, strategy="STRICT_PACK")
    group = ChainGroup.remote(0, place, GroupStudy, sampling_config(), "cpu")
    records, found = chains(group, "group/steady")
    assert records == plain == [(0, True, "", 9, 10), (1, True, "", 9, 10)]
    assert chains(group, "group/diverging")[0] == failed
    assert failed[0][:2] == (0, False)
    assert failed[0][2].startswith("the weights left the neighbourhood of the checkpoint")
    for a, b in zip(expected, found, strict=True):
        scale = np.abs(a.total().comoment).max()
        # Sums of products of deviations of about 1 nat, known to 1e-6 or so; the squared norm to 1e-4.
        np.testing.assert_allclose(b.total().comoment, a.total().comoment, rtol=0, atol=1e-4 * scale)
        assert scale > 0.01

    with pytest.raises(PatterningError) as caught:
        chain(group, "group/refused", 0)
    assert str(caught.value.cause) == "model.path: there is no such folder"

    # Every time the ranks restart.
    what = r"rank 1 of chain group 0 on node \S+ failed in group/raising chain 0, and the group with it "
    with pytest.raises(TaskFailed) as caught:
        chain(group, "group/raising", 0)
    assert re.match(what, str(caught.value.cause))
    assert "a bug of the user's own" in caught.value.cause.cause_text
    with pytest.raises(WorkerLost) as caught:
        chain(group, "group/killed", 0)
    text = str(caught.value.cause)
    assert re.match(r"rank 1 of chain group 0 on node \S+ died in group/killed chain 0, and the group with it \(", text)
    assert len(text) < 400
    assert "\n" not in text
    for actor in (group, shard):
        ray.kill(actor)
    remove_placement_group(place)
    assert_all_is_given_back()


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_chain_that_loses_ranks_goes_on_and_one_that_always_does_is_left_out(tmp_path):
    """Either rank dies once, in the middle; then one that dies whenever its chain begins. The rest is undisturbed."""
    from patterning_dist.runtime.chains.run import ChainsPlan, Events, run_chains

    subjects = ("group/steady", "group/struck", "group/mortal")
    sampling = sampling_config(
        draws_per_push=2, snapshot_seconds=0, aggregator_shards=2, max_chain_failures=1, min_chains=1
    )
    results, events = {}, []
    told = Events(results.__setitem__, lambda kind, **fields: events.append({"kind": kind, **fields}))
    plans = {subject: ChainsPlan(ledger_plan(2), lambda part: part) for subject in subjects}
    study = functools.partial(GroupStudy, folder=tmp_path)
    run_chains("test", study, sampling, "cpu", LocalStorage(tmp_path), plans, told, quiet())
    assert list(results) == list(subjects)

    steady, struck, mortal = (results[subject] for subject in subjects)
    for number in (0, 1):
        np.testing.assert_array_equal(struck.traces[number], steady.traces[number])
        # The centre, and what is left from the second or third push on; never all nine draws.
        assert 1 + 5 <= int((tmp_path / f"calls-{number}").read_text()) <= 1 + 7
    assert all(record.healthy for record in (*steady.records, *struck.records))
    for a, b, c in zip(steady.parts, struck.parts, mortal.parts, strict=True):
        assert [[moments.chain for moments in part.chains] for part in (a, b, c)] == [[0, 1], [0, 1], [0]]
        for moments in (*b.chains, *c.chains):
            for name, value in a.chains[moments.chain].state_dict().items():
                np.testing.assert_array_equal(moments.state_dict()[name], value, err_msg=name)
    record = mortal.records[1]
    assert not record.healthy
    lost = r"lost 2 times without getting beyond draw 0; last: rank 1 of chain group 0 .*died in group/mortal chain 1"
    assert re.match(lost, record.reason)
    assert all(part.excluded == {1: record.reason} for part in mortal.parts)

    losses = [(e["subject"], e["chain"]) for e in events if e["kind"] == "chain_lost"]
    assert sorted(losses) == [("group/mortal", 1)] * 2 + [("group/struck", 0), ("group/struck", 1)]
    reasons = {(e["subject"], e["chain"]): e["reason"] for e in events}
    assert re.match("rank 1 of chain group 0 .*died in group/struck chain 0", reasons["group/struck", 0])
    assert re.match("rank 0 of chain group 0 .*died in group/struck chain 1", reasons["group/struck", 1])
    assert not [file for subject in subjects for file in (tmp_path / "sampling" / subject / "checkpoints").iterdir()]
    assert_all_is_given_back()


def assert_all_is_given_back():
    import ray
    from ray.util import placement_group_table

    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU") != 2:
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.2)
    assert all(group["state"] == "REMOVED" for group in placement_group_table().values())


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_what_a_refused_task_had_is_given_back_while_the_refusal_is_still_held():
    from patterning_dist.runtime.boards import progress_board
    from patterning_dist.runtime.watch import Watch

    with pytest.raises(PatterningError) as caught, groups(GroupStudy) as workers:
        call = ("task", lambda group, pulse: group.everywhere.remote("in a test", refuse))
        workers.run([call], lambda results: None, Watch(progress_board(), 300, print))
    assert_all_is_given_back()
    assert "there is no such folder" in str(caught.value)  # until here its frames keep the handle of the group


@pytest.mark.usefixtures("local_ray")
def test_a_group_that_the_cluster_cannot_hold_is_refused_at_once():
    started = time.monotonic()
    with pytest.raises(PatterningError) as caught, groups(GroupStudy, ranks_per_chain=3):
        pass
    assert re.fullmatch(
        r"a chain needs 3 times 1 CPU, each on one node; the Ray cluster has 2 CPU on .+ \(.+\); lower "
        r"sampling\.ranks_per_chain or add nodes",
        str(caught.value),
    )
    with (
        pytest.raises(PatterningError, match="needs 2 times 2 CPU, each on one node; the Ray cluster has 2 CPU on"),
        groups(GroupStudy, threads_per_worker=2),
    ):
        pass
    assert time.monotonic() - started < 5


@pytest.mark.usefixtures("local_ray")
def test_a_group_without_room_on_any_node_is_spread_and_says_so(monkeypatch):
    import ray
    from ray.util import placement_group_table

    from patterning_dist.runtime.chains.groups import chain_workers

    node = {"NodeID": "", "NodeManagerHostname": "host", "NodeManagerAddress": "10.0.0.1"}
    nodes = [node | {"Alive": True, "Resources": {"CPU": 1.0}}] * 2 + [
        node | {"Alive": False, "Resources": {"CPU": 64.0}}
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    shown = Console(file=io.StringIO(), width=200)
    with chain_workers(GroupStudy, sampling_config(), "cpu", 5, Progress(shown)) as started:
        live = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
        assert [(group["strategy"], group["bundles"]) for group in live] == [
            ("PACK", {0: {"CPU": 1.0}, 1: {"CPU": 1.0}})
        ]
        assert started.number == 1
    assert shown.file.getvalue().startswith("no node has 2 times 1 CPU: the ranks of a chain are spread over nodes")
    assert_all_is_given_back()


@pytest.mark.usefixtures("local_ray")
def test_waiting_for_room_ends_and_says_what_it_waited_for():
    import ray
    from ray.util import placement_group, remove_placement_group

    from patterning_dist.runtime.chains.groups import ChainGroup

    @ray.remote(num_cpus=1)
    class Occupant:
        def here(self):
            return True

    occupant = Occupant.remote()
    assert ray.get(occupant.here.remote(), timeout=60)
    place = placement_group([{"CPU": 1}] * 2, strategy="STRICT_PACK")
    group = ChainGroup.remote(4, place, GroupStudy, sampling_config(), "cpu", placement_timeout=1.0)
    with pytest.raises(PatterningError) as caught:
        ray.get(group.start.remote(), timeout=250)
    assert re.fullmatch(
        r"chain group 4: there was no room within 1 s: a chain needs 2 times 1 CPU; free are 1 of 2 CPU on .+; wait "
        r"for other work to end, or lower sampling\.ranks_per_chain",
        str(caught.value.cause),
    )
    for actor in (occupant, group):
        ray.kill(actor)
    remove_placement_group(place)
    assert_all_is_given_back()
