import pytest

from kascade_cli.app import main
from kascade_cli.models import describe, load_model
from tests.integrations.transformers.naive import some_profile


@pytest.fixture
def run_kascade(capsys):
    """Runs the command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def small():
    """The 8-layer demo model and its tokenizer."""
    return load_model("demo-small", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def profile(small, tmp_path_factory):
    """A file with a profile of it: four anchors, a tenth of the keys."""
    path = tmp_path_factory.mktemp("profile") / "p.yaml"
    some_profile(describe(small[0], "demo-small"), anchors=[0, 1, 2, 7], ratio=0.1, min_keys=16).save(path)
    return path
