"""Files and answers that a script reads."""

from __future__ import annotations

import json
import math

from loki_plugin.model.writing import json_text


def test_what_is_not_finite_is_null_in_json():
    facts = {"kl": math.nan, "path": [{"loss": math.inf}, 1.5, None, True], "two": (1, -math.inf)}
    said = json_text(facts)
    assert json.loads(said, parse_constant=lambda name: 1 / 0) == {
        "kl": None,
        "path": [{"loss": None}, 1.5, None, True],
        "two": [1, None],
    }
