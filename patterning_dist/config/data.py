"""The section on the data: text to tokenise, tables of tokens, pairs or labels, or samples of the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from patterning_dist.config.model import FunctionPath
from patterning_dist.config.section import Section

_TABLE = (
    "Parquet, Arrow, JSON lines (.jsonl, .json), .npy, .bin (16-bit tokens end to end), a folder of one of these, or a "
    "dataset of datasets"
)
_TOKENIZER = "folder, or name on the hub, of the tokenizer of text; default: the model's own"


class SourceConfig(Section):
    path: Path = Field(description="text file, folder of text files, JSON lines or Parquet file")
    domain: str | None = Field(
        None, min_length=1, description="what the text is, for domain splits; default: from the path"
    )
    text_column: str = Field("text", description="column of a Parquet file that holds the text")


class TextConfig(Section):
    kind: Literal["text"] = Field("text", description="text, which stage prepare tokenises and cuts into sequences")
    sources: list[SourceConfig] = Field(min_length=1, description="where the text comes from")
    tokenizer: str | None = Field(
        None,
        min_length=1,
        description="folder, or name on the hub, of a tokenizer; default: that of model.path, else byte-level BPE is "
        "trained",
    )
    # Byte-level BPE starts from the 256 bytes.
    vocabulary_size: int = Field(
        1024, ge=257, le=65536, description="size of the BPE vocabulary that is trained without a tokenizer [tokens]"
    )
    context_length: int = Field(128, ge=8, description="length of one sequence [tokens]")
    validation_fraction: float = Field(0.05, gt=0, lt=1, description="share of the documents held out [1]")
    max_characters_per_domain: int | None = Field(None, ge=1, description="cap on one domain [characters]")
    max_train_sequences: int | None = Field(None, ge=1, description="cap on the training set [sequences]")


class TokensConfig(Section):
    kind: Literal["tokens"] = Field(description="tables of token ids, text or messages, cut into blocks")
    train: str = Field(min_length=1, description=f"the training data: {_TABLE}")
    held_out: dict[str, str] = Field({}, description="domain -> such a table, for split losses [path]")
    column: str | None = Field(
        None,
        min_length=1,
        description="column of token ids, text or messages; default: input_ids, messages, conversations, completion "
        "after prompt, or text, the first that is there",
    )
    prompt: str | None = Field(
        None, min_length=1, description="column of what stands before, as context without a loss; default: none"
    )
    tokenizer: str | None = Field(None, min_length=1, description=_TOKENIZER)
    context_length: int = Field(ge=2, description="length of one block, a sample [tokens]")


class PairsConfig(Section):
    kind: Literal["pairs"] = Field(description="preference pairs of token ids, text or messages, for a reward model")
    train: str = Field(min_length=1, description=f"the training data: {_TABLE}")
    held_out: dict[str, str] = Field({}, description="domain -> such a table, for split losses [path]")
    chosen: str = Field("chosen", min_length=1, description="column of what is preferred")
    rejected: str = Field("rejected", min_length=1, description="column of the others")
    prompt: str | None = Field(
        None, min_length=1, description="column of what both follow; default: both have it within"
    )
    tokenizer: str | None = Field(None, min_length=1, description=_TOKENIZER)
    context_length: int = Field(
        ge=1,
        description="longest of both, with the prompt; shorter ones are padded, longer pairs left out [tokens]",
    )


class LabelledConfig(Section):
    kind: Literal["labelled"] = Field(description="token ids, text or messages with a class each, for a classifier")
    train: str = Field(min_length=1, description=f"the training data: {_TABLE}")
    held_out: dict[str, str] = Field({}, description="domain -> such a table, for split losses [path]")
    column: str = Field("input_ids", min_length=1, description="column of token ids, text or messages")
    tokenizer: str | None = Field(None, min_length=1, description=_TOKENIZER)
    label: str = Field("label", min_length=1, description="column that holds the class, a number from 0")
    context_length: int = Field(ge=1, description="longest sample; shorter ones are padded, others left out [tokens]")


class FunctionDataConfig(Section):
    kind: Literal["function"] = Field(description="samples of the user's own")
    load: FunctionPath = Field(
        description="package.module:function, () -> (training samples, {domain: held-out samples})"
    )


TableConfig = TokensConfig | PairsConfig | LabelledConfig
DataConfig = Annotated[TextConfig | TableConfig | FunctionDataConfig, Field(discriminator="kind")]


def held_out_domains(data: DataConfig | None) -> set[str] | None:
    """Domains of the held-out data; None where they are known only once files are read."""
    if isinstance(data, TextConfig):
        domains = {source.domain for source in data.sources}
        return None if None in domains else {domain for domain in domains if domain is not None}
    return None if data is None or isinstance(data, FunctionDataConfig) else set(data.held_out)
