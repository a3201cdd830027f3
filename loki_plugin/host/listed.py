"""Which plugins a configuration asks for."""

from __future__ import annotations

OWN_NAME = "loki_plugin.plugin.LokiPlugin"  # of the entry point, by which Axolotl 0.21 loads us


def wanted(cfg) -> list[str]:
    """The plugins that a configuration lists, as Axolotl's manager names them.

    Since 0.21 it takes `module:Class` too, and loads every installed plugin before it reads a
    configuration. So one with a `loki:` block or our adapter that does not list us would pass its
    validation and train plain LoRA: there we are wanted as if we were listed.
    """
    from axolotl.integrations import base

    names = [str(name).replace(":", ".") for name in cfg.get("plugins") or []]
    if not hasattr(base, "get_builtin_plugins"):
        return names
    ours = any(name == "loki" or name.startswith("loki_plugin.") for name in names)
    asked = cfg.get("loki") is not None or cfg.get("adapter") == "loki"
    return [*names, OWN_NAME] if asked and not ours else names
