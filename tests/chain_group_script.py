"""One rank of a chain group without Ray: runs the cases of ``test_chain_groups`` and writes what it holds of each.

python chain_group_script.py RANK FOLDER
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from patterning_dist.errors import PatterningError
from patterning_dist.models.attention import AttentionOnlyTransformer
from patterning_dist.models.components import select_component
from patterning_dist.models.huggingface import load_language_model, next_token_losses
from patterning_dist.models.losses import token_losses
from patterning_dist.sampling.chain import Chain, ChainFailure, ChainSettings
from patterning_dist.sampling.module_target import ModuleTarget
from patterning_dist.sampling.noise import Noise
from patterning_dist.sampling.posterior import Posterior
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.samplers import Sampler
from patterning_dist.sampling.shard import shard_model
from patterning_dist.sampling.shard_loading import load_sharded_language_model

VOCABULARY, CONTEXT = 13, 8
TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, size=(40, CONTEXT)))
PROBE, HELD_OUT = TOKENS[:7], TOKENS[20:25]
COEFFICIENTS = torch.from_numpy(np.random.default_rng(1).normal(size=(2, len(HELD_OUT), CONTEXT - 1)))
SAMPLERS = {
    "sgld": (Sampler(), 1e-3),
    "rmsprop": (Sampler("rmsprop_sgld", {"decay": 0.9, "stability": 0.1}), 2e-4),
    "corrected": (Sampler("rmsprop_sgld", {"decay": 0.9, "stability": 0.1, "correction": True}), 2e-4),
    "sgnht": (Sampler("sgnht", {"diffusion": 0.1}), 1e-3),
}
SLICES = "transformer.wte.weight[12,3:5]+transformer.h.*.mlp.c_proj.weight[1:5,:]"
# (model, component, sampler, micro-batch size). Micro-batches of 1, 2 and 16 split the minibatch of 5 in all ways.
CASES = {
    "gpt2 everything sgld 16": ("gpt2", "everything", "sgld", 16),
    "gpt2 everything rmsprop 2": ("gpt2", "everything", "rmsprop", 2),
    "gpt2 head corrected 16": ("gpt2", "layer.1.head.1", "corrected", 16),
    "gpt2 head sgld 1": ("gpt2", "layer.1.head.1", "sgld", 1),
    "gpt2 slices sgnht 16": ("gpt2", SLICES, "sgnht", 16),
    "neox everything sgnht 2": ("neox", "everything", "sgnht", 2),
    "neox head rmsprop 2": ("neox", "layer.0.head.2", "rmsprop", 2),
    "llama everything rmsprop 16": ("llama", "everything", "rmsprop", 16),
    "llama head sgnht 1": ("llama", "layer.1.head.2", "sgnht", 1),
}
NOISE_STEP = 3


def make_model(kind):
    """Small models with sizes along axis 0 (13, 10, 12, 9, 5) that 2 and 4 ranks cannot share out evenly; of 9 and 5
    the fourth of 4 ranks holds nothing."""
    import transformers as t

    common = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    wide = {"hidden_size": 12, "intermediate_size": 5, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = {
        "gpt2": lambda: t.GPT2Config(n_positions=9, n_embd=10, n_layer=2, n_head=2, n_inner=5, **common),
        "neox": lambda: t.GPTNeoXConfig(max_position_embeddings=9, rotary_pct=1.0, **wide, **common),
        "llama": lambda: t.LlamaConfig(max_position_embeddings=9, num_key_value_heads=1, **wide, **common),
    }[kind]()
    torch.manual_seed(3)
    model = t.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():  # large enough for losses that move
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def squared_norm(model):
    """An observable of the parameters themselves, which are sharded."""
    return sum((p * p).sum() for p in model.parameters())


def make_target(model, component, ranks, micro_batch_size, **options):
    return ModuleTarget(
        model,
        component,
        next_token_losses,
        TOKENS,
        PROBE,
        held_out=HELD_OUT,
        coefficients=COEFFICIENTS,
        functions=(squared_norm,),
        num_component_losses=1,
        micro_batch_size=micro_batch_size,
        ranks=ranks,
        **options,
    )


def make_chain(target, sampler):
    """Three draws with two steps between them; minibatches of five samples."""
    sampler, step_size = SAMPLERS[sampler]
    settings = ChainSettings(Posterior(30.0, 20.0), step_size, 5, 2, 3, 2, seed=7, sampler=sampler)
    return Chain(target, settings, 1, population=len(TOKENS))


def run_case(kind, component, sampler, micro_batch_size, ranks, **options):
    """What a rank holds of a gradient, of the noise of one step, of the draws and of the last position."""
    model = make_model(kind)
    component = select_component(model, component)
    target = make_target(shard_model(model, ranks, "cpu", **options), component, ranks, micro_batch_size, **options)
    shapes = {name: tuple(w.shape) for name, w in target.center.items()}
    noise = Noise(5, 1, NOISE_STEP, target.extents, shapes)
    loss, gradient = target.gradient(np.array([3, 17, 3, 5, 9]))
    found = {"loss": np.array(loss)}
    for name, extent in target.extents.items():
        found[f"extent/{name}"] = np.array([*extent, target.totals[name]])
        found[f"gradient/{name}"] = gradient[name].flatten().numpy().copy()
        found[f"noise/{name}"] = noise[name].flatten().numpy()
    chain, draws = make_chain(target, sampler), []
    for draw in chain.draws():
        draws.append(draw)
        if draw.number == 0:
            kept = chain.state_dict()
    for name, w in chain.state.position.items():
        found[f"position/{name}"] = w.flatten().numpy().copy()
    found["losses"], found["observables"] = (
        np.stack([getattr(d, k) for d in draws]) for k in ("losses", "observables")
    )
    # Back to the state of the first draw; from there on the chain has to give the same again.
    chain.load_state_dict(kept)
    again = np.stack([draw.losses for draw in chain.draws()])
    equal = np.array_equal(again, found["losses"][1:])
    for name, w in chain.state.position.items():
        equal &= np.array_equal(w.flatten().numpy(), found[f"position/{name}"])
    found["restarts"] = np.array(equal)
    return found


def run_failure(ranks):
    """A step size at which the chain leaves the neighbourhood of w*: the message, as this rank has it."""
    model = make_model("gpt2")
    component = select_component(model, "everything")
    target = make_target(shard_model(model, ranks, "cpu"), component, ranks, 16)
    settings = ChainSettings(Posterior(30.0, 20.0), 0.5, 5, 3, 5, 2, seed=7)
    try:
        list(Chain(target, settings, 1, population=len(TOKENS)).draws())
    except ChainFailure as failure:
        return {"message": np.array(str(failure))}
    return {"message": np.array("no failure")}


def run_loading(folder, ranks):
    """Whether every parameter is that of the plain loader, the losses, and the bytes of memory this rank holds."""
    plain = dict(load_language_model(str(folder)).named_parameters())
    model = load_sharded_language_model(str(folder), None, ranks, "cpu")
    parameters = dict(model.named_parameters())
    storages = [(p.to_local() if ranks.size > 1 else p).untyped_storage() for p in parameters.values()]
    held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    whole = {n: p.full_tensor() if ranks.size > 1 else p for n, p in parameters.items()}
    same = whole.keys() == plain.keys() and all(torch.equal(whole[n], w) for n, w in plain.items())
    with torch.no_grad():
        losses = next_token_losses(model, TOKENS[:4])
    return {"same": np.array(same), "losses": losses.numpy(), "held": np.array(held)}


def run_refusals(folders, ranks):
    found = {}
    for folder in folders:
        try:
            load_sharded_language_model(str(folder), None, ranks, "cpu")
        except PatterningError as error:
            found[folder.name] = np.array(str(error))
    return found


def kept_for_the_backward_pass(ranks, sharded_for):
    """Bytes that autograd keeps of a forward pass in bfloat16, for one sample of two tokens."""
    model = shard_model(make_model("llama"), ranks, "cpu", compute_dtype=sharded_for)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        losses = next_token_losses(model, TOKENS[:1, :2])
    losses.sum().backward()
    return np.array(sum(kept.values()))


def run_all(ranks, folder):
    """Every case, as one flat dictionary."""
    results = {name: run_case(*case, ranks) for name, case in CASES.items()}
    results["bfloat16"] = run_case("llama", "everything", "sgld", 16, ranks, compute_dtype=torch.bfloat16)
    results["failure"] = run_failure(ranks)
    for kind in ("base", "neox", "half"):
        results[f"loading {kind}"] = run_loading(folder / kind, ranks)
    if ranks.size > 1:
        results["refusals"] = run_refusals([folder / "lacking", folder / "misshapen", folder / "empty"], ranks)
        names = {"as it is": None, "recomputed": torch.bfloat16}
        results["kept"] = {name: kept_for_the_backward_pass(ranks, dtype) for name, dtype in names.items()}
    return {f"{case}|{key}": value for case, found in results.items() for key, value in found.items()}


def kill_rank_1(model):
    """An observable whose process is killed as by the kernel, for want of memory."""
    if dist.is_initialized() and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.zeros(1)


def raise_on_rank_1(model):
    """An observable with a bug that only one rank runs into."""
    if dist.is_initialized() and dist.get_rank() == 1:
        raise ValueError("a bug of the user's own")
    return torch.zeros(1)


class GroupStudy:
    """What workers and ranks hold in the tests with Ray.

    Units are "<who runs it>/<kind>", kinds differ in the observable or in the step size; the chains of all are the same
    up to that.
    """

    observables = ("component", "function")
    units = ("worker/steady", "worker/diverging", "group/steady", "group/diverging", "group/killed", "group/raising")

    def __init__(self, device, ranks):
        self.device, self.ranks = device, ranks

    def chain(self, unit, number):
        kind = unit.partition("/")[2]
        model = AttentionOnlyTransformer(
            vocabulary_size=VOCABULARY, context_length=CONTEXT, num_layers=2, num_heads=3, d_model=10, d_head=3, seed=1
        )
        target = ModuleTarget(
            shard_model(model, self.ranks, self.device),
            select_component(model, "layer.0.head.1+unembedding"),
            lambda model, tokens: token_losses(model(tokens[:, :-1]), tokens),
            TOKENS,
            PROBE,
            functions=({"killed": kill_rank_1, "raising": raise_on_rank_1}.get(kind, squared_norm),),
            num_component_losses=1,
            ranks=self.ranks,
        )
        step_size = 1.0 if kind == "diverging" else 1e-3
        settings = ChainSettings(Posterior(30.0, 20.0), step_size, 5, 2, 9, 1, seed=7)
        return Chain(target, settings, number, population=len(TOKENS))


def refused_study(device, ranks):
    raise PatterningError("model.path: there is no such folder")


def main(rank, folder):
    """All cases on 4 ranks, then on 2: processes take long to start."""
    torch.set_num_threads(1)
    for size in (4, 2):
        if rank < size:
            store = f"file://{folder / f'store-{size}'}"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
            np.savez(folder / f"{size}-{rank}.npz", **run_all(Ranks(rank, size), folder))
            dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
