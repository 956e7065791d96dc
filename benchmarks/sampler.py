"""Tokens per second: drawn by our engine under its grammar, against Hugging Face's `generate`, side by side in one run.

    python benchmarks/sampler.py            LLaMA 50m on the CPU, half an hour
    python benchmarks/sampler.py --quick    seconds, a check that it runs; its figures mean nothing

Both sides have the same random weights (that greedy decoding gives the same tokens is asserted first), the same prompt,
as many crystals at once, and the original's settings: temperature 0.9, top-p 0.9. Texts are as long as those of MP-20.
A model of random weights would not end its texts like one that was trained: ours writes crystals, as the grammar has
it, each of as many atoms as one of MP-20; `generate` writes any tokens, and a text's first one decides how long it is
among the lengths of MP-20's. The two take turns; medians are reported. `generate` knows nothing but whole batches, so
that one batch a turn shows its rate; our engine draws --num crystals a turn, and the slots that fall idle at the turn's
end count against it.

Other rows draw --few crystals and are compared with ours that draws as few. Each leaves one thing out or changes
it: `without refill` draws as many as there are slots and waits for the longest of them; `a token at a time` takes a
step also for tokens that the grammar forces; `drawn over all the vocabulary` applies methods and draws over all of it;
`each behind a prompt of its own` has as many prompts as crystals; `cache of int8`; `without the grammar` ends its texts
as `generate` does, and draws over all the vocabulary.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import machine
import material
import numpy as np
import torch
import transformers
from flax import struct
from jaxtyping import Array, Bool, Int, Int32
from train_step import SHAPES
from transformers import LlamaForCausalLM

from jaxcrystal.config import MeshConfig, TextFormat
from jaxcrystal.crystals.dataset import CrystalSet
from jaxcrystal.mesh import make_mesh
from jaxcrystal.sampling.engine import Engine, Task
from jaxcrystal.sampling.methods import Greedy, Temperature, TopP
from jaxcrystal.sampling.planning import LONGEST_TEXT
from jaxcrystal.texts import prompts
from jaxcrystal.texts.constraints import Constraints
from jaxcrystal.texts.forms import Form, form_of
from jaxcrystal.texts.tokenizer import load_tokenizer
from jaxcrystal.weights.checkpoint_map import load_hf
from jaxcrystal.weights.saved import SavedModel

OURS = "jaxcrystal"
GENERATE = "HF generate"
FEW = "jaxcrystal, few crystals"
NO_REFILL = "few, without refill"
ONE = "few, a token at a time"
ALL = "few, drawn over all the vocabulary"
MANY = "few, each behind a prompt of its own"
INT8 = "few, cache of int8"
FREE = "few, without the grammar"


@struct.dataclass
class Progress:
    """Of each slot: tokens so far, and tokens that the text shall have."""

    seen: Int32[Array, "slots"]
    wanted: Int32[Array, "slots"]


@dataclass(frozen=True, eq=False)
class Lengths:
    """In the place of a grammar: a text's first token t gives it lengths[t % n] tokens, the end included."""

    lengths: Int[np.ndarray, "n"]
    end: int
    vocab: int

    @property
    def tokens(self) -> Int[np.ndarray, "vocab"]:
        """All are its letters, so that nothing is gathered and draws go over the whole vocabulary."""
        return np.arange(self.vocab)

    def limits(self) -> Int[np.ndarray, ""]:
        return np.int32(0)

    def start(self, limits: Int[Array, "slots"]) -> Progress:
        return Progress(jnp.zeros(len(limits), jnp.int32), jnp.full(len(limits), self.lengths.max()))

    def advance(self, state: Progress, token: Int[Array, "slots"]) -> Progress:
        wanted = jnp.asarray(self.lengths)[token % len(self.lengths)]
        return Progress(state.seen + 1, jnp.where(state.seen == 0, wanted, state.wanted))

    def allowed(self, state: Progress) -> Bool[Array, "slots vocab"]:
        is_end = jnp.arange(self.vocab) == self.end
        return is_end == (state.seen == state.wanted - 1)[:, None]


@dataclass(frozen=True, eq=False)
class OverAll:
    """A grammar whose letters are the whole vocabulary: methods and draws go over all columns."""

    grammar: Grammar
    vocab: int

    @property
    def tokens(self) -> Int[np.ndarray, "vocab"]:
        return np.arange(self.vocab)

    @property
    def letter(self) -> Int[np.ndarray, "vocab"]:
        """Of each token; one behind the last letter where there is none."""
        letter = np.full(self.vocab, len(self.grammar.tokens))
        letter[self.grammar.tokens] = np.arange(len(self.grammar.tokens))
        return letter

    def limits(self) -> Any:
        return self.grammar.limits()

    def start(self, limits: Any) -> Any:
        return self.grammar.start(limits)

    def advance(self, state: Any, token: Int[Array, "slots"]) -> Any:
        return self.grammar.advance(state, jnp.asarray(self.letter)[token])

    def allowed(self, state: Any) -> Bool[Array, "slots vocab"]:
        allowed = self.grammar.allowed(state)
        return jnp.pad(allowed, ((0, 0), (0, 1)))[:, self.letter]


class TorchLengths(transformers.LogitsProcessor):
    """`Lengths` as transformers applies it."""

    def __init__(self, lengths: Lengths, prompt: int) -> None:
        self._of, self._prompt = lengths, prompt
        self._lengths = torch.from_numpy(np.asarray(lengths.lengths, np.int64))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen = input_ids.shape[1] - self._prompt
        if seen:
            wanted = self._lengths[input_ids[:, self._prompt] % len(self._lengths)]
            last = wanted == seen + 1
        else:
            last = torch.zeros(len(input_ids), dtype=torch.bool)
        end = torch.arange(scores.shape[1]) == self._of.end
        return scores.masked_fill(end[None] != last[:, None], -float("inf"))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    material.add_arguments(parser)
    parser.add_argument("--shape", choices=SHAPES, default="50m")
    parser.add_argument("--slots", type=int, default=64, help="crystals that are drawn at once (64)")
    parser.add_argument("--num", type=int, default=512, help="crystals of one turn of ours (512)")
    parser.add_argument("--few", type=int, default=128, help="crystals of each row that leaves something out (128)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side and row (3)")
    parser.add_argument("--quick", action="store_true", help="a minimal size")
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.shape, chosen.tokenizer, chosen.crystals = "tiny", "compact", 40
        chosen.slots, chosen.num, chosen.few, chosen.rounds = 4, 8, 6, 1
    measured = machine.facts(uses_accelerator=jax.default_backend() != "cpu")

    tokenizer, form = load_tokenizer(chosen.tokenizer), form_of(TextFormat())
    crystals = material.crystals(chosen.data, chosen.crystals)
    lengths, atoms = text_lengths(crystals, tokenizer, form), [len(crystals.crystal(i)) for i in range(len(crystals))]
    prompt = [*tokenizer.begin, *tokenizer.encode(prompts.generation_prompt(form, {}))]
    torch_model, model = same_model(chosen.shape, tokenizer)
    limit, vocab = int(lengths.max()), model.config.padded_vocab_size
    kept = Lengths(lengths, tokenizer.eos_id, vocab)
    rules = form.grammar(form.tables(tokenizer), LONGEST_TEXT)
    nucleus = (Temperature(0.9), TopP(0.9))

    def engine(grammar: Any = rules, **options: Any) -> Engine:
        usual = {"methods": nucleus, "max_new_tokens": LONGEST_TEXT, "slots": chosen.slots}
        return Engine(model, end_id=tokenizer.eos_id, grammar=grammar, **usual | options)

    def generate(batch: int, **options: Any) -> list[int]:
        with torch.inference_mode():
            out = torch_model.generate(
                torch.tensor([prompt] * batch),
                attention_mask=torch.ones(batch, len(prompt), dtype=torch.long),
                max_new_tokens=limit,
                logits_processor=transformers.LogitsProcessorList([TorchLengths(kept, len(prompt))]),
                **options,
            )
        return [row[: row.index(tokenizer.eos_id) + 1] for row in out[:, len(prompt) :].tolist()]

    (greedy,) = engine(kept, methods=(Greedy(),), max_new_tokens=limit, jump=1).draw(prompt, 0, [0])
    assert generate(1, do_sample=False) == [greedy.tokens.tolist()], "the two sides are not the same model"

    each = {n: rules.limits(Constraints(num_atoms=(n, n))) for n in set(atoms)}

    def drawn_by(
        engine: Engine,
        num: int = chosen.few,
        at_once: int = chosen.num,
        own_prompts: bool = False,
        has_rules: bool = True,
    ) -> Side:
        limits = [each[n] if has_rules else kept.limits() for n in np.resize(atoms, num)]
        stated = [{"band_gap": i / 100} if own_prompts else {} for i in range(num)]
        read = [[*tokenizer.begin, *tokenizer.encode(prompts.generation_prompt(form, stating))] for stating in stated]

        def draw(turn: int) -> list[int]:
            if not turn:  # all is compiled
                return [len(draw.tokens) for draw in engine.draw_all(read[:1], 0, [Task(0, 0)], limits[:1])]
            tasks = [Task(i, turn * num + i) for i in range(num)]
            parts = [tasks[i : i + at_once] for i in range(0, num, at_once)]
            return [len(draw.tokens) for part in parts for draw in engine.draw_all(read, 0, part, limits)]

        return draw

    def by_generate(turn: int) -> list[int]:
        torch.manual_seed(turn)
        settings = {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "top_k": 0}
        return [len(text) for text in generate(chosen.slots if turn else 1, **settings)]

    ours = engine()
    sides = {
        OURS: drawn_by(ours, chosen.num),
        GENERATE: by_generate,
        FEW: drawn_by(ours),
        NO_REFILL: drawn_by(ours, at_once=chosen.slots),
        ONE: drawn_by(engine(jump=1)),
        ALL: drawn_by(engine(OverAll(rules, vocab))),
        MANY: drawn_by(ours, own_prompts=True),
        INT8: drawn_by(engine(cache_dtype="int8")),
        FREE: drawn_by(engine(kept, max_new_tokens=limit, jump=1), has_rules=False),
    }
    turns = take_turns(sides, chosen.rounds)
    rates = {name: statistics.median(len(t["lengths"]) / t["seconds"] for t in each) for name, each in turns.items()}
    tokens = {name: statistics.median(sum(t["lengths"]) / t["seconds"] for t in each) for name, each in turns.items()}
    ratios = {name: tokens[FEW] / rate for name, rate in tokens.items() if name not in (OURS, FEW)}
    ratios[GENERATE] = tokens[OURS] / tokens[GENERATE]
    result = {
        "benchmark": "sampler",
        "claim": "tokens/s of our engine under its grammar / of HF generate, with as many at once",
        "ratio": ratios[GENERATE],
        "ratios": ratios,  #: of tokens/s; of all but HF generate, to ours that draws as few
        "crystals_per_second": rates,
        "tokens_per_second": tokens,
        "turns": turns,
        "lengths": {"mean": float(lengths.mean()), "least": int(lengths.min()), "most": limit},
        "prompt_tokens": len(prompt),
        "slots": chosen.slots,
        "num": chosen.num,
        "few": chosen.few,
        "shape": chosen.shape,
        "dtype": "float32",
        "methods": [repr(method) for method in nucleus],
        "data": Path(chosen.data).name,
        "quick": chosen.quick,
        "measured": measured,
    }
    path = machine.write(f"sampler_{chosen.shape}", result, chosen.out)
    print(
        f"{measured['machine']}\nLLaMA {chosen.shape}, {chosen.slots} at once, {lengths.mean():.0f} tokens on average"
    )
    for name, rate in rates.items():
        compared = f"   ours is {ratios[name]:.2f} times it" if name in ratios else ""
        print(f"  {name:42} {rate:8.2f} crystals/s {tokens[name]:8,.0f} tokens/s{compared}")
    print(f"written to {path}")
    return result


def text_lengths(crystals: CrystalSet, tokenizer: Any, form: Form) -> Int[np.ndarray, "n"]:
    """Tokens of the crystals' own texts, the end included."""
    prompt = len(tokenizer.encode(prompts.generation_prompt(form, {})))
    texts = (prompts.generation(form, crystals.crystal(i), {}) for i in range(len(crystals)))
    return np.array([len(tokenizer.encode(text)) - prompt + 1 for text in texts], np.int32)


def same_model(shape: str, tokenizer: Any) -> tuple[LlamaForCausalLM, SavedModel]:
    """Random weights, loaded by both sides from one file."""
    torch.manual_seed(0)
    torch.set_num_threads(machine.cores())
    config = transformers.LlamaConfig(
        **SHAPES[shape].model,
        max_position_embeddings=4096,
        bos_token_id=next(iter(tokenizer.begin), None),
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.eos_id,
    )
    torch_model = LlamaForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as directory:
        torch_model.save_pretrained(directory)
        ours, params = load_hf(Path(directory), make_mesh(MeshConfig(1, 1, 1)))
    return torch_model, SavedModel(ours, None, TextFormat(), params, None, tokenizer, 0)


Side = Callable[[int], list[int]]  # of a turn: the lengths of what was drawn


def take_turns(sides: dict[str, Side], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Seconds and lengths of every turn, after turn 0, in which all is compiled."""
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for round in range(rounds + 1):
        for name, draw in sides.items():
            start = time.perf_counter()
            lengths = draw(round)
            seconds = time.perf_counter() - start
            print(f"{'warm-up' if round == 0 else f'round {round}':8} {name:42} {seconds:7.1f} s", file=sys.stderr)
            if round:
                turns[name].append({"seconds": seconds, "lengths": lengths})
    return turns


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
