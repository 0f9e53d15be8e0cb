"""From a drafter's name to a drafter: `WORD[:option=value,...]`, a model path, a drafter directory or a published head.

lookup:ngram=3,tokens=10          prompt lookup
suffix:budget=12,branches=2       suffix automaton
recycling:budget=15               token recycling
early-exit:layer=2,depth=3        the target's own first layers
demo-draft:depth=4,budget=12      the draft model that ships with specdec
demo-eagle3:depth=4,budget=12     a draft head that ships: demo-medusa, -hydra, -eagle, -eagle3, -kangaroo
path/to/model:depth=4,budget=12   a draft model
path/to/drafter                   a directory with drafter.json
path/to/run                       the best drafter of a training run
suffix:min_match=5+NAME           a text match where there is one, any of the above elsewhere
path/to/heads:budget=30           a draft head in any format of specdec.formats
path/to/model:length=adaedl       any of the above under a length policy of specdec.lengths
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from specdec import demo, formats
from specdec.drafter import Drafter
from specdec.drafters.block import BlockDrafter
from specdec.drafters.directory import DrafterJson, check_fingerprint, drafter_in, read_drafter_json
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.eagle import EagleDrafter
from specdec.drafters.early_exit import EarlyExitDrafter
from specdec.drafters.head import head_for
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.kangaroo import KangarooDrafter
from specdec.drafters.limited import LimitedDrafter
from specdec.drafters.lookup import LookupDrafter
from specdec.drafters.medusa import MedusaDrafter
from specdec.drafters.recycling import RecyclingDrafter
from specdec.drafters.sequential import SequentialDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.errors import DrafterMismatch, UnknownDrafter
from specdec.lengths.acceptance_head import FILE as ACCEPTANCE_HEAD
from specdec.lengths.named import LENGTHS, options_of
from specdec.lengths.policy import LengthPolicy
from specdec.packed import is_packed, optimize
from specdec.probe import target_of
from specdec.vocabulary import check_vocabulary, vocab_size

WORDS: dict[str, Callable[..., Drafter]] = {
    "lookup": LookupDrafter,
    "suffix": SuffixDrafter,
    "recycling": RecyclingDrafter,
    "early-exit": EarlyExitDrafter,
    "demo-draft": DraftModelDrafter,
}
HEAD_DRAFTERS: dict[str, type[Any]] = {
    "medusa": MedusaDrafter,
    "hydra": SequentialDrafter,
    "clover": SequentialDrafter,
    "mlp-speculator": SequentialDrafter,
    "dflash": BlockDrafter,
    "eagle": EagleDrafter,
    "eagle3": EagleDrafter,
    "kangaroo": KangarooDrafter,
}
"""What drafts with each kind of head in `specdec.heads.kinds.HEADS`; called with the target, the head and options."""

TEXT_WORDS = ("lookup", "suffix", "recycling")
"""Drafters that look into the text alone; `WORD+NAME` asks another one where they propose nothing."""

NOT_OPTIONS = {"self", "target", "head", "vocab_size", "shape"}

_drafts: WeakKeyDictionary[PreTrainedModel, dict[tuple[Any, ...], PreTrainedModel]] = WeakKeyDictionary()


def load_drafter(spec: Drafter | PreTrainedModel | str | Path | None, model: PreTrainedModel) -> Drafter | None:
    """The drafter that `spec` names, ready for this target.

    Args:
        spec: a word with options, a path with options, a loaded draft model, a Drafter (checked and returned as
            it is), or None for no speculation.
        model: the target.

    Raises:
        UnknownDrafter: nothing of that name, a path that is not there, or a wrong option.
        DrafterMismatch: made for another target.
        BadCheckpoint: a draft head whose files are not what they claim.
    """
    if spec is None:
        return None
    if isinstance(spec, PreTrainedModel):
        return _draft_model(spec, model, {})
    if not isinstance(spec, str | Path):
        if isinstance(spec, type) or not isinstance(spec, Drafter):
            got = f"the class {spec.__name__}; make an object of it" if isinstance(spec, type) else type(spec).__name__
            raise UnknownDrafter(f"drafter is a name, a path, a model or a Drafter, got {got}")
        check_fits(spec, model)
        return spec
    match, _, rest = str(spec).partition("+")
    if rest and match.partition(":")[0] in TEXT_WORDS:
        first, second = load_drafter(match, model), load_drafter(rest, model)
        assert first is not None, "names are never None"
        assert second is not None, "names are never None"
        return HybridDrafter(first, second)
    name, options = parse_spec(str(spec))
    if name in WORDS:
        options, length = _split_length(options)
        return _limited(_from_word(name, options, model), length)
    return _from_path(demo.HEADS.get(name, Path(name).expanduser()), options, model)


def parse_spec(spec: str) -> tuple[str, dict[str, str]]:
    """Split `name:key=value,...`; after a path, a colon that is followed by no `key=` belongs to the name.

    Raises:
        UnknownDrafter: options that are not of this form, or one given twice.
    """
    name, colon, tail = spec.rpartition(":")
    word, _, rest = spec.partition(":")
    if word in WORDS and spec != word:
        name, tail = word, rest
    elif not colon or "=" not in tail or "/" in tail.split("=")[0]:
        return spec, {}
    options: dict[str, str] = {}
    for part in tail.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not key or not equals or not value:
            raise UnknownDrafter(f"drafter option {part!r} in {spec!r} is not of the form key=value")
        key = key.replace("-", "_")
        if key in options:
            raise UnknownDrafter(f"drafter option {key!r} is given twice in {spec!r}")
        options[key] = value
    return name, options


def check_fits(drafter: Drafter, model: PreTrainedModel) -> None:
    """Refuse a drafter object that was made for another target.

    Raises:
        DrafterMismatch: it runs another target's layers, or its vocabulary is another one.
    """
    if isinstance(drafter, HybridDrafter):
        check_fits(drafter.first, model)
        check_fits(drafter.second, model)
    wrapped = getattr(drafter, "drafter", None)  # a drafter that wraps another one holds it under this name
    if isinstance(wrapped, Drafter):
        check_fits(wrapped, model)
    vocabulary = vocab_size(model)
    if isinstance(drafter, EarlyExitDrafter) and drafter.target.model is not model:
        raise DrafterMismatch("this early-exit drafter runs the layers of another model; load one for this target")
    if isinstance(drafter, tuple(HEAD_DRAFTERS.values())) and cast(Any, drafter).target.model is not model:
        raise DrafterMismatch("this head reads the states of another model; load one for this target")
    if isinstance(drafter, RecyclingDrafter | DraftModelDrafter) and drafter.vocab_size != vocabulary:
        raise DrafterMismatch(
            f"this {type(drafter).__name__} has a vocabulary of {drafter.vocab_size} tokens, the target one of "
            f"{vocabulary}; load a drafter for this target"
        )


def _from_word(name: str, options: dict[str, str], model: PreTrainedModel) -> Drafter:
    values = typed_options(name, WORDS[name], options)
    if name == "demo-draft":
        return _draft_model(draft_for(demo.draft_path(), model), model, values)
    if name == "early-exit":
        return EarlyExitDrafter(target_of(model), **values)
    if name == "recycling":
        return RecyclingDrafter(vocab_size(model), **values)
    return WORDS[name](**values)


def _from_path(path: Path, options: dict[str, str], model: PreTrainedModel) -> Drafter:
    if not path.exists():
        known = sorted([*WORDS, *demo.HEADS])
        close = difflib.get_close_matches(str(path).partition(":")[0], known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        words = ", ".join(known)
        raise UnknownDrafter(f"no drafter {str(path)!r}: neither a known word ({words}) nor an existing path{hint}")
    path = drafter_in(path)
    if (path / "drafter.json").is_file():
        described = read_drafter_json(path)
        check_fingerprint(described, path, model)
        options, length = _split_length(_merged(described.options, options), path)
        return _limited(_from_described(path, described, options, model), length)
    options, length = _split_length(options, path)
    if formats.detect(path) is not None:
        return _limited(_head_drafter(path, options, model), length)
    if not (path / "config.json").is_file():
        raise UnknownDrafter(f"{path} holds neither drafter.json nor a model's config.json, and no draft head")
    values = typed_options("draft-model", DraftModelDrafter, options)
    return _limited(_draft_model(draft_for(path, model), model, values), length)


def _from_described(path: Path, described: DrafterJson, options: dict[str, str], model: PreTrainedModel) -> Drafter:
    if described.head is not None:
        return _head_drafter(path, options, model)
    if described.kind in WORDS:
        return _from_word(described.kind, options, model)
    if described.kind != "draft-model":
        words = ", ".join(["draft-model", *sorted(WORDS), *(f"{kind} with 'head'" for kind in HEAD_DRAFTERS)])
        raise UnknownDrafter(f"{path / 'drafter.json'} is of kind {described.kind!r}; known kinds are {words}")
    values = typed_options("draft-model", DraftModelDrafter, options)
    return _draft_model(draft_for(path, model), model, values)


def _merged(described: dict[str, str], options: dict[str, str]) -> dict[str, str]:
    """The options of drafter.json under those of a name; a name with another length drops the options of the first."""
    word = described.get("length", "none")
    if word in LENGTHS and options.get("length", word) != word:
        described = {key: value for key, value in described.items() if key not in options_of(word)}
    return {**described, **options}


def _split_length(options: dict[str, str], path: Path | None = None) -> tuple[dict[str, str], LengthPolicy | None]:
    """The drafter's own options, and the length policy that the others describe; the drafter lies in `path`."""
    options = dict(options)
    word = options.pop("length", "none")
    if word == "none":
        return options, None
    if word not in LENGTHS:
        raise UnknownDrafter(f"there is no length {word!r}; the ones there are: none, {', '.join(LENGTHS)}")
    given = {key: options.pop(key) for key in options_of(word) if key in options}
    if path is not None and word == "acceptance" and (path / ACCEPTANCE_HEAD).is_file():
        given.setdefault("weights", str(path / ACCEPTANCE_HEAD))
    others = {key for other in LENGTHS for key in options_of(other)} - set(options_of(word))
    for key in options:
        if key in others:
            raise UnknownDrafter(
                f"length={word} has no option {key!r}; it has: {', '.join(options_of(word)) or 'none'}"
            )
    return options, LENGTHS[word](**typed_options(f"length={word}", LENGTHS[word], given))


def _limited(drafter: Drafter, length: LengthPolicy | None) -> Drafter:
    return drafter if length is None else LimitedDrafter(drafter, length)


def _head_drafter(path: Path, options: dict[str, str], model: PreTrainedModel) -> Drafter:
    kind, head = head_for(path, model)
    return HEAD_DRAFTERS[kind](target_of(model), head, **typed_options(kind, HEAD_DRAFTERS[kind], options))


def _draft_model(draft: PreTrainedModel, model: PreTrainedModel, options: dict[str, Any]) -> Drafter:
    check_vocabulary(draft, model)
    if draft is model:
        raise DrafterMismatch("the draft model is the target itself; a drafter must be cheaper than its target")
    return DraftModelDrafter(target_of(draft), vocab_size=vocab_size(model), **options)


def draft_for(path: Path, target: PreTrainedModel) -> PreTrainedModel:
    """The draft model in `path`, on the target's device, in its dtype, and optimized when the target is.

    Kept as long as the target lives, so that a call of `generate` by name does not read it anew; changed files are.
    """
    found = path.iterdir() if path.is_dir() else ()
    files = tuple(sorted((file.name, file.stat().st_mtime_ns) for file in found))
    key = (path.resolve(), files, target.dtype, target.device, is_packed(target))
    kept = _drafts.setdefault(target, {})
    if key not in kept:
        draft = load_model(path, target)
        kept[key] = optimize(draft) if is_packed(target) else draft
    return kept[key]


def load_model(path: Path, target: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A local causal language model in evaluation mode on the target's device; nothing is downloaded.

    Args:
        path: a model's directory.
        target: says the device.
        dtype: None for the target's.

    Raises:
        UnknownDrafter: the files are not a model that transformers can load.
    """
    try:
        model, report = cast(
            tuple[PreTrainedModel, dict[str, Any]],
            AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype or target.dtype, local_files_only=True, output_loading_info=True
            ),
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnknownDrafter(f"cannot load a model from {path}: {reason}") from error
    if report["missing_keys"]:
        names = ", ".join(sorted(report["missing_keys"])[:3])
        raise UnknownDrafter(f"the model in {path} lacks {len(report['missing_keys'])} tensors ({names}, ...)")
    return cast(Any, model.eval()).to(target.device)


def typed_options(name: str, make: Callable[..., Any], options: dict[str, str]) -> dict[str, Any]:
    """Option strings as the types of the drafter's own keyword arguments."""
    parameters = {k: p for k, p in inspect.signature(make).parameters.items() if k not in NOT_OPTIONS}
    values: dict[str, Any] = {}
    for key, text in options.items():
        if key not in parameters:
            known = ", ".join(parameters)
            raise UnknownDrafter(f"drafter {name!r} has no option {key!r}; it has: {known}")
        values[key] = _typed(name, key, text, str(parameters[key].annotation))
    return values


def _typed(name: str, key: str, text: str, annotation: str) -> Any:
    kinds = {"int": int, "float": float, "bool": _boolean, "str": str}
    kind = annotation.split("|")[0].strip()
    if text.lower() == "none" and "None" in annotation:
        return None
    try:
        return kinds[kind](text)
    except ValueError:
        raise UnknownDrafter(f"drafter {name!r}: option {key}={text!r} is not of type {kind}") from None


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise ValueError(text)
    return text.lower() in ("true", "1", "yes")
