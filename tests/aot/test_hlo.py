"""The text of a program is read as what the program is, and how often a loop runs is known from it, or by its scope."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxcrystal.aot.hlo import Instruction, Program
from jaxcrystal.config import MeshConfig
from jaxcrystal.mesh import make_mesh


def compiled(function, *arguments) -> Program:
    arguments = [jax.ShapeDtypeStruct(dims, jnp.float32) for dims in arguments]
    return Program.parse(jax.jit(function).lower(*arguments).compile().as_text())


def loops(program: Program) -> list[tuple[str, Instruction]]:
    return [(where, i) for where, i, _, _ in program.walk({}) if i.opcode == "while"]


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        Program.parse("module @jit_step {}\n")


def until_small(x, kernel):
    return jax.lax.while_loop(lambda x: jnp.abs(x).max() > 1, lambda x: x @ kernel, x)


def test_trips_are_the_counted_ones_or_the_most_that_is_said_of_a_scope():
    def steps(x, kernel):
        with jax.named_scope("until_small"):
            return jax.lax.fori_loop(0, 7, lambda _, x: until_small(jnp.sin(x), kernel), x)

    program = compiled(steps, (4, 8), (8, 8))
    counted, open_ended = loops(program)
    assert program.trips(*counted, {"until_small": 5}) == 7  # what the compiler counts is not overruled
    assert counted[1].scope == "until_small" and program.trip_count(*open_ended) is None
    # The scope of a loop is the one directly around it: what is said of the outer one says nothing of the inner.
    assert program.trips(*open_ended, {"until_small": 5}) is None


def test_a_scope_is_found_on_every_device_and_under_every_transformation():
    mesh = make_mesh(MeshConfig(data=8, fsdp=1, tensor=1))

    @partial(jax.shard_map, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), check_vma=False)
    def on_each(x, kernel):
        def row(x):
            with jax.named_scope("halvings"):
                return until_small(x, kernel)

        return jax.lax.map(row, x)

    program = compiled(on_each, (16, 4, 8), (8, 8))
    assert [loop.scope for where, loop in loops(program) if program.trip_count(where, loop) is None] == ["halvings"]
