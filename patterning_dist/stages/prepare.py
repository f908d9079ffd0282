"""Stage ``prepare``: text -> data/{tokenizer.json, train.parquet, validation.parquet, sources.parquet, corpus.json}."""

from __future__ import annotations

from pathlib import Path

from patterning_dist.config import Config, TextConfig
from patterning_dist.data.corpus import Source, read_documents
from patterning_dist.data.prepare import prepare_tokens
from patterning_dist.progress import Progress
from patterning_dist.storage.files import file_sha256
from patterning_dist.storage.run import RunDirectory

_FILES = ("tokenizer.json", "train.parquet", "validation.parquet", "sources.parquet", "corpus.json")


def prepare(config: Config, run: RunDirectory, progress: Progress) -> list[Path]:
    """Read the corpus, train the tokenizer and write the token tables; returns the files written.

    Raises:
        PatterningError: a source is missing, empty or unreadable, or there is too little text.
    """
    data = config.data
    assert isinstance(data, TextConfig)  # others have no such stage
    progress.start("tokenizing the corpus", None)
    sources = [Source(s.path, s.domain, s.text_column) for s in data.sources]
    corpus = prepare_tokens(
        read_documents(sources, max_characters_per_domain=data.max_characters_per_domain),
        run.path / "data",
        context_length=data.context_length,
        vocabulary_size=data.vocabulary_size,
        validation_fraction=data.validation_fraction,
        seed=config.seed,
        max_train_sequences=data.max_train_sequences,
        tokenizer_path=data.tokenizer,
    )
    dropped = [corpus[split]["num_tokens_dropped"] for split in ("train", "validation")]
    progress.say(f"prepare: {sum(dropped)} tokens behind the last whole sequence of a domain are left out")
    if long := corpus["num_long_words"]:
        progress.say(
            f"prepare: {long} words of more than 256 characters are counted in parts by the tokenizer's training"
        )
    outputs = [run.path / "data" / name for name in _FILES]
    run.update_manifest(data={file.name: file_sha256(file) for file in outputs})
    return outputs
