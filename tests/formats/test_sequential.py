"""Hydra's, Clover's and the MLP speculator's files: read as published, rewritten byte for byte, used as drafters."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import specdec
from specdec import formats
from specdec.drafters.head import build_head
from specdec.drafters.sequential import SequentialDrafter
from specdec.errors import BadCheckpoint, DrafterMismatch
from specdec.formats.checkpoint import HeadCheckpoint
from specdec.heads.clover import CloverConfig, CloverHead
from specdec.heads.hydra import HydraConfig
from specdec.heads.kinds import HEADS
from specdec.heads.layer import LayerConfig, causal_mask
from specdec.heads.sequential import SequentialHead, TargetEnds, teacher_forced
from specdec.probe import target_of
from tests.drafters.test_sequential import made
from tests.families import tiny_model
from tests.formats.published import D, K, V, configs_in, random_tensors, same_bytes, save, tensors_in
from tests.heads import test_clover, test_mlp_speculator
from tests.tiny import shared_target

INNER = 24
HYDRA_CONFIG = {"hydra_num_heads": 2, "hydra_num_layers": 1, "hydra_head_arch": "mlp", "grounded_heads": True,
                "hidden_state_offset": 0, "base_model_name_or_path": "lmsys/vicuna-7b-v1.3",
                "transformers_version": "4.36.2"}  # fmt: skip
"""The number of heads is not true, as in Medusa's published configs."""

CLOVER_CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": D, "vocab_size": V,
                 "intermediate_size": INNER, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
                 "hidden_act": "silu", "max_position_embeddings": 2048, "rope_scaling": None, "num_hidden_layers": 1,
                 "pad_token_id": 0, "bos_token_id": 1, "rope_theta": 500000.0,
                 "clover": {"num_heads": 4, "num_layers": 2, "heads_coefficient": 1.0, "decay_coefficient": 0.7},
                 }  # fmt: skip

MLP_CONFIG = {"model_type": "mlp_speculator", "architectures": ["MLPSpeculatorPreTrainedModel"], "vocab_size": V,
              "emb_dim": D, "inner_dim": INNER, "n_predict": K, "top_k_tokens_per_head": [5, 4, 3], "n_candidates": 5,
              "tie_weights": False, "scale_input": False, "torch_dtype": "float16"}  # fmt: skip


def llama_layer(prefix: str) -> dict[str, tuple[int, ...]]:
    attention = {f"{prefix}self_attn.{n}_proj.weight": (D // 2 if n in "kv" else D, D) for n in "qkvo"}
    mlp = {f"{prefix}mlp.{n}_proj.weight": (D, INNER) if n == "down" else (INNER, D) for n in ("gate", "up", "down")}
    return attention | mlp | {f"{prefix}{n}_layernorm.weight": (D,) for n in ("input", "post_attention")}


def hydra_tensors(
    layers: int, *, prefix: bool = False, copies: bool = True, grounded: bool = True
) -> dict[str, Tensor]:
    """A state dict as the trainers save it: repeated blocks, dropout-shifted places, and copies of the embedding."""
    places = range(1, 2 * layers, 2) if prefix else range(layers)
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(K):
        width = (i + 2) * D if grounded else D
        for part in ("linear", "res_connection") if grounded else ("linear",):
            shapes |= {f"hydra_mlp.{i}.{places[0]}.{part}.weight": (D, width)}
            shapes |= {f"hydra_mlp.{i}.{places[0]}.{part}.bias": (D,)}
        for j in places[1:]:
            shapes |= {f"hydra_mlp.{i}.{j}.linear.weight": (D, D), f"hydra_mlp.{i}.{j}.linear.bias": (D,)}
        output = f"hydra_lm_head.{i}.1" if prefix else f"hydra_lm_head.{i}"
        shapes |= {f"{output}.weight": (V, D), f"{output}.bias": (V,)}
    if prefix:
        shapes |= llama_layer("prefix_embeding_layer.layers.0.") | {"prefix_embeding_layer.norm.weight": (D,)}
    tensors = random_tensors(shapes)
    for i in range(K):
        for j in places[2:]:
            for kind in ("weight", "bias"):
                tensors[f"hydra_mlp.{i}.{j}.linear.{kind}"] = tensors[f"hydra_mlp.{i}.{places[1]}.linear.{kind}"]
    if copies:
        tensors["input_embed_fn.weight"] = torch.randn(V, D)
    if copies and prefix:
        tensors["prefix_embeding_layer.embed_tokens.weight"] = torch.randn(V, D)
        tensors["prefix_embeding_layer.layers.0.self_attn.rotary_emb.inv_freq"] = torch.randn(2)
    return tensors


def hydra(folder: Path, layers: int = 1, **sizes: Any) -> Path:
    config = {**HYDRA_CONFIG, "hydra_head_arch": "prefix-mlp" if sizes.get("prefix") else "mlp"}
    config["grounded_heads"] = sizes.get("grounded", True)
    return save(folder, config, "hydra_lm_head.pt", hydra_tensors(layers, **sizes))


def clover_tensors() -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"lm_head.weight": (V, D), "clover_embed_tokens.weight": (V, D)}
    shapes |= llama_layer("layers.0.") | llama_layer("layers.1.")
    shapes |= {"clover_norm.weight": (D,), "clover_head_norm.weight": (D,)}
    shapes |= {"clover_head_mlp.weight": (D, D), "clover_head_mlp.bias": (D,)}
    shapes |= {"clover_head_mlp2.weight": (D, 2 * D), "clover_head_mlp2.bias": (D,)}
    for name in ("clover_head_mlp_rnn", "clover_head_mlp_rnn2"):
        shapes[f"{name}.input_layernorm.weight"] = (D,)
        shapes |= {
            f"{name}.{n}.{kind}": (D, D) if kind == "weight" else (D,) for n in "qkv" for kind in ("weight", "bias")
        }
    return random_tensors(shapes)


def clover(folder: Path) -> Path:
    return save(folder, CLOVER_CONFIG, "model.safetensors", clover_tensors())


def mlp_tensors(*, tied: bool = False, copies: bool = False) -> dict[str, Tensor]:
    tables = range(1 if tied else K)
    shapes: dict[str, tuple[int, ...]] = {f"speculator.emb.{i}.weight": (V, INNER) for i in tables}
    shapes |= {f"speculator.head.{i}.weight": (V, INNER) for i in tables}
    shapes |= {f"speculator.ln.{i}.{kind}": (INNER,) for i in tables for kind in ("weight", "bias")}
    shapes |= {f"speculator.proj.{i}.weight": (INNER, INNER if i else D) for i in range(2 if tied else K)}
    tensors = random_tensors(shapes)
    for i in range(1, K) if copies else ():
        tensors |= {f"speculator.{part}.{i}.weight": tensors[f"speculator.{part}.0.weight"].clone()
                    for part in ("emb", "head", "ln")}  # fmt: skip
        tensors[f"speculator.ln.{i}.bias"] = tensors["speculator.ln.0.bias"].clone()
        tensors[f"speculator.proj.{i}.weight"] = tensors["speculator.proj.1.weight"].clone()
    return tensors


def mlp(folder: Path, config: dict[str, Any] | None = None, **sizes: Any) -> Path:
    described = {**MLP_CONFIG, "tie_weights": sizes.get("tied", False), **(config or {})}
    return save(folder, described, "model.safetensors", mlp_tensors(**sizes))


PUBLISHED: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "hydra": ("hydra", lambda folder: hydra(folder, copies=False)),
    "hydra of three blocks": ("hydra", lambda folder: hydra(folder, 3, copies=False)),
    "hydra, ungrounded": ("hydra", lambda folder: hydra(folder, 2, copies=False, grounded=False)),
    "hydra++": ("hydra", lambda folder: hydra(folder, 4, copies=False, prefix=True)),
    "clover-2": ("clover2", clover),
    "mlp speculator": ("mlp_speculator", mlp),
    "mlp speculator, tied and scaled": ("mlp_speculator", lambda folder: mlp(folder, {"scale_input": True}, tied=True)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_writing_what_was_read_gives_the_same_bytes_and_config(name: str, tmp_path: Path) -> None:
    format_name, make = PUBLISHED[name]
    source, once, twice = make(tmp_path / "source"), tmp_path / "once", tmp_path / "twice"
    first = formats.read(source)
    assert first.format == format_name
    formats.write(first, once, format_name)
    second = formats.read(once)
    formats.write(second, twice, format_name)
    assert same_bytes(tensors_in(source), tensors_in(once))
    assert same_bytes(tensors_in(once), tensors_in(twice))
    assert configs_in(once) == configs_in(twice)
    assert (first.kind, first.config, first.extra) == (second.kind, second.config, second.extra)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_detour_through_our_own_format_loses_nothing(name: str, tmp_path: Path) -> None:
    format_name, make = PUBLISHED[name]
    source = make(tmp_path / "source")
    formats.write(formats.read(source), tmp_path / "native")
    formats.write(formats.read(tmp_path / "native"), tmp_path / "back", format_name)
    formats.write(formats.read(source), tmp_path / "direct", format_name)
    assert same_bytes(tensors_in(source), tensors_in(tmp_path / "back"))
    assert configs_in(tmp_path / "back") == configs_in(tmp_path / "direct")


def states(checkpoint: HeadCheckpoint, hidden: Tensor, text: Tensor, ends: TargetEnds) -> list[Tensor]:
    """Logits of every depth of every pair."""
    head = cast(SequentialHead, build_head(checkpoint, torch.float32))
    return [head.logits(depth, s, ends) for depth, s in enumerate(teacher_forced(head, hidden, text, ends))]


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("prefix", [False, True])
def test_hydra_computes_what_its_raw_tensors_say(layers: int, prefix: bool, tmp_path: Path) -> None:
    source = hydra(tmp_path, layers, prefix=prefix)
    raw, read = tensors_in(source), formats.read(source)
    assert (read.config.num_heads, read.config.num_layers, read.config.shared_blocks) == (K, layers, True)
    assert (read.config.prefix is not None) == prefix
    ends = TargetEnds(torch.nn.Embedding(V, D), lambda _: pytest.fail("has its own LM heads"))
    hidden, text = torch.randn(1, 8, D), torch.randint(0, V, (1, 8))
    got = states(read, hidden, text, ends)
    if prefix:
        head = build_head(read, torch.float32)
        hidden = cast(Any, head).prefix(hidden[:, :-1], torch.arange(7)[None], causal_mask(7, hidden))
    for depth in range(K):
        parts = torch.cat([hidden[0, 2], *(ends.embedding(text[0, 3 + i]) for i in range(depth + 1))])
        at = [1, 3, 5] if prefix else [0, 1, 2]
        out = parts @ raw[f"hydra_mlp.{depth}.{at[0]}.res_connection.weight"].T
        out = out + raw[f"hydra_mlp.{depth}.{at[0]}.res_connection.bias"]
        for j in range(layers):
            name = f"hydra_mlp.{depth}.{at[j]}.linear"
            z = parts if j == 0 else out
            out = out + torch.nn.functional.silu(z @ raw[f"{name}.weight"].T + raw[f"{name}.bias"])
        output = f"hydra_lm_head.{depth}.1" if prefix else f"hydra_lm_head.{depth}"
        expected = out @ raw[f"{output}.weight"].T + raw[f"{output}.bias"]
        torch.testing.assert_close(got[depth][0, 2], expected, atol=1e-5, rtol=1e-5)


def test_blocks_that_are_no_copies_of_each_other_are_read_as_they_are(tmp_path: Path) -> None:
    tensors = hydra_tensors(3)
    tensors["hydra_mlp.1.2.linear.weight"] = torch.randn(D, D)
    source = save(tmp_path / "source", HYDRA_CONFIG, "hydra_lm_head.pt", tensors)
    read = formats.read(source)
    assert not read.config.shared_blocks
    formats.write(read, tmp_path / "out", "hydra")
    written = tensors_in(tmp_path / "out")
    assert same_bytes(written, {name: t for name, t in tensors.items() if not name.startswith("input_embed")})


def test_copies_of_the_targets_embedding_are_known_and_dropped(tmp_path: Path) -> None:
    source = hydra(tmp_path / "source", 4, prefix=True)
    formats.write(formats.read(source), tmp_path / "out", "hydra")
    dropped = tensors_in(source).keys() - tensors_in(tmp_path / "out").keys()
    assert dropped == {
        "input_embed_fn.weight", "prefix_embeding_layer.embed_tokens.weight",
        "prefix_embeding_layer.layers.0.self_attn.rotary_emb.inv_freq",
    }  # fmt: skip


def test_clover_computes_what_its_raw_tensors_say(tmp_path: Path) -> None:
    source = clover(tmp_path)
    raw, read = tensors_in(source), formats.read(source)
    assert read.config.layer.rope_theta == 10_000.0, "the published code ignores rope_theta"
    head = cast(CloverHead, build_head(read, torch.float32))
    hidden, text = torch.randn(1, 9, D), torch.randint(0, V, (1, 9))
    got = states(read, hidden, text, test_clover.ends())
    expected = test_clover.recomputed(head, hidden[0], text[0].tolist(), 3, raw["lm_head.weight"])
    for depth, logits in enumerate(expected):
        torch.testing.assert_close(got[depth][0, 3], logits, atol=1e-5, rtol=1e-4)
    theirs = {"embed_tokens": "clover_embed_tokens", "first_attention.q": "clover_head_mlp_rnn.q",
              "later_attention.v": "clover_head_mlp_rnn2.v", "first_projection": "clover_head_mlp",
              "later_projection": "clover_head_mlp2", "text.norm": "clover_norm",
              "text.layers.1.mlp.up_proj": "layers.1.mlp.up_proj", "head_norm": "clover_head_norm"}  # fmt: skip
    for ours, name in theirs.items():
        assert torch.equal(head.state_dict()[f"{ours}.weight"], raw[f"{name}.weight"])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_mlp_speculators_compute_what_their_raw_tensors_say(
    tied: bool, copies: bool, scaled: bool, tmp_path: Path
) -> None:
    source = mlp(tmp_path, {"scale_input": scaled}, tied=tied, copies=tied and copies)
    read = formats.read(source)
    raw = {name.removeprefix("speculator."): tensor for name, tensor in tensors_in(source).items()}
    hidden, text = torch.randn(1, 7, D), torch.randint(0, V, (1, 7))
    got = states(read, hidden, text, test_mlp_speculator.NO_ENDS)
    expected = test_mlp_speculator.recomputed(raw, read.config, hidden[0, 1], text[0, 2 : 2 + K].tolist())
    for depth, logits in enumerate(expected):
        torch.testing.assert_close(got[depth][0, 1], logits, atol=1e-5, rtol=1e-5)


def test_names_without_prefix_and_an_inner_size_of_0_are_read(tmp_path: Path) -> None:
    config = {**MLP_CONFIG, "emb_dim": INNER, "inner_dim": 0}
    tensors = {name.removeprefix("speculator."): t for name, t in mlp_tensors().items()}
    tensors["proj.0.weight"] = torch.randn(INNER, INNER)
    read = formats.read(save(tmp_path, config, "model.safetensors", tensors))
    assert (read.config.hidden_size, read.config.inner_size) == (INNER, INNER)


def refusal(path: Path) -> str:
    with pytest.raises(BadCheckpoint) as caught:
        formats.read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    tensors = hydra_tensors(1)
    del tensors["hydra_lm_head.1.bias"]
    tensors["stranger"] = torch.zeros(1)
    message = refusal(save(tmp_path / "a", HYDRA_CONFIG, "hydra_lm_head.pt", tensors))
    assert "hydra_lm_head.1.bias is missing" in message
    assert "stranger is unexpected" in message
    gap = {name: t for name, t in hydra_tensors(1).items() if not name.startswith("hydra_mlp.1.")}
    message = refusal(save(tmp_path / "b", HYDRA_CONFIG, "hydra_lm_head.pt", gap))
    assert "hydra_mlp.1.0.linear.weight is missing" in message
    message = refusal(
        save(tmp_path / "c", {"hydra_head_arch": "eagle-attn"}, "hydra_lm_head.pt", {"fc.bias": torch.ones(1)})
    )
    assert "hydra_head_arch 'eagle-attn' is not known; mlp and prefix-mlp are" in message
    message = refusal(save(tmp_path / "d", {**HYDRA_CONFIG, "hidden_state_offset": 2}, "h.pt", hydra_tensors(1)))
    assert "hidden_state_offset is 2" in message
    message = refusal(save(tmp_path / "e", {"clover": [1]}, "model.safetensors", clover_tensors()))
    assert "clover must be an object with num_heads" in message
    assert "n_predict 10000000000, 3 embeddings are there" in refusal(mlp(tmp_path / "f", {"n_predict": 10**10}))
    assert "vocab_size 39, the tensors 40" in refusal(mlp(tmp_path / "g", {"vocab_size": V - 1}))
    untied = mlp_tensors(tied=True, copies=True) | {"speculator.emb.2.weight": torch.zeros(V, INNER)}
    message = refusal(save(tmp_path / "h", {**MLP_CONFIG, "tie_weights": True}, "model.safetensors", untied))
    assert "speculator.emb.2.weight differs from the first of its kind" in message
    damaged = {**HYDRA_CONFIG, "prefix_config": {"hidden_size": 16}}
    message = refusal(save(tmp_path / "i", damaged, "hydra_lm_head.pt", hydra_tensors(1, prefix=True)))
    assert "prefix_config lacks the fields intermediate_size" in message


def test_flags_that_readers_take_differently_are_always_written(tmp_path: Path) -> None:
    config = {"model_type": "mlp_speculator", "n_predict": K}
    read = formats.read(save(tmp_path / "source", config, "model.safetensors", mlp_tensors()))
    formats.write(read, tmp_path / "out", "mlp_speculator")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        k: v for k, v in MLP_CONFIG.items() if k != "torch_dtype"
    }
    layer = LayerConfig(D, INNER, 4, 2, 4, rope_theta=5e5)
    head = CloverHead(CloverConfig(layer, V))
    formats.write(HeadCheckpoint("clover", head.config, head.state_dict()), tmp_path / "clover", "clover2")
    written = json.loads((tmp_path / "clover" / "config.json").read_text())
    assert written["clover"] == {
        "num_heads": 5,
        "num_layers": 2,
        "heads_coefficient": 1.0,
        "decay_coefficient": 0.7,
        "rope_theta": 5e5,
    }
    assert formats.read(tmp_path / "clover").config == head.config


@pytest.mark.parametrize(
    "change", [{"head_dim": 8}, {"attention_bias": True, "output_bias": True}, {"qk_norm": True}], ids=str
)
def test_clover_layers_that_the_published_code_cannot_hold_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    head = CloverHead(CloverConfig(replace(LayerConfig(D, INNER, 4, 2, 4), **change), V))
    with pytest.raises(BadCheckpoint, match=r"plain form, and this head's have .*; write native"):
        formats.write(HeadCheckpoint("clover", head.config, head.state_dict()), tmp_path / "out", "clover2")


def made_for(model: Any, kind: str, folder: Path) -> Path:
    """A random head for this target, in its published format."""
    head: Any = made(kind, target_of(model))
    name = {"mlp": "mlp-speculator", "hydra-plus-plus": "hydra"}.get(kind, kind)
    assert isinstance(head, HEADS[name].head)
    format_name = {"mlp-speculator": "mlp_speculator", "clover": "clover2"}.get(name, name)
    formats.write(HeadCheckpoint(name, head.config, head.state_dict()), folder, format_name)
    return folder


@pytest.mark.parametrize("kind", ["hydra", "hydra-plus-plus", "clover", "mlp"])
def test_a_published_directory_drafts_by_its_path(kind: str, tmp_path: Path) -> None:
    model = tiny_model("llama", "sdpa", layers=2)
    path = made_for(model, kind, tmp_path / "head")
    ids = torch.arange(3, 14)[None]
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    output: Any = specdec.generate(
        model, input_ids=ids, attention_mask=torch.ones_like(ids), drafter=f"{path}:budget=6,grow=eagle2",
        max_new_tokens=20, do_sample=False, return_dict_in_generate=True,
    )  # fmt: skip
    assert output.sequences.tolist() == plain.tolist()
    assert output.stats.drafted > 20
    with pytest.raises(DrafterMismatch, match="made for another target"):
        specdec.load_drafter(path, shared_target())


def test_what_a_hydra_plus_plus_file_leaves_open_is_taken_from_the_target(tmp_path: Path) -> None:
    """Trainers do not write the layer's heads, rotary base and norm."""
    model = tiny_model("llama", "sdpa", layers=2)
    path = made_for(model, "hydra-plus-plus", tmp_path)
    config = json.loads((path / "config.json").read_text())
    described = config.pop("prefix_config")
    (path / "config.json").write_text(json.dumps(config))
    read = formats.read(path).config
    assert isinstance(read, HydraConfig)
    assert read.prefix_from_target
    assert read.prefix is not None
    assert read.prefix.head_dim != described["head_dim"], "the guess must be wrong here to be a test"
    drafter = specdec.load_drafter(path, model)
    assert isinstance(drafter, SequentialDrafter)
    layer = cast(Any, drafter.module).config.prefix
    assert layer == LayerConfig(**described)
    assert cast(Any, drafter.module).prefix.layers[0].self_attn.head_dim == described["head_dim"]
    wide = tiny_model("llama", "sdpa", layers=2).config
    wide.intermediate_size = 64
    with pytest.raises(ValueError, match=r"'inner': 48.*'inner': 64"):
        read.fitted_to(wide)
