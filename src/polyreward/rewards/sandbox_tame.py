"""Whether the code of a test parses, and whether its process can serve the next test as well.

Making a process costs more than most tests. Tests that can only compute, call and compare leave nothing behind in
the process that runs them, so that it runs the next one too. The list below is of what is known to be harmless; any
other test runs in a process of its own. Programs never share a process, and tests never share one with a program, so
this choice is about tests among themselves.
"""

from __future__ import annotations

import ast
import functools
import warnings

from polyreward.rewards.sandbox_inside.client import HARMLESS_MODULES

_NODES = (
    ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.keyword, ast.Lambda, ast.Return, ast.Expr, ast.Pass,
    ast.Assign, ast.AugAssign, ast.AnnAssign, ast.For, ast.While, ast.If, ast.Break, ast.Continue, ast.Assert,
    ast.Try, ast.ExceptHandler, ast.Raise, ast.Import, ast.ImportFrom, ast.alias, ast.Call, ast.Name, ast.Constant,
    ast.Attribute, ast.Subscript, ast.Slice, ast.Starred, ast.Tuple, ast.List, ast.Dict, ast.Set,
    ast.BinOp, ast.UnaryOp,
    ast.BoolOp, ast.Compare, ast.IfExp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.comprehension,
    ast.JoinedStr, ast.FormattedValue, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context,
)  # fmt: skip
_NAMES = frozenset(
    [
        "breakpoint",
        "classmethod",
        "compile",
        "copyright",
        "credits",
        "delattr",
        "dir",
        "eval",
        "exec",
        "exit",
        "getattr",
        "globals",
        "help",
        "input",
        "license",
        "locals",
        "memoryview",
        "object",
        "open",
        "property",
        "quit",
        "setattr",
        "staticmethod",
        "super",
        "type",
        "vars",
    ]
)
_ATTRIBUTES = frozenset(
    [
        "register",
        "format_map",
        "gi_frame",
        "gi_code",
        "cr_frame",
        "ag_frame",
        "f_globals",
        "f_locals",
        "f_builtins",
        "f_back",
        "tb_frame",
        "tb_next",
        "mro",
        "with_traceback",
        "add_note",
    ]
)
_MODULES = frozenset(HARMLESS_MODULES)
_MEMBERS = {
    "collections": frozenset(("Counter", "OrderedDict", "defaultdict", "deque")),
    "typing": frozenset(
        ("Any", "Callable", "Dict", "Iterable", "List", "Optional", "Sequence", "Set", "Tuple", "Union")
    ),
    "copy": frozenset(("copy", "deepcopy")),
    "fractions": frozenset(("Fraction",)),
}


@functools.lru_cache(maxsize=4096)
def is_tame(code: str) -> bool:
    """Whether a test leaves its process as it found it, as far as its text shows.

    Raises
    ------
    SyntaxError, ValueError, MemoryError, RecursionError
        Where the code does not parse or compile.

    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(code, "tests.py")
        compile(tree, "tests.py", "exec", dont_inherit=True)
    return all(map(_harmless, ast.walk(tree)))


def _harmless(node: ast.AST) -> bool:
    match node:
        case ast.Name(id=name):
            return name not in _NAMES and (not name.startswith("__") or name == "__name__")
        case ast.Attribute(attr=name, ctx=context):
            return isinstance(context, ast.Load) and not name.startswith("_") and name not in _ATTRIBUTES
        case ast.Subscript(value=value, ctx=context):
            return isinstance(context, ast.Load) or isinstance(value, ast.Name | ast.Subscript)
        case ast.Import(names=names):
            return all(alias.name in _MODULES for alias in names)
        case ast.ImportFrom(module=module, names=names, level=0) if module in _MODULES:
            return all(alias.name != "*" and not alias.name.startswith("_") for alias in names)
        case ast.ImportFrom(module=str(module), names=names, level=0):
            return all(alias.name in _MEMBERS.get(module, ()) for alias in names)
        case ast.FunctionDef(decorator_list=[_, *_]) | ast.ImportFrom():
            return False
        case ast.Constant(value=str(text)):
            return not text.startswith("__")
    return isinstance(node, _NODES)
