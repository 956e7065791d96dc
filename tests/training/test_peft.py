"""The whole step against torch: PEFT, AdamW, clipping and schedule, from the same weights, adapters and crystals."""

import math

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from small import SMALL, crystal_set

from jaxcrystal.config import Augment, LoraConfig, MeshConfig, OptimizerConfig, TextFormat
from jaxcrystal.mesh import batch_sharding, make_mesh
from jaxcrystal.model.llama import Llama, initialize
from jaxcrystal.texts.writer import Rows, Writer
from jaxcrystal.training.packing import Feed
from jaxcrystal.training.step import Trainer, make_optimizer
from jaxcrystal.weights.checkpoint_map import load_hf

STEPS, LENGTH = 30, 384
LORA = LoraConfig(rank=4, alpha=16.0, dropout=0.0, targets=("q_proj", "v_proj", "down_proj"))
#: Every part is at work: five steps of warm-up, the cosine to a tenth, decay, and a norm that clips most gradients.
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2, warmup_steps=5, final_fraction=0.1, weight_decay=0.1, beta1=0.8, beta2=0.95, clip_norm=0.15
)


def learning_rate(step: int) -> float:
    """peak · step / warmup, then final + (peak - final) (1 + cos(π progress)) / 2."""
    peak, warmup = OPTIMIZER.learning_rate, OPTIMIZER.warmup_steps
    if step < warmup:
        return peak * step / warmup
    final = peak * OPTIMIZER.final_fraction
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup)))


def unpacked(rows: Rows, crystals: int) -> dict[str, torch.Tensor]:
    """Each crystal of the packed rows on a row of its own, padded on the right; labels as transformers wants them."""
    texts = []
    for r in range(len(rows.tokens)):
        for segment in range(1, int(rows.segments[r].max()) + 1):
            inside = rows.segments[r] == segment
            texts.append((rows.tokens[r][inside], rows.loss_mask[r][inside]))
    assert len(texts) == crystals
    shape = len(texts), max(len(tokens) for tokens, _ in texts)
    ids, mask, labels = np.zeros(shape, int), np.zeros(shape, int), np.full(shape, -100)
    for i, (tokens, counted) in enumerate(texts):
        ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, 1
        labels[i, : len(tokens)] = np.where(counted, tokens, -100)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}


def torch_model(directory) -> transformers.LlamaForCausalLM:
    """A LLaMA with grouped heads and random weights, norms included, saved where `load_hf` will read it."""
    torch.manual_seed(0)
    sizes = {
        key: getattr(SMALL, key)
        for key in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings",
        )
    }  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, attn_implementation="sdpa"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            torch.nn.init.normal_(weight, mean=1.0 if "norm" in name else 0.0, std=0.15)
    model.save_pretrained(directory)
    return model


def same_adapters(model: peft.PeftModel, adapters: dict) -> None:
    """Copies our adapters into PEFT's, which are transposed and one module a layer."""
    found = 0
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(LORA.targets):
                layer, block, kernel = int(name.split(".layers.")[1].split(".")[0]), *name.split(".")[-2:]
                for theirs, ours in ((module.lora_A, "a"), (module.lora_B, "b")):
                    value = np.array(adapters["layers"][block][kernel][ours][layer].T)
                    theirs["default"].weight.copy_(torch.tensor(value))
                    found += 1
    assert found == 2 * len(LORA.targets) * SMALL.num_hidden_layers


def adapters_of(model: peft.PeftModel, like: dict) -> dict:
    """PEFT's adapters in our layout; the opposite of `same_adapters`."""
    weights = {name: weight.detach().numpy() for name, weight in model.named_parameters() if "lora_" in name}

    def gather(path, leaf):
        block, kernel, which = (key.key for key in path[1:])
        end = f"{block}.{kernel}.lora_{which.upper()}.default.weight"
        chosen = {int(n.split(".layers.")[1].split(".")[0]): w.T for n, w in weights.items() if n.endswith(end)}
        return np.stack([chosen[i] for i in range(len(leaf))])

    return jax.tree_util.tree_map_with_path(gather, like)


@pytest.mark.parametrize("loss_on", ["all", "response"])
def test_thirty_steps_are_those_of_peft(loss_on, tokenizer, tmp_path):
    theirs = torch_model(tmp_path)
    mesh = make_mesh(MeshConfig(1, 1, 1))
    config, params = load_hf(tmp_path, mesh)
    model = Llama(config, LORA)
    adapters = initialize(model, jax.random.key(1), mesh, ["lora"])["lora"]
    keys = iter(jax.random.split(jax.random.key(2), 100))
    adapters = jax.tree.map(
        lambda x: jax.device_put(0.1 * jax.random.normal(next(keys), x.shape), x.sharding), adapters
    )
    start = jax.device_get(adapters)
    theirs = peft.get_peft_model(
        theirs,
        peft.LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, lora_dropout=0.0, target_modules=list(LORA.targets)),
    )
    same_adapters(theirs, start)

    writer = Writer.of(tokenizer, TextFormat(), Augment(loss_on=loss_on))
    feed = Feed.of(crystal_set(60), tokenizer, writer, LENGTH, rows_per_batch=2, seed=0)
    trainer = Trainer(model, writer, make_optimizer(OPTIMIZER, STEPS), mesh, LENGTH)
    state = trainer.start({"params": params, "lora": adapters})
    step = trainer.compile_train(state, jax.device_put(feed.nothing(), batch_sharding(mesh)))
    write = jax.jit(lambda key, examples: writer.write(examples, writer.draw(key, examples), LENGTH))

    trained = [weight for weight in theirs.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, betas=(OPTIMIZER.beta1, OPTIMIZER.beta2), eps=1e-8, weight_decay=OPTIMIZER.weight_decay
    )
    batches = [(epoch, batch) for epoch in range(STEPS) for batch in feed.epoch(epoch)][:STEPS]
    ours, expected, norms = [], [], []
    for i, (epoch, crystals) in enumerate(batches):
        examples = feed.batch(crystals)
        batch = unpacked(jax.device_get(write(feed.key(epoch), examples)), int((crystals >= 0).sum()))
        state, metrics = step(state, jax.device_put(examples, batch_sharding(mesh)), feed.key(epoch))
        ours.append((float(metrics.loss), float(metrics.grad_norm)))

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(i)
        labels = batch.pop("labels")[:, 1:]
        logits = theirs(**batch).logits[:, :-1]
        total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        loss = total / (labels != -100).sum()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, OPTIMIZER.clip_norm)))
        optimizer.step()
        expected.append(loss.item())

    losses, grad_norms = np.array(ours).T
    assert np.abs(losses - expected).max() < 1e-5
    np.testing.assert_allclose(grad_norms, norms, rtol=1e-3)
    assert np.mean(np.array(norms) > OPTIMIZER.clip_norm) > 0.5 and losses[-1] < losses[0] - 0.1
    after = jax.device_get(state.trained)
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), after, adapters_of(theirs, after))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), after, start)
    assert max(jax.tree.leaves(apart)) < 1e-4
    assert min(jax.tree.leaves(moved)) > 0.05  # far more than the tolerance, every one of them
