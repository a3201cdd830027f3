"""The `loki:` block of the YAML: every default stated once, unknown fields are errors."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import Annotated, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    field_serializer,
    model_validator,
)

from .blocks import AttributionArgs, Block, CalibrationArgs, Count, File, Number, ProtectArgs
from .choices import (
    ALL,
    AUTO,
    DOWN,
    LINEAR_RANK,
    QUOTA,
    SEED,
    STRATEGY,
    StrategyName,
    plain_number,
)


class LokiConfig(Block):
    """The `loki:` block."""

    quota: Annotated[Decimal, BeforeValidator(lambda v: _quota(v))] = Field(
        Decimal(QUOTA), gt=0, le=100, description="percent of the rows of every layer that train"
    )
    rank: Count | None = Field(
        None, ge=1, description="null = dense (the paper's LoKI); an integer = LoKI* of that rank"
    )
    strategy: StrategyName = Field(
        STRATEGY,
        description="how rows are chosen from scores: `layer_balanced` is the paper's, the global"
        " ones its ablations, `layer_highest` and `random` controls",
    )
    magnitude: bool = Field(False, description="rank |score| instead of the signed score")
    seed: Count = Field(SEED, ge=0, description="seed of the `random` strategy")
    rows: File | None = Field(None, description="a rows file; skips analysing and selecting")
    targets: Annotated[str | list[str], BeforeValidator(lambda v: _targets(v))] = Field(
        DOWN,
        min_length=1,
        description="what trains: `down`, rows of the down-projections; `all`, a LoRA on every"
        " other linear of the decoder too; or a name, a list of names, or a regular expression for"
        " whole names, as `lora_target_modules` has them",
    )
    linear_rank: Count | None = Field(
        None,
        ge=1,
        description="rank of the LoRA on linears besides the down-projections; null = `rank`, else"
        f" the YAML's `lora_r`, else {LINEAR_RANK}",
    )
    exclude: list[File] = Field(
        default_factory=list, description="rows files whose rows must not train again"
    )
    calibration: CalibrationArgs = Field(default_factory=CalibrationArgs)
    attribution: AttributionArgs = Field(default_factory=AttributionArgs)
    protect: ProtectArgs = Field(default_factory=lambda: ProtectArgs(auto=True))
    cache_dir: File | None = Field(
        None,
        description="where score logs are kept; null = $LOKI_CACHE_DIR, else the platform's user"
        " cache folder",
    )
    cache_limit: Number | None = Field(
        20.0,
        gt=0,
        description="gigabytes of scores and protected directions that are kept; those used longest"
        " ago are dropped first; null = no limit",
    )
    lr_scale: Number = Field(
        1.0, gt=0, allow_inf_nan=False, description="factor on the learning rate of the rows"
    )
    stop_forgetting: Number | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="nats per token, e.g. 0.05: where an evaluation finds `eval_loki_kl` above it,"
        " the training stops and the last checkpoint under it is what is saved; null = never",
    )
    report: bool = Field(
        True,
        description="write loki_report.json, loki_report.html and loki_figures.json, and"
        " measure how much was forgotten, at every evaluation and at the end",
    )
    form: Literal["dense", "low-rank"] | None = Field(
        None,
        description="internal: what the first registration decided, for those after it (Ray"
        " registers a configuration again, when `adapter` and `lora_r` are the carrier's)",
    )

    @model_validator(mode="before")
    @classmethod
    def _registered_before(cls, given):
        """Axolotl drops nulls on its way from the registration to the run: where all else is there,
        and `form`, what is missing is null, and `auto` has been filled in."""
        nullable = {
            name for name, f in cls.model_fields.items() if type(None) in get_args(f.annotation)
        }
        if not isinstance(given, dict) or not given.get("form"):
            return given
        if not cls.model_fields.keys() - nullable <= given.keys():
            return given
        given = dict.fromkeys(nullable) | given
        plain = {name: ProtectArgs.model_fields[name].default for name in AUTO}
        return given | {"protect": plain | given["protect"]}

    @model_validator(mode="after")
    def _protects_or_says_not(self):
        says = {"auto", "inputs", "directions", "anchor"}
        if self.form is None and not self.protect.on and not says & self.protect.model_fields_set:
            if "protect" in self.model_fields_set:
                set_so = self.protect.model_dump(include=self.protect.model_fields_set)
                raise ValueError(
                    f"got protect: {set_so}, which protects nothing; take it out or set"
                    " `auto: true` in it for the default, or write `protect: off`"
                )
        return self

    @model_validator(mode="after")
    def _form_and_rank_agree(self):
        if self.linear_rank is not None and self.targets == DOWN:
            raise ValueError(
                "`linear_rank` is the rank on linears besides the down-projections, and `targets`"
                " names none; set `targets: all` too"
            )
        if self.form is not None and (self.form == "dense") != (self.rank is None):
            raise ValueError(f"form is {self.form}, but rank is {self.rank}; leave `form` out")
        return self

    @property
    def needs_scores(self) -> bool:
        """Whether an analysis says which rows train: not where they are given, drawn, or all."""
        return self.rows is None and self.strategy != "random" and self.quota < 100

    @field_serializer("quota", when_used="json")
    def _plain_quota(self, value: Decimal) -> int | float:
        return plain_number(value)


def _targets(value):
    """One name is a list of it; another text is a regular expression, which must be one."""
    if isinstance(value, list):
        other = next((v for v in value if not isinstance(v, str)), None)
        if other is not None:
            raise ValueError(f"{other!r} is no name; give names of linear modules, such as q_proj")
        words = [v for v in value if v in (DOWN, ALL)]
        if words:
            raise ValueError(f"`{words[0]}` stands by itself: write `targets: {words[0]}`")
        if "" in value:
            raise ValueError("one of the names is empty")
    elif isinstance(value, str) and value not in (DOWN, ALL):
        if re.fullmatch(r"[\w.]+", value):
            return [value]
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(
                f"{value!r} is no regular expression ({error}); names go into a list"
            ) from None
    return value


def _quota(value):
    # YAML gives 2.5 as a binary float; its shortest decimal form is what the user wrote.
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        raise ValueError(f"got {value!r}, expected a number of percent, e.g. 10 or 2.5")
    try:
        return Decimal(str(value))
    except InvalidOperation:
        raise ValueError(f"got {value!r}, expected a number of percent") from None


class LokiArgs(BaseModel):
    """What Axolotl merges into its own schema (`BasePlugin.get_input_args`)."""

    # None stays None: Axolotl keeps this schema for later runs that do not list the plugin.
    loki: LokiConfig | None = None
