"""Passes counted without memory cost what real ones do: torch's own profiler sees the same bytes, and products of
matrices are those of the textbook."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import GPTNeoXConfig, LlamaConfig, MixtralConfig

from patterning_dist.errors import PatterningError
from patterning_dist.models.huggingface import from_config, quiet
from patterning_dist.models.passes import next_token_losses
from patterning_dist.sampling.footprint import Weightless
from patterning_dist.sampling.shard import checkpoint_layers

LAYERS, WIDTH, INNER, VOCABULARY, LENGTH, BATCH = 3, 32, 48, 80, 24, 5
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
TOKENS = torch.zeros(BATCH, LENGTH + 1, dtype=torch.long)


def model(kind: type = GPTNeoXConfig, device: str = "meta", again: bool = False, **changes: int) -> torch.nn.Module:
    with quiet(), torch.device(device):
        made = from_config(kind(**(SIZES | changes)), "tokens").eval()
    if again:
        checkpoint_layers(made)
    return made


def weightless(*arguments: object, **options: object) -> Weightless:
    return Weightless(model(*arguments, **options), next_token_losses)  # type: ignore[arg-type]


def everything(of: Weightless) -> set[str]:
    return {name for name, _ in of.model.named_parameters()}


def profiled_peak(made: torch.nn.Module, with_gradient: bool) -> int:
    """Largest sum of allocations less releases of a real pass, gradients dropped as soon as they are there."""
    for parameter in made.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found,
        torch.set_grad_enabled(with_gradient),
    ):
        losses = next_token_losses(made, TOKENS)
        if with_gradient:
            losses.sum().backward()
        del losses
    now = peak = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("kind", [GPTNeoXConfig, LlamaConfig])
@pytest.mark.parametrize(("with_gradient", "again"), [(False, False), (True, False), (True, True)])
def test_peak_is_what_the_profiler_sees_of_a_real_pass(kind: type, with_gradient: bool, again: bool) -> None:
    planned = weightless(kind, again=again)
    found = planned.gradient(TOKENS, everything(planned)) if with_gradient else planned.forward(TOKENS)
    # The allocator rounds up to 64 bytes, and a few tiny tensors are not made by operations.
    assert 0.99 < found.peak_bytes / profiled_peak(model(kind, "cpu", again=again), with_gradient) <= 1


def test_flops_are_those_of_the_textbook() -> None:
    planned, tokens = weightless(LlamaConfig), BATCH * LENGTH
    names = everything(planned)
    matrices = sum(p.numel() for n, p in planned.model.named_parameters() if p.dim() == 2 and "embed_tokens" not in n)
    attention = 4 * LAYERS * BATCH * LENGTH**2 * WIDTH  # queries with keys, patterns with values
    forward = planned.forward(TOKENS)
    rotations = forward.flops - 2 * matrices * tokens - attention  # angles of positions, which take no backward pass
    assert 0 <= rotations < 0.01 * forward.flops
    backward = planned.gradient(TOKENS, names)
    # 6 N a token, and three times the attention.
    assert backward.flops - rotations == pytest.approx(6 * matrices * tokens + 3 * attention, rel=1e-9)


def test_what_does_not_move_costs_no_backward_pass() -> None:
    planned = weightless(LlamaConfig)
    last = planned.gradient(TOKENS, {"lm_head.weight"})
    assert last.flops - planned.forward(TOKENS).flops == 2 * VOCABULARY * WIDTH * BATCH * LENGTH
    assert last.peak_bytes < planned.gradient(TOKENS, everything(planned)).peak_bytes


def test_layers_that_are_computed_again_keep_less_and_take_a_pass_more() -> None:
    plain, again = (
        weightless(LlamaConfig, num_hidden_layers=12),
        weightless(LlamaConfig, again=True, num_hidden_layers=12),
    )
    kept, less = (of.gradient(TOKENS, everything(of)) for of in (plain, again))
    assert less.peak_bytes < 0.25 * kept.peak_bytes
    # The head is no layer, and what a layer ends with is not needed: its last product is left out.
    head, last = 2 * VOCABULARY * WIDTH * BATCH * LENGTH, 2 * WIDTH * INNER * BATCH * LENGTH
    rotations = plain.forward(TOKENS).flops - (kept.flops - plain.forward(TOKENS).flops) / 2  # take no backward pass
    assert less.flops - kept.flops == plain.forward(TOKENS).flops - head - 12 * last - rotations


def test_bfloat16_is_counted_as_autocast_has_it() -> None:
    wide, narrow = (Weightless(model(LlamaConfig), next_token_losses, d) for d in (None, torch.bfloat16))
    costs = [of.gradient(TOKENS, everything(of)) for of in (wide, narrow)]
    assert costs[1].num_operations > costs[0].num_operations and costs[1].flops == costs[0].flops


def test_experts_are_counted_by_those_that_a_token_goes_to() -> None:
    few, many = (
        weightless(MixtralConfig, num_local_experts=number, num_experts_per_tok=2, num_key_value_heads=4)
        for number in (4, 8)
    )
    router = 2 * 4 * WIDTH * BATCH * LENGTH * LAYERS  # four experts more to choose from
    assert many.forward(TOKENS).flops - few.forward(TOKENS).flops == router
    experts = 2 * 2 * 3 * WIDTH * INNER * BATCH * LENGTH * LAYERS
    assert few.forward(TOKENS).flops > experts


def test_hessian_products_are_counted() -> None:
    planned = weightless(LlamaConfig)
    names = everything(planned)
    product, gradient = planned.hessian_product(TOKENS, names), planned.gradient(TOKENS, names)
    assert 2 < product.flops / gradient.flops < 4 and product.peak_bytes > gradient.peak_bytes


def test_a_pass_that_looks_at_values_is_refused_with_a_remedy() -> None:
    def losses(module: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return module(batch) if batch.sum().item() else batch

    planned = Weightless(torch.nn.Linear(3, 2), losses)
    with pytest.raises(PatterningError, match=r"model: a pass of Linear cannot be counted .*--gpus"):
        planned.forward(torch.zeros(4, 3))
