"""The `loki:` block of the YAML: every default stated once, unknown fields are errors."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_serializer,
    model_validator,
)

from .choices import (
    ALL,
    AUTO,
    BATCH_SIZE,
    DOWN,
    FEW_SHOT,
    LINEAR_RANK,
    PATH,
    PROTECT_GB,
    QUOTA,
    RULE,
    SEED,
    SELF,
    SOURCE,
    STEPS,
    STRATEGY,
    TARGET,
    TEXT_COUNT,
    PathName,
    RuleName,
    StrategyName,
    TargetName,
    plain_number,
)


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _not_bool(value):
    if isinstance(value, bool):
        raise ValueError(f"got {value!r}, expected a number")
    return value


def _at_home(value):
    """A path that begins with `~` as a shell would give it."""
    if isinstance(value, str) and value.startswith("~"):
        return str(Path(value).expanduser())
    return value


Count = Annotated[int, BeforeValidator(_not_bool)]
Number = Annotated[float, BeforeValidator(_not_bool)]
File = Annotated[str, BeforeValidator(_at_home)]


class CalibrationArgs(_Block):
    """Where the calibration prompts come from."""

    source: File = Field(
        SOURCE,
        min_length=1,
        description="`builtin` (shipped with the package), `mmlu` (cais/mmlu), a path to a"
        " .jsonl/.json/.csv/.parquet/.txt file, a folder or the path of any `datasets` data set",
    )
    samples_per_subject: Count | None = Field(
        None, ge=1, description="prompts per subject; null = all (50 for `mmlu`, as the paper)"
    )
    target: TargetName = Field(
        TARGET, description="the token y: the model's own arg-max, or the gold answer"
    )
    max_tokens: Count | None = Field(
        None, ge=2, description="prompts longer than this many tokens are dropped and counted"
    )
    few_shot: Count = Field(FEW_SHOT, ge=0, description="solved examples put before each question")
    columns: dict[str, str | list[str]] | None = Field(
        None,
        description="for a data set of your own: which of its columns hold `question`, `context`,"
        " `choices` (one or several), `answer`, `subject`, or `prompt`, `target`, or `text`, or"
        " `messages`, `tools`, `system`",
    )
    name: str | None = Field(
        None, description="configuration of a data set that has several, as in `datasets:`"
    )
    split: str | None = Field(
        None,
        description="split of a data set, or a slice such as `validation[:100]`; null = test, else"
        " train",
    )
    streaming: bool = Field(
        False, description="read no more of a data set than the slice in `split` needs"
    )
    field_messages: str | None = Field(
        None, description="`columns: {messages: ...}` as Axolotl's `datasets:` spell it"
    )
    field_tools: str | None = Field(
        None, description="`columns: {tools: ...}` as Axolotl's `datasets:` spell it"
    )
    message_property_mappings: dict[str, str] | None = Field(
        None,
        description="as in Axolotl's `datasets:`; null = `role` and `content`, or `from` and"
        " `value`",
    )
    roles: dict[str, list[str]] | None = Field(
        None,
        description="as in Axolotl's `datasets:`; null = `human` is a user, `gpt` an assistant",
    )
    seed: Count = Field(
        SEED,
        ge=0,
        description="seed of the draw of samples and few-shot examples, and of where texts are cut",
    )

    @property
    def reading(self) -> dict[str, Any]:
        """What `load_records` is told beside the source."""
        told = ("columns", "name", "split", "streaming", "field_messages", "field_tools")
        return self.model_dump(include={*told, "message_property_mappings", "roles"})


class AttributionArgs(_Block):
    """How the attributions are integrated."""

    steps: Count = Field(STEPS, ge=1, description="integration steps S")
    rule: RuleName = Field(RULE, description="quadrature rule; `left` is the authors'")
    path: PathName = Field(
        PATH,
        description="`token` scales the output at the last token (the paper), `sequence` at all of"
        " them (the authors' later release)",
    )
    batch_size: Literal["auto"] | Annotated[Count, Field(ge=1)] = Field(
        BATCH_SIZE, description="prompts per batch; `auto` fits the free memory"
    )

    @model_validator(mode="after")
    def _enough_steps(self):
        if self.rule == "trapezoid" and self.steps < 2:
            raise ValueError("`rule: trapezoid` needs `steps` of at least 2")
        return self


class ProtectArgs(_Block):
    """What keeps the update away from what the model does on general text."""

    auto: bool = Field(
        False,
        description="what the word `auto` stands for: soft directions of 99 % of the inputs, or as"
        " many as `memory` holds, found on calibration prompts and the model's own text, and an"
        " anchor of 1 on the same; what is set beside it counts",
    )
    inputs: Number | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of what general text reads, e.g. 0.99, whose directions the update"
        " cannot read; null = off",
    )
    directions: Count | None = Field(
        None, ge=1, description="that many directions in every layer instead of a share"
    )
    soft: bool = Field(
        False,
        description="the update reads those directions in inverse proportion to what general text"
        " uses of them, instead of not at all",
    )
    memory: Number | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="gigabytes that the directions of a share may take; where they need more, every"
        " input gets the same part of its size; null = a tenth of the card's memory, at most"
        f" {PROTECT_GB:g}",
    )
    anchor: Number = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="weight of KL(base || tuned) on calibration prompts and `text` in every step;"
        " where an answer begins counts as much as all other tokens",
    )
    anchor_batch: Count = Field(
        2, ge=1, description="prompts per micro batch and rank for the anchor"
    )
    anchor_every: Count = Field(
        1, ge=1, description="steps from one anchor to the next, which then counts that many times"
    )
    text: File | None = Field(
        None,
        min_length=1,
        description="more text for protection only: a .txt or .jsonl file, or `self`: the model"
        " writes it, dialogues and plain text like what it has learned from",
    )

    count: Count = Field(
        TEXT_COUNT, ge=2, description="how many texts `text: self` is, half of them dialogues"
    )

    @property
    def reads(self) -> bool:
        """Whether the update's inputs are protected."""
        return self.inputs is not None or self.directions is not None

    @property
    def on(self) -> bool:
        return self.reads or self.anchor > 0

    @model_validator(mode="before")
    @classmethod
    def _from_a_word(cls, given):
        if given == "off" or given is False:  # YAML reads the word `off` as false
            return {"auto": False}
        given = {"auto": True} if given == "auto" else given
        if isinstance(given, str):
            raise ValueError(f"got {given!r}, expected `auto`, `off`, or a block of settings")
        if isinstance(given, dict) and _is_true(given.get("auto")):
            own = AUTO if given.get("directions") is None else AUTO.keys() - {"inputs"}
            given = {k: AUTO[k] for k in AUTO if k in own} | given
        return given

    @model_validator(mode="after")
    def _consistent(self):
        if self.inputs is not None and self.directions is not None:
            raise ValueError("`inputs` and `directions` are two ways to say how many; give one")
        if self.soft and not self.reads:
            raise ValueError(
                "`soft` says how directions are read; set `inputs` or `directions` too"
            )
        if self.soft and self.directions == 1:
            raise ValueError(
                "of `soft` directions the last one is read as it is, so that one alone protects"
                " nothing; give at least 2"
            )
        if self.memory is not None and self.inputs is None:
            raise ValueError(
                "`memory` limits the directions of a share; set `auto: true` or `inputs` too"
            )
        if self.text is not None and not self.on:
            raise ValueError(
                "`text` needs something to protect: set `inputs`, `directions` or `anchor`"
            )
        if self.count != TEXT_COUNT and self.text != SELF:
            raise ValueError(
                "`count` says how many texts the model writes; set `auto: true` or `text: self` too"
            )
        if self.anchor_batch != type(self).model_fields["anchor_batch"].default and not self.anchor:
            raise ValueError(
                "`anchor_batch` is the batch of `anchor`, which is off; set it or `auto: true` too"
            )
        if self.anchor_every > 1 and not self.anchor:
            raise ValueError(
                "`anchor_every` belongs to `anchor`, which is off; set it or `auto: true` too"
            )
        return self


class LokiConfig(_Block):
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


def _is_true(value) -> bool:
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        return False  # the field says what it expected


def _targets(value):
    """One name is a list of it; another text is a regular expression, which must be one."""
    if isinstance(value, list):
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
