"""Gradient checkpointing that keeps what is dear to compute and computes the rest again in the backward pass.

Most of what a layer keeps for its backward pass are results of elementwise operations: the float32 copies of norms,
rotations, the products of gates. They take a pass over memory to compute again, where a matrix product or attention
takes many. So only these are kept: selective activation recomputation (Korthikanti et al. 2022, arXiv:2205.05198).

It works below autograd, on the operations that a layer dispatches (as torch's own selective checkpointing does): in the
forward pass results are put aside, and when checkpointing runs the layer again, each is handed out in the place of the
operation. What is not there is computed, so that leaving something out costs time and is never wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

# Matrix products, and which of their arguments is the left factor. Names, since some come into being only when a
# library is imported, and others are not in every version of torch.
PRODUCTS = {
    "aten::mm": 0, "aten::addmm": 1, "aten::bmm": 0, "aten::baddbmm": 1, "aten::linear": 0, "aten::_scaled_mm": 0,
    "aten::_scaled_mm_v2": 0, "aten::_grouped_mm": 0, "aten::_scaled_grouped_mm": 0, "aten::_scaled_grouped_mm_v2": 0,
    "transformers::grouped_mm_fallback": 0,
}  # fmt: skip
ATTENTION = {
    "aten::_flash_attention_forward", "aten::_efficient_attention_forward", "aten::_cudnn_attention_forward",
    "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable", "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_forward", "flash_attn::_flash_attn_varlen_forward",
}  # fmt: skip
# Operations that keep none of their arguments for the backward pass.
SUMS = {"aten::add.Tensor", "aten::view", "aten::_unsafe_view", "aten::detach"}
# Products over fewer terms are no dearer than writing their results: those of LoRA's second factor, and the scores of
# attention that is computed in parts.
LEAST_TERMS = 256
# Relative difference from which on a result counts as written into. A product that is computed again differs less.
WRITTEN = 0.01

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def switch_on(model: nn.Module) -> None:
    """Let the gradient checkpointing of `model`, which is on already, keep products and attention.

    Raises:
        ValueError: No part of it is checkpointed in the way of transformers.
    """
    options = {"context_fn": context_fn(), "use_reentrant": False}
    parts: list[Any] = [
        m
        for m in model.modules()
        if getattr(m, "gradient_checkpointing", False) and hasattr(m, "_gradient_checkpointing_func")
    ]
    if not parts:
        raise ValueError(
            f"selective_checkpointing=True does not work with {type(model).__name__}, no part of which is "
            "checkpointed by transformers: set selective_checkpointing=False."
        )
    for part in parts:
        part._gradient_checkpointing_func = partial(part._gradient_checkpointing_func, **options)


def context_fn() -> Callable[[], Contexts]:
    """What `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)` takes by this name, for one model."""
    findings = _Findings()

    def contexts() -> Contexts:
        if torch.compiler.is_compiling():
            # The compiler asks torch's own contexts what to save, and decides itself what is worth it.
            return create_selective_checkpoint_contexts(_policy)
        region = _Region(findings, compared=not findings.settled)
        return _Keep(region), _HandOut(region)

    return contexts


@dataclass(slots=True)
class _Findings:
    """Which results of a model are written into where torch does not see it.

    Kernels of other libraries work in place: Liger's rotary embedding does, on the results of the products for queries
    and keys. Every result of the first pass is compared with one that is computed again.

    Attributes:
        written: Places of such results among those of a region.
        settled: Whether a region has been compared; later ones are not.
    """

    written: set[int] = field(default_factory=set)
    settled: bool = False


@dataclass(slots=True)
class _Region:
    """A layer between its forward pass and the time when it is computed again.

    Attributes:
        kept: Results by their place among all that are worth keeping, with their operations.
    """

    findings: _Findings
    compared: bool
    kept: dict[int, tuple[Any, Any]] = field(default_factory=dict)


class _Mode(TorchDispatchMode):
    """Sees all operations of a region."""

    supports_higher_order_operators = True

    def __init__(self, region: _Region) -> None:
        super().__init__()
        self.region = region
        self.place = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled parts of a layer stay compiled, and are computed again as a whole."""
        return True

    def __enter__(self) -> _Mode:
        self.place = 0
        return super().__enter__()


class _Keep(_Mode):
    """The forward pass."""

    last: int | None = None  # the place of a result to which nothing but sums has happened

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        kind = _kind(func)
        if kind is None:
            self.last = None
            return result
        if kind.written:
            self._forget([args[i] if i < len(args) else kwargs.get(name) for i, name in kind.written])
        if not kind.sums:
            self.last = None
        if kind.worth_keeping(args, kwargs):
            if self.place not in self.region.findings.written:
                self.region.kept[self.place] = func, _detached(result)
            self.last = self.place
            self.place += 1
        return result

    def __exit__(self, *error: Any) -> None:
        # Checkpointing stops when it has all that the backward pass wants: before the last product, if its result is
        # only added to the residual.
        if self.last is not None:
            self.region.kept.pop(self.last, None)
        super().__exit__(*error)

    def _forget(self, written: list[Any]) -> None:
        """Keep no results that share memory with these, which were written into."""
        touched = {_memory(x) for x in tree_leaves(written) if isinstance(x, Tensor)}
        for place, (_, result) in list(self.region.kept.items()):
            if any(_memory(x) in touched for x in tree_leaves(result) if isinstance(x, Tensor)):
                del self.region.kept[place]


class _HandOut(_Mode):
    """The same operations again, for the backward pass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = _kind(func)
        if kind is None or not kind.worth_keeping(args, kwargs):
            return func(*args, **kwargs)
        place, self.place = self.place, self.place + 1
        # Taken out, so that memory is given back layer by layer.
        before, result = self.region.kept.pop(place, (func, None))
        if before is not func:
            raise RuntimeError(
                f"selective_checkpointing=True: a layer computed {before} in its forward pass and computes {func} in "
                "its place for the backward pass. It depends on something that has changed in between: set "
                "selective_checkpointing=False."
            )
        if result is None:
            return func(*args, **kwargs)
        if self.region.compared:
            fresh = func(*args, **kwargs)
            if _differ(fresh, result):
                self.region.findings.written.add(place)
                return fresh
        return result

    def __exit__(self, *error: Any) -> None:
        self.region.kept.clear()
        self.region.findings.settled |= self.region.compared
        super().__exit__(*error)


@dataclass(frozen=True, slots=True)
class _Kind:
    """What there is to know about some operations.

    Attributes:
        factor: Of a product: where its left factor stands.
        attention: Whether it is attention.
        dropout: Of attention: where the probability of dropout stands.
        sums: Whether it keeps nothing for the backward pass.
        written: Arguments that it writes into, by place and name.
    """

    factor: int | None = None
    attention: bool = False
    dropout: int | None = None
    sums: bool = False
    written: tuple[tuple[int, str], ...] = ()

    def worth_keeping(self, args: Any, kwargs: Any) -> bool:
        if self.factor is not None:
            return args[self.factor].shape[-1] >= LEAST_TERMS
        # Attention that draws random numbers draws them again: those that are drawn after it depend on that.
        return self.attention and not self._drops(args, kwargs)

    def _drops(self, args: Any, kwargs: Any) -> bool:
        if self.dropout is None:
            return False
        return bool(args[self.dropout] if self.dropout < len(args) else kwargs.get("dropout_p", 0.0))


@cache
def _kind(func: Any) -> _Kind | None:
    """None for most of them: it is asked for each that a layer makes."""
    name, schema = func.name(), getattr(func, "_schema", None)
    arguments = [] if schema is None else list(enumerate(schema.arguments))
    kind = _Kind(
        factor=PRODUCTS.get(name),
        attention=name in ATTENTION,
        dropout=next((i for i, a in arguments if a.name == "dropout_p"), None),
        sums=name in SUMS,
        written=tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write),
    )
    return None if kind == _Kind() else kind


def _policy(ctx: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kind = _kind(func)
    if kind is None or not kind.worth_keeping(args, kwargs):
        return CheckpointPolicy.PREFER_RECOMPUTE
    return CheckpointPolicy.PREFER_SAVE


def _detached(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.detach()
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in result)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _differ(fresh: Any, kept: Any) -> bool:
    pairs = zip(tree_leaves(fresh), tree_leaves(kept), strict=True)
    return any(_far(a, b) for a, b in pairs if isinstance(a, Tensor) and a.is_floating_point() and a.numel())


def _far(a: Tensor, b: Tensor) -> bool:
    norm = partial(torch.linalg.vector_norm, dtype=torch.promote_types(a.dtype, torch.float32))
    # Not a number is no reason either.
    return bool(norm(a - b) > WRITTEN * norm(a))
