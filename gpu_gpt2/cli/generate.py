"""`gpu-gpt2 generate`: text from a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from gpu_gpt2 import checkpoint, layout
from gpu_gpt2.cli.common import Device, Dtype
from gpu_gpt2.device.select import choose_dtype, open_device
from gpu_gpt2.errors import CheckpointError
from gpu_gpt2.formats.hf import load_model
from gpu_gpt2.generate import generate as generate_tokens
from gpu_gpt2.model import GPT2
from gpu_gpt2.ops.select import ops_for
from gpu_gpt2.tokenizer import Tokenizer


def generate(
    run: Annotated[Path, typer.Argument(help="A run, a checkpoint or a Hugging Face folder.")],
    prompt: Annotated[str, typer.Option(help="How the text begins.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Length of what follows.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 = always the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest; 0 = all.")] = 40,
    seed: Annotated[int, typer.Option(help="Another seed, another text.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Continue a prompt with a trained model."""
    folder = checkpoint.latest(run)
    config, weights = load_model(folder)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{folder}: tokenizer.json has {tokenizer.vocab_size} tokens, config.json "
            f"{config.vocab_size}; they belong to different models"
        )
    tokens = tokenizer.encode(prompt)
    tokens = np.concatenate([np.array([tokenizer.eot], np.int32), tokens.astype(np.int32)])
    place = open_device(device)
    dtype = choose_dtype(dtype, place)
    model = GPT2(
        config,
        ops_for(place, dtype, layout.widest(config)),
        dtype=dtype,
        max_batch=1,
        max_seq_len=checkpoint.trained_seq_len(folder, config),
        training=False,
    )
    model.load(weights)
    pieces = [tokenizer.decode_bytes(tokens[1:])]
    for token in generate_tokens(
        model, tokens, max_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=seed
    ):
        if token == tokenizer.eot:
            break
        pieces.append(tokenizer.decode_bytes([token]))
    typer.echo(b"".join(pieces).decode(errors="replace"))
