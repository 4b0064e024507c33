"""The methods by name. A method is a config and a function; registering it is all it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hfcompress.configuration import Config, suggest
from hfcompress.errors import ConfigError, Problem

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfcompress.methods.training import Part

Batch = Mapping[str, "torch.Tensor"]


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a method may need besides the model and its config.

    Attributes:
        calibration: Batches of model inputs (with `labels` where a method scores by loss).
        teacher: The model that a distilling part learns from, or several.
        teacher_tokens: What the teacher reads, where it has another tokenizer than the model (`OtherTokens`).
        cache_dir: Where what took long may be kept and found again, such as what teachers say and statistics of
            calibration data; runs may share it. Without it teachers use a folder in the training's output.
        tokenizer: The model's tokenizer; a method that changes it changes it in place.
        texts: Texts that the tokenizer must cut as before.
    """

    calibration: Sequence[Batch] = ()
    teacher: PreTrainedModel | Sequence[PreTrainedModel] | None = None
    teacher_tokens: Any = None
    cache_dir: Path | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    texts: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to compress.

    Attributes:
        name: Its name in recipes.
        config: Its frozen configuration.
        summary: One line for people.
        apply: Changes a model at once and returns what it found out (JSON values), or None where the
            method works only in training.
        stream: Does the same to a checkpoint on disk, tensor by tensor: reads one folder, writes another, and returns
            what `apply` would, or None, having written nothing, where config or checkpoint do not allow it. Takes both
            folders, the config, and whether to show progress.
        part: Makes the method's part of a Trainer, or None where it only works at once.
        why_not: Says why a config cannot work in training (True) or at once (False), and what would; None where it can.
        needs_float: Whether it must see float weights, so that it cannot follow quantization.
        quantizes: Whether it leaves weights that are no longer float.
        trains_quantized: Whether its step can train a quantized model.
        shrinks: Whether it makes layers smaller; at the end of a training only float layers can be.
        renumbers: Whether tokens have other ids after it than calibration data made before it.
    """

    name: str
    config: type[Config]
    summary: str
    apply: Callable[[PreTrainedModel, Any, Context], dict[str, Any]] | None = None
    stream: Callable[[Path, Path, Any, bool], dict[str, Any] | None] | None = None
    part: Callable[[Any, Context], Part] | None = None
    why_not: Callable[[Any, bool], str | None] | None = None
    needs_float: bool = True
    quantizes: bool = False
    trains_quantized: bool = False
    shrinks: bool = False
    renumbers: bool = False


@dataclass
class _Registry:
    by_name: dict[str, Method] = field(default_factory=dict)


_REGISTRY = _Registry()


def register(method: Method) -> None:
    """Adds a method; its name and its config class must be new."""
    assert method.name not in _REGISTRY.by_name, method.name
    assert method.apply or method.part, method.name
    _REGISTRY.by_name[method.name] = method


def methods() -> Mapping[str, Method]:
    """Returns every registered method by name."""
    return dict(_REGISTRY.by_name)


def method_of(config: Config) -> Method:
    """Returns the method that a config belongs to.

    Raises:
        ConfigError: The object is no method's config.
    """
    for method in _REGISTRY.by_name.values():
        if type(config) is method.config:
            return method
    known = [method.config.__name__ for method in _REGISTRY.by_name.values()]
    problem = Problem((), f"{type(config).__name__} is no method's config; {suggest(type(config).__name__, known)}")
    raise ConfigError("the list of methods", (problem,))
