"""Rules that hold for every line of the library: a light import, one direction, no pickle, no network, no hidden dice.

The rules read the source; each is tried on lines that break it before it is trusted on lines that should not.
"""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

import safescale_lib

ROOT = Path(safescale_lib.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
every_file = pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])

FAMILIES = {"vfm", "llm", "vlp", "vlm", "dm", "agent"}
MAY_IMPORT = {
    "world": set(),
    "measure": {"world"},
    "search": {"measure", "world"},
    "zoo": {"search", "measure", "world"},
    **{family: {"search", "measure", "zoo", "survey", "world"} for family in FAMILIES},
}


# --- reading imports ----------------------------------------------------------------------------------------------


def dotted(node):
    """'a.b.c' of a name or an attribute chain, else ''."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}" if dotted(node.value) else ""
    return node.id if isinstance(node, ast.Name) else ""


def imported(tree, module):
    """Every module a file names in an import, wherever it stands; `from a import b` gives 'a.b'. module: its own name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))


def module_name(path):
    return ".".join(["safescale_lib", *path.relative_to(ROOT).with_suffix("").parts])


def wrong_way(source, module):
    """Packages of ours that a module imports though it may not."""
    own = module.split(".")[1]
    ours = {name.split(".")[1] for name in imported(ast.parse(source), module) if name.startswith("safescale_lib.")}
    ours = {name for name in ours if name in FAMILIES or (ROOT / name).is_dir() or (ROOT / f"{name}.py").is_file()}
    return sorted(ours - MAY_IMPORT[own] - {own}) if own in MAY_IMPORT else []


# --- reading calls ------------------------------------------------------------------------------------------------

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
NETWORK_MODULES = {"requests", "urllib", "urllib3", "httpx", "aiohttp", "socket", "ftplib", "telnetlib", "smtplib"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "numpy.load", "os.system", "os.popen"}
SEEDED_NUMPY = {"default_rng", "Generator", "SeedSequence", "PCG64", "Philox", "BitGenerator"}
TORCH_DICE = {
    "rand",
    "randn",
    "randint",
    "randperm",
    "normal",
    "bernoulli",
    "multinomial",
    "poisson",
    "rand_like",
    "randn_like",
}
TENSOR_DICE = {"uniform_", "normal_", "random_", "bernoulli_", "exponential_", "log_normal_", "cauchy_", "geometric_"}


def aliases(tree, module):
    """What each imported name stands for: {'np': 'numpy', 'rand': 'torch.rand'}."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def full_name(node, names):
    head, _, rest = dotted(node).partition(".")
    return ".".join(filter(None, [names.get(head, head), rest]))


def unsafe(source, module="safescale_lib.x.y"):
    """Lines that unpickle, evaluate text, or could reach the network."""
    tree = ast.parse(source)
    names = aliases(tree, module)
    found = {name for name in imported(tree, module) if name.split(".")[0] in UNSAFE_MODULES | NETWORK_MODULES}
    found |= {
        name for node in ast.walk(tree) if isinstance(node, ast.Call) and (name := full_name(node.func, names)) in UNSAFE_CALLS
    }
    return sorted(found)


def dice(source, module="safescale_lib.x.y"):
    """Calls that draw from or reseed a global random stream; a fork of torch's stream (`fork_rng`) is a stream of one's own."""
    tree = ast.parse(source)
    names, found = aliases(tree, module), []

    def visit(node, forked):
        if isinstance(node, ast.With):
            forked |= any(dotted(getattr(item.context_expr, "func", None)).endswith("fork_rng") for item in node.items)
        if isinstance(node, ast.Call):
            name, seeded = full_name(node.func, names), any(k.arg == "generator" for k in node.keywords)
            last = name.split(".")[-1] or getattr(node.func, "attr", "")
            if name.startswith("numpy.random."):
                bad = last not in SEEDED_NUMPY or not (node.args or node.keywords)  # default_rng() has no seed
            elif name.startswith("random."):
                bad = last != "Random" or not node.args
            elif name.startswith("torch."):
                reseeds = last in ("manual_seed", "manual_seed_all", "seed", "set_rng_state")
                bad = not forked and (reseeds or (last in TORCH_DICE and not seeded))
            else:
                method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
                bad = not forked and method in TENSOR_DICE and not seeded
            if bad:
                found.append(f"line {node.lineno}: {ast.unparse(node.func)}")
        for child in ast.iter_child_nodes(node):
            visit(child, forked)

    visit(tree, False)
    return found


def undocumented(source):
    """Public functions and classes at the top of a module, and the module itself, that say nothing about themselves."""
    tree = ast.parse(source)
    things = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and n.name[0] != "_"]
    return ([] if ast.get_docstring(tree) else ["module"]) + [t.name for t in things if not ast.get_docstring(t)]


# --- the rules catch what breaks them -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "line", "wanted"),
    [
        ("safescale_lib.world.scenes", "import safescale_lib.measure.costs", ["measure"]),
        ("safescale_lib.measure.roc", "from safescale_lib import search, measure", ["search"]),
        ("safescale_lib.search.pixels", "def f():\n    from safescale_lib.zoo import load", ["zoo"]),
        ("safescale_lib.search.pixels", "from ..zoo import load", ["zoo"]),
        ("safescale_lib.search.pixels", "from .. import zoo, measure", ["zoo"]),
        ("safescale_lib.zoo.recipes", "from safescale_lib.vfm.vit import pgd", ["vfm"]),
        ("safescale_lib.vfm.vit", "from safescale_lib.llm import tokens", ["llm"]),
        ("safescale_lib.vfm.vit", "import importlib\nimportlib.import_module('safescale_lib.dm')", ["dm"]),
        ("safescale_lib.vfm.vit", "from safescale_lib.survey import technique\nfrom safescale_lib import __version__", []),
        ("safescale_lib.search.pixels", "from .ball import Ball\nfrom ..measure import costs\nimport torch", []),
    ],
)
def test_rule_of_direction(module, line, wanted):
    assert wrong_way(line, module) == wanted


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import urllib.request as u",
        "from requests import get",
        "import torch as t\nt.load('x')",
        "from torch import load\nload('x')",
        "import numpy as np\nnp.load('x')",
        "eval('1')",
        "exec(text)",
        "__import__('socket')",
    ],
)
def test_rule_of_safety(line):
    assert unsafe(line)


@pytest.mark.parametrize(
    "line", ["model.eval()", "from safetensors.torch import load", "import json\njson.load(f)", "load('vit')"]
)
def test_rule_of_safety_lets_pass(line):
    assert not unsafe(line)


@pytest.mark.parametrize(
    "line",
    [
        "import torch\ntorch.manual_seed(0)",
        "import torch\ntorch.random.manual_seed(0)",
        "from torch import manual_seed as m\nm(0)",
        "import torch\ntorch.cuda.manual_seed_all(0)",
        "import torch\ntorch.rand(3)",
        "import torch as t\nt.randn_like(x)",
        "x.normal_()",
        "f(x).uniform_(0, 1)",
        "import numpy as np\nnp.random.seed(0)",
        "import numpy as np\nnp.random.rand(3)",
        "from numpy.random import shuffle\nshuffle(x)",
        "import numpy as np\nnp.random.default_rng()",
        "import random\nrandom.seed(0)",
        "from random import choice\nchoice(x)",
    ],
)
def test_rule_of_dice(line):
    assert dice(line)


@pytest.mark.parametrize(
    "line",
    [
        "import torch\ng = torch.Generator().manual_seed(0)\ntorch.rand(3, generator=g)\nx.normal_(generator=g)",
        "import torch\nwith torch.random.fork_rng(devices=[]):\n    torch.random.manual_seed(0)\n    torch.rand(3)",
        "import numpy as np\nrng = np.random.default_rng([0, seed])\nrng.normal(size=3)",
        "import random\nrandom.Random(3).choice(x)",
    ],
)
def test_rule_of_dice_lets_pass(line):
    assert not dice(line)


def test_rule_of_docstrings():
    assert undocumented("def f(): ...\nclass A: ...\ndef _g(): ...\n") == ["module", "f", "A"]
    assert undocumented('"""M."""\ndef f():\n    """F."""\n') == []


# --- the library keeps them ---------------------------------------------------------------------------------------


def test_the_rules_have_something_to_read():
    assert len(FILES) > 15
    assert {path.parent.name for path in FILES} >= {"world", "zoo", "search", "measure", "survey", "vfm"}


@every_file
def test_imports_run_one_way(path):
    assert wrong_way(path.read_text(), module_name(path)) == []


@every_file
def test_nothing_unpickles_evaluates_or_dials_out(path):
    assert unsafe(path.read_text(), module_name(path)) == []


@every_file
def test_nothing_draws_from_a_global_stream(path):
    assert dice(path.read_text(), module_name(path)) == []


@every_file
def test_everything_public_says_what_it_is(path):
    assert undocumented(path.read_text()) == []


# --- a light import -----------------------------------------------------------------------------------------------


def seconds(code):
    """Shortest of three runs of a fresh interpreter."""
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
        times.append(time.perf_counter() - begun)
    return min(times)


def test_import_is_quick():
    assert seconds("import safescale_lib") - seconds("pass") <= 0.3


def test_import_brings_nothing_heavy():
    code = "import sys, safescale_lib; print(safescale_lib.__version__, *sys.modules)"
    version, *modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert version == safescale_lib.__version__
    heavy = {"torch", "numpy", "scipy", "sklearn", "transformers", "diffusers", "matplotlib", "yaml", "rich", "typer"}
    assert heavy.isdisjoint(modules)
