"""A draft layer's sizes as config.json has them: read from the fields of any family, written under Llama's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from specdec.errors import BadCheckpoint
from specdec.formats.checkpoint import Config, config_from_json
from specdec.formats.folder import Folder
from specdec.heads.layer import LayerConfig

LAYER_FIELDS = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps",
    "hidden_act", "attention_bias", "mlp_bias", "max_position_embeddings", "rope_theta", "rope_scaling",
    "rope_parameters", "partial_rotary_factor",
)  # fmt: skip
"""Fields of config.json that `layer_json` makes anew."""

LARGEST = 1 << 24
"""No size of a model comes near this; a larger one is a damaged file."""


def read_layer(raw: Mapping[str, Any], where: str) -> LayerConfig:
    """The sizes in a JSON object.

    Raises:
        BadCheckpoint: a size that is missing, no number, or out of range.
    """
    for name in ("hidden_size", "num_attention_heads"):
        if name not in raw:
            raise BadCheckpoint(f"{where} lacks {name}")
    try:
        layer = LayerConfig.of(raw)
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise BadCheckpoint(f"{where} does not describe a layer: {error}") from error
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
        if not 1 <= getattr(layer, name) <= LARGEST:
            raise BadCheckpoint(f"{where}: {name} is {getattr(layer, name)}, which no model has")
    if layer.num_attention_heads % layer.num_key_value_heads:
        heads = f"{layer.num_attention_heads} query and {layer.num_key_value_heads} key-value heads"
        raise BadCheckpoint(f"{where}: {heads} do not form groups")
    return layer


def layer_json(layer: LayerConfig, format: str) -> dict[str, Any]:
    """Fields of config.json for these sizes; positions as newer and as older readers look for them.

    Raises:
        BadCheckpoint: projections of which only some have biases; the one field for it says all or none.
    """
    if layer.attention_bias != layer.output_bias:
        raise BadCheckpoint(
            f"{format} has one field for the biases of all four projections of attention, and these differ; "
            "write native"
        )
    written = {
        "hidden_size": layer.hidden_size,
        "intermediate_size": layer.intermediate_size,
        "num_attention_heads": layer.num_attention_heads,
        "num_key_value_heads": layer.num_key_value_heads,
        "head_dim": layer.head_dim,
        "rms_norm_eps": layer.rms_norm_eps,
        "hidden_act": layer.hidden_act,
        "attention_bias": layer.attention_bias,
        "mlp_bias": layer.mlp_bias,
        "max_position_embeddings": layer.max_position_embeddings,
        "rope_theta": layer.rope_theta,
        "rope_scaling": layer.rope_scaling,
        "rope_parameters": {"rope_type": "default", "rope_theta": layer.rope_theta, **(layer.rope_scaling or {})},
    }
    if layer.partial_rotary_factor != 1.0:
        written["partial_rotary_factor"] = layer.partial_rotary_factor
        written["rope_parameters"]["partial_rotary_factor"] = layer.partial_rotary_factor
    return written


def rest_of_config(folder: Folder, made_anew: tuple[str, ...]) -> dict[str, Any]:
    """Fields of config.json that a rewrite takes over as they are."""
    return {key: value for key, value in folder.config.items() if key not in (*LAYER_FIELDS, *made_anew)}


def checked_config(config_class: type[Config], where: str, **values: Any) -> Config:
    """A configuration object from values of a file, whose types are held to the annotations.

    Raises:
        BadCheckpoint: names the field that is of another type, or what the object refuses.
    """
    plain = {key: asdict(value) if is_dataclass(value) else value for key, value in values.items()}  # type: ignore[arg-type]
    return config_from_json(config_class, plain, where)
