"""The shape of the project: who may import whom, how large a file and a function may be."""

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sam3_lora"

MAX_ROOT_FILES = 8
MAX_PACKAGE_FILES = 44
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 50
MAX_MAIN_LINES = 60

# Which of our modules each module may import; one that is not named may import none.
MAY_IMPORT = {
    "startup": {"packages"},
    "flags": {"config", "options", "processes"},
    "model": {"lora_layers", "processes"},
    "checkpoint": {"files", "lora_layers", "model"},
    "config": {"files", "images", "lora_layers", "options", "processes"},
    "coco": {"faults", "geometry", "images", "layout", "processes"},
    "layout": {"geometry", "images"},
    "faults": {"geometry", "images", "layout", "processes"},
    "images": {"geometry"},
    "repair": {"coco", "faults", "geometry", "images", "layout"},
    "overview": {"coco", "drawing", "faults", "images", "layout", "packages", "tables"},
    "formats": {"coco", "faults", "images", "layout", "shapes"},
    "shapes": {"coco", "faults", "geometry", "images", "layout"},
    "mask_images": {"coco", "shapes", "images"},
    "tiles": {"coco", "geometry"},
    "dataset": {"coco", "forward", "geometry", "images", "tiles"},
    "loader": {"dataset", "forward", "images", "processes"},
    "losses": {"matching"},
    "metrics": {"coco"},
    "forward": {"model"},
    "evaluation": {"lora_layers", "checkpoint", "coco", "engine", "forward", "metrics", "model"}
    | {"processes"},
    "scenes": {"coco", "geometry"},
    "engine": {"processes"},
    "features": {"dataset", "files", "forward", "loader", "processes"},
    "memory": {"forward", "lora_layers", "losses", "model"},
    "notices": {"coco", "loader", "options", "tables"},
    "preflight": {"checkpoint", "coco", "config", "features", "files", "forward"}
    | {"layout", "lora_layers", "memory", "model", "notices", "overview", "packages", "runlog"},
    "prediction": {"checkpoint", "coco", "dataset", "evaluation", "forward", "lora_layers"}
    | {"images", "metrics", "model", "tiles"},
    "prompts": {"config", "forward", "geometry", "images", "prediction", "tiles"},
    "exchange": {"checkpoint", "lora_layers"},
    "card": {"model"},
    "intervals": {"coco", "metrics"},
    "report": {"coco", "drawing", "images", "intervals", "overview", "tables"},
    "drawing": {"files"},
    "runlog": {"checkpoint", "drawing", "files", "layout", "processes"},
    "video": {"coco", "dataset", "drawing", "files", "forward", "geometry", "images", "metrics"}
    | {"model", "prediction", "processes"},
}
# What scripts of a folder share; `rivals` is for all benchmarks.
SHARED_BY_SCRIPTS = {
    "demo/make_sam3_tiny.py": {"pretraining"},
    "benchmarks/rivals.py": {"make_sam3_tiny"},
    # These look at the training script from within.
    "benchmarks/kills.py": {"prepare_data", "train_sam3_lora"},
    "benchmarks/soak.py": {"prepare_data", "train_sam3_lora"},
}
# Which files of the product may import a library; the rest of the product may not.
ONLY_IMPORTERS = {
    "pycocotools.mask": {"sam3_lora/coco.py"},
    "yaml": {"sam3_lora/config.py", "sam3_lora/formats.py"},
    "transformers": {"sam3_lora/model.py"},
    "peft": set(),
}
SHADOWED_LIBRARIES = ("datasets", "evaluate", "utils", "peft", "sam3", "types", "logging")
SHADOWED_LIBRARIES += ("tokenizers",)
# The first folder of paths that exist on one machine only, without the words themselves here.
MACHINE_PATH = re.compile(rf"(?<![\w.:/-])/(?:{'|'.join(('wor' + 'k', 'far' + 'm', 'home'))})/\w")

ROOT_FILES = sorted(ROOT.glob("*.py"))
PACKAGE_FILES = sorted(PACKAGE.glob("*.py"))
SIDE_FILES = sorted([*ROOT.glob("demo/*.py"), *ROOT.glob("benchmarks/*.py")])
PRODUCT_FILES = ROOT_FILES + PACKAGE_FILES
SCRIPTS = [path for path in ROOT_FILES if path.stem != "lora_layers"] + SIDE_FILES
ALL_FILES = PRODUCT_FILES + SIDE_FILES + sorted(ROOT.glob("tests/**/*.py"))


def name_of(path: Path) -> str:
    """A path as the project writes it, from the root and with forward slashes."""
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    """Every node of a file's tree."""
    return list(ast.walk(tree_of(path)))


def place_of(path: Path, node: ast.AST) -> str:
    """File and line of a node."""
    return f"{name_of(path)}:{getattr(node, 'lineno', 0)}"


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Every module a file imports, wherever in it; `from a import b` gives both `a` and `a.b`."""
    found = set()
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def our_imports_of(path: Path) -> set[str]:
    """The modules of the project that a file imports: package modules by stem, root files too."""
    found = imports_of(path)
    ours = {item.stem for item in PACKAGE_FILES if f"sam3_lora.{item.stem}" in found}
    ours |= {item.stem for item in ROOT_FILES + SIDE_FILES if item.stem in found}
    return ours


def each(paths: list[Path]) -> pytest.MarkDecorator:
    """Runs a test once for each file."""
    return pytest.mark.parametrize("path", paths, ids=[name_of(path) for path in paths])


def test_rooms_are_few() -> None:
    assert len(ROOT_FILES) <= MAX_ROOT_FILES
    assert len(PACKAGE_FILES) <= MAX_PACKAGE_FILES
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert folders <= {"__pycache__"}


def test_no_root_name_shadows_a_library() -> None:
    names = {path.stem for path in ROOT.iterdir()}
    assert names.isdisjoint(SHADOWED_LIBRARIES)


def test_package_docstring_is_a_map_of_its_modules() -> None:
    tree = tree_of(PACKAGE / "__init__.py")
    assert len(tree.body) == 1
    named = set(re.findall(r"^(\w+)  +", ast.get_docstring(tree), re.MULTILINE))
    assert {path.stem for path in PACKAGE_FILES} - {"__init__"} <= named


@each(PRODUCT_FILES + SIDE_FILES)
def test_imports_follow_the_table(path: Path) -> None:
    ours = our_imports_of(path)
    if path in SCRIPTS:
        allowed = {item.stem for item in PACKAGE_FILES} | {"lora_layers"}
        allowed |= SHARED_BY_SCRIPTS.get(name_of(path), set())
        allowed |= {"rivals"} if path.parent.name == "benchmarks" else set()
    else:
        allowed = MAY_IMPORT.get(path.stem, set())
    assert ours <= allowed, f"{name_of(path)} imports {sorted(ours - allowed)}"
    relative = [name for name in imports_of(path) if name.startswith(".")]
    assert relative == [], f"{name_of(path)}: write `from sam3_lora.x import y`"


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_the_table_allows_no_more_than_is_imported(name: str) -> None:
    unused = MAY_IMPORT[name] - our_imports_of(PACKAGE / f"{name}.py")
    assert unused == set(), f"{name} imports none of {sorted(unused)}: take it out of the table"


@each(PRODUCT_FILES)
def test_libraries_have_one_importer(path: Path) -> None:
    found = imports_of(path)
    for library, importers in ONLY_IMPORTERS.items():
        used = any(name == library or name.startswith(f"{library}.") for name in found)
        assert not used or name_of(path) in importers, f"{name_of(path)} imports {library}"


@each(SIDE_FILES)
def test_only_benchmarks_compare_with_peft(path: Path) -> None:
    found = {name.split(".")[0] for name in imports_of(path)}
    assert "peft" not in found or path.parent.name == "benchmarks"


def test_lora_layers_needs_only_torch() -> None:
    path = ROOT / "lora_layers.py"
    if not path.exists():
        pytest.skip("lora_layers.py is not there")
    standard = {"__future__", "collections", "contextlib", "dataclasses", "difflib", "math", "re"}
    standard |= {"typing", "functools", "itertools"}
    assert {name.split(".")[0] for name in imports_of(path)} <= standard | {"torch"}


@each(ALL_FILES)
def test_file_and_function_sizes(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{name_of(path)} has {lines} lines"
    for node in nodes_of(path):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        length = node.end_lineno - node.lineno + 1
        limit = MAX_MAIN_LINES if node.name == "main" else MAX_FUNCTION_LINES
        assert length <= limit, f"{name_of(path)}:{node.lineno} {node.name} has {length} lines"


@each(PACKAGE_FILES)
def test_package_does_not_print_or_exit(path: Path) -> None:
    for node in nodes_of(path):
        if isinstance(node, ast.Call):
            called, place = ast.unparse(node.func), place_of(path, node)
            assert called not in ("print", "sys.exit", "exit", "quit"), f"{place} calls {called}"
            # It speaks before a script has a `main` that could return a code.
            assert called != "SystemExit" or path.stem == "startup", f"{place} exits"


@each(ALL_FILES)
def test_no_bare_except_and_no_lax_loading(path: Path) -> None:
    for node in nodes_of(path):
        bare = isinstance(node, ast.ExceptHandler) and node.type is None
        assert not bare, f"{place_of(path, node)} except:"
        if isinstance(node, ast.Call):
            place = place_of(path, node)
            # Only calls that a test below looks at are worth the text.
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            called = ast.unparse(node.func) if name in ("load", "zip") else name
            off = {
                keyword.arg
                for keyword in node.keywords
                if isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            }
            assert "weights_only" not in off, f"{place} loads a pickle"
            # zip has a keyword of the same name.
            assert "strict" not in off or called == "zip", f"{place} loads with strict off"
            assert called != "yaml.load", f"{place}: yaml.load can run code"


@each([path for path in SCRIPTS if path.parent == ROOT])
def test_script_has_its_parts(path: Path) -> None:
    tree = tree_of(path)
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert ast.get_docstring(tree), f"{name_of(path)} has no docstring"
    assert {"build_parser", "main"} <= names, f"{name_of(path)} lacks build_parser or main"


def test_no_path_of_one_machine_in_the_tree() -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    suffixes = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".sh", ".json", ".cfg", ""}
    for name in listed.stdout.decode().split("\0"):
        path = ROOT / name
        if name and path.is_file() and path.suffix in suffixes:
            text = path.read_text(encoding="utf-8", errors="replace")
            match = MACHINE_PATH.search(text)
            assert match is None, f"{name} holds the path {match.group() if match else ''}..."
