"""`gpu-gpt2 generate`: text from a trained model."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import typer

from gpu_gpt2.cli.common import Device, Dtype, model_on_device
from gpu_gpt2.generate import generate as generate_tokens
from gpu_gpt2.models.decoder import Decoder, Sampling
from gpu_gpt2.open_model import open_model, tokenizer_of
from gpu_gpt2.training.checkpoint import trained_seq_len


def generate(
    model: Annotated[
        str,
        typer.Argument(
            help="Model to generate with: a run, a checkpoint, a Hugging Face folder, a "
            ".safetensors file or a .bin file of llm.c."
        ),
    ],
    prompt: Annotated[str, typer.Option(help="Text for the model to continue.")] = "",
    max_tokens: Annotated[
        int, typer.Option(help="Most tokens to generate; <|endoftext|> ends the text earlier.")
    ] = 200,
    temperature: Annotated[
        float,
        typer.Option(
            help="Divisor of the logits before sampling: higher gives more varied text, 0 always "
            "takes the likeliest token."
        ),
    ] = 0.8,
    top_k: Annotated[
        int, typer.Option(help="Sample among this many of the likeliest tokens; 0 means among all.")
    ] = 40,
    seed: Annotated[
        int, typer.Option(help="Seed of the sampling; another seed gives another text.")
    ] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Generate text that continues a prompt."""
    source = open_model(model)
    tokenizer = tokenizer_of(source)
    tokens = tokenizer.encode(prompt)
    tokens = np.concatenate([np.array([tokenizer.eot], np.int32), tokens.astype(np.int32)])
    seq_len = trained_seq_len(source.folder, source.config)
    gpt2 = model_on_device(source, device, dtype, 1, seq_len)
    pieces = [tokenizer.decode_bytes(tokens[1:])]
    sampling = Sampling(temperature=temperature, top_k=top_k, seed=seed)
    decoder = Decoder(gpt2, batch=1, length=seq_len)
    for (token,) in generate_tokens(decoder, [tokens], max_tokens=max_tokens, sampling=sampling):
        assert token is not None
        if token == tokenizer.eot:
            break
        pieces.append(tokenizer.decode_bytes([token]))
    typer.echo(b"".join(pieces).decode(errors="replace"))
