"""attach, detach, verify: a model's own forward, with a loss in the place of its output head."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from deepalign_kernels.hf.head import (
    IGNORE,
    Head,
    computing_module,
    read_weights,
    swapped_forward,
)
from deepalign_kernels.hf.losses import LossOutput, MustRun, TokenLogp, run_loss
from deepalign_kernels.hf.probe import Transform, probe, uncompiled
from deepalign_kernels.modes import evaluating

Model = TypeVar("Model", bound=nn.Module)


def attach(model: Model) -> Model:
    """Let `model(**batch, labels=..., dak_loss=...)` compute a loss inside the model's own head.

    Calls without `dak_loss` are the model's own, to the bit. Only `forward` is replaced, on this
    instance: parameters, state_dict, config, save_pretrained and generate stay as they are. Attach
    before or after wrapping in PEFT, DDP, FSDP or DeepSpeed. `copy.deepcopy` and `pickle` give an
    attached model that is independent of this one. Attaching twice is attaching once.

    A call with `dak_loss` returns a LossOutput. It takes whatever the model takes, and

        dak_loss: a loss of this package, or a callable of one's own (see `losses.py`).
        labels: [B, T] integers, -100 where not trained. Shifted inside: position t predicts
            labels[:, t + 1].
        shift_labels: [B, T], shifted before; wins over labels.
        num_items_in_batch: what the summed loss is divided by, as the Hugging Face Trainer counts
            it, over all accumulation steps and ranks. DDP and FSDP average gradients over ranks,
            so multiply such a loss by their number (the Trainer does).

    Prompt tuning puts P virtual tokens in front. PEFT does so to `labels` as well, so logp then is
    [B, P + T - 1], zeros first; `shift_labels` keep their shape. As PEFT hands on embeddings, only
    shift_labels beside `inputs_embeds` may be shorter than the input: they belong to its last
    tokens. Elsewhere a label too few raises ValueError.

    Returns:
        `model`. Costs one forward of one token; where weights are on meta or sharded, or the model
        is in a wrapper that must gather them, the first call with `dak_loss` pays for it.

    Raises:
        TypeError: not a Hugging Face causal language model, or a head that is not understood.
        NotImplementedError: the logits are more than a scale or a tanh cap of the head's output.
    """
    if _find(model) is not None:
        return model
    inner = inner_model(model)
    _check_model(inner)
    forward = Forward(inner)
    if _is_local(model, inner):
        read_weights(computing_module(inner.get_output_embeddings()))
        forward.transform = probe(inner, forward.plain, inner.device)
    inner.__dict__["forward"] = forward
    return model


def detach(model: nn.Module) -> nn.Module:
    """Undo `attach`: `model` is as it was before, with nothing left in its `__dict__`; returned.

    Raises:
        ValueError: not attached.
        RuntimeError: `forward` was wrapped again since; undo that first.
    """
    forward = _forward_of(model)
    inner = forward.model
    if getattr(inner.forward, "__func__", inner.forward) is not forward:
        raise RuntimeError(
            f"the forward of {type(inner).__name__} was wrapped again after attach, by"
            f" {inner.forward!r}; undo that first (accelerate:"
            " accelerator.unwrap_model(model, keep_fp32_wrapper=False))"
        )
    if forward.previous is None:
        del inner.__dict__["forward"]
    else:
        inner.__dict__["forward"] = forward.previous
    return model


@contextlib.contextmanager
def attached(model: Model) -> Iterator[Model]:
    """`attach` for a block, and `detach` after it, also on an exception; yields `model`.

    A model that came attached stays so. Raises what those two raise.
    """
    ours = _find(model) is None
    attach(model)
    try:
        yield model
    finally:
        if ours:
            detach(model)


@torch.no_grad()
def verify(
    model: nn.Module, input_ids: Tensor, *, atol: float | None = None, **kwargs: Any
) -> float:
    """Compare the log-probs of 8 tokens with those of the model's own logits; once per run will do.

    Args:
        model: attached; as it is called in training. On all ranks at once where it is sharded.
        input_ids: [B, T] int64 with T >= 2; the first row's first 9 tokens are used.
        atol: largest difference allowed, in nats. By default 1e-4 plus twice the rounding of the
            largest logit.
        kwargs: passed to both calls.

    Returns:
        The largest difference, in nats.

    Raises:
        RuntimeError: a larger one, or NaN.
        ValueError: not attached.
    """
    inner = _forward_of(model).model
    ids = input_ids[:1, :9]
    target = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORE)
    with evaluating(model):
        logits = model(input_ids=ids, use_cache=False, **kwargs).logits[:, -ids.shape[1] :]
        ours = model(input_ids=ids, shift_labels=target, dak_loss=TokenLogp(), **kwargs).logp
    scores = logits[:, :-1].double()
    theirs = scores.log_softmax(-1).gather(-1, ids[:, 1:, None].to(scores.device)).squeeze(-1)
    error = (ours[:, :-1].double() - theirs).abs().max().item()
    if atol is None:
        kinds = {logits.dtype, inner.dtype, _autocast(logits.device.type) or logits.dtype}
        rounding = max(torch.finfo(kind).eps for kind in kinds)
        atol = 1e-4 + 2 * rounding * scores.abs().max().item()
    if not error <= atol:
        raise RuntimeError(
            f"log-probs from inside the head differ from the model's own logits by {error:.3g} nats"
            f" (allowed {atol:.3g}); do not train {type(inner).__name__} this way: compute its loss"
            " from its logits"
        )
    return error


class Forward:
    """What `attach` puts in model.__dict__["forward"].

    An object, not a closure or a bound method, so that deepcopy and pickle bind it to the copy;
    with slots, because functools.update_wrapper copies a `__dict__` into whatever wraps this.
    """

    __slots__ = ("model", "previous", "transform", "__weakref__")

    def __init__(self, model: Any):
        self.model = model
        self.previous: Callable[..., Any] | None = model.__dict__.get("forward")
        self.transform: Transform | None = None

    @property
    def plain(self) -> Callable[..., Any]:
        """The model's own forward. Looked up each time: fully_shard replaces the model's class."""
        if self.previous is not None:
            return self.previous
        return types.MethodType(type(self.model).forward, self.model)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """Keeps inspect.signature(model.forward), which Trainer and generate read, as it was."""
        return self.plain

    def __call__(
        self, *args: Any, dak_loss: Callable[..., Any] | None = None, **kwargs: Any
    ) -> Any:
        if args and args[0] is self.model:
            args = args[1:]  # accelerate's unwrap_model leaves types.MethodType(this, model)
        if wrong := [name for name in kwargs if name.startswith("dak_")]:
            raise TypeError(f"{wrong[0]}: no such keyword; did you mean dak_loss?")
        if dak_loss is None:
            return self.plain(*args, **kwargs)
        if not callable(dak_loss):
            raise TypeError(f"dak_loss: expected a callable that takes a Head, got {dak_loss!r}")
        if isinstance(dak_loss, MustRun):
            dak_loss.ran = True  # not ignored, even if this call is refused
        return _forward_with_loss(self, dak_loss, args, kwargs)


@uncompiled(recursive=False)
def _forward_with_loss(
    attached: Forward, loss: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
) -> LossOutput:
    model = attached.model
    target, shifted, num_items = _pop_targets(kwargs)
    embedded = not args and kwargs.get("input_ids") is None and "inputs_embeds" in kwargs
    virtual = embedded and not shifted  # as PEFT calls the model in prompt tuning
    kwargs.setdefault("use_cache", False)
    kwargs["return_dict"] = True
    if attached.transform is None:
        attached.transform = probe(model, attached.plain, target.device)
    head = model.get_output_embeddings()  # each time: PEFT and FSDP replace it
    module = computing_module(head)
    results: list[LossOutput] = []

    @uncompiled
    def forward(hidden: Tensor, *extra: Any, **more: Any) -> Tensor:
        if extra or more:
            raise TypeError(
                f"the output head was called with more than hidden states: {more or extra}"
            )
        seen = _head(attached, module, hidden, target, shifted, virtual, num_items)
        results.append(run_loss(loss, seen))
        return _pack(results[-1], hidden)

    outputs: list[Tensor] = []
    # Registered last, so it sees what the other hooks made of the output: ZeRO-3 returns a new
    # tensor, which fetches the weights again in backward.
    hook = head.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        with swapped_forward(module, forward):
            plain = attached.plain(*args, **kwargs)
    finally:
        hook.remove()
    if len(results) != 1 or len(outputs) != 1:
        raise RuntimeError(
            f"the forward of {type(model).__name__} called its output head {len(results)} times,"
            " not once"
        )
    out = _unpack(results[0], outputs[0])
    # As items: transformers 4 leaves out of a copy what was set as an attribute alone.
    out["mask"] = target != IGNORE
    if (aux_loss := getattr(plain, "aux_loss", None)) is not None:
        out["aux_loss"] = aux_loss
    return out


@uncompiled
def _pop_targets(kwargs: dict[str, Any]) -> tuple[Tensor, bool, Any]:
    """(target [B, T'], whether it was shifted here, num_items_in_batch), taken out of `kwargs`."""
    labels, shift_labels = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
    num_items = kwargs.pop("num_items_in_batch", None)
    given = labels if shift_labels is None else shift_labels
    if not isinstance(given, Tensor) or given.dim() != 2:
        raise ValueError(
            "labels: a call with dak_loss needs labels or shift_labels, integers [B, T]"
        )
    return (given[:, 1:], True, num_items) if shift_labels is None else (given, False, num_items)


def _head(
    attached: Forward,
    module: nn.Module,
    hidden: Tensor,
    target: Tensor,
    shifted: bool,
    virtual: bool,
    num_items: Any,
) -> Head:
    """`shifted`: the labels were, here. `virtual`: tokens without a label may stand in front."""
    assert attached.transform is not None
    scale, softcap, vocab = attached.transform
    rows, columns = target.shape
    length = columns + shifted
    start = hidden.shape[1] - length if hidden.dim() == 3 else -1
    if hidden.dim() != 3 or hidden.shape[0] != rows or start < 0 or (start > 0 and not virtual):
        raise ValueError(
            f"{'labels' if shifted else 'shift_labels'}: {(rows, length)} do not fit the head's"
            f" input, hidden states [B, T, H] of shape {tuple(hidden.shape)}; give every token a"
            f" label ({IGNORE} where it is not trained), and leave out logits_to_keep"
        )
    return Head(
        hidden=hidden[:, start : start + columns],
        target=target.to(hidden.device),
        softcap=softcap,
        logit_scale=scale,
        num_items_in_batch=num_items,
        source=attached,
        **read_weights(module).first(vocab)._asdict(),
    )


def _pack(out: LossOutput, hidden: Tensor) -> Tensor:
    """[1, 1, K], the head's output: all results with gradient in one. The model drags it along."""
    leaves = [x.reshape(-1) for x in _tensors(out) if x.requires_grad]
    if not leaves:
        return hidden.new_zeros(1, 1, 1)
    return (leaves[0] if len(leaves) == 1 else torch.cat(leaves))[None, None]


@uncompiled  # its id()s would recompile it in every call
def _unpack(out: LossOutput, packed: Tensor) -> LossOutput:
    """`out` with its gradient running through the head's output, as the hooks left it."""
    leaves = [x for x in _tensors(out) if x.requires_grad]
    pieces = packed.reshape(-1).split([x.numel() for x in leaves]) if leaves else ()
    new = {id(x): piece.view(x.shape).to(x.dtype) for x, piece in zip(leaves, pieces, strict=True)}
    parts = out.parts and {name: new.get(id(x), x) for name, x in out.parts.items()}
    return LossOutput(
        loss=new.get(id(out.loss), out.loss), logp=new.get(id(out.logp), out.logp), parts=parts
    )


def _tensors(out: LossOutput) -> list[Tensor]:
    every = (out.loss, out.logp, *(out.parts or {}).values())
    return list({id(x): x for x in every if x is not None}.values())


def _autocast(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def inner_model(model: Any) -> Any:
    """The Hugging Face model inside PEFT, DDP, FSDP1, DeepSpeed and torch.compile wrappers."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a transformers causal language model, got {model!r}")
    while not hasattr(type(model), "get_output_embeddings"):
        if hasattr(type(model), "get_base_model"):
            inner = model.get_base_model()  # pyright: ignore[reportCallIssue]
        else:
            inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def _find(model: nn.Module) -> Forward | None:
    forward = inner_model(model).__dict__.get("forward")
    while forward is not None and not isinstance(forward, Forward):
        inside = "__func__" if isinstance(forward, types.MethodType) else "__wrapped__"
        forward = getattr(forward, inside, None)
    return forward


def _forward_of(model: nn.Module) -> Forward:
    if (forward := _find(model)) is None:
        raise ValueError(
            f"model: this {type(model).__name__} is not attached; call dak.hf.attach(model)"
        )
    return forward


def _names(kind: str) -> set[str]:
    """Classes that transformers knows as "CAUSAL" or "MASKED" language models."""
    from transformers.models.auto import modeling_auto

    return set(getattr(modeling_auto, f"MODEL_FOR_{kind}_LM_MAPPING_NAMES").values())


def _check_model(model: Any) -> None:
    name = type(model).__name__
    config = getattr(model, "config", None)
    if not hasattr(type(model), "get_output_embeddings") or config is None:
        raise TypeError(f"model: expected a transformers causal language model, got {name}")
    classes = {c.__name__ for c in type(model).__mro__}
    if classes & _names("MASKED") and not classes & _names("CAUSAL"):
        raise TypeError(
            f"model: {name} is a masked language model, whose position t does not predict t + 1;"
            " load it with AutoModelForCausalLM"
        )
    if config.is_encoder_decoder:
        raise TypeError(
            f"model: {name} is an encoder-decoder; only decoder-only language models work"
        )
    if config.get_text_config(decoder=True) is not config:
        raise TypeError(
            f"model: {name} holds more than a language model (vision, audio): out of scope;"
            " attach to the text-only model of that family"
        )
    if model.get_output_embeddings() is None:
        raise TypeError(f"model: {name} has no output head; load it with AutoModelForCausalLM")


def _is_local(model: nn.Module, inner: nn.Module) -> bool:
    """Whether the forward can run now: no weight elsewhere, no wrapper that must gather it."""
    if model is not inner and not hasattr(type(model), "get_base_model"):
        return False
    return all(
        type(p) is nn.Parameter and p.numel() and p.device.type != "meta"
        for p in inner.parameters()
    )
