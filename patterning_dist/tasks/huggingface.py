"""A model of ``transformers``, for tokens or for classes: one that exists, or a fresh one."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from patterning_dist.config import HuggingFaceConfig, TrainingConfig
from patterning_dist.models.adapter import freeze_base, initialise_adapter, read_adapter, write_adapter
from patterning_dist.models.anatomy import find_layers
from patterning_dist.models.around import AroundComponent
from patterning_dist.models.attention_heads import Heads
from patterning_dist.models.components import Component
from patterning_dist.models.cutting import cut_around
from patterning_dist.models.huggingface import (
    SavedModel,
    fresh_language_model,
    model_location,
    open_saved_model,
    skeleton_of,
)
from patterning_dist.models.passes import (
    check_packing,
    eager_attention,
    input_of,
    logits,
    next_token_losses,
    use_attention,
)
from patterning_dist.models.pretrained_config import Head, model_config
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.shard import is_sharded
from patterning_dist.sampling.shard_loading import load_sharded_language_model
from patterning_dist.tasks.optimizers import plain_optimizer
from patterning_dist.tasks.task import FileHash, TokenLosses

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PretrainedConfig, PreTrainedModel

_MODEL_FILES = ("*.safetensors", "*.json")


class HuggingFace:
    """See ``LanguageModel`` for what the methods are for.

    Args:
        config: of the model; with ``architecture``, vocabulary and positions are filled in from the data.
        vocabulary_size: of the data's tokenizer; None where the data does not know it.
        context_length: of a sample [tokens].
        device: torch device.
        compute_dtype: of forward passes under autocast; None: float32.
        num_labels: of a model for classes; None: it predicts tokens.
    """

    def __init__(
        self,
        config: HuggingFaceConfig,
        vocabulary_size: int | None,
        context_length: int,
        device: str,
        compute_dtype: torch.dtype | None,
        num_labels: int | None = None,
    ) -> None:
        self.config, self.device, self.compute_dtype = config, device, compute_dtype
        self.head: Head = "tokens" if num_labels is None else "classes"
        data = {"max_position_embeddings": context_length, "vocab_size": vocabulary_size, "num_labels": num_labels}
        self._data = {key: value for key, value in data.items() if value is not None}
        self._packing_checked = False

    @cached_property
    def saved(self) -> SavedModel:
        """The first checkpoint, unread."""
        return open_saved_model(*model_location(self.config, self.config.checkpoints[0]), self.head, fetch=False)

    @property
    def pretrained_config(self) -> PretrainedConfig:
        """Of the first checkpoint, or of the model that is trained here."""
        if self.config.architecture is not None:
            return model_config(self._data | self.config.architecture, self.head)
        return self.saved.config

    def build(self, seed: int) -> nn.Module:
        """Fresh weights from a seed, in the architecture of the model; of an adapter, the base and fresh ones on it."""
        if self.config.path is not None and self.saved.adapter is not None:
            model = self.load_given(self.config.checkpoints[0], Ranks())
            initialise_adapter(model, seed)
            return model
        fresh: nn.Module = fresh_language_model(self.pretrained_config, seed, self.head)
        use_attention(fresh.to(self.device), self.config.attention)
        return fresh

    def load(self, folder: Path, ranks: Ranks) -> nn.Module:
        """A model that a training of this run wrote."""
        return self._load(str(folder), None, ranks)

    def load_given(self, checkpoint: str, ranks: Ranks) -> nn.Module:
        """A checkpoint that was there before the run."""
        return self._load(*model_location(self.config, checkpoint), ranks)

    def _load(self, path: str, revision: str | None, ranks: Ranks) -> nn.Module:
        model = load_sharded_language_model(
            path, revision, ranks, self.device, compute_dtype=self.compute_dtype, head=self.head
        )
        use_attention(model, self.config.attention)
        return model

    def skeleton(self) -> nn.Module:
        """Names and shapes; no weights are read."""
        if self.config.architecture is not None:
            return skeleton_of(self.pretrained_config, self.head, "model.architecture")
        return self.saved.skeleton

    def token_losses(self, model: nn.Module, tokens: Tensor, **arguments: Tensor) -> Tensor:
        """[sample, position - 1], see ``next_token_losses``.

        Args:
            model: or the engine around it.
            tokens: [sample, position].
            arguments: position_ids of packed samples.

        Raises:
            PatterningError: sequences longer than the model has positions for; documents of packed samples that the
                architecture does not keep apart.
        """
        if "position_ids" in arguments and not self._packing_checked:
            check_packing(model)
            self._packing_checked = True
        return next_token_losses(model, tokens, **arguments)

    def embeddings(self, model: Any) -> Tensor:
        """Of tokens, as they go in [token, d_model]."""
        return model.get_input_embeddings().weight

    def states(self, model: Any, tokens: Tensor, **arguments: Tensor) -> Tensor:
        """What enters the head [sample, position - 1, d_model]."""
        head = model.get_output_embeddings()
        return input_of(head, lambda: logits(model, tokens[:, :-1], "tokens", **arguments))

    def pooled(self, model: Any, inputs: Tensor, mask: Tensor) -> Tensor:
        """What enters the head of classes at the last token that is no pad [sample, d_model]."""
        states = input_of(model.score, lambda: self.scores(model, inputs, mask))
        last = (mask.long() * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)
        return states[torch.arange(len(states)), last]

    def scores(self, model: nn.Module, inputs: Tensor, mask: Tensor) -> Tensor:
        """[sample, class] of token ids [sample, position], of which ``mask`` says what is no pad."""
        return logits(model, inputs, self.head, attention_mask=mask)

    def patterns(self, model: nn.Module, inputs: Tensor) -> list[Tensor]:
        """Attention probabilities of every layer, each [sample, head, query position, key position]."""
        with eager_attention(model):
            attentions = model(input_ids=inputs, use_cache=False, output_attentions=True).attentions
        return [pattern for pattern in attentions or () if pattern is not None]

    @cached_property
    def _head_outputs(self) -> list[tuple[str, int]]:
        """Projection after the heads and d_head, of every layer with attention; none where one's are not known.

        Read off the skeleton: in an engine the shapes of weights may be those of pieces.
        """
        skeleton: Any = self.skeleton()
        names = {id(module): name for name, module in skeleton.named_modules()}
        found = [layer.heads for layer in find_layers(skeleton) if layer.attention is not None]
        known = [(names[id(heads.output)], heads.d_head) for heads in found if isinstance(heads, Heads)]
        return known if len(known) == len(found) else []

    def without_head(self, layer: int, head: int) -> TokenLosses | None:
        """``token_losses`` where the output of a head is 0; None where heads are not known.

        Args:
            layer: number among those with attention, as in ``patterns``.
            head: number in the layer.
        """
        if layer >= len(self._head_outputs):
            return None
        name, d_head = self._head_outputs[layer]

        def silence(projection: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            heads = arguments[0].clone()
            heads[..., head * d_head : (head + 1) * d_head] = 0
            return (heads, *arguments[1:])

        def losses(model: nn.Module, tokens: Tensor) -> Tensor:
            module: Any = getattr(model, "module", model)  # an engine has it in it
            with module.get_submodule(name).register_forward_pre_hook(silence):
                return self.token_losses(model, tokens)

        return losses

    def layered(self, model: PreTrainedModel, component: Component) -> AroundComponent | None:
        """The model cut around a component; None of one in shards, under autocast, or for classes."""
        whole = not any(is_sharded(parameter) for parameter in model.parameters())
        if self.head != "tokens" or self.compute_dtype not in (None, torch.float32) or not whole:
            return None
        return cut_around(model, component)

    def optimizer(self, model: nn.Module, settings: TrainingConfig) -> Optimizer:
        """AdamW; of a model with an adapter, on that alone."""
        freeze_base(model)
        return plain_optimizer(model, settings)

    def describe(self, folder: Path) -> None:
        """config.json, so that the folder is one that ``from_pretrained`` reads; of an adapter what ``peft`` reads."""
        if self.config.path is not None and self.saved.adapter is not None:
            write_adapter(self.saved.adapter, folder)
        else:
            self.pretrained_config.save_pretrained(folder)

    def files_fingerprint(self, checkpoint: str, sha256: FileHash) -> Any:
        """Hashes of a given checkpoint's files; of one on the hub its name and revision."""
        path, revision = model_location(self.config, checkpoint)
        if not Path(path).is_dir():
            return [path, revision]
        adapter = read_adapter(path)
        folders = [Path(path), *([Path(adapter.base)] if adapter is not None else [])]
        files = [sorted(entry for pattern in _MODEL_FILES for entry in folder.glob(pattern)) for folder in folders]
        own, base = files[0], [file for found in files[1:] for file in found]
        return {file.name: sha256(file) for file in own} | {f"base/{file.name}": sha256(file) for file in base}
