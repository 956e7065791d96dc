"""What torch.save wrote, read without torch: .bin files, Meta's shards, and files that must not be read."""

import json
import os
import zipfile
from collections import OrderedDict

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from jaxcrystal.config import MeshConfig
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import make_mesh
from jaxcrystal.weights.checkpoint_map import load_hf, open_checkpoint
from jaxcrystal.weights.config_map import read_meta
from jaxcrystal.weights.torch_zip import TorchZip

ONE = MeshConfig(1, 1, 1)
WHOLE = (slice(None), slice(None))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def loaded(directory, mesh=ONE):
    checkpoint = open_checkpoint(directory)
    return checkpoint.config, dict(checkpoint.load(make_mesh(mesh)))


# .bin


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("files", [1, 2])
def test_bin_files_equal_safetensors(dtype, files, checkpoint):
    theirs, directory = checkpoint(num_hidden_layers=2)
    theirs.to(dtype).save_pretrained(directory)
    config, expected = loaded(directory)
    (directory / "model.safetensors").unlink()
    names = list(theirs.state_dict())
    for i in range(files):
        held = {name: theirs.state_dict()[name] for name in names[i::files]}
        stem = "pytorch_model.bin" if files == 1 else f"pytorch_model-0000{i + 1}-of-00002.bin"
        torch.save(OrderedDict(held), directory / stem)
    if files == 2:
        weight_map = {name: f"pytorch_model-0000{names.index(name) % 2 + 1}-of-00002.bin" for name in names}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    stated, found = loaded(directory, MeshConfig(1, 2, 2))
    assert stated == config
    assert_same(found, expected)


def test_views_of_a_storage_are_read_by_offset_and_strides(tmp_path):
    whole = torch.arange(60.0).reshape(6, 10)
    views = {"rows": whole[2:5], "columns": whole[:, 3:7], "turned": whole.T, "sparse": whole[::2, 1::3], "all": whole}
    views["half"] = whole.to(torch.bfloat16)[1:, 1:]
    torch.save(views, tmp_path / "x.bin")
    file = TorchZip(tmp_path / "x.bin")
    for name, view in views.items():
        assert file.shapes[name] == tuple(view.shape)
        found = file.read(name, WHOLE)
        np.testing.assert_array_equal(found.astype(np.float32), view.float().numpy())
        np.testing.assert_array_equal(file.read(name, (slice(1, 3), slice(0, 2))), found[1:3, :2])
    assert file.dtypes == dict.fromkeys(views, "float32") | {"half": "bfloat16"}


class Runs:
    def __reduce__(self):
        return os.system, ("touch ran",)


class Calls:
    def __reduce__(self):
        return torch._utils._rebuild_parameter, (torch.ones(2), False, OrderedDict())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": Runs()}, r"holds a (posix|nt).system; only tensors"),
        ({"x": Calls()}, r"holds a torch._utils._rebuild_parameter; only tensors"),
        ({"x": torch.ones(2, dtype=torch.int8)}, r"holds a torch.CharStorage; only tensors of floating"),
        ({"x": 5}, r"'x' is a int; a tensor was expected"),
        ({"model": {"x": torch.ones(2)}}, r"'model' is a dict; a tensor was expected"),
        ([torch.ones(2)], r"holds one list; a dictionary of tensors was expected"),
    ],
)
def test_a_pickle_can_describe_tensors_and_do_nothing_else(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "x.bin")
    with pytest.raises(UserError, match=f"x.bin: {message}|x.bin {message}"):
        TorchZip(tmp_path / "x.bin")
    assert not (tmp_path / "ran").exists()


def rewritten(path, change):
    """The zip of `path` with the pickle changed."""
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in entries.items():
            new.writestr(name, change(data) if name.endswith("data.pkl") else data)


def test_files_of_torch_that_cannot_be_read(tmp_path):
    path = tmp_path / "x.bin"

    def refused(message):
        with pytest.raises(UserError, match=message) as error:
            TorchZip(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)

    refused("No such file")
    torch.save({"x": torch.arange(50.0)}, path, _use_new_zipfile_serialization=False)
    refused("from before 1.6, which cannot be read safely; load it with torch and save it as safetensors")
    path.write_text("nothing")
    refused("is no file of torch.save")
    torch.save({"x": torch.arange(50.0)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    refused("is cut short")
    path.write_bytes(whole)
    rewritten(path, lambda data: data.replace(b"K\x32\x85", b"K\x33\x85"))  # 51 numbers of a storage of 50
    refused("x is longer than its storage")
    path.write_bytes(whole)
    rewritten(path, lambda data: data[:-20])
    refused("is damaged")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/other", "")
    refused("torch.save did not write it")


def test_quantized_tensors_are_named(checkpoint):
    theirs, directory = checkpoint(num_hidden_layers=1)
    tensors = theirs.state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, directory / "model.safetensors")
    with pytest.raises(UserError, match=f"{name}: expected floating-point numbers, found I8; is it quantized"):
        load_hf(directory, make_mesh(ONE))


# Meta

COLUMNS_DIVIDED = ("wo", "w2", "tok_embeddings")
NAMES = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "norm": "norm",
}


def write_meta(model, directory, shards, *, vocabulary_by_rows=False, **changes):
    """The model as Meta would have stored it: rotary rows interleaved, matrices divided over files."""
    config = model.config
    heads = {"wq": config.num_attention_heads, "wk": config.num_key_value_heads}
    files = [{"rope.freqs": torch.ones(4)} for _ in range(shards)]
    for name, tensor in model.state_dict().items():
        stem = name.removeprefix("model.").removesuffix(".weight")
        layer, _, rest = stem.removeprefix("layers.").partition(".")
        meta = f"layers.{layer}.{NAMES[rest]}" if stem.startswith("layers.") else NAMES[stem]
        kind = meta.rpartition(".")[2]
        if kind in heads:
            pairs = tensor.view(heads[kind], 2, config.head_dim // 2, -1)
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)
        divided = tensor.dim() == 2
        axis = 0 if vocabulary_by_rows and kind == "tok_embeddings" else int(kind in COLUMNS_DIVIDED)
        for i, part in enumerate(tensor.chunk(shards, axis) if divided else [tensor] * shards):
            files[i][f"{meta}.weight"] = part  # of two columns' shares, each is a strided view of the whole
    directory.mkdir()
    for i, tensors in enumerate(files):
        torch.save(tensors, directory / f"consolidated.{i:02}.pth")
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "multiple_of": 32,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": -1,
        "rope_theta": config.rope_parameters["rope_theta"],
    }
    (directory / "params.json").write_text(json.dumps(params | changes))
    return directory


#: What 4 · 32 · 2 / 3, rounded up to a multiple of 32, gives.
META = dict(intermediate_size=96, num_hidden_layers=2, max_position_embeddings=4096)


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
def test_meta_equals_hugging_face(kv_heads, checkpoint, tmp_path):
    theirs, directory = checkpoint(num_key_value_heads=kv_heads, **META)
    config, expected = loaded(directory)
    for shards in (1, 2, 4):
        meta = write_meta(theirs, tmp_path / f"meta{shards}", shards, vocabulary_by_rows=shards == 4)
        for mesh in (ONE, MeshConfig(1, 2, 4)):  # 4 over 2 heads of keys: a device's share ends inside a head
            stated, found = loaded(meta, mesh)
            assert stated == config
            assert_same(found, expected)


def test_half_precision_of_meta_becomes_bfloat16(checkpoint, tmp_path):
    theirs, _ = checkpoint(**META)
    meta = write_meta(theirs.to(torch.float16), tmp_path / "meta", 2)
    config, found = loaded(meta)
    assert config.dtype == "bfloat16" and found["norm/scale"].dtype == jnp.bfloat16
    stored = theirs.state_dict()["model.norm.weight"].float().numpy()
    np.testing.assert_array_equal(found["norm/scale"], stored.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("params", "width"),
    [
        (dict(dim=4096, n_layers=32, n_heads=32, multiple_of=256), 11008),
        (dict(dim=5120, n_layers=40, n_heads=40, multiple_of=256), 13824),
        (dict(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, multiple_of=4096, ffn_dim_multiplier=1.3), 28672),
        (dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, multiple_of=1024, ffn_dim_multiplier=1.3), 14336),
    ],
    ids=["2-7b", "2-13b", "2-70b", "3-8b"],
)
def test_the_published_sizes_follow_from_params(params, width, tmp_path):
    (tmp_path / "params.json").write_text(json.dumps(params | {"norm_eps": 1e-6, "rope_theta": 5e5}))
    config = read_meta(tmp_path, 32000, "bfloat16")
    assert (config.intermediate_size, config.head_dim) == (width, 128)
    assert config.num_key_value_heads == params.get("n_kv_heads", params["n_heads"])
    assert (config.rms_norm_eps, config.rope_theta, config.vocab_size) == (1e-6, 5e5, 32000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(dim=None), "dim missing; is it the params.json of a LLaMA"),
        (dict(n_heads=0), "n_heads is 0; it must be a whole number above 0"),
        (dict(multiple_of=0), "multiple_of is 0; it must be a whole number above 0"),
        (dict(ffn_dim_multiplier="x"), "ffn_dim_multiplier is .x.; it must be a number above 0"),
        (dict(vocab_size=97), "vocab_size is 97, but output.weight has 96 rows"),
        (dict(use_scaled_rope=True), "use_scaled_rope does not say by how much"),
        (dict(quantization_args={"group_size": 32}), "quantization_args is .*not supported"),
    ],
)
def test_params_that_cannot_be_run(changes, message, checkpoint, tmp_path):
    theirs, _ = checkpoint(**META)
    meta = write_meta(theirs, tmp_path / "meta", 1, **changes)
    with pytest.raises(UserError, match=f"params.json: {message}"):
        open_checkpoint(meta)


def test_shards_of_meta_that_are_missing_or_wrong(checkpoint, tmp_path):
    theirs, _ = checkpoint(**META)
    meta = write_meta(theirs, tmp_path / "meta", 4)

    def refused(message):
        with pytest.raises(UserError, match=message) as error:
            open_checkpoint(meta)
        return str(error.value)

    last = meta / "consolidated.03.pth"
    last.rename(tmp_path / "aside")
    refused(r"meta holds 3 consolidated.\*.pth, but 4 make the model: each has 24 of 96 (columns|rows) of layers")
    (meta / "consolidated.01.pth").rename(last)
    refused("consolidated.01.pth is missing")
    for path in meta.glob("*.pth"):
        path.unlink()
    refused("holds params.json and no consolidated.00.pth")
    meta = write_meta(theirs, tmp_path / "other", 2, multiple_of=64, n_layers=1)
    told = refused("does not hold the LLaMA that its params.json describes").splitlines()
    assert "  layers.0.feed_forward.w1.weight: expected [128, 32], found [96, 32]" in told
    assert "  layers.1.attention_norm.weight: not expected, found [32]" in told
    tensors = torch.load(meta / "consolidated.01.pth")
    torch.save({name: x for name, x in tensors.items() if "w3" not in name}, meta / "consolidated.01.pth")
    refused(r"consolidated.01.pth: layers.0.feed_forward.w3.weight is in some of the files only")
