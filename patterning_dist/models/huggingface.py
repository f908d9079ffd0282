"""Causal language models of ``transformers``: from a local folder or by their name on the hub.

Nothing is unpickled and no code comes with a model: weights are read from safetensors, ``trust_remote_code`` is off.

Attention is computed by plain matrix products ("eager") unless an experiment asks for the fused kernels behind "sdpa",
which are faster and take less memory where the context is long. Second derivatives are then taken through PyTorch's own
products in their place. Their backward pass on GPUs need not give the same bits twice: a chain that goes on from where
it was may differ by rounding from one that was not interrupted.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from patterning_dist.config.checkpoints import FINAL, checkpoints_in, is_on_hub
from patterning_dist.config.model import HuggingFaceConfig
from patterning_dist.errors import PatterningError, first_line
from patterning_dist.models.losses import fits_a_chunk, head_losses, token_losses

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PretrainedConfig, PreTrainedModel

ATTENTION = "eager"
Head = Literal["tokens", "classes"]  # a causal language model, or a classifier or reward model of whole sequences
_KINDS = {"tokens": "causal language model", "classes": "sequence classifier"}
_MARK = 100.0  # no cap or scale leaves it as it is
# Of ``transformers``: what makes such models, and configuration -> class of those that there are.
_CLASSES = {
    "tokens": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING"),
    "classes": ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"),
}


def load_language_model(
    path: str, revision: str | None = None, device: str | torch.device = "cpu", head: Head = "tokens"
) -> PreTrainedModel:
    """A language model with its weights in float32, in ``eval()`` mode.

    Args:
        path: folder written by ``save_pretrained``, or a name on the hub (``owner/name``).
        revision: branch, tag or commit on the hub.
        device: where the weights go.
        head: what it predicts.

    Raises:
        PatterningError: not found, not a model with this head, of an architecture that ``transformers`` does not know
            or that brings its own code, without safetensors, or with weights that are not what config.json says.
    """
    config = read_config(path, revision, head)
    from safetensors import SafetensorError

    try:
        with quiet():
            # With output_loading_info a pair, which its annotation does not say.
            loaded: Any = auto_model(head).from_pretrained(
                path,
                revision=revision,
                config=config,
                dtype=torch.float32,
                attn_implementation=ATTENTION,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except OSError as error:
        pickled = [file.name for file in sorted(Path(path).glob("*.bin"))]
        what = f"only {', '.join(pickled)}" if pickled else first_line(error)
        raise PatterningError(
            f"{path}: no weights in safetensors ({what}); other formats are not read, since they are unpickled: "
            "load the model where you trust it and write it with save_pretrained"
        ) from None
    except SafetensorError as error:
        raise PatterningError(f"{path}: the weights cannot be read ({error}); copy them again") from None
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise PatterningError(
            f"{path}: the weights have other shapes than config.json says; copy the folder again, or mend config.json"
        ) from None
    model, found = loaded
    if found["missing_keys"]:
        raise PatterningError(
            f"{path}: the weights lack {_some(found['missing_keys'])}: the model was not saved as a {_KINDS[head]}; "
            f"save the {type(model).__name__} it belongs to"
        )
    if found["unexpected_keys"]:
        warnings.warn(
            f"{path}: weights that a {type(model).__name__} has no place for are left out: "
            f"{_some(found['unexpected_keys'])}",
            stacklevel=2,
        )
    model = model.to(device).eval()
    logits_in_float32(model)
    if head == "tokens" and not partitioned():
        check_causal(model, path)
    return model


def partitioned() -> bool:
    """Whether models that are made now come in pieces, under DeepSpeed's ZeRO stage 3."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


def auto_model(head: Head) -> Any:
    """The class of ``transformers`` that makes models with this head."""
    import transformers

    return getattr(transformers, _CLASSES[head][0])


def from_config(config: PretrainedConfig, head: Head) -> PreTrainedModel:
    """The modules of such a model, with weights in float32 as the surroundings make them."""
    return auto_model(head).from_config(
        config, dtype=torch.float32, attn_implementation=ATTENTION, trust_remote_code=False
    )


def saved_head(config: PretrainedConfig) -> Head:
    """What a model was saved as, where config.json says so."""
    classes = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    return "classes" if classes else "tokens"


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
    """The modules of a language model on the ``meta`` device: names and shapes, no weights are read.

    Args:
        path, revision: see ``load_language_model``.
        head: what it predicts; None: as it was saved.

    Raises:
        PatterningError: see ``load_language_model``.
    """
    config = read_config(path, revision, head)
    with quiet(), torch.device("meta"):
        return from_config(config, head or saved_head(config))


def model_config(architecture: dict[str, Any], head: Head = "tokens") -> PretrainedConfig:
    """The configuration of a model that does not exist yet, from the keys of a config.json.

    Raises:
        PatterningError: ``transformers`` does not know the architecture, or not with this head.
    """
    import transformers

    model_type = architecture.get("model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        raise PatterningError(
            f"model.architecture.model_type: {model_type!r} is not known to transformers {transformers.__version__}; "
            "expected one like gpt_neox or llama"
        )
    keys = {key: value for key, value in architecture.items() if key != "model_type"}
    try:
        # No token is special in fresh vocabularies unless the experiment says so.
        config = transformers.CONFIG_MAPPING[model_type](**({"bos_token_id": None, "eos_token_id": None} | keys))
    except (TypeError, ValueError) as error:
        raise PatterningError(f"model.architecture: {' '.join(str(error).split())}; correct it") from None
    if type(config) not in getattr(transformers, _CLASSES[head][1]):
        raise PatterningError(f"model.architecture.model_type: {model_type!r} is not a {_KINDS[head]}")
    return config


def fresh_language_model(config: PretrainedConfig, seed: int | None, head: Head = "tokens") -> PreTrainedModel:
    """A language model with fresh weights in float32, from a seed; None: whatever the generator gives.

    Modules draw nothing while they are made, as under ZeRO stage 3: the weights are the same there.
    """
    from transformers.initialization import no_init_weights

    in_pieces = partitioned()
    with quiet(), torch.random.fork_rng(devices=[]):
        if seed is not None:
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
        hook = head.register_forward_hook(lambda module, inputs, output: torch.full_like(output, _MARK))
        try:
            with torch.no_grad():
                found = logits(model, torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device))
        finally:
            hook.remove()
        head.is_last = bool((found == _MARK).all())
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


def read_config(path: str, revision: str | None, head: Head | None = "tokens") -> PretrainedConfig:
    """The configuration of a model with this head (None: as it was saved), checked before anything is built."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise PatterningError(f"{path}: no config.json in this folder; expected a model written by save_pretrained")
    try:
        with quiet():
            raw, _ = transformers.PretrainedConfig.get_config_dict(path, revision=revision)
    except (OSError, ValueError) as error:
        if Path(path).exists():
            raise PatterningError(f"{path}: not a model ({first_line(error)}); give its folder") from None
        at = f" at revision {revision}" if revision else ""
        raise PatterningError(
            f"{path}: no such folder, and no model of this name{at} in the local cache or on the hub, or the hub "
            "cannot be reached; give a folder with config.json, or a name like EleutherAI/pythia-70m"
        ) from None
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        if "auto_map" in raw:
            raise PatterningError(
                f"{path}: model type {model_type!r} brings its own code, which is not run; "
                "use a model that transformers knows"
            )
        raise PatterningError(
            f"{path}: model type {model_type!r} is not known to transformers {transformers.__version__}; "
            "correct config.json, or install a newer transformers"
        )
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise PatterningError(f"{path}: config.json is not valid ({reason}); correct it") from None
    head = head or saved_head(config)
    if type(config) not in getattr(transformers, _CLASSES[head][1]):
        remedy = "predicts tokens from those before" if head == "tokens" else "has a class or a score for a sequence"
        raise PatterningError(f"{path}: a model of type {model_type!r} is not a {_KINDS[head]}; give one that {remedy}")
    if head == "tokens" and saved_head(config) == "classes":
        raise PatterningError(
            f"{path}: a {config.architectures[0]}, which gives classes or scores and no tokens; give data.kind pairs "
            "or labelled"
        )
    return config


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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No log lines or bars of ``transformers``; what matters of them is raised. Bars of downloads stay."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _some(names: set[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
