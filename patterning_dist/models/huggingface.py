"""Causal language models of ``transformers``: from a local folder or by their name on the hub.

Nothing is unpickled and no code comes with a model: weights are read from safetensors, ``trust_remote_code`` is off.

Experts are multiplied one after another: the kernel for all of them at once takes only widths of so many times 16
bytes, and what stands in for it has no second derivative. What a pass of a model gives is in ``models.passes``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from patterning_dist.config.checkpoints import FINAL, checkpoints_in, is_on_hub
from patterning_dist.config.model import HuggingFaceConfig
from patterning_dist.errors import PatterningError, first_line
from patterning_dist.models.adapter import Adapter, attach_adapter, read_adapter
from patterning_dist.models.checkpoint import no_weights, read_checkpoint
from patterning_dist.models.filling import fill
from patterning_dist.models.passes import ATTENTION, check_causal, logits_in_float32, partitioned
from patterning_dist.models.pretrained_config import CLASSES, INVALID, Head, quiet, read_config, saved_head
from patterning_dist.models.weights import Source, match, same_where_tied

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PretrainedConfig, PreTrainedModel

EXPERTS = "eager"


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
        skeleton.untied_by_file = True  # type: ignore[assignment]  # a flag, no tensor
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
    model.untied_by_file = saved.untied  # type: ignore[assignment]  # a flag, no tensor
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
    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]  # put back below
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]  # as it was


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
