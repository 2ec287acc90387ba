"""Every choice of a ConstrainedSFTTrainer, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from trl import SFTConfig

from deepalign_kernels import check, rules
from deepalign_kernels.data.examples import TOO_LONG, Encoding
from deepalign_kernels.losses import BetaSchedule
from deepalign_kernels.train.config import CACHED_DTYPES, KL_DIRECTIONS, OBJECTIVES

REFERENCES = ("precomputed", "adapter_off", "model")


@dataclass
class ConstrainedSFTConfig(SFTConfig):
    """`trl.SFTConfig` and how to constrain. Defaults are the paper's (arXiv 2406.05946, section 4):
    AdamW with betas 0.5 and 0.999, rate 2e-5, 10 steps of warm-up, no clipping.

    Args:
        objective: "constrained" (equation 3), "sft", or another rule by name (`dak.rules`).
        beta_first: beta of the first token of a response.
        beta_prefix: beta of tokens 2 to `prefix_length`.
        beta_rest: beta of later tokens.
        prefix_length: tokens of the second group end here.
        beta_table: in place of these four, beta of token 1, 2, ...; the last one holds for later
            tokens.
        min_weight: floor of a token's weight, with objective="surrogate" only.
        temperature: divides the logits of policy and reference.
        kl_coef: what the divergence from the reference over the whole vocabulary, nats per trained
            token, is multiplied by before it is added.
        kl_direction: "policy_ref", "ref_policy" or "js".
        kl_positions: only tokens at position 1 to this are anchored; None: all that are trained.
        reference: "precomputed": what the model before training says about the data, one number a
            trained token and, with kl_coef, a hidden state of each anchored one; "adapter_off": the
            model without its adapters (PEFT), at every step; "model": the trainer's `ref_model`, at
            every step.
        reference_cache: folder of what "precomputed" keeps; None: the output folder.
        reference_dtype: "bfloat16" or "float32", of the hidden states that are kept.
        train_on: "all" assistant turns, or the "last" of a conversation.
        position_origin: as in `deepalign_kernels.train.TrainConfig`.
        unknown_keys: of records and messages: "ignore" leaves them out, "error" refuses them.
        on_bad_record: "error" stops at a record that is none, or of which nothing can be trained;
            "skip" leaves it out, with a warning that names the first.
        on_too_long: what to do with more than max_length tokens: "error", "drop" or "truncate".
    """

    objective: str = "constrained"
    beta_first: float = 0.5
    beta_prefix: float = 2.0
    beta_rest: float = 0.1
    prefix_length: int = 5
    beta_table: list[float] | None = None
    min_weight: float = 0.0
    temperature: float = 1.0
    kl_coef: float = 0.0
    kl_direction: str = "policy_ref"
    kl_positions: int | None = None
    reference: str = "precomputed"
    reference_cache: str | None = None
    reference_dtype: str = "bfloat16"
    train_on: str = "all"
    position_origin: str = "content"
    unknown_keys: str = "ignore"
    on_bad_record: str = "error"
    on_too_long: str = "error"
    learning_rate: float = field(default=2e-5)
    adam_beta1: float = field(default=0.5)
    warmup_steps: Any = field(default=10)
    max_grad_norm: float = field(default=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check.one_of("objective", self.objective, (*OBJECTIVES, *rules.RULES))
        check.one_of("reference", self.reference, REFERENCES)
        check.one_of("kl_direction", self.kl_direction, KL_DIRECTIONS)
        self.encoding  # noqa: B018  its own checks
        check.one_of("on_too_long", self.on_too_long, TOO_LONG)
        check.number("temperature", self.temperature, above=0.0)
        check.number("kl_coef", self.kl_coef, low=0.0)
        for name, other in (("loss_type", "nll"), ("label_smoothing_factor", 0.0)):
            if getattr(self, name) != other:
                raise ValueError(f"{name}: trl's own loss is not used here; choose an objective")
        check.one_of("reference_dtype", self.reference_dtype, CACHED_DTYPES)
        if self.kl_positions is not None and (self.kl_positions < 1 or self.kl_coef == 0):
            raise ValueError(
                f"kl_positions: expected an integer >= 1, with kl_coef > 0, got {self.kl_positions}"
                f" with {self.kl_coef}"
            )
        if self.min_weight > 0 and self.objective != "surrogate":
            raise ValueError("min_weight: a floor belongs to objective='surrogate'")
        if self.packing and self.packing_strategy != "bfd":
            raise ValueError(
                f"packing_strategy: {self.packing_strategy!r} cuts responses in two, and positions"
                " would count from the cut; give 'bfd'"
            )
        self.beta  # noqa: B018  its own checks

    @property
    def beta(self) -> BetaSchedule:
        parts = self.beta_first, self.beta_prefix, self.beta_rest, self.prefix_length
        return BetaSchedule(*parts, self.beta_table)

    @property
    def encoding(self) -> Encoding:
        """How conversations become tokens."""
        names = (f.name for f in fields(Encoding))
        return Encoding(**{name: getattr(self, name) for name in names})

    @property
    def rule(self) -> str:
        return OBJECTIVES.get(self.objective, self.objective)

    @property
    def needs_reference(self) -> bool:
        return rules.objective_of(self.rule).needs_reference or self.kl_coef > 0
