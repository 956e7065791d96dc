"""Probabilities of elements: those of transformers and of counted draws, however prompts are put together."""

from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import torch_llama

from jaxcrystal.config import MeshConfig, TextFormat
from jaxcrystal.crystals.crystal import ELEMENTS
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import make_mesh
from jaxcrystal.sampling import infilling
from jaxcrystal.sampling.infilling import Infiller, Trie
from jaxcrystal.texts.forms import form_of
from jaxcrystal.texts.sentence_pieces import COMPACT, COMPACT_SYMMETRY
from jaxcrystal.texts.tokenizer import Tokenizer, load_tokenizer
from jaxcrystal.weights.checkpoint_map import load_hf
from jaxcrystal.weights.saved import SavedModel

SYMBOLS = ELEMENTS[1:]
#: Tokenizers: a token a symbol, a token a letter.
TOKENIZERS = ["compact", "letters"]


def tokenizer_of(name: str, directory: Path, pieces: bytes) -> Tokenizer:
    directory.mkdir(exist_ok=True)
    files = {"compact": COMPACT.read_bytes(), "symmetry": COMPACT_SYMMETRY.read_bytes(), "letters": pieces}
    (directory / "tokenizer.model").write_bytes(files[name])
    return load_tokenizer(directory)


def ours(theirs, tokenizer: Tokenizer, directory: Path) -> SavedModel:
    """The same model."""
    theirs.save_pretrained(directory)
    config, params = load_hf(directory, make_mesh(MeshConfig(1, 1, 1)))
    return SavedModel(config, None, TextFormat(), params, None, tokenizer, 0)


LENGTHS = (20, 1, 63, 64, 65, 130, 5, 128, 40, 200)


def prompts_of(tokenizer: Tokenizer, count: int = len(LENGTHS)) -> list[list[int]]:
    """Random tokens; behind the first, elements are likely."""
    random = np.random.default_rng(0)
    return [random.integers(4, tokenizer.vocab_size, length).tolist() for length in LENGTHS[:count]]


def spelled(tokenizer: Tokenizer) -> list[list[int]]:
    """The tokens of each element behind a line feed and the end, as the tokenizer has them by itself."""
    front = len(tokenizer.encode("\n"))
    return [[*tokenizer.encode(f"\n{symbol}")[front:], tokenizer.eos_id] for symbol in SYMBOLS]


def shown_elements(theirs, prompt: list[int], texts: list[list[int]]) -> None:
    """Some steps of training, in place: behind the prompt elements are likely, each as much as chance has it."""
    width = max(map(len, texts))
    rows = torch.tensor([[*prompt, *text, *[0] * (width - len(text))] for text in texts])
    shares = torch.tensor(np.random.default_rng(2).dirichlet(np.ones(len(texts))))
    optimizer = torch.optim.Adam(theirs.parameters(), 0.01)
    for _ in range(60):
        logs = torch.log_softmax(theirs(rows[:, :-1]).logits[:, len(prompt) - 1 :], -1)
        each = logs.gather(-1, rows[:, len(prompt) :, None])[..., 0] * (rows[:, len(prompt) :] > 0)
        optimizer.zero_grad()
        (-(each.sum(1) * shares).sum()).backward()
        optimizer.step()


@pytest.fixture(scope="module", params=TOKENIZERS)
def pair(request, tmp_path_factory, pieces):
    """A LLaMA of torch's with wide random weights, some steps on, and ours that reads the same."""
    directory = tmp_path_factory.mktemp(request.param)
    tokenizer = tokenizer_of(request.param, directory, pieces)
    theirs = torch_llama(vocab_size=tokenizer.vocab_size, max_position_embeddings=512)
    shown_elements(theirs, prompts_of(tokenizer, 1)[0], spelled(tokenizer))
    return theirs, ours(theirs, tokenizer, directory)


def infiller_of(model: SavedModel, axes: tuple[int, int, int] = (1, 1, 1)) -> Infiller:
    mesh = make_mesh(MeshConfig(*axes))
    placed = jax.device_put(model.params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    model = SavedModel(model.config, None, model.text, placed, None, model.tokenizer, 0)
    return Infiller(model, form_of(model.text).tables(model.tokenizer), mesh)


def torch_logs(theirs, prompt: list[int], texts: list[list[int]]) -> list[float]:
    """log P of each text behind the prompt, by plain forward passes."""
    width = max(map(len, texts))
    rows = torch.tensor([[*prompt, *text, *[0] * (width - len(text))] for text in texts])
    with torch.no_grad():
        logs = torch.log_softmax(theirs(rows).logits[:, len(prompt) - 1 :].double(), -1)
    return [sum(float(logs[row, i, token]) for i, token in enumerate(text)) for row, text in enumerate(texts)]


def test_every_element_has_the_probability_that_transformers_gives_its_text(pair):
    """Within 1e-4 nats, where some elements are 20 nats apart."""
    theirs, model = pair
    prompts = prompts_of(model.tokenizer)
    for prompt, answer in zip(prompts, infiller_of(model).answers(prompts), strict=True):
        expected = torch_logs(theirs, prompt, spelled(model.tokenizer))
        np.testing.assert_allclose(answer.log_probabilities, expected, atol=1e-4)
        assert np.ptp(expected) > 5  # or the comparison would say little


def test_with_what_is_outside_probabilities_sum_to_one(pair):
    """What is outside is summed over all other tokens of every node, and not taken as what is left."""
    _, model = pair
    answers = list(infiller_of(model).answers(prompts_of(model.tokenizer)))
    for answer in answers:
        assert np.exp(answer.log_probabilities).sum() + answer.outside == pytest.approx(1, abs=1e-5)
    outside = [answer.outside for answer in answers]
    assert all(0 < x < 1 for x in outside) and min(outside) < 0.8


def test_draws_token_by_token_are_each_element_as_often_as_said(pair):
    """100,000 texts from torch's logits by numpy, which knows of no trie; by chi-square over elements and the rest."""
    theirs, model = pair
    (prompt,) = prompts_of(model.tokenizer, 1)
    (answer,) = infiller_of(model).answers([prompt])
    end, random = model.tokenizer.eos_id, np.random.default_rng(0)

    def following(prefix: tuple[int, ...]) -> np.ndarray:
        with torch.no_grad():
            logits = theirs(torch.tensor([[*prompt, *prefix]])).logits[0, -1].double()
        return torch.softmax(logits, -1).numpy()

    begun, ended = {(): 100_000}, {}
    for _ in range(3):  # no element has more tokens, the end included
        further: dict[tuple[int, ...], int] = {}
        for prefix, count in begun.items():
            for token, times in enumerate(random.multinomial(count, following(prefix))):
                if times:
                    (ended if token == end else further)[(*prefix, token)] = int(times)
        begun = further
    counts = np.array([ended.get(tuple(tokens), 0) for tokens in spelled(model.tokenizer)])
    observed = np.array([*counts, 100_000 - counts.sum()])
    expected = 100_000 * np.array([*np.exp(answer.log_probabilities), answer.outside])
    often = expected > 5
    pooled = np.array([[*x[often], x[~often].sum()] for x in (observed, expected)])
    statistic = ((pooled[0] - pooled[1]) ** 2 / pooled[1]).sum()
    assert often.sum() > 60 and counts.sum() > 30_000
    assert (statistic - often.sum()) / np.sqrt(2 * often.sum()) < 4


@pytest.mark.parametrize("pair", ["letters"], indirect=True)
def test_answers_do_not_depend_on_what_is_asked_together(pair, monkeypatch):
    """But for the last bits of a sum, which a matrix product may take in another order."""
    _, model = pair
    prompts = prompts_of(model.tokenizer, 5)
    together = list(infiller_of(model).answers(prompts))
    for at_once in (1, 2):
        monkeypatch.setattr(infilling, "AT_ONCE", at_once)
        infiller = infiller_of(model)
        assert infiller.at_once == at_once
        for answer, other in zip(together[::-1], infiller.answers(prompts[::-1]), strict=True):
            np.testing.assert_allclose(answer.log_probabilities, other.log_probabilities, atol=1e-4)
            assert answer.outside == pytest.approx(other.outside, abs=1e-5)


@pytest.mark.parametrize("axes", [(8, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("pair", ["letters"], indirect=True)
def test_answers_do_not_depend_on_devices(pair, axes):
    _, model = pair
    prompts = prompts_of(model.tokenizer, 3)
    for answer, other in zip(
        infiller_of(model).answers(prompts), infiller_of(model, axes).answers(prompts), strict=True
    ):
        np.testing.assert_allclose(answer.log_probabilities, other.log_probabilities, atol=1e-4)


@pytest.mark.parametrize("pair", ["letters"], indirect=True)
def test_a_large_vocabulary_is_asked_of_fewer_at_once(pair, monkeypatch):
    _, model = pair
    nodes = len(infiller_of(model).trie.prefixes)
    monkeypatch.setattr(infilling, "LOGITS", 2 * nodes * model.config.padded_vocab_size)
    assert infiller_of(model).at_once == 2
    monkeypatch.setattr(infilling, "LOGITS", 1)
    assert infiller_of(model, (8, 1, 1)).at_once == 8


@pytest.mark.parametrize("pair", ["letters"], indirect=True)
def test_what_is_no_number_is_refused(pair):
    _, model = pair
    infiller = infiller_of(model)
    infiller.model.params["norm"]["scale"] = infiller.model.params["norm"]["scale"] * np.nan
    with pytest.raises(UserError, match=r"the model's logits are not numbers \(nan\)"):
        list(infiller.answers([[1, 2]]))


@pytest.mark.parametrize("pair", ["letters"], indirect=True)
def test_a_prompt_and_an_element_must_fit_the_context(pair):
    """Of a token a letter, with the one in front, and two of an element."""
    _, model = pair
    infiller = infiller_of(model)
    assert len(infiller.tokens("a", "H" * 508)) in (509, 510)  # SentencePiece may put a space before
    with pytest.raises(UserError, match=r"a \(NaCl\) has a prompt of 51\d tokens and .* up to 2, .* holds 512"):
        infiller.tokens("a (NaCl)", "H" * 510)


symbols = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple), min_size=1, max_size=12, unique=True)


@given(symbols, st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_a_trie_sums_up_what_a_model_says(spellings, seed):
    """Of any symbols, prefixes of each other or not, against a table of what follows every prefix."""
    random, end = np.random.default_rng(seed), 0
    trie = Trie.of(spellings, end)
    following = {}

    def logs(prefix: tuple[int, ...]) -> np.ndarray:
        return following.setdefault(prefix, np.log(random.dirichlet(np.ones(5))))

    flat = [tuple(leaf[: i + 1]) for leaf in trie.leaves.tolist() for i in range(trie.leaves.shape[1])]
    prefixes = [(), *(flat[place] for place in trie.places)]
    assert set(prefixes) == {one[:n] for one in spellings for n in range(len(one) + 1)}
    assert len(prefixes) == len(set(prefixes))
    table = np.array([logs(prefix) for prefix in prefixes])
    rest = np.exp(table)
    rest[trie.nodes, trie.tokens] = 0
    answer = trie.answer(table[trie.nodes, trie.tokens].astype(np.float32), np.log(rest.sum(1)))
    expected = [sum(logs(one[:i])[token] for i, token in enumerate([*one, end])) for one in spellings]
    np.testing.assert_allclose(answer.log_probabilities, expected, rtol=1e-5)
    assert np.exp(answer.log_probabilities).sum() + answer.outside == pytest.approx(1, abs=1e-5)
