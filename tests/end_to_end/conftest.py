"""Verbs typed in this process, and what they are typed at."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from jaxcrystal.cli import main
from jaxcrystal.config import ATTRIBUTES
from jaxcrystal.crystals.prototypes import embedded


@pytest.fixture
def typed(capsys) -> Callable[..., str]:
    """Types a command that must succeed; returns what it prints."""

    def type_in(*arguments: object) -> str:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return type_in


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """Types a command that must be refused, in one line; returns the line without `jaxcrystal VERB: `."""

    def type_in(*arguments: object) -> str:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert (code, out) == (1, "")
        prefix = f"jaxcrystal {arguments[0]}: "
        assert err.startswith(prefix) and "Traceback" not in err
        # What is listed, such as the tensors that a checkpoint lacks, is indented below the line.
        assert all(line.startswith("  ") for line in err.splitlines()[1:])
        return err.removeprefix(prefix)

    return type_in


@pytest.fixture
def cdvae_csv(tmp_path) -> Path:
    """Three dozen embedded crystals, as CDVAE publishes its data."""
    path = tmp_path / "crystals.csv"
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, ["material_id", "cif", *ATTRIBUTES])
        table.writeheader()
        for i, e in enumerate([e for e in embedded() if len(e.crystal) <= 5][::97][:36]):
            labels = (e.formula, str(sorted(set(e.crystal.symbols))), e.spacegroup, -0.05 * i, 0.1 * i, 0.01 * i)
            row = dict(zip(ATTRIBUTES, labels, strict=True))
            table.writerow({"material_id": f"mp-{i}", "cif": e.crystal.to_cif(), **row})
    return path


@pytest.fixture
def llama(tmp_path) -> tuple[transformers.LlamaForCausalLM, Path]:
    """A tiny LLaMA with random weights and LLaMA-2's vocabulary, and its directory; its tokenizer is still to come."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "hf", max_shard_size="3MB")
    return model, tmp_path / "hf"
