"""Tiny LLaMA checkpoints with random weights, written by transformers, the independent reference."""

import io
import resource
import string
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import transformers

SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
)


def torch_llama(seed: int = 0, std: float = 0.2, **changes: Any) -> transformers.LlamaForCausalLM:
    """Every weight is random, norms included: a model with norms of 1 could not tell whether they are applied."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | changes, attn_implementation="eager"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            torch.nn.init.normal_(weight, mean=1.0 if "norm" in name else 0.0, std=std)
    return model.eval()


@pytest.fixture(scope="session")
def pieces() -> bytes:
    """A SentencePiece model with as many pieces as the checkpoints have rows and, as LLaMA-2's, none for padding."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(string.printable[:91])] * 2),
        model_writer=model,
        model_type="char",
        vocab_size=96,
        user_defined_symbols=["\n"],
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture
def checkpoint(tmp_path: Path, pieces: bytes) -> Callable[..., tuple[transformers.LlamaForCausalLM, Path]]:
    """Makes a model and its Hugging Face directory, with a tokenizer."""

    def make(
        seed: int = 0, std: float = 0.2, shard: str = "50GB", **changes: Any
    ) -> tuple[transformers.LlamaForCausalLM, Path]:
        directory = tmp_path / f"hf{len(list(tmp_path.iterdir()))}"
        model = torch_llama(seed, std, **changes)
        model.save_pretrained(directory, max_shard_size=shard)
        (directory / "tokenizer.model").write_bytes(pieces)
        return model, directory

    return make


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """While it holds, no file may grow beyond so many bytes; root is refused too."""

    @contextmanager
    def full(limit: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return full
