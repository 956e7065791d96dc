"""The peer: Hugging Face's LLaMA, with PEFT's adapters or all weights, trained by a plain torch loop.

Texts are made and tokenized on the host while the step before runs, padded to the longest of their batch, and trained
with scaled-dot-product attention, fused AdamW on a GPU, and the loss over counted tokens of the whole step. A step may
be taken in parts (`micro` crystals at a time, gradients added up), which pads less; `packed` goes further than the
original and packs rows as we do, told apart by their positions.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import machine
import material
import peft
import torch
import transformers
from material import Setting, Task

from jaxcrystal.config import LlamaConfig, LoraConfig, OptimizerConfig, TextFormat
from jaxcrystal.texts.tokenizer import load_tokenizer
from jaxcrystal.training.packing import pack


class Peer:
    """A model, its optimizer, and the steps that they take; on a GPU if there is one."""

    def __init__(
        self,
        setting: Setting,
        config: LlamaConfig,
        lora: LoraConfig | None,
        optimizer: OptimizerConfig,
        tokenizer: str,
        batches: list[list[Task]],
    ) -> None:
        torch.set_num_threads(machine.cores())
        torch.manual_seed(0)
        self.setting, self.batches, self.fmt = setting, batches, TextFormat()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = load_tokenizer(tokenizer)
        self.fast = material.transformers_tokenizer(self.tokenizer)
        self.model = self._model(config, lora)
        self.trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.host_seconds = 0.0  #: CPU-seconds in which texts were made, beside the steps
        self.clip_norm = optimizer.clip_norm
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=optimizer.learning_rate,
            betas=(optimizer.beta1, optimizer.beta2),
            weight_decay=optimizer.weight_decay,
            fused=self.device == "cuda",
        )

    def _model(self, config: LlamaConfig, lora: LoraConfig | None) -> torch.nn.Module:
        theirs = transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=config.tie_word_embeddings,
            use_cache=False,
            attn_implementation="sdpa",
        )
        default = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, config.dtype))
        try:
            with torch.device(self.device):
                model = transformers.LlamaForCausalLM(theirs)
        finally:
            torch.set_default_dtype(default)
        if self.setting.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        if lora is None:
            return model.train()
        adapters = peft.LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets)
        )
        return peft.get_peft_model(model, adapters).train()

    def turn(self, steps: list[int]) -> dict[str, Any]:
        """These steps one after the other, from texts to updated adapters: seconds and what was seen."""
        losses, useful, computed = [], 0, 0
        self._finish()
        start, cpu = time.perf_counter(), time.process_time() - self.host_seconds
        # One thread makes the texts of the next step while this one runs; on a GPU that hides them wholly.
        with ThreadPoolExecutor(1) as host:
            ahead = host.submit(self._tensors, self.batches[steps[0]])
            for i in range(len(steps)):
                parts = ahead.result()
                if i + 1 < len(steps):
                    ahead = host.submit(self._tensors, self.batches[steps[i + 1]])
                losses.append(self._step(parts))
                useful += sum(part["useful"] for part in parts)
                computed += sum(part["input_ids"].numel() for part in parts)
        self._finish()
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "cpu_seconds": time.process_time() - self.host_seconds - cpu,
            "losses": [float(loss) for loss in losses],
            "useful_tokens": useful,
            "computed_tokens": computed,
        }

    def _step(self, parts: list[dict[str, Any]]) -> torch.Tensor:
        counted = sum(part["counted"] for part in parts)
        total = torch.zeros((), device=self.device)
        for part in parts:
            inputs = {
                name: value.to(self.device, non_blocking=True) for name, value in part.items() if torch.is_tensor(value)
            }
            with torch.autocast(self.device, torch.bfloat16, enabled=self.setting.autocast):
                loss = self.model(**inputs, num_items_in_batch=counted).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.trained, self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def _tensors(self, tasks: list[Task]) -> list[dict[str, Any]]:
        """The crystals of one step as the parts in which they are computed."""
        start = time.thread_time()
        parts = self._encoded(tasks)
        self.host_seconds += time.thread_time() - start
        return parts

    def _encoded(self, tasks: list[Task]) -> list[dict[str, Any]]:
        tokens = material.encode([task.text(self.fmt) for task in tasks], self.fast, self.tokenizer)
        if self.setting.packed:
            rows = pack([len(t) for t in tokens], range(len(tokens)), self.setting.packed)
            size = self.setting.micro or len(rows)
            return [_packed([[tokens[i] for i in row] for row in part]) for part in _parts(rows, size)]
        return [_padded(part) for part in _parts(tokens, self.setting.micro or len(tokens))]

    def _finish(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def facts(self) -> dict[str, Any]:
        """What is told of the engine at its end."""
        if self.device == "cuda":
            return {"peak_memory_bytes": torch.cuda.max_memory_allocated(), "peak_memory_of": "device"}
        return {
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "peak_memory_of": "process",
        }

    def roofline(self, dtype: str) -> float:
        """FLOP/s of the best matrix product that torch makes here, in this dtype."""
        n = 8192 if self.device == "cuda" else 2048
        x = torch.ones(n, n, device=self.device, dtype=getattr(torch, dtype))

        def multiply() -> None:
            x @ x
            self._finish()

        return 2 * n**3 / machine.best_of(multiply, 5)


def _parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _padded(texts: list[list[int]]) -> dict[str, Any]:
    """One text a row, padded on the right to the longest."""
    longest = max(map(len, texts))
    ids, mask = torch.zeros(len(texts), longest, dtype=torch.long), torch.zeros(len(texts), longest, dtype=torch.long)
    for i, text in enumerate(texts):
        ids[i, : len(text)], mask[i, : len(text)] = torch.tensor(text), 1
    useful = sum(map(len, texts))
    labels = ids.masked_fill(mask == 0, -100)
    inputs = {"input_ids": ids, "labels": labels, "useful": useful, "counted": useful - len(texts)}
    return inputs if mask.all() else inputs | {"attention_mask": mask}  # no mask lets sdpa choose its fastest kernel


def _packed(rows: list[list[list[int]]]) -> dict[str, Any]:
    """Several texts a row, one after the other, padded to the longest row; transformers parts them by position."""
    longest = max(sum(map(len, row)) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels, positions = torch.full_like(ids, -100), torch.zeros_like(ids)
    useful = counted = 0
    for r, row in enumerate(rows):
        at = 0
        for text in row:
            end = at + len(text)
            ids[r, at:end] = torch.tensor(text)
            labels[r, at + 1 : end] = torch.tensor(text[1:])
            positions[r, at:end] = torch.arange(len(text))
            at, useful, counted = end, useful + len(text), counted + len(text) - 1
        positions[r, at:] = torch.arange(longest - at)
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "useful": useful, "counted": counted}
