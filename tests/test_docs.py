"""The pages of docs/ name what the command line has, are what their scripts make, and their example runs."""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

from kascade_cli.app import COMMANDS, app

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def options(name):
    """Every long option of a command and its subcommands."""
    group = typer.main.get_command(app)
    command = group.get_command(typer.Context(group), name)
    found = {}
    for part in [command, *getattr(command, "commands", {}).values()]:
        for parameter in part.params:
            for text in (*parameter.opts, *parameter.secondary_opts):
                if text.startswith("--"):
                    found.setdefault(text, part.name)
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_named_in_the_commands_page(name):
    page = (DOCS / f"{name}.md").read_text()
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", page))
    shared = {"--debug", "--plugin"}  # every command's: the help of `kascade` and docs/strategies.md
    missing = {option: command for option, command in options(name).items() if option not in named | shared}
    assert not missing


PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "profiles/README.md")]
PAGES += sorted(DOCS.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        path, _, heading = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", other.read_text(), flags=re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings], target


SCRIPTS = ["scripts/strategies_page.py", "scripts/published_profiles.py", "benchmarks/performance_table.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_made_by_a_script_is_current(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, "--check"])
    spec = importlib.util.spec_from_file_location("script", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main() == 0, f"run python {script}"


def test_the_evidence_of_decisions_exists():
    files = [path for path in ROOT.rglob("*.py") if ".venv" not in path.parts]
    files += (ROOT / "benchmarks" / "results").glob("*.json*")
    page = (DOCS / "decisions.md").read_text()
    sections = re.split(r"^## ", page, flags=re.MULTILINE)[1:]
    assert all("**Status: " in text and "**Evidence:** " in text for text in sections)
    previous = []
    for name, inside in re.findall(r"`([\w./-]+\.(?:py|jsonl?))?(?:::)?([\w.]+)?`", page):
        if name:
            previous = [path for path in files if f"/{path.relative_to(ROOT)}".endswith(f"/{name}")]
            assert previous, name
        if inside and (name or inside.startswith("test_")):
            wanted = inside.split(".")[-1]
            assert any(re.search(rf"\b{wanted}\b", path.read_text()) for path in previous), (name, inside)


# -- the strategy that docs/strategies.md adds from outside of the package --

EXAMPLE = DOCS / "examples" / "my_strategy.py"


def kascade(folder, *arguments):
    """The command line in a process of its own, in a folder that is not the repository."""
    command = [sys.executable, "-m", "kascade_cli", *arguments]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_the_example_is_what_its_page_shows_and_short():
    code = EXAMPLE.read_text()
    assert f"```python\n{code}```" in (DOCS / "strategies.md").read_text()
    body = code[code.index("class ") :]
    assert len([line for line in body.splitlines() if line.strip()]) <= 20


def test_the_example_is_listed_by_the_help_where_it_is_imported(tmp_path):
    shutil.copy(EXAMPLE, tmp_path)
    plain = kascade(tmp_path, "evaluate", "--help")
    assert "omnikv" in plain.stdout
    assert "comb" not in plain.stdout
    for how in ("my_strategy", "my_strategy.py"):
        listed = kascade(tmp_path, "--plugin", how, "evaluate", "--help")
        assert "comb" in listed.stdout, listed.stderr


def test_the_example_is_evaluated_from_outside_of_the_package(tmp_path):
    shutil.copy(EXAMPLE, tmp_path)
    given = ["--max-length", "256", "--num-prompts", "1", "--questions", "1", "--min-keys", "8", "--json"]
    strategies = ["--strategies", "dense,comb:dense_layers=2"]
    done = kascade(tmp_path, "--plugin", "my_strategy.py", "evaluate", "demo-small", *strategies, *given)
    assert done.returncode == 0, done.stderr
    _, comb = json.loads(done.stdout)["rows"]
    assert comb["options"] == {"dense_layers": 2}
    # 2 of 8 layers read all, the others 8 keys or a tenth.
    assert 0.25 < comb["density"]["decode"] < 0.4


@pytest.fixture
def comb():
    """Imports the example, and forgets it."""
    from kascade_cli.sparse import strategy

    spec = importlib.util.spec_from_file_location("my_strategy", EXAMPLE)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    yield
    del strategy._REGISTRY["comb"]


def combed(queries, prompt, ratio, least, tile):
    """Which keys every query sees, bool [queries, queries]: the definition of `comb`, one key at a time."""
    seen = torch.zeros(queries, queries, dtype=torch.bool)
    for query in range(queries):
        before = query // tile * tile if query < prompt else query + 1  # behind the prompt: decode
        count = min(before, max(least, math.ceil(ratio * before)))
        for key in range(1, count + 1):
            seen[query, -(-key * before // count) - 1] = True
        if query < prompt:
            seen[query, before : query + 1] = True
    return seen


@pytest.mark.parametrize("prompt", [1, 31, 65, 130])
def test_the_example_reads_keys_at_even_distances(comb, make_tiny_model, prompt):
    from kascade_cli import attach

    model = make_tiny_model("llama")
    ids = torch.randint(3, 64, (1, prompt + 3), generator=torch.Generator().manual_seed(prompt))
    seen = combed(prompt + 3, 0 if prompt == 1 else prompt, 0.2, 4, 32)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        want = model(ids, attention_mask=torch.where(seen, 0.0, -torch.inf).double()[None, None]).logits[0]
        model.set_attn_implementation("sdpa")
        with attach(model, strategy="comb:dense_layers=0", ratio=0.2, min_keys=4) as run:
            out = model(ids[:, :prompt], use_cache=True)
            parts = [out.logits[0]]
            for position in range(prompt, prompt + 3):
                token = ids[:, position : position + 1]
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
                parts.append(out.logits[0])
    torch.testing.assert_close(torch.cat(parts), want)
    assert run.report()["keys_read"] == 4 * seen.sum()
