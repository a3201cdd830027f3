"""Lets `plugins: [loki]` resolve: Axolotl 0.19's `load_plugin` splits names on a dot and crashes.

A `.pth` file imports this module at interpreter start. It costs one import finder, which waits for
`axolotl.integrations.base`, wraps its `load_plugin` once, and is gone. The wrapper asks Axolotl
first, so it steps aside on the day Axolotl resolves dotless names itself.
`LOKI_NO_SHORT_NAME=1` switches it off; `plugins: [loki_plugin.LokiPlugin]` needs none of it.
"""

import os
import sys

_TARGET = "axolotl.integrations.base"
_GROUP = "axolotl.plugins"


class _Finder:
    """Meta path finder for one module, used once."""

    def find_spec(self, name, path=None, target=None):
        if name != _TARGET:
            return None
        sys.meta_path.remove(self)
        from importlib.util import find_spec

        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                wrap(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def wrap(module) -> None:
    """Let `module.load_plugin` resolve dotless names through the entry-point group."""
    original = getattr(module, "load_plugin", None)
    if original is None or getattr(original, "resolves_short_names", False):
        return

    def load_plugin(plugin_name):
        if not isinstance(plugin_name, str) or "." in plugin_name:
            return original(plugin_name)
        try:
            return original(plugin_name)
        except ValueError as error:  # 0.19: nothing to unpack without a dot
            from importlib.metadata import entry_points

            known = {e.name: e for e in entry_points(group=_GROUP)}
            if plugin_name not in known:
                raise ValueError(
                    f"plugin '{plugin_name}' is unknown: give 'module.ClassName' or one of the"
                    f" installed short names ({', '.join(sorted(known)) or 'none'});"
                    " `plugins:` takes a list, as in [loki]"
                ) from error
            return known[plugin_name].load()()

    load_plugin.resolves_short_names = True  # type: ignore[attr-defined]
    load_plugin.__doc__ = original.__doc__
    module.load_plugin = load_plugin


def install() -> None:
    """Put the finder in place, unless switched off or already there."""
    if os.environ.get("LOKI_NO_SHORT_NAME") == "1":
        return
    if _TARGET in sys.modules:
        wrap(sys.modules[_TARGET])
    elif not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


install()
