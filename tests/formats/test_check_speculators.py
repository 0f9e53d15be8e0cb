"""The half of scripts/check_speculators.py that runs here: what it writes is what it says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from specdec import formats
from specdec.heads.eagle3 import Eagle3Head
from specdec.heads.layer import causal_mask

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_speculators.py"


def script() -> Any:
    spec = importlib.util.spec_from_file_location("check_speculators", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def test_cases_of_eagle3_differ_and_hold_the_outputs_of_the_head_in_their_file(tmp_path: Path) -> None:
    module = script()
    module.write(tmp_path)
    seen = set()
    for saved in sorted((tmp_path / "eagle3").glob("*.safetensors")):
        tensors = load_file(saved)
        checkpoint = formats.read(saved.with_suffix(""))
        assert checkpoint.format == "speculators_eagle3"
        seen.add(repr(checkpoint.config))
        head = Eagle3Head(checkpoint.config).eval()
        head.load_state_dict(checkpoint.tensors)
        if checkpoint.config.own_embedding and checkpoint.config.sliding_window is None:
            assert head.embed_tokens is not None
            states = head.encode(tensors["in.features"])
            positions = torch.arange(module.LENGTH)[None]
            mask = causal_mask(module.LENGTH, states)
            states = head(head.embed_tokens(tensors["in.tokens"]), states, positions, mask)
            torch.testing.assert_close(head.logits(states, lambda s: s), tensors["out.logits_0"])
        assert {name for name in tensors if name.startswith("out.")} == {f"out.logits_{step}" for step in range(3)}
        said = json.loads((saved.with_suffix("") / "config.json").read_text())
        assert said["speculators_config"]["verifier"]["name_or_path"] == str(tmp_path / "eagle3" / "target")
    assert len(seen) == 12
