"""log p of texts is what transformers has by teacher forcing, whatever they are read together with, and where."""

from dataclasses import replace
from pathlib import Path

import byte_pair_tokenizers
import jax
import numpy as np
import pytest
import torch
import transformers
from some_crystals import SALT
from tiny_llama import torch_llama

from jaxcrystal.config import MeshConfig, TextFormat
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import make_mesh
from jaxcrystal.scoring import likelihood
from jaxcrystal.scoring.likelihood import Likelihood, Text
from jaxcrystal.texts.forms import form_of
from jaxcrystal.texts.prompts import generation
from jaxcrystal.texts.tokenizer import load_tokenizer
from jaxcrystal.weights.checkpoint_map import load_hf
from jaxcrystal.weights.convert import convert
from jaxcrystal.weights.saved import SavedModel, load_model

VOCABULARY = 96
#: Kinds of LLaMA: grouped queries, tied heads, a vocabulary that 128 columns hold.
KINDS = [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4, "num_hidden_layers": 1}]


def texts_of(count: int = 40, longest: int = 120) -> list[Text]:
    """Random tokens, of which as many as chance has it count; one whole text, one token alone."""
    random = np.random.default_rng(0)
    lengths = random.integers(2, longest, count)
    texts = [Text(random.integers(0, VOCABULARY, n).tolist(), int(random.integers(1, n))) for n in lengths]
    return [*texts, Text([5, 7], 1), Text([*range(VOCABULARY)] + [1] * (longest - VOCABULARY), longest - 1)]


def expected(theirs, texts: list[Text]) -> np.ndarray:
    """Text by text, in float64 from torch's logits on."""
    found = []
    for text in texts:
        tokens = torch.tensor([text.tokens])
        with torch.no_grad():
            logs = torch.log_softmax(theirs(tokens[:, :-1]).logits.double(), -1)
        found.append(float(logs.gather(-1, tokens[:, 1:, None])[0, -text.answer :, 0].sum()))
    return np.array(found)


@pytest.fixture(scope="module", params=KINDS, ids=str)
def pair(request, tmp_path_factory, pieces) -> tuple[transformers.LlamaForCausalLM, SavedModel]:
    directory: Path = tmp_path_factory.mktemp("model")
    (directory / "tokenizer.model").write_bytes(pieces)
    theirs = torch_llama(**request.param)
    theirs.save_pretrained(directory)
    config, params = load_hf(directory, make_mesh(MeshConfig(1, 1, 1)))
    return theirs, SavedModel(config, None, TextFormat(), params, None, load_tokenizer(directory), 0)


def on(model: SavedModel, axes: tuple[int, int, int], at_once: int) -> Likelihood:
    mesh = make_mesh(MeshConfig(*axes))
    placed = jax.device_put(model.params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    return Likelihood(SavedModel(model.config, None, model.text, placed, None, model.tokenizer, 0), mesh, at_once)


def log_p(reader: Likelihood, texts: list[Text]) -> np.ndarray:
    return np.array([float(found[0]) for _, found in reader.read((None, [text]) for text in texts)])


def test_it_is_what_transformers_has_by_teacher_forcing(pair):
    """Within 1e-5 nats a token, where tokens have 5 nats and more."""
    theirs, model = pair
    texts = texts_of()
    found, wanted = log_p(on(model, (1, 1, 1), 8), texts), expected(theirs, texts)
    per_token = np.array([text.answer for text in texts])
    assert np.abs((found - wanted) / per_token).max() < 1e-5
    assert (-wanted / per_token).mean() > 4


@pytest.mark.parametrize(("axes", "at_once"), [((1, 1, 1), 1), ((8, 1, 1), 1), ((2, 2, 2), 2), ((1, 1, 4), 3)])
@pytest.mark.parametrize("pair", KINDS[:1], indirect=True, ids=str)
def test_neither_devices_nor_neighbours_change_it(pair, axes, at_once, monkeypatch):
    """Within 1e-5 nats a token; rows of 256 tokens, so that there are several batches."""
    theirs, model = pair
    monkeypatch.setattr(likelihood, "ROW", 256)
    texts = texts_of()[::-1]
    found = log_p(on(model, axes, at_once), texts)
    assert np.abs((found - expected(theirs, texts)) / [text.answer for text in texts]).max() < 1e-5


@pytest.mark.parametrize("pair", KINDS[:1], indirect=True, ids=str)
def test_a_model_trained_by_what_is_not_here_is_read_all_the_same(pair):
    model = pair[1]
    elsewhere = replace(model, config=replace(model.config, attention="cudnn"))
    found, wanted = (log_p(on(each, (1, 1, 1), 8), texts_of()) for each in (elsewhere, model))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("pair", KINDS[:1], indirect=True, ids=str)
def test_texts_longer_than_a_row_have_a_longer_one(pair, monkeypatch):
    theirs, model = pair
    monkeypatch.setattr(likelihood, "ROW", 32)
    texts = sorted(texts_of(), key=lambda text: len(text.tokens))
    lengths = set()
    arrays = likelihood._Batch.arrays

    def seen(self, count):
        lengths.add(self.length)
        return arrays(self, count)

    monkeypatch.setattr(likelihood._Batch, "arrays", seen)
    found = log_p(on(model, (1, 1, 1), 2), texts)
    assert lengths == {32, 64, 128}
    assert np.abs((found - expected(theirs, texts)) / [text.answer for text in texts]).max() < 1e-5


@pytest.mark.parametrize("pair", KINDS[:1], indirect=True, ids=str)
def test_a_first_batch_that_a_long_text_cuts_short_makes_the_later_no_smaller(pair, monkeypatch):
    theirs, model = pair
    monkeypatch.setattr(likelihood, "ROW", 64)
    texts = sorted(texts_of(), key=lambda text: len(text.tokens))
    texts = [texts[0], texts[-1], *(text for text in texts if 32 < len(text.tokens) < 64)]
    found = log_p(on(model, (1, 1, 1), 4), texts)
    assert np.abs((found - expected(theirs, texts)) / [text.answer for text in texts]).max() < 1e-5


@pytest.mark.parametrize("pair", KINDS[:1], indirect=True, ids=str)
def test_texts_come_back_with_what_they_belong_to(pair, monkeypatch):
    """Groups of none, one and several texts, over the ends of batches."""
    theirs, model = pair
    monkeypatch.setattr(likelihood, "ROW", 128)
    texts = texts_of(10)
    wanted = dict(zip(map(id, texts), expected(theirs, texts), strict=True))
    groups = [("a", []), ("b", texts[:5]), ("c", []), ("d", texts[5:6]), ("e", texts[6:]), ("f", []), ("g", [])]
    found = list(on(model, (1, 1, 1), 1).read(groups))
    assert [item for item, _ in found] == list("abcdefg")
    for (_, values), (_, own) in zip(found, groups, strict=True):
        np.testing.assert_allclose(values, [wanted[id(text)] for text in own], atol=1e-3)
    assert list(on(model, (1, 1, 1), 1).read([])) == []


@pytest.mark.parametrize("pair", KINDS[:1], indirect=True, ids=str)
def test_a_damaged_model_says_so(pair):
    _, model = pair
    reader = on(model, (1, 1, 1), 1)
    reader.model.params["norm"]["scale"] = reader.model.params["norm"]["scale"] * np.nan
    with pytest.raises(UserError, match=r"the model's logits are not numbers \(nan\)"):
        log_p(reader, [Text([1, 2, 3], 2)])
    with pytest.raises(UserError, match="at_once is 0; it must be at least 1"):
        on(model, (1, 1, 1), 0)


@pytest.mark.slow
def test_smollm2s_own_weights(tmp_path):
    """A crystal behind its prompt, by transformers from the same file: within 1e-4 nats a token."""
    path = byte_pair_tokenizers.smollm2_file()
    convert("smollm2-135m", tmp_path / "smollm2")
    model = load_model(tmp_path / "smollm2")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    tokens = [*model.tokenizer.encode(generation(form_of(TextFormat()), SALT, {})), model.tokenizer.eos_id]
    texts = [Text(tokens, count) for count in (len(tokens) - 1, 40, 1)]
    found, wanted = log_p(Likelihood(model, make_mesh(MeshConfig(1, 1, 1))), texts), expected(theirs, texts)
    assert np.abs((found - wanted) / [text.answer for text in texts]).max() < 1e-4
