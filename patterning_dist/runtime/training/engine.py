"""DeepSpeed engines, with what the machine lacks switched off."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from patterning_dist.config.deepspeed import AUTO, BY_WIDTH
from patterning_dist.runtime.training.pieces import load_optimizer_pieces, optimizer_pieces

_NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], device: str) -> Any:
    """A DeepSpeed engine over the process group that there is.

    In bfloat16 or float16 DeepSpeed's float32 masters would begin at the rounded parameters: here they begin at those
    of ``model``.
    """
    deepspeed = _deepspeed(device)
    exact = _narrowed(model, config)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=_with_bucket_sizes(config, model))
    for parameter, value in exact.items():
        if value.shape == getattr(parameter, "ds_shape", parameter.shape):
            deepspeed.utils.safe_set_full_fp32_param(parameter, value)
        else:
            deepspeed.utils.safe_set_local_fp32_param(parameter, value)
    return engine


def _narrowed(model: nn.Module, config: dict[str, Any]) -> dict[nn.Parameter, torch.Tensor]:
    """Parameters that will be narrower, as they are now: whole, or this rank's piece, which DeepSpeed wants narrow."""
    dtype = next((kind for name, kind in _NARROW.items() if config.get(name, {}).get("enabled")), None)
    if dtype is None:
        return {}
    exact = {}
    for parameter in model.parameters():
        piece = getattr(parameter, "ds_tensor", None)
        kept = parameter if piece is None else piece
        if parameter.requires_grad:
            exact[parameter] = kept.detach().clone()
        if piece is not None:
            piece.data, parameter.data = piece.data.to(dtype), parameter.data.to(dtype)
    return exact


def _with_bucket_sizes(config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Sizes of ZeRO's buffers that are "auto", from the model's width as the trainer of ``transformers`` sets them."""
    shapes = [getattr(p, "ds_shape", p.shape) for p in model.parameters()]
    width = max((min(shape) for shape in shapes if len(shape) > 1), default=1)
    sizes = dict(zip(BY_WIDTH, (width**2, int(0.9 * width**2), 10 * width), strict=True))
    zero = {key: sizes[key] if value == AUTO else value for key, value in config["zero_optimization"].items()}
    return config | {"zero_optimization": zero}


def _deepspeed(device: str) -> Any:
    """DeepSpeed, set up on the process group that there is.

    On the CPU the shared-memory communication operator is declared absent: it would be compiled for minutes at every
    first start, and a killed compilation leaves a lock that hangs the next.
    """
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ["LOCAL_SIZE"] = os.environ["LOCAL_WORLD_SIZE"]
    import deepspeed

    if device == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logging.set_log_level_from_string("error")
    deepspeed.init_distributed(dist_backend="gloo" if device == "cpu" else "nccl", verbose=False)
    return deepspeed


class _Settings:
    """What ``transformers`` asks of the DeepSpeed configuration while it makes a model."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def is_zero3(self) -> bool:
        return True


@contextlib.contextmanager
def model_in_pieces(config: dict[str, Any], device: str) -> Iterator[None]:
    """Under ZeRO stage 3 models of ``transformers`` that are made inside come in pieces: no rank has one whole.

    Other models are made whole, and cut by ``initialize``: their own code may initialise a parameter after the module
    that holds it is done, when there would be nothing left of it.
    """
    if config["zero_optimization"].get("stage", 0) < 3:
        yield
        return
    _deepspeed(device)
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    settings = _Settings({key: value for key, value in config.items() if key not in _NARROW})  # in float32
    set_hf_deepspeed_config(settings)  # which keeps a weak reference
    try:
        yield
    finally:
        unset_hf_deepspeed_config()


def initialize_alone(module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], device: str) -> Any:
    """A DeepSpeed engine of this process and no other."""
    if not torch.distributed.is_initialized():
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        backend = "gloo" if device == "cpu" else "nccl"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    return initialize(module, optimizer, config, device)


_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def engine_state(engine: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an engine needs to go on with the same bits: what all ranks have alike, and what is this rank's alone.

    To be taken between two optimizer steps, on every rank at once.
    """
    stage = engine.zero_optimization_stage()
    shared: dict[str, Any] = {"counters": {name: getattr(engine, name) for name in _COUNTERS}}
    if hasattr(engine.optimizer, "loss_scaler"):
        scaler = vars(engine.optimizer.loss_scaler).items()
        shared["loss_scaler"] = {key: value for key, value in scaler if isinstance(value, bool | int | float)}
    if stage < 3:  # else all there is are the optimizer's pieces
        shared["module"] = engine.module.state_dict()
    if stage == 0:
        return shared | {"optimizer": engine.optimizer.state_dict()}, {}
    with partitioned_parameters(engine):
        return shared, optimizer_pieces(engine)


def load_engine_state(engine: Any, shared: dict[str, Any], own: Iterable[dict[str, Any]]) -> None:
    """Put an engine, made with the same model and configuration, into a state of ``engine_state``.

    Args:
        engine: on any number of ranks.
        shared: what all ranks had alike.
        own: what every rank had alone; on as many ranks as there were, that of this rank is enough.
    """
    if "loss_scaler" in shared:
        vars(engine.optimizer.loss_scaler).update(shared["loss_scaler"])
    if "module" in shared:
        engine.module.load_state_dict(shared["module"])
    if "optimizer" in shared:
        engine.optimizer.load_state_dict(shared["optimizer"])
    else:
        with partitioned_parameters(engine):
            load_optimizer_pieces(engine, own)
    for name, value in shared["counters"].items():
        setattr(engine, name, value)


@contextlib.contextmanager
def partitioned_parameters(engine: Any) -> Iterator[None]:
    """Every parameter in pieces while it is entered: under ZeRO stage 3 small ones are whole between steps."""
    if engine.zero_optimization_stage() < 3:
        yield
        return
    engine.optimizer.checkpoint_event_prologue()
    yield
    engine.optimizer.checkpoint_event_epilogue()
