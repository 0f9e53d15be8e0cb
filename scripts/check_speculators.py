"""Do checkpoints that we write in the speculators format load in that library, and give the same logits there?

Its pins and ours do not meet in one environment, so it takes two and a directory between them:

    python scripts/check_speculators.py write DIR       # here: a tiny target, heads, inputs and our outputs
    python scripts/check_speculators.py compare DIR     # there: the same inputs through the library's own models

The library needs neither vLLM nor a GPU. On a CPU its dependencies on torchvision and torchaudio have to be left out
(their builds ask for CUDA), and what it imports installed beside it:

    python -m venv there && . there/bin/activate
    pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    pip install --no-deps speculators==0.9.0 hs-connectors==0.9.0
    pip install torch==2.13.0 "transformers<=5.19" "datasets<=5.1" aiohttp click httpx loguru openai protobuf psutil \\
        pydantic pydantic-settings

Loading alone shows nothing: the library makes up tensors that are missing or wrongly named. So `compare` holds every
tensor of the file to the loaded model's, bit for bit, before it compares outputs. Exit code 1 when anything differs.

A kind of head takes part with two functions in KINDS: one that writes its cases with specdec, and one that runs the
library's model on saved inputs. Nothing outside the `write_` functions imports specdec.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LARGEST_DIFFERENCE = 1e-5
HIDDEN, VOCAB, DRAFT_VOCAB, LAYERS, LENGTH = 32, 64, 24, 8, 20
Tensors = dict[str, Tensor]


class Kind(NamedTuple):
    """What this script does with one kind of head.

    write(target, folder): writes each case as `folder/<case>` in the speculators format, and `save_case`s what goes
        in and what comes out.
    run(model, inputs): the library's outputs by the names of ours.
    """

    write: Callable[[Any, Path], None]
    run: Callable[[Any, Tensors], Tensors]


def save_case(folder: Path, case: str, inputs: Tensors, outputs: Tensors) -> None:
    """Inputs and our outputs of one case, beside its checkpoint."""
    named = {f"in.{name}": tensor for name, tensor in inputs.items()} | {f"out.{n}": t for n, t in outputs.items()}
    save_file({name: tensor.contiguous() for name, tensor in named.items()}, folder / f"{case}.safetensors")


def make_target(folder: Path) -> Any:
    """A tiny Llama, saved where the heads' configs point to."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    target = LlamaForCausalLM(config).eval()
    target.save_pretrained(folder / "target")
    return target


def random_weights(module: torch.nn.Module) -> None:
    """Norms around 1, everything else wide enough to matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)


def write_eagle3(target: Any, folder: Path) -> None:
    """Every variant that the format can hold, each drafting three steps below every position."""
    from dataclasses import replace

    from specdec import formats
    from specdec.formats.checkpoint import HeadCheckpoint
    from specdec.heads.eagle3 import Eagle3Config, Eagle3Head
    from specdec.heads.layer import LayerConfig

    layer = LayerConfig.of(target.config)
    plain = Eagle3Config(layer, VOCAB, DRAFT_VOCAB)
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 64}  # fmt: skip
    cases = {
        "plain": plain,
        "norm_before_residual": replace(plain, norm_before_residual=True),
        "norm_before_fc": replace(plain, norm_before_fc=True),
        "eagle-3.1": replace(plain, fc_norm=True, norm_output=True),
        "whole_vocabulary": replace(plain, draft_vocab_size=VOCAB),
        "own_embedding": replace(plain, own_embedding=True),
        "two_layers": replace(plain, num_layers=2),
        "four_taps": replace(plain, num_taps=4, taps=(1, 3, 5, 8)),
        "biases": replace(plain, layer=replace(layer, attention_bias=True, output_bias=True)),
        "qwen3": replace(plain, layer=replace(layer, qk_norm=True)),
        "sliding_window": replace(plain, sliding_window=5),
        "llama3_positions": replace(plain, layer=replace(layer, rope_theta=5e5, rope_scaling=llama3)),
    }
    for case, config in cases.items():
        head = Eagle3Head(config).eval()
        random_weights(head)
        if head.d2t is not None:
            generator = torch.Generator().manual_seed(2)
            head.choose_vocabulary(torch.randperm(VOCAB, generator=generator)[:DRAFT_VOCAB].tolist())
        about = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_layers": LAYERS, "name": str(folder / "target")}
        checkpoint = HeadCheckpoint("eagle3", config, dict(head.state_dict()), about)
        formats.write(checkpoint, folder / case, "speculators_eagle3", overwrite=True)
        generator = torch.Generator().manual_seed(3)
        inputs = {
            "tokens": torch.randint(VOCAB, (1, LENGTH), generator=generator),
            "features": torch.randn(1, LENGTH, config.num_taps * HIDDEN, generator=generator),
        }
        save_case(folder, case, inputs, outputs_eagle3(head, target, inputs))


def outputs_eagle3(head: Any, target: Any, inputs: Tensors) -> Tensors:
    """Our logits of three steps: each position goes on from its own state, the past before it as it was made first.

    Tokens of later steps are the text's own, as in training; what lies beyond the end of the text is left out.
    """
    from specdec.heads.layer import causal_mask

    states = head.encode(inputs["features"])
    embedding = head.embed_tokens or target.get_input_embeddings()
    lowest, window = torch.finfo(states.dtype).min, head.config.sliding_window
    mask = causal_mask(LENGTH, states)
    if window is not None:
        mask = mask.masked_fill(torch.ones(LENGTH, LENGTH).tril(-window).bool(), lowest)
    own = torch.full_like(mask, lowest).masked_fill(torch.eye(LENGTH).bool(), 0.0)
    cache, outputs = _Columns(), {}
    for step in range(3):
        tokens = torch.cat([inputs["tokens"][:, step:], inputs["tokens"].new_zeros(1, step)], 1)
        positions = torch.arange(LENGTH)[None] + step
        states = head(embedding(tokens), states, positions, mask, cache)
        outputs[f"logits_{step}"] = head.logits(states, target.lm_head)[:, : LENGTH - step]
        mask = torch.cat([mask, own], -1)
    return outputs


class _Columns:
    """Keys and values of all steps, side by side."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        if layer in self._layers:
            before = self._layers[layer]
            keys, values = torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2)
        self._layers[layer] = keys, values
        return keys, values


def run_eagle3(model: Any, inputs: Tensors) -> Tensors:
    """The library's logits of three steps, taken where they leave its output matrix."""
    seen: list[Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
    documents = torch.zeros(1, LENGTH, dtype=torch.long)
    model(inputs["features"], inputs["tokens"], documents, ttt_steps=3)
    hook.remove()
    return {f"logits_{step}": logits[:, : LENGTH - step] for step, logits in enumerate(seen)}


def write_dflash(target: Any, folder: Path) -> None:
    """Every variant that the format can hold, each drafting blocks below several anchors of one text.

    Windows are longer than the text: the library counts them from the anchor, servers and specdec from each token.
    """
    from dataclasses import replace

    from specdec import formats
    from specdec.formats.checkpoint import HeadCheckpoint
    from specdec.heads.dflash import DFlashConfig, DFlashHead

    plain = DFlashConfig.of(target.config, mask_token_id=VOCAB - 1, num_layers=2, block_size=6, taps=(2, 4, 5))
    sliding = replace(plain, sliding_layers=(1,), sliding_window=4 * LENGTH)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    cases = {
        "plain": plain,
        "reduced_vocabulary": replace(plain, draft_vocab_size=DRAFT_VOCAB),
        "sliding": sliding,
        "sliding_both_ways": replace(sliding, causal=False),
        "all_sliding": replace(sliding, sliding_layers=(0, 1)),
        "from_anchor": replace(plain, sample_from_anchor=True),
        "one_layer_one_tap": replace(plain, num_layers=1, taps=(5,)),
        "biases": replace(plain, layer=replace(plain.layer, attention_bias=True, output_bias=True)),
        "yarn_positions": replace(plain, layer=replace(plain.layer, rope_theta=5e5, rope_scaling=yarn)),
    }
    for case, config in cases.items():
        head = DFlashHead(config).eval()
        random_weights(head)
        generator = torch.Generator().manual_seed(2)
        if head.d2t is not None and head.t2d is not None:
            chosen = torch.randperm(VOCAB, generator=generator)[:DRAFT_VOCAB].sort().values
            head.d2t.copy_(chosen - torch.arange(DRAFT_VOCAB))
            head.t2d.zero_().index_fill_(0, chosen, True)
        about = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_layers": LAYERS, "name": str(folder / "target")}
        checkpoint = HeadCheckpoint("dflash", config, dict(head.state_dict()), about)
        formats.write(checkpoint, folder / case, "speculators_dflash", overwrite=True)
        inputs = {
            "tokens": torch.randint(VOCAB, (1, LENGTH), generator=generator),
            "features": torch.randn(1, LENGTH, len(config.taps) * HIDDEN, generator=generator),
            "anchors": torch.tensor([0, 2, 7, 12]),
        }
        save_case(folder, case, inputs, outputs_dflash(head, target, inputs))


def outputs_dflash(head: Any, target: Any, inputs: Tensors) -> Tensors:
    """Our logits of all blocks in one forward."""
    from specdec.heads.dflash import InjectedFeatures, anchored_masks, block_ids

    config, anchors = head.config, inputs["anchors"]
    cache = InjectedFeatures()
    head.inject(head.features(inputs["features"]), torch.arange(LENGTH)[None], cache)
    ids = block_ids(inputs["tokens"][0, anchors], config).flatten()[None]
    positions = (anchors[:, None] + torch.arange(config.block_size)).flatten()[None]
    embedded = head.embed(ids, target.get_input_embeddings().weight)
    masks = anchored_masks(config, anchors, LENGTH, torch.float32)
    logits = head.logits(head(embedded, positions, masks, cache), target.lm_head)
    return {"logits": logits if head.lm_head is None else logits[..., head.token_ids]}


def run_dflash(model: Any, inputs: Tensors) -> Tensors:
    """The library's logits of blocks below the same anchors; it would pick them at random."""
    from speculators.models.dflash import core  # type: ignore[import-not-found]

    anchors = inputs["anchors"]
    core.select_anchors = lambda *_args, **_named: (anchors, torch.ones(len(anchors), dtype=torch.bool))
    ones, documents = torch.ones(1, LENGTH, dtype=torch.long), torch.zeros(1, LENGTH, dtype=torch.long)
    last = torch.zeros(1, LENGTH, HIDDEN)  # the target's own states, which are for the loss alone
    _, logits, *_ = model._backbone_forward(
        inputs["features"], inputs["tokens"], ones, last, documents, max_anchors=len(anchors)
    )
    return {"logits": logits}


KINDS = {
    "eagle3": Kind(write_eagle3, run_eagle3),
    "dflash": Kind(write_dflash, run_dflash),
}


@torch.no_grad()
def write(folder: Path) -> None:
    """All cases of all kinds, each kind in a folder of its own beside the target."""
    torch.set_num_threads(1)
    for name, kind in KINDS.items():
        at = folder.resolve() / name
        at.mkdir(parents=True, exist_ok=True)
        kind.write(make_target(at), at)
    print(f"wrote {', '.join(KINDS)} into {folder}")


@torch.no_grad()
def compare(folder: Path) -> bool:
    """Every case through the library; prints a line for each and says whether all agree."""
    torch.set_num_threads(1)
    agreed = []
    for name, kind in KINDS.items():
        for saved in sorted((folder.resolve() / name).glob("*.safetensors")):
            tensors = load_file(saved)
            model = load_in_library(saved.with_suffix(""))
            wrong = different_tensors(saved.with_suffix("") / "model.safetensors", model)
            got = kind.run(model, {key[3:]: tensor for key, tensor in tensors.items() if key.startswith("in.")})
            ours = {key[4:]: tensor for key, tensor in tensors.items() if key.startswith("out.")}
            difference = max(float((got[key] - ours[key]).abs().max()) for key in ours)
            agreed.append(not wrong and difference <= LARGEST_DIFFERENCE and got.keys() == ours.keys())
            size = max(float(tensor.abs().max()) for tensor in ours.values())
            print(f"{name:8} {saved.stem:22} largest difference {difference:.1e} of {size:.1f}", end="   ")
            print(f"tensors: {', '.join(wrong) or 'all equal'}   {'ok' if agreed[-1] else 'WRONG'}")
    if not agreed:
        print(f"nothing to compare in {folder}; run `write` first", file=sys.stderr)
    return bool(agreed) and all(agreed)


def load_in_library(folder: Path) -> Any:
    """The library's own model of a checkpoint, on plain attention; its default needs a GPU's kernels."""
    from speculators import SpeculatorModel, SpeculatorModelConfig  # type: ignore[import-not-found]

    config = SpeculatorModelConfig.from_pretrained(folder, local_files_only=True)
    config.transformer_layer_config._attn_implementation = "eager"
    model = SpeculatorModel.from_pretrained(str(folder), config=config, local_files_only=True).eval()
    if "embed_tokens.weight" not in load_file(folder / "model.safetensors"):
        # The library means to take the target's embedding then, as vLLM does, but asks for NaN after transformers has
        # already replaced it with random numbers (0.9.0 with transformers 5.19).
        model._load_verifier_weights(overwrite_embed_tokens=True)
    return model


def different_tensors(file: Path, model: Any) -> list[str]:
    """Names of tensors of the file that the model lacks or holds with other values."""
    held = dict(model.state_dict())
    return [
        name for name, tensor in load_file(file).items()
        if name not in held or held[name].shape != tensor.shape or not torch.equal(held[name].to(tensor.dtype), tensor)
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare written checkpoints with the speculators library.")
    parser.add_argument("what", choices=["write", "compare"])
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if given.what == "write":
        write(given.folder)
        return 0
    return 0 if compare(given.folder) else 1


if __name__ == "__main__":
    sys.exit(main())
