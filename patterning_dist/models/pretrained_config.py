"""config.json of a model of ``transformers``, looked at before anything is built: what it is, whether it is read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from patterning_dist.errors import PatterningError, first_line
from patterning_dist.models.adapter import ADAPTER_CONFIG
from patterning_dist.models.checkpoint import read_json

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PretrainedConfig

Head = Literal["tokens", "classes"]  # a causal language model, or a classifier or reward model of whole sequences
KINDS = {"tokens": "causal language model", "classes": "sequence classifier"}
# Of ``transformers``: what makes such models, and configuration -> class of those that there are.
CLASSES = {
    "tokens": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING"),
    "classes": ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"),
}
# What comes of keys that cannot be, before and while a model is built.
INVALID = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
# Numbers that are counts, by the names that the architectures have for them.
_COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


def read_config(path: str, revision: str | None, head: Head | None = "tokens") -> PretrainedConfig:
    """The configuration of a model with this head (None: as it was saved), checked before anything is built.

    Raises:
        PatterningError: no model there, one that ``transformers`` does not know or that has no such head, a quantised
            or multimodal one, or keys that cannot be.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    raw = _raw(path, revision)
    where = f"{path}/config.json" if Path(path).is_dir() else path
    _check_known(path, raw)
    _check_counts(raw, transformers.CONFIG_MAPPING[raw["model_type"]], where)
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (*INVALID, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise PatterningError(f"{path}: config.json is not valid ({reason}); correct it") from None
    if config.get_text_config() is not config:
        raise PatterningError(
            f"{path}: a multimodal or composite model ({', '.join(sorted(config.sub_configs))}), of which only the "
            "text model can be studied; save that by itself, as a causal language model with a config.json of its own "
            f"(model type {config.get_text_config().model_type!r})"
        )
    head = head or saved_head(config)
    if type(config) not in getattr(transformers, CLASSES[head][1]):
        remedy = "predicts tokens from those before" if head == "tokens" else "has a class or a score for a sequence"
        model_type = raw["model_type"]
        raise PatterningError(f"{path}: a model of type {model_type!r} is not a {KINDS[head]}; give one that {remedy}")
    if head == "tokens" and saved_head(config) == "classes":
        assert config.architectures is not None
        raise PatterningError(
            f"{path}: a {config.architectures[0]}, which gives classes or scores and no tokens; give data.kind pairs "
            "or labelled"
        )
    return config


def model_config(architecture: dict[str, Any], head: Head = "tokens") -> PretrainedConfig:
    """The configuration of a model that does not exist yet, from the keys of a config.json.

    Raises:
        PatterningError: ``transformers`` does not know the architecture, or not with this head.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    model_type = architecture.get("model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        raise PatterningError(
            f"model.architecture.model_type: {model_type!r} is not known to transformers {transformers.__version__}; "
            "expected one like gpt_neox or llama"
        )
    keys = {key: value for key, value in architecture.items() if key != "model_type"}
    _check_counts(keys, transformers.CONFIG_MAPPING[model_type], "model.architecture")
    try:
        # No token is special in fresh vocabularies unless the experiment says so.
        config = transformers.CONFIG_MAPPING[model_type](**({"bos_token_id": None, "eos_token_id": None} | keys))
    except (*INVALID, StrictDataclassError) as error:
        raise PatterningError(f"model.architecture: {' '.join(str(error).split())}; correct it") from None
    if type(config) not in getattr(transformers, CLASSES[head][1]):
        raise PatterningError(f"model.architecture.model_type: {model_type!r} is not a {KINDS[head]}")
    return config


def saved_head(config: PretrainedConfig) -> Head:
    """What a model was saved as, where config.json says so."""
    names = config.architectures if isinstance(config.architectures, list) else []
    classes = any(str(name).endswith("ForSequenceClassification") for name in names)
    return "classes" if classes else "tokens"


def _check_counts(keys: dict[str, Any], kind: type[PretrainedConfig], where: str) -> None:
    """Numbers of layers, heads and tokens, by the names that this architecture has for them, are 1 or more."""
    for name in _COUNTS:
        key = kind.attribute_map.get(name, name)
        count = keys.get(key)
        if isinstance(count, int) and count < 1:
            raise PatterningError(f"{where}: {key} is {count}; expected 1 or more")


def _raw(path: str, revision: str | None) -> dict[str, Any]:
    import transformers

    folder = Path(path)
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return read_json(folder / "config.json")
        raise PatterningError(
            f"{path}: no config.json in this folder; expected a model written by save_pretrained, or an adapter "
            f"with its {ADAPTER_CONFIG}"
        )
    if folder.exists():
        raise PatterningError(f"{path}: not a model but a file; give its folder")
    try:
        with quiet():
            return transformers.PretrainedConfig.get_config_dict(path, revision=revision)[0]
    except (OSError, ValueError) as error:
        at = f" at revision {revision}" if revision else ""
        raise PatterningError(
            f"{path}: no such folder, and no model of this name{at} in the local cache or on the hub, or the hub "
            f"cannot be reached ({first_line(error)}); give a folder with config.json, or a name like "
            "EleutherAI/pythia-70m"
        ) from None


def _check_known(path: str, raw: dict[str, Any]) -> None:
    import transformers

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
    quantised = raw.get("quantization_config") or raw.get("compression_config")
    if quantised:
        method = quantised.get("quant_method", "quantised") if isinstance(quantised, dict) else "quantised"
        raise PatterningError(
            f"{path}: a quantised model ({method}), whose weights are codes that cannot be moved; give the one it was "
            "made of, or load it with transformers, call dequantize() and save_pretrained, and remove "
            "quantization_config from config.json"
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
