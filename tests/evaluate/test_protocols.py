import pytest

from jaxcrystal.errors import UserError
from jaxcrystal.evaluate.protocols import PROTOCOLS, protocol_named


def test_a_protocol_carries_its_name():
    assert all(protocol_named(name).name == name for name in PROTOCOLS)


def test_an_unknown_protocol_names_the_known_ones():
    with pytest.raises(UserError, match="unknown protocol 'cdave'; known are cdvae, strict"):
        protocol_named("cdave")
