"""Random weights write a crystal of each space group, whatever tokenizer they were given."""

import byte_pair_tokenizers
import pytest
from random_models import model_of

from jaxcrystal.config import MeshConfig
from jaxcrystal.crystals.wyckoff import GROUPS
from jaxcrystal.mesh import make_mesh
from jaxcrystal.sampling.sampler import Sampler, SamplerSettings
from jaxcrystal.texts.symmetry.text import parse


@pytest.mark.parametrize(
    "kind, groups", [("compact-symmetry", GROUPS), ("llama2", GROUPS[::5]), ("smollm2", GROUPS[3::5])]
)
def test_all_texts_end_and_are_crystals(kind, groups, tmp_path, request):
    """One of each (`parse` takes full orbits alone), in the tokens that the tokenizer cuts it into."""
    name = kind
    if kind == "llama2":
        name = str(request.getfixturevalue("shared") / "tokenizer/llama2/tokenizer.model")
    elif kind == "smollm2":
        name = str(byte_pair_tokenizers.smollm2(tmp_path))
    model = model_of("symmetry", name, tmp_path / "model")
    with Sampler(model, SamplerSettings(slots=64), make_mesh(MeshConfig(1, 1, 1))) as sampler:
        attempts = list(sampler.stream(1, conditions=[{"spacegroup.number": number} for number in groups]))
    cut = sampler.tokenizer.encode
    assert len(attempts) == len(groups)
    for number, attempt in zip(groups, attempts, strict=True):
        assert attempt.status == "ok" and parse(attempt.text).space_group == attempt.written_group == number
        assert len(cut(attempt.prompt + attempt.text)) == len(cut(attempt.prompt)) + attempt.tokens - 1
