"""Our side of a benchmark of training: the compiled step of `jaxcrystal train`, on one device."""

from __future__ import annotations

import resource
import time
from typing import Any

import jax
import jax.numpy as jnp
import machine

from jaxcrystal.config import MeshConfig, Recipe
from jaxcrystal.crystals import dataset
from jaxcrystal.mesh import batch_sharding, make_mesh
from jaxcrystal.model.llama import Llama, initialize
from jaxcrystal.texts.tokenizer import load_tokenizer
from jaxcrystal.texts.writer import Writer
from jaxcrystal.training.packing import Feed
from jaxcrystal.training.step import Trainer, make_optimizer


def make_feed(recipe: Recipe) -> Feed:
    """The packed batches of a recipe; parent and children make the same."""
    tokenizer = load_tokenizer(recipe.tokenizer)
    writer = Writer.of(tokenizer, recipe.text, recipe.augment)
    data = dataset.load(recipe.data.train)
    return Feed.of(data, tokenizer, writer, recipe.data.tokens_per_row, recipe.data.rows_per_batch, recipe.seed)


class Ours:
    """A model of random weights, all trained or with adapters as the recipe says, and its steps."""

    def __init__(self, recipe: Recipe, steps: int) -> None:
        self.feed = make_feed(recipe)
        self.table, self.key = self.feed.epoch(0), self.feed.key(0)
        start = time.perf_counter()
        self.feed.epoch(0)
        self.packing = (time.perf_counter() - start) / len(self.table)  #: seconds of the host for each step
        self.mesh = make_mesh(MeshConfig(1, 1, 1))
        model = Llama(recipe.model, recipe.lora)
        self.trainer = Trainer(
            model,
            self.feed.writer,
            make_optimizer(recipe.optimizer, steps),
            self.mesh,
            self.feed.row_length,
            recipe.data.loss_block,
            recipe.data.accumulate,
        )

        def place(path: Any, leaf: jax.Array) -> jax.Array:
            """Frozen weights in the dtype of the products; adapters, codes and their scales as they are."""
            names = [key.key for key in path]
            stored = names[0] != "params" or leaf.dtype != jnp.float32 or "kernel" in names[:-1]
            return leaf if stored else leaf.astype(recipe.model.dtype)

        # One program: a 7B in float32 never exists as a whole.
        make = jax.jit(lambda key: jax.tree_util.tree_map_with_path(place, initialize(model, key, self.mesh)))
        with jax.set_mesh(self.mesh):
            variables = make(jax.random.key(recipe.seed))
        self.state = self.trainer.start(variables)
        start = time.perf_counter()
        self.step = self.trainer.compile_train(self.state, self._place(self.feed.nothing()))
        self.compile_seconds = time.perf_counter() - start

    def _place(self, examples: Any) -> Any:
        return jax.device_put(examples, batch_sharding(self.mesh))

    def turn(self, steps: list[int]) -> dict[str, Any]:
        """These steps one after the other, from the host's arrays to updated adapters: seconds and what was seen."""
        told = []
        start, cpu = time.perf_counter(), time.process_time()
        for i in steps:
            self.state, metrics = self.step(self.state, self._place(self.feed.batch(self.table[i])), self.key)
            told.append(metrics)
        jax.block_until_ready((self.state, told))
        seconds = time.perf_counter() - start + self.packing * len(steps)
        cpu_seconds = time.process_time() - cpu + self.packing * len(steps)
        told = jax.device_get(told)
        return {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "losses": [float(m.loss) for m in told],
            "useful_tokens": sum(int(m.written) for m in told),
            "computed_tokens": len(steps) * self.table.shape[1] * self.feed.row_length,
        }

    def facts(self) -> dict[str, Any]:
        """What is told of the engine at its end."""
        told = {"compile_seconds": self.compile_seconds, "packing_seconds_per_step": self.packing}
        if (memory := jax.local_devices()[0].memory_stats()) and "peak_bytes_in_use" in memory:
            return told | {"peak_memory_bytes": memory["peak_bytes_in_use"], "peak_memory_of": "device"}
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return told | {"peak_memory_bytes": resident, "peak_memory_of": "process"}

    def roofline(self, dtype: str) -> float:
        """FLOP/s of the best matrix product that XLA makes here, in this dtype."""
        n = 2048 if jax.default_backend() == "cpu" else 8192
        x = jnp.ones((n, n), dtype)
        multiply = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))
        return 2 * n**3 / machine.best_of(lambda: multiply(x).block_until_ready(), 5)
