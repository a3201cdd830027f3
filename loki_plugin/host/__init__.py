"""What knows Axolotl: settings, the life of one run, and what is changed in Axolotl itself."""

from importlib.util import find_spec

EXTRA = "pip install 'loki_plugin[axolotl]'"


def has_axolotl() -> bool:
    """Is Axolotl installed here? It is not imported for the answer."""
    return find_spec("axolotl") is not None


def need_axolotl(what: str) -> None:
    """Say in one sentence that `what` needs Axolotl, where there is none.

    Raises:
        ImportError: Axolotl is not installed.
    """
    if not has_axolotl():
        raise ImportError(f"{what} needs Axolotl, which is not installed here: {EXTRA}")
