"""`gpu-gpt2 convert`: a model from one kind of file into another."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from gpu_gpt2.cli.common import bytes_progress, say
from gpu_gpt2.config import GPT2_VOCAB_SIZE
from gpu_gpt2.convert import TARGETS, bytes_of, tokenizer_with
from gpu_gpt2.convert import convert as convert_model
from gpu_gpt2.open_model import open_model


def convert(
    src: Annotated[
        str,
        typer.Argument(
            help="Model to convert: a run, a checkpoint, a Hugging Face folder, a .safetensors "
            "file, a .bin file of llm.c or llama2.c, or a name such as d12 for a model with "
            "initial weights."
        ),
    ],
    dst: Annotated[
        Path,
        typer.Argument(help="New folder (for --to hf) or new file (for all others) to write."),
    ],
    to: Annotated[
        str,
        typer.Option(
            help=f"Kind of model to write: {' | '.join(TARGETS)}. hf is a Hugging Face folder with "
            f"the weights in the dtype of SRC; llmc-... are files of llm.c in that dtype; "
            f"llama2c-... are files of llama2.c: v0 for its program run, v2 (int8) for runq."
        ),
    ],
) -> None:
    """Write a model as another kind of file."""
    source = open_model(src)
    c = source.config
    with bytes_progress() as progress:
        task = progress.add_task("", total=bytes_of(source))
        convert_model(source, dst, to, lambda count: progress.advance(task, count))
    say(
        f"wrote {dst}: a {c.title} of {c.n_layer} layers of {c.n_embd}, vocabulary "
        f"{c.vocab_size}, context {c.n_positions}, from {source.dtype} to {to}"
    )
    program = to.replace("llama2c", "llama2.c").replace("llmc", "llm.c").partition("-")[0]
    tokenizer = tokenizer_with(dst, to, c.vocab_size)
    if tokenizer is not None and to != "hf":
        say(f"its tokenizer for {program}'s programs: {tokenizer}")
    elif tokenizer is None and program == "llama2.c":
        say("no tokenizer.bin: the source has no tokenizer that this file of llama2.c can hold")
    if c.vocab_size == GPT2_VOCAB_SIZE or tokenizer is not None:
        say(f'try it: gpu-gpt2 generate {shlex.quote(str(dst))} --prompt "Once upon a time"')
    elif to == "hf":
        say("it has no tokenizer: the source has none, and its vocabulary is not GPT-2's")
