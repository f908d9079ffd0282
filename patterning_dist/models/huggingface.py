"""Causal language models of ``transformers``: from a local folder or by their name on the hub.

Nothing is unpickled and no code comes with a model: weights are read from safetensors, ``trust_remote_code`` is off.

Attention is computed by plain matrix products ("eager") unless an experiment asks for the fused kernels behind "sdpa",
which are faster and take less memory where the context is long. Second derivatives are then taken through PyTorch's own
products in their place. Their backward pass on GPUs need not give the same bits twice: a chain that goes on from where
it was may differ by rounding from one that was not interrupted. Experts are multiplied one after another: the kernel
for all of them at once takes only widths of so many times 16 bytes, and what stands in for it has no second derivative.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from patterning_dist.config.checkpoints import FINAL, checkpoints_in, is_on_hub
from patterning_dist.config.model import HuggingFaceConfig
from patterning_dist.errors import PatterningError, first_line
from patterning_dist.models.adapter import Adapter, attach_adapter, read_adapter
from patterning_dist.models.checkpoint import no_weights, read_checkpoint
from patterning_dist.models.filling import fill
from patterning_dist.models.losses import fits_a_chunk, head_losses, token_losses
from patterning_dist.models.pretrained_config import CLASSES, INVALID, Head, quiet, read_config, saved_head
from patterning_dist.models.weights import Source, match, same_where_tied

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PretrainedConfig, PreTrainedModel

ATTENTION = EXPERTS = "eager"
_MARK = 100.0  # no cap or scale leaves it as it is


@dataclass(frozen=True)
class SavedModel:
    """A model where it lies, by its configuration and the headers of its files; its weights are not read.

    Attributes:
        path: as it was given.
        config: of the model; ties of embeddings as the files have them.
        head: what it predicts.
        skeleton: its modules on the ``meta`` device.
        adapter: that is put on it; None: no adapter.
        untied: config.json says that its embeddings are tied, and the files hold two.
        sources: where the files have its parameters; None: there are no files.
    """

    path: str
    config: PretrainedConfig
    head: Head
    skeleton: PreTrainedModel
    adapter: Adapter | None
    untied: bool
    sources: list[Source] | None


def open_saved_model(
    path: str, revision: str | None = None, head: Head | None = None, *, fetch: bool = True
) -> SavedModel:
    """Look at a model, or at an adapter and its base.

    Args:
        path: folder written by ``save_pretrained``, of a model or of an adapter, or a name on the hub (``owner/name``).
        revision: branch, tag or commit on the hub.
        head: what it predicts; None: as it was saved.
        fetch: the weights of a model on the hub if they are not in the local cache. Without them its embeddings are
            tied as config.json says.

    Raises:
        PatterningError: not found, not a model with this head, of an architecture that ``transformers`` does not know
            or that brings its own code, or with weights that are not what config.json says.
    """
    adapter = read_adapter(path)
    base, at = (path, revision) if adapter is None else (adapter.base, adapter.revision)
    if adapter is not None and head is None and adapter.settings.get("task_type") == "SEQ_CLS":
        head = "classes"
    config = read_config(base, at, head)
    head = head or saved_head(config)
    folder = _folder(base, at, fetch)
    try:
        tensors = {} if folder is None else read_checkpoint(folder)
    except PatterningError:
        if fetch or Path(base).is_dir():
            raise
        tensors = {}  # the cache has a part of it
    if adapter is not None:
        if head == "classes" and (score := adapter.tensors.get("score.weight")) is not None:
            config.num_labels = score.shape[0]  # the base's own is of a model without this head
        tensors |= adapter.tensors if tensors else {}
    where = f"{base}/config.json"
    skeleton = skeleton_of(config, head, where, adapter)
    sources = match(skeleton, tensors, base) if tensors else None
    untied = sources is not None and not same_where_tied(skeleton, sources)
    if untied:
        config.tie_word_embeddings = False
        skeleton = skeleton_of(config, head, where, adapter)
        skeleton.untied_by_file = True  # type: ignore[assignment]
        sources = match(skeleton, tensors, base)
    return SavedModel(path, config, head, skeleton, adapter, untied, sources)


def load_language_model(
    path: str,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    head: Head = "tokens",
    cut: Callable[[PreTrainedModel], Any] | None = None,
) -> PreTrainedModel:
    """A language model with its weights in float32, in ``eval()`` mode.

    Args:
        path, revision, head: see ``open_saved_model``.
        device: where the weights go.
        cut: cuts the parameters over ranks, each of which then reads its own part; None: whole, or in the pieces of
            ZeRO stage 3 where models are made so. All ranks call this together.

    Raises:
        PatterningError: what ``open_saved_model`` refuses, no safetensors, weights that are NaN or infinite.
    """
    saved = open_saved_model(path, revision, head)
    if saved.sources is None:
        raise no_weights(Path(path if saved.adapter is None else saved.adapter.base))
    pieces = partitioned()
    with (
        quiet(),
        torch.random.fork_rng(devices=[]),
        contextlib.nullcontext() if pieces else parameters_without_memory(),
    ):
        model = from_config(saved.config, head)
        if saved.adapter is not None:
            attach_adapter(model, saved.adapter)
    model.untied_by_file = saved.untied  # type: ignore[assignment]
    logits_in_float32(model)
    if cut is not None:
        cut(model)
    fill(model, saved.sources, device)
    if cut is None:
        model.to(device)  # type: ignore[arg-type]  # its annotation is of another method
    model.eval()
    if head == "tokens" and not pieces:
        check_causal(model, path)
    return model


@contextlib.contextmanager
def parameters_without_memory() -> Iterator[None]:
    """While it is entered, modules are built with parameters on the meta device; buffers are real."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # a tied parameter stays the same object
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    # Every module is built by this method, and goes back to it at the end.
    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _folder(path: str, revision: str | None, fetch: bool) -> Path | None:
    """Where the weights lie; None: on the hub only."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "model*.safetensors"]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=wanted, local_files_only=not fetch))
    except (OSError, ValueError) as error:
        if not fetch:
            return None
        raise PatterningError(
            f"{path}: the weights cannot be fetched ({first_line(error)}); fetch them into a folder and give that"
        ) from None


def skeleton_of(config: PretrainedConfig, head: Head, where: str, adapter: Adapter | None = None) -> PreTrainedModel:
    """The modules of such a model on the ``meta`` device, whole under ZeRO stage 3 too.

    Raises:
        PatterningError: sizes that no model can have; ``where`` they were written.
    """
    from transformers.integrations import deepspeed

    settings, deepspeed._hf_deepspeed_config_weak_ref = deepspeed._hf_deepspeed_config_weak_ref, None
    try:
        with quiet(), torch.device("meta"):
            model = from_config(config, head)
            if adapter is not None:
                attach_adapter(model, adapter)
    except INVALID as error:
        raise PatterningError(
            f"{where}: no model can be made of it ({type(error).__name__}: {first_line(error)}); correct it"
        ) from None
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = settings
    return model


def partitioned() -> bool:
    """Whether models that are made now come in pieces, under DeepSpeed's ZeRO stage 3."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


def auto_model(head: Head) -> Any:
    """The class of ``transformers`` that makes models with this head."""
    import transformers

    return getattr(transformers, CLASSES[head][0])


def from_config(config: PretrainedConfig, head: Head) -> PreTrainedModel:
    """The modules of such a model, with weights in float32 as the surroundings make them."""
    return auto_model(head).from_config(
        config,
        dtype=torch.float32,
        attn_implementation=ATTENTION,
        experts_implementation=EXPERTS,
        trust_remote_code=False,
    )


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


def language_model_skeleton(path: str, revision: str | None = None, head: Head | None = None) -> PreTrainedModel:
    """The modules of a language model on the ``meta`` device: names and shapes, no weights are read or fetched.

    Args, Raises: see ``open_saved_model``.
    """
    return open_saved_model(path, revision, head, fetch=False).skeleton


def fresh_language_model(config: PretrainedConfig, seed: int, head: Head = "tokens") -> PreTrainedModel:
    """A language model with fresh weights in float32, from a seed.

    Modules draw nothing while they are made, as under ZeRO stage 3: the weights are the same there.
    """
    from transformers.initialization import no_init_weights

    in_pieces = partitioned()
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with contextlib.nullcontext() if in_pieces else no_init_weights():
            model = from_config(config, head)
        if not in_pieces:
            model.init_weights()
    logits_in_float32(model)
    return model.eval()


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
    if _ends_in_its_head(model, head) and not fits_a_chunk(targets.numel(), _vocabulary_size(head)):
        head.targets = targets
        try:
            return logits(model, inputs, "tokens", **arguments)[..., 0]
        finally:
            del head.targets
    return token_losses(logits(model, inputs, "tokens", **arguments), tokens)


def _ends_in_its_head(model: nn.Module, head: Any) -> bool:
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


def model_location(config: HuggingFaceConfig, checkpoint: str) -> tuple[str, str | None]:
    """Folder of a checkpoint and None, or a name on the hub and the revision there.

    Raises:
        PatterningError: the model's folder is not there, or has no such sub-folder.
    """
    folder = Path(config.path or "")
    if is_on_hub(str(config.path)):
        return str(config.path), None if checkpoint == FINAL else checkpoint
    if not folder.is_dir():
        raise PatterningError(f"model.path: there is no folder {folder}; give that of a model, or a name on the hub")
    if (folder / checkpoint).is_dir():
        return str(folder / checkpoint), None
    if checkpoint == FINAL:
        return str(folder), None
    there = [name for name in checkpoints_in(folder) if name != FINAL]
    raise PatterningError(
        f"model.checkpoints: {folder} has no folder {checkpoint!r}; there are {', '.join(there) or 'none'}, and "
        f"{FINAL} for the model itself"
    )


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
