"""`gpu-gpt2 evaluate`: the loss of a model on text, and its accuracy on HellaSwag."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from gpu_gpt2.cli.common import Device, Dtype, model_on_device, overflow_is_silent, progress, say
from gpu_gpt2.config import MAX_BATCH_TOKENS
from gpu_gpt2.data.corpus import BUILT_IN, text_file
from gpu_gpt2.data.dataset import matching_files, of_run
from gpu_gpt2.data.loader import sequential_batches
from gpu_gpt2.errors import CheckpointError, ConfigError, DataError
from gpu_gpt2.evaluate import check_examples, hellaswag_accuracy, mean_loss, row_length
from gpu_gpt2.formats.multiple_choice import Example, read_choices
from gpu_gpt2.formats.tokens import Tokens, check_tokens, is_token_file, read_tokens
from gpu_gpt2.models.batch import Batch
from gpu_gpt2.models.model import Model, check_seq_len
from gpu_gpt2.models.weights import WeightSource
from gpu_gpt2.open_model import open_model, tokenizer_of
from gpu_gpt2.settings import with_own_tokenizer
from gpu_gpt2.tokenizer import Tokenizer
from gpu_gpt2.training.checkpoint import saved_settings, trained_seq_len


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="Model to evaluate: a run, a checkpoint, a Hugging Face folder, a .safetensors "
            "file, or a .bin file of llm.c or llama2.c."
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="Text to compute the loss on: python-docs, a text file, a token file, or a "
            "pattern such as 'val_*.bin'; the text that the run held out, if not given."
        ),
    ] = None,
    hellaswag: Annotated[
        Path | None,
        typer.Option(help="Multiple-choice file to answer, such as hellaswag_val.bin."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: Annotated[int, typer.Option(help="Sequences in a batch.")] = 4,
    seq_len: Annotated[
        int | None,
        typer.Option(help="Tokens in a sequence; as many as in training, if not given."),
    ] = None,
) -> None:
    """Print the loss of a model on text, its accuracy on HellaSwag, or both."""
    source = open_model(model)
    config = source.config
    T = trained_seq_len(source.folder, config) if seq_len is None else seq_len
    check_seq_len(T, config)
    if min(batch_size, T) < 1 or batch_size * T > MAX_BATCH_TOKENS:
        raise ConfigError(
            f"batches of {batch_size} x {T} tokens cannot be; use a --batch-size and a --seq-len "
            f"of at least 1 that make at most {MAX_BATCH_TOKENS:,}"
        )
    examples: list[Example] = []
    if hellaswag is not None:
        examples = read_choices(hellaswag)
        check_examples(examples, config.vocab_size, batch_size, T, str(hellaswag))
    texts: Sequence[Tokens] = ()
    tokenizer: Tokenizer | None = None
    if data is not None or not examples:
        tokenizer, texts = _run_data(model, source) if data is None else _given_data(data, source)
    longest = T if texts else max(map(row_length, examples))
    gpt2 = model_on_device(source, device, dtype, batch_size, longest)
    with overflow_is_silent():
        if texts:
            _print_loss(gpt2, texts, tokenizer, batch_size, T)
        if examples:
            _print_score(gpt2, examples)


def _run_data(name: str, source: WeightSource) -> tuple[Tokenizer, Sequence[Tokens]]:
    """The run's tokenizer, and the part of its held-out text that training evaluates; UserError."""
    config = saved_settings(source.folder)
    if config is None:
        raise ConfigError(
            f"{name} is no run of gpu-gpt2, so it has no text of its own; name one with --data, "
            f"or a multiple-choice file with --hellaswag"
        )
    assert source.folder is not None  # it holds the settings
    dataset = of_run(with_own_tokenizer(config, source.folder))
    if dataset.tokenizer.tokens() != tokenizer_of(source).tokens():
        raise DataError(
            f"{config.data} gives another vocabulary than the run has: it was changed since; name "
            f"the text with --data"
        )
    say(f"{dataset.name}, held out")
    return dataset.tokenizer, [dataset.val]


def _given_data(data: str, source: WeightSource) -> tuple[Tokenizer | None, Sequence[Tokens]]:
    """The tokenizer, if it is known, and all tokens of token files or text files; UserError.

    Of a built-in corpus, only the held-out text. <|endoftext|> is in front of every document.
    """
    paths = matching_files(data)
    if data in BUILT_IN or not is_token_file(paths[0]):
        tokenizer = tokenizer_of(source)
        if data in BUILT_IN:
            documents = list(BUILT_IN[data]().val)
        else:
            files = [text_file(path) for path in paths]
            documents = ["".join((*file.train, *file.val)) for file in files]
        ids = [np.r_[tokenizer.eot, tokenizer.encode(text)] for text in documents]
        return tokenizer, [np.concatenate(ids).astype(np.int32)]
    texts = []
    for path in paths:
        texts.append(read_tokens(path))
        check_tokens(texts[-1], source.config.vocab_size, str(path))
    try:
        return tokenizer_of(source), texts
    except DataError as error:
        say(f"no bits per byte: {error}")
        return None, texts


def _print_loss(
    gpt2: Model, texts: Sequence[Tokens], tokenizer: Tokenizer | None, B: int, T: int
) -> None:
    count = sum(len(tokens) - 1 for tokens in texts)
    lengths = None if tokenizer is None else tokenizer.token_bytes()
    text_bytes = 0

    with progress() as bar:
        task = bar.add_task("tokens", total=count)

        def batches() -> Iterator[Batch]:
            nonlocal text_bytes
            for tokens in texts:
                for batch in sequential_batches(tokens, B, T):
                    if lengths is not None:
                        text_bytes += int(lengths[batch.targets].sum())
                    yield batch

        loss = mean_loss(gpt2, batches(), advance=lambda done: bar.update(task, completed=done))
    assert loss is not None  # it is None only if `stop` was given
    if not math.isfinite(loss):
        raise CheckpointError(f"the loss is {loss}: the model's weights are damaged")
    perplexity = math.exp(min(loss, 700.0))  # exp(710) is too large for a float
    per_byte = (
        f"  {loss / math.log(2) * count / text_bytes:.3f} bits per byte" if text_bytes else ""
    )
    say(f"loss {loss:.4f}  perplexity {perplexity:.2f}{per_byte}  over {count:,} tokens")


def _print_score(gpt2: Model, examples: Sequence[Example]) -> None:
    with progress() as bar:
        task = bar.add_task("examples", total=len(examples))
        score = hellaswag_accuracy(
            gpt2, examples, advance=lambda done: bar.update(task, completed=done)
        )
    assert score is not None  # it is None only if `stop` was given
    correct, count = score
    say(f"HellaSwag {correct}/{count} = {correct / count:.4f} (acc_norm)")
