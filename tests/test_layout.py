"""The house's rules: imports run one way, and Axolotl stays in the rooms that know it."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "loki_plugin"
# Lower rooms never import higher ones; a module belongs to the longest name that it starts with.
FLOORS = [
    {"loki_plugin.model", "loki_plugin.ranks", "loki_plugin.choices", "loki_plugin._short_name"},
    {"loki_plugin.picturing.drawing"},
    {"loki_plugin.rows"},
    {
        "loki_plugin.analysing",
        "loki_plugin.selecting",
        "loki_plugin.evaluating",
    },
    {"loki_plugin.protecting"},
    {"loki_plugin.implanting"},
    {"loki_plugin.blocks"},
    {"loki_plugin.args"},
    {"loki_plugin.inputs"},
    {
        "loki_plugin.pipeline",
        "loki_plugin.protecting.preparing",
        "loki_plugin.protecting.texts",
        "loki_plugin.protecting.leaking",
        "loki_plugin.estimating",
        "loki_plugin.evaluating.forgetting",
        "loki_plugin.evaluating.curve",
        "loki_plugin.evaluating.adapters",
        "loki_plugin.evaluating.gate",
        "loki_plugin.evaluating.held_back",
        "loki_plugin.evaluating.watching",
        "loki_plugin.evaluating.again",
        "loki_plugin.reporting",
        "loki_plugin.picturing",
    },
    {"loki_plugin.host"},
    {"loki_plugin.plugin", "loki_plugin.commands"},
    {"loki_plugin.cli", "loki_plugin"},
]
KNOWS_AXOLOTL = ("loki_plugin.host", "loki_plugin.plugin", "loki_plugin.commands")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(p): p for p in sorted(PACKAGE.rglob("*.py"))}


def imported(name: str) -> set[str]:
    """Every module that `name` imports, at its top or inside a function."""
    path, found = MODULES[name], set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{module}.{alias.name}"
                found.add(full if full in MODULES else module)
    return found


GRAPH = {name: imported(name) for name in MODULES}


def floor(name: str) -> int:
    best = max((r for rooms in FLOORS for r in rooms if f"{name}.".startswith(f"{r}.")), key=len)
    return next(i for i, rooms in enumerate(FLOORS) if best in rooms)


def test_imports_run_downwards():
    upward = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others & MODULES.keys()
        if floor(other) > floor(name)
    ]
    assert not upward


def test_the_stages_do_not_import_each_other():
    """But for protection, which stands between them: it reads a model as analysing does, and
    implanting puts it into the update."""
    stages = ("analysing", "selecting", "implanting", "evaluating")
    above = floor("loki_plugin.pipeline")  # what joins stages may lie in the room of one
    crossing = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others & MODULES.keys()
        for a in stages
        for b in stages
        if a != b
        and floor(name) < above
        and name.startswith(f"loki_plugin.{a}")
        and other.startswith(f"loki_plugin.{b}")
    ]
    assert not crossing


def test_no_circle():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in GRAPH[name] & MODULES.keys():
                visit(other, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_only_the_host_knows_axolotl():
    guests = [
        name
        for name, others in GRAPH.items()
        if any(other.split(".")[0] == "axolotl" for other in others)
        and not name.startswith(KNOWS_AXOLOTL)
    ]
    assert not guests


def test_the_rules_can_fail(tmp_path):
    """The reader of imports sees relative, absolute, and late ones."""
    assert "loki_plugin.rows" in GRAPH["loki_plugin.host.run"]
    assert "loki_plugin.implanting.adapter" in GRAPH["loki_plugin.host.run"]  # inside a function
    assert "axolotl.integrations.base" in GRAPH["loki_plugin.plugin"]
    assert floor("loki_plugin.host.run") > floor("loki_plugin.implanting.merge")
