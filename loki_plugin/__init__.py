"""LoKI for Axolotl: implant new knowledge into the rows that carry little general knowledge."""

from importlib import import_module

# Lazy, so that `import loki_plugin` costs nothing and a stage never imports the host.
_NAMES = {
    "LokiPlugin": ".plugin",
    "LokiArgs": ".args",
    "attribute": ".analysing",
    "input_directions": ".protecting",
    "select_rows": ".selecting",
    "implant": ".implanting",
    "RowSelection": ".rows",
}

__all__ = list(_NAMES)


def __getattr__(name: str):
    if name == "LokiPlugin":
        from .host import need_axolotl

        need_axolotl("LokiPlugin")
    if name in _NAMES:
        return getattr(import_module(_NAMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
