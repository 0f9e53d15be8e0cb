"""EAGLE-3 in three layouts: read as published, rewritten as it was, converted, and refused where readers would err."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec import formats
from specdec.errors import BadCheckpoint
from specdec.formats.checkpoint import HeadCheckpoint
from specdec.heads.eagle3 import Eagle3Config, Eagle3Head
from specdec.heads.layer import LayerConfig, causal_mask
from tests.formats.published import configs_in, random_tensors, same_bytes, save, tensors_in
from tests.heads.plain import Weights, with_random_weights
from tests.heads.test_eagle3 import recomputed

D, V, HEADS, GROUPS, SIZE, MLP = 16, 40, 4, 2, 6, 24
CHOSEN = torch.tensor([0, 3, 4, 9, 17, 39])
N = len(CHOSEN)
LAYER = LayerConfig(D, MLP, HEADS, GROUPS, SIZE, rms_norm_eps=1e-5, rope_theta=5e5, max_position_embeddings=2048)
PLAIN = Eagle3Config(LAYER, V, N)
LAYOUTS = {"eagle3": "midlayer.", "vllm_eagle3": "layers.0.", "speculators_eagle3": "layers.0."}

SIZES: dict[str, Any] = {
    "attention_bias": False, "head_dim": SIZE, "hidden_act": "silu", "hidden_size": D, "intermediate_size": MLP,
    "max_position_embeddings": 2048, "mlp_bias": False, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS,
    "num_hidden_layers": 1, "rms_norm_eps": 1e-05, "vocab_size": V,
}  # fmt: skip
FLAT: dict[str, Any] = {
    **SIZES, "architectures": ["LlamaForCausalLMEagle3"], "bos_token_id": 1, "model_type": "llama",
    "rope_theta": 500000.0, "pretraining_tp": 1, "torch_dtype": "float16", "draft_vocab_size": N,
}  # fmt: skip
"""As SafeAILab has it: no layer ids and no flags."""
NESTED: dict[str, Any] = {
    "architectures": ["Eagle3DraftModel"],
    "draft_vocab_size": N,
    "eagle_aux_hidden_state_layer_ids": [2, 6, 9],
    "norm_before_residual": True,
    "norm_before_fc": False,
    "speculators_model_type": "eagle3",
    "speculators_version": "0.5.0",
    "speculators_config": {
        "algorithm": "eagle3",
        "default_proposal_method": "greedy",
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
        "verifier": {"name_or_path": "somebody/target", "architectures": ["LlamaForCausalLM"]},
    },
    "transformer_layer_config": {
        **SIZES, "model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}
    },
}  # fmt: skip
"""As the speculators library has it."""


def config_of(layout: str) -> dict[str, Any]:
    return json.loads(json.dumps(NESTED if layout == "speculators_eagle3" else FLAT))


def shapes(
    first: str = "midlayer.", *, guesses: int = N, taps: int = 3, layers: int = 1, embedding: bool = False
) -> dict[str, tuple[int, ...]]:
    """Names and shapes as published."""
    named: dict[str, tuple[int, ...]] = {
        "fc.weight": (D, taps * D),
        "norm.weight": (D,),
        "lm_head.weight": (guesses, D),
    }
    for i, prefix in enumerate([first, *(f"layers.{i}." for i in range(1, layers))]):
        width = D if i else 2 * D
        named |= {
            f"{prefix}input_layernorm.weight": (D,),
            f"{prefix}post_attention_layernorm.weight": (D,),
            f"{prefix}self_attn.q_proj.weight": (HEADS * SIZE, width),
            f"{prefix}self_attn.k_proj.weight": (GROUPS * SIZE, width),
            f"{prefix}self_attn.v_proj.weight": (GROUPS * SIZE, width),
            f"{prefix}self_attn.o_proj.weight": (D, HEADS * SIZE),
            f"{prefix}mlp.gate_proj.weight": (MLP, D),
            f"{prefix}mlp.up_proj.weight": (MLP, D),
            f"{prefix}mlp.down_proj.weight": (D, MLP),
        } | ({} if i else {f"{prefix}hidden_norm.weight": (D,)})  # fmt: skip
    return named | ({"embed_tokens.weight": (V, D)} if embedding else {})


def vocabulary() -> dict[str, Tensor]:
    t2d = torch.zeros(V, dtype=torch.bool).index_fill(0, CHOSEN, True)
    return {"d2t": CHOSEN - torch.arange(N), "t2d": t2d}


def published(folder: Path, layout: Any = "eagle3", config: Any = None, **changes: Any) -> Path:
    """A directory in a layout; changes are tensors by name, None to leave one out."""
    tensors = random_tensors(shapes(LAYOUTS[layout]), dtype=torch.bfloat16) | vocabulary() | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return save(folder, config or config_of(layout), "model.safetensors", kept)


def own_head(config: Eagle3Config, layers: int | None = 12) -> HeadCheckpoint:
    head = with_random_weights(Eagle3Head(config), 3)
    if head.d2t is not None:
        head.choose_vocabulary(CHOSEN.tolist())
    target = {"vocab_size": V, "hidden_size": config.feature_size} | ({} if layers is None else {"num_layers": layers})
    return HeadCheckpoint("eagle3", config, dict(head.state_dict()), target)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_directory_is_recognised_and_read(layout: str, tmp_path: Path) -> None:
    checkpoint = formats.read(published(tmp_path / "a", layout))
    assert (checkpoint.format, checkpoint.kind) == (layout, "eagle3")
    said: dict[str, Any] = {}
    if layout == "speculators_eagle3":
        said = {"taps": (2, 6, 9), "norm_before_residual": True}
        assert checkpoint.target == {"vocab_size": V, "hidden_size": D, "name": "somebody/target"}
    assert checkpoint.config == replace(PLAIN, **said)
    assert checkpoint.tensors["t2d"].equal(vocabulary()["t2d"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_reads_the_same_and_is_written_the_same(layout: str, tmp_path: Path) -> None:
    original = published(tmp_path / "original", layout)
    first = formats.read(original)
    formats.write(first, tmp_path / "one", layout)
    second = formats.read(tmp_path / "one")
    formats.write(second, tmp_path / "two", layout)
    assert replace(second, tensors={}) == replace(first, tensors={})
    assert same_bytes(tensors_in(original), tensors_in(tmp_path / "one"))
    assert same_bytes(tensors_in(tmp_path / "one"), tensors_in(tmp_path / "two"))
    assert configs_in(tmp_path / "one") == configs_in(tmp_path / "two")


@pytest.mark.parametrize("layout", ["eagle3", "speculators_eagle3"])
def test_the_fields_of_a_published_config_keep_their_values(layout: str, tmp_path: Path) -> None:
    formats.write(formats.read(published(tmp_path / "a", layout)), tmp_path / "b", layout)
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    expected = config_of(layout)
    inner = expected.pop("transformer_layer_config", {})
    assert {key: written[key] for key in expected} == expected
    assert {key: written.get("transformer_layer_config", {})[key] for key in inner} == inner


def test_a_pickle_stays_a_pickle(tmp_path: Path) -> None:
    tensors = random_tensors(shapes()) | vocabulary()
    checkpoint = formats.read(save(tmp_path / "a", FLAT, "pytorch_model.bin", tensors))
    formats.write(checkpoint, tmp_path / "b", "eagle3")
    assert same_bytes(torch.load(tmp_path / "b" / "pytorch_model.bin", weights_only=True), tensors)


VARIANTS: dict[str, tuple[Eagle3Config, set[str]]] = {
    "plain": (PLAIN, set(LAYOUTS)),
    "named taps": (replace(PLAIN, taps=(1, 5, 12)), set(LAYOUTS)),
    "taps from the embedding on": (replace(PLAIN, taps=(0, 1, 2, 3), num_taps=4), set(LAYOUTS)),
    "norm before residual": (replace(PLAIN, norm_before_residual=True), {"vllm_eagle3", "speculators_eagle3"}),
    "norm before fc": (replace(PLAIN, norm_before_fc=True), set(LAYOUTS)),
    "3.1": (replace(PLAIN, fc_norm=True, norm_output=True), set(LAYOUTS)),
    "two layers": (replace(PLAIN, num_layers=2), {"vllm_eagle3", "speculators_eagle3"}),
    "norms of heads": (replace(PLAIN, layer=replace(LAYER, qk_norm=True)), {"vllm_eagle3", "speculators_eagle3"}),
    "a window": (replace(PLAIN, sliding_window=7), {"vllm_eagle3", "speculators_eagle3"}),
    "a bias of fc": (replace(PLAIN, fc_bias=True), {"eagle3"}),
    "biases": (replace(PLAIN, layer=replace(LAYER, attention_bias=True, output_bias=True)), set(LAYOUTS)),
    "biases of q, k and v": (replace(PLAIN, layer=replace(LAYER, attention_bias=True)), {"eagle3"}),
    "the whole vocabulary": (replace(PLAIN, draft_vocab_size=V), set(LAYOUTS)),
    "the target's output": (replace(PLAIN, draft_vocab_size=V, own_lm_head=False), {"eagle3", "vllm_eagle3"}),
    "an own embedding": (replace(PLAIN, own_embedding=True), set(LAYOUTS)),
    "a wider target": (replace(PLAIN, target_hidden_size=20, own_embedding=True), {"eagle3", "vllm_eagle3"}),
    "llama 3.1's positions": (replace(PLAIN, layer=replace(LAYER, rope_scaling={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192})), set(LAYOUTS)),
}  # fmt: skip
"""Configurations, and the layouts whose readers compute them."""
WORKS = [(name, layout) for name, (_, able) in VARIANTS.items() for layout in LAYOUTS if layout in able]
FAILS = [(name, layout) for name, (_, able) in VARIANTS.items() for layout in LAYOUTS if layout not in able]


@pytest.mark.parametrize(("name", "layout"), WORKS)
def test_every_variant_survives_the_layouts_that_can_hold_it(name: str, layout: str, tmp_path: Path) -> None:
    checkpoint = own_head(VARIANTS[name][0])
    formats.write(checkpoint, tmp_path / "one", layout)
    read = formats.read(tmp_path / "one")
    taps = checkpoint.config.taps or (2, 6, 9)  # the standard ones of a target of 12 layers are named in the file
    assert read.config == replace(checkpoint.config, taps=taps)
    assert same_bytes(read.tensors, checkpoint.tensors)
    formats.write(read, tmp_path / "two", layout)
    assert configs_in(tmp_path / "one") == configs_in(tmp_path / "two")
    assert same_bytes(tensors_in(tmp_path / "one"), tensors_in(tmp_path / "two"))


@pytest.mark.parametrize(("name", "layout"), FAILS)
def test_a_variant_that_a_layouts_readers_do_not_compute_is_refused(name: str, layout: str, tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=f"{layout} (cannot hold|has one field)") as caught:
        formats.write(own_head(VARIANTS[name][0]), tmp_path / "a", layout)
    assert "write" in str(caught.value), "it says what to do"
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("start", LAYOUTS)
@torch.no_grad()
def test_converted_heads_compute_the_same(start: str, to: str, tmp_path: Path) -> None:
    """Recomputed from the raw tensors of the last file."""
    formats.write(own_head(replace(PLAIN, fc_norm=True, norm_output=True)), tmp_path / "start", start)
    formats.write(formats.read(tmp_path / "start"), tmp_path / "to", to)
    checkpoint = formats.read(tmp_path / "to")
    head = Eagle3Head(checkpoint.config).eval()
    head.load_state_dict(checkpoint.tensors)
    raw = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors_in(tmp_path / "to").items()}
    generator = torch.Generator().manual_seed(2)
    embeddings, features = torch.randn(5, D, generator=generator), torch.randn(5, 3 * D, generator=generator)
    states = head(embeddings[None], head.encode(features[None]), torch.arange(5)[None], causal_mask(5, features))
    expected, logits = recomputed(Weights(raw), checkpoint.config, embeddings, features)
    torch.testing.assert_close(states[0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(head.logits(states, lambda s: s)[0], logits, atol=1e-5, rtol=1e-5)


def test_layer_ids_are_written_in_both_conventions(tmp_path: Path) -> None:
    """vLLM reads layers that have run, SGLang layers whose output is taken; both mean the states entering 2, 6, 9."""
    for layout in ("eagle3", "vllm_eagle3"):
        formats.write(own_head(PLAIN), tmp_path / layout, layout)
        written = json.loads((tmp_path / layout / "config.json").read_text())
        assert written["eagle_aux_hidden_state_layer_ids"] == [2, 6, 9]
        assert written["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 5, 8]
        assert written["num_aux_hidden_states"] == 3
    formats.write(own_head(PLAIN), tmp_path / "s", "speculators_eagle3")
    assert json.loads((tmp_path / "s" / "config.json").read_text())["eagle_aux_hidden_state_layer_ids"] == [2, 6, 9]


def test_without_a_known_target_the_standard_layers_are_left_to_the_reader(tmp_path: Path) -> None:
    formats.write(own_head(PLAIN, layers=None), tmp_path / "a", "eagle3")
    written = json.loads((tmp_path / "a" / "config.json").read_text())
    assert "eagle_aux_hidden_state_layer_ids" not in written
    assert written["eagle_config"] == {"use_aux_hidden_state": True}
    assert formats.read(tmp_path / "a").config.taps is None


@pytest.mark.parametrize(
    ("top", "nested", "taps"),
    [
        (None, None, None),
        ([2, 6, 9], None, (2, 6, 9)),
        (None, [1, 5, 8], (2, 6, 9)),
        ([2, 6, 9], [1, 5, 8], (2, 6, 9)),
    ],
)
def test_layer_ids_are_read_from_either_place(
    top: list[int] | None, nested: list[int] | None, taps: tuple[int, ...] | None, tmp_path: Path
) -> None:
    config = dict(FLAT)
    if top:
        config["eagle_aux_hidden_state_layer_ids"] = top
    if nested:
        config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": nested}
    assert formats.read(published(tmp_path / "a", config=config)).config.taps == taps


@pytest.mark.parametrize("flag", ["norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_flag_is_written_set_or_not(layout: str, flag: str, tmp_path: Path) -> None:
    formats.write(own_head(PLAIN), tmp_path / "off", layout)
    assert json.loads((tmp_path / "off" / "config.json").read_text())[flag] is False
    if (layout, flag) != ("eagle3", "norm_before_residual"):
        formats.write(own_head(replace(PLAIN, **{flag: True})), tmp_path / "on", layout)
        assert json.loads((tmp_path / "on" / "config.json").read_text())[flag] is True


def test_norms_of_the_first_eagle_3_1_files_are_known_under_their_old_names(tmp_path: Path) -> None:
    norms = {
        f"aux_norm_{place}.weight": torch.full((D,), float(value))
        for value, place in enumerate(("low", "mid", "high"), 1)
    }
    checkpoint = formats.read(published(tmp_path / "a", config={**FLAT, "norm_output": True}, **norms))
    assert checkpoint.config.fc_norm
    assert [float(checkpoint.tensors[f"fc_norm.{k}.weight"][0]) for k in range(3)] == [1, 2, 3]


@pytest.mark.parametrize("marked", [True, False], ids=["with t2d", "without t2d"])
def test_tokens_in_place_of_offsets_are_noticed_and_turned(marked: bool, tmp_path: Path) -> None:
    """39 + 5 lies outside the vocabulary of 40, so that these cannot be offsets even without t2d."""
    changes = {"d2t": CHOSEN} | ({} if marked else {"t2d": None})
    checkpoint = formats.read(published(tmp_path / "a", **changes))
    assert checkpoint.tensors["d2t"].tolist() == (CHOSEN - torch.arange(N)).tolist()
    assert checkpoint.tensors["t2d"].nonzero().flatten().tolist() == CHOSEN.tolist()


def test_numbers_that_could_be_either_are_told_by_t2d_and_else_are_offsets(tmp_path: Path) -> None:
    either = torch.tensor([0, 1, 2, 3, 4, 5])
    first = torch.zeros(V, dtype=torch.bool).index_fill(0, either, True)
    assert formats.read(published(tmp_path / "a", d2t=either, t2d=first)).tensors["d2t"].tolist() == [0] * 6
    assert formats.read(published(tmp_path / "b", d2t=either, t2d=None)).tensors["d2t"].tolist() == either.tolist()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"d2t": None}, "d2t is missing"),
        ({"d2t": torch.zeros(N)}, "d2t holds float32, expected int numbers"),
        ({"d2t": torch.full((N,), 1000)}, "d2t does not name 6 different tokens of a vocabulary of 40"),
        ({"d2t": torch.zeros(N + 1, dtype=torch.long)}, r"d2t has shape \[7\], expected \[6\]"),
        ({"t2d": torch.ones(V, dtype=torch.bool)}, "t2d does not mark the tokens that d2t names"),
        ({"t2d": torch.ones(V + 1, dtype=torch.bool)}, r"t2d has shape \[41\], expected \[40\]"),
    ],
    ids=["missing", "float", "outside", "another length", "other tokens", "another vocabulary"],
)  # fmt: skip
def test_a_wrong_vocabulary_is_named(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=said):
        formats.read(published(tmp_path / "a", **changes))


def test_a_map_of_a_vocabulary_that_is_not_reduced_must_be_the_identity(tmp_path: Path) -> None:
    whole = {"lm_head.weight": torch.zeros(V, D), "t2d": torch.ones(V, dtype=torch.bool)}
    config = {**FLAT, "draft_vocab_size": V}
    fine = formats.read(published(tmp_path / "a", config=config, **whole, d2t=torch.zeros(V, dtype=torch.long)))
    assert not {"d2t", "t2d"} & set(fine.tensors)
    with pytest.raises(BadCheckpoint, match="d2t maps a vocabulary that is not reduced"):
        formats.read(published(tmp_path / "b", config=config, **whole, d2t=torch.ones(V, dtype=torch.long)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("norm.weight", None), "norm.weight is missing"),
        (("FIRSTmlp.up_proj.weight", None), r"layers.0.mlp.up_proj.weight is missing"),
        (("mask_hidden", torch.zeros(1, 1, 3 * D)), "mask_hidden is unexpected"),
        (("FIRSTself_attn.q_proj.weight", torch.zeros(HEADS * SIZE, D)), "self_attn.q_proj.weight has shape"),
        (("fc.weight", torch.zeros(D, 3 * D + 1)), "reads 49, no multiple of 16"),
        (("fc.weight", None), "fc.weight is missing"),
    ],
    ids=["missing", "missing in the layer", "extra", "as wide as EAGLE-1's", "a wrong fusion", "no fusion"],
)  # fmt: skip
def test_missing_extra_and_wrong_shaped_tensors_are_named(
    layout: str, change: tuple[str, Tensor | None], said: str, tmp_path: Path
) -> None:
    name = change[0].replace("FIRST", LAYOUTS[layout])
    with pytest.raises(BadCheckpoint, match=said):
        formats.read(published(tmp_path / "a", layout, **{name: change[1]}))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"draft_vocab_size": 7}, "lm_head.weight has 6 rows, draft_vocab_size is 7"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2]}, "3 taps need"),
        ({"eagle_aux_hidden_state_layer_ids": "low"}, "expected a list of layer numbers"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2, 3],
          "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}}, r"keep the one that the head was trained"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state is false"),
        ({"eagle_config": [1]}, "expected an object"),
        ({"norm_before_fc": True}, "input_norm.weight is missing"),
        ({"fc_norm": True}, "fc_norm.0.weight is missing"),
        ({"fc_norm": True, "norm_before_fc": True}, "exclude each other"),
        ({"norm_output": "yes"}, "norm_output is 'yes'"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layers are of one kind"),
        ({"target_hidden_size": 20}, "no multiple of 20"),
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"hidden_size": None}, "lacks hidden_size"),
    ],
)  # fmt: skip
def test_a_config_that_makes_no_sense_gets_one_line(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    config = {key: value for key, value in {**FLAT, **fields}.items() if value is not None}
    with pytest.raises(BadCheckpoint, match=said) as caught:
        formats.read(published(tmp_path / "a", config=config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"transformer_layer_config": None}, "lacks transformer_layer_config"),
        ({"transformer_layer_config": [1]}, "no config of a layer"),
        ({"speculators_config": {"algorithm": "eagle3"}}, "does not name a verifier"),
    ],
)
def test_a_speculators_config_that_makes_no_sense_gets_one_line(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    config = {key: value for key, value in {**NESTED, **change}.items() if value is not None}
    with pytest.raises(BadCheckpoint, match=said):
        formats.read(published(tmp_path / "a", "speculators_eagle3", config))


def test_the_librarys_default_counts_where_a_flag_is_absent(tmp_path: Path) -> None:
    """vLLM would take true; the library that owns the format takes false."""
    config = {key: value for key, value in NESTED.items() if key != "norm_before_residual"}
    assert not formats.read(published(tmp_path / "a", "speculators_eagle3", config)).config.norm_before_residual
