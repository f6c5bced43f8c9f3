"""Lists of modules as configurations have them: names, wildcards, regular expressions.

Files name modules as the checkpoint does (`backbone.layers.0`) or as transformers and vLLM do in memory
(`model.layers.0`); the two are one here. Lists may have tens of thousands of names (each expert of each layer), so
names are looked up and only patterns are tried.
"""

import fnmatch
import re
from collections.abc import Iterable, Iterator

PREFIXES = ("backbone.", "model.")


class ModuleList:
    """A list of modules.

    Args:
        entries: names (a name stands for all modules below it, too), wildcards such as `mtp*` (as the engines read
            Model Optimizer's: `mtp` and all below), or regular expressions that begin with `re:` and match from the
            start (compressed-tensors).

    Raises:
        re.error: a regular expression is none.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        self._names: set[str] = set()
        patterns: list[str] = []
        for entry in entries:
            if entry.startswith("re:"):
                patterns.append(f"(?:{entry.removeprefix('re:')}).*")
            elif any(sign in entry for sign in "*?["):
                ends = (entry[:-1], entry[:-1] + ".*") if re.search(r"[^.]\*$", entry) else (entry,)
                patterns += map(fnmatch.translate, ends)
            else:
                self._names.add(_bare(entry))
        self._pattern = re.compile("|".join(patterns)) if patterns else None

    def __contains__(self, module: str) -> bool:
        bare = _bare(module)
        if any(name in self._names for name in _ancestors(bare)):
            return True
        return self._pattern is not None and any(
            self._pattern.fullmatch(spelling) for spelling in (bare, *(prefix + bare for prefix in PREFIXES))
        )


def _bare(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _ancestors(name: str) -> Iterator[str]:
    """Yield a name and those of the modules that it is in."""
    while name:
        yield name
        name = name.rpartition(".")[0]
