"""One rank of a chain group without Ray: runs the cases of ``test_chain_groups`` and writes what it holds of each.

python chain_group_script.py RANK FOLDER
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from patterning_dist.errors import PatterningError
from patterning_dist.models.components import select_component
from patterning_dist.models.huggingface import load_language_model
from patterning_dist.models.passes import next_token_losses
from patterning_dist.sampling.chain import Chain, ChainFailure, ChainSettings
from patterning_dist.sampling.controlled import Controlled
from patterning_dist.sampling.noise import Noise
from patterning_dist.sampling.posterior import Posterior
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.samplers import Sampler
from patterning_dist.sampling.shard import shard_model
from patterning_dist.sampling.shard_loading import load_sharded_language_model
from patterning_dist.sampling.target import Target

VOCABULARY, CONTEXT = 13, 8
TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, size=(40, CONTEXT)))
PROBE, HELD_OUT = TOKENS[:7], TOKENS[20:25]
COEFFICIENTS = torch.from_numpy(np.random.default_rng(1).normal(size=(2, len(HELD_OUT), CONTEXT - 1)))
SAMPLERS = {
    "sgld": (Sampler(), 1e-3),
    "rmsprop": (Sampler("rmsprop_sgld", {"decay": 0.9, "stability": 0.1}), 2e-4),
    "corrected": (Sampler("rmsprop_sgld", {"decay": 0.9, "stability": 0.1, "correction": True}), 2e-4),
    "sgnht": (Sampler("sgnht", {"diffusion": 0.1}), 1e-3),
    "controlled": (Sampler(), 1e-3),
    "full": (Sampler(), 1e-3),
}
GRADIENTS = {"controlled": "control_variate", "full": "full"}
SLICES = "transformer.wte.weight[12,3:5]+transformer.h.*.mlp.c_proj.weight[1:5,:]"
# (model, component, sampler, micro-batch size). Micro-batches of 1, 2 and 16 split the minibatch of 5 in all ways.
CASES = {
    "gpt2 everything sgld 16": ("gpt2", "everything", "sgld", 16),
    "gpt2 everything rmsprop 2": ("gpt2", "everything", "rmsprop", 2),
    "gpt2 head corrected 16": ("gpt2", "layer.1.head.1", "corrected", 16),
    "gpt2 head controlled 2": ("gpt2", "layer.0.head.1", "controlled", 2),
    "llama everything full 16": ("llama", "everything", "full", 16),
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
        "experts": lambda: t.MixtralConfig(
            max_position_embeddings=9, num_key_value_heads=1, num_local_experts=3, **wide, **common
        ),
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
    return Target(
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
    """Three draws with two steps between them; minibatches of five samples. A split and a function have controls."""
    gradient, (sampler, step_size) = GRADIENTS.get(sampler, "minibatch"), SAMPLERS[sampler]
    settings = ChainSettings(Posterior(30.0, 20.0), step_size, 5, 2, 3, 2, 7, sampler, gradient)
    options = {"population": len(TOKENS), "controls": [(1, "langevin_stein"), (3, "linear")], "num_batches": 2}
    # At a localisation that conjugate gradients end well with: rounding decides how far they come in a saddle.
    local = replace(settings, posterior=Posterior(30.0, 500.0))
    statistics = {"controlled": Controlled(target, local, 1, **options)} if gradient != "minibatch" else {}
    return Chain(target, settings, 1, population=len(TOKENS), statistics=statistics)


def run_case(kind, component, sampler, micro_batch_size, ranks, device, **options):
    """What a rank holds of a gradient, of the noise of one step, of the draws and of the last position."""
    model = make_model(kind)
    component = select_component(model, component)
    target = make_target(shard_model(model, ranks, device, **options), component, ranks, micro_batch_size, **options)
    shapes = {name: tuple(w.shape) for name, w in target.center.items()}
    noise = Noise(5, 1, NOISE_STEP, target.extents, shapes, device)
    loss, gradient = target.gradient(np.array([3, 17, 3, 5, 9]))
    found = {"loss": np.array(loss)}
    for name, extent in target.extents.items():
        found[f"extent/{name}"] = np.array([*extent, target.totals[name]])
        found[f"gradient/{name}"] = _kept(gradient[name])
        found[f"noise/{name}"] = _kept(noise[name])
    chain, draws = make_chain(target, sampler), []
    for draw in chain.draws():
        draws.append(draw)
        if draw.number == 0:
            kept = chain.state_dict()
    for name, w in chain.state.position.items():
        found[f"position/{name}"] = _kept(w)
    found["losses"], found["observables"] = (
        np.stack([getattr(d, k) for d in draws]) for k in ("losses", "observables")
    )
    results = {name: statistic.result() for name, statistic in chain.statistics.items()}
    found |= {f"{name}/{key}": values for name, result in results.items() for key, values in (result or {}).items()}
    # Back to the state of the first draw; from there on the chain has to give the same again.
    chain.load_state_dict(kept)
    again = np.stack([draw.losses for draw in chain.draws()])
    equal = np.array_equal(again, found["losses"][1:])
    for name, w in chain.state.position.items():
        equal &= np.array_equal(_kept(w), found[f"position/{name}"])
    for name, result in results.items():
        equal &= result is None or np.array_equal(chain.statistics[name].result()["comoment"], result["comoment"])
    found["restarts"] = np.array(equal)
    found["temperatures"], found["step_biases"] = map(np.array, chain.temperatures()[:2])
    return found


def _kept(tensor):
    return tensor.flatten().cpu().numpy().copy()


def run_failure(ranks, device):
    """A step size at which the chain leaves the neighbourhood of w*: the message, as this rank has it."""
    model = make_model("gpt2")
    component = select_component(model, "everything")
    target = make_target(shard_model(model, ranks, device), component, ranks, 16)
    settings = ChainSettings(Posterior(30.0, 20.0), 0.5, 5, 3, 5, 2, seed=7)
    try:
        list(Chain(target, settings, 1, population=len(TOKENS)).draws())
    except ChainFailure as failure:
        return {"message": np.array(str(failure))}
    return {"message": np.array("no failure")}


def run_loading(folder, ranks, device):
    """Whether every parameter is that of the plain loader, the losses, and the bytes of memory this rank holds."""
    plain = dict(load_language_model(str(folder), device=device).named_parameters())
    model = load_sharded_language_model(str(folder), None, ranks, device)
    parameters = dict(model.named_parameters())
    storages = [(p.to_local() if ranks.size > 1 else p).untyped_storage() for p in parameters.values()]
    held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    whole = {n: p.full_tensor() if ranks.size > 1 else p for n, p in parameters.items()}
    same = digests(whole) == digests(plain)
    with torch.no_grad():
        losses = next_token_losses(model, TOKENS[:4].to(device))
    return {"same": np.array(same), "losses": losses.cpu().numpy(), "held": np.array(held)}


def digests(parameters):
    """Names, shapes and hashes of parameters."""
    return {n: (tuple(p.shape), sha256(p.detach().cpu().numpy().tobytes()).hexdigest()) for n, p in parameters.items()}


def run_zero_3(folder):
    """Whether a model in the pieces of ZeRO stage 3 is that of the plain loader, and how much of it this rank holds."""
    import deepspeed

    from patterning_dist.runtime.training.engine import model_in_pieces

    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # asked for, and not used: the group is there
    plain = load_language_model(str(folder))
    settings = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
    with model_in_pieces(settings, "cpu"):
        model = load_language_model(str(folder))
    parameters = dict(model.named_parameters())
    held = sum(p.ds_tensor.numel() for p in parameters.values())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        same = digests(parameters) == digests(dict(plain.named_parameters()))
    return {"same": np.array(same), "held": np.array(held)}


def run_refusals(folders, ranks, device):
    found = {}
    for folder in folders:
        try:
            load_sharded_language_model(str(folder), None, ranks, device)
        except PatterningError as error:
            found[folder.name] = np.array(str(error))
    return found


def kept_for_the_backward_pass(ranks, device, sharded_for):
    """Bytes that autograd keeps of a forward pass in bfloat16, for one sample of two tokens."""
    model = shard_model(make_model("llama"), ranks, device, compute_dtype=sharded_for)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast(device, torch.bfloat16):
        losses = next_token_losses(model, TOKENS[:1, :2].to(device))
    losses.sum().backward()
    return np.array(sum(kept.values()))


def write_models(folder):
    """Folders for the loader: the model without its head, a renamed and a half-precision one, one of experts, and one
    that is tied by its config.json and untied by its file; broken ones."""
    make_model("gpt2").transformer.save_pretrained(folder / "base")
    make_model("neox").save_pretrained(folder / "neox", max_shard_size="2KB")
    make_model("llama").half().save_pretrained(folder / "half")
    make_model("experts").save_pretrained(folder / "experts", max_shard_size="2KB")  # one tensor an expert
    shutil.copytree(folder / "half", folder / "untied")
    config = (folder / "untied" / "config.json").read_text()
    (folder / "untied" / "config.json").write_text(config.replace('embeddings": false', 'embeddings": true'))
    for name in ("lacking", "misshapen", "empty", "infinite"):
        shutil.copytree(folder / "half", folder / name)
    weights = load_file(folder / "half" / "model.safetensors")
    taken = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "lacking" / "model.safetensors", {"format": "pt"})
    weights["model.layers.1.mlp.up_proj.weight"] = taken[:4].clone()
    save_file(weights, folder / "misshapen" / "model.safetensors", {"format": "pt"})
    (folder / "empty" / "model.safetensors").unlink()
    weights["model.layers.1.mlp.up_proj.weight"] = taken
    taken[-1, -1] = torch.inf
    save_file(weights, folder / "infinite" / "model.safetensors", {"format": "pt"})


def run_ranks(folder, device, environments):
    """(rank count, rank) -> what that rank wrote; one rank is this process, the others get an environment each."""
    write_models(folder)
    processes = []
    for rank, environment in enumerate(environments):
        command = [sys.executable, __file__, str(rank), str(folder), device]
        with open(folder / f"{rank}.log", "w") as log:
            processes.append(subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = {(1, 0): run_all(Ranks(), folder, device)}
        deadline = time.monotonic() + 250
        for rank, process in enumerate(processes):
            code = process.wait(max(1, deadline - time.monotonic()))
            assert code == 0, f"rank {rank}: {(folder / f'{rank}.log').read_text()}"
    finally:
        torch.set_num_threads(threads)
        for process in processes:
            process.kill()
    for file in folder.glob("*.npz"):
        with np.load(file) as stored:
            size, rank = file.stem.split("-")
            found[int(size), int(rank)] = dict(stored)
    return found


def whole(runs, size, case, what):
    """Piece -> the flat elements of all ranks, in order; ranks must hold each element once."""
    prefix, pieces = f"{case}|extent/", {}
    for name in (key.removeprefix(prefix) for key in runs[size, 0] if key.startswith(prefix)):
        reached, parts = 0, []
        for rank in range(size):
            start, stop, total = runs[size, rank][prefix + name]
            part = runs[size, rank][f"{case}|{what}/{name}"]
            assert part.size == stop - start
            if stop > start:
                assert start == reached
                reached = stop
            parts.append(part)
        assert reached == total
        pieces[name] = np.concatenate(parts)
    return pieces


def run_all(ranks, folder, device):
    """Every case, as one flat dictionary."""
    results = {name: run_case(*case, ranks, device) for name, case in CASES.items()}
    results["bfloat16"] = run_case("llama", "everything", "sgld", 16, ranks, device, compute_dtype=torch.bfloat16)
    results["failure"] = run_failure(ranks, device)
    for kind in ("base", "neox", "half", "experts", "untied"):
        results[f"loading {kind}"] = run_loading(folder / kind, ranks, device)
    if ranks.size > 1:
        names = ("lacking", "misshapen", "empty", "infinite")
        results["refusals"] = run_refusals([folder / name for name in names], ranks, device)
        names = {"as it is": None, "recomputed": torch.bfloat16}
        results["kept"] = {name: kept_for_the_backward_pass(ranks, device, dtype) for name, dtype in names.items()}
    if ranks.size == 2 and device == "cpu":
        results["zero 3"] = run_zero_3(folder / "experts")
    return {f"{case}|{key}": value for case, found in results.items() for key, value in found.items()}


def main(rank, folder, device):
    """All cases on 4 ranks, then on 2, for processes take long to start; on GPUs on 2 only."""
    torch.set_num_threads(1)
    for size in (4, 2) if device == "cpu" else (2,):
        if rank < size:
            store = f"file://{folder / f'store-{size}'}"
            backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, init_method=store, rank=rank, world_size=size)
            np.savez(folder / f"{size}-{rank}.npz", **run_all(Ranks(rank, size), folder, device))
            dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
