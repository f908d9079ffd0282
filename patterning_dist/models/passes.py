"""Passes of the language models of ``transformers``: logits, losses, and what a pass must not do.

Attention is computed by plain matrix products ("eager") unless an experiment asks for the fused kernels behind "sdpa",
which are faster and take less memory where the context is long. Second derivatives are then taken through PyTorch's own
products in their place. Their backward pass on GPUs need not give the same bits twice: a chain that goes on from where
it was may differ by rounding from one that was not interrupted.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from patterning_dist.errors import PatterningError
from patterning_dist.models.losses import fits_a_chunk, head_losses, token_losses
from patterning_dist.models.pretrained_config import Head

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedModel

ATTENTION = "eager"
_MARK = 100.0  # no cap or scale leaves it as it is


def partitioned() -> bool:
    """Whether models that are made now come in pieces, under DeepSpeed's ZeRO stage 3."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


def logits_in_float32(model: PreTrainedModel) -> None:
    """Multiply by the head in float32 whatever the layers compute in: near 10, logits in bfloat16 are 0.06 apart."""
    head = model.get_output_embeddings() or getattr(model, "score", None)
    if head is not None:
        # A bound method: a copy of the model gets one that is bound to its own head.
        head.forward = MethodType(_outside_autocast, head)


def _outside_autocast(head: Any, x: Tensor) -> Tensor:
    """Logits, or losses [sample, position, 1] while the head has ``targets``, see ``next_token_losses``."""

    def of(part: Tensor) -> Tensor:
        if isinstance(head, nn.Linear) and head.weight.dtype in (torch.bfloat16, torch.float16):  # in such an engine
            bias = None if head.bias is None else head.bias.float()
            return nn.functional.linear(part.float(), head.weight.float(), bias)
        return type(head).forward(head, part.to(head.weight.dtype))

    with torch.autocast(x.device.type, enabled=False):
        if (targets := getattr(head, "targets", None)) is None:
            return of(x)
        return head_losses(of, x, targets, _vocabulary_size(head))[..., None]


def _vocabulary_size(head: Any) -> int:
    return getattr(head.weight, "ds_shape", head.weight.shape)[0]  # ds_shape: in pieces, under ZeRO stage 3


def logits(model: nn.Module, inputs: Tensor, head: Head = "tokens", **arguments: Tensor) -> Tensor:
    """Logits [sample, position, vocabulary] or [sample, class] of token ids; ``arguments`` go to the model.

    Raises:
        PatterningError: sequences longer than the model has positions for.
    """
    check_length(model, inputs.shape[1], last=head == "tokens")
    return model(input_ids=inputs, use_cache=False, **arguments).logits


def check_length(model: nn.Module, length: int, *, last: bool) -> None:
    """Refuse inputs longer than the model has positions for; ``last``: one token more is predicted and not read.

    Raises:
        PatterningError: they are; says to what the context length may be set.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise PatterningError(
            f"sequences of {length + last} tokens need {length} positions, and the model has {limit}; "
            f"set the context length to {limit + last} or less"
        )


def next_token_losses(model: nn.Module, tokens: Tensor, **arguments: Tensor) -> Tensor:
    """Loss of every predicted token, l(x, y) = -log p(y | x) in nats, from float32 logits.

    Args:
        model: a causal language model of ``transformers``, or the engine around it.
        tokens: [sample, position] token ids.
        arguments: of the model, such as position_ids.

    Returns:
        [sample, position - 1]; column p is the loss of ``tokens[:, p + 1]``.

    Raises:
        PatterningError: sequences longer than the model has positions for.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    module: Any = getattr(model, "module", model)  # an engine's
    head = module.get_output_embeddings()
    if ends_in_its_head(model, head) and not fits_a_chunk(targets.numel(), _vocabulary_size(head)):
        head.targets = targets
        try:
            return logits(model, inputs, "tokens", **arguments)[..., 0]
        finally:
            del head.targets
    return token_losses(logits(model, inputs, "tokens", **arguments), tokens)


def ends_in_its_head(model: nn.Module, head: Any) -> bool:
    """Whether the model returns what its head gives: not so where logits are capped or scaled after it.

    Found out in a pass of its own, which all ranks of a sharded model take part in, whatever the size of their batches.
    """
    if getattr(getattr(head, "forward", None), "__func__", None) is not _outside_autocast:
        return False
    if not hasattr(head, "is_last"):
        marked: list[Tensor] = []

        def mark(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
            marked.append(torch.full_like(output, _MARK))
            return marked[-1]

        hook = head.register_forward_hook(mark)
        try:
            with torch.no_grad():
                found = logits(model, torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device))
        finally:
            hook.remove()
        # Tensors without values, of a model that is only counted, are told by being the same.
        head.is_last = found is marked[-1] if isinstance(found, FakeTensor) else bool((found == _MARK).all())
    return head.is_last


def input_of(module: nn.Module, run: Callable[[], object]) -> Tensor:
    """What a module is given in a pass, of float32.

    Args:
        module: of the model.
        run: the pass.
    """
    found: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, given: found.append(given[0].float()))
    try:
        run()
    finally:
        hook.remove()
    return found[-1]


def check_causal(model: PreTrainedModel, path: str) -> None:
    """Encoders load as language models too, but look ahead: change the last token, and compare what came before."""
    vocabulary_size = model.config.get_text_config().vocab_size
    length = min(8, getattr(model.config, "max_position_embeddings", None) or 8)
    if length < 2:
        return
    tokens = (torch.arange(length, device=model.device) % vocabulary_size).repeat(2, 1)
    tokens[1, -1] = (tokens[1, -1] + 1) % vocabulary_size
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    if (logits[0] - logits[1]).abs().max() > 1e-3 * logits.std():
        raise PatterningError(
            f"{path}: its predictions depend on later tokens, so {type(model).__name__} is not a causal language model "
            "here; give one that was trained to predict the next token"
        )


def use_attention(model: nn.Module, kernel: str) -> None:
    """Let a model compute attention by another kernel than "eager", which must give the same.

    Raises:
        PatterningError: the architecture has no such kernel, or something is left out by it.
    """
    if kernel == ATTENTION:
        return
    config: Any = model.config
    known: Any = next(kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers."))
    refusal = PatterningError(f"model.attention: {kernel} is not for {known.__name__}; set it to {ATTENTION}")
    if not (known._supports_sdpa and known._can_set_attn_implementation()):
        raise refusal
    if partitioned():  # whose passes take the engine
        config._attn_implementation = kernel
        return
    device = next(model.parameters()).device
    length = min(8, getattr(config, "max_position_embeddings", None) or 8)
    tokens = torch.arange(length, device=device)[None] % config.get_text_config().vocab_size
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits.float()
        config._attn_implementation = kernel
        found = model(input_ids=tokens, use_cache=False).logits.float()
    if (found - expected).abs().max() > 1e-3 * max(expected.std(correction=0).item(), 1e-6):
        raise refusal


@contextlib.contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Attention probabilities exist while it is entered: fused kernels have none."""
    config: Any = getattr(model, "module", model).config  # an engine's
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def check_packing(model: nn.Module) -> None:
    """Documents of a packed row must not see each other: change the first, and compare what the second gives.

    Raises:
        PatterningError: they do.
    """
    module = getattr(model, "module", model)  # an engine's
    apart = "position_ids" in inspect.signature(type(module).forward).parameters
    if apart:
        device = next(module.parameters()).device
        tokens = torch.tensor([[0, 0, 0, 1], [1, 0, 0, 1]], device=device)
        positions = torch.tensor([[0, 1, 0, 1]] * 2, device=device)
        with torch.no_grad():
            logits = model(input_ids=tokens, position_ids=positions, use_cache=False).logits[:, 2:].float()
        apart = bool((logits[0] - logits[1]).abs().max() <= 1e-3 * logits.std())
    if not apart:
        raise PatterningError(
            f"the data is packed, several documents a row, and {type(module).__name__} lets them see each other; "
            "give rows of one document each (short ones are padded)"
        )
