"""`loki ...`, and the same as `axolotl loki ...`."""

from __future__ import annotations

import click

from .commands import (
    analyse,
    cache,
    doctor,
    estimate,
    export,
    forgetting,
    merge,
    report,
    select,
    suppress,
    verify,
    write,
)

# Another command is a module in `commands/` and a line here.
COMMANDS = (
    analyse.analyse_command,
    cache.cache,
    doctor.doctor,
    estimate.estimate_command,
    export.export_command,
    forgetting.forgetting_command,
    merge.merge,
    report.report_command,
    select.select_command,
    select.stability,
    suppress.suppress_command,
    verify.verify_command,
    write.write_command,
)


@click.group()
def loki():
    """LoKI: fine-tune the rows that carry little general knowledge, and prove it."""


for _command in COMMANDS:
    loki.add_command(_command)
