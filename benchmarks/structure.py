"""What the code looks like from outside: folders, chains of imports, circles, parameters, lengths.

    python benchmarks/structure.py [SRC]      # default: src/transfuse of this checkout; needs the standard library only

A room is a folder of the package, or a file at its root. A chain is a way down the imports, circles counted as one
room; imports inside functions and for type checkers count like all others.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from statistics import median, quantiles

Graph = Mapping[str, set[str]]


def modules(root: Path) -> dict[str, Path]:
    """Dotted name below the package -> file ("" for the package itself)."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: Mapping[str, Path], package: str) -> set[str]:
    """The modules of the package that one of them imports."""
    here = name.split(".") if name else []
    inside = here if path.name == "__init__.py" else here[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = [*inside[: len(inside) - node.level + 1], *((node.module or "").split(".") if node.module else [])]
        elif (node.module or "").split(".")[0] == package:
            base = (node.module or "").split(".")[1:]
        else:
            continue
        for alias in node.names:
            whole = ".".join([*base, alias.name])
            found.add(whole if whole in known else ".".join(base))
    return (found & known.keys()) - {name}


def rooms_of(graph: Graph) -> dict[str, set[str]]:
    """The same graph with a folder as one node."""
    found: dict[str, set[str]] = {}
    for name, others in graph.items():
        room = name.split(".")[0]
        found.setdefault(room, set()).update({other.split(".")[0] for other in others} - {room})
    return found


def circles(graph: Graph) -> list[set[str]]:
    """Nodes that reach each other, in groups of more than one."""

    @cache
    def reached(start: str) -> frozenset[str]:
        seen, todo = set(), [start]
        while todo:
            for other in graph[todo.pop()] - seen:
                seen.add(other)
                todo.append(other)
        return frozenset(seen)

    groups = {frozenset({a} | {b for b in reached(a) if a in reached(b)}) for a in graph}
    return [set(group) for group in groups if len(group) > 1]


def longest_chain(graph: Graph) -> list[str]:
    """The longest way down, a circle being one step."""
    label = {name: name or "__init__" for name in graph}
    for group in circles(graph):
        label.update(dict.fromkeys(group, "/".join(sorted(one or "__init__" for one in group))))
    merged: dict[str, set[str]] = {}
    for name, others in graph.items():
        merged.setdefault(label[name], set()).update({label[other] for other in others} - {label[name]})

    @cache
    def below(name: str) -> tuple[str, ...]:
        return (name, *max((below(other) for other in sorted(merged[name])), key=len, default=()))

    return list(max((below(name) for name in sorted(merged)), key=len))


def functions(paths: Iterable[Path]) -> list[tuple[str, int, int, bool]]:
    """(name, lines of code without the docstring, parameters, whether it is public) of every function."""
    found = []
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        public = not any(part.startswith("_") for part in path.stem.split(".")) and path.parts[-2] != "cli"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body
                args = node.args
                count = len([*args.posonlyargs, *args.args, *args.kwonlyargs]) + bool(args.vararg) + bool(args.kwarg)
                count -= bool(args.args) and args.args[0].arg in ("self", "cls")
                length = (node.end_lineno or node.lineno) - body[0].lineno + 1
                top = public and node in tree.body and not node.name.startswith("_")
                found.append((f"{path.stem}.{node.name}", length, count, top))
    return found


def main() -> None:
    """Prints everything."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "src" / "transfuse"
    known = modules(root)
    graph = {name: imports(name, path, known, root.name) for name, path in known.items()}
    rooms = rooms_of(graph)
    sizes = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in known.items()}
    made = functions(known.values())
    lengths = [length for _, length, _, _ in made]
    at_root = sum(path.parent == root for path in known.values())
    print(f"rooms            {len(rooms)}, of which files at the root {at_root}")
    print(f"files            {len(known)}, lines {sum(sizes.values())}")
    for room in sorted(rooms):
        inside = [name for name in known if name.split(".")[0] == room]
        print(f"  {room or '__init__':<14} {len(inside):>3} files {sum(sizes[name] for name in inside):>6} lines")
    chain = longest_chain(rooms)
    print(f"longest chain    {len(chain)} rooms: {' > '.join(chain)}")
    print(f"                 {len(longest_chain(graph))} files")
    print(f"circles          {len(circles(rooms))} of rooms, {len(circles(graph))} of files")
    print(f"function length  median {median(lengths):g}, p90 {quantiles(lengths, n=10)[-1]:g}, longest {max(lengths)}")
    print(f"over 60 lines    {', '.join(f'{name} {n}' for name, n, _, _ in made if n > 60) or 'none'}")
    print(f"files over 400   {', '.join(f'{name} {n}' for name, n in sizes.items() if n > 400) or 'none'}")
    largest = sorted(((count, name) for name, _, count, public in made if public), reverse=True)[:10]
    print(f"parameters       {', '.join(f'{name} {count}' for count, name in largest)}")


if __name__ == "__main__":
    main()
