"""What has to hold before and while transformers loads a compressed checkpoint.

Three gates. `guard_config` sees the config before a module is built from it. `guard_files` sees the files before a
weight is read. `require_exact_base` sees transformers' own account of the load before anything is filled in.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from hfcompress.errors import CheckpointError
from hfcompress.modeling.anatomy import base_model, prefix_of
from hfcompress.modeling.architectures import architectures
from hfcompress.modeling.headers import read_header
from hfcompress.modeling.integrity import compare_config, compare_layout, read_seal
from hfcompress.modeling.placement import inspect_index, inspect_texts, inspect_weight_paths

_DAMAGED = "The checkpoint is damaged or was edited: save or download it again."

# The files are not known yet when the config is first seen, so what it counts is held to what models have.
_MOST_LAYERS = 512
_MOST_EXPERTS = 4096
_MOST = 2**31 - 1
_COUNTS_LAYERS = re.compile(r"(^|_)layers?$|^num_hidden_groups$|^inner_group_num$|^num_codebooks$")
_COUNTS_EXPERTS = re.compile(r"experts$")
_SIZES = re.compile(
    r"_size$|_dim$|heads?$|^n_(embd|inner|ctx|positions|head|layer)$|^dim$|^d_(model|kv|ff)$|_channels$|_groups$"
)
# Some families write -1 for "as many as another field says".
_SIZES_OR_NONE = re.compile(r"_positions?$|_embeddings$|_rank$|_buckets$|_distance$|window")


def guard_config(config: PreTrainedConfig) -> None:
    """Refuses a config of impossible numbers, or one that chooses code, before a model is built from it.

    Raises:
        CheckpointError: Names the field and what is allowed.
    """
    named = getattr(torch, config.dtype, None) if isinstance(config.dtype, str) else config.dtype
    if not isinstance(named, torch.dtype):
        raise CheckpointError(f"config.json: dtype must name a torch dtype, not {config.dtype!r}", hint=_DAMAGED)
    _require_known_attention(config)
    for part in _parts(config):
        if getattr(part, "auto_map", None):
            raise CheckpointError("config.json: 'auto_map' is not allowed in a compressed checkpoint")
        for name, value in part.to_dict().items():
            _check_value(name, value)
        _require_positive(part)


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    parts = [config]
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            parts.append(part)
    return parts


def _check_value(name: str, value: Any) -> None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        least, most = -1, _MOST
        if _COUNTS_LAYERS.search(name):
            least, most = 0, _MOST_LAYERS
        elif _COUNTS_EXPERTS.search(name):
            least, most = 0, _MOST_EXPERTS
        elif _SIZES.search(name):
            least = 0
        elif not _SIZES_OR_NONE.search(name):
            return
        if type(value) is not int or not least <= value <= most:
            raise CheckpointError(
                f"config.json: {name} must be an integer from {least} to {most}, not {value!r}", hint=_DAMAGED
            )
    elif name in ("hidden_act", "activation_function", "hidden_activation", "activation"):
        if not isinstance(value, str) or value not in ACT2FN:
            raise CheckpointError(f"config.json: {name} must name an activation, not {value!r}", hint=_DAMAGED)
    elif isinstance(value, (list, tuple)) and len(value) > _MOST_EXPERTS and name != "architectures":
        raise CheckpointError(f"config.json: {name} holds {len(value)} entries", hint=_DAMAGED)


def _require_positive(config: PreTrainedConfig) -> None:
    """Holds the fields that surgery reads to what they must be: a zero there fails far from its cause."""
    architecture = architectures().get(config.model_type)
    fields = {"hidden_size", "vocab_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers"}
    for stack in architecture.stacks if architecture else ():
        fields.add(stack.depth)
        fields |= {attention.heads for attention in stack.attentions}
        fields |= {attention.kv_heads for attention in stack.attentions if attention.kv_heads}
        fields |= {block.neurons for block in stack.feed_forwards}
    for field in sorted(fields):
        value = getattr(config, field, None)
        if value is not None and (type(value) is not int or value < 1):
            raise CheckpointError(f"config.json: {field} must be a positive integer, not {value!r}", hint=_DAMAGED)


def _require_known_attention(config: PreTrainedConfig) -> None:
    """Lets neither config.json nor an argument fetch attention code from the Hub while a model is loaded."""
    allowed: set[Any] = {None, "eager", "sdpa", "flex_attention", "paged|eager"}
    if is_flash_attn_2_available():
        allowed.add("flash_attention_2")
    if is_flash_attn_3_available():
        allowed.add("flash_attention_3")
    for part in _parts(config):
        for field in ("_attn_implementation", "_experts_implementation"):
            value = getattr(part, field, None)
            known = allowed if field == "_attn_implementation" else {None, "eager", "batched_mm", "grouped_mm"}
            if value not in known:
                raise CheckpointError(
                    f"{field.removeprefix('_')} is {value!r}; while a compressed checkpoint is loaded it may be "
                    f"{', '.join(sorted(filter(None, known)))}",
                    hint="Load the model, then call model.set_attn_implementation(...).",
                )


def guard_files(files: Sequence[str] | None, config: PreTrainedConfig, structure: Mapping[str, Any]) -> None:
    """Refuses files outside of the checkpoint's folder, damaged headers, and whatever the seal tells apart.

    Args:
        files: The files that transformers is about to read; None where it was given a state dict.
        config: The config that the model was built from, `name_or_path` included.
        structure: What the config says about the compressed structure.

    Raises:
        CheckpointError: Names the file, tensor or field.
    """
    if files is None:
        return
    if not files:
        raise CheckpointError("the checkpoint's index names no file", hint=_DAMAGED)
    folder = inspect_weight_paths(files, config.name_or_path or "")
    inspect_texts(folder)
    headers = [read_header(Path(file)) for file in files]
    for header in headers:
        if header.metadata.get("format") != "pt":
            raise CheckpointError(f"{header.file.name}: the metadata must say format pt", hint=_DAMAGED)
    inspect_index(folder, headers)
    seal = read_seal(headers)
    if seal is None:
        return
    findings = compare_config(seal, config, structure) + compare_layout(seal, headers)
    if findings:
        shown = "; ".join(map(str, findings[:3]))
        more = f"; and {len(findings) - 3} more" if len(findings) > 3 else ""
        raise CheckpointError(f"the checkpoint is not what was saved: {shown}{more}", hint=_DAMAGED)


def require_exact_base(model: PreTrainedModel) -> None:
    """Makes missing, unexpected or mismatched weights of the base model an error of the load under way.

    transformers logs them in a table and fills the gaps with random values. Its step that first sees the
    whole account is wrapped for this one load; `require_checked` makes sure that it ran.
    """
    stock = model.mark_tied_weights_as_initialized
    base = base_model(model)
    prefix = prefix_of(model)
    optional: tuple[str, ...] = ()
    if model.config.model_type in architectures():
        optional = architectures()[model.config.model_type].optional
    children = {name for name, _ in base.named_children()}
    children |= {name for name, _ in base.named_parameters(recurse=False)}

    def inside(key: str) -> bool:
        name = key.removeprefix(prefix)
        spared = any(f"{name}.".startswith(f"{each}.") for each in optional)
        return key.startswith(prefix) and name.split(".")[0] in children and not spared

    def checked(loading_info: Any) -> None:
        del model.mark_tied_weights_as_initialized
        account = copy.copy(loading_info)
        account.missing_keys = set(account.missing_keys) - set(model.all_tied_weights_keys)
        account.unexpected_keys = set(account.unexpected_keys)
        model._adjust_missing_and_unexpected_keys(account)
        wrong = {
            "missing": sorted(filter(inside, account.missing_keys)),
            "unexpected": sorted(filter(inside, account.unexpected_keys)),
            "of another shape": sorted(key for key, *_ in account.mismatched_keys if inside(key)),
            "not readable": sorted(filter(inside, account.conversion_errors)),
        }
        found = [f"{len(keys)} {what}: {', '.join(keys[:3])}" for what, keys in wrong.items() if keys]
        if found:
            for keys in (loading_info.missing_keys, loading_info.unexpected_keys, loading_info.mismatched_keys):
                keys.clear()  # this error says it all: no table after it, no other error over it
            loading_info.conversion_errors.clear()
            raise CheckpointError(
                f"the weights do not fit the structure in config.json ({'; '.join(found)})", hint=_DAMAGED
            )
        stock(loading_info)

    vars(model)["mark_tied_weights_as_initialized"] = checked


def require_checked(model: PreTrainedModel) -> None:
    """Refuses a model whose load never came past `require_exact_base`.

    Raises:
        CheckpointError: transformers loads weights in another way than the one that is known.
    """
    if "mark_tied_weights_as_initialized" in vars(model):
        raise CheckpointError(
            "this version of transformers loads weights in a way that hfcompress cannot check",
            hint="pip install 'transformers>=5.23,<6'",
        )
