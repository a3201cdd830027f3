"""The blocks inside the `loki:` block: calibration, attribution, protect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from .choices import (
    AUTO,
    BATCH_SIZE,
    FEW_SHOT,
    PATH,
    PROTECT_GB,
    RULE,
    SEED,
    SELF,
    SOURCE,
    STEPS,
    TARGET,
    TEXT_COUNT,
    PathName,
    RuleName,
    TargetName,
)


class Block(BaseModel):
    """Fields that are not known are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _not_bool(value):
    if isinstance(value, bool):
        raise ValueError(f"got {value!r}, expected a number")
    return value


def at_home(value):
    """A path that begins with `~` as a shell would give it.

    Raises:
        ValueError: it is empty, or names the home of nobody.
    """
    if value == "":
        raise ValueError("the path is empty; give one, or leave it out")
    if isinstance(value, str) and value.startswith("~"):
        try:
            return str(Path(value).expanduser())
        except RuntimeError as error:
            raise ValueError(f"{value!r} names the home of nobody here") from error
    return value


Count = Annotated[int, BeforeValidator(_not_bool)]
Number = Annotated[float, BeforeValidator(_not_bool)]
File = Annotated[str, BeforeValidator(at_home)]


class CalibrationArgs(Block):
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


class AttributionArgs(Block):
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


class ProtectArgs(Block):
    """What keeps the update away from what the model does on general text."""

    auto: bool = Field(
        False,
        description="what the word `auto` stands for: soft directions of 99 % of the inputs, or as"
        " many as `memory` holds, found on calibration prompts and the model's own text, an anchor"
        " of 1 on this text, and `freeze_a`; what is set beside it counts",
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
    freeze_a: bool = Field(
        False,
        description="what a low-rank update of a whole linear reads is set once, to what the task"
        " uses most beside what general text uses, and stands still: of its LoRA only B trains, and"
        " no directions are held while it does; rows, dense or at a `rank`, train as ever",
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
        description="weight of KL(base || tuned) in every step, on `text`, and on calibration"
        " prompts where that has no dialogues; where an answer begins counts as much as all other"
        " tokens",
    )
    anchor_batch: Count = Field(
        2, ge=1, description="texts of one anchor on each rank, all in a step's first micro batch"
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
            own = set(AUTO) if given.get("directions") is None else AUTO.keys() - {"inputs"}
            if given.get("inputs", AUTO["inputs"]) is None and given.get("directions") is None:
                own -= {"freeze_a"}
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
        if self.freeze_a and not self.reads:
            raise ValueError(
                "`freeze_a` says what is read beside protected inputs; set `inputs`, `directions`"
                " or `auto: true` too"
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


def _is_true(value) -> bool:
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        return False  # the field says what it expected
