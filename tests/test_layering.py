"""The house rules that a machine can check: imports go down, names say the paper."""

import ast
import configparser
import fnmatch
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
BELOW = {
    "pallas_kernels": set(),
    "attn": {"pallas_kernels"},
    "models": {"attn"},
    "experiments": {"attn", "models", "pallas_kernels"},
}
# inside a package a folder imports those that stand before it, those of one place never
# each other; what is not named comes last
ORDER = {
    "pallas_kernels": (
        ("logits",), ("__init__", "tile", "tiles", "arrays", "padding"),
        ("tables", "candidates"),
        ("schedule", "refusals", "machine"), ("tile_patterns",),
        ("flash", "decode", "linear", "delta", "memory", "scan"), ("blocks",),
        ("matrix",), ("tune",),
    ),
    "attn": (
        ("contract", "masks"), ("positions",), ("exact",), ("parallel", "sparse"),
        ("recurrent", "cache"),
    ),
    "experiments": (("cli", "data", "training"), ("measure",)),
}
# files directly in attn/ that are no family: what surrounds the mechanisms
AROUND = {"__init__", "__main__", "masks", "positions", "layers", "template", "grid",
          "mixers", "baseconv", "mla", "maps", "compose"}
FOR_FAMILIES = {"softmax"}  # the family that others may build on
ANALYSES = {"dsf"}  # papers that say what attention is, not another one
LAYERS = {"cmr"}  # papers of what stands before a layer: no q, k and v
FILES = [path for package in BELOW for path in sorted((ROOT / package).rglob("*.py"))]
FAMILIES = [path for path in FILES if path.parent == ROOT / "attn"
            and path.stem not in AROUND | FOR_FAMILIES]
NAMES = {path.stem for path in FAMILIES}
PAPER = re.compile(r"\(.+, (19|20)\d\d\)\s+arXiv:\d{4}\.\d{4,5}")


def imported(path):
    """Top-level names of this repository that a file imports, as (package, module)."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, *rest = name.split(".")
            if package in (*BELOW, "tests"):
                module = (rest or ["__init__"])[0]
                there = (ROOT / package / module).exists()
                there |= (ROOT / package / f"{module}.py").exists()
                yield package, module if there else "__init__"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    package = path.relative_to(ROOT).parts[0]
    for other, module in imported(path):
        assert other == package or other in BELOW[package], f"{path} imports {other}"
        own = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
        if package == other == "attn":
            assert module not in NAMES, f"{path} imports family {module}"
            if own == "layers":
                assert module in ("contract", "positions"), f"{path} imports {module}"
        if other == package and module != own and named(package, own):
            assert place(package, module) < place(package, own), (
                f"{path} imports {other}.{module}, which stands beside or above it"
            )


def named(package, name):
    """Whether a file or folder has a place in the order of its package."""
    return any(name in names for names in ORDER.get(package, ()))


def place(package, name):
    """Which place that is; the last for what has none."""
    order = ORDER[package]
    at = [n for n, names in enumerate(order) if name in names]
    return at[0] if at else len(order)


@pytest.mark.parametrize("path", FAMILIES, ids=lambda path: path.stem)
def test_a_family_names_its_paper(path):
    tree = ast.parse(path.read_text())
    classes = {node.name.lower(): node for node in tree.body
               if isinstance(node, ast.ClassDef)}
    assert path.stem in classes, f"{path} has no class {path.stem}"
    for node in (tree, classes[path.stem]):
        first = (ast.get_docstring(node) or "").partition("\n")[0]
        assert PAPER.search(first), f"{path}: {first}"
    assert list((ROOT / "tests").rglob(f"test_{path.stem}.py"))


def test_every_family_obeys_the_laws():
    laws = (ROOT / "tests" / "laws.py").read_text()
    attentions = [path for path in FAMILIES if path.stem not in ANALYSES | LAYERS]
    for path in (*attentions, ROOT / "attn" / "softmax.py"):
        assert f"from attn.{path.stem} import" in laws, path


def test_files_are_not_named_after_nothing():
    for path in FILES:
        assert path.stem not in ("utils", "helpers", "common", "base", "misc"), path


def test_the_table_in_the_readme_points_at_files():
    rows = re.findall(r"^\| *\d+ \|.*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 68
    for row in rows:
        for name in re.findall(r"\(((?:attn|models|experiments|tests)/[\w/.]+)\)", row):
            assert (ROOT / name).exists(), name


def test_an_attention_is_imported_without_flax():
    code = "import sys, attn.softmax, attn.lightning, attn.based, attn.landmark, "
    code += "attn.snapkv; assert 'flax' not in sys.modules, 'flax was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_wheel_holds_what_does_not_collide():
    """`models` and `experiments` are names of the user's own, too."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    patterns = settings["options.packages.find"]["include"].split()
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    held = {p for p in packages if any(fnmatch.fnmatch(p, a) for a in patterns)}
    assert held == {"attn", "pallas_kernels"} and "models" in packages
