"""What classes and functions take, read from their source: importing torch and Lightning would take seconds.

Names are followed through the imports of a file to where they are defined. What cannot be followed (another language
than Python, names that are computed, `**kwargs` that go elsewhere than to the base class) is unknown, not wrong: the
parser, which imports everything, has the last word.
"""

import ast
import importlib.util
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

FOLLOWED = 8
"""Most imports that a name is followed through."""


@dataclass(frozen=True, eq=False)
class SourceFile:
    """A Python file, by the names at its top level."""

    module: str
    """Dotted name."""
    definitions: dict[str, ast.ClassDef | ast.FunctionDef]
    """What it defines."""
    imports: dict[str, tuple[str, str]]
    """Name in the file -> (module, name in it, empty for the module itself)."""
    aliases: dict[str, str]
    """Name -> what a line at the top level assigns to it, as it is written."""


@dataclass(frozen=True)
class Definition:
    """A class or function, and the file that it stands in."""

    node: ast.ClassDef | ast.FunctionDef
    file: SourceFile


@dataclass(frozen=True)
class Kind:
    """The type of a parameter, as it is written."""

    annotation: ast.expr
    file: SourceFile = field(repr=False)
    is_option: bool = False
    """Whether the parameter is given by its name only."""

    def choices(self) -> list[str]:
        """Return the values that the type lists: of a Literal, here or by its name in another file, or of a flag."""
        found: list[str] = []
        for member in self.members():
            text = ast.unparse(member.annotation)
            if text == "bool":
                found += ["true", "false"]
            elif text.startswith("Literal["):
                found += [str(item) for item in ast.literal_eval(f"[{text[8:]}")]
            elif literal := _literal(member.file, text):
                found += literal
        return found

    def members(self) -> "list[Kind]":
        """Return the members of a union and the items of a list or tuple, flattened; of another type only itself."""
        node = self.annotation
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return Kind(ast.parse(node.value, mode="eval").body, self.file).members()
        if isinstance(node, ast.BinOp):
            inner = [node.left, node.right]
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) in SEVERAL:
            inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        else:
            return [self]
        return [member for item in inner for member in Kind(item, self.file).members()]

    @property
    def is_flag(self) -> bool:
        """Whether true and false are values of it."""
        return any(ast.unparse(member.annotation) == "bool" for member in self.members())

    @property
    def is_list(self) -> bool:
        """Whether a list is a value of it."""
        return "list[" in ast.unparse(self.annotation).lower()

    def fields(self) -> "dict[str, Kind] | None":
        """Return the fields if the type is a dataclass, else None."""
        found = _follow(self.file, ast.unparse(self.annotation))
        return parameters_of(found) if found is not None and _is_dataclass(found.node) else None


SEVERAL = ("list", "tuple", "Sequence", "Optional", "Union", "Annotated", "List", "Iterable")
"""Types whose arguments are the types of what is in them."""


def parameters(path: str) -> dict[str, Kind] | None:
    """Return the parameters of a class or function by its dotted path, None if they cannot be told."""
    module, _, name = path.rpartition(".")
    file = _read(module)
    found = None if file is None else _follow(file, name)
    return None if found is None else parameters_of(found)


def subclasses(module: str, base: str) -> list[str]:
    """Return the dotted paths of the classes in a module that derive from a base class, those with ABC left out."""
    file = _read(module)
    if file is None:
        return []
    classes = [node for node in file.definitions.values() if isinstance(node, ast.ClassDef)]
    found = [Definition(node, file) for node in classes if "ABC" not in map(ast.unparse, node.bases)]
    return [f"{module}.{one.node.name}" for one in found if _derives(one, base)]


def _derives(found: Definition, base: str) -> bool:
    """Return whether a class has a base class of that name, directly or not."""
    names = [ast.unparse(node) for node in found.node.bases] if isinstance(found.node, ast.ClassDef) else []
    above = [_follow(found.file, name) for name in names]
    return base in names or any(_derives(one, base) for one in above if one is not None)


def parameters_of(found: Definition) -> dict[str, Kind] | None:
    """Return the parameters of a class or function that was found, those passed on to base classes included."""
    node, file = found.node, found.file
    if isinstance(node, ast.FunctionDef):
        return _arguments(node.args, file)
    if _is_dataclass(node):
        own = {
            line.target.id: Kind(line.annotation, file)
            for line in node.body
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
        }
        inherited = _of_bases(found)
        return None if inherited is None else inherited | own
    init = next((line for line in node.body if isinstance(line, ast.FunctionDef) and line.name == "__init__"), None)
    if init is None:
        return _of_bases(found)
    own = _arguments(init.args, file)
    own.pop([*init.args.posonlyargs, *init.args.args][0].arg)
    if init.args.kwarg is None:
        return own
    inherited = _of_bases(found) if _passes_on(init, init.args.kwarg.arg) else None
    return None if inherited is None else inherited | own


def _of_bases(found: Definition) -> dict[str, Kind] | None:
    """Return the parameters of the first base class that says any."""
    assert isinstance(found.node, ast.ClassDef)
    for base in found.node.bases:
        definition = _follow(found.file, ast.unparse(base).partition("[")[0])
        if definition is None:
            if ast.unparse(base).partition("[")[0] in ("ABC", "object", "Generic", "Protocol", "abc.ABC"):
                continue
            return None
        if inherited := parameters_of(definition):
            return inherited
    return {}


def _arguments(arguments: ast.arguments, file: SourceFile) -> dict[str, Kind]:
    anything = ast.Name("Any")
    named = [*arguments.posonlyargs, *arguments.args]
    found = {argument.arg: Kind(argument.annotation or anything, file) for argument in named}
    return found | {option.arg: Kind(option.annotation or anything, file, True) for option in arguments.kwonlyargs}


def _literal(file: SourceFile, name: str) -> list[str]:
    """Return the values of a `NAME = Literal[...]`, empty if the name is anything else."""
    module, inner = file.imports.get(name, (file.module, name))
    source = _read(module)
    text = source.aliases.get(inner, "") if source is not None else ""
    return [str(item) for item in ast.literal_eval(f"[{text[8:]}")] if text.startswith("Literal[") else []


def _passes_on(init: ast.FunctionDef, keywords: str) -> bool:
    """Return whether a constructor gives its `**keywords` to `super().__init__`."""
    calls = [node for node in ast.walk(init) if isinstance(node, ast.Call)]
    return any(
        ast.unparse(call.func) == "super().__init__"
        and any(word.arg is None and ast.unparse(word.value) == keywords for word in call.keywords)
        for call in calls
    )


def _is_dataclass(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef) and any(
        ast.unparse(decorator).partition("(")[0].rpartition(".")[2] == "dataclass" for decorator in node.decorator_list
    )


def _follow(file: SourceFile, name: str) -> Definition | None:
    """Return what a name in a file stands for, through imports."""
    for _ in range(FOLLOWED):
        if name in file.definitions:
            return Definition(file.definitions[name], file)
        first, _, rest = name.partition(".")
        if first not in file.imports:
            return None
        module, inner = file.imports[first]
        name = ".".join(filter(None, (inner, rest)))
        *parents, name = name.split(".")
        source = _read(".".join([module, *parents]))
        if source is None:
            return None
        file = source
    return None


@cache
def _read(module: str) -> SourceFile | None:
    """Return a module's source, None if it has none."""
    path = _find(module)
    if path is None:
        return None
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    definitions: dict[str, ast.ClassDef | ast.FunctionDef] = {}
    imports: dict[str, tuple[str, str]] = {}
    aliases: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            aliases[node.targets[0].id] = ast.unparse(node.value)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            imports |= {alias.asname or alias.name: (source, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            imports |= {alias.asname or alias.name.partition(".")[0]: (alias.name, "") for alias in node.names}
    return SourceFile(module, definitions, imports, aliases)


def _find(module: str) -> Path | None:
    """Return the file of a module; only its first part is looked up, which imports nothing."""
    first, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(first)
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder, *rest)
        for file in (path / "__init__.py", path.with_name(path.name + ".py")):
            if file.is_file():
                return file
    return Path(spec.origin) if spec is not None and not rest and spec.origin and spec.has_location else None
