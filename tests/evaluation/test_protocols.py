import pytest

from jaxcrystal.errors import UserError
from jaxcrystal.evaluation.protocols import PROTOCOLS, Cutoffs, coverage_cutoffs, protocol_named


def test_a_protocol_carries_its_name():
    assert all(protocol_named(name).name == name for name in PROTOCOLS)


def test_an_unknown_protocol_names_the_known_ones():
    with pytest.raises(
        UserError, match="unknown protocol 'cdave'; known are cdvae, crystal-text-llm, strict, lemat, and"
    ):
        protocol_named("cdave")
    with pytest.raises(UserError, match="each with \\+ and one of smact14, smact-icsd24"):
        protocol_named("cdvae+icsd24")


def test_another_table_of_oxidation_states_is_in_the_name():
    other = protocol_named("cdvae+smact-icsd24")
    assert (other.name, other.oxidation_states, other.draw) == ("cdvae+smact-icsd24", "smact-icsd24", 1000)
    assert protocol_named("cdvae+smact14") == protocol_named("cdvae")


def test_cutoffs_belong_to_a_data_set():
    assert coverage_cutoffs("mp_20") == Cutoffs(structure=0.4, composition=10.0)
    assert coverage_cutoffs("carbon_24") == coverage_cutoffs("perov_5") == Cutoffs(structure=0.2, composition=4.0)
    assert PROTOCOLS["crystal-text-llm"].novelty == Cutoffs(structure=0.1, composition=2.0)
    with pytest.raises(UserError, match="known for 'mp20', but for mp_20, carbon_24, perov_5"):
        coverage_cutoffs("mp20")


def test_a_convention_of_which_not_all_is_counted_says_so():
    assert [name for name, protocol in PROTOCOLS.items() if protocol.note] == ["lemat"]
    assert "LeMat-Bulk" in PROTOCOLS["lemat"].note and protocol_named("lemat+smact14").note == PROTOCOLS["lemat"].note
