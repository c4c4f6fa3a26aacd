"""Tokenizers: GPT-2's kind, llama2.c's, and those of Hugging Face folders; and how to name them."""

from gpu_gpt2.tokenizer.base import Tokenizer
from gpu_gpt2.tokenizer.gpt2 import GPT2Tokenizer
from gpu_gpt2.tokenizer.hf import HFTokenizer
from gpu_gpt2.tokenizer.llama2c import Llama2cTokenizer
from gpu_gpt2.tokenizer.spec import (
    cache_key,
    is_path,
    make_tokenizer,
    open_tokenizer,
    vocab_size_of,
)

__all__ = [
    "GPT2Tokenizer",
    "HFTokenizer",
    "Llama2cTokenizer",
    "Tokenizer",
    "cache_key",
    "is_path",
    "make_tokenizer",
    "open_tokenizer",
    "vocab_size_of",
]
