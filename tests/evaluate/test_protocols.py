import pytest

from jaxcrystal.errors import UserError
from jaxcrystal.evaluate.protocols import PROTOCOLS, Cutoffs, coverage_cutoffs, protocol_named


def test_a_protocol_carries_its_name():
    assert all(protocol_named(name).name == name for name in PROTOCOLS)


def test_an_unknown_protocol_names_the_known_ones():
    with pytest.raises(UserError, match="unknown protocol 'cdave'; known are cdvae, crystal-text-llm, strict"):
        protocol_named("cdave")


def test_cutoffs_belong_to_a_data_set():
    assert coverage_cutoffs("mp_20") == Cutoffs(structure=0.4, composition=10.0)
    assert coverage_cutoffs("carbon_24") == coverage_cutoffs("perov_5") == Cutoffs(structure=0.2, composition=4.0)
    assert PROTOCOLS["crystal-text-llm"].novelty == Cutoffs(structure=0.1, composition=2.0)
    with pytest.raises(UserError, match="known for 'mp20', but for mp_20, carbon_24, perov_5"):
        coverage_cutoffs("mp20")
